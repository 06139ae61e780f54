"""The engine against the model alone: whatever runs beside an answer, it is the same."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest

from decode import batches
from decode import runner as runner_module
from decode.config import EngineConfig
from decode.engine import Engine
from decode.request import QueueFull, Request
from decode.tensor import Devices
from jaxinfra.errors import UserError
from jaxinfra.generate import generate
from jaxinfra.model.cache import unstack
from jaxinfra.model.params import init
from pallas_kernels import decode_layer
from pallas_kernels.decode_layer import reference
from tests.decode import engines


@pytest.mark.parametrize(
    "cached, steps, draft", [*itertools.product([True, False], [1, 3], [0, 4])]
)
def test_greedy_answers_are_the_models(cached, steps, draft):
    prompts = engines.prompts(9)
    engine = engines.engine(prefix_cache=cached, steps=steps, draft=draft)
    told = engines.run(engine, engines.requests(prompts))
    for i, prompt in enumerate(prompts):
        assert engines.tokens(told[str(i), 0]) == engines.greedy(prompt, 20), i
        assert told[str(i), 0][-1].finish_reason == "length"
    stats = engine.stats()
    assert stats.preemptions > 0 and stats.compiles == 0
    assert (stats.prefix_hits > 0) == cached
    engines.whole(engine)


def test_a_program_that_a_request_waits_for_is_counted(monkeypatch):
    """The control of `compiles == 0`: an engine that compiles while it serves is told."""
    from decode.step import admit

    runner = engines.runner(engines.SMALL)
    monkeypatch.setattr(runner, "_admit", jax.jit(lambda *a: admit(*a), donate_argnums=0))
    before = runner.compiles
    params = dataclasses.replace(engines.GREEDY, frequency_penalty=0.5)
    engines.run(engines.engine(), engines.requests(engines.prompts(2), params))
    assert runner.compiles == before + 1
    monkeypatch.setattr(runner, "compiles", before)


def test_steps_without_wishes_have_their_own_programs(monkeypatch):
    """As on a GPU. An answer that wishes for something is the same with and without them."""
    monkeypatch.setattr(runner_module, "PLAIN", ("cpu",))
    config = dataclasses.replace(engines.SMALL, steps=2, draft=0, budget=24)
    runner = runner_module.Runner(engines.params(), engines.CONFIG, config)
    runner.finish()
    assert sum(one.plain for one in runner.ready) == len(runner.ready) // 2
    prompts = engines.prompts(6)
    long = dataclasses.replace(engines.GREEDY, max_tokens=30)
    wishes = [engines.DRAWN, long, dataclasses.replace(engines.DRAWN, frequency_penalty=1.0)]
    asked = [Request(str(i), p, wishes[i % 3]) for i, p in enumerate(prompts)]
    right = engines.run(engines.engine(), asked)
    used = []
    monkeypatch.setattr(runner, "run", lambda layout, *a: used.append(layout) or run(layout, *a))
    run = type(runner).run.__get__(runner)
    engine = Engine(runner, engines.TOKENIZER, config)
    told = engines.run(engine, asked)
    for key, outputs in right.items():
        assert engines.tokens(told[key]) == engines.tokens(outputs)
    assert {one.plain for one in used} == {False, True}
    engines.whole(engine)


def test_a_lone_row_goes_through_layers_in_one_kernel(monkeypatch):
    """As on a GPU, with the kernel's specification in its place."""
    calls = []

    def layer(x, k, v, counters, weights, cos, sin, table, facts, **options):
        calls.append(x.shape)
        length, slot = facts
        made = reference.decode_layer(
            x, k, v, weights, cos, sin, table, length, slot, **options
        )  # fmt: skip
        return *made, counters

    monkeypatch.setattr(decode_layer, "supported", lambda *_: None)
    monkeypatch.setattr(decode_layer, "decode_layer", layer)
    model = dataclasses.replace(engines.CONFIG, windows=None)
    params = unstack(jax.tree.map(lambda a: a * 3, init(jax.random.key(3), model)), model)
    config = EngineConfig(max_len=96, page_size=8, max_running=1, budget=16, steps=3)
    runner = runner_module.Runner(params, model, config)
    runner.finish()
    engine = Engine(runner, engines.TOKENIZER, config)
    prompts = engines.prompts(2)
    told = engines.run(engine, engines.requests(prompts))
    for i, prompt in enumerate(prompts):
        made = generate(params, model, [prompt], max_new_tokens=20).tokens[0]
        assert engines.tokens(told[str(i), 0]) == tuple(made)
    assert len(calls) >= 2 * model.num_layers and set(calls) == {(model.d_model,)}
    engines.whole(engine)


