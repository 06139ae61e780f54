"""The model with its engine in this process, on random weights; some answers are steered."""

import contextlib
import dataclasses
import functools
import json
import re
import subprocess
import sys

import anyio
import jsonschema
import pytest

from agent import Agent, Limits, run, tool
from agent.engine_model import EngineModel
from agent.engine_sessions import CacheMiss
from agent.messages import Message, user
from agent.model import Completion, Request, Settings, TextDelta, ToolSpec
from agent.returns import Returns
from decode.config import EngineConfig
from decode.engine import Engine
from jaxinfra.errors import UserError
from jaxinfra.text import Tokenizer
from tests.agent.compat_server import TEMPLATE, call
from tests.agent.random_model import write
from tests.agent.steered_engine import (
    BYTES,
    ENDLESS,
    SHORT,
    TAG,
    TOKENIZER,
    Steered,
    comes,
    quiet,
    serving,
    tagged,
    taken,
)
from tests.agent.test_models import TEXT, TOOL, conformance, turn


def by_script(prompt: str) -> str:
    return call("multiply", a=6, b=7) if "multiply" in prompt else TEXT


def test_it_conforms():
    with serving(by_script) as (model, _):
        anyio.run(conformance, model)


@tool(effects="pure")
async def multiply(a: int, b: int) -> int:
    """Multiplies."""
    return a * b


def ten_calls(prompt: str) -> str:
    said = prompt.count("<|im_start|>assistant") - 1
    return call("multiply", a=said, b=7) if said < 10 else "It is 63."


