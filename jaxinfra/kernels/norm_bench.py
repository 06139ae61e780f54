"""Norms behind a residual sum on one NVIDIA GPU: a Triton kernel beside XLA and torch.compile.

    python -m jaxinfra.kernels.norm_bench [FOLDER]

Contestants take turns in one process, by device time, on normal bfloat16 data; each is first held
to the specification in float32. Rates are the bytes that must move, read once and written once,
over the seconds: forward 4 M D numbers, backward 4 M D too. Backward is timed alone, from the sum.
FOLDER gets the ledger's entries.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from jaxinfra.errors import UserError
from jaxinfra.hardware.detect import here
from jaxinfra.measure import Entry, environment, write
from jaxinfra.measure.compare import ratio_interval
from jaxinfra.measure.turns import device_turns
from pallas_kernels.rms_norm import reference, supported, triton

SHAPES = ((8 * 4096, 1024), (8 * 4096, 2048), (256, 1024))
CONFIGS = (
    triton.Config(), triton.Config(tile=4096, programs=4),
    triton.Config(tile=4096, each=8, programs=4), triton.Config(tile=8192, each=32, programs=4),
    triton.Config(tile=4096, programs=2, stages=2),
)  # fmt: skip
OURS, PEER, TORCH = "jaxinfra", "XLA", "torch.compile"
OPTIONS: dict[str, Any] = {"eps": 1e-6, "plus_one": False}


@dataclasses.dataclass(frozen=True)
class Case:
    """A pass over some arrays: contestants of them, their answer, and the bytes that must move."""

    name: str
    claim: str
    arrays: tuple[Any, ...]
    runs: Mapping[str, Callable[..., Any]]
    wanted: Callable[..., Any]
    moved: int
    torch: Callable[[], Any] | None = None


def bench(out: Path | None = None) -> None:
    """Prints a table a shape and pass; with `out`, a folder, also writes the ledger's entries."""
    if reason := supported("triton", SHAPES[0][1], jnp.bfloat16):
        raise UserError(f"kernels bench norm: {reason}")
    report("norm", cases(), out)


def cases() -> Iterator[Case]:
    """Forward and backward of every shape."""
    for M, D in SHAPES:
        keys = jax.random.split(jax.random.key(0), 5)
        rows = [jax.random.normal(key, (M, D), jnp.bfloat16) for key in keys[:4]]
        weight = jax.random.normal(keys[4], (D,), jnp.bfloat16)
        moved, size = 4 * M * D * 2, f"{M:,} rows of {D:,}, bfloat16"
        forward = {f"{OURS} {c}": functools.partial(_forward, c) for c in CONFIGS}
        yield Case(
            f"norm-forward-{M}x{D}", f"Sum and RMSNorm, forward: {size}",
            (*rows[:2], weight), forward | {PEER: reference_forward}, _exact(reference_forward),
            moved, functools.partial(_torch, *rows, weight, backward=False),
        )  # fmt: skip
        backward = {f"{OURS} {c}": functools.partial(_backward, c) for c in CONFIGS}
        yield Case(
            f"norm-backward-{M}x{D}", f"Sum and RMSNorm, backward: {size}",
            (rows[0], *rows[2:], weight), backward | {PEER: reference_backward},
            _exact(reference_backward), moved,
            functools.partial(_torch, *rows, weight, backward=True),
        )  # fmt: skip


def _forward(config: triton.Config, x, residual, weight):
    return triton.forward(x, residual, weight, config=config, **OPTIONS)


def _backward(config: triton.Config, total, dtotal, dout, weight):
    dx, dweight = triton.backward(total, dtotal, dout, weight, config=config, **OPTIONS)
    return dx, dweight.astype(weight.dtype)


def reference_forward(x, residual, weight):
    """Sum and norm by XLA."""
    return reference.add_rms_norm(x, residual, weight, **OPTIONS)


def reference_backward(total, dtotal, dout, weight):
    """Gradients of the sum and the weight by XLA."""
    pull = jax.vjp(lambda x, w: reference.rms_norm(x, w, **OPTIONS), total, weight)[1]
    dx, dweight = pull(dout)
    return dx + dtotal, dweight


def _exact(of: Callable[..., Any]) -> Callable[..., Any]:
    """The same in float32 throughout."""
    return lambda *arrays: of(*(a.astype(jnp.float32) for a in arrays))


def _torch(x, residual, dtotal, dout, weight, *, backward: bool) -> Callable[[], Any]:
    """What torch.compile makes of it."""
    import torch  # pyright: ignore[reportMissingImports]

    x, residual, dtotal, dout, weight = (
        torch.from_dlpack(a).clone() for a in (x, residual, dtotal, dout, weight)
    )

    def both(x, residual, weight):
        total = x + residual
        return total, torch.nn.functional.rms_norm(total, weight.shape, weight, OPTIONS["eps"])

    run = compiled(both)
    if not backward:
        return lambda: run(x, residual, weight)
    leaves = [a.requires_grad_() for a in (x, weight)]
    made = run(leaves[0], torch.zeros_like(x), leaves[1])
    return lambda: torch.autograd.grad(made, leaves, (dtotal, dout), retain_graph=True)


