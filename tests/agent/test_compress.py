"""Compression: within the budget, calls keep their results, the prefix stays, costs are counted."""

import functools

import anyio
import pytest

from agent.compress import Compression, compress, estimate, turns
from agent.events import Compressed
from agent.journal import MemoryStore
from agent.loop import run
from agent.messages import Message, ToolCall, user
from agent.model import Completion, Request, Usage
from agent.scripted import ScriptedModel, call
from agent.spec import Agent
from agent.state import fold
from agent.tools import tool
from tests.agent.test_loop import valid


def conversation(n: int) -> list[Message]:
    made = [user("Find the number. " + "x" * 100)]
    for i in range(n):
        made.append(Message("assistant", f"step {i}", (ToolCall(f"c{i}", "read", "{}"),)))
        made.append(Message("tool", f"fact {i}: " + "y" * 400, call_id=f"c{i}"))
    return [*made, Message("assistant", "so far"), user("and now?")]


def summarise(request: Request) -> Completion:
    said = request.messages[0].content
    facts = [word for word in ("fact 0", "fact 9") if word in said]
    return Completion(Message("assistant", f"saw {facts}"), Usage(len(said) // 4, 10, 0, 0.5))


STRATEGIES = ["drop", "hierarchical", "summarise", "trim"]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_fits_stays_valid_and_keeps_its_beginning_and_end(strategy):
    before = conversation(20)
    how = Compression(1500, (strategy,), keep=0.6)
    made = anyio.run(compress, before, how, ScriptedModel(summarise))
    assert made is not None and made.strategies == (strategy,) and made.lost
    assert made.before == estimate(before) and made.after == estimate(made.messages) <= 900
    assert valid(made.messages)
    recent = [m for piece in turns(before)[-4:] for m in piece]
    assert made.messages[0] == before[0] and list(made.messages[-len(recent) :]) == recent
    assert made.prefix >= estimate(before[:1])
    calls = {"summarise": 1, "hierarchical": 4}.get(strategy, 0)
    assert made.usage.cost == 0.5 * calls
    if calls:
        assert "fact 0" in "".join(m.content for m in made.messages)


def test_nothing_happens_within_the_budget_or_where_nothing_can_go():
    model = ScriptedModel([])
    assert anyio.run(compress, conversation(2), Compression(5000), model) is None
    assert (
        anyio.run(compress, [user("x" * 9000)], Compression(100, ("drop", "trim")), model) is None
    )


def test_later_strategies_only_where_earlier_ones_do_not_suffice():
    how = Compression(1500, ("trim", "summarise"), keep=0.8)
    made = anyio.run(compress, conversation(20), how, ScriptedModel([]))
    assert made is not None and made.strategies == ("trim",) and made.usage == Usage()
    tight = Compression(1500, ("trim", "summarise"), keep=0.3)
    made = anyio.run(compress, conversation(20), tight, ScriptedModel(summarise))
    assert made is not None and made.strategies == ("trim", "summarise") and made.usage.cost == 0.5


def test_a_run_goes_on_within_its_budget_and_counts_the_cost():
    @tool(effects="pure")
    async def read(n: int) -> str:
        """Reads."""
        return f"page {n}: " + "z" * 800

    def turn(request: Request) -> Completion | Message:
        if "Write down" in request.messages[0].content:
            return summarise(request)
        read_so_far = sum(m.role == "assistant" for m in request.messages)
        seen.append(estimate(request.messages))
        return (
            call("read", n=len(seen)) if len(seen) < 20 else Message("assistant", f"{read_so_far}")
        )

    seen: list[int] = []
    store = MemoryStore()
    agent = Agent("a", ScriptedModel(turn), "Read all.", (read,),
                  compression=Compression(1000, ("summarise",)))  # fmt: skip
    result = anyio.run(functools.partial(run, agent, "go", store=store, session="s"))
    assert result.reason == "done" and max(seen) < 1300 and valid(result.state.messages)
    events = anyio.run(store.read, "s")
    shrunk = [e.event for e in events if isinstance(e.event, Compressed)]
    assert len(shrunk) >= 2 and all(e.after < e.before for e in shrunk)
    assert result.state.spent.cost == 0.5 * len(shrunk)
    assert fold(events) == result.state  # a resumed process sees the same conversation
