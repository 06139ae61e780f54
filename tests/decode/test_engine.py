"""The engine against the model alone: whatever runs beside an answer, it is the same."""

import dataclasses
import itertools
import json

import jax
import numpy as np
import pytest

from decode import batches
from decode import runner as runner_module
from decode.config import EngineConfig
from decode.engine import Engine
from decode.request import Grammar, QueueFull, Request, SamplingParams
from decode.tensor import Devices
from jaxinfra.errors import UserError
from jaxinfra.generate import generate
from jaxinfra.model.cache import unstack
from jaxinfra.model.params import init
from pallas_kernels import decode_layer
from pallas_kernels.decode_layer import reference
from tests.decode import engines

GREEDY = SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True)
DRAWN = SamplingParams(max_tokens=16, seed=7, logprobs=3, ignore_eos=True)


def requests(prompts, params=GREEDY):
    return [Request(str(i), prompt, params) for i, prompt in enumerate(prompts)]


def whole(engine):
    """Nothing runs, and every page is free or cached, once."""
    assert not engine.has_work() and not engine._answers and not engine._keys and not engine._ids
    engine.pool.check()
    stats = engine.stats()
    assert stats.pages_used == 0 and stats.running == stats.waiting == 0
    if engine.cache:
        engine.cache.clear()
    assert engine.pool.free == len(engine.pool.holders)


@pytest.mark.parametrize(
    "cached, steps, draft", [*itertools.product([True, False], [1, 3], [0, 4])]
)
def test_greedy_answers_are_the_models(cached, steps, draft):
    prompts = engines.prompts(9)
    engine = engines.engine(prefix_cache=cached, steps=steps, draft=draft)
    told = engines.run(engine, requests(prompts))
    for i, prompt in enumerate(prompts):
        assert engines.tokens(told[str(i), 0]) == engines.greedy(prompt, 20), i
        assert told[str(i), 0][-1].finish_reason == "length"
    stats = engine.stats()
    assert stats.preemptions > 0 and stats.compiles == 0
    assert (stats.prefix_hits > 0) == cached
    whole(engine)


def test_a_program_that_a_request_waits_for_is_counted(monkeypatch):
    """The control of `compiles == 0`: an engine that compiles while it serves is told."""
    from decode.step import admit

    runner = engines.runner(engines.SMALL)
    monkeypatch.setattr(runner, "_admit", jax.jit(lambda *a: admit(*a), donate_argnums=0))
    before = runner.compiles
    params = dataclasses.replace(GREEDY, frequency_penalty=0.5)
    engines.run(engines.engine(), requests(engines.prompts(2), params))
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
    long = dataclasses.replace(GREEDY, max_tokens=30)
    wishes = [DRAWN, long, dataclasses.replace(DRAWN, frequency_penalty=1.0)]
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
    whole(engine)


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
    told = engines.run(engine, requests(prompts))
    for i, prompt in enumerate(prompts):
        made = generate(params, model, [prompt], max_new_tokens=20).tokens[0]
        assert engines.tokens(told[str(i), 0]) == tuple(made)
    assert len(calls) >= 2 * model.num_layers and set(calls) == {(model.d_model,)}
    whole(engine)


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
    wishes = dataclasses.replace(DRAWN, frequency_penalty=0.5, logit_bias={5: 2.0})
    asked = [*requests(prompts), Request("wish", prompts[0], wishes)]
    told = engines.run(engine, asked)
    if kv_dtype is None:
        for i, prompt in enumerate(prompts):
            assert engines.tokens(told[str(i), 0]) == engines.greedy(prompt, 20), i
    alone = engines.engine(dataclasses.replace(config, tp=1))
    right = engines.run(alone, asked)
    assert {k: engines.tokens(v) for k, v in told.items()} == {
        k: engines.tokens(v) for k, v in right.items()
    }
    assert engine.stats().preemptions > 0 and engine.stats().compiles == 0
    whole(engine)


def test_weights_in_the_order_of_one_device_are_caught(monkeypatch):
    """The control: merged rows that are cut as they lie give other tokens."""
    monkeypatch.setattr(Devices, "_order", lambda self, *sizes: np.arange(sum(sizes)))
    config = dataclasses.replace(engines.SMALL, tp=2, draft=0)
    runner = runner_module.Runner(engines.params(), engines.CONFIG, config)
    prompts = engines.prompts(3)
    told = engines.run(Engine(runner, engines.TOKENIZER, config), requests(prompts))
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
    told = engines.run(engines.engine(), requests(prompts))
    wrong = [
        i for i in range(6) if engines.tokens(told[str(i), 0]) != engines.greedy(prompts[i], 20)
    ]
    assert len(wrong) > 2


