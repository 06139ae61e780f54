"""A stream of shapes: how many programs each framework compiles for it.

`jax.jit` keeps a program for every shape, dtype and static argument, exactly, and never guesses;
what varies must be padded to few sizes. Dynamo compiles the first shape as it is, takes a size
that changed for a variable at the second, and from then on one program serves all (sizes of 0 and
1 stay special). Where it is told not to (`dynamic=False`), it stops after eight and runs eagerly,
with no error.

    python -m contrast.recompilation
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from contrast import peer
from contrast.capture import Graphs
from contrast.show import Facts, side_by_side

CLAIM = (
    "Over ragged lengths jit compiles once a length, once a bucket with padding, and Dynamo "
    "twice for all of them."
)
LENGTHS = (17, 5, 17, 9, 33, 12, 26, 5, 40, 21, 60, 3, 48, 11)  # eleven or more are different
D = 8


def buckets(length: int) -> int:
    """The next power of two."""
    return 1 << (length - 1).bit_length()


def waste(lengths: Sequence[int]) -> float:
    """Share of the padded positions that hold no token."""
    return 1 - sum(lengths) / sum(map(buckets, lengths))


def in_jax() -> Facts:
    """Programs of `jax.jit` over LENGTHS: exact, padded, with one symbolic shape, and by dtype."""

    def pooled(x: Any, length: Any) -> Any:
        seen = jnp.arange(x.shape[0], dtype=jnp.int32)[:, None] < length
        return jnp.where(seen, jnp.tanh(x), 0).sum(0) / length.astype(x.dtype)

    inputs = [np.ones((length, D), np.float32) for length in LENGTHS]
    exact, padded = jax.jit(lambda x: jnp.tanh(x).mean(0)), jax.jit(pooled)
    worst = 0.0
    for x in inputs:
        rows = np.pad(x, ((0, buckets(len(x)) - len(x)), (0, 0)))
        worst = max(worst, float(abs(exact(x) - padded(rows, np.int32(len(x)))).max()))
    (t,) = export.symbolic_shape("t")
    symbolic = export.export(jax.jit(lambda x: jnp.tanh(x).mean(0)))(
        jax.ShapeDtypeStruct((t, D), jnp.float32)
    )
    run = jax.jit(symbolic.call)
    for x in inputs:
        run(x)
    return {
        "lengths, and how many differ": f"{len(LENGTHS)}, {len(set(LENGTHS))}",
        "programs, by default": _size(exact),
        "programs, padded to powers of two": _size(padded),
        "positions wasted by padding": round(waste(LENGTHS), 3),
        "largest difference, padded to exact": worst,
        "programs, one symbolic size": f"1 traced, {_size(run)} compiled",
    }


def _size(jitted: Any) -> int:
    return jitted._cache_size()


def in_torch() -> Facts:
    """Graphs that Dynamo hands to its backend over LENGTHS: by default, dynamic, and static."""
    torch = peer.compile_afresh()
    inputs = [torch.ones(length, D) for length in LENGTHS]

    def programs(dynamic: bool | None, shapes: Sequence[Any]) -> int:
        torch.compiler.reset()
        graphs = Graphs()
        function: Callable = torch.compile(
            lambda x: torch.tanh(x).mean(0), backend=graphs, dynamic=dynamic
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for x in shapes:
                function(x)
        return len(graphs.kept)

    return {
        "lengths, and how many differ": f"{len(LENGTHS)}, {len(set(LENGTHS))}",
        "programs, by default": programs(None, inputs),
        "programs, one symbolic size": f"{programs(True, inputs)} compiled",
        "programs, dynamic=False": f"{programs(False, inputs)}, then eager",
        "programs, by default, and a length of 1": programs(None, [*inputs, torch.ones(1, D)]),
    }


def main() -> dict[str, Facts]:
    """Prints both; returns them."""
    return side_by_side(CLAIM, {"JAX": in_jax, "PyTorch": in_torch})


if __name__ == "__main__":
    main()
