"""Which lessons run on this machine: natively, interpreted (or emulated), or not at all.

A lesson is a page docs/lessons/*.md. Its front matter, between two lines of ---, may say

    needs: [sm90]         # all of: cpu, sm80, sm90 (NVIDIA, at least), tpu, mesh8 (eight devices)
    interpreted: true     # its kernels also run in an interpreter on a CPU

and a page that says nothing needs a CPU. Lessons are in the source tree, not in the wheel.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection
from pathlib import Path

NEEDS = ("cpu", "sm80", "sm90", "tpu", "mesh8")


@dataclasses.dataclass(frozen=True)
class Lesson:
    """A lesson and whether it runs here: "native", "interpreted" or "no"."""

    name: str
    needs: tuple[str, ...]
    runs: str
    reason: str


def folder() -> Path | None:
    """docs/lessons of the source tree this package is in; None where it was installed without."""
    root = Path(__file__).resolve().parents[2]
    lessons = root / "docs" / "lessons"
    return lessons if (root / "pyproject.toml").is_file() and lessons.is_dir() else None


def machine_has(platform: str, compute_capability: str | None, devices: int) -> set[str]:
    """The needs that a machine meets; `compute_capability` like "9.0", of an NVIDIA GPU."""
    has = {"cpu"}
    if compute_capability:
        sm = float(compute_capability)
        has |= {need for need, least in (("sm80", 8.0), ("sm90", 9.0)) if sm >= least}
    if platform == "tpu":
        has.add("tpu")
    if devices >= 8:
        has.add("mesh8")
    return has


def read(path: Path, has: Collection[str]) -> Lesson:
    """The lesson at `path` on a machine that has `has`."""
    needs, interpreted = front_matter(path.read_text(encoding="utf-8"))
    unknown = [need for need in needs if need not in NEEDS]
    if unknown:
        reason = f"its front matter needs {', '.join(unknown)}; known are {', '.join(NEEDS)}"
        return Lesson(path.stem, needs, "no", reason)
    missing = [need for need in needs if need not in has]
    if not missing:
        return Lesson(path.stem, needs, "native", "")
    if missing == ["mesh8"] and {*needs} <= {"cpu", "mesh8"}:
        return Lesson(path.stem, needs, "interpreted", "on eight emulated CPU devices")
    if interpreted:
        return Lesson(path.stem, needs, "interpreted", f"no {', '.join(missing)} here")
    return Lesson(path.stem, needs, "no", f"needs {', '.join(missing)}")


def front_matter(text: str) -> tuple[tuple[str, ...], bool]:
    """(needs, interpreted) of a page."""
    block = re.match(r"---\n(.*?)\n---\n", text.replace("\r\n", "\n"), re.DOTALL)
    lines = block[1] if block else ""
    needs = re.search(r"^needs:\s*\[([^\]]*)\]", lines, re.MULTILINE)
    listed = [word.strip(" '\"") for word in needs[1].split(",")] if needs else []
    interpreted = re.search(r"^interpreted:\s*true\b", lines, re.MULTILINE) is not None
    return tuple(word for word in listed if word) or ("cpu",), interpreted
