"""Ragged batches over scattered pages, and what attention over them is, one query at a time."""

import dataclasses
import itertools
import sys
import types
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.paged_attention import quantize
from pallas_kernels.paged_attention.pages import LARGEST

LONGEST = 160
_quantize = jax.jit(quantize, static_argnums=1)


@dataclasses.dataclass
class Batch:
    """Rows given as (queries, length); pages that no row owns hold NaN, as do places past its end.

    What the table names past a row's pages is any number, in range or not. What stands at a
    position of a row depends on the row's number alone; rows are numbered as they come if not told.
    """

    rows: list[tuple[int, int]]
    N: int = 4
    K: int = 2
    H: int = 16
    page: int = 4
    spare_tokens: int = 0
    M: int = 9  # pages that the table has room for, at least
    dtype: Any = jnp.float32
    pages_dtype: Any = None
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    numbers: list[int] | None = None
    seed: int = 0

    def __post_init__(self):
        rng = np.random.default_rng(self.seed)  # of pages and of the table
        self.keys, self.values, self.queries = [], [], []
        for number, (n, length) in zip(self.numbers or itertools.count(), self.rows, strict=False):
            of_row = np.random.default_rng(number)
            shapes = (LONGEST, self.K), (LONGEST, self.K), (LONGEST, self.N)
            arrays = (2 * of_row.standard_normal((*shape, self.H)) for shape in shapes)
            k, v, q = (np.asarray(jnp.asarray(x, self.dtype), np.float64) for x in arrays)
            self.keys.append(k[:length])
            self.values.append(v[:length])
            self.queries.append(q[length - n : length])
        owned = [-(-length // self.page) for _, length in self.rows]
        self.P, M = max(sum(owned) + 3, 64), max(*owned, self.M)
        order = iter(rng.permutation(self.P))
        self.table = rng.choice([-7, 0, 1, self.P - 1, 2**30], (len(owned), M)).astype(np.int32)
        for row, count in zip(self.table, owned, strict=True):
            row[:count] = [next(order) for _ in range(count)]
        if "sinks" in self.options:
            self.options["sinks"] = jnp.asarray(self.options["sinks"], jnp.float32)

    @property
    def quantised(self) -> bool:
        return self.pages_dtype is not None

    def pages(self, rows, like, dtype):
        """Pages of `like`'s shape a place, NaN but for what each row [length, K, ...] holds."""
        pages = np.full((self.P, self.K, self.page, *like), np.nan)
        for b, x in enumerate(rows):
            for p in range(len(x)):
                pages[self.table[b, p // self.page], :, p % self.page] = x[p]
        return jnp.asarray(np.nan_to_num(pages) if dtype == "int8" else pages, dtype)

    def stored(self, rows):
        """(numbers, scales) of each row's keys or values as quantised pages hold them."""
        made = _quantize(jnp.asarray(np.concatenate(rows), jnp.float32), self.pages_dtype)
        ends = np.cumsum([len(x) for x in rows])[:-1]
        return [np.split(np.asarray(x, np.float64), ends) for x in made]

    def arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What `paged_attention` takes."""
        if self.quantised:
            both = [self.stored(rows) for rows in (self.keys, self.values)]
            k, v = (self.pages(numbers, (self.H,), self.pages_dtype) for numbers, _ in both)
            scales = [self.pages(scales, (), jnp.float32) for _, scales in both]
            scales = dict(zip(("k_scale", "v_scale"), scales, strict=True))
        else:
            k, v = (self.pages(x, (self.H,), self.dtype) for x in (self.keys, self.values))
            scales = {}
        q = np.concatenate([*self.queries, np.ones((self.spare_tokens, self.N, self.H))])
        starts = np.cumsum([0] + [n for n, _ in self.rows])
        lengths = [length for _, length in self.rows]
        arrays = (
            jnp.asarray(q, self.dtype), k, v, jnp.asarray(self.table),
            jnp.asarray(starts, jnp.int32), jnp.asarray(lengths, jnp.int32),
        )  # fmt: skip
        return arrays, {"scale": 0.3, **self.options, **scales}

    def wanted(self) -> np.ndarray:
        """The output by float64 NumPy, from what the pages hold."""
        keys, values = self.keys, self.values
        if self.quantised:
            keys, values = (
                [
                    numbers * scales[..., None]
                    for numbers, scales in zip(*self.stored(x), strict=True)
                ]
                for x in (keys, values)
            )
        options = {"window": None, "soft_cap": None, "sinks": None} | self.options
        out = []
        for q, k, v in zip(self.queries, keys, values, strict=True):
            for i in range(len(q)):
                position = len(k) - len(q) + i
                oldest = 0 if options["window"] is None else position - options["window"] + 1
                seen = slice(max(oldest, 0), position + 1)
                made = np.zeros((self.N, self.H))
                for n in range(self.N):
                    head = n // (self.N // self.K)
                    logits = 0.3 * (k[seen, head] @ q[i, n])
                    if options["soft_cap"]:
                        logits = options["soft_cap"] * np.tanh(logits / options["soft_cap"])
                    top = logits.max(initial=-1e30)
                    weights = np.exp(logits - top)
                    total = weights.sum()
                    if options["sinks"] is not None:
                        total += np.exp(float(options["sinks"][n]) - top)
                    made[n] = weights @ v[seen, head] / total
                out.append(made)
        spare = np.zeros((self.spare_tokens, self.N, self.H))
        return np.concatenate([np.asarray(out).reshape(-1, self.N, self.H), spare])


DECODE = [(1, 9), (1, 1), (0, 0), (1, 16), (1, 30), (1, 4)]
MIXED = [(1, 9), (7, 7), (0, 5), (18, 31), (1, 1), (3, 12)]
SINKS = {"sinks": [0.5, -1.0, 2.0, -np.inf]}

CASES: dict[str, dict[str, Any]] = {
    "decode": {"rows": DECODE},
    "decode, spare tokens": {"rows": DECODE, "spare_tokens": 1},
    "mixed": {"rows": MIXED},
    "prefill": {"rows": [(21, 21)], "N": 3, "K": 1},
    "window": {"rows": MIXED, "options": {"window": 6}},
    "soft cap and sinks": {"rows": MIXED, "options": {"soft_cap": 2.0} | SINKS},
    "decode, every option": {
        "rows": DECODE, "options": {"soft_cap": 2.0, "window": 7} | SINKS,
    },
    "one head a key head": {"rows": MIXED, "N": 2, "page": 8},
}  # fmt: skip
QUANTISED = {
    f"{dtype}, {rows}": {"rows": which, "pages_dtype": dtype}
    for dtype in LARGEST
    for rows, which in (("decode", DECODE), ("mixed", MIXED))
}


def in_other_company(length: int, **shape: Any) -> list[tuple[Batch, int, int, int]]:
    """Batches that together hold row 7's queries at positions 0 to `length` - 1 more than once.

    Each with the place of row 7's first query in q, that query's position, and how many there are:
    the row alone and whole, in chunks of several sizes among others in a wider table, and its last
    one query at a time.
    """
    made = [(Batch([(length, length)], numbers=[7], **shape), 0, 0, length)]
    chunks = itertools.cycle([(5, [(3, 17)]), (8, [(1, 40), (2, 9)]), (13, [])])
    position = 0
    while position < length:
        n, others = next(chunks)
        n = min(n, length - position)
        rows = [*others, (n, position + n), *[(0, 0)] * (3 - len(others))]
        before = sum(n for n, _ in others)
        numbers = [*range(len(others)), 7, *[9] * 3]
        chunk = Batch(rows, numbers=numbers, M=20, spare_tokens=24 - before - n, seed=n, **shape)
        made.append((chunk, before, position, n))
        position += n
    for position in range(length - 3, length):
        others = [(1, 30), (1, 3)]
        made.append((Batch([*others, (1, position + 1)], numbers=[0, 1, 7], M=24, **shape),
                     2, position, 1))  # fmt: skip
    return made


def altered(module: types.ModuleType, *replacements: tuple[str, str]) -> Any:
    """`module.paged_attention` with the module's source changed, each piece standing there once."""
    source = Path(str(module.__file__)).read_text()
    for right, wrong in replacements:
        assert source.count(right) == 1, right
        source = source.replace(right, wrong)
    made = types.ModuleType("altered")
    sys.modules["altered"] = made  # where dataclasses look
    exec(compile(source, "altered", "exec"), made.__dict__)
    return made.paged_attention
