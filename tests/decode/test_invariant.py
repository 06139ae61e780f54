"""In the invariant mode an answer's tokens and log-probabilities are the same bits everywhere."""

import dataclasses

import jax
import numpy as np
import pytest

from decode.request import Request, SamplingParams
from jaxinfra.model import cache as kv
from tests.decode import engines

FIXED = dataclasses.replace(
    engines.SMALL, invariant=True, draft=0, steps=None, pages=18, prefix_cache=False
)
ASKED = SamplingParams(max_tokens=30, temperature=0.8, seed=5, logprobs=2, ignore_eos=True)


def bits(told):
    """Tokens and the bits of every log-probability that was told."""
    made = []
    for output in told:
        for one in output.logprobs or ():
            made += [(token, np.float32(p).view(np.int32).item()) for token, p in one.items()]
    return engines.tokens(told), made


@pytest.fixture(scope="module")
def alone():
    """What each prompt is answered in an engine of its own, cold and in one piece."""
    made = {}
    for prompt in engines.prompts(7, longest=40):
        (told,) = engines.run(engines.engine(FIXED), [Request("a", prompt, ASKED)]).values()
        made[prompt] = bits(told)
    return made


def together(alone, **changes):
    prompts = list(alone)
    engine = engines.engine(FIXED, **changes)
    told = engines.run(engine, [Request(str(i), p, ASKED) for i, p in enumerate(prompts)])
    return [bits(told[str(i), 0]) == alone[p] for i, p in enumerate(prompts)], engine.stats()


def test_beside_others_in_chunks_and_preempted(alone):
    same, stats = together(alone)
    assert all(same) and stats.preemptions > 0


def test_with_prefixes_from_the_cache(alone):
    same, stats = together(alone, prefix_cache=True)
    assert all(same) and stats.prefix_hits > 0
    engine = engines.engine(FIXED, prefix_cache=True)
    for name in ("cold", "warm"):
        prompt = next(iter(alone))
        (told,) = engines.run(engine, [Request(name, prompt, ASKED)]).values()
        assert bits(told) == alone[prompt]
    assert told[-1].cached_tokens > 0


def test_one_shape_is_what_holds_it():
    """The control: a product's bits depend on how many rows stand beside."""
    x = jax.random.normal(jax.random.key(0), (1, 16, 576))
    w = jax.random.normal(jax.random.key(1), (64, 576))
    project = jax.jit(kv.project)
    alone = [np.asarray(project(x[:, i : i + 1], w))[0, 0] for i in range(16)]
    beside, again = np.asarray(project(x, w))[0], np.asarray(project(x[:, ::-1], w))[0, ::-1]
    assert (np.stack(alone) != beside).any() and (beside == again).all()
