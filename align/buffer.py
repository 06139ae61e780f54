"""Experience that waits for its update: in order, by priority, or again and again until it is old.

An item is whatever arrays one group of answers has, with the tokens it counts for and the policy's
version it began with. The buffer holds at most `capacity` tokens; past `memory` tokens, the newest
items lie in files until they are drawn. All of it, its random numbers included, goes into a
checkpoint (`state`, `restored`). Plain numpy; no jax.

| order | `draw(n)` gives | of each |
| --- | --- | --- |
| fifo | the n oldest | once: they are removed |
| replay | n different ones, every set of n as likely | weight 1; stays until it is too old |
| prioritised | n draws with p = priority^alpha / sum | weight 1 / (N p); stays |

With these weights the mean over a draw estimates the mean over the buffer without bias (Schaul et
al., arXiv 1511.05952, section 3.4 with beta = 1).
"""

from __future__ import annotations

import dataclasses
import io
import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from jaxinfra.errors import UserError
from jaxinfra.files import write_file

_log = logging.getLogger(__name__)
Order = Literal["fifo", "replay", "prioritised"]


@dataclasses.dataclass
class Item:
    """One group's experience."""

    number: int
    """Of the additions: a name that no other item ever has."""
    tokens: int
    version: int
    """Of the policy that began it: its age is the trainer's version less this."""
    priority: float
    arrays: dict[str, np.ndarray] | None
    """None while they lie in a file."""


