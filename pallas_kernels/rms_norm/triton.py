"""Norms of rows by Triton kernels through jax-triton, for NVIDIA GPUs from 8.0 on.

There is no kernel in Mosaic GPU: nothing here is multiplied by a tensor core, and Triton's plain
loads and stores of whole rows are all that bandwidth asks for. Rows stay in registers between their
statistics and their result. Backward, as many programs as fill the GPU walk over the rows, each
with a sum of its own of the weight's gradient, which XLA then adds up: always the same bits.

Alone, on one H200, the best of the bench's schedules took 0.63 to 0.75 of XLA's time
(`jaxinfra.kernels.norm_bench`). Within a whole step it was not timed yet, and so it is never chosen
unasked. XLA does not partition calls.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels import _compat, _triton_compat, shards

LONGEST = 2**13


@dataclasses.dataclass(frozen=True)
class Config:
    """Numbers of a tile of whole rows and of a thread, programs a multiprocessor backward, stages.

    `each` numbers a thread gives a program its warps, 16 at the most; `stages` is how many steps
    ahead a program loads backward.
    """

    tile: int = 2048
    each: int = 16
    programs: int = 8
    stages: int = 1


def refusal(*, platform: str, D: int) -> str | None:
    """Why Triton cannot norm such rows, or None if it can."""
    if reason := _triton_compat.refusal(platform) or shards.refusal():
        return reason
    return None if D <= LONGEST else f"the kernels take rows of up to {LONGEST}, not {D}"


def forward(
    x: Float[Array, "M D"], residual: Float[Array, "M D"] | None, weight: Float[Array, " D"],
    *, eps: float, plus_one: bool, config: Config = Config(),
) -> tuple[Float[Array, "M D"], Float[Array, "M D"]]:  # fmt: skip
    """x + residual (x where that is None), and the norm."""
    from pallas_kernels.rms_norm import triton_source

    M, D = x.shape
    sizes = _sizes(D, config)
    added = residual is not None
    total, out = _triton_compat.call(
        triton_source.forward,
        [x, residual if added else x, weight, M],
        [jax.ShapeDtypeStruct(x.shape if added else (1,), x.dtype),
         jax.ShapeDtypeStruct(x.shape, x.dtype)],
        programs=-(-M // sizes["ROWS"]), D=D, EPS=eps, PLUS_ONE=plus_one, ADDED=added,
        num_stages=1, **sizes,
    )  # fmt: skip
    return (total if added else x), out


def backward(
    total: Float[Array, "M D"], dtotal: Float[Array, "M D"], dout: Float[Array, "M D"],
    weight: Float[Array, " D"], *, eps: float, plus_one: bool, config: Config = Config(),
) -> tuple[Float[Array, "M D"], Float[Array, " D"]]:  # fmt: skip
    """Gradients of the normed rows, dtotal included, and of the weight, float32."""
    from pallas_kernels.rms_norm import triton_source

    M, D = total.shape
    sizes = _sizes(D, config)
    programs = min(-(-M // sizes["ROWS"]), config.programs * _compat.multiprocessors(False))
    dx, parts = _triton_compat.call(
        triton_source.backward,
        [total, dtotal, dout, weight, M],
        [jax.ShapeDtypeStruct(total.shape, total.dtype),
         jax.ShapeDtypeStruct((programs, D), jnp.float32)],
        programs=programs, D=D, EPS=eps, PLUS_ONE=plus_one, PROGRAMS=programs,
        STAGES=config.stages, num_stages=config.stages, **sizes,
    )  # fmt: skip
    return dx, jnp.sum(parts, axis=0)


def _sizes(D: int, config: Config) -> dict[str, Any]:
    """Rows and columns of a tile, and warps."""
    wide = 1 << (D - 1).bit_length()
    rows = max(1, config.tile // wide)
    warps = max(1, min(16, rows * wide // (32 * config.each)))
    return {"WIDE": wide, "ROWS": rows, "num_warps": warps}
