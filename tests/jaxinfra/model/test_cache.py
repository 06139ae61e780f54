"""The incremental forward equals the whole one: any family, any split, ragged rows, windows."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfra.errors import UserError
from jaxinfra.model import cache as kv
from jaxinfra.model import transformer
from jaxinfra.model.config import ModelConfig
from tests.jaxinfra.model import cases
from tests.jaxinfra.model_families import CONFIGS

LENGTH = cases.T  # longer than the windows of the windowed families
LIMIT = 1e-5  # relative

extend = jax.jit(kv.extend, static_argnames="config")
forward = jax.jit(transformer.forward, static_argnames="config")


def setup(family: str):
    config = ModelConfig.from_hf(CONFIGS[family])
    params = cases.params(config)
    return config, params, jnp.asarray(cases.tokens(config))


def error(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


def by_steps(params, config, tokens, sizes, extend=extend) -> np.ndarray:
    """Logits of all positions, `sizes` tokens at a time."""
    params = kv.unstack(params, config)
    cache = kv.empty(config, tokens.shape[0], 16)
    blocks, start = [], 0
    for size in sizes:
        x, cache = extend(params, config, tokens[:, start : start + size], cache)
        blocks.append(kv.head(params, config, x))
        start += size
    return np.concatenate(blocks, axis=1)


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("sizes", [(1,) * LENGTH, (7, 1, 1, 3)], ids=str)
def test_steps_equal_the_whole(family, sizes):
    config, params, tokens = setup(family)
    total = sum(sizes)
    whole = forward(params, config, tokens)[:, :total]
    assert error(by_steps(params, config, tokens, sizes), np.asarray(whole)) < LIMIT


@pytest.mark.parametrize("family", ["qwen2", "gemma3", "mixtral"])
def test_reading_along_memory_as_a_gpu_does_gives_the_same(family, monkeypatch):
    monkeypatch.setattr(kv, "along_memory", lambda: True)
    again = jax.jit(lambda *args: kv.extend(*args), static_argnums=1)
    config, params, tokens = setup(family)
    whole = np.asarray(forward(params, config, tokens))
    sizes = (7, *[1] * (LENGTH - 7))
    for batch in (tokens, tokens[:1]):  # one row takes the path of one vector
        found = by_steps(params, config, batch, sizes, again)
        assert error(found, whole[: len(batch)]) < LIMIT


@pytest.mark.parametrize("family", ["mistral", "gemma3"])
def test_a_fresh_cache_needs_no_more_keys_than_it_is_given(family):
    config, params, tokens = setup(family)
    decode_params = kv.unstack(params, config)
    found = []
    for fresh in (False, True):
        cache = kv.empty(config, tokens.shape[0], 16)
        run = jax.jit(lambda *args, fresh=fresh: kv.extend(*args, fresh=fresh), static_argnums=1)
        x, cache = run(decode_params, config, tokens[:, :9], cache)
        found.append((x, cache))
        products = str(
            jax.make_jaxpr(run, static_argnums=1)(
                decode_params, config, tokens[:, :9], kv.empty(config, tokens.shape[0], 16)
            )
        )
        assert (",9,16]" in products) is not fresh  # logits of nine queries for the whole capacity
    (x, cache), (y, other) = found
    assert error(np.asarray(y), np.asarray(x)) < LIMIT
    assert all(np.array_equal(a, b) for a, b in zip(cache.k, other.k, strict=True))


def ragged(params, config, tokens, extend=extend, lengths=(7, 4)) -> list[np.ndarray]:
    """Each row's logits after its prompt of `lengths`, right-padded, and then token by token."""
    params = kv.unstack(params, config)
    cache = kv.empty(config, 2, 16)
    held = jnp.asarray(lengths, jnp.int32)
    padded = jnp.where(jnp.arange(LENGTH)[None, :] < held[:, None], tokens, 5)
    x, cache = extend(params, config, padded, cache, lengths=held)
    logits = np.asarray(kv.head(params, config, x))
    rows = [[*logits[i, :n]] for i, n in enumerate(lengths)]
    for step in range(LENGTH - max(lengths)):
        token = jnp.stack([tokens[i, n + step] for i, n in enumerate(lengths)])[:, None]
        x, cache = extend(params, config, token, cache)
        for row, new in zip(rows, np.asarray(kv.head(params, config, x)), strict=True):
            row.append(new[0])
    return [np.stack(row) for row in rows]


