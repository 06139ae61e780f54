"""Many agents: who is asked what, what taints whom, what ends a loop or a deadlock, what a crash
repeats."""

import functools
import itertools
import json
import os
import subprocess
import sys

import anyio
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.journal import MemoryStore
from agent.loop import run
from agent.many import (
    Blackboard,
    Deadlock,
    Loop,
    NoQuorum,
    Specialist,
    agent_tool,
    debate,
    group_chat,
    map_reduce,
    quorum,
    sequential,
    solve,
    supervisor,
)
from agent.many.mail import PostOffice, RemoteMailbox, mailboxes
from agent.model import Request
from agent.scripted import ScriptedModel, call, calls
from agent.spec import Agent
from agent.tools import tool
from jaxinfra.errors import UserError


def says(name: str, *turns, **options) -> Agent:
    script = turns[0] if len(turns) == 1 and callable(turns[0]) else list(turns)
    return Agent(name, ScriptedModel(script), **options)


def last(request: Request) -> str:
    return request.messages[-1].content


@tool(effects="pure", untrusted=True)
async def browse() -> str:
    """Reads a stranger's page."""
    return "a page"


sent: list[str] = []


@tool
async def send(text: str) -> str:
    """Sends."""
    sent.append(text)
    return "sent"


def test_agents_as_tools_of_a_supervisor():
    adder = says("adder", lambda r: f"sum of {last(r)}")
    worker = says("worker", lambda r: f"work on {last(r)}", description="Works.")
    plan = calls(call("adder", task="1 2"), call("worker", task="x"))
    boss = Agent("boss", ScriptedModel([plan, "all done"]))
    boss = supervisor(boss, [adder, worker], MemoryStore())
    assert [t.name for t in boss.tools] == ["adder", "worker"]
    assert boss.tools[1].spec.description == "Works."
    result = anyio.run(run, boss, "go")
    told = [m.content for m in result.state.messages if m.role == "tool"]
    assert result.output == "all done" and told == ["sum of 1 2", "work on x"]


def test_a_sub_agents_failure_is_told_and_its_taint_comes_along():
    sent.clear()
    failing = Agent("failing", ScriptedModel([]))
    reader = Agent("reader", ScriptedModel([call("browse"), "read"]), tools=(browse,))
    script = [call("failing", task="x"), call("send", text="before"), call("reader", task="y"),
              call("send", text="after"), "end"]  # fmt: skip
    boss = Agent("boss", ScriptedModel(script),
                 tools=(agent_tool(failing), agent_tool(reader), send))  # fmt: skip
    result = anyio.run(run, boss, "go")
    assert result.reason == "waiting" and sent == ["before"]
    assert "failing ended with error" in result.state.messages[2].content
    sub = Agent("sub", ScriptedModel([call("send", text="down"), "x"]), tools=(send,))
    chief = Agent("chief", ScriptedModel([call("browse"), call("sub", task="z"), "end"]),
                  tools=(browse, agent_tool(sub)))  # fmt: skip
    result = anyio.run(run, chief, "go")
    assert sent == ["before"] and "ended with waiting" in result.state.messages[4].content


def test_sequential_and_map_reduce():
    async def main():
        store = MemoryStore()
        chain = [says("a", lambda r: last(r) + "a"), says("b", lambda r: last(r) + "b")]
        results = await sequential(chain, "x", store=store, session="s")
        assert [r.output for r in results] == ["xa", "xab"]
        broken = [chain[0], Agent("bad", ScriptedModel([])), chain[1]]
        results = await sequential(broken, "x", store=store, session="t")
        assert [r.reason for r in results] == ["done", "error"]

        def count(request: Request) -> str:
            if last(request) == "bad":
                raise RuntimeError("a crash in a model")
            return str(len(last(request)))

        reducer = says("sum", lambda r: last(r))
        tasks = ["a", "bb", "bad", "dddd"]
        result = await map_reduce(says("count", count), tasks, reducer, "Sum up:", store=store,
                                  session="m")  # fmt: skip
        lines = result.output.splitlines()
        assert lines[:3] == ["Sum up:", "1. 1", "2. 2"] and lines[4] == "4. 4"
        assert "a crash in a model" in lines[3]

    anyio.run(main)


def test_patterns_repeat_nothing_after_a_crash():
    asked: list[str] = []

    def turn(request: Request) -> str:
        asked.append(last(request))
        return last(request) + "."

    async def main():
        store, left = MemoryStore(), [0]
        append = store.append

        async def crashing(*arguments):
            left[0] -= 1
            if left[0] == 0:
                raise KeyboardInterrupt
            return await append(*arguments)

        store.append = crashing  # pyright: ignore
        chain = [says(name, turn) for name in "abcd"]
        for after in range(1, 30):
            left[0] = after
            try:
                return await sequential(chain, "x", store=store, session="s")
            except KeyboardInterrupt:
                continue

    results = anyio.run(main)
    assert results is not None and results[-1].output == "x...."
    # A turn of the model that was not journalled is asked again; one that was never is.
    assert len(asked) <= 8 and set(asked) == {"x", "x.", "x..", "x..."}


