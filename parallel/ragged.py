"""An all-to-all whose parts have any size: XLA's where there is one, the same from padded parts.

`lax.ragged_all_to_all` sends rows of an array to each device of an axis and puts them where the
receiver wants them; XLA:CPU has none. The emulation gives each part the size of the largest
possible, exchanges those, and scatters what is real: the same rows in the same places, for n times
the bytes. Both are differentiable; the transpose sends gradients back the way the rows came.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int, Shaped

from parallel.mesh import ensure_varying, varying


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Rows that each device sends to each: [from, to], the same table on all."""

    rows: Int[Array, "n n"]

    @property
    def back(self) -> Sizes:
        """Of the way back: everyone returns what it got."""
        return Sizes(self.rows.T)

    @property
    def sent_from(self) -> Int[Array, "n n"]:
        """[from, to]: where a part begins at its sender, who holds them in the order of devices."""
        return jnp.cumsum(self.rows, axis=1) - self.rows

    @property
    def put_at(self) -> Int[Array, "n n"]:
        """[from, to]: where it begins at its receiver."""
        return jnp.cumsum(self.rows, axis=0) - self.rows


def ragged_all_to_all(
    x: Shaped[Array, "M D"], room: int, sizes: Sizes, axis: str
) -> Shaped[Array, "room D"]:
    """Rows from every device, by sender; zeros after them.

    `room` must hold what can come: what finds no place is lost.
    """
    here = lax.axis_index(axis)
    rows, begins, at = (
        table.astype(jnp.int32) for table in (sizes.rows, sizes.sent_from, sizes.put_at)
    )
    out = ensure_varying(jnp.zeros((room, x.shape[1]), x.dtype), varying(x))
    if jax.default_backend() == "cpu":
        return _emulated(x, out, begins[here], rows[here], at[:, here], rows[:, here], axis)
    operands = (begins[here], rows[here], at[here], rows[:, here])
    operands = (ensure_varying(table, varying(x)) for table in operands)
    return lax.ragged_all_to_all(x, out, *operands, axis_name=axis)


def _emulated(
    x: Array, out: Array, begins: Array, sent: Array, at: Array, received: Array, axis: str
) -> Array:
    M = x.shape[0]
    step = jnp.arange(M)
    source = jnp.where(step < sent[:, None], begins[:, None] + step, M)  # [to, M]
    parts = x.at[source].get(mode="fill", fill_value=0)
    parts = lax.all_to_all(parts, axis, split_axis=0, concat_axis=0, tiled=True)  # [from, M, D]
    place = jnp.where(step < received[:, None], at[:, None] + step, out.shape[0])
    return out.at[place].set(parts, mode="drop")
