"""Which schedule a product on Hopper takes: by a model of waves of tiles, fitted on an H200."""

from __future__ import annotations

import math

from pallas_kernels.matmul.mosaic_gpu import Config

# Of each schedule: its share of the best speed inside a long product, and what a tile's epilogue
# costs, as a length of K; both fitted to measurements on an H200.
CANDIDATES = (
    (Config(128, 256, 64, slots=4), 1.0, 96),
    (Config(128, 192, 64, slots=4, ping_pong=True), 1.0, 24),
    (Config(128, 128, 64, slots=6, ping_pong=True), 0.94, 24),
)
FEW_ROWS = 64
OF_FEW_ROWS = Config(64, 32, 256, slots=4, cluster=2, beside=True, ping_pong=True)


def choose(M: int, N: int, K: int, batch: int, blocks: int, *, pairs: bool) -> Config:
    """The schedule that `blocks` multiprocessors end soonest with, by the model above.

    `pairs`: the epilogue joins columns two by two, so that a tile must hold whole pairs of 64.
    """
    if M <= FEW_ROWS and not pairs:
        return OF_FEW_ROWS
    usable = [c for c in CANDIDATES if not (pairs and c[0].tile_n % 128)]
    return min(usable, key=lambda candidate: _spent(M, N, K, batch, blocks, *candidate))[0]


def _spent(
    M: int, N: int, K: int, batch: int, blocks: int, c: Config, speed: float, epilogue: int
) -> float:
    tiles = batch * math.ceil(M / c.tile_m) * math.ceil(N / c.tile_n)
    depth = math.ceil(K / c.tile_k) * c.tile_k + epilogue
    return math.ceil(tiles / blocks) * c.tile_m * c.tile_n * depth / speed
