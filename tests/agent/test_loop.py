"""The loop: turns, calls side by side, bounds, cancellation, answers, handoffs, ReAct by text."""

import functools
import json
import subprocess
import sys
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from agent.events import (
    CallDelta,
    ModelResponded,
    RunFinished,
    RunStarted,
    TextDelta,
    ToolFinished,
    ToolProgress,
    ToolStarted,
)
from agent.journal import MemoryStore
from agent.limits import Limits
from agent.loop import resume, run, run_stream
from agent.messages import Message
from agent.model import Completion, Request, Settings, Usage
from agent.react import ReActModel
from agent.scripted import ScriptedModel, call, calls
from agent.spec import Agent
from agent.state import fold
from agent.tools import tool
from jaxinfra.errors import UserError


@tool(effects="pure")
async def double(n: int) -> int:
    """Doubles."""
    return 2 * n


def ask(agent: Agent, task: str = "go", **options: Any):
    return anyio.run(functools.partial(run, agent, task, **options))


def valid(messages: tuple[Message, ...]) -> bool:
    """Every call has exactly one result, right behind it, in its order."""
    i = 0
    while i < len(messages):
        ids = [c.id for c in messages[i].calls]
        told = messages[i + 1 : i + 1 + len(ids)]
        if [m.call_id for m in told] != ids or any(m.role != "tool" for m in told):
            return False
        i += 1 + len(ids)
    return True


def test_the_events_of_a_run_in_order():
    model = ScriptedModel([call("double", n=21), "it is 42"])
    events: list = []

    async def main():
        async with run_stream(Agent("a", model, "Be brief.", (double,)), "21?") as stream:
            async for event in stream:
                events.append(event)
        return stream.result

    result = anyio.run(main)
    assert result is not None and result.output == "it is 42"
    assert [type(e) for e in events] == [
        RunStarted, CallDelta, ModelResponded, ToolStarted, ToolFinished,
        TextDelta, TextDelta, TextDelta, ModelResponded, RunFinished,
    ]  # fmt: skip
    first, second = model.requests
    assert [m.role for m in second.messages] == ["system", "user", "assistant", "tool"]
    assert list(second.messages[:2]) == list(first.messages)
    assert second.messages[3].content == "42"


def test_calls_overlap_and_serial_ones_are_barriers():
    log: list[str] = []

    def make(name: str, **options: Any):
        async def act() -> str:
            log.append(f"+{name}")
            await anyio.sleep(0.02)
            log.append(f"-{name}")
            return name

        return tool(name=name, **options)(act)

    tools = (make("a", effects="pure"), make("b", effects="idempotent"), make("w"),
             make("s", effects="pure", serial=True), make("c", effects="pure"))  # fmt: skip
    turn = calls(*(call(t.name, t.name) for t in tools))
    result = ask(Agent("x", ScriptedModel([turn, "done"]), "", tools))
    assert [sorted(log[0:2]), sorted(log[2:4])] == [["+a", "+b"], ["-a", "-b"]]
    assert log[4:] == ["+w", "-w", "+s", "-s", "+c", "-c"]
    assert [m.content for m in result.state.messages[2:7]] == ["a", "b", "w", "s", "c"]


@pytest.mark.parametrize(
    "limits, words",
    [
        (Limits(turns=3), "turns: 3 of 3"),
        (Limits(tokens=30), "tokens: "),
        (Limits(cost=1.0), "cost: "),
        (Limits(turns=None, seconds=0.3), "seconds: "),
    ],
    ids=["turns", "tokens", "cost", "seconds"],
)
def test_limits_end_a_run_that_never_ends(limits, words):
    def forever(request: Request):
        turn = call("double", n=len(request.messages))
        return Completion(turn, Usage(5, 5, cost=0.4), "calls")

    result = ask(Agent("x", ScriptedModel(forever, delay=0.01), "", (double,), limits=limits))
    assert result.reason == "limit" and words in result.detail and valid(result.state.messages)


def test_the_tool_limit_is_told_and_the_model_still_answers():
    turn = calls(*(call("double", n=i) for i in range(5)))
    model = ScriptedModel([turn, "enough"])
    result = ask(Agent("x", model, "", (double,), limits=Limits(tool_calls=3)))
    assert result.output == "enough" and result.state.spent.tool_calls == 3
    told = [m.content for m in result.state.messages if m.role == "tool"]
    assert told[:3] == ["0", "2", "4"] and all("limit: 3" in t for t in told[3:])


