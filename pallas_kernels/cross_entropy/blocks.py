"""A linear layer's softmax by blocks of the vocabulary in plain XLA: what a block has to tell.

Of a block each row says four numbers, and `merge` makes of them the log-sum-exp, the entropy and
the target's logit: no more than [M, block] logits live at a time. The gradient goes over the blocks
once more; the columns that a block gives to dw are whole, for it has all rows, so nothing is summed
up but dx, [M, D] in float32. A cut along the rows would sum up dw, [D, V], instead.

Cost: 2 M D V FLOPs, and 6 M D V for the gradient, which makes the logits again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

LOWEST = -1e30  # stands for the logit of no word: finite, so that 0 times a difference is 0
MOST_LOGITS = 2**26  # float32 logits alive at a time, 256 MiB, where that is a wide block
NARROWEST = 4096  # a narrower block spends a twentieth of its time and more on the sum of dx


@dataclasses.dataclass(frozen=True)
class Rule:
    """From products to logits: y = cap tanh(z / cap) / temperature.

    `transpose_w`: w lies in memory as [V, D], as the embedding does that also is the head.
    """

    temperature: float = 1.0
    soft_cap: float | None = None
    transpose_w: bool = False

    def words(self, w: Array) -> int:
        """V."""
        return w.shape[0 if self.transpose_w else 1]

    def block(self, w: Array, start: Any, size: int) -> Array:
        """The part of w that makes `size` logits from `start` on."""
        return lax.dynamic_slice_in_dim(w, start, size, 0 if self.transpose_w else 1)

    def logits(self, x: Array, w: Array) -> tuple[Float[Array, "M v"], Float[Array, "M v"] | None]:
        """Logits in float32, and with a cap their slope in z times the temperature."""
        letters = "md,vd->mv" if self.transpose_w else "md,dv->mv"
        z = jnp.einsum(letters, x, w, preferred_element_type=jnp.float32)
        if self.soft_cap is None:
            return z / self.temperature, None
        t = jnp.tanh(z / self.soft_cap)
        return t * (self.soft_cap / self.temperature), 1.0 - t * t


@dataclasses.dataclass(frozen=True)
class Slopes:
    """What a row's gradient is made of: dz = dy/dz (hit [v = target] + p (a + b (y - lse)))."""

    hit: Float[Array, " M"]
    a: Float[Array, " M"]
    b: Float[Array, " M"]
    lse: Float[Array, " M"]


def width(M: int) -> int:
    """Columns of a block for M rows: a multiple of 128."""
    return max(NARROWEST, MOST_LOGITS // M // 128 * 128)


def statistics(
    rule: Rule, x: Float[Array, "M D"], w: Array, targets: Int[Array, " M"]
) -> Float[Array, "4 M"]:
    """Of one block of w: its largest logit, then of e = exp(y - largest) the sums of e and of
    e (y - largest), and the target's logit, or 0 where another block has it."""
    y, _ = rule.logits(x, w)
    top = jnp.max(y, axis=1)
    below = y - top[:, None]
    e = jnp.exp(below)
    hit = jnp.sum(jnp.where(_is(targets, y.shape[1]), y, 0.0), axis=1)
    return jnp.stack([top, jnp.sum(e, axis=1), jnp.sum(e * below, axis=1), hit])


def derivatives(
    rule: Rule, x: Float[Array, "M D"], w: Array, targets: Int[Array, " M"], slopes: Slopes
) -> Float[Array, "M v"]:
    """dz of one block of w, in x's dtype."""
    y, slope = rule.logits(x, w)
    logp = y - slopes.lse[:, None]
    dy = jnp.exp(logp) * (slopes.a[:, None] + slopes.b[:, None] * logp)
    dy = (dy + jnp.where(_is(targets, y.shape[1]), slopes.hit[:, None], 0.0)) / rule.temperature
    return (dy if slope is None else dy * slope).astype(x.dtype)


def _is(targets: Array, columns: int) -> Array:
    return targets[:, None] == jnp.arange(columns, dtype=jnp.int32)[None]


def merge(
    parts: Float[Array, "4 S M"],
) -> tuple[Float[Array, " M"], Float[Array, " M"], Float[Array, " M"]]:
    """The target's logit, the log-sum-exp and the entropy, of what S blocks say; in one order."""
    tops, totals, drifts, hits = parts
    top = jnp.max(tops, axis=0)
    shrink = jnp.exp(tops - top)
    total = jnp.sum(shrink * totals, axis=0)
    drift = jnp.sum(shrink * (drifts + totals * (tops - top)), axis=0)
    return jnp.sum(hits, axis=0), top + jnp.log(total), jnp.log(total) - drift / total


def slopes_of(
    cotangents: tuple[Array, Array, Array], lse: Float[Array, " M"], entropy: Float[Array, " M"]
) -> Slopes:
    """For the cotangents of `merge`'s three results.

    With p = exp(y - lse): dlse/dy = p and dentropy/dy = -p (y - lse + entropy).
    """
    of_hit, of_lse, of_entropy = cotangents
    return Slopes(of_hit, of_lse - of_entropy * entropy, -of_entropy, lse)


def over(
    V: int, block: int, body: Callable[[Any, int, Any], tuple[Any, Any]], carry: Any
) -> tuple[Any, list[Any]]:
    """`body(start, size, carry)` of one block after the other, the last maybe narrower.

    Returns the carry and what the bodies gave beside it, whole blocks' stacked.
    """
    whole, rest = divmod(V, block)
    given = []
    if whole:
        starts = jnp.arange(whole, dtype=jnp.int32) * block
        carry, out = lax.scan(lambda carry, start: body(start, block, carry), carry, starts)
        given.append(out)
    if rest:
        carry, out = body(whole * block, rest, carry)
        given.append(jax.tree.map(lambda leaf: leaf[None], out))
    return carry, given


def gradients(
    rule: Rule,
    block: int,
    derive: Callable[[Array, Array, Array, Slopes], Array],
    x: Float[Array, "M D"],
    w: Array,
    targets: Int[Array, " M"],
    slopes: Slopes,
) -> tuple[Array, Array]:
    """dx and dw; `derive(x, a block of w, targets within it, slopes)` makes a block's dz."""
    D_first = "vd" if rule.transpose_w else "dv"
    axis = 0 if rule.transpose_w else 1

    def body(start: Any, size: int, carry: tuple[Array, Array]) -> tuple[tuple[Array, Array], None]:
        dx, dw = carry
        part = rule.block(w, start, size)
        dz = derive(x, part, targets - start, slopes)
        dx = dx + jnp.einsum(f"mv,{D_first}->md", dz, part, preferred_element_type=jnp.float32)
        of_part = jnp.einsum(f"md,mv->{D_first}", x, dz)
        return (dx, lax.dynamic_update_slice_in_dim(dw, of_part, start, axis)), None

    sums = jnp.zeros(x.shape, jnp.float32), jnp.zeros_like(w)
    (dx, dw), _ = over(rule.words(w), block, body, sums)
    return dx.astype(x.dtype), dw
