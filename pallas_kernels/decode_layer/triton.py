"""One token through a layer in one launch of a Triton kernel, for NVIDIA GPUs from 8.0 on.

Cost: every weight is read once; the schedule is in `triton_source.py`. All programs must be on the
chip at once, since they wait for each other: there is one for each multiprocessor, at most.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import _triton_compat


@dataclasses.dataclass(frozen=True)
class Config:
    """Columns of a tile of weights, its most rows, keys a step, warps; whether weights are fetched
    into the L2 cache ahead."""

    columns: int = 512
    rows: int = 16
    keys: int = 64
    warps: int = 8
    ahead: bool = True


def launch(
    x: Float[Array, " D"],
    k_pages: Float[Array, "P K page H"],
    v_pages: Float[Array, "P K page H"],
    counters: Int[Array, " c"],
    weights,
    cos: Float[Array, " h"],
    sin: Float[Array, " h"],
    table: Int[Array, " M"],
    facts: Int[Array, " 2"],
    *,
    scale: float,
    eps: float,
    programs: int,
    config: Config = Config(),
    phases: tuple[int, int] = (0, 4),
) -> list[Array]:
    """x, pages and counters after the layer, then scratch: all are outputs of the one kernel."""
    from pallas_kernels.decode_layer import triton_source

    (_, K, page, H), D = k_pages.shape, x.shape[0]
    N, F = weights.o.shape[1] // H, weights.down.shape[1]
    splits = programs // K
    shape = jax.ShapeDtypeStruct
    scratch = [((N + 2 * K) * H,), (splits, N, H), (splits, N), (N * H,), (F,)]
    absent = weights.attn_norm
    given = [absent if w is None else w for w in (
        weights.attn_norm, weights.qkv, weights.qkv_bias, weights.q_norm, weights.k_norm,
        weights.o, weights.mlp_norm, weights.gate_up, weights.down,
    )]  # fmt: skip
    rows = {
        name: _rows(count, programs, config.rows)
        for name, count in {"QKV": (N + 2 * K) * H, "O": D, "GU": F, "D": D}.items()
    }
    return _triton_compat.call(
        triton_source.layer,
        [x, k_pages, v_pages, counters, *given, cos, sin, table, facts],
        [*(shape(a.shape, a.dtype) for a in (x, k_pages, v_pages, counters)),
         *(shape(s, jnp.float32) for s in scratch)],
        programs=programs, aliases={0: 0, 1: 1, 2: 2, 3: 3},
        D=D, F=F, N=N, K=K, H=H, PAGE=page, SCALE=scale, EPS=eps,
        NORMED=weights.q_norm is not None, BIAS=weights.qkv_bias is not None,
        PROGRAMS=programs, SPLITS=splits, KEYS=config.keys, COLS=config.columns,
        **{f"ROWS_{name}": count for name, count in rows.items()},
        AHEAD=config.ahead, FIRST=phases[0], LAST=phases[1],
        num_warps=config.warps, num_stages=2,
    )  # fmt: skip


def _rows(count: int, programs: int, most: int) -> int:
    """Rows of a tile for which a program has the fewest in all; of those, the largest tile."""
    sizes = [1 << i for i in range(most.bit_length())]
    return min(sizes, key=lambda size: (-(-count // (size * programs)) * size, -size))