def test_tokens_left_cap_each_turn():
    model = ScriptedModel([Completion(call("double", n=1), Usage(50, 30), "calls"), "ok"])
    ask(
        Agent(
            "x", model, "", (double,), settings=Settings(max_tokens=90), limits=Limits(tokens=100)
        )
    )
    assert [r.settings.max_tokens for r in model.requests] == [90, 20]


def test_a_time_limit_keeps_the_partial_answer_and_more_time_goes_on():
    store = MemoryStore()

    class Stuck(ScriptedModel):
        async def stream(self, request):
            async for item in super().stream(request):
                yield item
                if item == TextDelta("two "):
                    await anyio.sleep_forever()

    stuck = Stuck(["one two three four five six"])
    agent = Agent("x", stuck, limits=Limits(seconds=2.0))
    result = ask(agent, store=store, session="s")
    assert result.reason == "limit" and result.output == "one two "
    fast = Agent("x", ScriptedModel(["one two three four five six"]))
    again = anyio.run(functools.partial(resume, fast, "s", store=store))
    assert again.output == "one two three four five six"
    assert [m.role for m in again.state.messages] == ["user", "assistant"]


def test_cancellation_stops_tools_and_leaves_a_valid_history():
    ended: list[str] = []

    @tool
    async def endless(name: str) -> str:
        try:
            await anyio.sleep_forever()
        finally:
            ended.append(name)
        return ""

    store = MemoryStore()
    turn = calls(call("endless", name="a"), call("double", n=1), call("endless", name="never"))
    agent = Agent("x", ScriptedModel([turn, "recovered"]), "", (endless, double))

    async def main():
        async with run_stream(agent, "go", store=store, session="s") as stream:
            async for event in stream:
                if isinstance(event, ToolStarted) and event.name == "endless":
                    break
        assert stream.result is None
        return [r.event for r in await store.read("s")]

    events = anyio.run(main)
    assert ended == ["a"]
    assert isinstance(events[-1], RunFinished) and events[-1].reason == "cancelled"
    told = {e.call_id: e.content for e in events if isinstance(e, ToolFinished)}
    assert sorted("may have" in text for text in told.values()) == [False, False, True]
    assert sum("it had no effect" in text for text in told.values()) == 2
    result = ask(agent, "and now?", store=store, session="s")
    assert result.output == "recovered" and valid(result.state.messages)


def test_every_kind_of_wrong_call_is_told():
    turn = calls(call("nothing"), call("double", n="x"), call("final_result", answer=1))
    result = ask(Agent("x", ScriptedModel([turn, "sorry"]), "", (double,)))
    told = [m.content for m in result.state.messages if m.role == "tool"]
    assert "no tool 'nothing'; there are: double" in told[0]
    assert "n: Input should be a valid integer" in told[1] and "no tool" in told[2]
    assert result.output == "sorry"


def test_answers_that_never_fit_end_after_the_retries():
    agent = Agent("x", ScriptedModel(lambda r: "seven"), output_type=int)
    result = ask(agent)
    assert result.reason == "error" and result.state.spent.turns == 3
    wrong = call("final_result", answer="seven")
    agent = Agent("x", ScriptedModel(lambda r: wrong), "", (double,), output_type=int)
    result = ask(agent)
    assert result.reason == "error" and result.state.spent.turns == 3
    assert valid(result.state.messages)


def test_handoff_changes_instructions_and_tools():
    second = Agent("bert", ScriptedModel(lambda r: "bert here"), "I am Bert.", description="knows")
    first = Agent(
        "anna", ScriptedModel([call("transfer_to_bert")]), "I am Anna.", handoffs=(second,)
    )
    store = MemoryStore()
    result = ask(first, store=store, session="s")
    assert result.output == "bert here" and result.state.agent == "bert"
    assert second.model.requests[0].messages[0].content == "I am Bert."  # pyright: ignore
    again = ask(first, "more", store=store, session="s")
    assert again.state.agent == "bert" and again.output == "bert here"
    with pytest.raises(UserError, match="which 'bob' neither is nor hands over to"):
        ask(Agent("bob", first.model), "more", store=store, session="s")


