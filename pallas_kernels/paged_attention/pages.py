"""Writing keys or values of new tokens into their pages, quantised where the pages are.

Cost: reads new and writes as many numbers into pages; under donation (`jax.jit(...,
donate_argnums=...)`) nothing else of the pages is touched or copied.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num

LARGEST = {"int8": 127.0, "float8_e4m3fn": 448.0}  # of the numbers that a page can hold


def quantize(new: Float[Array, "T K H"], dtype: Any) -> tuple[Num[Array, "T K H"], Array]:
    """(numbers of `dtype`, float32 scales [T, K]): new is about numbers * scales.

    One scale a token and head, by its largest magnitude; int8 rounds to the nearest, ties to even.
    """
    dtype = jnp.dtype(dtype)
    largest = LARGEST[dtype.name]
    new = new.astype(jnp.float32)
    scales = jnp.max(jnp.abs(new), axis=-1) / largest
    scales = jnp.where(scales > 0, scales, 1.0)
    numbers = jnp.clip(new / scales[..., None], -largest, largest)
    return (jnp.round(numbers) if dtype == jnp.int8 else numbers).astype(dtype), scales


def append(
    pages: Num[Array, "P K page H"],
    new: Float[Array, "T K H"],
    slots: Int[Array, " T"],
    scales: Float[Array, "P K page"] | None = None,
) -> Any:
    """`pages` with new[t] at place slots[t] % page of page slots[t] // page.

    A negative slot, or one past the last page, writes nothing. int8 and float8_e4m3fn pages take
    the float32 `scales` of their tokens and heads; then (pages, scales) come back.

    Raises:
      ValueError: shapes that do not fit, or scales without quantised pages or the other way round.
    """
    P, K, page, H = pages.shape
    if new.shape[1:] != (K, H) or slots.shape != new.shape[:1]:
        raise ValueError(
            f"append: new{new.shape} and slots{slots.shape} do not fit pages{pages.shape}; "
            "want [T,K,H] and [T] for [P,K,page,H]"
        )
    quantised = pages.dtype.name in LARGEST
    if quantised != (scales is not None):
        raise ValueError(
            f"append: pages of {pages.dtype.name} {'need' if quantised else 'take no'} scales"
        )
    if (
        slots.shape[0] == 1
    ):  # XLA:CPU makes two slice updates of a scatter of one, and a copy for each
        new, slots = jnp.repeat(new, 2, axis=0), jnp.pad(slots, (0, 1), constant_values=-1)
    at = jnp.where(slots < 0, P, slots // page), slice(None), slots % page
    if scales is None:
        return pages.at[at].set(new.astype(pages.dtype), mode="drop")
    numbers, of_new = quantize(new, pages.dtype)
    return pages.at[at].set(numbers, mode="drop"), scales.at[at].set(of_new, mode="drop")
