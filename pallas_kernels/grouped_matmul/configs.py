"""Which schedule a grouped product on Hopper takes, by its shape."""

from __future__ import annotations

from pallas_kernels.grouped_matmul.ping_pong import Config

# Columns a tile, and the share of the best speed inside a long product that such tiles reach.
WIDTHS = ((192, 1.0), (128, 0.94))
FEW_ROWS = 64  # a group; more would leave most of a tile of 128 empty


def choose(M: int, N: int, G: int) -> Config:
    """For [M, K] rows in G groups and N columns."""
    if M <= FEW_ROWS * G:
        return Config(64, 128, 128, slots=3)
    return Config(128, _width(N))


def choose_wgrad(N: int) -> Config:
    """For matrices of N columns."""
    return Config(128, _width(N))


def _width(N: int) -> int:
    return min(WIDTHS, key=lambda width: -(-N // width[0]) * width[0] / width[1])[0]
