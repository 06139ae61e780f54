"""One token through a layer in one launch of a Triton kernel, for NVIDIA GPUs from 8.0 on.

Cost: every weight is read once; the schedule is in `triton_source.py`. All programs must be on the
chip at once, since they wait for each other: there is one for each multiprocessor, at most. Where
NVIDIA's MPS runs two processes' kernels side by side, two such kernels may wait for ever.

One H200, 28 layers of Qwen3-0.6B's shape at 640 tokens (`python -m
jaxinfra.kernels.decode_layer_bench`): 883 us a token, launches and gaps included, where reading
0.88 GB of weights as fast as a copy takes 248. The rest is four meetings a layer and what each
phase waits for behind one. Fetching later phases' weights into the L2 cache made it 953.
"""

from __future__ import annotations

import dataclasses
import itertools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import _triton_compat


@dataclasses.dataclass(frozen=True)
class Config:
    """Numbers of a tile of weights and its most columns, keys a step, warps: the best of eleven."""

    tile: int = 2**15
    columns: int = 4096
    keys: int = 64
    warps: int = 8

    def plan(self, rows: int, columns: int, programs: int) -> tuple[int, int, int]:
        """Rows of a program, rows of a tile, columns of a tile, for so many rows and columns."""
        each = -(-rows // programs)
        wide = min(_power(columns), self.columns, self.tile)
        return each, min(_power(each), self.tile // wide), wide


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
    return _triton_compat.call(
        triton_source.layer,
        [x, k_pages, v_pages, counters, *given, cos, sin, table, facts],
        [*(shape(a.shape, a.dtype) for a in (x, k_pages, v_pages, counters)),
         *(shape(s, jnp.float32) for s in scratch)],
        programs=programs, aliases={0: 0, 1: 1, 2: 2, 3: 3},
        **sizes(D, F, N, K, H, programs, config), PAGE=page, SCALE=scale, EPS=eps,
        NORMED=weights.q_norm is not None, BIAS=weights.qkv_bias is not None,
        FIRST=phases[0], LAST=phases[1], num_warps=config.warps, num_stages=2,
    )  # fmt: skip


def sizes(D: int, F: int, N: int, K: int, H: int, programs: int, config: Config) -> dict[str, int]:
    """Constants of the kernel for a layer's shape."""
    half = dataclasses.replace(config, tile=config.tile // 2)  # two tiles at once
    plans = {
        "QKV": config.plan((N + 2 * K) * H, D, programs), "O": config.plan(D, N * H, programs),
        "GU": half.plan(F, D, programs), "D": config.plan(D, F, programs),
    }  # fmt: skip
    names = [f"{kind}_{phase}" for phase in plans for kind in ("EACH", "ROWS", "COLS")]
    return {
        "D": D, "F": F, "N": N, "K": K, "H": H, "PROGRAMS": programs, "SPLITS": programs // K,
        "KEYS": config.keys, "GROUP": max(16, _power(N // K)),
        **dict(zip(names, itertools.chain(*plans.values()), strict=True)),
    }  # fmt: skip


def _power(n: int) -> int:
    """The least power of two that is n or more."""
    return 1 << (n - 1).bit_length()