def ragged_error(family: str, **options) -> float:
    config, params, tokens = setup(family)
    whole = np.asarray(forward(params, config, tokens))
    wrong_config = options.pop("config", lambda c: c)(config)
    found = ragged(params, wrong_config, tokens, **options)
    return max(error(row, whole[i, : len(row)]) for i, row in enumerate(found))


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3_moe"])
def test_ragged_rows(family):
    assert ragged_error(family) < LIMIT


@pytest.mark.parametrize("split", range(1, LENGTH))
def test_any_split_of_ragged_rows(split):
    assert ragged_error("gemma3", lengths=(split, LENGTH - split)) < LIMIT


def off_by_one(params, config, tokens, cache, **options):
    """Leaves a hole after the prompt."""
    x, cache = extend(params, config, tokens, cache, **options)
    return x, dataclasses.replace(cache, length=cache.length + int(tokens.shape[1] > 1))


def stale_row(params, config, tokens, cache, **options):
    """Counts the padding as held, so that later tokens see it."""
    return extend(params, config, tokens, cache)


def swapped_rows(params, config, tokens, cache, **options):
    """Gives a row the cache of the other."""
    x, cache = extend(params, config, tokens, cache, **options)
    return x, dataclasses.replace(cache, k=tuple(k[::-1] for k in cache.k))


@pytest.mark.parametrize("wrong", [off_by_one, stale_row, swapped_rows])
def test_wrong_caches_are_found(wrong):
    assert ragged_error("mistral", extend=wrong) > 100 * LIMIT


def test_a_missing_window_is_found():
    assert ragged_error("mistral", config=lambda c: c.replace(windows=None)) > 100 * LIMIT


def test_grown_cache_goes_on():
    config, params, tokens = setup("llama")
    decode_params = kv.unstack(params, config)
    _, cache = extend(decode_params, config, tokens[:, :8], kv.empty(config, 2, 8))
    cache = kv.grow(cache, 32)
    assert cache.k[0].shape[2] == 32
    x, _ = extend(decode_params, config, tokens[:, 8:], cache)
    whole = np.asarray(forward(params, config, tokens))[:, 8:]
    assert error(np.asarray(kv.head(decode_params, config, x)), whole) < LIMIT


@pytest.mark.parametrize("family", ["gemma3", "qwen3_moe"])
def test_a_prefill_in_one_scan_fills_the_same_cache(family):
    config, params, tokens = setup(family)
    lengths, copies = jnp.asarray([7, 4]), 3
    run = jax.jit(kv.prefill, static_argnums=1, static_argnames=("capacity", "copies"))
    x, found = run(params, config, tokens[:, :7], lengths, capacity=16, copies=copies)
    y, cache = extend(
        kv.unstack(params, config), config, tokens[:, :7], kv.empty(config, 2, 16), lengths=lengths
    )
    assert error(np.asarray(x), np.asarray(y)) < LIMIT
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(cache), strict=True):
        assert error(np.asarray(one), np.repeat(other, copies, axis=0)) < LIMIT


@pytest.mark.parametrize("family", ["qwen2", "qwen3_moe"])
def test_weights_merged_in_a_program_are_those_merged_outside(family):
    config, params, _ = setup(family)
    inside = jax.jit(kv.unstack, static_argnums=1)(params, config)
    same = jax.tree.map(np.array_equal, inside, kv.unstack(params, config))
    assert all(jax.tree.leaves(same))


def test_capacity_beyond_the_model():
    config, _, _ = setup("llama")
    with pytest.raises(UserError, match="capacity=129 exceeds max_seq_len=128"):
        kv.empty(config, 1, 129)


@pytest.mark.parametrize("batch", [1, 2])
def test_a_device_loop_copies_no_cache(batch):
    """Every cache array of a loop is written in place: none of its size is copied."""
    config, params, _ = setup("llama")
    params = kv.unstack(params, config)

    @functools.partial(jax.jit, donate_argnames="cache")
    def loop(token, cache):
        def step(_, carry):
            token, cache = carry
            x, cache = kv.extend(params, config, token[:, None], cache)
            return jnp.argmax(kv.head(params, config, x)[:, 0], -1).astype(jnp.int32), cache

        return jax.lax.fori_loop(0, 4, step, (token, cache))

    cache = kv.empty(config, batch, 16)
    token = jnp.zeros((batch,), jnp.int32)
    text = loop.lower(token, cache).compile().as_text()
    K, H = config.num_kv_heads, config.head_dim
    assert not re.findall(rf"f32\[(?:\d+,)*{K},16,{H}\]\S* copy\(", text)
    loop(token, cache)
    assert all(array.is_deleted() for array in (*cache.k, *cache.v))
