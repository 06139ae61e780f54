"""The model with its engine in this process, on random weights; some answers are steered."""

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
from agent.messages import user
from agent.model import Completion, Request, Settings, ToolSpec
from decode.config import EngineConfig
from decode.engine import Engine
from jaxinfra.errors import UserError
from jaxinfra.text import Tokenizer
from tests.agent.compat_server import TEMPLATE, call
from tests.agent.random_model import write
from tests.agent.steered_engine import (
    BYTES,
    SHORT,
    SHORT_CALL,
    TAG,
    TOKENIZER,
    by_script,
    grown,
    serving,
    tagged,
    taken,
)
from tests.agent.test_models import TOOL, conformance


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
    "seeds", [range(8), pytest.param(range(8, 1008), marks=pytest.mark.slow)], ids=len
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
    "seeds", [range(8), pytest.param(range(8, 1008), marks=pytest.mark.slow)], ids=len
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
        [sys.executable, "-m", "jaxinfra", *command], capture_output=True, text=True, timeout=600
    )
    assert "1 turns, 0 calls" in done.stdout, done.stdout + done.stderr