def test_drafts_are_made_and_some_stand():
    few = dataclasses.replace(DRAWN, allowed_tokens=(1, 2, 3), max_tokens=70, temperature=0.7)
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
        ((_, told),) = engines.run(engine, [Request(str(i), prompt, DRAWN)]).items()
        made[prompt] = told
    return made


@pytest.mark.parametrize("steps, draft", [(1, 0), (3, 0), (1, 4)])
def test_drawn_answers_depend_on_seed_and_position_alone(alone, steps, draft):
    engine = engines.engine(steps=steps, draft=draft)
    told = engines.run(engine, requests(list(alone), DRAWN))
    for i, (prompt, want) in enumerate(alone.items()):
        assert engines.tokens(told[str(i), 0]) == engines.tokens(want), (i, prompt)
    other = dataclasses.replace(DRAWN, seed=8)
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


def test_prompt_log_probabilities_across_chunks_and_a_cache():
    prompt = engines.prompts(1)[0]
    logits = engines.logits(prompt)[:-1]
    logps = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
    engine = engines.engine()
    params = SamplingParams(max_tokens=2, temperature=0.0, prompt_logprobs=2)
    others = requests(engines.prompts(3))
    for name in ("cold", "warm"):
        told = engines.run(engine, [Request(name, prompt, params), *others])
        scores = next(o for o in told[name, 0] if o.prompt_logprobs is not None).prompt_logprobs
        assert len(scores) == len(prompt) and scores[0] is None
        for row, token, found in zip(logps, prompt[1:], scores[1:], strict=True):
            assert found[token] == pytest.approx(row[token], abs=1e-4)
            assert 2 <= len(found) <= 3


