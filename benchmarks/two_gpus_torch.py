"""PyTorch's side of `benchmarks.two_gpus`: FSDP2 on transformers' Qwen3, and NCCL's collectives.

FSDP2 as torchtitan applies it: every layer compiled and `fully_shard`ed, float32 masters, bfloat16
parameters and reductions, SDPA, the loss compiled (so its float32 logits are fused into it), AdamW
with its fused kernel, clipping. Nothing is computed again in the backward pass.

    python -m benchmarks.two_gpus_torch fsdp|collectives [--tiny]
"""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from benchmarks.two_gpus_shape import SHAPE, TINY, Shape, told

WORLD = 2


def fsdp(rank: int, shape: Shape, cuda: bool) -> None:
    """Steps of one rank; the first tells."""
    import transformers
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    device = torch.device("cuda", rank) if cuda else torch.device("cpu")
    config = transformers.AutoConfig.for_model(**shape.config.to_hf(), use_cache=False)
    config._attn_implementation = "sdpa"
    torch.manual_seed(0)
    with device:
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.train()
    mesh = init_device_mesh(device.type, (WORLD,))
    policy = (
        MixedPrecisionPolicy(torch.bfloat16, torch.bfloat16) if cuda else MixedPrecisionPolicy()
    )
    layers = model.model.layers
    for i, layer in enumerate(layers):
        compiled: Any = torch.compile(layer)
        layers[i] = fully_shard(compiled, mesh=mesh, mp_policy=policy)  # pyright: ignore
    fully_shard(model, mesh=mesh, mp_policy=policy)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=cuda
    )

    @torch.compile
    def loss_of(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten())

    own = slice(rank * shape.rows, (rank + 1) * shape.rows)
    batches = [torch.from_numpy(t[own]).long().to(device) for t in shape.tokens(2 * shape.rows)]

    def step(i: int) -> float:
        tokens = batches[i % len(batches)]
        loss = loss_of(model(input_ids=tokens[:, :-1]).logits, tokens[:, 1:])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    begun = time.perf_counter()
    step(0)
    first = time.perf_counter() - begun
    seconds, loss = [], 0.0
    for i in range(shape.warmup + shape.steps):
        begun = time.perf_counter()
        loss = step(i)
        seconds.append(time.perf_counter() - begun)
    if rank == 0:
        peak = torch.cuda.max_memory_allocated() if cuda else 0
        told("FSDP2", {"seconds": seconds[shape.warmup :], "compile_s": first, "bytes": peak,
                       "loss": loss, "torch": torch.__version__,
                       "transformers": transformers.__version__})  # fmt: skip


def collectives(rank: int, shape: Shape, cuda: bool) -> None:
    """Seconds a call of calls that are queued and waited for together; float32."""
    device = torch.device("cuda", rank) if cuda else torch.device("cpu")
    wait: Callable[[], Any] = torch.cuda.synchronize if cuda else lambda: None
    for size in shape.message_bytes:
        whole = torch.arange(size // 4, dtype=torch.float32, device=device) % 1024
        part = whole[: whole.numel() // WORLD].clone()
        kinds: dict[str, Callable[[], Any]] = {
            "all_reduce": lambda: dist.all_reduce(whole),  # noqa: B023
            "all_gather": lambda: dist.all_gather_into_tensor(whole, part),  # noqa: B023
            "reduce_scatter": lambda: dist.reduce_scatter_tensor(part, whole),  # noqa: B023
        }
        for name, run in kinds.items():
            calls = shape.calls(size)
            run()
            seconds = []
            for _ in range(5):
                wait()
                dist.barrier()
                begun = time.perf_counter()
                for _ in range(calls):
                    run()
                wait()
                seconds.append((time.perf_counter() - begun) / calls)
            if rank == 0:
                told(f"{name} {size}", {"seconds": seconds})


def _rank(rank: int, part: str, shape: Shape, port: int) -> None:
    cuda = torch.cuda.is_available()
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    torch.set_float32_matmul_precision("high")
    if cuda:
        torch.cuda.set_device(rank)
    dist.init_process_group("nccl" if cuda else "gloo", rank=rank, world_size=WORLD)
    {"fsdp": fsdp, "collectives": collectives}[part](rank, shape, cuda)
    dist.destroy_process_group()


def main() -> None:
    """Two processes of the part named."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    shape = TINY if "--tiny" in sys.argv else SHAPE
    spawn(_rank, (sys.argv[1], shape, port), nprocs=WORLD)


if __name__ == "__main__":
    main()
