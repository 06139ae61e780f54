"""Data-parallel steps: collectives that the compiler places, and hooks that a backward pass fires.

In JAX one program is written for all devices and the compiler puts the messages into it: they can
be counted before anything runs. In PyTorch every process runs its own Python; DDP hangs a hook on
each parameter, sums gradients in buckets while the backward pass goes on, and FSDP2's hooks gather
a module's parameters before it runs and scatter their gradients after. The bytes follow from the
shapes, and are the same.

Cost, P bytes of parameters on n devices, sent by each: an all-reduce 2 (n-1)/n P; ZeRO-3 gathers
twice and scatters once, 3 (n-1)/n P.

    python -m contrast.data_parallel        # two processes over gloo; two emulated devices
"""

from __future__ import annotations

import collections
import socket
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from contrast import peer
from contrast.show import Facts, side_by_side
from parallel import mesh
from parallel.census import census, totals

CLAIM = (
    "The same gradients take the same bytes: JAX's messages stand in the program, PyTorch's are "
    "sent by hooks while Python runs."
)
RANKS, L, D, B = 2, 4, 64, 8
PARAMETERS = L * D * D * 4  # bytes
BUCKET_MB = 0.04  # DDP's buckets, so that four layers fill more than one


def loss(ws: Any, x: Any, layer: Callable) -> Any:
    """Mean square of what L layers make of x [B, D]; ws has a layer's weights in every row."""
    out, _ = jax.lax.scan(lambda h, w: (layer(h, w), None), x, ws)
    return (out**2).mean()


def plain_layer(h: Any, w: Any) -> Any:
    """h [B, D] through w [D, D]."""
    return jnp.tanh(h @ w)


@jax.checkpoint
def gathered_layer(h: Any, w: Any) -> Any:
    """h [B, D] through w [D / n, D], gathered for it, and gathered again for the backward pass."""
    return plain_layer(h, jax.lax.all_gather(w, "dp", tiled=True))


def in_jax() -> Facts:
    """Collectives and bytes in the compiled gradients of a replicated and of a sharded layout."""
    devices = jax.devices()[:RANKS]
    if len(devices) < RANKS:
        mesh.emulate(RANKS)
    over = mesh.make(mesh.parse(f"dp={RANKS}"), devices)
    ws = jax.ShapeDtypeStruct((L, D, D), jnp.float32)
    x = jax.ShapeDtypeStruct((RANKS * B, D), jnp.float32)

    def replicated(ws: Any, x: Any) -> Any:
        mine = mesh.ensure_varying(ws, ("dp",))
        return jax.lax.pmean(jax.grad(loss)(mine, x, plain_layer), "dp")

    def sharded(ws: Any, x: Any) -> Any:
        return jax.grad(lambda ws: loss(ws, x, gathered_layer) / RANKS)(ws)

    facts: dict[str, object] = {}
    for name, function, spec in (
        ("replicated (DDP)", replicated, P()),
        ("sharded (FSDP)", sharded, P(None, "dp")),
    ):
        step = jax.shard_map(function, mesh=over, in_specs=(spec, P("dp")), out_specs=spec)
        found = census(jax.jit(step).lower(ws, x).compile(), at_least=64)
        for op, (count, _) in sorted(totals(found).items()):
            sent = sum(c.sent for c in found if c.op == op)
            facts[f"{name}: {op}"] = count
            facts[f"{name}: {op}, KiB sent"] = sent / 1024
    facts["known before it runs"] = True
    return facts


def in_torch() -> Facts:
    """Collectives and bytes that two processes ran: DDP's buckets, FSDP2's gathers and scatters."""
    torch = peer.torch()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = torch.multiprocessing.get_context("spawn")
    answers = context.SimpleQueue()
    torch.multiprocessing.spawn(_rank, (port, answers), nprocs=RANKS, join=True)
    return answers.get()


def _rank(rank: int, port: int, answers: Any) -> None:
    """One process: a step of each kind; the first tells what it sent."""
    torch = peer.torch()
    torch.set_num_threads(1)
    dist = peer.load("torch.distributed")
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=RANKS
    )
    facts = {**_ddp(torch, dist), **_fsdp(torch), "known before it runs": False}
    if rank == 0:
        answers.put(facts)
    dist.barrier()
    dist.destroy_process_group()


def _model(torch: Any) -> Any:
    torch.manual_seed(0)
    layers = [
        part for _ in range(L) for part in (torch.nn.Linear(D, D, bias=False), torch.nn.Tanh())
    ]
    return torch.nn.Sequential(*layers)


def _ddp(torch: Any, dist: Any) -> Facts:
    hooks = peer.load("torch.distributed.algorithms.ddp_comm_hooks.default_hooks")
    buckets: list[int] = []

    def hook(group, bucket):  # DDP wants its own types annotated, or none
        buckets.append(bucket.buffer().nbytes)
        return hooks.allreduce_hook(group, bucket)

    wrapped = torch.nn.parallel.DistributedDataParallel(_model(torch), bucket_cap_mb=BUCKET_MB)
    wrapped.register_comm_hook(None, hook)
    for _ in range(2):  # buckets are put in the order of gradients after the first step
        buckets.clear()
        (wrapped(torch.ones(B, D)) ** 2).mean().backward()
    return _told("replicated (DDP)", {"allreduce_": buckets})


def _fsdp(torch: Any) -> Facts:
    fully_shard = peer.load("torch.distributed.fsdp").fully_shard
    mode = peer.load("torch.utils._python_dispatch").TorchDispatchMode
    device_mesh = peer.load("torch.distributed.device_mesh").init_device_mesh("cpu", (RANKS,))
    calls: dict[str, list[int]] = collections.defaultdict(list)

    class Watch(mode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if func.namespace == "c10d":
                sizes = [t.nbytes for t in torch.utils._pytree.tree_leaves(args)
                         if isinstance(t, torch.Tensor)]  # fmt: skip
                calls[func.overloadpacket.__name__].append(max(sizes, default=0))
            return func(*args, **(kwargs or {}))

    model = _model(torch)
    for module in model:
        if any(True for _ in module.parameters()):
            fully_shard(module, mesh=device_mesh)
    fully_shard(model, mesh=device_mesh)
    with Watch():
        (model(torch.ones(B, D)) ** 2).mean().backward()
    return _told("sharded (FSDP)", calls)


# PyTorch's name: the usual one, and trips around a ring of what is whole, each (n-1)/n of it.
_NAMES = {
    "_allgather_base_": ("all-gather", 1),
    "_reduce_scatter_base_": ("reduce-scatter", 1),
    "allreduce_": ("all-reduce", 2),
}


def _told(layout: str, calls: Mapping[str, list[int]]) -> Facts:
    """Counts, and KiB that a rank sends by an algorithm that sends least, from whole sizes."""
    facts: dict[str, object] = {}
    for op, sizes in sorted(calls.items()):
        name, trips = _NAMES[op]
        facts[f"{layout}: {name}"] = len(sizes)
        facts[f"{layout}: {name}, KiB sent"] = trips * (RANKS - 1) / RANKS * sum(sizes) / 1024
    return facts


def main() -> dict[str, Facts]:
    """Prints both; returns them."""
    return side_by_side(CLAIM, {"JAX": in_jax, "PyTorch": in_torch})


if __name__ == "__main__":
    mesh.emulate(RANKS)
    main()
