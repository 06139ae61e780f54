"""What a warp's 32 addresses cost: sectors of global memory, passes over shared memory's banks.

A warp's load is one instruction with 32 addresses. Global memory answers in sectors of 32 bytes:
the fewer distinct ones, the better (*coalescing*). Shared memory has 32 banks of 4 bytes, word i
lies in bank i mod 32, and each bank serves one word a pass: as many passes as the fullest bank has
distinct words (*bank conflicts*); the same word for many threads is one. Of accesses of 8 and 16
bytes a half and a quarter of the warp go together. (NVIDIA, CUDA C++ Programming Guide, device
memory accesses.)

    python -m contrast.warp_memory
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

WARP, SECTOR, BANKS, WORD = 32, 32, 32, 4


def sectors(addresses: Iterable[int], size: int = 4) -> int:
    """Sectors that accesses of `size` bytes at byte `addresses` touch."""
    touched = {
        sector for a in addresses for sector in range(a // SECTOR, (a + size - 1) // SECTOR + 1)
    }
    return len(touched)


def least_sectors(addresses: Iterable[int], size: int = 4) -> int:
    """Sectors that the same bytes would take if they lay side by side."""
    return -(-len({*addresses}) * size // SECTOR)


def passes(addresses: Iterable[int], size: int = 4) -> int:
    """Passes over the banks of shared memory for accesses of `size` bytes of one warp."""
    each = [*addresses]
    together = WARP * WORD // max(size, WORD)  # threads that go together
    return sum(_passes(each[i : i + together], size) for i in range(0, len(each), together))


def _passes(addresses: list[int], size: int) -> int:
    words: dict[int, set[int]] = {}
    for address in addresses:
        for word in range(address // WORD, (address + size - 1) // WORD + 1):
            words.setdefault(word % BANKS, set()).add(word)
    return max(map(len, words.values()), default=0)


def swizzled(row: int, byte: int) -> int:
    """Where byte `byte` of row `row` lies, rows of 128 bytes: Hopper's 128-byte swizzle.

    The 16-byte chunk's number is XORed with the row's, modulo 8; TMA writes so and the tensor cores
    read so (PTX ISA, swizzling modes).
    """
    chunk, within = divmod(byte, 16)
    return row * 128 + (chunk ^ (row % 8)) * 16 + within


def patterns() -> dict[str, tuple[int, int, int]]:
    """Of some index functions, by name: sectors, the least there could be, passes of the banks."""
    lane = np.arange(WARP)
    named = {
        "x[i]": 4 * lane,
        "x[i + 1]": 4 * (lane + 1),
        "x[2 i]": 4 * 2 * lane,
        "x[32 i], a column of 32": 4 * 32 * lane,
        "x[33 i], a column of 32 padded to 33": 4 * 33 * lane,
        "x[0]": 0 * lane,
        "x[7 i mod 32], scattered in one line": 4 * (7 * lane % WARP),
    }
    return {
        name: (sectors(a.tolist()), least_sectors(a.tolist()), passes(a.tolist()))
        for name, a in named.items()
    }


def main() -> None:
    """Prints the patterns."""
    from contrast.show import table

    print(table(["floats of a warp", "sectors", "least", "passes"],
                [[name, *counts] for name, counts in patterns().items()]))  # fmt: skip


if __name__ == "__main__":
    main()
