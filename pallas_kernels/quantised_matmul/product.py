"""`fp8_matmul` and `weight_matmul`: which implementation multiplies quantised matrices."""

from __future__ import annotations

import functools
import logging
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int8, UInt8

from pallas_kernels import _compat
from pallas_kernels.batching import unmapped
from pallas_kernels.quantised_matmul import mosaic_gpu, triton, xla
from pallas_kernels.quantised_matmul.formats import BLOCK, FP8

IMPLEMENTATIONS = ("mosaic_gpu", "triton", "xla")
_log = logging.getLogger(__name__)


def supported(
    implementation: str, dtype: Any, *, rows: int = 1, group: int = 128, platform: str | None = None
) -> str | None:
    """Why `implementation` cannot multiply `rows` rows of `dtype` here, or None if it can.

    "mosaic_gpu" multiplies float8_e4m3fn with float8_e4m3fn, "triton" a few rows of 16-bit floats
    with integer weights whose scales are for `group` inputs, "xla" both.
    """
    if implementation not in IMPLEMENTATIONS:
        return f"no implementation {implementation!r}; there are {', '.join(IMPLEMENTATIONS)}"
    if implementation == "xla":
        return None
    platform = platform or jax.default_backend()
    if implementation == "triton":
        return triton.refusal(platform=platform, dtype=dtype, rows=rows, group=group)
    if reason := _compat.not_hopper(platform):
        return reason
    if dtype != FP8:
        return f"Mosaic GPU's kernel multiplies float8_e4m3fn, not {jnp.dtype(dtype).name}"
    return None


def fp8_matmul(
    a: Float[Array, "M K"],
    b: Float[Array, "N K"],
    a_scale: Float[Array, ""] | Float[Array, "M k"],
    b_scale: Float[Array, ""] | Float[Array, "n k"],
    *,
    dtype: Any = jnp.bfloat16,
    implementation: str | None = None,
    config: mosaic_gpu.Config | None = None,
    interpret: Any = False,
) -> Float[Array, "M N"]:
    """a @ b^T of float8_e4m3fn values times their scales, rounded once to `dtype`.

    Scales are one a tensor for both, or one for every row and 128 of K of a, [M, K / 128], and one
    for every 128 x 128 of b, [ceil(N / 128), K / 128], as `formats.fp8_rows` and `fp8_blocks` give
    them (DeepSeek-V3, arXiv 2412.19437, section 3.3.2). No derivative.

    Args:
      dtype: bfloat16 or float16.
      implementation: "mosaic_gpu", which sums in float32 from every 128 of K on, "xla", or None to
        choose: "mosaic_gpu" on one Hopper GPU, where it measured faster.
      config: the schedule of "mosaic_gpu"; None to choose.
      interpret: runs "mosaic_gpu" on a CPU; `pallas_kernels.interpreter.interpret` gives it.

    "mosaic_gpu" pads, at the cost of a copy, M that is not a multiple of 8, N not of 64, K not of
    128.

    Raises ValueError: shapes or dtypes that do not fit, or an implementation that refuses.
    """
    _check_fp8(a, b, a_scale, b_scale, dtype)
    if interpret:
        implementation = "mosaic_gpu"
    else:
        implementation = _choose("fp8_matmul", implementation, "mosaic_gpu", a.dtype, {}, None)
    if implementation == "xla":
        return xla.fp8_matmul(a, b, a_scale, b_scale, dtype)
    M, N = a.shape[0], b.shape[0]
    blocked = a_scale.ndim == 2
    a, b = _padded(a, 8, BLOCK), _padded(b, 64, BLOCK)
    if blocked:
        scales = _padded(a_scale.astype(jnp.float32), 8, 1).T, b_scale.astype(jnp.float32)
    else:
        scales = (a_scale * b_scale).astype(jnp.float32).reshape(1), None
    config = config or mosaic_gpu.choose(M, blocked=blocked)
    out = mosaic_gpu.fp8_matmul(a, b, *scales, dtype=dtype, config=config, interpret=interpret)
    return out[:M, :N]