@pytest.mark.parametrize(
    "tp, kv_dtype", [(2, None), pytest.param(2, "int8", marks=pytest.mark.slow)]
)
def test_devices_share_a_step(tp, kv_dtype):
    config = dataclasses.replace(engines.SMALL, tp=tp, draft=0, kv_dtype=kv_dtype)
    runner = runner_module.Runner(engines.params(), engines.CONFIG, config)
    runner.finish()
    assert {len(a.devices()) for a in jax.tree.leaves(runner.params)} == {tp}
    local = runner._state.pool[0].k.addressable_shards[0].data.shape
    assert local[1] == engines.CONFIG.num_kv_heads // tp
    engine = Engine(runner, engines.TOKENIZER, config)
    prompts = engines.prompts(9)
    wishes = dataclasses.replace(engines.DRAWN, frequency_penalty=0.5, logit_bias={5: 2.0})
    asked = [*engines.requests(prompts), Request("wish", prompts[0], wishes)]
    told = engines.run(engine, asked)
    if kv_dtype is None:
        for i, prompt in enumerate(prompts):
            assert engines.tokens(told[str(i), 0]) == engines.greedy(prompt, 20), i
    own = engines.SMALL if kv_dtype is None else dataclasses.replace(config, tp=1)
    right = engines.run(engines.engine(own, draft=0), asked)
    assert {k: engines.tokens(v) for k, v in told.items()} == {
        k: engines.tokens(v) for k, v in right.items()
    }
    assert engine.stats().preemptions > 0 and engine.stats().compiles == 0
    engines.whole(engine)


def test_weights_in_the_order_of_one_device_are_caught(monkeypatch):
    """The control: merged rows that are cut as they lie give other tokens."""
    monkeypatch.setattr(Devices, "_order", lambda self, *sizes: np.arange(sum(sizes)))
    config = dataclasses.replace(engines.SMALL, tp=2, draft=0)
    runner = runner_module.Runner(engines.params(), engines.CONFIG, config)
    prompts = engines.prompts(3)
    told = engines.run(Engine(runner, engines.TOKENIZER, config), engines.requests(prompts))
    assert any(
        engines.tokens(told[str(i), 0]) != engines.greedy(p, 20) for i, p in enumerate(prompts)
    )


def test_what_cannot_be_cut_is_told():
    for tp, named in ((3, "num_heads=4 is no multiple of tp=3"), (16, "devices")):
        config = dataclasses.replace(engines.SMALL, tp=tp)
        model = engines.CONFIG
        if tp == 16:
            model = dataclasses.replace(model, num_heads=16, num_kv_heads=16)
        with pytest.raises(UserError, match=named):
            runner_module.Runner(engines.params(), model, config)


def test_pages_that_two_hold_by_mistake_are_found(monkeypatch):
    def pack(plan, layout, keys):
        packed = right(plan, layout, keys)
        first, last = layout._parts["table"]
        packed[first:last] %= 9
        return packed

    right = batches.pack
    monkeypatch.setattr(batches, "pack", pack)
    prompts = engines.prompts(6)
    told = engines.run(engines.engine(), engines.requests(prompts))
    wrong = [
        i for i in range(6) if engines.tokens(told[str(i), 0]) != engines.greedy(prompts[i], 20)
    ]
    assert len(wrong) > 2


def test_drafts_are_made_and_some_stand():
    few = dataclasses.replace(
        engines.DRAWN, allowed_tokens=(1, 2, 3), max_tokens=70, temperature=0.7
    )
    request = Request("a", engines.prompts(1)[0][:20], few)
    plain, engine = engines.engine(draft=0, steps=1), engines.engine(steps=1)
    (want,), (told,) = (engines.run(one, [request]).values() for one in (plain, engine))
    assert engines.tokens(told) == engines.tokens(want)
    stats = engine.stats()
    assert 0 < stats.accepted < stats.drafted and plain.stats().drafted == 0
    assert stats.steps < plain.stats().steps


@pytest.fixture(scope="module")
def alone():
    """Drawn answers to prompts, each in an engine of its own."""
    made = {}
    for i, prompt in enumerate(engines.prompts(6)):
        engine = engines.engine(prefix_cache=False, steps=1, draft=0)
        ((_, told),) = engines.run(engine, [Request(str(i), prompt, engines.DRAWN)]).items()
        made[prompt] = told
    return made


