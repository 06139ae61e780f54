"""Which schedule a product on Hopper takes: the tuned one, or one by a model of waves of tiles.

`tuned.json` holds, by device, what `jaxinfra kernels tune` found fastest for a shape, with its
speed and XLA's.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pallas_kernels.matmul.mosaic_gpu import Config

# Of each schedule: its share of the best speed inside a long product, and what a tile's epilogue
# costs, as a length of K; both fitted to measurements on an H200.
CANDIDATES = (
    (Config(128, 256, 64, slots=4), 1.0, 96),
    (Config(128, 192, 64, slots=4, ping_pong=True), 1.0, 24),
    (Config(128, 128, 64, slots=6, ping_pong=True), 0.94, 24),
)
FEW_ROWS = 64
TUNED = Path(__file__).with_name("tuned.json")
OF_FEW_ROWS = Config(64, 32, 256, slots=4, cluster=2, beside=True, ping_pong=True)


@functools.cache
def tuned(device: str) -> Mapping[tuple[int, int, int], Mapping[str, Any]]:
    """What was measured on `device`, by M, N and K."""
    rows = json.loads(TUNED.read_text()).get(device, []) if TUNED.exists() else []
    return {(row["M"], row["N"], row["K"]): row for row in rows}


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


def describe(c: Config) -> str:
    """The schedule in words and its shared memory."""
    kind = "ping-pong, a tile a warpgroup" if c.ping_pong else "cooperative, a tile a block"
    if c.cluster > 1:
        place = "side by side" if c.beside else "one below the other"
        kind += f", {c.cluster} blocks {place} share copies"
    tile = f"{c.tile_m} x {c.tile_n} tiles, {c.slots} slots of {c.tile_k}, bands of {c.band}"
    return f"{kind}; {tile}; {c.shared_memory:,} bytes of shared memory"