def test_group_chat_takes_turns_and_ends_a_loop():
    async def main():
        names = iter("abcdefghi")
        made = [says("ada", lambda r: next(names)), says("bob", lambda r: next(names))]
        said = await group_chat(made, "t", store=MemoryStore(), session="g", rounds=2)
        assert [(s.name, s.text) for s in said] == [
            ("ada", "a"), ("bob", "b"), ("ada", "c"), ("bob", "d"),
        ]  # fmt: skip
        echo = [says("ada", lambda r: "you first"), says("bob", lambda r: "no, you")]
        with pytest.raises(Loop, match="twice in a row"):
            await group_chat(echo, "t", store=MemoryStore(), session="g", rounds=9)

        def choose(said):
            return "bob" if len(said) < 2 else None

        said = await group_chat(echo, "t", store=MemoryStore(), session="g", speaker=choose)
        assert [s.name for s in said] == ["bob", "bob"]
        with pytest.raises(ValueError, match="no agent 'eve'"):
            await group_chat(echo, "t", store=MemoryStore(), session="h", speaker=lambda s: "eve")

    anyio.run(main)


def test_debate_shows_the_others_and_lets_the_judge_decide():
    def stubborn(request: Request) -> str:
        return "4"

    def swayed(request: Request) -> str:
        return "4" if "- 4" in last(request) else "5"

    async def main():
        judge = says("judge", lambda r: last(r).split("answers:")[1].strip())
        debaters = [says("a", stubborn), says("b", stubborn), says("c", swayed)]
        return await debate(debaters, judge, "2+2?", store=MemoryStore(), session="d")

    assert anyio.run(main).output.splitlines()[:3] == ["1. 4", "2. 4", "3. 4"]


FAULTS = ["crash", "hang", "lie", "lie together"]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 3), st.lists(st.sampled_from(FAULTS), min_size=3, max_size=3), st.randoms())
def test_a_quorum_bears_faulty_members(faulty, kinds, random):
    async def honest() -> str:
        return " 42 "

    async def crash() -> str:
        raise OSError("gone")

    async def hang() -> str:
        await anyio.sleep_forever()
        return ""

    async def lie() -> str:
        return str(random.random())

    async def together() -> str:
        return "41"

    bad = {"crash": crash, "hang": hang, "lie": lie, "lie together": together}
    members = [honest] * (faulty + 1) + [bad[kind] for kind in kinds[:faulty]]
    random.shuffle(members)
    agreed = anyio.run(functools.partial(quorum, members, faulty=faulty))
    assert agreed.answer.strip() == "42"


def test_a_quorum_refuses_what_it_cannot_bear():
    async def lie() -> str:
        return "41"

    async def hang() -> str:
        await anyio.sleep_forever()
        return ""

    with pytest.raises(UserError, match="3 members bear 1 faulty ones, not 2"):
        anyio.run(functools.partial(quorum, [lie] * 3, faulty=2))
    with pytest.raises(NoQuorum, match="'41': 1"):
        anyio.run(functools.partial(quorum, [lie, hang, hang], faulty=1, seconds=1.0))
    # The control: with more liars than it was told, the lie wins.
    assert anyio.run(functools.partial(quorum, [lie, lie, hang], faulty=1)).answer == "41"


def test_mail_comes_in_order_and_by_sender():
    async def main():
        ends = mailboxes("a", "b", "c")
        await ends["a"].send("c", "1", ("web",))
        await ends["b"].send("c", "2")
        await ends["a"].send("c", "3")
        from_b = await ends["c"].receive("b")
        first, then = await ends["c"].receive(), await ends["c"].receive()
        assert (from_b.text, first.text, then.text) == ("2", "1", "3")
        assert first.tainted_by == ("web",)
        with pytest.raises(UserError, match="no agent 'd'"):
            await ends["a"].send("d", "x")

    anyio.run(main)


WAITS = [
    ("a cycle of two", {"a": "b", "b": "a", "c": None}, {"a", "b"}),
    ("a cycle of three", {"a": "b", "b": "c", "c": "a"}, {"a", "b", "c"}),
    ("all for anybody", {"a": None, "b": None, "c": None}, {"a", "b", "c"}),
    ("behind a cycle", {"a": "b", "b": "a", "c": "a"}, {"a", "b", "c"}),
    ("for one who left", {"a": "c", "b": None, "c": "left"}, {"a", "b"}),
]