@pytest.mark.parametrize("steps, draft", [(1, 0), (3, 0), (1, 4)])
def test_drawn_answers_depend_on_seed_and_position_alone(alone, steps, draft):
    engine = engines.engine(steps=steps, draft=draft)
    told = engines.run(engine, engines.requests(list(alone), engines.DRAWN))
    for i, (prompt, want) in enumerate(alone.items()):
        assert engines.tokens(told[str(i), 0]) == engines.tokens(want), (i, prompt)
    other = dataclasses.replace(engines.DRAWN, seed=8)
    prompt = next(iter(alone))
    (different,) = engines.run(engine, [Request("x", prompt, other)]).values()
    assert engines.tokens(different) != engines.tokens(alone[prompt])


def test_log_probabilities_are_the_models(alone):
    for prompt, told in alone.items():
        answer = engines.tokens(told)
        logits = engines.logits([*prompt, *answer])[len(prompt) - 1 : -1]
        logps = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
        told = [one for output in told for one in output.logprobs]
        for row, token, found in zip(logps, answer, told, strict=True):
            assert found[token] == pytest.approx(row[token], abs=1e-4)
            best = sorted(found.values(), reverse=True)[:3]
            assert best == pytest.approx(np.sort(row)[::-1][:3], abs=1e-4)
            assert 3 <= len(found) <= 4


@pytest.mark.parametrize("seed", range(4))
def test_any_load_gives_the_answers_that_each_has_alone(alone, seed):
    """Requests come, go and run out of time at random; what ends by itself is as it is alone."""
    rng = np.random.default_rng(seed)
    prompts = list(alone)
    engine = engines.engine(
        prefix_cache=bool(seed % 2), draft=4 * (seed // 2), max_waiting=6, policy="fair"
    )
    asked, told, gone = {}, {}, set()
    for turn in range(500):
        if turn < 120 and rng.random() < 0.4:
            name, prompt = f"r{turn}", prompts[rng.integers(len(prompts))]
            late = 1e-9 if rng.random() < 0.1 else None
            params = dataclasses.replace(engines.DRAWN, max_tokens=int(rng.integers(1, 17)))
            try:
                engine.add(Request(name, prompt, params, tenant=name[-1], deadline=late))
                asked[name] = prompt, params.max_tokens
            except QueueFull:
                assert engine.stats().waiting == 6
        if asked and rng.random() < 0.1:
            name = sorted(asked)[rng.integers(len(asked))]
            engine.abort(name)
            gone.add(name)
        for output in engine.step():
            assert output.request_id not in gone
            told.setdefault(output.request_id, []).append(output)
        engine.pool.check()
        if turn > 120 and not engine.has_work():
            break
    for name, (prompt, count) in asked.items():
        outputs = told.get(name, [])
        end = outputs[-1].finish_reason if outputs else None
        assert end in ("length", "timeout") or name in gone
        if end == "length":
            want = engines.tokens(alone[prompt])[:count]
            assert engines.tokens(outputs) == want and len(want) == count
    assert sum(o[-1].finish_reason == "length" for o in told.values()) > 10
    engines.whole(engine)


@pytest.mark.parametrize(
    "dtype, bound", [("int8", 0.05), pytest.param("float8_e4m3fn", 0.3, marks=pytest.mark.slow)]
)
def test_pages_of_eight_bits_hardly_change_what_is_likely(dtype, bound):
    config = dataclasses.replace(engines.SMALL, kv_dtype=dtype, draft=0, steps=None)
    engine = engines.engine(config)
    pages = engines.runner(config)._state.pool[0]
    assert pages.k.dtype == dtype and pages.k_scale.dtype == "float32"
    prompts = engines.prompts(6)
    told = engines.run(engine, engines.requests(prompts, engines.DRAWN))
    assert engine.stats().preemptions > 0
    off = []
    for i, prompt in enumerate(prompts):
        answer = engines.tokens(told[str(i), 0])
        logits = engines.logits([*prompt, *answer])[len(prompt) - 1 : -1]
        logps = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
        found = [one for output in told[str(i), 0] for one in output.logprobs]
        off += [abs(f[t] - row[t]) for f, t, row in zip(found, answer, logps, strict=True)]
    assert 1e-5 < np.mean(off) < bound
