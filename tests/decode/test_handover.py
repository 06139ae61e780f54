"""Pages that one engine computed and another answers with: the same tokens, and nothing left."""

import dataclasses
import functools
from pathlib import Path

import jax
import numpy as np
import pytest

from decode.config import EngineConfig
from decode.handover import Decodes, Prefills
from decode.request import Request
from decode.runner import Runner
from tests.decode import engines

SIZES = EngineConfig(max_len=96, page_size=8, pages=64, max_running=4, budget=32)


@functools.cache
def runner(kv_dtype=None):
    made = Runner(
        engines.params(), engines.CONFIG, dataclasses.replace(SIZES, kv_dtype=kv_dtype)
    )  # fmt: skip
    made.finish()
    return made


def engine(kind, folder, kv_dtype=None, own=None):
    made = kind(own or runner(kv_dtype), engines.TOKENIZER, SIZES)
    made.carry(folder)
    return made


def other(kv_dtype=None):
    """A runner with pages of its own, which hold nothing, and the programs of the first."""
    made = object.__new__(Runner)
    made.__dict__.update(runner(kv_dtype).__dict__)
    made._state = jax.tree.map(lambda a: a * 0, made._state)
    return made


def hand_over(prompts, folder, params, kv_dtype=None, between=lambda path: None):
    first, second = (engine(kind, folder, kv_dtype, own)
                     for kind, own in ((Prefills, None), (Decodes, other(kv_dtype))))  # fmt: skip
    asked = engines.requests(prompts, params)
    done = engines.run(first, asked)
    assert all(outputs[-1].finish_reason == "length" for outputs in done.values())
    for request in asked:
        between(folder / request.id)
    told = engines.run(second, asked)
    assert not list(folder.iterdir())
    assert first.stats().compiles == second.stats().compiles == 0
    engines.whole(first)
    engines.whole(second)
    return told, second


@pytest.mark.parametrize("params", [engines.GREEDY, engines.DRAWN])
def test_answers_are_those_of_one_engine(params, tmp_path):
    prompts = engines.prompts(6)
    told, _ = hand_over(prompts, tmp_path, params)
    alone = engines.run(engine(Decodes, tmp_path), engines.requests(prompts, params))
    for key, outputs in alone.items():
        assert engines.tokens(told[key]) == engines.tokens(outputs)
    for i, prompt in enumerate(prompts):
        assert told[str(i), 0][-1].cached_tokens == (len(prompt) - 1) // 8 * 8


def test_pages_of_another_prompt_are_caught(tmp_path):
    """The control: with zeros in the file the answers are others."""

    def spoil(path):
        path.write_bytes(bytes(path.stat().st_size))

    prompts = [p for p in engines.prompts(6) if len(p) > 16]
    told, _ = hand_over(prompts, tmp_path, engines.GREEDY, between=spoil)
    wrong = [engines.tokens(told[str(i), 0]) != engines.greedy(p, 20)
             for i, p in enumerate(prompts)]  # fmt: skip
    assert any(wrong)


@pytest.mark.slow
def test_eight_bits_and_their_scales_go_along(tmp_path):
    prompts = engines.prompts(4)
    told, _ = hand_over(prompts, tmp_path, engines.GREEDY, kv_dtype="int8")
    alone = engines.run(engine(Decodes, tmp_path, "int8"), engines.requests(prompts))
    for key, outputs in alone.items():
        assert engines.tokens(told[key]) == engines.tokens(outputs)


def test_without_room_or_file_the_prompt_is_computed(tmp_path):
    first, second = engine(Prefills, tmp_path), engine(Decodes, tmp_path, own=other())
    prompt = engines.prompts(1)[0]
    engines.run(first, [Request("a", prompt, engines.GREEDY)])
    held = second.pool.take(second.pool.free - 2)  # room for two pages only
    second.take(Request("a", prompt, engines.GREEDY))
    assert not list(tmp_path.iterdir()) and second.pool.free == 2
    second.pool.release(held)
    (told,) = engines.run(second, [Request("a", prompt, engines.GREEDY)]).values()
    assert engines.tokens(told) == engines.greedy(prompt, 20) and told[-1].cached_tokens == 0
    engines.whole(second)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a file that is always full")
def test_a_full_folder_costs_a_prompt_its_pages_and_nobody_the_engine(tmp_path):
    first, second = engine(Prefills, tmp_path), engine(Decodes, tmp_path, own=other())
    asked = [Request("a", engines.prompts(1)[0], engines.GREEDY)]
    (tmp_path / "a.part").symlink_to("/dev/full")
    (done,) = engines.run(first, asked).values()
    assert done[-1].finish_reason == "length" and not list(tmp_path.iterdir())
    engines.whole(first)
    (told,) = engines.run(second, asked).values()
    assert engines.tokens(told) == engines.greedy(asked[0].prompt, 20)


def test_what_is_aborted_is_not_given(tmp_path):
    first = engine(Prefills, tmp_path)
    first.add(Request("a", tuple(np.arange(60).tolist()), engines.GREEDY))
    first.step()
    first.abort("a")
    assert not engines.run(first, []) and not list(tmp_path.iterdir())
    engines.whole(first)
