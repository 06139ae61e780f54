"""`matmul`: which implementation multiplies, with its gradients and its rule for `jax.vmap`."""

from __future__ import annotations

import dataclasses
import functools
import logging
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels import _compat
from pallas_kernels.matmul import configs, mosaic_gpu, mosaic_tpu, triton
from pallas_kernels.matmul.epilogue import BLOCK, Epilogue, activate

IMPLEMENTATIONS = ("mosaic_gpu", "mosaic_tpu", "triton", "xla")
_log = logging.getLogger(__name__)


def supported(implementation: str, dtype: Any, *, platform: str | None = None) -> str | None:
    """Why `implementation` cannot multiply matrices of `dtype` here, or None if it can."""
    if implementation not in IMPLEMENTATIONS:
        return f"no implementation {implementation!r}; there are {', '.join(IMPLEMENTATIONS)}"
    if implementation == "xla":
        return None
    platform = platform or jax.default_backend()
    if implementation != "mosaic_gpu":
        backend = mosaic_tpu if implementation == "mosaic_tpu" else triton
        return backend.refusal(platform=platform, dtype=dtype)
    if reason := _compat.not_hopper(platform):
        return reason
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"Mosaic GPU's kernel multiplies bfloat16 and float16, not {jnp.dtype(dtype).name}"
    return None


def matmul(
    a: Float[Array, "*batch M K"],
    b: Float[Array, "*batch K N"] | Float[Array, "K N"],
    *,
    epilogue: Epilogue | None = None,
    transpose_a: bool = False,
    transpose_b: bool = False,
    precision: Any = None,
    implementation: str | None = None,
    config: mosaic_gpu.Config | None = None,
    interpret: Any = False,
) -> Float[Array, "*batch M n"]:
    """epilogue(a @ b), summed in float32 and rounded once to a's dtype.

    Differentiable in a, b and the epilogue's arrays; under `jax.vmap` one kernel serves all.

    Args:
      a, b: one float dtype. b has a's batch axes or none.
      epilogue: scale, bias, activation and residual; see `Epilogue`. The product alone if None.
      transpose_a: a lies in memory as [..., K, M]; no copy is made.
      transpose_b: b lies in memory as [..., N, K].
      precision: of float32 operands, as in `jax.lax.dot`.
      implementation: one of IMPLEMENTATIONS, or None to choose: "mosaic_gpu" on Hopper where it
        measured faster (an epilogue to fuse, or 64 rows and fewer), else "xla".
      config: the schedule of "mosaic_gpu"; None to choose.
      interpret: runs "mosaic_gpu" on a CPU; `pallas_kernels.interpreter.interpret` gives it.

    "mosaic_gpu" pads, at the cost of a copy, operands whose memory rows are not multiples of 64
    elements or whose other axis is not one of 8.

    Raises ValueError: shapes or dtypes that do not fit, or an implementation that refuses.
    """
    epilogue = Epilogue() if epilogue is None else epilogue
    M, N, n = _check(a, b, epilogue, transpose_a, transpose_b)
    rows_joined = b.ndim == 2 and not transpose_a  # the batch is more rows of one product
    a3 = a.reshape(1, -1, a.shape[-1]) if rows_joined else a.reshape(-1, *a.shape[-2:])
    b3 = b.reshape(-1, *b.shape[-2:])
    rows = a3.shape[1] if rows_joined else M
    scale, bias, residual = epilogue.scale, epilogue.bias, epilogue.residual
    scale = None if scale is None else jnp.asarray(scale, jnp.float32).reshape(1, 1)
    bias = None if bias is None else bias.astype(jnp.float32).reshape(1, N)
    residual = None if residual is None else residual.reshape(a3.shape[0], rows, n)
    if interpret:
        implementation = "mosaic_gpu"
    elif implementation is None:
        plain = all(x is None for x in (scale, bias, residual, epilogue.activation))
        K = a.shape[-2 if transpose_a else -1]
        alone = a3.shape[0] == 1 and not transpose_a and not transpose_b
        implementation = _choose(rows, a.dtype, plain, (rows, N, K) if alone else None)
    elif reason := supported(implementation, a.dtype):
        raise ValueError(f"matmul(implementation={implementation!r}): {reason}")
    call = _Call(
        implementation, epilogue.activation, transpose_a, transpose_b, precision, config, interpret
    )
    out: Any = _matmul(call, a3, b3, scale, bias, residual)
    return out.reshape(*a.shape[:-2], M, n)


