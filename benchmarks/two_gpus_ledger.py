"""The ledger's entries of `benchmarks.two_gpus`."""

from __future__ import annotations

import os
from pathlib import Path
from statistics import median
from typing import Any

Results = dict[str, dict[str, Any]]  # of a part: by name


def rate(result: dict[str, Any], tokens: int) -> float:
    """Tokens a second."""
    return tokens / median(result["seconds"])


def bus(result: dict[str, Any], kind: str, size: int) -> float:
    """GB/s out of each of two GPUs, by an algorithm that sends as little as can be."""
    return size * (1.0 if "all_reduce" in kind else 0.5) / median(result["seconds"]) / 1e9


def record(found: dict[str, Results], shape: Any, out: Path) -> None:
    """The ledger's entries of the parts that were run."""
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    from jaxinfra.hardware.detect import detect
    from jaxinfra.measure import Entry, environment, write
    from jaxinfra.measure.compare import ratio_interval
    from jaxinfra.model.counts import train_flops_per_token

    ours, theirs = found.get("meshes", {}).get("FSDP", {}), found.get("torch", {}).get("FSDP2", {})
    one, tokens = found.get("alone", {}).get("one GPU", {}), shape.rows * shape.length
    peak = detect().flops.get("bfloat16")
    conditions = environment() | {name: theirs[name] for name in ("torch", "transformers")
                                  if name in theirs}  # fmt: skip
    common: dict[str, Any] = {
        "command": "python -m benchmarks.two_gpus OUT", "unit": "tokens/s",
        "inputs": "uniformly random tokens and weights, float32 masters, bfloat16 computation, "
        "AdamW, clipping, nothing computed again", "environment": conditions,
    }  # fmt: skip
    rates = lambda result, n: [n * tokens / s for s in result["seconds"]]  # noqa: E731
    extra = {
        part: {
            name: {k: v for k, v in r.items() if k != "seconds"}
            | {"tokens/s": rate(r, (1 if part == "alone" else 2) * tokens)}
            for name, r in found.get(part, {}).items() if "seconds" in r
        }
        for part in ("alone", "meshes", "torch")
    }  # fmt: skip
    if "seconds" in ours and "seconds" in theirs:
        each = train_flops_per_token(shape.config, shape.length)
        write(Entry(
            name="two-gpus-train-qwen3-1-7b",
            claim=f"Training the Qwen3-1.7B shape on two GPUs, FSDP, {2 * shape.rows} x "
            f"{shape.length:,} tokens a step",
            samples={"jaxinfra": rates(ours, 2),
                     "PyTorch FSDP2, torch.compile a layer, SDPA": rates(theirs, 2)},
            ratio=median(theirs["seconds"]) / median(ours["seconds"]),
            interval=ratio_interval(tuple(ours["seconds"]), tuple(theirs["seconds"])),
            roofline=peak and rate(ours, tokens) * each / peak,
            roof="two GPUs' bfloat16 FLOP/s on paper (MFU; causal attention counted half)",
            mislead="one run of each, one after the other; transformers' model; both reduce in "
            "bfloat16; with so few GPUs messages are short",
            extra=extra, **common,
        ), out)  # fmt: skip
    if "seconds" in ours and "seconds" in one:
        write(Entry(
            name="two-gpus-scaling-fsdp",
            claim="Two GPUs against one, Qwen3-1.7B shape, FSDP, the same rows a GPU",
            samples={"two GPUs": rates(ours, 2), "one GPU": rates(one, 1)},
            ratio=2 * median(one["seconds"]) / median(ours["seconds"]),
            interval=tuple(2 * x for x in ratio_interval(
                tuple(ours["seconds"]), tuple(one["seconds"]))),  # pyright: ignore
            roofline=median(one["seconds"]) / median(ours["seconds"]), roof="twice one GPU",
            mislead="one GPU runs the step without a mesh, which uses this project's attention "
            "kernel; the batch grows with the GPUs", extra=extra, **common,
        ), out)  # fmt: skip
    planned = {n: r for n, r in found.get("plan", {}).items() if "seconds" in r}
    if planned:
        first = next(iter(planned))
        best = min(planned, key=lambda n: median(planned[n]["seconds"]))
        chosen, fastest = planned[first]["seconds"], planned[best]["seconds"]
        write(Entry(
            name="two-gpus-plan",
            claim=f"The planner's first mesh ({first}) against the fastest measured of its first "
            f"{len(planned)} ({best})",
            samples={"planner's choice": chosen, "fastest": fastest},
            ratio=median(fastest) / median(chosen), interval=ratio_interval(
                tuple(chosen), tuple(fastest)),
            roofline=None, roof="none: a choice", unit="s",
            mislead="two GPUs have five meshes; the planner's times are rooflines",
            extra={n: {k: v for k, v in r.items() if k != "seconds"} | {
                "measured_s": median(r["seconds"])} for n, r in planned.items()},
            **{k: v for k, v in common.items() if k != "unit"},
        ), out)  # fmt: skip
    if found.get("collectives") and found.get("torch collectives"):
        size = shape.message_bytes[-1]
        both: list[Any] = [
            found[p].get(f"all_reduce {size}", {}).get("seconds")
            for p in ("collectives", "torch collectives")
        ]
        if all(both):
            speed = lambda s: [size / x / 1e9 for x in s]  # noqa: E731
            write(Entry(
                name="two-gpus-all-reduce",
                claim=f"All-reduce of {size / 2**20:,.0f} MiB of float32 over two GPUs",
                samples={"lax.psum": speed(both[0]), "torch.distributed, NCCL": speed(both[1])},
                ratio=median(both[1]) / median(both[0]),
                interval=ratio_interval(tuple(both[0]), tuple(both[1])),
                roofline=None, roof="none: the link was not measured apart", unit="GB/s",
                mislead="both are NCCL; jax's result is a new array, PyTorch's takes the old one's "
                "place; NVLink multicast is off",
                extra={p: {n: bus(r, n, int(n.rpartition(' ')[2])) for n, r in found[p].items()
                           if "seconds" in r} for p in ("collectives", "torch collectives")},
                **{k: v for k, v in common.items() if k not in ("unit", "inputs")},
                inputs="whole numbers below 1,024; calls queued and waited for together",
            ), out)  # fmt: skip