class Buffer:
    """Groups of answers between those who draw them and the one who learns.

    Args:
      capacity: tokens; the oldest items go when more come (counted as "evicted").
      max_age: versions; older items are never drawn, and removed (counted as "too_old").
      alpha: how much priorities matter; 0 is uniform.
      memory: tokens kept in memory; the rest lies in `folder`, one file an item. Where the disk is
        full they stay in memory (counted as "not_spilled").
    """

    def __init__(
        self, capacity: int, order: Order = "fifo", *, max_age: int | None = None,
        alpha: float = 0.6, memory: int | None = None, folder: str | Path | None = None,
        seed: int = 0,
    ) -> None:  # fmt: skip
        if order not in get_args(Order):
            raise UserError(f"buffer: order={order!r}: choose one of {', '.join(get_args(Order))}")
        if capacity < 1 or (max_age is not None and max_age < 0) or alpha < 0:
            raise UserError(
                f"buffer: capacity={capacity}, max_age={max_age}, alpha={alpha}: give at least one "
                "token and no negative age or power"
            )
        if (memory is None) != (folder is None):
            raise UserError("buffer: memory and folder come together: what is not in one is there")
        self.capacity, self.order, self.max_age, self.alpha = capacity, order, max_age, alpha
        self.memory, self.folder = memory, None if folder is None else Path(folder)
        self.counts: Counter[str] = Counter()
        self._items: dict[int, Item] = {}  # oldest first
        self._next = 0
        self._rng = np.random.Generator(np.random.PCG64(seed))

    def __len__(self) -> int:
        return len(self._items)

    @property
    def tokens(self) -> int:
        """Of all items."""
        return sum(item.tokens for item in self._items.values())

    def numbers(self) -> list[int]:
        """Of the items that are here, oldest first."""
        return list(self._items)

    def add(
        self, arrays: Mapping[str, np.ndarray], *, tokens: int, version: int, priority: float = 1.0
    ) -> int:
        """Puts an item at the end, and gives its number."""
        if tokens > self.capacity:
            raise UserError(
                f"buffer: an item of {tokens} tokens and a capacity of {self.capacity}: give more"
            )
        if not (priority > 0 and np.isfinite(priority)):
            raise UserError(f"buffer: priority={priority}: give a positive number")
        item = Item(self._next, tokens, version, float(priority), dict(arrays))
        self._items[item.number], self._next = item, self._next + 1
        while self.tokens > self.capacity:
            self._remove(next(iter(self._items)))
            self.counts["evicted"] += 1
        self._spill(item)
        return item.number

    def ready(self, n: int, version: int) -> bool:
        """Whether `draw(n, version)` would find enough; removes what is too old by then."""
        self._drop_old(version)
        return len(self._items) >= (1 if self.order == "prioritised" else n)

    def draw(self, n: int, version: int) -> tuple[list[Item], np.ndarray]:
        """n items with their arrays, and float32 [n] weights that make means unbiased.

        Raises UserError where there are fewer: ask `ready` first.
        """
        if not self.ready(n, version):
            raise UserError(f"buffer: {n} items asked for and {len(self._items)} here; add more")
        items, weights = list(self._items.values()), np.ones(n, np.float32)
        if self.order == "fifo":
            chosen = items[:n]
        elif self.order == "replay":
            chosen = [items[i] for i in self._rng.choice(len(items), n, replace=False)]
        else:
            p = self._probabilities(items)
            places = self._rng.choice(len(items), n, p=p)
            chosen = [items[i] for i in places]
            weights = (1.0 / (len(items) * p[places])).astype(np.float32)
        drawn = [dataclasses.replace(item, arrays=self._arrays(item)) for item in chosen]
        if self.order == "fifo":
            for item in chosen:
                self._remove(item.number)
        return drawn, weights

    def reprioritise(self, number: int, priority: float) -> None:
        """A new priority, as abs(advantage) after an update; nothing where the item has gone."""
        if not (priority > 0 and np.isfinite(priority)):
            raise UserError(f"buffer: priority={priority}: give a positive number")
        if number in self._items:
            self._items[number].priority = float(priority)

    def state(self) -> bytes:
        """All of it, as the bytes of one .npz file."""
        about = {
            "order": self.order, "capacity": self.capacity, "next": self._next,
            "rng": self._rng.bit_generator.state, "counts": dict(self.counts),
            "items": [[i.number, i.tokens, i.version, i.priority] for i in self._items.values()],
        }  # fmt: skip
        arrays = {
            f"{item.number}/{name}": array
            for item in self._items.values()
            for name, array in self._arrays(item).items()
        }
        return _packed({"about": np.frombuffer(json.dumps(about).encode(), np.uint8), **arrays})

    def restored(self, state: bytes) -> Buffer:
        """This buffer, empty so far, with what `state` gave; files are written anew."""
        arrays = _unpacked(state)
        about = json.loads(arrays.pop("about").tobytes())
        for name in ("order", "capacity"):
            if about[name] != getattr(self, name):
                raise UserError(
                    f"buffer: {name} was {about[name]!r}, now {getattr(self, name)!r}; give what "
                    "it had"
                )
        self._next, self.counts = about["next"], Counter(about["counts"])
        self._rng.bit_generator.state = about["rng"]
        found: dict[int, dict[str, np.ndarray]] = {}
        for key, array in arrays.items():
            number, _, name = key.partition("/")
            found.setdefault(int(number), {})[name] = array
        for number, tokens, version, priority in about["items"]:
            item = Item(number, tokens, version, priority, found.get(number, {}))
            self._items[number] = item
            self._spill(item)
        return self

    def _probabilities(self, items: Sequence[Item]) -> np.ndarray:
        weights = np.asarray([item.priority for item in items]) ** self.alpha
        return weights / weights.sum()

    def _drop_old(self, version: int) -> None:
        if self.max_age is None:
            return
        for item in list(self._items.values()):
            if version - item.version > self.max_age:
                self._remove(item.number)
                self.counts["too_old"] += 1

    def _remove(self, number: int) -> None:
        item = self._items.pop(number)
        if item.arrays is None:
            self._file(item).unlink(missing_ok=True)

    def _file(self, item: Item) -> Path:
        assert self.folder is not None
        return self.folder / f"{item.number}.npz"

    def _spill(self, item: Item) -> None:
        """To a file, where memory is full."""
        if self.memory is None or item.arrays is None:
            return
        held = sum(i.tokens for i in self._items.values() if i.arrays is not None)
        if held <= self.memory:
            return
        try:
            write_file(self._file(item), _packed(item.arrays))
        except UserError as error:
            _log.warning("%s; the item stays in memory", error)
            self.counts["not_spilled"] += 1
        else:
            item.arrays = None

    def _arrays(self, item: Item) -> dict[str, np.ndarray]:
        return _unpacked(self._file(item).read_bytes()) if item.arrays is None else item.arrays


def _packed(arrays: Mapping[str, Any]) -> bytes:
    file = io.BytesIO()
    np.savez(file, allow_pickle=False, **arrays)
    return file.getvalue()


def _unpacked(data: bytes) -> dict[str, np.ndarray]:
    with np.load(io.BytesIO(data), allow_pickle=False) as file:
        return {name: file[name] for name in file.files}