def _check(
    a: Array, b: Array, epilogue: Epilogue, transpose_a: bool, transpose_b: bool
) -> tuple[int, int, int]:
    """M, N and the output's columns."""
    if a.ndim < 2 or b.ndim < 2 or (b.ndim > 2 and b.shape[:-2] != a.shape[:-2]):
        raise ValueError(
            f"matmul: a{a.shape} and b{b.shape}; want [*batch, M, K] and [*batch, K, N] or [K, N]"
        )
    M, K = a.shape[-2:] if not transpose_a else a.shape[:-3:-1]
    also_K, N = b.shape[-2:] if not transpose_b else b.shape[:-3:-1]
    flags = f"{transpose_a=}, {transpose_b=}"
    if also_K != K:
        raise ValueError(f"matmul: a{a.shape} has K={K} and b{b.shape} has K={also_K} ({flags})")
    if 0 in (*a.shape, *b.shape):
        raise ValueError(f"matmul: a{a.shape} and b{b.shape} must not be empty")
    if a.dtype != b.dtype or not jnp.issubdtype(a.dtype, jnp.floating):
        raise ValueError(f"matmul: dtypes {a.dtype} and {b.dtype}; want one floating-point dtype")
    if epilogue.activation == "swiglu" and N % (2 * BLOCK):
        raise ValueError(f"matmul: N={N}; swiglu wants pairs of {BLOCK} columns (`interleave`)")
    n = epilogue.columns(N)
    wanted = {"scale": (), "bias": (N,), "residual": (*a.shape[:-2], M, n)}
    for name, shape in wanted.items():
        x = getattr(epilogue, name)
        if x is not None and jnp.shape(x) != shape:
            raise ValueError(f"matmul: {name}{jnp.shape(x)}; want {shape}")
    if epilogue.residual is not None and epilogue.residual.dtype != a.dtype:
        raise ValueError(f"matmul: residual of {epilogue.residual.dtype}; want {a.dtype}")
    return M, N, n


def _choose(rows: int, dtype: Any, plain: bool, shape: tuple[int, int, int] | None) -> str:
    reason = supported("mosaic_gpu", dtype)
    if reason is None and plain:
        row = configs.tuned(jax.devices()[0].device_kind).get(shape) if shape else None
        if row is not None and row["xla_tflops"] >= row["tflops"]:
            reason = f"XLA measured {row['xla_tflops']} TFLOP/s, it {row['tflops']}"
        elif row is None and rows > configs.FEW_ROWS:
            reason = "without an epilogue XLA is as fast"
    _log.debug("matmul %s: %s", shape or f"of {rows} rows", reason or "mosaic_gpu")
    return "mosaic_gpu" if reason is None else "xla"


@dataclasses.dataclass(frozen=True)
class _Call:
    implementation: str
    activation: str | None
    transpose_a: bool
    transpose_b: bool
    precision: Any
    config: mosaic_gpu.Config | None
    interpret: Any


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _matmul(call: _Call, a, b, scale, bias, residual):
    return _run(call)(a, b, scale, bias, residual)


def _forward(call: _Call, a, b, scale, bias, residual):
    if call.activation is None:
        return _run(call)(a, b, scale, bias, residual), (a, b, scale, bias, residual, None)
    # What the activation is of is kept for its slope, so it is computed apart.
    z = _run(dataclasses.replace(call, activation=None))(a, b, scale, bias, None)
    out = activate(z.astype(jnp.float32), call.activation)
    if residual is not None:
        out = out + residual.astype(jnp.float32)
    return out.astype(a.dtype), (a, b, scale, bias, residual, z)


def _backward(call: _Call, kept, dout):
    a, b, scale, bias, residual, z = kept
    dz = dout
    if z is not None:
        slope = jax.vjp(lambda z: activate(z, call.activation), z.astype(jnp.float32))[1]
        dz = slope(dout.astype(jnp.float32))[0].astype(dout.dtype)

    def product(left, right, transpose_a, transpose_b, factor):
        alone = dataclasses.replace(
            call, activation=None, config=None, transpose_a=transpose_a, transpose_b=transpose_b
        )
        return _run(alone)(left, right, factor, None, None)

    if call.transpose_a:
        da = product(b, dz, call.transpose_b, True, None)
    else:
        da = product(dz, b, False, not call.transpose_b, None)
    if call.transpose_b:
        db = product(dz, a, True, call.transpose_a, scale)
    else:
        db = product(a, dz, not call.transpose_a, False, scale)
    dscale = None
    if scale is not None:  # the sum of dz * (a @ b) is that of (dz @ b^T) * a
        wide = da.astype(jnp.float32)
        dscale = jnp.sum(wide * a.astype(jnp.float32), axis=(1, 2))[:, None]
        da = (wide * scale[:, :, None]).astype(a.dtype)
    dbias = None if bias is None else jnp.sum(dz.astype(jnp.float32), axis=1)
    gradients = (da, db, dscale, dbias, dout)
    operands = (a, b, scale, bias, residual)
    return tuple(map(_as_shared, gradients, operands))


def _as_shared(gradient: Any, operand: Any) -> Any:
    """Summed over the batch where one operand stood for all of it; None for no operand."""
    if operand is None:
        return None
    if gradient.shape[0] != operand.shape[0]:
        gradient = jnp.sum(gradient.astype(jnp.float32), axis=0, keepdims=True)
    return gradient.astype(operand.dtype)


