"""Training the Qwen3-0.6B shape on one GPU: this project beside transformers with torch.compile.

    python -m benchmarks.train_vs_transformers            # about five minutes on one H200

Same shape, same batch, random tokens, float32 master weights with bfloat16 computation, AdamW with
clipping, no dropout. They take turns in processes of their own (ours, theirs, ours, theirs), so
that each has the whole memory and a drift of the clocks falls on both; where jax-triton is
installed, so does this project with norms and rotation by Triton kernels. A step is timed from its
call until its loss has arrived; the batches are on the device before.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from statistics import median

from benchmarks.turns import Contestant, answer

MODEL, BATCH, SEQ_LEN = "qwen3-0.6b", 8, 4096
WARMUP, STEPS, ROUNDS = 3, 8, 2


def timed(step: Callable[[int], float]) -> dict:
    """Seconds of each of STEPS steps after a warm-up; `step(i)` returns its loss as a number."""
    start = time.perf_counter()
    step(0)
    first = time.perf_counter() - start
    for i in range(WARMUP):
        step(i)
    seconds, loss = [], 0.0
    for i in range(STEPS):
        start = time.perf_counter()
        loss = step(i)
        seconds.append(time.perf_counter() - start)
    return {"seconds": seconds, "first_step": first, "loss": loss}


def ours(norms: str | None = None) -> None:
    """One turn of this project, norms and rotation by an implementation of theirs."""
    import jax
    import numpy as np

    from jaxinfra.model.params import init
    from jaxinfra.model.presets import PRESETS
    from jaxinfra.train.config import OptimizerConfig
    from jaxinfra.train.optimizer import make_optimizer, schedule
    from jaxinfra.train.step import TrainState, make_step

    config = dataclasses.replace(PRESETS[MODEL], norms=norms)
    hyper = OptimizerConfig(learning_rate=1e-4)
    optimizer = make_optimizer(hyper, steps=1000)
    step = make_step(
        config, optimizer, schedule(hyper, 1000), remat="none", unroll=config.num_layers
    )
    create = jax.jit(lambda key: TrainState.create(init(key, config), optimizer))
    state = create(jax.random.key(0))
    rng = np.random.default_rng(0)
    batches = [
        {"tokens": jax.device_put(
            rng.integers(0, config.vocab_size, (BATCH, SEQ_LEN + 1), np.int32))}
        for _ in range(3)
    ]  # fmt: skip

    def one(i: int) -> float:
        nonlocal state
        state, metrics = step(state, batches[i % 3])
        return float(metrics["loss"])

    def turn() -> dict:
        result = timed(one)
        memory = jax.devices()[0].memory_stats() or {}
        return result | {"peak_bytes": memory.get("peak_bytes_in_use")}

    answer(turn)


def theirs() -> None:
    """Turns of transformers, one for every line read; leaves the GPU's memory between them."""
    import torch
    import transformers

    from jaxinfra.model.presets import PRESETS

    raw = PRESETS[MODEL].to_hf()
    config = transformers.AutoConfig.for_model(**raw, use_cache=False)
    config._attn_implementation = "sdpa"
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.train()
    compiled = torch.compile(model)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    batches = [
        torch.randint(0, config.vocab_size, (BATCH, SEQ_LEN), device="cuda") for _ in range(3)
    ]

    def one(i: int) -> float:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = compiled(input_ids=batches[i % 3], labels=batches[i % 3]).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    def move(device: str) -> None:
        model.to(device)
        for slot in optimizer.state.values():
            slot.update({k: v.to(device) for k, v in slot.items() if k != "step"})
        torch.cuda.empty_cache()

    def turn() -> dict:
        move("cuda")
        torch.cuda.reset_peak_memory_stats()
        result = timed(one) | {"peak_bytes": torch.cuda.max_memory_allocated()}
        move("cpu")
        return result

    answer(turn)


def main() -> None:
    """Both in turns, then the table and the ledger."""
    env = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.9"}
    env["JAX_COMPILATION_CACHE_DIR"] = os.environ.get("JAX_COMPILATION_CACHE_DIR", ".cache/jax")
    peer = Contestant("benchmarks.train_vs_transformers", "theirs")
    mine = ["ours", *["triton"] * (importlib.util.find_spec("jax_triton") is not None)]
    rounds: dict[str, list[dict]] = {name: [] for name in [*mine, "theirs"]}
    for _ in range(ROUNDS):
        for name in mine:
            project = Contestant("benchmarks.train_vs_transformers", name, **env)
            rounds[name].append(project.turn())
            project.close()
        rounds["theirs"].append(peer.turn())
        for name, results in rounds.items():
            rate = BATCH * SEQ_LEN / median(results[-1]["seconds"])
            print(f"{name:7s} {rate:9.0f} tokens/s", flush=True)
    peer.close()
    record(rounds)


def record(rounds: dict[str, list[dict]]) -> None:
    """Writes the ledger's entry."""
    import torch  # noqa: F401  (so that the conditions name its version)
    import transformers  # noqa: F401

    from jaxinfra.hardware.detect import detect
    from jaxinfra.measure import Entry, environment, write
    from jaxinfra.measure.compare import ratio_interval
    from jaxinfra.model.counts import train_flops_per_token
    from jaxinfra.model.presets import PRESETS

    tokens, chip = BATCH * SEQ_LEN, detect()
    seconds = {name: [s for turn in turns for s in turn["seconds"]]
               for name, turns in rounds.items()}  # fmt: skip
    ours, theirs = (median(seconds[name]) for name in ("ours", "theirs"))
    flops = train_flops_per_token(PRESETS[MODEL], SEQ_LEN) * tokens / ours
    peak = chip.flops["bfloat16"]
    assert peak is not None
    names = {
        "ours": "jaxinfra", "triton": "jaxinfra, norms and rotation by Triton",
        "theirs": "transformers, torch.compile, SDPA, autocast",
    }  # fmt: skip
    entry = Entry(
        name="train-qwen3-0-6b",
        claim=f"Training the Qwen3-0.6B shape, {BATCH} x {SEQ_LEN:,} tokens a step, one GPU",
        command="python -m benchmarks.train_vs_transformers",
        unit="tokens/s",
        samples={names[n]: [tokens / s for s in values] for n, values in seconds.items()},
        ratio=theirs / ours,
        interval=ratio_interval(tuple(seconds["ours"]), tuple(seconds["theirs"])),
        roofline=flops / peak,
        roof=f"{peak / 1e12:.0f} TFLOP/s bfloat16 on paper (MFU; causal attention counted half, "
        "recomputation not counted)",
        inputs="uniformly random tokens, float32 masters, bfloat16 computation, AdamW, clipping",
        mislead="random tokens have no padding to skip; transformers alone, without a trainer's "
        "fused kernels for the loss; its step holds all logits in float32, ours none",
        environment=environment(),
        extra={
            "first_step_s": {names[n]: [t["first_step"] for t in v] for n, v in rounds.items()},
            "peak_bytes": {names[n]: v[-1]["peak_bytes"] for n, v in rounds.items()},
        },
    )
    print(f"{tokens / ours:,.0f} tokens/s, MFU {entry.roofline:.1%}, ratio {entry.ratio:.2f}")
    write(entry, os.environ.get("OUT", "benchmarks/results"))


if __name__ == "__main__":
    sides = {"ours": ours, "triton": partial(ours, "triton"), "theirs": theirs}
    sides.get(sys.argv[-1], main)()
