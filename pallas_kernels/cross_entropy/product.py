"""Cross-entropy and log-probabilities of a linear layer: which implementation, and why.

`supported(...)` gives the reason why one refuses; `choose(...)` what is taken unasked, and why; the
debug log says it of every call.
"""

from __future__ import annotations

import logging
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.cross_entropy import chunked, mosaic_gpu, reference
from pallas_kernels.cross_entropy.blocks import Rule
from pallas_kernels.cross_entropy.statistics import Call, statistics

IMPLEMENTATIONS = ("mosaic_gpu", "xla", "reference")
# Of each function the kernels that were timed and faster than "xla": taken unasked, in this order.
TIMED: dict[str, tuple[str, ...]] = {"linear_cross_entropy": (), "token_logps": ("mosaic_gpu",)}

_log = logging.getLogger(__name__)


def supported(
    implementation: str,
    x_shape: tuple[int, int],
    w_shape: tuple[int, int],
    dtype: Any,
    *,
    transpose_w: bool = False,
    platform: str | None = None,
) -> str | None:
    """Why `implementation` cannot take x [M, D] and w [D, V] of `dtype`, or None if it can.

    `transpose_w`: `w_shape` is [V, D].
    """
    if implementation not in IMPLEMENTATIONS:
        return f"no implementation {implementation!r}; there are {', '.join(IMPLEMENTATIONS)}"
    if implementation != "mosaic_gpu":
        return None
    V = w_shape[0 if transpose_w else 1]
    platform = platform or jax.default_backend()
    return mosaic_gpu.refusal(
        platform=platform, dtype=dtype, D=x_shape[1], V=V, transpose_w=transpose_w
    )


def choose(
    what: str, x_shape: tuple[int, int], w_shape: tuple[int, int], dtype: Any, **options: Any
) -> tuple[str, str]:
    """What is taken for such a call of `what`, the options being `supported`'s, and why.

    `what`: "linear_cross_entropy" or "token_logps".
    """
    reasons = []
    for name in ("mosaic_gpu",):
        reason = supported(name, x_shape, w_shape, dtype, **options)
        if reason is None and name not in TIMED[what]:
            reason = "it takes the call, but was not timed to be faster"
        if reason is None and jax.device_count() > 1:
            reason = "XLA does not partition it; ask for it inside shard_map"
        if reason is None:
            return name, "it measured faster than XLA"
        reasons.append(f"{name}: {reason}")
    return "xla", "; ".join(reasons)


def token_logps(
    x: Float[Array, "M D"],
    w: Float[Array, "D V"] | Float[Array, "V D"],
    targets: Int[Array, " M"],
    *,
    temperature: float = 1.0,
    soft_cap: float | None = None,
    transpose_w: bool = False,
    implementation: str | None = None,
    block: int | None = None,
    schedule: mosaic_gpu.Schedule | None = None,
    interpret: Any = False,
) -> tuple[Float[Array, " M"], Float[Array, " M"]]:
    """Of each row the target's log-probability, and the entropy in nats, both float32.

    Of softmax(z / temperature) with z = x w, or soft_cap tanh(x w / soft_cap). Differentiable in x
    and w; neither way do the logits [M, V] exist, except in "reference". Makes 2 M D V FLOPs and
    6 M D V for the gradient.

    Args:
      x, w: one float dtype; float16 is computed in float32, where its gradients do not vanish.
      targets: in [0, V); elsewhere the row's log-probability is NaN.
      transpose_w: w lies in memory as [V, D], as an embedding that also is the head.
      implementation: one of IMPLEMENTATIONS, or None to choose. "mosaic_gpu" takes no `jax.vmap`.
      block: columns of logits that "xla" has at a time; None to choose.
      schedule: that of "mosaic_gpu"; None for the default.
      interpret: runs "mosaic_gpu" on a CPU; `pallas_kernels.interpreter.interpret` gives it.

    Raises:
      ValueError: shapes, dtypes or numbers that do not fit, or an implementation that refuses.
    """
    if not temperature > 0:
        raise ValueError(f"token_logps: temperature={temperature}; want it above zero")
    _check("token_logps", x, w, targets, soft_cap, transpose_w)
    targets = targets.astype(jnp.int32)
    name = _pick("token_logps", x, w, transpose_w, implementation, interpret)
    if x.dtype == jnp.float16:
        x, w = x.astype(jnp.float32), w.astype(jnp.float32)
    if name == "reference":
        return reference.token_logps(
            x, w.T if transpose_w else w, targets, temperature=temperature, soft_cap=soft_cap
        )
    rule = Rule(temperature, soft_cap, transpose_w)
    call = Call(name, rule, block, schedule or mosaic_gpu.DEFAULT, interpret)
    rows: Any = statistics(call, x, w, targets)
    hit, lse, entropy = rows
    return _where_words(hit - lse, targets, rule.words(w)), entropy


