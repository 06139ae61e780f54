"""Norms and rotation of heads on one NVIDIA GPU: a Triton kernel beside XLA and torch.compile.

    python -m jaxinfra.kernels.rope_bench [FOLDER]

As `norm_bench` measures. The bytes that must move are those of q and k read and written, of the
tables of angles, and backward of what came back besides.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxinfra.errors import UserError
from jaxinfra.kernels.norm_bench import OURS, PEER, Case, compiled, report
from pallas_kernels.norm_rope import reference, supported, triton

SHAPES = ((8, 4096, 16, 8, 128), (8, 4096, 32, 8, 64), (1, 256, 16, 8, 128))
CONFIGS = (
    triton.Config(), triton.Config(tile=4096, programs=4),
    triton.Config(tile=4096, each=8, programs=4), triton.Config(tile=8192, each=32, programs=4),
)  # fmt: skip
OPTIONS: dict[str, Any] = {"eps": 1e-6, "plus_one": False}


def bench(out: Path | None = None) -> None:
    """Prints a table a shape and pass; with `out`, a folder, also writes the ledger's entries."""
    if reason := supported("triton", *SHAPES[0][2:], jnp.bfloat16):
        raise UserError(f"kernels bench rope: {reason}")
    report("rope", cases(), out)


def cases() -> Iterator[Case]:
    """Of every shape norm and rotation, both passes, and rotation alone."""
    for B, T, N, K, H in SHAPES:
        keys = jax.random.split(jax.random.key(0), 6)
        q, k, dq, dk = (
            jax.random.normal(key, (B, T, heads, H), jnp.bfloat16)
            for key, heads in zip(keys, (N, K, N, K), strict=False)
        )
        weights = tuple(jax.random.normal(key, (H,), jnp.bfloat16) for key in keys[4:])
        angle = jnp.arange(T)[None, :, None, None] * 1e6 ** (-jnp.arange(H // 2) / (H // 2))
        cos, sin = (jnp.broadcast_to(f(angle), (B, T, 1, H // 2)) for f in (jnp.cos, jnp.sin))
        size = f"{B}x{T}x{N}-{K}x{H}", f"{B} x {T:,} positions, heads {N}/{K} of {H}, bfloat16"
        moved, tables = 2 * (q.nbytes + k.nbytes), cos.nbytes + sin.nbytes
        heads, back = (q, k, cos, sin), (q, k, dq, dk, cos, sin, weights)
        yield Case(
            f"norm-rope-forward-{size[0]}", f"QK norm and RoPE, forward: {size[1]}",
            (*heads, weights), _runs(_forward, reference_forward), _exact(reference_forward),
            moved + tables, functools.partial(_torch, *heads, weights),
        )  # fmt: skip
        yield Case(
            f"norm-rope-backward-{size[0]}", f"QK norm and RoPE, backward: {size[1]}",
            back, _runs(_backward, reference_backward), _exact(reference_backward),
            moved * 3 // 2 + tables, functools.partial(_torch, *heads, weights, (dq, dk)),
        )  # fmt: skip
        yield Case(
            f"rope-forward-{size[0]}", f"RoPE alone: {size[1]}", (*heads, None),
            _runs(_forward, reference_forward), _exact(reference_forward), moved + tables,
            functools.partial(_torch, *heads, None),
        )  # fmt: skip


def _runs(ours: Callable[..., Any], peer: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
    return {f"{OURS} {c}": functools.partial(ours, c) for c in CONFIGS} | {PEER: peer}


def _flat(a):
    return a.reshape(-1, *a.shape[2:])


def _forward(config: triton.Config, q, k, cos, sin, weights):
    q_rows, k_rows, cos, sin = map(_flat, (q, k, cos, sin))
    out = triton.forward(q_rows, k_rows, cos[:, 0], sin[:, 0], weights, config=config, **OPTIONS)
    return [a.reshape(x.shape) for a, x in zip(out, (q, k), strict=True)]


def _backward(config: triton.Config, q, k, dq, dk, cos, sin, weights):
    rows = map(_flat, (q, k, dq, dk))
    cos, sin = (_flat(a)[:, 0] for a in (cos, sin))
    out = triton.backward(*rows, cos=cos, sin=sin, weights=weights, config=config, **OPTIONS)
    return [a.reshape(x.shape).astype(x.dtype) for a, x in zip(out, (q, k, *weights), strict=True)]


def reference_forward(q, k, cos, sin, weights):
    """Heads normed, where there are weights, and turned, by XLA."""
    return reference.norm_rope(q, k, cos, sin, *(weights or ()), **OPTIONS)


def reference_backward(q, k, dq, dk, cos, sin, weights):
    """Gradients of the heads and the weights by XLA."""
    pull = jax.vjp(lambda q, k, w: reference_forward(q, k, cos, sin, w), q, k, weights)[1]
    return pull((dq, dk))


def _exact(of: Callable[..., Any]) -> Callable[..., Any]:
    """The same in float32 throughout."""
    return lambda *arrays: of(*jax.tree.map(lambda a: a.astype(jnp.float32), arrays))


def _torch(q, k, cos, sin, weights, slopes=None) -> Callable[[], Any]:
    """What torch.compile makes of it."""
    import torch  # pyright: ignore[reportMissingImports]

    take = lambda a: torch.from_dlpack(a).clone()  # noqa: E731
    q, k, cos, sin = map(take, (q, k, cos, sin))
    weights = [] if weights is None else [take(w) for w in weights]

    def both(q, k, cos, sin, weights):
        found = []
        for i, x in enumerate((q, k)):
            wide = x.float()
            if weights:
                scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + OPTIONS["eps"])
                wide = wide * scale * weights[i].float()
            low, high = wide.chunk(2, -1)
            turned = torch.cat((low * cos - high * sin, high * cos + low * sin), -1)
            found.append(turned.to(x.dtype))
        return found

    run = compiled(both)
    if slopes is None:
        return lambda: run(q, k, cos, sin, weights)
    slopes = [take(a) for a in slopes]
    leaves = [a.requires_grad_() for a in (q, k, *weights)]
    made = run(leaves[0], leaves[1], cos, sin, leaves[2:])
    return lambda: torch.autograd.grad(made, leaves, slopes, retain_graph=True)


if __name__ == "__main__":
    bench(Path(sys.argv[1]) if sys.argv[1:] else None)