def test_ten_tool_turns_append_tokens_and_compute_none_again():
    with serving(ten_calls) as (model, engine):
        agent = Agent("clerk", model, "Use your tool.", (multiply,), limits=Limits(turns=20))
        result = anyio.run(functools.partial(run, agent, "9 * 7?", session="s"))
        account = model.account("s")
        assert result.output == "It is 63." and result.state.spent.tool_calls == 10
        assert model.leases == 0
    assert len(engine.seen) == 11 and account.turns == 11
    answers = [m.tokens or () for m in result.state.messages if m.role == "assistant"]
    for before, drawn, after in zip(engine.seen, answers, engine.seen[1:], strict=False):
        whole = before.prompt + drawn
        assert after.prompt[: len(whole)] == whole
    # What is appended is what the template writes: here nothing was lost by encoding once.
    assert TOKENIZER.decode(engine.seen[-1].prompt).count("<tool_call>") == 10
    assert account.recomputed == 0 and account.miss is None
    full = [
        (len(r.prompt) + len(a) - 1) // 16 * 16
        for r, a in zip(engine.seen, answers[:-1], strict=False)
    ]
    # A reading that the next turn cut off leaves its pages too, and is not in `ahead`.
    read = [len(r.prompt) // 16 * 16 for r in engine.read]
    assert len(read) == 10 and sum(full) <= account.cached <= sum(read)
    assert account.prompt == sum(len(r.prompt) for r in engine.seen)


def test_a_session_is_put_together_from_its_messages():
    with serving(ten_calls) as (model, engine):
        agent = Agent("clerk", model, "Use your tool.", (multiply,))
        result = anyio.run(functools.partial(run, agent, "9 * 7?", session="s"))
        again = Request(result.state.prompt[:-1], agent.specs, session="other")
        taken(model, again)
    assert engine.seen[-1].prompt == engine.seen[-2].prompt


NESTED = {
    "type": "object",
    "properties": {
        "kind": {"enum": ["a", "b\u00e9", "\u4e09"]},
        "who": {
            "type": "object",
            "properties": {
                "name": {"type": "string", "maxLength": 4},
                "age": {"anyOf": [{"type": "integer", "minimum": 0, "maximum": 99},
                                  {"type": "null"}]},
            },
            "required": ["name", "age"], "additionalProperties": False,
        },
        "tags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
    },
    "required": ["kind", "who", "tags"], "additionalProperties": False,
}  # fmt: skip


@pytest.mark.parametrize(
    "seeds", [range(40), pytest.param(range(40, 1040), marks=pytest.mark.slow)], ids=len
)
def test_forced_calls_are_never_malformed(seeds):
    """Random weights, so that nothing but the grammar holds them."""
    offered = (ToolSpec("file", "Files.", NESTED), ToolSpec("nest", "Nests.", NESTED))
    asked = [
        Request((user("Go."),), offered, "required", Settings(max_tokens=400, seed=seed))
        for seed in seeds
    ]
    with serving() as (model, _):
        ends = taken(model, *asked)
    names, written = set(), set()
    for end in ends:
        (made,) = end.message.calls
        jsonschema.validate(json.loads(made.arguments), NESTED)
        assert end.finish == "calls" and end.message.content == ""
        names.add(made.name)
        written.add(made.arguments)
    assert names == {"file", "nest"} and len(written) > len(seeds) / 2


def test_a_call_of_one_tool_is_forced_by_its_name():
    offered = (ToolSpec("file", "Files.", NESTED), TOOL)
    asked = [Request((user("Go."),), offered, "multiply", Settings(max_tokens=400, seed=seed))
             for seed in range(8)]  # fmt: skip
    with serving() as (model, _):
        ends = taken(model, *asked)
    assert {end.message.calls[0].name for end in ends} == {"multiply"}
    assert [len(end.message.calls) for end in ends] == [1] * 8


@pytest.mark.parametrize(
    "seeds", [range(40), pytest.param(range(40, 1040), marks=pytest.mark.slow)], ids=len
)
def test_calls_that_the_model_begins_are_never_malformed(seeds):
    """Random weights that like the tag of a call, and the end of an answer, as much as words."""
    offered = (ToolSpec("file", "Files.", NESTED), ToolSpec("nest", "Nests.", NESTED))
    asked = [Request((user("Go."),), offered, settings=Settings(max_tokens=500, seed=seed))
             for seed in seeds]  # fmt: skip
    with serving(None, tagged(), bias={TAG: 4.0, 257: 4.0}) as (model, _):
        ends = taken(model, *asked)
    whole = [end for end in ends if end.finish != "length"]
    made = [one for end in whole for one in end.message.calls]
    for one in made:
        jsonschema.validate(json.loads(one.arguments), NESTED)
    assert {one.name for one in made} == {"file", "nest"}
    assert len(whole) > 0.9 * len(ends) and len(made) > len(seeds) / 2
    assert {end.finish for end in whole} == {"calls", "stop"}
    assert any(end.message.content and end.message.calls for end in whole)


def test_a_forced_call_begins_with_the_token_of_its_tag():
    with serving(None, tagged()) as (model, _):
        (end,) = taken(model, Request((user("Go."),), (TOOL,), "required", SHORT_CALL))
    assert end.message.calls[0].name == "multiply"
    assert end.message.tokens is not None and end.message.tokens[0] == TAG


def test_a_schema_holds_the_whole_answer_and_words_are_free():
    schema = {"type": "array", "items": {"type": "boolean"}, "maxItems": 2}
    with serving() as (model, _):
        forced, free = taken(
            model, Request((user("Go."),), schema=schema, settings=Settings(max_tokens=60, seed=1)),
            Request((user("Go."),), (TOOL,), settings=SHORT),
        )  # fmt: skip
    jsonschema.validate(json.loads(forced.message.content), schema)
    assert free.finish == "length" and free.usage.output == 12 and not free.message.calls


def grown(model, session="s", words=30):
    """A first turn, and the messages with which the second goes on."""
    first = (user("Tell me. " * words),)
    (end,) = taken(model, Request(first, settings=SHORT, session=session))
    return (*first, end.message, user("Go on."))


def branches(messages, names):
    return [
        Request(messages, settings=Settings(max_tokens=20, temperature=0.8, seed=seed), session=n)
        for seed, n in enumerate(names)
    ]


def test_forks_share_pages_and_stay_bit_equal():
    with serving() as (model, shared):
        messages = grown(model)
        names = [f"s/{i}" for i in range(8)]
        for name in names:
            model.fork("s", name)
        assert {model.tokens(n) for n in names} == {model.tokens("s")}
        found = shared.scheduler.found
        taken(model, *branches(messages, names))
        accounts = [model.account(n) for n in names]
        full = (len(model.tokens("s")) - 1) // 16 * 16
        assert min(a.cached for a in accounts) >= full > 300 and shared.copied == 0
        assert shared.scheduler.found - found == sum(a.cached for a in accounts)
        assert sum(a.recomputed for a in accounts) == 0
        assert {r.program for r in shared.seen} == {"s"}
    with serving(prefix_cache=False) as (model, alone):
        messages = grown(model)
        for request in branches(messages, [f"b{i}" for i in range(8)]):
            taken(model, request)
        assert alone.scheduler.found == 0
    both = [
        {r.params.seed: (r.prompt, e.bits(r.id)) for r in e.seen[1:]} for e in (shared, alone)
    ]  # fmt: skip
    assert both[0] == both[1] and len({str(bits) for _, bits in both[0].values()}) > 4


def test_misses_name_the_token_and_the_cause():
    with serving() as (model, engine):
        messages = grown(model)
        ask = functools.partial(Request, settings=SHORT, session="s")
        kept = model.tokens("s")
        again = TOKENIZER.encode(TOKENIZER.decode(kept, skip_special=False), add_special=False)
        assert again != [*kept]  # or the test shows nothing

        def missed(request):
            taken(model, request)
            return model.account("s").miss

        assert missed(ask(messages)) is None
        other = (user("Tell me. Tell us!"), *messages[1:])
        at = TOKENIZER.decode(kept).index("me. Tell me.") + len("me. Tell ")
        assert missed(ask(other)) == CacheMiss(at, "messages")
        found = missed(ask(other, (TOOL,)))
        assert found is not None and found.cause == "template"
        model.salt = "b"
        assert missed(ask(other, (TOOL,))) == CacheMiss(0, "salt")
        assert missed(ask(other, (TOOL,))) is None
        before = model.account("s").recomputed
        assert engine.cache is not None
        engine.cache.clear()
        assert missed(ask(other, (TOOL,))) == CacheMiss(0, "evicted")
        assert model.account("s").recomputed > before


def flood(model, seed):
    """Requests that need more pages than there are."""
    long = [user(f"{seed} {i} " + "word " * 300) for i in range(4)]
    taken(model, *[Request((m,), settings=SHORT) for m in long])


def called(model, session="s"):
    first = (user("Tell me. " * 30),)
    (end,) = taken(model, Request(first, (TOOL,), "required", SHORT_CALL, session=session))
    (made,) = end.message.calls
    return (*first, end.message, Message("tool", "42", call_id=made.id))


SHORT_CALL = Settings(max_tokens=400, seed=1)


@pytest.mark.parametrize("leased, lost", [(0.5, False), (0.0, True)])
def test_a_lease_keeps_pages_while_tools_run(leased, lost):
    with serving(by_script, leased=leased) as (model, engine):
        messages = called(model)
        engine.script = None
        for seed in range(3):
            flood(model, seed)
        taken(model, Request(messages, (TOOL,), settings=SHORT, session="s"))
        account = model.account("s")
        assert (account.recomputed > 0) == lost and model.leases == 0
        assert (account.miss is not None and account.miss.cause == "evicted") == lost


def test_a_lease_ends_in_time_and_gives_way():
    with serving(by_script, lease=0.05) as (model, _):
        called(model)
        assert comes(lambda: model.leases == 0)
    with serving(by_script, leased=1.0) as (model, engine):
        called(model)
        assert comes(lambda: model.leases == 1)
        quiet(model)  # the pool is the engine's thread's while that computes
        held = engine.pool.take(engine.pool.free)  # nothing is free but what the lease keeps
        taken(model, Request((user("?"),), settings=dataclasses.replace(SHORT, max_tokens=2)))
        engine.pool.release(held)


def test_leases_take_their_share_and_what_is_wanted_last_goes():
    with serving(by_script, leased=0.4) as (model, _):  # 102 of 256 pages
        held, room = model._thread._held, 0
        for i, seconds in enumerate((59.0, 20.0, 40.0)):
            called(model, f"s{i}")
            quiet(model)
            assert f"s{i}" in held
            model._thread.hold(f"s{i}", model.tokens(f"s{i}"), seconds, "")
            room = max(room, len(model.tokens(f"s{i}")) // 16)
        assert comes(lambda: len(held) == 2)
        assert 102 / 3 < room < 102 / 2 and sorted(held) == ["s1", "s2"]
        model.release("s2")
        assert comes(lambda: sorted(held) == ["s1"])


def test_tools_are_expected_when_they_usually_return(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("agent.returns.time.monotonic", lambda: now[0])
    returns = Returns()
    for _ in range(20):
        for name, seconds in (("slow", 30.0), ("fast", 0.2)):
            returns.leaves("s", [name])
            now[0] += seconds
            returns.comes("s")
    assert returns.leaves("a", ["slow"]) == pytest.approx(30, rel=0.01)
    assert returns.leaves("b", ["fast"]) == pytest.approx(0.2, rel=0.01)
    assert returns.leaves("c", ["fast", "slow"]) == pytest.approx(30, rel=0.01)
    assert returns.leaves("d", ["new"]) == 1.0
    returns.forget("a")
    now[0] += 1000
    returns.comes("a")
    returns.comes("never left")
    assert returns.leaves("a", ["slow"]) == pytest.approx(30, rel=0.01)


def test_whoever_goes_away_leaves_no_page():
    async def main(model):
        asked = Request((user("Go."),), settings=ENDLESS)
        stream = model.stream(asked)
        async with contextlib.aclosing(stream):
            async for item in stream:
                assert isinstance(item, TextDelta)
                break
        with anyio.move_on_after(0.2):
            await turn(model, asked)

    with serving() as (model, engine):
        anyio.run(main, model)
        assert comes(lambda: not engine.has_work())
    assert not engine.has_work() and not engine.scheduler.running
    assert engine.stats().pages_used == 0
    assert len(engine.seen) == 2 and max(o.completion_tokens for o in engine.told) < 1500


def test_an_abort_frees_pages_before_the_next_step():
    steps = []

    class Counting(Steered):
        def abort(self, id):
            super().abort(id)
            steps.append((self.stats().pages_used, id in self._ids))

    async def main(model):
        with anyio.move_on_after(0.3):
            await turn(model, Request((user("Go."),), settings=ENDLESS))

    with EngineModel(Counting(), TOKENIZER) as model:
        anyio.run(main, model)
    assert steps == [(0, False)]


def test_accounts_add_up_to_the_engine():
    with serving() as (model, engine):
        names = ["a", "b", "c"]
        for _ in range(2):
            few = [dataclasses.replace(SHORT, max_tokens=10 + 20 * i) for i in range(3)]
            asked = zip(names, few, strict=True)
            taken(model, *[Request((user(n * 200),), settings=x, session=n) for n, x in asked])
        accounts = [model.account(n) for n in names]
        total = model.total
    assert sum(a.engine_s for a in accounts) == pytest.approx(total.engine_s)
    assert total.engine_s == pytest.approx(engine.seconds, rel=0.25)
    assert sum(a.page_s for a in accounts) == pytest.approx(total.page_s) and total.page_s > 0
    assert accounts[0].engine_s < accounts[2].engine_s and accounts[0].page_s < accounts[2].page_s


def test_limits_on_tokens_end_the_decoding():
    with serving() as (model, engine):
        agent = Agent("a", model, limits=Limits(tokens=30, turns=1), settings=Settings(seed=1))
        result = anyio.run(functools.partial(run, agent, "Go."))
    assert result.state.spent.turns == 1
    assert engine.seen[0].params.max_tokens == 30 == len(result.state.messages[-1].tokens or ())


@pytest.mark.parametrize(
    "change, said",
    [(lambda t: "{{ messages | length }}" + t, "mend the template"),
     (lambda t: re.sub(r"m\.content or \"\"", "m.content | upper", t), "mend the template"),
     (lambda t: None, "no chat template")],
)  # fmt: skip
def test_templates_that_cannot_be_appended_to(change, said):
    tokenizer = Tokenizer(BYTES.backend, BYTES.special, BYTES.eos_ids, change(TEMPLATE))
    with (
        pytest.raises((UserError, ExceptionGroup)) as error,
        serving(None, tokenizer) as (model, _),
    ):
        taken(model, Request(grown(model), settings=SHORT, session="s"))
    found = error.value
    while isinstance(found, ExceptionGroup):
        found = found.exceptions[0]
    assert said in str(found)


def test_what_cannot_be_answered_says_so():
    with serving() as (model, _):
        bad = {"type": "object", "properties": {"a": {"$ref": "#/nowhere"}}, "required": ["a"]}
        for request in (
            Request((user("x" * 3000),)),
            Request((user("x"),), (ToolSpec("t", "", bad),), "required"),
        ):
            with pytest.raises(ExceptionGroup) as error:
                taken(model, request)
            assert isinstance(error.value.exceptions[0], UserError)
        assert isinstance(taken(model, Request((user("x"),), settings=SHORT))[0], Completion)
    with pytest.raises(ExceptionGroup) as error:
        taken(model, Request((user("x"),)))
    assert "the engine is gone" in str(error.value.exceptions[0])


def test_an_engine_that_dies_tells_all_who_wait():
    def die(prompt):
        raise MemoryError("no more")

    with serving(die) as (model, _):
        agent = Agent("a", model)
        for _ in range(2):
            result = anyio.run(functools.partial(run, agent, "Go."))
            assert result.reason == "error" and "gone (MemoryError: no more)" in result.detail


def test_a_draft_model_is_loaded_too(tmp_path, monkeypatch):
    write(tmp_path / "model")
    write(tmp_path / "smaller")
    given = []

    def of(model, config, draft=None):
        given.append(draft)
        raise UserError("enough")

    monkeypatch.setattr(Engine, "of", of)
    config = EngineConfig(draft=3, draft_model=str(tmp_path / "smaller"))
    with pytest.raises(UserError, match="enough"):
        EngineModel.load(str(tmp_path / "model"), config, offline=True)
    assert given[0] is not None


@pytest.mark.slow
def test_the_command_runs_an_engine(tmp_path):
    write(tmp_path / "model")
    command = ["agent", "run", "Hi.", "--model", f"engine:{tmp_path / 'model'}", "--turns", "1",
               "--tools", "--journal", str(tmp_path / "j.sqlite")]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "jaxinfra", *command], capture_output=True, text=True, timeout=280
    )
    assert "1 turns, 0 calls" in done.stdout, done.stdout + done.stderr
