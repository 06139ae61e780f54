"""Generation equals repeated whole forwards; stops, lengths, batches, donation, compile counts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfra.errors import UserError
from jaxinfra.generate import Sampling, Stream, generate, loop
from jaxinfra.model import cache as kv
from jaxinfra.model import transformer
from jaxinfra.model.config import ModelConfig
from tests.jaxinfra.model import cases
from tests.jaxinfra.model_families import CONFIGS

PROMPTS = [[5, 9, 13, 40, 22, 61, 7], [30, 31], [88, 4, 17, 3, 9]]
NEW = 12


@functools.cache
def setup(family: str = "smollm2"):
    config = ModelConfig.from_hf(CONFIGS[family])
    params = cases.params(config)
    return config, params, kv.unstack(params, config)


def by_forward(config, params, prompt: list[int], count: int) -> list[int]:
    """Greedy tokens by the whole forward pass of everything so far, padded to one shape."""
    forward = jax.jit(transformer.forward, static_argnames="config")
    tokens = list(prompt)
    for _ in range(count):
        row = np.zeros((1, 32), np.int32)
        row[0, : len(tokens)] = tokens
        logits = forward(params, config, jnp.asarray(row))
        tokens.append(int(np.argmax(logits[0, len(tokens) - 1])))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("family", ["smollm2", "mistral", "gemma3", "qwen3_moe"])
def test_greedy_equals_repeated_forward(family):
    config, params, decode_params = setup(family)
    found = generate(decode_params, config, PROMPTS, max_new_tokens=NEW)
    assert found.tokens == [by_forward(config, params, p, NEW) for p in PROMPTS]
    assert found.finish == ["length"] * 3


def test_a_missing_window_is_found():
    config, params, decode_params = setup("mistral")
    found = generate(decode_params, config.replace(windows=None), PROMPTS, max_new_tokens=NEW)
    assert found.tokens != [by_forward(config, params, p, NEW) for p in PROMPTS]


def test_stacked_parameters_do_as_well():
    config, params, decode_params = setup()
    a = generate(params, config, PROMPTS[:1], max_new_tokens=3)
    assert a.tokens == generate(decode_params, config, PROMPTS[:1], max_new_tokens=3).tokens


@pytest.mark.parametrize(("steps", "backend"), [(1, "cpu"), (3, "cpu"), (32, "cpu"), (32, "gpu")])
def test_rows_end_at_their_own_stop(steps, backend, monkeypatch):
    """Also in the loop of a fixed length that a GPU is given, past the end of every row."""
    monkeypatch.setattr(loop.jax, "default_backend", lambda: backend)
    monkeypatch.setattr(loop, "_programs", {})
    config, _, decode_params = setup()
    run = functools.partial(generate, decode_params, config, PROMPTS, max_new_tokens=NEW)
    free = run().tokens
    stop = [free[0][4], free[1][0]]
    found = run(stop_ids=stop, steps=steps)
    for row, whole, finish in zip(found.tokens, free, found.finish, strict=True):
        ends = [i for i, token in enumerate(whole) if token in stop]
        assert row == (whole[: ends[0] + 1] if ends else whole)
        assert finish == ("stop" if ends else "length")
    assert "stop" in found.finish


def test_the_callback_gets_exactly_the_tokens():
    config, _, decode_params = setup()
    seen = [[] for _ in PROMPTS]

    def collect(new):
        assert any(new)
        for row, tokens in zip(seen, new, strict=True):
            row += tokens

    options = {"max_new_tokens": NEW, "steps": 5, "sampling": Sampling(1.0)}
    found = generate(decode_params, config, PROMPTS, on_tokens=collect, **options)
    assert seen == found.tokens
    assert [len(row) for row in seen] == [NEW] * 3
    assert found.timings.decode_tokens == 3 * (NEW - 1)
    assert found.timings.decode_tokens_per_second > 0


@pytest.mark.parametrize("s", [Sampling(1.2), Sampling(0.9, top_k=20, top_p=0.9, seed=4)], ids=str)
def test_sampled_tokens_do_not_depend_on_the_batch(s):
    config, _, decode_params = setup()
    run = functools.partial(generate, decode_params, config, max_new_tokens=NEW, sampling=s)
    together = run(PROMPTS, seeds=[11, 12, 13]).tokens
    assert run(PROMPTS[::-1], seeds=[13, 12, 11]).tokens == together[::-1]
    for prompt, seed, row in zip(PROMPTS, (11, 12, 13), together, strict=True):
        assert run([prompt], seeds=[seed]).tokens == [row]
    assert run(PROMPTS, seeds=[1, 2, 3]).tokens != together


def test_a_second_prompt_of_the_bucket_compiles_nothing():
    config, _, decode_params = setup()
    generate(decode_params, config, [[4, 5, 6]], max_new_tokens=5)
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, _, **__: compiled.append(event) if "backend_compile" in event else None
    )
    generate(decode_params, config, [[7, 8, 9, 10]], max_new_tokens=9, sampling=Sampling(seed=5))
    assert not compiled
    generate(decode_params, config, [[4] * 17], max_new_tokens=5)  # the next bucket: one program
    assert compiled


def test_a_cache_goes_on_and_is_donated():
    config, _, decode_params = setup()
    whole = generate(decode_params, config, PROMPTS[:1], max_new_tokens=NEW).tokens[0]
    first = Stream(decode_params, config, PROMPTS[:1], max_new_tokens=5)
    for _ in first:
        pass
    cache = first.cache
    assert int(cache.length[0]) == len(PROMPTS[0]) + 4  # the last token is not in it
    second = Stream(decode_params, config, [whole[4:5]], max_new_tokens=NEW - 5, cache=cache)
    for _ in second:
        pass
    assert second.tokens[0] == whole[5:]
    assert cache.k[0].is_deleted() and not second.cache.k[0].is_deleted()


def test_the_whole_context_can_be_used():
    config, params, decode_params = setup()
    prompt = [3 + i % 90 for i in range(config.max_seq_len - 3)]
    found = generate(decode_params, config, [prompt], max_new_tokens=3).tokens[0]
    logits = transformer.forward(params, config, jnp.asarray([prompt]))
    assert len(found) == 3 and found[0] == int(jnp.argmax(logits[0, -1]))


def test_too_long_says_the_numbers():
    config, _, decode_params = setup()
    with pytest.raises(UserError, match=r"100 tokens \+ max_new_tokens=29.*128.*at most 28"):
        generate(decode_params, config, [[5] * 100], max_new_tokens=29)


@pytest.mark.parametrize(
    ("prompts", "count", "says"),
    [([], 1, "at least one"), ([[]], 1, "at least one"), ([[97]], 1, "vocab_size=97"),
     ([[-1]], 1, "vocab_size=97"), ([[1]], 0, "max_new_tokens=0"),
     (["hi"], 1, "lists of token ids"), ([1, 2], 1, "lists of token ids")],
)  # fmt: skip
def test_bad_requests(prompts, count, says):
    config, _, decode_params = setup()
    with pytest.raises(UserError, match=says):
        generate(decode_params, config, prompts, max_new_tokens=count)


def test_buckets():
    assert [loop.bucket(n, 16, 100) for n in (1, 16, 17, 64, 65, 100)] == [16, 16, 32, 64, 100, 100]
    sizes = [loop.bucket(n, 16, 100, half=True) for n in (1, 16, 17, 24, 25, 48, 49, 90, 97)]
    assert sizes == [16, 16, 24, 24, 32, 48, 64, 96, 100]
