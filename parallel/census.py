"""The collectives of a compiled program: which, how often in a run, how many bytes, in which loops.

A flat count of the text proves nothing: an all-reduce inside a scan over layers runs L times. This
walks the program from its entry, multiplies by the trip counts of loops, and reads the group of
devices of each. Branches of a conditional all count: what stands in one is an upper bound.

    python -m jaxinfra census tiny --mesh dp=2,tp=2 --emulate 4
"""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from typing import Any

_OPS = (
    "all-reduce", "all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all",
    "collective-permute", "collective-broadcast",
)  # fmt: skip
_INSTRUCTION = re.compile(
    r"= (?P<type>.+?) (?P<op>" + "|".join(_OPS) + r")(?P<start>-start)?\((?P<rest>.*)"
)
_ARRAY = re.compile(r"\b(pred|[a-z]+\d+[a-z0-9]*)\[([\d,]*)\]")
_CALLS = re.compile(r"(?:calls|to_apply|true_computation|false_computation)=%?([\w.-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_LOOP = re.compile(r"\bwhile\(.*condition=%?([\w.-]+), body=%?([\w.-]+)")
_TRIPS = re.compile(r'known_trip_count":\{"n":"(\d+)"')
_GROUPS = re.compile(r"replica_groups=(?:\{\{([\d,]*)\}|\[(\d+),(\d+)\])")
_MESH = re.compile(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}")
_PRODUCT = re.compile(r'\bconvolution\(|kind=k(Output|Custom)|custom_call_target="__cu(blas|dnn)')
_HEADER = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{$")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective instruction of a program, on each device."""

    op: str
    depth: int  # loops around it
    executed: int  # times in a run of the program
    bytes: int  # of its result, once
    group: int  # devices that take part

    @property
    def sent(self) -> int:
        """Bytes that a device sends in a run of the program, by a bandwidth-optimal algorithm."""
        n = self.group
        share = {
            "all-reduce": 2 * (n - 1) / n,
            "reduce-scatter": n - 1,
            "collective-permute": 1,
            "collective-broadcast": 1,
        }.get(self.op, (n - 1) / n)
        return round(self.executed * self.bytes * share)


def census(compiled: Any, *, at_least: int = 0) -> list[Collective]:
    """The collectives of a `jax.stages.Compiled`, or of a program's text, by computation.

    Args:
      at_least: leave out those with fewer bytes in their result (the scalars of a metric, say).
    """
    text = compiled if isinstance(compiled, str) else compiled.as_text()
    found = [
        _collective(match, line, depth, times)
        for lines, depth, times in _executed(text)
        for line in lines
        if (match := _INSTRUCTION.search(line))
    ]
    return [c for c in found if c.bytes >= at_least]


def totals(collectives: list[Collective]) -> dict[str, tuple[int, int]]:
    """Executions and bytes of results in a run, by the name of the collective."""
    sums: dict[str, tuple[int, int]] = collections.defaultdict(lambda: (0, 0))
    for c in collectives:
        count, size = sums[c.op]
        sums[c.op] = (count + c.executed, size + c.executed * c.bytes)
    return dict(sums)


def overlap(text: str) -> tuple[int, int]:
    """(matrix products that run while a message is under way, all products) of a scheduled program.

    Reads TPU's and GPU's HLO, where instructions stand in the order in which they are issued; what
    stands in a loop counts as often as it runs. Of a GPU's libraries cuBLAS and cuDNN count.
    """
    if "is_scheduled=true" not in text:
        raise ValueError("overlap: the program is not scheduled; give the text of a compiled one")
    under = products = 0
    for lines, _, times in _executed(text, fusions=False):
        live = 0
        for line in lines:
            if re.search(r"(permute|gather|reduce|scatter|async|collective)-start\(", line):
                live += 1
            elif re.search(r"(permute|gather|reduce|scatter|async|collective)-done\(", line):
                live -= 1
            elif _PRODUCT.search(line):
                products += times
                under += times * (live > 0)
    return under, products


def _executed(text: str, *, fusions: bool = True) -> list[tuple[list[str], int, int]]:
    """(lines, loops around them, times they run) of each computation called, from the entry on.

    Without `fusions`, what they are made of is left out.
    """
    computations, entry = _computations(text)
    found: list[tuple[list[str], int, int]] = []

    def walk(name: str, depth: int, times: int) -> None:
        lines = computations.get(name, [])
        found.append((lines, depth, times))
        for line in lines:
            if _INSTRUCTION.search(line) or (not fusions and " fusion(" in line):
                continue
            if loop := _LOOP.search(line):
                trips = _trips(line, computations[loop[1]])
                if trips is None and any(map(_INSTRUCTION.search, computations[loop[2]])):
                    raise ValueError(
                        f"census: the program does not tell how often loop {loop[2]} runs, which "
                        "holds a collective; give it a fixed number of turns, as lax.scan does"
                    )
                walk(loop[2], depth + 1, times * (trips or 1))
                continue
            branches = [
                b.strip().lstrip("%") for g in _BRANCHES.findall(line) for b in g.split(",")
            ]
            for called in (*_CALLS.findall(line), *branches):
                walk(called, depth, times)

    walk(entry, 0, 1)
    return found


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    computations: dict[str, list[str]] = {}
    entry, lines = "", []
    for line in text.splitlines():
        if match := _HEADER.match(line.rstrip()):
            lines = computations.setdefault(match[2], [])
            entry = match[2] if match[1] else entry
        else:
            lines.append(line)
    return computations, entry


def _collective(match: re.Match, line: str, depth: int, times: int) -> Collective:
    sizes = [_bytes(*array) for array in _ARRAY.findall(match["type"])]
    if match["start"] and match["op"] in ("all-gather", "collective-permute", "all-to-all"):
        # The result of a start is (operands, results, and for a message two counters).
        sizes = [s for s in sizes if s > 4] if match["op"] == "collective-permute" else sizes
        sizes = sizes[len(sizes) // 2 :]
    return Collective(match["op"], depth, times, sum(sizes), _group(line))


def _group(line: str) -> int:
    """Devices that take part; two, a source and a target, where a message names no groups."""
    if groups := _GROUPS.search(line):
        return int(groups[3]) if groups[3] else len(groups[1].split(","))
    if mesh := _MESH.search(line):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", mesh[2]))
    return 2


def _bytes(dtype: str, shape: str) -> int:
    bits = 8 if dtype == "pred" else int(re.search(r"\d+", dtype)[0])  # pyright: ignore
    return math.prod(int(d) for d in shape.split(",") if d) * bits // 8


def _trips(line: str, condition: list[str]) -> int | None:
    """How often a loop's body runs: told by XLA:CPU, on a TPU read from its condition; or None."""
    if known := _TRIPS.search(line):
        return int(known[1])
    constants = [int(n) for text in condition for n in re.findall(r"constant\((\d+)\)", text)]
    return max(constants, default=None)
