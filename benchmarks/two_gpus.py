"""Training the Qwen3-1.7B shape on two GPUs of one host, every way, beside PyTorch's FSDP2.

    python -m benchmarks.two_gpus OUT                  # about six minutes; entries into OUT
    python -m benchmarks.two_gpus OUT --part meshes    # one part; options is none of the whole
    python -m benchmarks.two_gpus OUT --tiny           # the same code, emulated devices, gloo

Random weights and tokens, float32 masters, bfloat16 computation, AdamW with clipping, 4 rows of
4,096 tokens a GPU. Each part is a process of its own that has the GPUs to itself: one GPU alone,
ours under each strategy, FSDP2, the planner's first five, collectives of both sides. NVLink's
multicast stays off (NCCL_NVLS_ENABLE=0), for both sides.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.two_gpus_ledger import Results, bus, rate, record
from benchmarks.two_gpus_shape import SHAPE, TINY, heard

# part -> (module, argument), in the order in which they run
PARTS = {
    "alone": ("benchmarks.two_gpus_ours", "alone"),
    "meshes": ("benchmarks.two_gpus_ours", "meshes"),
    "torch": ("benchmarks.two_gpus_torch", "fsdp"),
    "collectives": ("benchmarks.two_gpus_ours", "collectives"),
    "torch collectives": ("benchmarks.two_gpus_torch", "collectives"),
    "plan": ("benchmarks.two_gpus_ours", "plan"),
    "options": ("benchmarks.two_gpus_ours", "options"),
}
QUIET = {
    "NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1", "NVSHMEM_DISABLE_NVLS": "1",
    "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.9", "TF_CPP_MIN_LOG_LEVEL": "2",
}  # fmt: skip


def run(part: str, out: Path, tiny: bool, until: float) -> Results:
    """What a part's process tells; if it is not done by then, what it told before."""
    module, argument = PARTS[part]
    env = os.environ | QUIET
    if part == "alone" and not tiny:
        env["CUDA_VISIBLE_DEVICES"] = "0"
    log = _log(out, part)
    begun = time.monotonic()
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", module, argument, *(["--tiny"] if tiny else [])],
            stdout=file, stderr=subprocess.STDOUT, env=env, start_new_session=True,
        )  # fmt: skip
        try:
            process.wait(max(until - begun, 1))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # its ranks as well
            process.wait()
    results = heard(log.read_text(errors="replace"))
    told = f"{part}: {len(results)} results in {time.monotonic() - begun:.0f} s"
    print(told + (f", ended with {process.returncode}" if process.returncode else ""), flush=True)
    if process.returncode and not results:
        print(log.read_text(errors="replace")[-1500:])
    return results


def _log(out: Path, part: str) -> Path:
    return out / f"two-gpus-{part.replace(' ', '-')}.log"


def table(found: dict[str, Results], shape: Any) -> None:
    """Everything in a few lines."""
    from jaxinfra.hardware import chips
    from jaxinfra.model.counts import train_flops_per_token

    peak = chips.find("H200").flops["bfloat16"]
    assert peak is not None
    flops = train_flops_per_token(shape.config, shape.length)
    one = found.get("alone", {}).get("one GPU", {})
    base = rate(one, shape.rows * shape.length) if "seconds" in one else None
    peer = found.get("torch", {}).get("FSDP2", {})
    theirs = rate(peer, 2 * shape.rows * shape.length) if "seconds" in peer else None
    print(f"{'':34}{'tokens/s':>9}{'MFU':>7}{'scaling':>9}{'/ FSDP2':>9}{'GB a GPU':>10}"
          f"{'compiled':>10}{'under':>9}{'messages':>10}{'hidden':>8}")  # fmt: skip
    for part in ("alone", "meshes", "options", "torch", "plan"):
        for name, result in found.get(part, {}).items():
            if "error" in result:
                print(f"{name:34}{result['error'][:160]}")
                continue
            gpus = 1 if part == "alone" else 2
            here = rate(result, gpus * shape.rows * shape.length)
            under, products = result.get("under") or (0, 0)
            traced = result.get("hidden") or {}
            share = traced["hidden_s"] / max(traced["messages_s"], 1e-9) if traced else None
            print(
                f"{part[:4]} {name:29.29}{here:9,.0f}{here * flops / (gpus * peak):7.1%}"
                + (f"{here / base:9.2f}" if base else f"{'':9}")
                + (f"{here / theirs:9.2f}" if theirs and gpus == 2 else f"{'':9}")
                + f"{result['bytes'] / 1e9:10.1f}{result['compile_s']:9.0f}s"
                + f"{f'{under}/{products}':>9}"
                + (f"{traced['messages_s'] * 1e3:8.1f}ms{share:8.0%}" if traced else "")
            )
            if "predicted_s" in result:
                again = "layers computed again" if result["remat"] else "nothing computed again"
                print(
                    f"{'':34}predicted {result['predicted_s'] * 1e3:.1f} ms, measured "
                    f"{median(result['seconds']) * 1e3:.1f}; {result['predicted_bytes'] / 1e9:.1f} "
                    f"GB; {again}, {result['accumulate']} parts"
                )
    for name, result in found.get("collectives", {}).items():
        kind, _, size = name.rpartition(" ")
        if "error" in result:
            print(f"{name:34}{result['error'][:160]}")
            continue
        other = found.get("torch collectives", {}).get(f"{kind.removeprefix('ring ')} {size}")
        beside = f", NCCL through PyTorch {bus(other, kind, int(size)):.0f}" if other else ""
        print(f"{kind:20}{int(size) / 2**20:8.3g} MiB: {bus(result, kind, int(size)):5.0f}{beside}"
              " GB/s")  # fmt: skip


def main() -> None:
    """Runs the parts, then prints the table and writes the ledger's entries."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--part", choices=[*PARTS, "jax"], action="append")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--seconds", type=float, default=560, help="for all; then the table")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    parts = args.part or [part for part in PARTS if part != "options"]
    groups = {"jax": ["alone", "meshes"], "collectives": ["collectives", "torch collectives"]}
    parts = list(dict.fromkeys(p for part in parts for p in groups.get(part, [part])))
    shape = TINY if args.tiny else SHAPE
    until = time.monotonic() + args.seconds
    found = {part: run(part, args.out, args.tiny, until) for part in parts}
    for part in PARTS:  # what another call left in the folder stands beside
        if part not in found and (log := _log(args.out, part)).exists():
            found[part] = heard(log.read_text(errors="replace"))
    try:
        record(found, shape, args.out)
    except Exception as error:  # the table below is worth more
        print(f"no ledger entries: {error!r}")
    table(found, shape)


if __name__ == "__main__":
    main()
