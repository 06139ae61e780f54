"""Trees and graphs of thoughts: propose several next steps, judge them, go on with the best.

Tree of thoughts: Yao et al., 2023, arXiv:2305.10601; graph of thoughts, whose nodes may also join
several others: Besta et al., 2023, arXiv:2308.09687. Breadth b, beam k and depth d are at most
k b d proposals, and as many judgements by value or k d by vote. All nodes of a level are asked side
by side; what is pruned is released at once.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from agent.gather import gather
from agent.model import Settings
from agent.reason.branch import Branch, Exhausted

PROPOSE = "Propose the next step, in one line."
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


@dataclass
class Node:
    """A thought: its text, the branch that ends with it, its score, and whom it follows."""

    thought: str
    branch: Branch
    parents: tuple[Node, ...] = ()
    score: float = 0.0
    depth: int = 0
    pruned: bool = False

    @property
    def path(self) -> list[str]:
        """The thoughts that led here, the first first."""
        before = self.parents[0].path if self.parents else []
        return [*before, self.thought] if self.thought else before


Judge = Callable[[Sequence[Node]], Awaitable[list[float]]]


def by_value(prompt: str = "How good is this so far, from 0 to 10? A number only.") -> Judge:
    """Scores each node by the model's own estimate, asked on a fork of it."""

    async def one(node: Node) -> float:
        said = await node.branch.aside(prompt, Settings(temperature=0.0, max_tokens=8))
        found = _NUMBER.search(said)
        return float(found.group()) if found else 0.0

    async def judge(nodes: Sequence[Node]) -> list[float]:
        return await gather(partial(one, node) for node in nodes)

    return judge


def by_vote(root: Branch, votes: int = 3) -> Judge:
    """Scores nodes by how often the model calls each the best of all."""

    async def judge(nodes: Sequence[Node]) -> list[float]:
        listed = "\n".join(f"{i}. {' / '.join(node.path)}" for i, node in enumerate(nodes, 1))
        prompt = f"Which is the most promising?\n{listed}\nIts number only."

        async def one(seed: int) -> int:
            said = await root.aside(prompt, Settings(temperature=0.7, seed=seed, max_tokens=8))
            found = _NUMBER.search(said)
            return int(float(found.group())) - 1 if found else -1

        counts = Counter(await gather(partial(one, seed) for seed in range(votes)))
        return [float(counts[i]) for i in range(len(nodes))]

    return judge


@dataclass
class Search:
    """What was found: the best node (None without any), whether it is done, and all nodes."""

    best: Node | None
    done: bool
    nodes: list[Node] = field(default_factory=list)


async def tree_of_thoughts(
    root: Branch, judge: Judge, *, breadth: int = 3, beam: int = 2, depth: int = 3,
    prune: float = float("-inf"), done: Callable[[Node], bool] = lambda node: False,
    propose: str = PROPOSE, temperature: float = 0.8,
) -> Search:  # fmt: skip
    """Searches level by level from `root`: `breadth` proposals for each of the `beam` best nodes,
    to `depth`. Nodes that score below `prune`, and proposals said before at the same level, are
    dropped. Ends at the first level with a node that is `done`, or when the budget is used up."""
    search = Search(None, False)
    level = [Node("", root)]
    for at in range(1, depth + 1):
        grown = await gather(
            partial(_propose, parent, i, propose, temperature)
            for parent in level for i in range(breadth)
        )  # fmt: skip
        made = await _distinct([node for node in grown if node is not None])
        search.nodes += made
        exhausted = None in grown
        try:
            for node, score in zip(made, await judge(made), strict=True):
                node.score, node.depth = score, at
        except Exhausted:
            await _release([n for n in [*level, *made] if n.branch is not root])
            return search
        ranked = sorted(made, key=lambda node: -node.score)
        kept = [node for node in ranked if node.score >= prune][:beam]
        for node in made:
            node.pruned = node not in kept
        await _release([n for n in made if n.pruned])
        await _release([n for n in level if n.branch is not root])
        if kept:
            search.best = kept[0]
        ends = [node for node in kept if done(node)]
        if ends:
            search.best, search.done = ends[0], True
        if ends or not kept or exhausted or at == depth:
            await _release(kept)
            break
        level = kept
    return search


async def aggregate(nodes: Sequence[Node], root: Branch, prompt: str) -> Node:
    """One thought that joins several: asked on a fork of `root`, shown all their texts. With
    `aggregate` a search is a graph; refining is the aggregate of one."""
    shown = "\n\n".join(f"Thought {i}:\n{node.thought}" for i, node in enumerate(nodes, 1))
    (fork,) = await root.fork(1)
    thought = await fork.ask(f"{shown}\n\n{prompt}")
    return Node(thought, fork, tuple(nodes), depth=1 + max(n.depth for n in nodes))


async def _propose(parent: Node, i: int, prompt: str, temperature: float) -> Node | None:
    (fork,) = await parent.branch.fork(1)
    settings = replace(fork.settings, temperature=temperature, seed=i)
    try:
        return Node((await fork.ask(prompt, settings)).strip(), fork, (parent,))
    except Exhausted:
        await fork.close()
        return None


async def _distinct(nodes: Sequence[Node]) -> list[Node]:
    first: dict[tuple[int, str], Node] = {}
    for node in nodes:
        if first.setdefault((id(node.parents[0]), node.thought), node) is not node:
            await node.branch.close()
    return list(first.values())


async def _release(nodes: Sequence[Node]) -> None:
    for node in nodes:
        await node.branch.close()