def compiled(function: Callable[..., Any]) -> Any:
    """What torch.compile makes of `function`: for its own shapes, its backward callable twice."""
    import torch  # pyright: ignore[reportMissingImports]
    import torch._functorch.config  # pyright: ignore[reportMissingImports]

    torch._functorch.config.donated_buffer = False
    torch._dynamo.reset()
    return torch.compile(function)


def report(kernel: str, of: Iterator[Case], out: Path | None) -> None:
    """Times every case, prints its table and writes its entry."""
    console = Console(width=110)
    for case in of:
        runs = _held(case)
        if PEER not in runs or len(runs) < 2:
            console.print(f"{case.claim}: left out, nothing to compare")
            continue
        seconds, clock = device_turns(runs, rounds=3, calls=5)
        console.print(case.claim)
        table = Table("", "us", "TB/s")
        for name in sorted(seconds, key=lambda name: median(seconds[name])):
            took = median(seconds[name])
            table.add_row(name, f"{took * 1e6:.1f}", f"{case.moved / took / 1e12:.2f}")
        console.print(table)
        entry = _entry(kernel, case, seconds, clock)
        if out is not None and entry is not None:
            write(entry, out)


def _held(case: Case) -> dict[str, Callable[[], Any]]:
    """Those that give what is wanted, compiled."""
    wanted, good = jax.jit(case.wanted)(*case.arrays), {}
    for name, of in case.runs.items():
        run = functools.partial(jax.jit(of), *case.arrays)
        try:
            off = max(map(_off, jax.tree.leaves(run()), jax.tree.leaves(wanted)))
        except Exception as error:  # a compiler's, of any class
            reason = (str(error).strip() or repr(error)).splitlines()[0]
            print(f"{case.name}: {name}: {reason:.200}")
            continue
        if off < 0.02:
            good[name] = run
        else:
            print(f"{case.name}: {name} is off by {off:.2g}; left out")
    return good | _of_torch(case, wanted)


def _of_torch(case: Case, wanted: Any) -> dict[str, Callable[[], Any]]:
    """torch's call, waited for, where there is torch with a GPU and it gives what is wanted."""
    if case.torch is None or importlib.util.find_spec("torch") is None:
        return {}
    import torch  # pyright: ignore[reportMissingImports]

    try:
        run = case.torch()

        def call():
            found = run()
            torch.cuda.synchronize()
            return found

        found = [jnp.asarray(a.detach().float().cpu().numpy()) for a in call()]
        off = max(map(_off, found, jax.tree.leaves(wanted)))
    except Exception as error:
        print(f"{case.name}: {TORCH}: {str(error).partition(chr(10))[0]:.200}")
        return {}
    if not off < 0.02:
        print(f"{case.name}: {TORCH} is off by {off:.2g}; left out")
        return {}
    return {TORCH: call}


@jax.jit
def _distance(got: jax.Array, want: jax.Array) -> jax.Array:
    """The largest difference, and the mean one, as shares of what is wanted."""
    off = jnp.abs(got.astype(jnp.float32) - want)
    mean = jnp.sqrt(jnp.mean(off**2) / jnp.mean(want**2))
    return jnp.maximum(mean, jnp.max(off) / jnp.max(jnp.abs(want)))


def _off(got: jax.Array, want: jax.Array) -> float:
    return float(_distance(got, want))


def _entry(kernel: str, case: Case, seconds: Mapping[str, list[float]], clock: str) -> Entry | None:
    """Our fastest configuration beside the fastest of the others."""
    rates = {name: [case.moved / s / 1e12 for s in taken] for name, taken in seconds.items()}
    fastest = sorted(rates, key=lambda name: -median(rates[name]))
    ours = next((name for name in fastest if name.startswith(OURS)), None)
    if ours is None:
        return None
    peer = next(name for name in fastest if not name.startswith(OURS))
    others = {name: rates[name] for name in fastest if not name.startswith(OURS)}
    copied = here().bandwidth
    return Entry(
        name=case.name, claim=case.claim, command=f"jaxinfra kernels bench {kernel}", unit="TB/s",
        samples={OURS: rates[ours], **others}, ratio=median(rates[ours]) / median(rates[peer]),
        interval=ratio_interval(tuple(seconds[ours]), tuple(seconds[peer])),
        roofline=median(rates[ours]) * 1e12 / copied,
        roof=f"{copied / 1e12:.2f} TB/s, a copy of the same run",
        inputs=f"normal, in turns in one process, warm; seconds of the device: {clock}",
        mislead="the kernel asked for by name, with the configuration that was fastest in this "
        f"run; small arrays come from the L2 cache; the ratio is to {peer}, the fastest of the "
        "others",
        environment=environment(), extra={"config": ours.removeprefix(OURS).strip()},
    )  # fmt: skip


if __name__ == "__main__":
    bench(Path(sys.argv[1]) if sys.argv[1:] else None)
