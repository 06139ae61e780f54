"""What PyTorch's eager mode does, seen from below the autograd tape: operations and live memory.

A dispatch mode sees every ATen operation after autograd and before the kernel. `watched` counts
them, and keeps a weak reference to every storage that they make, so that what is alive, now or at
the worst moment, is counted in bytes, exactly, on any device and with no allocator's rounding.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from contrast import peer

_VIEWS = {
    "view", "t", "transpose", "expand", "detach", "reshape", "_unsafe_view", "permute", "unsqueeze",
    "squeeze", "select", "slice", "alias", "as_strided", "split", "unbind", "lift_fresh",
}  # fmt: skip


class Seen:
    """Operations that ran, by name and in order, and the memory of what they made."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.outputs: list[tuple[str, str]] = []  # name of the operation, dtype of its result
        self.moved = 0  # bytes that operations, views left out, read and wrote
        self.peak = 0
        self._storages: dict[int, tuple[Any, int]] = {}  # weak reference, bytes

    @property
    def kernels(self) -> int:
        """Operations that are no mere view of memory."""
        return sum(name not in _VIEWS for name in self.names)

    @property
    def live(self) -> int:
        """Bytes of what the operations made and somebody still holds."""
        gone = [key for key, (ref, _) in self._storages.items() if ref.expired()]
        for key in gone:
            del self._storages[key]
        return sum(size for _, size in self._storages.values())


@contextlib.contextmanager
def watched(*known: Any) -> Iterator[Seen]:
    """Watches every operation in the block; storages of the tensors `known` count for nothing."""
    torch = peer.torch()
    mode = peer.load("torch.utils._python_dispatch").TorchDispatchMode
    reference = peer.load("torch.multiprocessing.reductions").StorageWeakRef
    seen, old = Seen(), {tensor.untyped_storage()._cdata for tensor in known}

    class Watch(mode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            out = func(*args, **(kwargs or {}))
            name = func.overloadpacket.__name__
            seen.names.append(name)
            if name not in _VIEWS:
                touched = [*torch.utils._pytree.tree_leaves((args, kwargs, out))]
                seen.moved += sum(t.nbytes for t in touched if isinstance(t, torch.Tensor))
            for leaf in torch.utils._pytree.tree_leaves(out):
                if isinstance(leaf, torch.Tensor):
                    seen.outputs.append((name, str(leaf.dtype).removeprefix("torch.")))
                    storage = leaf.untyped_storage()
                    if storage._cdata not in old:
                        seen._storages[storage._cdata] = (reference(storage), storage.nbytes())
            seen.peak = max(seen.peak, seen.live)
            return out

    with Watch():
        yield seen


def saved_bytes(function: Callable, *args: Any) -> int:
    """Bytes of the storages that the tape of function(*args) holds; each storage once."""
    torch = peer.torch()
    held: dict[int, int] = {}

    def pack(tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        held[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = function(*args)
    del out
    return sum(held.values())


def partitioned(function: Callable, *args: Any, partition: Any = None) -> tuple[Any, Any, int]:
    """AOTAutograd's forward and backward graph of function(*args), and the bytes between them.

    partition: how the joint graph is cut; by default as Inductor does, by a minimum cut that counts
    what is cheap to compute again as free.
    """
    peer.compile_afresh()
    torch = peer.torch()
    backends = peer.load("torch._dynamo.backends.common")
    functions = peer.load("functorch.compile")
    inductor = peer.load("torch._inductor.decomposition")
    kept: dict[str, Any] = {}

    def keep(name: str) -> Callable:
        def compiler(graph: Any, _inputs: Any) -> Callable:
            kept[name] = graph
            return functions.make_boxed_func(graph.forward)

        return compiler

    backend = backends.aot_autograd(
        fw_compiler=keep("forward"),
        bw_compiler=keep("backward"),
        decompositions=inductor.select_decomp_table(),
        partition_fn=partition or functions.min_cut_rematerialization_partition,
    )
    out = torch.compile(function, backend=backend)(*args)
    out.sum().backward()
    inputs = [n for n in kept["backward"].graph.nodes if n.op == "placeholder"]
    saved = [node.meta["val"] for node in inputs if not node.name.startswith("tangents")]
    size = sum(v.numel() * v.element_size() for v in saved if isinstance(v, torch.Tensor))
    return kept["forward"], kept["backward"], size
