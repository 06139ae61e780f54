"""The only module that knows jax versions: above it, kernels for Hopper are spelled one way.

jax 0.10.2 keeps its GPU interpreter private and lowers by lanes unless told otherwise; from 0.11 on
the interpreter is public and lowering by warpgroups is the default.
"""

from __future__ import annotations

import functools
import importlib
import threading
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu

Accumulator: Any = plgpu.WGMMAAccumulatorRef

_INTERPRETER = "jax._src.pallas.mosaic_gpu.interpret"
_OLD = not hasattr(plgpu, "InterpretGPUParams")  # jax 0.10
# jax 0.10 interprets no cluster's barriers, takes no notice of stores that are not committed, and
# may wait for ever where a copy overtakes a reader.
WHOLE_INTERPRETER = not _OLD
MUTABLE_UNDER_CUSTOM_VMAP = not _OLD  # a function with its own batching may make mutable arrays


def interpret_params() -> Any:
    """What `interpret=` takes to run a kernel on a CPU with the race detector on."""
    if _OLD:
        _compile_once()
        params = importlib.import_module(f"{_INTERPRETER}.params")
        return params.InterpretGPUParams(detect_races=True, num_tma_threads_per_device=1)
    params: Any = getattr(plgpu, "InterpretGPUParams")  # noqa: B009 (jax 0.10 has none)
    return params(detect_races=True, num_tma_threads_per_device=5)


@functools.cache
def _compile_once() -> None:
    """Lets the interpreter's threads share a program, as newer versions do.

    jax 0.10 compiles the kernel for each thread of each block, which is most of what it costs.
    """
    threads: Any = importlib.import_module("jax._src.pallas.mosaic.interpret.thread_map")
    lock, programs = threading.Lock(), {}

    def run(jaxpr, consts, *args):
        with lock:
            if jaxpr not in programs:
                programs.clear()  # another kernel's
                of = jax.jit(functools.partial(threads.jax_core.eval_jaxpr, jaxpr))
                programs[jaxpr] = of.lower(consts, *args).compile()
            program = programs[jaxpr]
        program(consts, *args)

    threads._run_jaxpr = run


def races_found() -> bool:
    """Whether the kernel interpreted last raced; newer versions raise in the kernel instead."""
    races = importlib.import_module(f"{_INTERPRETER}.gpu_callbacks")._races
    return bool(races is not None and getattr(races, "races_found", False))


def reset_interpreter() -> None:
    """Forgets what an interpreted kernel that failed has left behind."""
    importlib.import_module(f"{_INTERPRETER}.gpu_callbacks").reset_gpu_interpret_mode_state()


def compiler_params(**options: Any) -> Any:
    """Compiler parameters with layouts inferred for whole warpgroups, in every version."""
    semantics = plgpu.LoweringSemantics.Warpgroup
    return plgpu.CompilerParams(lowering_semantics=semantics, **options)


def kernel(
    body: Any,
    *,
    out_type: Any,
    scratch_types: Any,
    compiler_params: Any,
    interpret: Any,
    **mesh: Any,
) -> Any:
    """`plgpu.kernel` that also takes mutable arrays, which the kernel changes in place.

    That one does from jax 0.12 on: before, the rule that batches it stands in the way.
    """

    def scoped(*refs):
        inner = functools.partial(body, *refs)
        pl.run_scoped(inner, *scratch_types, collective_axes=mesh["thread_name"])

    return pl.kernel(
        scoped,
        out_type=out_type,
        mesh=plgpu.Mesh(**mesh),
        compiler_params=compiler_params,
        interpret=interpret,
        name=body.__name__,
    )


def load_plainly(ref: Any, interpret: Any) -> Any:
    """What a reference to global memory holds, without asking for wide loads."""
    if interpret:
        return ref[...]
    if _OLD:
        old_load: Any = plgpu.load
        return old_load(ref, (), optimized=False)
    new_load: Any = plgpu.load
    return new_load(ref, optimized=False)


def compute_capability() -> str | None:
    """That of the first GPU, as "9.0"; None where there is none."""
    device = jax.devices()[0]
    return str(device.compute_capability) if device.platform == "gpu" else None


def not_hopper(platform: str) -> str | None:
    """Why kernels in Mosaic GPU cannot run on arrays there, or None if they can."""
    if platform not in ("gpu", "cuda"):
        return f"Mosaic GPU needs an NVIDIA Hopper GPU, and arrays are on {platform}"
    if (capability := compute_capability()) not in (None, "9.0"):
        return f"Mosaic GPU's kernels are for compute capability 9.0 (Hopper), not {capability}"
    return None


def multiprocessors(interpret: Any) -> int:
    """Blocks that a persistent kernel starts: one a multiprocessor; two where it is interpreted.

    Lowered on a machine without a GPU: those of an H100.
    """
    if interpret:
        return 2
    device = jax.devices()[0]
    return device.core_count if device.platform == "gpu" else 132
