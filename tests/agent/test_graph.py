"""The graph runner: supersteps, reducers, routers, questions, checkpoints, broken graphs."""

import functools

import anyio
import pytest

from agent.journal import MemoryStore
from agent.many import Graph, Interrupt, run_graph
from agent.many.graph import Outcome
from agent.redact import Redactor
from agent.sqlite_store import SQLiteStore
from jaxinfra.errors import UserError


def go(graph: Graph, state=None, store=None, session="g") -> Outcome:
    return anyio.run(functools.partial(
        run_graph, graph, state or {}, store=store or MemoryStore(), session=session
    ))  # fmt: skip


def test_a_superstep_sees_the_state_before_it_and_merges_by_reducers():
    def node(name):
        async def work(state):
            return {"log": [f"{name} saw {len(state.get('log') or [])}"], name: True}

        return work

    graph = Graph(
        {name: node(name) for name in "abcd"}, {"a": ["b", "c"], "b": ["d"], "c": ["d"]},
        reducers={"log": lambda old, new: (old or []) + new},
    )  # fmt: skip
    outcome = go(graph)
    assert outcome.steps == 3 and outcome.questions == {}
    assert outcome.state["log"] == ["a saw 0", "b saw 1", "c saw 1", "d saw 3"]  # d ran once


def test_a_router_makes_a_cycle_that_ends_or_is_told():
    graph = Graph({"add": lambda s: {"n": s["n"] + 1}},
                  {"add": lambda s: ["add"] if s["n"] < 5 else []})  # fmt: skip
    assert go(graph, {"n": 0}).state["n"] == 5
    endless = Graph({"add": lambda s: {"n": s["n"] + 1}}, {"add": ["add"]}, max_steps=7)
    with pytest.raises(UserError, match="not at its end after 7 supersteps, add next"):
        go(endless, {"n": 0})


BROKEN = [
    ("no nodes", lambda: Graph({}), "no nodes"),
    ("edge to nowhere", lambda: Graph({"a": dict}, {"a": ["b"]}), "no node 'b'"),
    ("edge from nowhere", lambda: Graph({"a": dict}, {"b": ["a"]}), "no node 'b'"),
    ("start nowhere", lambda: Graph({"a": dict}, start=("b",)), "no node 'b'"),
    ("router to nowhere", lambda: go(Graph({"a": lambda s: {}}, {"a": lambda s: ["b"]})),
     "a leads to 'b', which is no node"),
    ("two writers", lambda: go(Graph({"a": lambda s: {"x": 1}, "b": lambda s: {"x": 2}},
                                     start=("a", "b"))), "a and b both write 'x'"),
    ("no JSON", lambda: go(Graph({"a": lambda s: {"x": object()}})), "a writes what has no JSON"),
]  # fmt: skip


@pytest.mark.parametrize(("why", "make", "told"), BROKEN, ids=[b[0] for b in BROKEN])
def test_broken_graphs_are_told_in_a_line(why, make, told):
    with pytest.raises(UserError, match=told):
        make()


def test_questions_wait_across_processes_and_rerun_only_who_asked(tmp_path):
    ran: list[str] = []

    def other(state):
        ran.append("other")
        return {"other": 1}

    def ask(state):
        ran.append("ask")
        if "answer" not in state:
            raise Interrupt("May I?")
        return {"allowed": state["answer"]}

    def end(state):
        return {"end": "answer" not in state}  # an answer is for the node that asked

    def graph() -> Graph:
        return Graph({"ask": ask, "other": other, "end": end}, {"ask": ["end"], "other": ["end"]},
                     start=("ask", "other"))  # fmt: skip

    store = SQLiteStore(tmp_path / "j")
    assert go(graph(), store=store).questions == {"ask": "May I?"}
    store.close()
    store = SQLiteStore(tmp_path / "j")  # another process
    assert go(graph(), store=store).questions == {"ask": "May I?"}
    outcome = anyio.run(functools.partial(
        run_graph, graph(), answers={"ask": "yes"}, store=store, session="g"
    ))  # fmt: skip
    assert outcome.state == {"other": 1, "allowed": "yes", "end": True}
    assert ran.count("other") == 1 and ran.count("ask") == 3
    store.close()


def test_no_node_that_ended_runs_again_after_a_crash():
    for at in range(1, 9):
        ran: list[str] = []
        store, left = MemoryStore(), [at]

        def node(name, ran=ran, left=left):
            async def work(state):
                left[0] -= 1
                if left[0] == 0:
                    raise RuntimeError("crash")
                await anyio.sleep(0)
                ran.append(name)
                return {"sum": 1}

            return work

        names = ["a", "b", "c", "d", "e"]
        graph = Graph(
            {name: node(name) for name in names},
            {"a": ["b", "c"], "b": ["d"], "c": ["d", "e"]},
            reducers={"sum": lambda a, b: (a or 0) + b},
        )  # fmt: skip
        for _ in range(3):
            try:
                outcome = go(graph, store=store)
                break
            except RuntimeError:
                continue
        assert outcome.state == {"sum": 5}
        ended = [e.event.node for e in anyio.run(store.read, "g") if hasattr(e.event, "node")]
        assert sorted(ended) == names and len(set(ended)) == 5
        assert all(ran.count(name) <= 2 for name in names)  # twice only if cut before its write
        assert len(ran) <= 7


def test_secrets_are_not_kept():
    store = MemoryStore()
    graph = Graph({"a": lambda s: {"said": f"with {s['key']}"}})
    made = run_graph(graph, {"key": "hunter2-hunter2"}, store=store, session="g",
                     redactor=Redactor({"PW": "hunter2-hunter2"}))  # fmt: skip
    outcome = anyio.run(lambda: made)
    assert outcome.state == {"key": "[redacted PW]", "said": "with [redacted PW]"}
    assert "hunter2" not in str(anyio.run(store.read, "g"))
