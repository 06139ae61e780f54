"""A graph of functions over shared state, run in supersteps with a checkpoint at each write.

    graph = Graph({"draft": draft, "review": review}, {"draft": ["review"], "review": decide})
    result = await run_graph(graph, {"task": "..."}, store=store, session="g")

A superstep runs all active nodes side by side on the same state (Valiant's BSP, 1990; Pregel,
2010). Their writes are merged in the order of their names, by the channel's reducer where it has
one; two writers of a channel without one are an error. Then the edges of those that ran say who is
next.

Each node's writes are journalled when it ends. After a crash the nodes of the unfinished superstep
that had ended are not run again. A node that raises `Interrupt` leaves the graph waiting; it is run
again with the answer, and only it.
"""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import anyio

from agent.events import GraphAnswered, GraphStarted, Kept, NodeWrote, Recorded
from agent.gather import gather
from agent.journal import Store
from agent.redact import Redactor
from jaxinfra.errors import UserError

State = Mapping[str, Any]
Node = Callable[[State], Awaitable[Mapping[str, Any]] | Mapping[str, Any]]
Edge = Sequence[str] | Callable[[State], Sequence[str]]
ANSWER = "answer"  # the channel in which an interrupted node finds what a person said


class Interrupt(Exception):
    """Raised by a node to ask a person; its message is the question."""


@dataclass(frozen=True)
class Graph:
    """Nodes by name; `edges` of a node are names, or a function of the state that gives names; a
    node without edges is an end. `start` are the first nodes, by default the first of all.
    `reducers` join an old value (None at first) and a new one."""

    nodes: Mapping[str, Node]
    edges: Mapping[str, Edge] = field(default_factory=dict)
    start: tuple[str, ...] = ()
    reducers: Mapping[str, Callable[[Any, Any], Any]] = field(default_factory=dict)
    max_steps: int = 100

    def __post_init__(self) -> None:
        if not self.nodes:
            raise UserError("graph: it has no nodes")
        fixed = [name for edge in self.edges.values() if not callable(edge) for name in edge]
        for name in (*self.start, *self.edges, *fixed):
            if name not in self.nodes:
                raise UserError(f"graph: no node {name!r}; there are {', '.join(self.nodes)}")

    def begin(self) -> tuple[str, ...]:
        return self.start or (next(iter(self.nodes)),)

    def merge(self, state: State, writes: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        merged, by = dict(state), {}
        for node in sorted(writes):
            for channel, value in writes[node].items():
                reducer = self.reducers.get(channel)
                if reducer is None and channel in by:
                    raise UserError(
                        f"graph: {by[channel]} and {node} both write {channel!r} in one superstep; "
                        "give the channel a reducer"
                    )
                merged[channel] = value if reducer is None else reducer(merged.get(channel), value)
                by[channel] = node
        return merged

    def next(self, ran: Sequence[str], state: State) -> tuple[str, ...]:
        found: dict[str, None] = {}
        for node in sorted(ran):
            edge = self.edges.get(node, ())
            for name in edge(state) if callable(edge) else edge:
                if name not in self.nodes:
                    raise UserError(f"graph: {node} leads to {name!r}, which is no node")
                found[name] = None
        return tuple(found)


@dataclass(frozen=True)
class Outcome:
    """Where a graph stands: at its end, or with questions by node."""

    state: State
    steps: int
    questions: Mapping[str, str]


async def run_graph(
    graph: Graph, state: State | None = None, *, store: Store, session: str,
    answers: Mapping[str, Any] | None = None, redactor: Redactor | None = None,
) -> Outcome:  # fmt: skip
    """Begins a graph in a new session with a state, or goes on with the one that the session holds,
    with a person's answers by node. Nodes see what the journal has: no secrets."""
    run = _Run(graph, store, session, redactor or Redactor())
    for recorded in await store.read(session):
        run.fold(recorded)
    if run.seq == 0:
        if state is None:
            raise UserError(f"graph: there is no session {session} to resume; give a state")
        await run.record(GraphStarted(_plain(state, "the initial state")))
    for node, answer in (answers or {}).items():
        await run.record(GraphAnswered(node, _plain({ANSWER: answer}, node)[ANSWER]))
    while run.active and not run.questions:
        if run.step >= graph.max_steps:
            raise UserError(
                f"graph: not at its end after {run.step} supersteps, {', '.join(run.active)} next; "
                "mend the edges or raise max_steps"
            )
        todo = [name for name in run.active if name not in run.written]
        await gather(functools.partial(run.work, name) for name in todo)
    return Outcome(run.state, run.step, run.questions)


@dataclass
class _Run:
    """A graph's run in one process, at the place where its journal ends."""

    graph: Graph
    store: Store
    session: str
    redactor: Redactor
    seq: int = 0
    state: State = field(default_factory=dict)
    step: int = 0
    active: tuple[str, ...] = ()
    written: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    answers: dict[str, Any] = field(default_factory=dict)
    questions: dict[str, str] = field(default_factory=dict)
    lock: anyio.Lock = field(default_factory=anyio.Lock)

    def fold(self, recorded: Recorded) -> None:
        self.seq = recorded.seq
        match recorded.event:
            case GraphStarted():
                self.state, self.active = recorded.event.state, self.graph.begin()
            case GraphAnswered():
                self.answers[recorded.event.node] = recorded.event.answer
            case NodeWrote():
                self.written[recorded.event.node] = recorded.event.writes
        if self.active and self.written.keys() >= set(self.active):
            self.state = self.graph.merge(self.state, self.written)
            self.active, self.step = self.graph.next(self.active, self.state), self.step + 1
            self.written, self.answers = {}, {}

    async def work(self, name: str) -> None:
        """Runs a node of the superstep and keeps its writes, or its question."""
        seen = {**self.state, ANSWER: self.answers[name]} if name in self.answers else self.state
        try:
            made = self.graph.nodes[name](seen)
            writes = await made if inspect.isawaitable(made) else made
        except Interrupt as question:
            self.questions[name] = str(question)
            return
        await self.record(NodeWrote(self.step, name, _plain(writes, name)))

    async def record(self, event: Kept) -> None:
        async with self.lock:
            kept = self.redactor.event(event)
            (recorded,) = await self.store.append(self.session, self.seq, [kept])
            self.fold(recorded)


def _plain(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The values as they come back from a journal, so that a resumed run sees the same."""
    try:
        return json.loads(json.dumps(dict(values), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise UserError(f"graph: {where} writes what has no JSON ({error})") from None