def weight_matmul(
    x: Float[Array, "M K"],
    values: Int8[Array, "g N n"] | UInt8[Array, "g N m"],
    scales: Float[Array, "g N"],
    *,
    dtype: Any = None,
    implementation: str | None = None,
    tiles: triton.Tiles | None = None,
) -> Float[Array, "M N"]:
    """x times the transpose of weights of 8 or 4 bits with a scale an output and group of inputs.

    Args:
      x: floats.
      values: int8, or uint8 with two numbers of 4 bits a byte; `formats.integers` makes them. K is
        g n, and n = 2 m.
      dtype: of the result; x's if None.
      implementation: "triton", for 64 rows of 16-bit floats at most, "xla", or None to choose:
        "triton" for 2 to 64 rows on one NVIDIA GPU, as it measured faster with 16 and 64 on an
        H200. A lone row measured faster by XLA at 1,024 x 3,072, slower at 4,096 x 4,096.
      tiles: of "triton"; None to choose.

    Differentiable in x and scales; the gradient is XLA's, and so is the product under `jax.vmap`.

    Raises ValueError: shapes or dtypes that do not fit, or an implementation that refuses.
    """
    group = _check_weight(x, values, scales)
    facts = {"rows": x.shape[0], "group": group}
    slower = "XLA measured faster for a lone row of a small matrix" if x.shape[0] == 1 else None
    implementation = _choose("weight_matmul", implementation, "triton", x.dtype, facts, slower)
    if implementation == "xla":
        return xla.weight_matmul(x, values, scales, dtype=dtype)
    return _by_triton((dtype or x.dtype, tiles), x, values, scales)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _by_triton(options: tuple[Any, triton.Tiles | None], x, values, scales):
    dtype, tiles = options
    kernel = functools.partial(triton.weight_matmul, dtype=dtype, tiles=tiles)
    plain = functools.partial(xla.weight_matmul, dtype=dtype)
    return unmapped(kernel, plain)(x, values, scales)


def _forward(options, x, values, scales):
    return _by_triton(options, x, values, scales), (x, values, scales)


def _backward(options, kept, dy):
    x, values, scales = kept
    dtype, _ = options
    of = functools.partial(xla.weight_matmul, dtype=dtype)
    dx, dscales = jax.vjp(lambda x, scales: of(x, values, scales), x, scales)[1](dy)
    return dx, None, dscales


_by_triton.defvjp(_forward, _backward)


def _choose(
    product: str, asked: str | None, kernel: str, dtype: Any, facts: Any, slower: str | None
) -> str:
    """`slower`: why `kernel` is left where it could be taken."""
    if asked is None:
        reason = supported(kernel, dtype, **facts) or slower
        if reason is None and jax.device_count() > 1:
            reason = "XLA does not partition it; ask for it inside shard_map"
        _log.debug("%s: %s", product, kernel if reason is None else f"xla; {kernel}: {reason}")
        return kernel if reason is None else "xla"
    if reason := supported(asked, dtype, **facts):
        raise ValueError(f"{product}(implementation={asked!r}): {reason}")
    if asked not in (kernel, "xla"):
        raise ValueError(f"{product}(implementation={asked!r}): there are {kernel} and xla")
    return asked


def _check_fp8(a: Array, b: Array, a_scale: Array, b_scale: Array, dtype: Any) -> None:
    given = f"fp8_matmul: a{a.shape}, b{b.shape}"
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or 0 in (*a.shape, *b.shape):
        raise ValueError(f"{given}; want [M, K] and [N, K], not empty")
    if a.dtype != FP8 or b.dtype != FP8:
        raise ValueError(f"{given} of {a.dtype} and {b.dtype}; want float8_e4m3fn")
    if dtype not in (jnp.bfloat16, jnp.float16):
        raise ValueError(f"{given}: dtype={jnp.dtype(dtype).name}; want bfloat16 or float16")
    (M, K), N = a.shape, b.shape[0]
    blocks = ((M, K // BLOCK), (-(-N // BLOCK), K // BLOCK))
    shapes = a_scale.shape, b_scale.shape
    if shapes != ((), ()) and (shapes != blocks or K % BLOCK):
        raise ValueError(
            f"{given}: a_scale{shapes[0]}, b_scale{shapes[1]}; want scalars, or where K is a "
            f"multiple of {BLOCK} {blocks[0]} and {blocks[1]}"
        )


def _check_weight(x: Array, values: Array, scales: Array) -> int:
    """The inputs of a group."""
    given = f"weight_matmul: x{x.shape}, values{values.shape}, scales{scales.shape}"
    if values.dtype not in (jnp.int8, jnp.uint8) or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"{given} of {x.dtype} and {values.dtype}; want floats, int8 or uint8")
    group = values.shape[-1] * (2 if values.dtype == jnp.uint8 else 1)
    fits = x.ndim == 2 and values.ndim == 3 and scales.shape == values.shape[:2]
    if not fits or x.shape[1] != values.shape[0] * group or 0 in (*x.shape, *values.shape):
        raise ValueError(f"{given}; want [M, g n], [g, N, n or n / 2] and [g, N], not empty")
    return group


def _padded(x: Array, rows: int, columns: int) -> Array:
    """`x` with zeros behind, to multiples of `rows` and `columns`."""
    beyond = (0, -x.shape[0] % rows), (0, -x.shape[1] % columns)
    return jnp.pad(x, beyond) if any(after for _, after in beyond) else x
