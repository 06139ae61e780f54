"""Random numbers: a key that is passed, and a generator that is changed.

JAX's draw is a pure function of its key, so order, batching and sharding cannot change it: each
number of an array is a hash of the key and of its own place. PyTorch's generator is state of the
process or of a device, and a draw is what came before it. `torch.func.vmap` therefore refuses
until it is told what is meant, and a forward pass that is computed again must put the state back
first.

    python -m contrast.randomness
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from contrast import peer
from contrast.show import Facts, side_by_side
from parallel import mesh

CLAIM = (
    "A JAX draw depends on its key alone: not on order, batch or devices; a PyTorch draw "
    "depends on every draw before it."
)
N = 8


def in_jax() -> Facts:
    """Whether draws are the same when something that should not matter changes."""
    key = jax.random.key(0)
    one, two = jax.random.split(key)
    first, second = jax.random.normal(one, (N,)), jax.random.normal(two, (N,))
    again = jax.random.normal(two, (N,))
    keys = jax.random.split(key, N)
    looped = jnp.stack([jax.random.normal(k, (N,)) for k in keys])
    batched = jax.vmap(lambda k: jax.random.normal(k, (N,)))(keys)
    single = jax.random.normal(key, (N, N))
    devices = jax.device_count()
    spread = NamedSharding(mesh.make(mesh.parse(f"dp={devices}")), PartitionSpec("dp"))
    sharded = jax.jit(lambda k: jax.random.normal(k, (N, N)), out_shardings=spread)
    facts: dict[str, object] = {
        "the same draw after another one": bool((again == second).all()),
        "the same draw twice if nothing is said": bool(
            (jax.random.normal(one, (N,)) == first).all()
        ),
        "a batch of draws is the loop's": bool((batched == looped).all()),
    }
    text = sharded.lower(key).compile().as_text() or ""
    facts[f"drawn on {devices} devices: as on one"] = bool(
        (np.asarray(sharded(key)) == np.asarray(single)).all()
    )
    facts["messages between devices for it"] = text.count("all-gather(") + text.count("all-reduce(")
    dropout = jax.checkpoint(lambda x: jnp.where(jax.random.bernoulli(key, 0.5, x.shape), x, 0))
    gradient = jax.grad(lambda x: dropout(x).sum())(jnp.ones(N))
    facts["computed again, the same mask"] = bool((gradient == dropout(jnp.ones(N))).all())
    facts["state to save and put back"] = "none"
    return facts


def in_torch() -> Facts:
    """The same of the global generator."""
    torch = peer.torch()

    def draw(*_: Any) -> Any:
        return torch.randn(N)

    torch.manual_seed(0)
    first, second = draw(), draw()
    torch.manual_seed(0)
    torch.rand(1)
    draw()
    facts: dict[str, object] = {
        "the same draw after another one": bool((draw() == second).all()),
        "the same draw twice if nothing is said": bool((draw() == first).all()),
    }
    try:
        torch.func.vmap(lambda x: x + torch.randn(()))(torch.zeros(N))
        facts["a batch of draws is the loop's"] = "no error"
    except RuntimeError:
        torch.manual_seed(0)
        looped = torch.stack([torch.randn(()) for _ in range(N)])
        torch.manual_seed(0)
        batched = torch.func.vmap(lambda x: x + torch.randn(()), randomness="different")(
            torch.zeros(N)
        )
        same = bool((looped == batched).all())
        facts["a batch of draws is the loop's"] = f"refused; randomness='different': {same}"
    for kept in (True, False):
        x = torch.ones(64, requires_grad=True)
        out = torch.utils.checkpoint.checkpoint(
            lambda x: torch.nn.functional.dropout(x).exp(), x, use_reentrant=False,
            preserve_rng_state=kept,
        )  # fmt: skip
        out.sum().backward()
        dropped = out == 1.0  # exp(0)
        same = bool(((x.grad == 0) == dropped).all())
        name = "computed again, the same mask"
        facts[name if kept else name + ", state not put back"] = same
    facts["state to save and put back"] = f"{torch.get_rng_state().nbytes:,} bytes"
    return facts


def main() -> dict[str, Facts]:
    """Prints both; returns them."""
    return side_by_side(CLAIM, {"JAX": in_jax, "PyTorch": in_torch})


if __name__ == "__main__":
    mesh.emulate(8)
    main()
