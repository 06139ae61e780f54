"""What a request may wish for and what ends it: told, kept, and nobody else's harm."""

import dataclasses
import itertools
import json

import jax
import numpy as np
import pytest

from decode.config import EngineConfig
from decode.request import Grammar, QueueFull, Request, SamplingParams
from jaxinfra.errors import UserError
from tests.decode import engines


def test_prompt_log_probabilities_across_chunks_and_a_cache():
    prompt = engines.prompts(1)[0]
    logits = engines.logits(prompt)[:-1]
    logps = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
    engine = engines.engine()
    params = SamplingParams(max_tokens=2, temperature=0.0, prompt_logprobs=2)
    others = engines.requests(engines.prompts(3))
    for name in ("cold", "warm"):
        told = engines.run(engine, [Request(name, prompt, params), *others])
        scores = next(o for o in told[name, 0] if o.prompt_logprobs is not None).prompt_logprobs
        assert len(scores) == len(prompt) and scores[0] is None
        for row, token, found in zip(logps, prompt[1:], scores[1:], strict=True):
            assert found[token] == pytest.approx(row[token], abs=1e-4)
            assert 2 <= len(found) <= 3


def test_several_answers_share_their_prompt():
    prompt = engines.prompts(1)[0]
    params = dataclasses.replace(engines.DRAWN, n=4)
    engine = engines.engine()
    told = engines.run(engine, [Request("a", prompt, params)])
    assert len({engines.tokens(told["a", i]) for i in range(4)}) == 4
    assert engine.stats().prefix_hits >= 3 * ((len(prompt) - 1) // 8 * 8)
    one = engines.run(engines.engine(), [Request("a", prompt, engines.DRAWN)])
    assert engines.tokens(one["a", 0]) == engines.tokens(told["a", 0])


def test_a_grammar_holds_beside_others():
    schema = {"type": "object", "properties": {"a": {"enum": ["x", "yy"]}}, "required": ["a"],
              "additionalProperties": False}  # fmt: skip
    structured = SamplingParams(
        max_tokens=40, seed=1, grammar=Grammar("json_schema", json.dumps(schema))
    )
    prompts = engines.prompts(5)
    engine = engines.engine()
    asked = [*engines.requests(prompts[:3]), Request("j", prompts[3], structured)]
    told = engines.run(engine, asked)
    text = "".join(o.text for o in told["j", 0])
    assert json.loads(text)["a"] in ("x", "yy")
    assert told["j", 0][-1].finish_reason == "stop"
    for i in range(3):
        assert engines.tokens(told[str(i), 0]) == engines.greedy(prompts[i], 20)
    with pytest.raises(ValueError, match="regex"):
        engine.add(Request("bad", (1,), SamplingParams(grammar=Grammar("regex", "("))))
    engines.whole(engine)


def test_penalties_count_what_was_said_and_not_what_was_asked():
    prompt = engines.prompts(1)[0][:18]
    params = dataclasses.replace(
        engines.GREEDY,
        max_tokens=24,
        frequency_penalty=1.5,
        presence_penalty=0.5,
        repetition_penalty=1.3,
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
        others = engines.requests(engines.prompts(5))
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
        engines.engine(), [Request("stuck", prompt, stuck), Request("a", prompt, engines.GREEDY)]
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
    params = dataclasses.replace(engines.GREEDY, stop=(text[2:4],), min_tokens=19)
    (told,) = engines.run(engines.engine(), [Request("a", prompt, params)]).values()
    assert "".join(o.text for o in told).startswith(text[:4])


def test_a_stop_string_ends_the_answer_before_it():
    prompt = engines.prompts(1)[0]
    engine = engines.engine()
    text = engines.TOKENIZER.decode(list(engines.greedy(prompt, 20)))
    stop = text[5:8]
    params = dataclasses.replace(engines.GREEDY, stop=(stop, "never in it"))
    (told,) = engines.run(engine, [Request("a", prompt, params)]).values()
    assert "".join(o.text for o in told) == text[: text.index(stop)]
    assert told[-1].finish_reason == "stop" and told[-1].stop_reason == stop


def test_deadlines_aborts_and_a_full_queue():
    engine = engines.engine(max_waiting=3)
    prompts = engines.prompts(4)
    engine.add(Request("late", prompts[0], engines.GREEDY, deadline=1e-9))
    engine.add(Request("gone", prompts[1], engines.GREEDY))
    engine.add(Request("here", prompts[2], engines.GREEDY))
    with pytest.raises(QueueFull):
        engine.add(Request("more", prompts[3], engines.GREEDY))
    with pytest.raises(ValueError, match="under way"):
        engine.add(Request("here", prompts[3], engines.GREEDY))
    outputs = engine.step()
    assert [(o.request_id, o.finish_reason) for o in outputs] == [("late", "timeout")]
    engine.abort("gone")
    engine.abort("unknown")
    told = engines.run(engine, [])
    assert set(told) == {("here", 0)}
    assert engines.tokens(told["here", 0]) == engines.greedy(prompts[2], 20)
    engines.whole(engine)


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
    engines.whole(engine)
    with pytest.raises(UserError, match="budget=2 is below"):
        EngineConfig(budget=2, max_running=4)
    with pytest.raises(UserError, match="one sequence may need"):
        from decode.runner import Runner

        Runner(engines.params(), engines.CONFIG, EngineConfig(memory=1000))


def test_other_weights_serve_from_the_next_step_on():

    prompt = engines.prompts(1)[0]
    engine = engines.engine()
    before = engines.params()
    engines.run(engine, [Request("a", prompt, engines.GREEDY)])
    try:
        engine.update_weights(jax.tree.map(lambda a: a * 0.9, before))
        (told,) = engines.run(engine, [Request("a", prompt, engines.GREEDY)]).values()
        assert engines.tokens(told) != engines.greedy(prompt, 20)
        assert told[-1].cached_tokens == 0
    finally:
        engine.update_weights(before)
    (told,) = engines.run(engine, [Request("a", prompt, engines.GREEDY)]).values()
    assert engines.tokens(told) == engines.greedy(prompt, 20)
    engine.add(Request("old", prompt, engines.GREEDY))
    while not engine.scheduler.running or engine.scheduler.running[0].made < 4:
        engine.step()
    try:
        engine.update_weights(jax.tree.map(lambda a: a * 0.9, before))
        engines.run(engine, [])
        (told,) = engines.run(engine, [Request("new", prompt, engines.GREEDY)]).values()
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
    for request in engines.requests(prompts[:3]):
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
    engines.whole(engine)
