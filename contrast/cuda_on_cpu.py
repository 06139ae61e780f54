"""CUDA C without a GPU: a kernel's text compiled for this CPU, run, and every access counted.

`run(SOURCE, "kernel", grid, block, arrays and ints...)` compiles the text as C++ with what is
installed (g++ or clang++), runs a thread for each thread of a block, and returns what each warp
asked of global and of shared memory, in the units of `contrast.warp_memory`. The text is plain
CUDA C: `nvcc` compiles the same. What is here: one kernel, arrays and numbers as arguments,
`__shared__` arrays of fixed size, `__syncthreads`, `float4`. Warps that diverge are counted by how
often each thread came by an instruction.

    python -m contrast.cuda_on_cpu
"""

from __future__ import annotations

import atexit
import collections
import ctypes
import dataclasses
import functools
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from contrast import warp_memory
from jaxinfra.errors import UserError

_HERE = Path(__file__).parent


@dataclasses.dataclass(frozen=True)
class Traffic:
    """One kind of access of a whole launch."""

    requests: int  # instructions, one a warp
    units: int  # sectors of global memory, passes over the banks of shared memory
    least: int  # units if threads had taken the same bytes side by side


TRANSPOSE = """
__global__ void naive(const float* in, float* out, int n) {
  int x = blockIdx.x * 32 + threadIdx.x, y = blockIdx.y * 32 + threadIdx.y;
  out[x * n + y] = in[y * n + x];
}

__global__ void tiled(const float* in, float* out, int n) {
  __shared__ float tile[32][32];
  int x = blockIdx.x * 32 + threadIdx.x, y = blockIdx.y * 32 + threadIdx.y;
  tile[threadIdx.y][threadIdx.x] = in[y * n + x];
  __syncthreads();
  x = blockIdx.y * 32 + threadIdx.x, y = blockIdx.x * 32 + threadIdx.y;
  out[y * n + x] = tile[threadIdx.x][threadIdx.y];
}

__global__ void padded(const float* in, float* out, int n) {
  __shared__ float tile[32][33];
  int x = blockIdx.x * 32 + threadIdx.x, y = blockIdx.y * 32 + threadIdx.y;
  tile[threadIdx.y][threadIdx.x] = in[y * n + x];
  __syncthreads();
  x = blockIdx.y * 32 + threadIdx.x, y = blockIdx.x * 32 + threadIdx.y;
  out[y * n + x] = tile[threadIdx.x][threadIdx.y];
}
"""


def missing() -> str | None:
    """Why no kernel can be compiled here, or None."""
    if shutil.which("g++") or shutil.which("clang++"):
        return None
    return "no C++ compiler: install g++ (apt-get install g++)"


def run(
    source: str, kernel: str, grid: tuple[int, ...], block: tuple[int, ...],
    *arguments: np.ndarray | int | float,
) -> dict[str, Traffic]:  # fmt: skip
    """Launches `kernel` of `source`; arrays are written in place. Traffic by "global read" etc.

    Raises UserError where there is no compiler, where the text does not compile, and for a block
    that a GPU would refuse.
    """
    if reason := missing():
        raise UserError(reason)
    grid3, block3 = ((*sizes, 1, 1)[:3] for sizes in (grid, block))
    if not 0 < np.prod(block3) <= 1024:
        raise UserError(f"{kernel}: a block of {np.prod(block3)} threads; a GPU takes 1 to 1,024")
    with tempfile.TemporaryDirectory() as folder:
        library = ctypes.CDLL(str(_compile(source, kernel, Path(folder))))
    values = [_value(argument) for argument in arguments]
    pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(v) for v in values))
    library.run.restype = library.shared_begins.restype = library.shared_ends.restype = (
        ctypes.c_int64
    )
    library.accesses.restype = ctypes.c_void_p
    count = library.run(
        library.one_thread, pointers, (ctypes.c_uint * 3)(*grid3), (ctypes.c_uint * 3)(*block3)
    )
    log = np.zeros((count, 6), np.int64)
    if count:
        ctypes.memmove(log.ctypes.data, library.accesses(), log.nbytes)
    spaces = [("shared", library.shared_begins(), library.shared_ends())]
    for a in arguments:
        if isinstance(a, np.ndarray):
            spaces.append(("global", a.ctypes.data, a.ctypes.data + a.nbytes))
    return _count(log, spaces)


