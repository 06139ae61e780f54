"""Reasoning: samples vote, trees prune, graphs join, plans are revised, prompts improve; all within
budgets, and every fork that was opened is let go."""

import functools
import json
import re
from collections.abc import Callable

import anyio
import pytest

from agent.journal import MemoryStore
from agent.messages import Message, user
from agent.model import Completion, Request, Usage
from agent.reason import (
    Branch,
    Budget,
    Example,
    Node,
    Template,
    aggregate,
    by_value,
    by_vote,
    chain_of_thought,
    few_shot,
    optimise,
    plan_and_execute,
    self_consistency,
    tree_of_thoughts,
)
from agent.reason.samples import answer_of
from agent.scripted import ScriptedModel, call
from agent.spec import Agent
from agent.tools import tool
from jaxinfra.errors import UserError


class Sessions(ScriptedModel):
    """A model that keeps a list of the sessions that are open, as an engine keeps pages."""

    def __init__(self, script):
        super().__init__(script)
        self.open: set[str] = set()
        self.forks = 0

    def fork(self, session: str, new: str) -> None:
        assert new not in self.open
        self.open.add(new)
        self.forks += 1

    def release(self, session: str) -> None:
        self.open.remove(session)


def say(text: str, tokens: int = 1) -> Completion:
    return Completion(Message("assistant", text), Usage(0, tokens))


# A search problem: add 1, 3 or 5 four times, to reach the goal of 12 exactly.
def walker(goal: int = 12) -> Callable[[Request], Completion]:
    def total(text: str) -> int:
        return sum(int(n) for n in re.findall(r"add (\d)", text))

    def turn(request: Request) -> Completion:
        said = "\n".join(m.content for m in request.messages if m.role == "assistant")
        asked = request.messages[-1].content
        if asked.startswith("How good"):
            return say(str(10 - abs(goal - total(said)) / 2 if total(said) <= goal else 0))
        if asked.startswith("Which"):
            sums = [total(line) for line in asked.splitlines()[1:-1]]
            return say(str(1 + max(range(len(sums)), key=lambda i: sums[i] * (sums[i] <= goal))))
        return say(f"add {(1, 3, 5, 5)[request.settings.seed or 0]}")

    return turn


def reached(node, goal: int = 12) -> bool:
    return sum(int(step.split()[1]) for step in node.path) == goal


def search(judge: str = "value", budget: Budget | None = None, **options):
    model = Sessions(walker())
    root = Branch(model, (user("Reach 12."),), budget or Budget())

    async def score(nodes):
        return [-abs(12 - sum(int(s.split()[1]) for s in n.path)) * 1.0 for n in nodes]

    judges = {"value": by_value, "vote": lambda: by_vote(root), "given": lambda: score}
    made = functools.partial(tree_of_thoughts, root, judges[judge](), done=reached, **options)
    return anyio.run(made), model, root


JUDGES = ["given", "value", "vote"]


@pytest.mark.parametrize("judge", JUDGES)
def test_a_tree_finds_what_one_line_does_not(judge):
    found, model, root = search(judge, breadth=4, beam=3, depth=4)
    assert found.done and reached(found.best) and model.open == set()
    assert root.messages == (user("Reach 12."),)  # forks never touch their parent
    greedy, model, _ = search(judge, breadth=1, beam=1, depth=4)  # only ever adds 1
    assert not greedy.done and model.open == set()


def test_a_fork_holds_its_parents_messages_as_a_prefix():
    _, model, _ = search(breadth=2, beam=2, depth=3)
    texts = [tuple(m.content for m in r.messages) for r in model.requests]
    for asked in texts:
        assert asked[0] == "Reach 12."
        if len(asked) > 2:  # what was before is a request of its own with its answer
            assert any(asked[: len(other)] == other for other in texts if len(other) < len(asked))


def test_twins_and_bad_thoughts_are_pruned():
    found, _, _ = search(breadth=4, beam=9, depth=1)
    assert [n.thought for n in found.nodes] == ["add 1", "add 3", "add 5"]  # 5 was proposed twice
    found, model, _ = search(breadth=3, beam=9, depth=2, prune=6.0)
    assert {n.thought: n.pruned for n in found.nodes[:3]} == {
        "add 1": True, "add 3": True, "add 5": False,
    }  # fmt: skip
    assert all(n.parents[0].thought in ("", "add 5") for n in found.nodes) and not model.open


@pytest.mark.parametrize("calls", [0, 2, 5, 9, 11])
def test_a_budget_ends_a_search_with_the_best_so_far(calls):
    budget = Budget(calls=calls)
    found, model, _ = search("given", budget, breadth=3, beam=2, depth=4)
    assert budget.used_calls == calls == len(model.requests) and model.open == set()
    assert (found.best is None) == (calls == 0) and not found.done
    tokens = Budget(tokens=4)
    assert search("given", tokens, breadth=1, depth=9)[0].best is not None
    assert tokens.usage.output == 4


def test_a_graph_joins_thoughts():
    """Merge sort: two halves sorted apart, then joined."""

    def turn(request: Request) -> Completion:
        numbers = re.findall(r"\d+", request.messages[-1].content.replace("Thought 1:", "")
                             .replace("Thought 2:", ""))  # fmt: skip
        return say(" ".join(sorted(numbers)))

    async def main():
        model = Sessions(turn)
        root = Branch(model, (user("Sort."),))
        halves = []
        for numbers in ("9 3 5", "8 1 4"):
            (fork,) = await root.fork(1)
            await fork.ask(f"Sort {numbers}")
            halves.append(fork)
        nodes = [Node(fork.text, fork) for fork in halves]
        joined = await aggregate(nodes, root, "Merge them.")
        refined = await aggregate([joined], root, "Sort again.")
        return nodes, joined, refined

    nodes, joined, refined = anyio.run(main)
    assert [n.thought for n in nodes] == ["3 5 9", "1 4 8"]
    assert joined.thought == refined.thought == "1 3 4 5 8 9"
    assert joined.parents == tuple(nodes) and (joined.depth, refined.depth) == (1, 2)