@pytest.mark.parametrize(("why", "waits", "stuck"), WAITS, ids=[w[0] for w in WAITS])
def test_a_deadlock_is_told_and_nobody_hangs(why, waits, stuck):
    told: dict[str, str] = {}

    async def main():
        ends = mailboxes(*waits)

        async def one(name, sender):
            if sender == "left":
                await ends[name].leave()
                return
            try:
                await ends[name].receive(sender)
            except Deadlock as error:
                told[name] = str(error)
                await ends[name].leave()

        with anyio.fail_after(120):
            async with anyio.create_task_group() as group:
                for name, sender in waits.items():
                    group.start_soon(one, name, sender)

    anyio.run(main)
    assert set(told) >= stuck
    assert "waits for" in told["a"]


def test_no_deadlock_is_seen_where_there_is_none():
    async def main():
        ends = mailboxes("a", "b")

        async def ping(n):
            for _ in range(n):
                await ends["a"].send("b", "ping")
                assert (await ends["a"].receive("b")).text == "pong"
            await ends["a"].send("b", "end")

        async def pong():
            while (await ends["b"].receive("a")).text != "end":
                await ends["b"].send("a", "pong")

        async with anyio.create_task_group() as group:
            group.start_soon(ping, 50)
            group.start_soon(pong)

    anyio.run(main)


REMOTE = """
import sys; sys.path[:] = eval(sys.argv[3])
import anyio
from agent.many.mail import Deadlock, RemoteMailbox
async def main():
    box = RemoteMailbox(sys.argv[1], sys.argv[2])
    while True:
        mail = await box.receive()
        if mail.text == "end":
            break
        await box.send(mail.sender, f"{mail.text} {box.name}", mail.tainted_by)
    await box.leave()
anyio.run(main)
"""


def test_mail_between_processes_and_deadlock_there_too():
    async def main():
        office = PostOffice("tcp://127.0.0.1:0", ("here", "one", "two"))
        async with anyio.create_task_group() as group:
            group.start_soon(office.serve)
            workers = [
                subprocess.Popen([sys.executable, "-c", REMOTE, office.address, name,
                                  repr(sys.path)])
                for name in ("one", "two")
            ]  # fmt: skip
            here = RemoteMailbox(office.address, "here")
            for to in ("one", "two", "one"):
                await here.send(to, "hello", ("web",))
            got = [await here.receive() for _ in range(3)]
            assert sorted(m.text for m in got) == ["hello one", "hello one", "hello two"]
            assert all(m.tainted_by == ("web",) for m in got)
            with pytest.raises(UserError, match="no agent 'nobody'"):
                await here.send("nobody", "x")
            with pytest.raises(Deadlock, match="here waits for anybody"):
                await here.receive()
            stranger = RemoteMailbox(office.address, "stranger")
            with pytest.raises(UserError):
                await stranger.send("here", "x")
            stranger._socket.close(linger=0)
            # Both were told of the deadlock too, and ended with it; leave for them.
            assert [worker.wait(120) for worker in workers] == [1, 1]
            group.cancel_scope.cancel()
            here._socket.close(linger=0)

    with open(os.devnull, "w") as null:
        saved = os.dup(2)
        os.dup2(null.fileno(), 2)  # the workers' tracebacks
        try:
            anyio.run(main)
        finally:
            os.dup2(saved, 2)
            os.close(saved)


def test_a_blackboard_settles_and_says_when_it_cannot():
    async def main():
        board = Blackboard()
        board.write("text", "3 1 2", "user")

        async def split(b):
            return {"numbers": b.get("text").split()}

        async def order(b):
            return {"sorted": sorted(b.get("numbers"))}

        async def both(b):
            return {"sorted": ["wrong"]}

        made = [
            Specialist("split", lambda b: b.get("numbers") is None, split),
            Specialist("order", lambda b: b.get("numbers") and not b.get("sorted"), order),
            Specialist("late", lambda b: b.get("numbers") and not b.get("sorted"), both),
        ]
        assert await solve(board, made) == 2
        assert board.get("sorted") == ["1", "2", "3"] and board.entries["sorted"].author == "order"
        assert [key for key, _ in board.history] == ["text", "numbers", "sorted"]

        async def nothing(b):
            return {"text": "3 1 2"}

        with pytest.raises(Loop, match="idle changed nothing"):
            await solve(board, [Specialist("idle", lambda b: True, nothing)])
        tick = itertools.count()

        async def more(b):
            return {"n": next(tick)}

        with pytest.raises(Loop, match="not settled after 5 rounds"):
            await solve(board, [Specialist("more", lambda b: True, more)], rounds=5)

    anyio.run(main)


def test_an_agents_arguments_are_its_task():
    boss = agent_tool(says("x", "y"))
    assert json.loads(json.dumps(dict(boss.spec.parameters)))["required"] == ["task"]
    assert boss.effects == "write" and agent_tool(says("x", "y"), MemoryStore()).effects != "write"