def _compile(source: str, kernel: str, folder: Path) -> Path:
    text = f'#include "cuda_on_cpu.h"\n#line 1 "kernel.cu"\n{source}\n'
    text += f'extern "C" void one_thread(void** arguments) {{ call({kernel}, arguments); }}\n'
    made, written = folder / "kernel.so", folder / "kernel.cpp"
    written.write_text(text)
    try:
        _compiler("-fsanitize=thread", "-c", str(written), "-o", f"{written}.o")
        _compiler("-shared", "-pthread", f"{written}.o", _runtime(), "-o", str(made))
    except subprocess.CalledProcessError as error:
        raise UserError(f"{kernel}: it does not compile\n{error.stderr}") from None
    return made


@functools.cache
def _runtime() -> str:
    """What every kernel is linked with, compiled once a process."""
    folder = tempfile.TemporaryDirectory()
    atexit.register(folder.cleanup)
    made = f"{folder.name}/cuda_on_cpu.o"
    _compiler("-c", str(_HERE / "cuda_on_cpu.cpp"), "-o", made)
    return made


def _compiler(*arguments: str) -> None:
    compiler = shutil.which("g++") or shutil.which("clang++") or "g++"
    options = ["-std=c++20", "-O1", "-fPIC", "-w", f"-I{_HERE}"]
    subprocess.run([compiler, *options, *arguments], check=True, capture_output=True, text=True)


def _value(argument: np.ndarray | int | float) -> ctypes._SimpleCData:
    if isinstance(argument, np.ndarray):
        if not argument.flags.c_contiguous:
            raise UserError("an argument is no contiguous array; give numpy.ascontiguousarray(it)")
        return ctypes.c_void_p(argument.ctypes.data)
    return ctypes.c_int(argument) if isinstance(argument, int) else ctypes.c_float(argument)


def _count(log: np.ndarray, spaces: list[tuple[str, int, int]]) -> dict[str, Traffic]:
    totals: dict[str, list[int]] = collections.defaultdict(lambda: [0, 0, 0])
    for kind, size, addresses in _requests(log, spaces):
        measure = warp_memory.sectors if kind.startswith("global") else warp_memory.passes
        side_by_side = [size * i for i in range(len({*addresses}))]
        total = totals[kind]
        total[0] += 1
        total[1] += measure(addresses, size)
        total[2] += measure(side_by_side, size)
    return {kind: Traffic(*total) for kind, total in sorted(totals.items())}


def _requests(
    log: np.ndarray, spaces: list[tuple[str, int, int]]
) -> Iterator[tuple[str, int, list[int]]]:
    """Kind, bytes a thread, and offsets, of every instruction of every warp."""
    met: collections.Counter = collections.Counter()
    requests: dict[tuple, list[int]] = collections.defaultdict(list)
    for block, thread, instruction, address, size, write in log.tolist():
        found = next((s for s in spaces if s[1] <= address < s[2]), None)
        if found is None:  # the thread's own memory, or its indices
            continue
        turn = met[block, thread, instruction]
        met[block, thread, instruction] += 1
        kind = f"{found[0]} {'write' if write else 'read'}"
        warp = thread // warp_memory.WARP
        requests[block, warp, instruction, turn, kind, size].append(address - found[1])
    for (*_, kind, size), addresses in requests.items():
        yield kind, size, addresses


def main() -> None:
    """Prints what three ways to transpose ask of memory."""
    from contrast.show import table

    n, rows = 64, []
    x = np.arange(n * n, dtype=np.float32).reshape(n, n)
    for name in ("naive", "tiled", "padded"):
        out = np.zeros_like(x)
        for kind, t in run(TRANSPOSE, name, (n // 32, n // 32), (32, 32), x, out, n).items():
            rows.append([name, kind, t.requests, t.units, t.least])
        assert (out == x.T).all(), name
    print(table(["transpose", "access", "requests", "sectors or passes", "least"], rows))


if __name__ == "__main__":
    main()
