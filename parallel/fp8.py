"""Matrix products of float8 numbers: inputs in e4m3, gradients in e5m2, sums in float32.

Twice the FLOP/s of bfloat16 on Hopper and half the bytes of what is multiplied; masters, norms,
attention, embedding and head stay as they are (Micikevicius et al. 2022, arXiv 2209.05433). e4m3
ends at 448 and e5m2 at 57,344, so each operand is multiplied by a scale that brings its largest
value there, and the product divided by both scales:

    current    the largest value now: a pass over the operand and a scalar all-reduce before each
    delayed    the largest of the last HISTORY steps: known before, clipped where it is exceeded

Every device uses one scale for an operand: the largest value is that of all shards, so the mesh
does not change what is computed. Delayed scales learn it as the cotangent of the history that a
product takes, so a layer loop stacks it and the step reduces it once, for all products.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from jaxinfra.model.params import MLP, Attention
from parallel.mesh import varying

PRODUCTS = ("q", "k", "v", "o", "gate", "up", "down")
FORWARD, BACKWARD = jnp.float8_e4m3fn, jnp.float8_e5m2

History = Float[Array, "products 3 steps"] | None  # of x, w and the gradient; None: current scales


def product(
    x: Float[Array, "... D"], w: Float[Array, "D F"], history: Float[Array, "3 steps"] | None
) -> Float[Array, "... F"]:
    """`x @ w` in x's dtype, both operands and later the gradient in float8.

    `history` is typed as varying, as parameters are. Its cotangent is no derivative: its first
    step holds the largest values of x, w and the gradient on this device, all others zero.
    """
    y = _product(x.reshape(-1, x.shape[-1]), w, history)
    return y.reshape(*x.shape[:-1], w.shape[1])


@jax.custom_vjp
def _product(x: Array, w: Array, history: Array | None) -> Array:
    return _forward(x, w, history)[0]


def _forward(x: Array, w: Array, history: Array | None) -> tuple[Array, tuple]:
    here = (largest(x), largest(w))
    scales = [scale(here[i], None if history is None else history[i], FORWARD) for i in (0, 1)]
    narrow = quantised(x, scales[0], FORWARD), quantised(w, scales[1], FORWARD)
    y = _dot(narrow[0], narrow[1], (1, 0), scales).astype(x.dtype)
    return y, (narrow, scales, here, history, x[(0,) * x.ndim], w[(0,) * w.ndim])


def _backward(kept: tuple, g: Array) -> tuple[Array, Array, Array | None]:
    (x, w), (of_x, of_w), here, history, like_x, like_w = kept
    here = (*here, largest(g))
    of_g = scale(here[2], None if history is None else history[2], BACKWARD)
    g = quantised(g, of_g, BACKWARD)
    dx = _like(like_x, _dot(g, w, (1, 1), (of_g, of_w)))
    dw = _like(like_w, _dot(x, g, (0, 0), (of_x, of_g)))
    if history is None:
        return dx, dw, None
    return dx, dw, _like(history, jnp.zeros_like(history).at[:, 0].set(jnp.stack(here)))


def _like(primal: Array, cotangent: Array) -> Array:
    """A cotangent in its primal's dtype, summed over devices that share the primal."""
    axes = tuple(sorted(varying(cotangent) - varying(primal)))
    return (lax.psum(cotangent, axes) if axes else cotangent).astype(primal.dtype)


_product.defvjp(_forward, _backward)


def largest(x: Array) -> Float[Array, ""]:
    """The largest absolute value on this device."""
    return jnp.max(jnp.abs(x)).astype(jnp.float32)


def scale(here: Float[Array, ""], history: Float[Array, " steps"] | None, dtype) -> Array:
    """What an operand is multiplied by: the end of `dtype` over the largest value known of it."""
    if history is None:
        axes = tuple(sorted(varying(here)))
        known = lax.pmax(here, axes) if axes else here
    else:
        known = jnp.max(history)
    return jnp.where(known > 0, float(jnp.finfo(dtype).max) / jnp.where(known > 0, known, 1.0), 1.0)


def quantised(x: Array, scale: Array, dtype) -> Array:
    """x times its scale, clipped to what `dtype` holds: the cast alone would give NaN."""
    end = float(jnp.finfo(dtype).max)
    return jnp.clip(x.astype(jnp.float32) * scale, -end, end).astype(dtype)


def _dot(a: Array, b: Array, along: tuple[int, int], scales) -> Float[Array, "*e M N"]:
    stack = tuple(range(a.ndim - 2))  # of experts
    dims = (((len(stack) + along[0],), (len(stack) + along[1],)), (stack, stack))
    y = lax.dot_general(a, b, dims, preferred_element_type=jnp.float32)
    return y / (scales[0] * scales[1])


def project_qkv(attn: Attention, x: Float[Array, "B T D"], history: History) -> tuple:
    """`transformer.project_qkv` by float8 products."""
    q, k, v = (
        _by_matrix(name, getattr(attn, name), x, history, 1) for name in ("q", "k", "v")
    )  # fmt: skip
    if attn.q_bias is not None:
        q, k, v = q + attn.q_bias, k + attn.k_bias, v + attn.v_bias
    return q, k, v


def project_out(attn: Attention, x: Float[Array, "B T N H"], history: History) -> Array:
    """Attention's last projection [B, T, D]."""
    return _by_matrix("o", attn.o, x.reshape(*x.shape[:2], -1), history, 2)


def feed_forward(
    mlp: MLP, x: Float[Array, "B T D"], activation: Callable[[Array], Array], history: History
) -> Array:
    """The dense feed-forward."""
    gate, up = (
        checkpoint_name(_by_matrix(name, getattr(mlp, name), x, history, 1), "matmul")
        for name in ("gate", "up")
    )
    return _by_matrix("down", mlp.down, activation(gate) * up, history, 1)


def by_expert(
    name: str, x: Float[Array, "e C D"], w: Float[Array, "e D F"], history: History
) -> Float[Array, "e C F"]:
    """Each expert's rows times its matrix; one scale for the rows of all, one for all matrices."""
    return _product(x, w, None if history is None else history[PRODUCTS.index(name)])


def _by_matrix(name: str, w: Array, x: Array, history: History, inputs: int) -> Array:
    """x times a weight whose first `inputs` dimensions are one."""
    ins = functools.reduce(lambda a, b: a * b, w.shape[:inputs])
    own = None if history is None else history[PRODUCTS.index(name)]
    return product(x, w.reshape(ins, -1), own).reshape(*x.shape[:-1], *w.shape[inputs:])
