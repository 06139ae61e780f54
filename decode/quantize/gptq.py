"""GPTQ (arXiv 2210.17323): columns rounded in turn, each one's error made good by those after it.

With H = X^T X + damping, the column j of W is rounded and the rest of the row changed by
-(w_j - q_j) / U_jj U_j:, U upper triangular with H^-1 = U^T U. A group's scales are those of its
weights when its turn comes. Cost: i^3 / 3 FLOPs to factor, 2 o i^2 to correct.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from decode.quantize.calibrate import Inputs, LayerInputs
from decode.quantize.matrices import each
from decode.quantize.weights import Scheme, assembled, parted, scales_of, values_of
from jaxinfra.errors import UserError
from jaxinfra.model.config import ModelConfig
from jaxinfra.model.params import Layer
from jaxinfra.model.quantized import QuantizedMatrix

DAMPING = 0.01  # of the mean of the diagonal, as the paper has it
BLOCK = 64  # columns whose errors are handed on together, where one scale serves a whole row


def quantize_layer(layer: Layer, inputs: LayerInputs, config: ModelConfig, scheme: Scheme) -> Layer:
    """The layer with its matrices quantised; inputs are those of the layer itself."""
    return each(layer, lambda w, name, shape: quantize(w, getattr(inputs, name), scheme, shape))


def quantize(
    w: Float[Array, "o i"], inputs: Inputs, scheme: Scheme, shape: tuple
) -> QuantizedMatrix:
    """One matrix; raises UserError where its inputs make no positive definite matrix."""
    width = scheme.width(w.shape[1])
    for damping in (DAMPING, 10 * DAMPING, 100 * DAMPING):
        factor = _factor(inputs.gram, damping)
        if bool(jnp.isfinite(factor).all()):
            values, scales = _correct(w.astype(jnp.float32), factor, scheme, width)
            return assembled(values, scales, scheme, shape)
    raise UserError("gptq: the calibration's inputs are not finite; give other text, or use awq")


@jax.jit
def _factor(gram: Float[Array, "i i"], damping: float) -> Float[Array, "i i"]:
    """U, upper triangular, with (gram + damping)^-1 = U^T U.

    With R upper triangular and H = R R^T (Cholesky's from the last column on), U is R's inverse.
    """
    diagonal = jnp.diagonal(gram)
    dead = diagonal == 0  # an input that is always zero: its weights may be anything
    added = damping * jnp.mean(diagonal) + jnp.where(dead, 1.0, 0.0)
    flipped = (gram + jnp.diag(added))[::-1, ::-1]
    R = jnp.linalg.cholesky(flipped)[::-1, ::-1]
    return jax.scipy.linalg.solve_triangular(R, jnp.eye(len(R), dtype=R.dtype), lower=False)


@functools.partial(jax.jit, static_argnames=("scheme", "width"))
def _correct(
    w: Float[Array, "o i"], factor: Float[Array, "i i"], scheme: Scheme, width: int
) -> tuple[Float[Array, "g o n"], Float[Array, "g o"]]:
    o, i = w.shape
    whole = scales_of(w, scheme) if width == i else None  # one scale a row: of what it was
    block = width if whole is None else next(n for n in range(min(BLOCK, i), 0, -1) if i % n == 0)

    def one_block(w: Array, start: Array) -> tuple[Array, tuple[Array, Array]]:
        columns = jax.lax.dynamic_slice(w, (0, start), (o, block))
        rows = jax.lax.dynamic_slice(factor, (start, 0), (block, i))
        square = jax.lax.dynamic_slice(rows, (0, start), (block, block))
        scales = scales_of(columns, scheme) if whole is None else whole

        def one_column(j: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            columns, values, errors = carry
            value = values_of(columns[:, j, None], scales, scheme)[:, 0]
            error = (columns[:, j] - value * scales) / square[j, j]
            columns = columns - error[:, None] * square[j]
            return columns, values.at[:, j].set(value), errors.at[:, j].set(error)

        zeros = jnp.zeros((o, block), jnp.float32)
        _, values, errors = jax.lax.fori_loop(0, block, one_column, (columns, zeros, zeros))
        # What lies before and in the block changes too, and is not looked at again.
        w = w - jnp.einsum("ob,bi->oi", errors, rows, precision=jax.lax.Precision.HIGHEST)
        return w, (values, scales)

    _, (values, scales) = jax.lax.scan(one_block, w, jnp.arange(0, i, block))
    if whole is None:
        return values, scales
    return parted(jnp.swapaxes(values, 0, 1).reshape(o, i), width), whole[None]