_matmul.defvjp(_forward, _backward)


@functools.cache
def _run(call: _Call) -> Any:
    """The product of operands that each have a batch axis of one common length, or of 1."""

    def run(a, b, scale, bias, residual):
        if call.implementation == "mosaic_gpu":
            return _mosaic(call, a, b, scale, bias, residual)
        if call.implementation == "xla":
            out = _einsum(call, a, b)
        else:
            out = _each(call, a, b).astype(jnp.float32)
        if scale is not None:
            out = out * scale[:, :, None]
        if bias is not None:
            out = out + bias[:, None]
        out = activate(out, call.activation)
        if residual is not None:
            out = out + residual.astype(jnp.float32)
        return out.astype(a.dtype)

    batched = jax.custom_batching.custom_vmap(run)

    @batched.def_vmap
    def _(size, in_batched, *operands):
        """The mapped axis becomes part of the batch."""
        lengths = [x.shape[1 if axis else 0] for x, axis in zip(operands, in_batched, strict=True)
                   if x is not None]  # fmt: skip
        batch = max(lengths)

        def joined(x, mapped):
            if x is None or (not mapped and x.shape[0] == 1):
                return x
            if not mapped:
                x = jnp.broadcast_to(x, (size, *x.shape))
            elif x.shape[1] != batch:
                x = jnp.broadcast_to(x, (size, batch, *x.shape[2:]))
            return x.reshape(-1, *x.shape[2:])

        flat = [joined(x, mapped) for x, mapped in zip(operands, in_batched, strict=True)]
        out = batched(*flat)
        return out.reshape(size, -1, *out.shape[1:]), True

    return batched


def _einsum(call: _Call, a: Array, b: Array) -> Array:
    left, right = "zkm" if call.transpose_a else "zmk", "znk" if call.transpose_b else "zkn"
    if b.shape[0] != a.shape[0]:  # einsum takes no length of 1 for all
        if b.shape[0] == 1:
            b, right = b[0], right[1:]
        else:
            a, left = a[0], left[1:]
    return jnp.einsum(
        f"{left},{right}->zmn", a, b,
        precision=call.precision, preferred_element_type=jnp.float32,
    )  # fmt: skip


def _each(call: _Call, a: Array, b: Array) -> Array:
    """One product after the other, by a kernel of plain matrices."""
    multiply = (mosaic_tpu if call.implementation == "mosaic_tpu" else triton).matmul
    a = jnp.swapaxes(a, 1, 2) if call.transpose_a else a
    b = jnp.swapaxes(b, 1, 2) if call.transpose_b else b
    batch = max(a.shape[0], b.shape[0])
    return jnp.stack([multiply(a[z % a.shape[0]], b[z % b.shape[0]]) for z in range(batch)])


def _mosaic(call: _Call, a, b, scale, bias, residual):
    """Pads to what the copy engine takes, multiplies, and cuts the padding off."""
    M, K = a.shape[:0:-1] if call.transpose_a else a.shape[1:]
    N = b.shape[1] if call.transpose_b else b.shape[2]
    n = N // 2 if call.activation == "swiglu" else N
    M_padded = _up(M, 64 if call.transpose_a else 8)
    K_padded = _up(K, 8 if call.transpose_a and not call.transpose_b else 64)
    N_padded = _up(N, 64)
    a_shape, b_shape = (M_padded, K_padded), (K_padded, N_padded)
    a = _padded(a, a_shape[::-1] if call.transpose_a else a_shape)
    b = _padded(b, b_shape[::-1] if call.transpose_b else b_shape)
    bias = None if bias is None else _padded(bias, (N_padded,))
    n_padded = n + N_padded - N
    residual = None if residual is None else _padded(residual, (M_padded, n_padded))
    config = call.config
    if config is None:
        batch, blocks = max(a.shape[0], b.shape[0]), _compat.multiprocessors(call.interpret)
        pairs = call.activation == "swiglu"
        row = None
        if batch == 1 and not (pairs or call.transpose_a or call.transpose_b or call.interpret):
            row = configs.tuned(jax.devices()[0].device_kind).get((M, N, K))
        config = (
            mosaic_gpu.Config(**row["config"])
            if row
            else configs.choose(M, N, K, batch, blocks, pairs=pairs)
        )
    out = mosaic_gpu.matmul(
        a, b, scale, bias, residual, config=config, activation=call.activation,
        transpose_a=call.transpose_a, transpose_b=call.transpose_b, interpret=call.interpret,
    )  # fmt: skip
    return out[:, :M, :n]


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _padded(x: Array, shape: tuple[int, ...]) -> Array:
    """`x` with zeros after its last axes, which come to `shape`."""
    beyond = [(0, to - size) for size, to in zip(x.shape[1:], shape, strict=True)]
    return jnp.pad(x, [(0, 0), *beyond]) if any(after for _, after in beyond) else x