def linear_cross_entropy(
    x: Float[Array, "M D"],
    w: Float[Array, "D V"] | Float[Array, "V D"],
    targets: Int[Array, " M"],
    weights: Float[Array, " M"],
    z_loss: float = 0.0,
    soft_cap: float | None = None,
    block: int = 4096,
    *,
    transpose_w: bool = False,
    implementation: str | None = None,
    schedule: mosaic_gpu.Schedule | None = None,
    interpret: Any = False,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """The sums over m of weights[m] (nll[m] + z_loss lse[m]^2), and of weights[m] nll[m].

    The first is differentiable in x and w. "xla" has `block` rows of logits at a time, computes
    the gradient with the loss and makes 6 M D V FLOPs; "mosaic_gpu" has none and makes 8 M D V, for
    a small part of the memory. The other arguments are those of `token_logps`.

    Raises:
      ValueError: shapes, dtypes or numbers that do not fit, or an implementation that refuses.
    """
    _check("linear_cross_entropy", x, w, targets, soft_cap, transpose_w)
    targets = targets.astype(jnp.int32)
    name = _pick("linear_cross_entropy", x, w, transpose_w, implementation, interpret)
    if name == "mosaic_gpu":
        call = Call(
            name, Rule(1.0, soft_cap, transpose_w), None, schedule or mosaic_gpu.DEFAULT,
            interpret,
        )  # fmt: skip
        rows: Any = statistics(call, x, w, targets)
        hit, lse, _ = rows
        weights = jax.lax.stop_gradient(weights.astype(jnp.float32))
        nll = jnp.sum(weights * _where_words(lse - hit, targets, call.rule.words(w)))
        return nll + z_loss * jnp.sum(weights * lse**2), jax.lax.stop_gradient(nll)
    w = w.T if transpose_w else w
    if name == "reference":
        return reference.linear_cross_entropy(
            x, w, targets, weights, z_loss=z_loss, soft_cap=soft_cap
        )
    return chunked.linear_cross_entropy(x, w, targets, weights, z_loss, soft_cap, block)


def _where_words(rows: Array, targets: Array, V: int) -> Array:
    """The rows' numbers, NaN where the target is no word."""
    return jnp.where((targets >= 0) & (targets < V), rows, jnp.nan)


def _pick(
    what: str, x: Array, w: Array, transpose_w: bool, asked: str | None, interpret: Any
) -> str:
    facts: Any = (x.shape, w.shape, x.dtype)
    if interpret:
        D, V = w.shape[::-1] if transpose_w else w.shape
        if reason := mosaic_gpu.misfit(x.dtype, D, V, transpose_w):
            raise ValueError(f"{what}(interpret=...): {reason}")
        return "mosaic_gpu"
    if asked is None:
        asked, why = choose(what, *facts, transpose_w=transpose_w)
        _log.debug("%s %s %s: %s (%s)", what, x.shape, w.shape, asked, why)
    elif reason := supported(asked, *facts, transpose_w=transpose_w):
        raise ValueError(f"{what}(implementation={asked!r}): {reason}")
    return asked


def _check(
    what: str, x: Array, w: Array, targets: Array, soft_cap: float | None, transpose_w: bool
) -> None:
    if x.ndim != 2 or w.ndim != 2 or x.shape[1] != w.shape[1 if transpose_w else 0]:
        wanted = "[M, D] and [V, D]" if transpose_w else "[M, D] and [D, V]"
        raise ValueError(f"{what}: x{x.shape} and w{w.shape}; want {wanted}")
    if targets.shape != x.shape[:1] or not jnp.issubdtype(targets.dtype, jnp.integer):
        raise ValueError(
            f"{what}: targets{targets.shape} of {targets.dtype}; want {x.shape[:1]} integers"
        )
    if 0 in (*x.shape, *w.shape):
        raise ValueError(f"{what}: x{x.shape} and w{w.shape} must not be empty")
    if x.dtype != w.dtype or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"{what}: dtypes {x.dtype} and {w.dtype}; want one floating-point dtype")
    if soft_cap is not None and not soft_cap > 0:
        raise ValueError(f"{what}: soft_cap={soft_cap}; want it above zero, or None")
