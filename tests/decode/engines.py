"""A tiny model, its runners, and what its answers must be; programs are compiled once a process."""

import functools

import jax
import numpy as np

from decode.config import EngineConfig
from decode.engine import Engine
from decode.request import Request, SamplingParams
from decode.runner import Runner
from jaxinfra.generate import generate
from jaxinfra.model import cache as kv
from jaxinfra.model.config import ModelConfig
from jaxinfra.model.params import init
from jaxinfra.text import Tokenizer

CONFIG = ModelConfig(
    family="qwen3", vocab_size=320, num_layers=2, d_model=32, num_heads=4, num_kv_heads=2,
    head_dim=16, d_ff=64, max_seq_len=1024, qk_norm=True, windows=(None, 24),
)  # fmt: skip
TOKENIZER = Tokenizer.byte_level()
# Pages for one longest sequence and a half: a few answers at once do not fit.
SMALL = EngineConfig(
    max_len=96, page_size=8, pages=18, max_running=4, budget=20, steps=3, draft=4
)  # fmt: skip
GREEDY = SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True)
DRAWN = SamplingParams(max_tokens=16, seed=7, logprobs=3, ignore_eos=True)


@functools.cache
def params():
    """Random weights, large enough that tokens depend on what was said."""
    made = jax.tree.map(lambda a: a * 3, init(jax.random.key(3), CONFIG))
    return kv.unstack(made, CONFIG)


@functools.cache
def runner(config):
    """A runner that has all its programs."""
    made = Runner(params(), CONFIG, config)
    made.finish()
    return made


def engine(config=SMALL, **changes):
    """An engine over the runner of `config`, some of whose choices it changes."""
    import dataclasses

    return Engine(runner(config), TOKENIZER, dataclasses.replace(config, **changes))


def prompts(count, seed=0, longest=40):
    """Random prompts; some begin alike."""
    rng = np.random.default_rng(seed)
    start = rng.integers(0, 256, 17).tolist()
    made = []
    for i in range(count):
        own = rng.integers(0, 256, rng.integers(1, longest)).tolist()
        made.append(tuple((start + own)[: longest + 10] if i % 3 == 0 else own))
    return made


@functools.cache
def greedy(prompt, count):
    """What the model says after `prompt`, by the contiguous cache."""
    return tuple(generate(params(), CONFIG, [prompt], max_new_tokens=count).tokens[0])


@functools.cache
def _logits():
    return jax.jit(lambda p, tokens: kv.head(p, CONFIG, kv.extend(
        p, CONFIG, tokens, kv.empty(CONFIG, 1, 128), fresh=True)[0])[0])  # fmt: skip


def logits(tokens):
    """Float32 logits [len(tokens), V] of the whole sequence at once."""
    padded = np.zeros((1, 128), np.int32)
    padded[0, : len(tokens)] = tokens
    return np.asarray(_logits()(params(), padded))[: len(tokens)]


def requests(prompts, params=GREEDY):
    """One for each prompt, named by its place."""
    return [Request(str(i), prompt, params) for i, prompt in enumerate(prompts)]


def whole(engine):
    """Asserts that nothing runs, and every page is free or cached, once."""
    assert not engine.has_work() and not engine._answers and not engine._keys and not engine._ids
    engine.pool.check()
    stats = engine.stats()
    assert stats.pages_used == 0 and stats.running == stats.waiting == 0
    if engine.cache:
        engine.cache.clear()
    assert engine.pool.free == len(engine.pool.holders)


def run(engine, requests, each=lambda outputs: None):
    """Every answer's outputs, by (request, index), until all have ended."""
    for request in requests:
        engine.add(request)
    told = {}
    while engine.has_work():
        outputs = engine.step()
        each(outputs)
        for output in outputs:
            told.setdefault((output.request_id, output.index), []).append(output)
    return told


def tokens(outputs):
    """The tokens of an answer."""
    return tuple(token for output in outputs for token in output.token_ids)
