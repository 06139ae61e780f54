"""A replayed trace of agents under page pressure: leases against the oracle and the last used.

The trace has the shape of TraceLab's (arXiv 2606.30560): steps a session with a long tail, most of
a prompt said before, and tools that mostly return within a second and sometimes much later. A lease
knows the tool, and so when its results usually come, and no more.
"""

import functools
import heapq
import math
import random
from dataclasses import dataclass, field

import pytest

from decode.pages import Pages
from decode.prefix_cache import PrefixCache

SIZE, SESSIONS, KINDS = 4, 160, 3
# Share of calls, and of seconds until the next turn the median and the logarithm's deviation.
TOOLS = {"edit": (0.86, 0.4, 0.5), "test": (0.09, 4.0, 0.6), "build": (0.05, 40.0, 0.6)}


@dataclass
class Session:
    """Prompts, each of which begins with the one before, and seconds until each next one comes."""

    prompts: list[list[int]] = field(default_factory=list)
    tools: list[str] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)


@functools.cache
def trace(seed):
    """Sessions and the times at which they begin."""
    draw = random.Random(seed)
    starts = [[draw.randrange(1000) for _ in range(64)] for _ in range(KINDS)]
    sessions, now = [], 0.0
    for _ in range(SESSIONS):
        made = Session()
        said = draw.choice(starts) + [draw.randrange(1000) for _ in range(draw.randint(16, 60))]
        steps = min(120, max(1, round(draw.lognormvariate(math.log(15), 1.2))))
        for _ in range(steps):
            made.prompts.append(said)
            said = said + [draw.randrange(1000) for _ in range(draw.randint(4, 12))]
            (tool,) = draw.choices([*TOOLS], [share for share, *_ in TOOLS.values()])
            _, median, spread = TOOLS[tool]
            made.tools.append(tool)
            made.gaps.append(0.2 + draw.lognormvariate(math.log(median), spread))
        now += draw.expovariate(2.0)
        sessions.append((now, made))
    return sessions


@functools.cache
def turns(seed):
    """(time, session, step) of every turn, in order; and the pages that live sessions want, on
    average over the turns."""
    made = []
    for i, (start, session) in enumerate(trace(seed)):
        at = start
        for step, gap in enumerate(session.gaps):
            made.append((at, i, step))
            at += gap
    made.sort()
    live, total = {}, 0
    for _, i, step in made:
        session = trace(seed)[i][1]
        live[i] = len(session.prompts[step]) // SIZE
        if step + 1 == len(session.prompts):
            del live[i]
        total += sum(live.values())
    return made, total / len(made)


class LastUsed(PrefixCache):
    """The control: leases are not looked at."""

    def _worth(self, node, now):
        return 0.0, node.used


class Oracle(PrefixCache):
    """Knows when each page is wanted: `wanted` by page, in order."""

    wanted: dict[int, list[float]]

    def _worth(self, node, now):
        times = self.wanted.get(node.page, [])
        while times and times[0] <= now:
            heapq.heappop(times)
        return -(times[0] if times else math.inf), node.used


def replay(cache, seed, pressure):
    """The share of prompts' tokens that were found."""
    order, wanted = turns(seed)
    pool = Pages(int(wanted / pressure), SIZE)
    prefixes, leases, found, asked = cache(pool), {}, 0, 0
    prefixes.wanted = {}
    for now, i, step in order:
        session = trace(seed)[i][1]
        prompt = session.prompts[step]
        if i in leases:
            prefixes.give_up(leases.pop(i))
        pages = prefixes.match(prompt)
        found, asked = found + len(pages) * SIZE, asked + len(prompt)
        more = len(prompt) // SIZE - len(pages)
        if more > pool.free:
            prefixes.evict(more - pool.free, now)
        fresh = pool.take(min(more, pool.free))
        pages += fresh
        for page in fresh:
            prefixes.wanted.pop(page, None)
        prefixes.insert(prompt[: len(pages) * SIZE], pages)
        pool.release(pages)
        if step + 1 < len(session.prompts):
            _, median, _ = TOOLS[session.tools[step]]
            lease = prefixes.lease(prompt, now + 0.2 + median)
            if lease is not None:
                leases[i] = lease
            for page in pages:
                heapq.heappush(prefixes.wanted.setdefault(page, []), now + session.gaps[step])
    pool.check()
    return found / asked


@pytest.mark.parametrize("pressure", [2, 4])
def test_leases_find_what_an_oracle_finds(pressure):
    """And more: the bound is one that the control, without leases, does not reach."""
    leases, used, oracle = (replay(c, 0, pressure) for c in (PrefixCache, LastUsed, Oracle))
    assert used < 0.985 * oracle <= leases <= oracle
