"""The only module that knows jax-triton: launches a Triton kernel on arrays, in every version.

jax-triton 0.3 works with triton 3.6 and newer, jax-triton 0.4 with triton 3.7 and newer. 0.3 takes
`out_shape`, 0.4 takes `out_type`; jax 0.12 hands the rule for dead code one argument more than
jax-triton 0.4 takes. Importing jax-triton empties TRITON_CACHE_DIR, which other users of Triton in
the process read: it is put back.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import os
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import jax


def missing() -> str | None:
    """Why Triton kernels cannot be launched from JAX in this environment, or None if they can."""
    absent = [name for name in ("triton", "jax_triton") if importlib.util.find_spec(name) is None]
    if absent:
        return f"{' and '.join(absent)} not installed: pip install 'jaxinfra[triton]'"
    triton, jax_triton = version("triton"), version("jax-triton")
    if _numbers(triton) < ((3, 6) if _numbers(jax_triton) < (0, 4) else (3, 7)):
        return (
            f"jax-triton {jax_triton} does not work with triton {triton}: "
            "take 0.3.1 with triton 3.6 or newer, or 0.4.1 with 3.7 or newer"
        )
    return None


def capability() -> int:
    """10 times the compute capability of the GPU; that of an H100 where there is none."""
    device = jax.devices()[0]
    if device.platform != "gpu":
        return 90
    return int(device.compute_capability.replace(".", ""))


def refusal(platform: str | None = None) -> str | None:
    """Why Triton's kernels cannot run on arrays there, or None if they can."""
    platform = platform or jax.default_backend()
    if platform not in ("gpu", "cuda"):
        return f"Triton needs an NVIDIA GPU, and arrays are on {platform}"
    if reason := missing():
        return reason
    if capability() < 80:
        return f"it needs a compute capability of 8.0 or more, not {capability() / 10}"
    return None


def call(
    kernel: Any,
    inputs: Sequence[Any],
    outputs: Sequence[jax.ShapeDtypeStruct],
    *,
    programs: int,
    num_warps: int,
    num_stages: int,
    aliases: Mapping[int, int] | None = None,
    **constants: Any,
) -> list[jax.Array]:
    """Runs kernel(*inputs, *outputs, **constants) `programs` times; its outputs.

    aliases: inputs that are the buffers of outputs, by number.
    """
    triton_call, types = _triton_call()
    return triton_call(
        *inputs,
        kernel=kernel,
        grid=(programs,),
        num_warps=num_warps,
        num_stages=num_stages,
        compute_capability=capability(),
        input_output_aliases=dict(aliases or {}),
        **{types: list(outputs)},
        **constants,
    )


@functools.cache
def _triton_call() -> tuple[Any, str]:
    """jax-triton's function, mended, and its name for the types of the outputs."""
    kept = os.environ.get("TRITON_CACHE_DIR")
    jax_triton = importlib.import_module("jax_triton")
    if kept is None:
        os.environ.pop("TRITON_CACHE_DIR", None)
    else:
        os.environ["TRITON_CACHE_DIR"] = kept
    if "out_shape" in inspect.signature(jax_triton.triton_call).parameters:
        return jax_triton.triton_call, "out_shape"
    primitive = importlib.import_module("jax_triton.triton_lib").triton_kernel_call_p
    rules = importlib.import_module("jax._src.interpreters.partial_eval").dce_rules
    rules[primitive] = _keep
    return jax_triton.triton_call, "out_type"


def _keep(_used: list[bool], *live_and_equation: Any) -> tuple[list[bool], Any]:
    """The rule for dead code: a kernel's call stays, and so do its inputs."""
    equation = live_and_equation[-1]
    return [True] * len(equation.invars), equation


def _numbers(text: str) -> tuple[int, int]:
    major, minor = text.split(".")[:2]
    return int(major), int(minor)