def test_several_answers_share_their_prompt():
    prompt = engines.prompts(1)[0]
    params = dataclasses.replace(DRAWN, n=4)
    engine = engines.engine()
    told = engines.run(engine, [Request("a", prompt, params)])
    assert len({engines.tokens(told["a", i]) for i in range(4)}) == 4
    assert engine.stats().prefix_hits >= 3 * ((len(prompt) - 1) // 8 * 8)
    one = engines.run(engines.engine(), [Request("a", prompt, DRAWN)])
    assert engines.tokens(one["a", 0]) == engines.tokens(told["a", 0])


def test_a_grammar_holds_beside_others():
    schema = {"type": "object", "properties": {"a": {"enum": ["x", "yy"]}}, "required": ["a"],
              "additionalProperties": False}  # fmt: skip
    structured = SamplingParams(
        max_tokens=40, seed=1, grammar=Grammar("json_schema", json.dumps(schema))
    )
    prompts = engines.prompts(5)
    engine = engines.engine()
    asked = [*requests(prompts[:3]), Request("j", prompts[3], structured)]
    told = engines.run(engine, asked)
    text = "".join(o.text for o in told["j", 0])
    assert json.loads(text)["a"] in ("x", "yy")
    assert told["j", 0][-1].finish_reason == "stop"
    for i in range(3):
        assert engines.tokens(told[str(i), 0]) == engines.greedy(prompts[i], 20)
    with pytest.raises(ValueError, match="regex"):
        engine.add(Request("bad", (1,), SamplingParams(grammar=Grammar("regex", "("))))
    whole(engine)


def test_penalties_count_what_was_said_and_not_what_was_asked():
    prompt = engines.prompts(1)[0][:18]
    params = dataclasses.replace(
        GREEDY, max_tokens=24, frequency_penalty=1.5, presence_penalty=0.5, repetition_penalty=1.3
    )
    want = []
    for _ in range(24):
        logits = engines.logits([*prompt, *want])[-1].copy()
        seen = list({*prompt, *want})
        logits[seen] = np.where(logits[seen] > 0, logits[seen] / 1.3, logits[seen] * 1.3)
        for token in set(want):
            logits[token] -= 1.5 * want.count(token) + 0.5
        want.append(int(np.argmax(logits)))
    for steps, draft in ((1, 0), (3, 0), (1, 4)):
        engine = engines.engine(steps=steps, draft=draft)
        others = requests(engines.prompts(5))
        told = engines.run(engine, [Request("a", prompt, params), *others])
        assert list(engines.tokens(told["a", 0])) == want


def test_words_biases_and_bounds():
    prompt = engines.prompts(1)[0]
    first, second, *_ = engines.greedy(prompt, 20)
    engine = engines.engine(draft=0)

    def ask(**params):
        (told,) = engines.run(
            engine, [Request("a", prompt, SamplingParams(temperature=0.0, **params))]
        ).values()
        return engines.tokens(told), told[-1]

    assert first not in ask(bad_words=((first,),), max_tokens=6)[0]
    answer, _ = ask(bad_words=((first, second),), max_tokens=6)
    assert answer[0] == first and (first, second) not in itertools.pairwise(answer)
    assert set(ask(allowed_tokens=(5, 6, 7), max_tokens=6)[0]) <= {5, 6, 7}
    assert ask(logit_bias={9: 100.0}, max_tokens=3)[0] == (9, 9, 9)
    assert ask(max_tokens=3, ignore_eos=True)[0] == engines.greedy(prompt, 20)[:3]  # bias is gone
    answer, last = ask(stop_token_ids=(second,), max_tokens=9)
    assert answer == (first, second) and last.stop_reason == second
    answer, last = ask(stop_token_ids=(second,), min_tokens=3, max_tokens=9)
    assert second not in answer[:3] and len(answer) >= 3
    repeated, _ = ask(max_tokens=30, ignore_eos=True, frequency_penalty=2.0, presence_penalty=2.0)
    assert len(set(repeated)) > len(set(engines.greedy(prompt, 30)))


def test_where_nothing_may_follow_one_answer_ends():
    prompt = engines.prompts(1)[0]
    stuck = SamplingParams(max_tokens=4, allowed_tokens=(5,), bad_words=((5,),))
    told = engines.run(
        engines.engine(), [Request("stuck", prompt, stuck), Request("a", prompt, GREEDY)]
    )
    assert told["stuck", 0][-1].finish_reason == "error"
    assert "nothing may follow" in told["stuck", 0][-1].error
    assert engines.tokens(told["a", 0]) == engines.greedy(prompt, 20)
    for wrong in ({"prompt_logprobs": 21}, {"top_k": 1 << 31}, {"logit_bias": {1: 1e39}},
                  {"stop_token_ids": (-1,)}, {"bad_words": ((-1,),)}):  # fmt: skip
        with pytest.raises(ValueError, match=next(iter(wrong))):
            SamplingParams(**wrong)
    with pytest.raises(ValueError, match="choice"):
        engines.engine().add(
            Request("b", prompt, SamplingParams(grammar=Grammar("choice", "[" * 100_000)))
        )


def test_a_stop_string_that_comes_too_early_stays_in_the_text():
    prompt = engines.prompts(1)[0]
    text = engines.TOKENIZER.decode(list(engines.greedy(prompt, 20)))
    params = dataclasses.replace(GREEDY, stop=(text[2:4],), min_tokens=19)
    (told,) = engines.run(engines.engine(), [Request("a", prompt, params)]).values()
    assert "".join(o.text for o in told).startswith(text[:4])


def test_a_stop_string_ends_the_answer_before_it():
    prompt = engines.prompts(1)[0]
    engine = engines.engine()
    text = engines.TOKENIZER.decode(list(engines.greedy(prompt, 20)))
    stop = text[5:8]
    params = dataclasses.replace(GREEDY, stop=(stop, "never in it"))
    (told,) = engines.run(engine, [Request("a", prompt, params)]).values()
    assert "".join(o.text for o in told) == text[: text.index(stop)]
    assert told[-1].finish_reason == "stop" and told[-1].stop_reason == stop


def test_deadlines_aborts_and_a_full_queue():
    engine = engines.engine(max_waiting=3)
    prompts = engines.prompts(4)
    engine.add(Request("late", prompts[0], GREEDY, deadline=1e-9))
    engine.add(Request("gone", prompts[1], GREEDY))
    engine.add(Request("here", prompts[2], GREEDY))
    with pytest.raises(QueueFull):
        engine.add(Request("more", prompts[3], GREEDY))
    with pytest.raises(ValueError, match="under way"):
        engine.add(Request("here", prompts[3], GREEDY))
    outputs = engine.step()
    assert [(o.request_id, o.finish_reason) for o in outputs] == [("late", "timeout")]
    engine.abort("gone")
    engine.abort("unknown")
    told = engines.run(engine, [])
    assert set(told) == {("here", 0)}
    assert engines.tokens(told["here", 0]) == engines.greedy(prompts[2], 20)
    whole(engine)


def test_what_can_never_be_answered_is_refused():
    engine = engines.engine()
    for prompt, params, why in (
        ((1,) * 90, {"max_tokens": 20}, "max_len=96"),
        ((320,), {}, "vocabulary of 320"),
        ((1,), {"logit_bias": {400: 1.0}}, "vocabulary of 320"),
        ((1,), {"allowed_tokens": (-1,)}, "vocabulary of 320"),
    ):
        with pytest.raises(ValueError, match=why):
            engine.add(Request("a", prompt, SamplingParams(**params)))
    whole(engine)
    with pytest.raises(UserError, match="budget=2 is below"):
        EngineConfig(budget=2, max_running=4)
    with pytest.raises(UserError, match="one sequence may need"):
        from decode.runner import Runner

        Runner(engines.params(), engines.CONFIG, EngineConfig(memory=1000))


def test_other_weights_serve_from_the_next_step_on():
    import jax

    prompt = engines.prompts(1)[0]
    engine = engines.engine()
    before = engines.params()
    engines.run(engine, [Request("a", prompt, GREEDY)])
    try:
        engine.update_weights(jax.tree.map(lambda a: a * 0.9, before))
        (told,) = engines.run(engine, [Request("a", prompt, GREEDY)]).values()
        assert engines.tokens(told) != engines.greedy(prompt, 20)
        assert told[-1].cached_tokens == 0
    finally:
        engine.update_weights(before)
    (told,) = engines.run(engine, [Request("a", prompt, GREEDY)]).values()
    assert engines.tokens(told) == engines.greedy(prompt, 20)
    engine.add(Request("old", prompt, GREEDY))
    while not engine.scheduler.running or engine.scheduler.running[0].made < 4:
        engine.step()
    try:
        engine.update_weights(jax.tree.map(lambda a: a * 0.9, before))
        engines.run(engine, [])
        (told,) = engines.run(engine, [Request("new", prompt, GREEDY)]).values()
        assert told[-1].cached_tokens == 0  # what the old weights made is not kept
    finally:
        engine.update_weights(before)
    with pytest.raises(UserError, match="other shapes"):
        engine.update_weights(jax.tree.map(lambda a: a[:1], before))


@pytest.mark.parametrize("where", ["text", "fill", "accept"])
def test_a_fault_in_one_answer_leaves_the_others(where, monkeypatch):
    prompts = engines.prompts(4)
    engine = engines.engine()
    grammar = Grammar("regex", "[a-z]{30}")
    params = SamplingParams(max_tokens=12, seed=1, grammar=None if where == "text" else grammar)
    for request in requests(prompts[:3]):
        engine.add(request)
    engine.add(Request("bad", prompts[3], params))
    (sequence,) = [s for s in engine._answers if s.request.id == "bad"]
    answer = engine._answers[sequence]

    def broken(*_):
        raise ValueError("injected")

    if where == "text":
        monkeypatch.setattr(answer._text, "push", broken)
    else:
        monkeypatch.setattr(answer._matcher, where, broken)
    told = engines.run(engine, [])
    assert told["bad", 0][-1].finish_reason == "error"
    assert "injected" in told["bad", 0][-1].error
    for i in range(3):
        assert engines.tokens(told[str(i), 0]) == engines.greedy(prompts[i], 20)
    whole(engine)


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
            params = dataclasses.replace(DRAWN, max_tokens=int(rng.integers(1, 17)))
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
    whole(engine)


@pytest.mark.parametrize(
    "dtype, bound", [("int8", 0.05), pytest.param("float8_e4m3fn", 0.3, marks=pytest.mark.slow)]
)
def test_pages_of_eight_bits_hardly_change_what_is_likely(dtype, bound):
    config = dataclasses.replace(engines.SMALL, kv_dtype=dtype, draft=0, steps=None)
    engine = engines.engine(config)
    pages = engines.runner(config)._state.pool[0]
    assert pages.k.dtype == dtype and pages.k_scale.dtype == "float32"
    prompts = engines.prompts(6)
    told = engines.run(engine, requests(prompts, DRAWN))
    assert engine.stats().preemptions > 0
    off = []
    for i, prompt in enumerate(prompts):
        answer = engines.tokens(told[str(i), 0])
        logits = engines.logits([*prompt, *answer])[len(prompt) - 1 : -1]
        logps = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
        found = [one for output in told[str(i), 0] for one in output.logprobs]
        off += [abs(f[t] - row[t]) for f, t, row in zip(found, answer, logps, strict=True)]
    assert 1e-5 < np.mean(off) < bound