def test_answers_are_the_last_line_that_says_so():
    assert answer_of("Answer: 3\nno, wait\n**Answer:** 42.") == "42"
    assert answer_of("I do not know") is None
    branch = Branch(ScriptedModel(["6 by 7 is 42.\nAnswer: 42"]), ())
    assert anyio.run(chain_of_thought, branch, "6 * 7?") == "42"


def test_self_consistency_votes_and_stops_when_decided():
    answers = ["4", "5", "4", "4", "5"]

    def turn(request: Request) -> Completion:
        return say(f"so\nAnswer: {answers[request.settings.seed or 0]}")

    model = Sessions(turn)
    vote = anyio.run(self_consistency, Branch(model, ()), "2 + 2?", 5)
    assert vote.answer == "4" and vote.asked == 4 and model.open == set()  # the fifth cannot matter
    assert {r.settings.seed for r in model.requests} == {0, 1, 2, 3}
    one = anyio.run(self_consistency, Branch(Sessions(turn), ()), "?", 1)
    assert one.answer == "4"
    none = anyio.run(self_consistency, Branch(Sessions(lambda r: say("hm")), ()), "?", 3)
    assert none.answer is None and none.asked == 3


def test_a_plan_is_revised_and_survives_a_crash():
    done: list[str] = []

    @tool
    async def act(what: str) -> str:
        """Acts."""
        done.append(what)
        return f"{what} done"

    plans = [
        {"steps": ["a", "b", "c"]}, {"steps": ["B", "c"]}, {"steps": ["c"]},
        {"steps": [], "answer": "all done"},
    ]  # fmt: skip

    def execute(request: Request) -> Message:
        step = request.messages[0].content.rsplit(": ", 1)[1]
        if any(m.role == "tool" for m in request.messages):
            return Message("assistant", f"did {step}")
        return call("act", what=step)

    crashing = 3

    class Crash(MemoryStore):
        """Dies after so many appends."""

        async def append(self, session, after, events):
            nonlocal crashing
            crashing -= 1
            if crashing == 0:
                raise KeyboardInterrupt
            return await super().append(session, after, events)

    async def attempt(store):
        planner = Agent("planner", ScriptedModel([json.dumps(p) for p in plans]))
        executor = Agent("doer", ScriptedModel(execute), tools=(act,))
        return await plan_and_execute(planner, executor, "the job", store=store, session="p")

    result = anyio.run(attempt, MemoryStore())
    assert result.answer == "all done" and done == ["a", "B", "c"]
    assert [s for s, _ in result.done] == ["a", "B", "c"] and len(result.plans) == 4
    for at in range(1, 40, 3):
        done.clear()
        store, crashing = Crash(), at
        for _ in range(4):
            try:
                again = anyio.run(attempt, store)
                break
            except (KeyboardInterrupt, BaseExceptionGroup):
                continue
        assert again.answer == "all done" and again.done[0][0] == "a"
        assert sorted(set(done)) == sorted(done), "a step was done twice"


def test_templates_are_checked_versioned_and_hide_no_braces():
    one = Template("t", 1, "Sort {ticket} into {labels}.")
    assert one.render(ticket="{labels}", labels="a, b") == "Sort {labels} into a, b."
    with pytest.raises(UserError, match="'labels' is missing or unknown"):
        one.render(ticket="x")
    with pytest.raises(UserError, match="'more' is missing or unknown"):
        one.render(ticket="x", labels="y", more="z")
    assert one.id != Template("t", 1, "Sort {ticket} in {labels}.").id
    assert one.id.startswith("t@1#")


def test_examples_are_the_nearest_and_not_the_question():
    pool = [Example("What is 2 + 2?", "4"), Example("Who wrote Faust?", "Goethe"),
            Example("What is 3 + 2?", "5")]  # fmt: skip
    chosen = few_shot(pool, "What is 2 + 2?", 1)
    assert chosen == "Q: What is 3 + 2?\nA: 5"
    assert few_shot(pool, "What is 9 + 2?", 2).count("Q:") == 2 and "Faust" not in few_shot(
        pool, "What is 9 + 2?", 2
    )
    assert few_shot([], "x", 3) == ""


def test_the_optimiser_improves_on_what_it_did_not_see():
    examples = [Example(f"{i} + {i}", str(2 * i)) for i in range(10)]
    written = ["no field here", "Add. {question} {", "Shout: {question}", "Add: {question}"]

    async def score(template: Template, example: Example) -> float:
        return float("Add" in template.text or int(example.answer) < 5)

    def writer(request: Request) -> Completion:
        assert "It failed on" in request.messages[-1].content
        return say(written.pop(0))

    made = anyio.run(functools.partial(
        optimise, Template("add", 1, "Say: {question}"), examples, score,
        Branch(ScriptedModel(writer), ()), rounds=5,
    ))  # fmt: skip
    assert made.template.text == "Add: {question}" and made.template.version == 2
    assert made.training == [0.4, 0.4, 1.0] and made.held_out == (0.2, 1.0) and not written
