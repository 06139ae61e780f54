"""The Triton kernels that `torch.compile` writes, read on a machine that has no GPU.

Inductor chooses a language by device: C++ on a CPU, Triton on a GPU. It can be told to write
Triton for a CPU too, which needs a compiler that few have; but the program's text is finished
before that compiler is asked, and here it is taken at that moment and the rest is left undone.

    python -m contrast.inductor_source
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import re
from collections.abc import Callable, Iterator
from typing import Any

from contrast import peer
from jaxinfra.errors import UserError


class _Written(Exception):
    """The program's text is there; nothing after it is wanted."""


def program(function: Callable, *args: Any) -> str:
    """The text of Inductor's program for function(*args): kernels in Triton and what launches them.

    args: CPU tensors that need no gradient. Raises UserError where Triton is not installed.
    """
    torch = peer.compile_afresh()
    if importlib.util.find_spec("triton") is None:
        raise UserError("Triton is not installed: pip install 'jaxinfra[triton]'")
    with (
        _triton_for_cpu() as texts,
        contextlib.suppress(_Written, torch._inductor.exc.InductorError),
    ):
        torch.compile(function)(*args)
    if not texts:
        raise UserError("Inductor wrote no program; this torch names its parts differently")
    return texts[0]


@contextlib.contextmanager
def _triton_for_cpu() -> Iterator[list[str]]:
    """Inductor writes Triton for CPU tensors, and stops with the text in the list."""
    config = peer.load("torch._inductor.config")
    lowering = peer.load("torch._inductor.graph").GraphLowering
    triton = peer.load("torch.utils._triton")
    kept = config.cpu_backend, lowering.save_output_code, triton.triton_hash_with_backend
    texts: list[str] = []

    def stop(text: str) -> None:
        texts.append(text)
        raise _Written

    config.cpu_backend = "triton"
    lowering.save_output_code = staticmethod(stop)
    triton.triton_hash_with_backend = lambda: "none"  # asks for a GPU's driver
    try:
        yield texts
    finally:
        config.cpu_backend, lowering.save_output_code, triton.triton_hash_with_backend = kept


def kernels(text: str) -> dict[str, str]:
    """The source of each kernel of a program, by name, without what autotuning is told."""
    found = re.findall(r"@triton\.jit\n(def (\w+)\(.*?)\n''',", text, re.DOTALL)
    return {name: source for source, name in found}


def launches(text: str) -> list[str]:
    """What the program launches, in order: its own kernels, Triton or C++, and library calls."""
    own = r"(?:(triton_\w+)\.run|(cpp_fused\w*)|extern_kernels\.(\w+))"
    return ["".join(names) for names in re.findall(rf"^\s+{own}\(", text, re.MULTILINE)]


def main() -> None:
    """Prints the kernels of a normalisation with a gate."""
    from contrast.fusion import gated_norm

    torch = peer.torch()
    text = program(lambda x, g: gated_norm(torch, x, g), torch.ones(64, 256), torch.ones(256))
    for name, source in kernels(text).items():
        print(f"# {name}\n{source}\n")
    print("launched:", ", ".join(launches(text)))


if __name__ == "__main__":
    main()