def test_bad_agents_are_refused_with_names():
    with pytest.raises(UserError, match="two tools named 'double'"):
        Agent("x", ScriptedModel([]), tools=(double, double))
    with pytest.raises(UserError, match="output_type"):
        Agent("x", ScriptedModel([]), output_type=anyio.Event)
    two = Agent("x", ScriptedModel([]), handoffs=(Agent("x", ScriptedModel([])),))
    with pytest.raises(UserError, match="two agents are named 'x'"):
        ask(two)
    with pytest.raises(UserError, match="no session nowhere"):
        anyio.run(
            functools.partial(resume, Agent("x", ScriptedModel([])), "nowhere", store=MemoryStore())
        )


def test_progress_of_a_generator_is_streamed_before_its_end():
    @tool(effects="pure")
    async def count(n: int):
        for i in range(n):
            yield f"{i} "

    seen: list = []

    async def main():
        agent = Agent("x", ScriptedModel([call("count", n=3), "ok"]), "", (count,))
        async with run_stream(agent, "go") as stream:
            async for event in stream:
                seen.append(event)

    anyio.run(main)
    texts = [e.text for e in seen if isinstance(e, ToolProgress)]
    assert texts == ["0 ", "1 ", "2 "]


REACT = [
    "Thought: double it\nAction: double\nAction Input: {\"n\": 4}\nObservation: 9 (made up)",
    "Thought: again\nAction: `double`\nAction Input: ```json\n{\"n\": 8}\n```",
    "Thought: I know the answer\nFinal Answer: 16",
]  # fmt: skip


def test_react_by_text_in_the_same_loop():
    inner = ScriptedModel(REACT)
    result = ask(Agent("x", ReActModel(inner), "You compute.", (double,)))
    assert result.output == "16"
    told = [m.content for m in result.state.messages if m.role == "tool"]
    assert told == ["8", "16"]
    assert all(not r.tools and "Observation:" in r.settings.stop for r in inner.requests)
    shown = inner.requests[-1].messages
    assert "double: Doubles." in shown[0].content and "made up" not in str(shown)
    assert [m.role for m in shown] == ["system", "user", "assistant", "user", "assistant", "user"]
    for earlier, later in zip(inner.requests, inner.requests[1:], strict=False):
        assert list(later.messages[: len(earlier.messages)]) == list(earlier.messages)


def test_react_tells_the_fault_of_a_broken_action():
    inner = ScriptedModel(["Action: double\nAction Input: n is 4", "Final Answer: I give up"])
    result = ask(Agent("x", ReActModel(inner), "", (double,)))
    assert "Invalid JSON" in result.state.messages[2].content and result.output == "I give up"


def test_two_hundred_sessions_at_once_lose_no_event():
    turns = 2
    model = ScriptedModel([*(call("double", n=i) for i in range(turns)), "end"])
    store = MemoryStore()
    seen: dict[str, int] = {}

    async def one(session: str):
        async with run_stream(
            Agent("x", model, "", (double,)), "go", store=store, session=session
        ) as stream:
            async for event in stream:
                if not isinstance(event, CallDelta | TextDelta):
                    seen[session] = seen.get(session, 0) + 1

    async def main():
        async with anyio.create_task_group() as group:
            for i in range(200):
                group.start_soon(one, str(i))

    anyio.run(main)
    kept = {s.session: s.events for s in anyio.run(store.sessions)}
    assert len(kept) == 200 and seen == kept and set(kept.values()) == {3 + 3 * turns}


def test_importing_the_layer_imports_no_jax():
    code = (
        "import agent.loop, agent.http_model, agent.react, sys, json\n"
        "heavy = ('jax', 'openai', 'numpy', 'mcp')\n"
        "print(json.dumps([m for m in sys.modules if m.split('.')[0] in heavy]))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, timeout=300)
    assert json.loads(out.stdout) == []


@pytest.mark.parametrize("checkpoints", range(12))
def test_a_run_cancelled_at_its_very_beginning_is_not_left_open(checkpoints):
    """At whatever await the cancellation comes, the journal has no run, or one that has ended."""

    async def main():
        store = MemoryStore()
        async with anyio.create_task_group() as group:
            agent = Agent("a", ScriptedModel(["one two three"], delay=0.01))
            group.start_soon(functools.partial(run, agent, "go", store=store, session="s"))
            for _ in range(checkpoints):
                await anyio.lowlevel.checkpoint()
            group.cancel_scope.cancel()
        return fold(await store.read("s"))

    state = anyio.run(main)
    assert state.runs == 0 or (state.finished is not None and state.finished.reason == "cancelled")
