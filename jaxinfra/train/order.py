"""The order of examples as a pure function: a keyed permutation that is computed, never stored.

A Feistel network permutes the numbers below a power of four; walking its cycles until they are
below n makes it a permutation of n (Black and Rogaway, CT-RSA 2002). So example i of epoch e is
known without having seen those before it: a run resumes from its step alone, on any number of
hosts. Cost: up to 4 passes of 6 rounds an index, about 0.3 us in numpy.
"""

from __future__ import annotations

import numpy as np

_ROUNDS = 6


def permute(index: np.ndarray, n: int, seed: int, epoch: int) -> np.ndarray:
    """Where each of the int64 `index` (all in [0, n)) goes in permutation (seed, epoch) of n."""
    if index.size and (index.min() < 0 or index.max() >= n):
        raise ValueError(f"permute: index outside [0, {n})")
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    keys = np.random.SeedSequence([seed, epoch]).generate_state(_ROUNDS, np.uint64)
    out = _feistel(index.astype(np.uint64), half, keys)
    outside = np.flatnonzero(out >= n)
    while outside.size:
        out[outside] = _feistel(out[outside], half, keys)
        outside = outside[out[outside] >= n]
    return out.astype(np.int64)


def _feistel(x: np.ndarray, half: int, keys: np.ndarray) -> np.ndarray:
    """A permutation of [0, 4^half)."""
    shift, mask = np.uint64(half), np.uint64((1 << half) - 1)
    left, right = x >> shift, x & mask
    for key in keys:
        left, right = right, left ^ (_mix(right ^ key) & mask)
    return (left << shift) | right


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64: every bit of the result hangs on every bit of x."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
