"""A plan as lines of text, and beside what the compiler makes of its best mesh."""

from __future__ import annotations

from collections.abc import Iterator

from jaxinfra.model.config import ModelConfig
from parallel.aot import compile_step, devices
from parallel.footprint import total
from parallel.mesh import Axis
from parallel.plan import Plan, Prediction, reasons
from parallel.train import Strategy


def table(plan: Plan, top: int) -> Iterator[str]:
    """The `top` fastest meshes, each with its items, and the kinds of reasons against the rest."""
    tried = len(plan.fitting) + len(plan.rejected)
    yield f"{len(plan.fitting)} of {tried} meshes fit; a step takes at least, by rooflines:"
    for place, p in enumerate(plan.fitting[:top], 1):
        step = p.step
        how = f"--mesh {p.mesh} --accumulate {step.accumulate}"
        how += f" --zero {step.zero}" if step.zero else ""
        how += f" --schedule {step.schedule}" if Axis.PP in p.sent else ""
        how += f" --context {step.context}" if Axis.CP in p.sent else ""
        how += f" --dispatch {step.dispatch}" if step.dispatch != "padded" else ""
        how += f" --remat {'full' if step.remat else 'none'}"
        yield f"{place}. {how}"
        yield (
            f"   {p.seconds:.3f} s, MFU {p.mfu:.1%}: compute {p.compute:.3f} s, "
            f"bubble {p.bubble:.1%}"
        )
        items = sorted(p.memory.items(), key=lambda item: -item[1])
        listed = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in items if size)
        yield f"   {total(p.memory) / 1e9:.1f} GB a chip: {listed}"
        for axis, size in p.sent.items():
            yield (
                f"   {axis}: {size / 1e9:.2f} GB out of a chip over {p.links[axis]}, "
                f"{p.communication[axis]:.3f} s"
            )
    for count, kind, example in reasons(plan.rejected):
        yield f"{count} rejected for the {kind}, as {example}"


def compared(config: ModelConfig, best: Prediction, chip: str, count: int) -> Iterator[str]:
    """Memory and messages predicted beside those of the compiled program."""
    step = best.step
    found = compile_step(
        config,
        Strategy(best.mesh, step.zero, step.schedule, step.context, dispatch=step.dispatch),
        devices(chip, count), rows=step.rows, seq_len=step.seq_len, accumulate=step.accumulate,
        remat="full" if step.remat else "none",
    )  # fmt: skip
    predicted = total(best.memory)
    yield (
        f"compiled in {found.seconds} s: {found.peak / 1e9:.2f} GB of memory, predicted "
        f"{predicted / 1e9:.2f} ({predicted / found.peak - 1:+.1%})"
    )
    theirs, ours = sum(c.sent for c in found.collectives), sum(best.sent.values())
    yield (
        f"{theirs / 1e9:.2f} GB sent by the program's collectives, predicted {ours / 1e9:.2f} "
        f"({ours / theirs - 1:+.1%}); a TPU's compiler turns reduce-scatters into all-reduces"
    )
