"""Expert parallelism: tokens and experts are on different devices; three ways for them to meet.

M tokens a device choose k of E experts each, n devices along ep hold E / n experts. What a device
sends a layer and direction of numbers [D], and rows it multiplies:

    padded   E queues of C places, all-to-all, both ways    2 (n-1)/n E C    E C, most of them empty
    ragged   the chosen rows, each to its expert's device   2 (n-1)/n M k    n M k at most
    ring     every token to every device, results summed    2 (n-1) M        n M k at most

Padded (Lepikhin et al. 2020, GShard, arXiv 2006.16668, section 3.2): with capacity factor f,
C = f M k / E and tokens past it are dropped by that expert (their other choices stay, weights are
not renormalised) and counted; without one C = M and nothing can be dropped. Ragged and ring drop
nothing and multiply with a grouped product over rows sorted by expert (Gale et al. 2022,
MegaBlocks, arXiv 2211.15841). The ring wins where k >= n; `ragged` is `parallel.ragged`'s message.

A bias on each expert's score moves choices and not weights; `parallel.balance` adjusts it.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxinfra.errors import UserError
from jaxinfra.model import moe
from jaxinfra.model.config import Experts
from jaxinfra.model.params import MoE
from pallas_kernels import grouped_matmul
from parallel.mesh import DATA, Axis, ensure_varying, index, present, size, varying
from parallel.ragged import Sizes, ragged_all_to_all

EP, TP = Axis.EP.value, Axis.TP.value
Activation = Callable[[Array], Array]
Multiply = Callable[[str, Array, Array], Array]  # (name, rows [e, C, D], matrices [e, D, F])


def feed_forward(
    layer: MoE,
    x: Float[Array, "B T D"],
    experts: Experts,
    activation: Activation,
    real: Float[Array, "B T"],
    capacity_factor: float | None = None,
    dispatch: str = "padded",
    bias: Float[Array, " E"] | None = None,
    multiply: Multiply | None = None,
) -> tuple[Float[Array, "B T D"], moe.Balance, Float[Array, ""]]:
    """(weighted sum of the chosen experts, balance over all devices' tokens, choices dropped here).

    `layer` holds this device's E / n experts and its share of their width: the result is a part of
    a sum over tp. `real` is 1 for tokens that count in the balance. `bias` is added to
    probabilities where experts are chosen; its cotangent are this device's loads, how many real
    tokens chose each expert. `multiply` takes the place of the products of padded queues, by the
    name of their matrices.
    """
    B, T, D = x.shape
    if capacity_factor is not None and dispatch != "padded":
        raise UserError(f"dispatch={dispatch} drops nothing; leave capacity_factor out")
    weight, probability = route(x, layer.router, experts, bias)
    if bias is not None:
        loads = jnp.einsum("bte,bt->e", (weight > 0).astype(jnp.float32), real)
        weight = _told(weight, bias, lax.stop_gradient(loads))
    share, expert = lax.top_k(weight.reshape(B * T, -1), experts.top_k)
    rows = x.reshape(B * T, D)
    if dispatch == "padded":
        C = places(B * T, experts, capacity_factor)
        out, dropped = _padded(layer, rows, share, expert, activation, C, multiply or _plain)
    else:
        out = {"ragged": _ragged, "ring": _ring}[dispatch](layer, rows, share, expert, activation)
        dropped = jnp.zeros_like(share[0, 0])
    return out.reshape(x.shape), _balance(weight > 0, probability, real), dropped


DISPATCH = ("padded", "ragged", "ring")


def route(
    x: Float[Array, "B T D"], router: Float[Array, "D E"], experts: Experts, bias: Array | None
) -> tuple[Float[Array, "B T E"], Float[Array, "B T E"]]:
    """`moe.route`; a bias [E] changes which experts are chosen, not with what weight."""
    if bias is None:
        return moe.route(x, router, experts)
    logits = jnp.einsum("btd,de->bte", x, router)
    probability = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
    _, chosen = lax.top_k(probability + bias, experts.top_k)
    weight = jnp.sum(jax.nn.one_hot(chosen, experts.num_experts, dtype=jnp.float32), axis=-2)
    weight = weight * probability
    if experts.renormalise:
        weight = weight / jnp.sum(weight, axis=-1, keepdims=True)
    return weight, probability


@jax.custom_vjp
def _told(weight: Array, bias: Array, loads: Array) -> Array:
    """`weight`; the cotangent of `bias`, which is no derivative, are the loads."""
    return weight


def _told_forward(weight: Array, bias: Array, loads: Array) -> tuple[Array, Array]:
    return weight, ensure_varying(loads, varying(bias))


_told.defvjp(_told_forward, lambda loads, g: (g, loads, jnp.zeros_like(loads)))


def places(tokens: int, experts: Experts, capacity_factor: float | None) -> int:
    """C: the places of a device's queue for one expert."""
    if capacity_factor is None:
        return tokens
    wanted = math.ceil(capacity_factor * tokens * experts.top_k / experts.num_experts)
    return min(max(wanted, 1), tokens)


def _padded(
    layer: MoE,
    x: Array,
    share: Array,
    expert: Array,
    activation: Activation,
    C: int,
    multiply: Multiply,
) -> tuple[Float[Array, "M D"], Float[Array, ""]]:
    M, k = expert.shape
    E, D = layer.router.shape[-1], x.shape[1]
    real = (share > 0).astype(jnp.int32)  # a share may have underflown
    chosen = jnp.sum(jax.nn.one_hot(expert, E, dtype=jnp.int32) * real[..., None], axis=1)
    place = jnp.cumsum(chosen, axis=0) - 1  # in the expert's queue, first come
    place = jnp.take_along_axis(place, expert, axis=1)
    kept = (share > 0) & (place < C)
    at = jnp.where(kept, expert * C + place, E * C)
    tokens = jnp.broadcast_to(x[:, None], (M, k, D))
    queues = jnp.zeros_like(x, shape=(E * C, D)).at[at].set(tokens, mode="drop")
    queues = _to_experts(queues.reshape(E, C, D))
    inner = activation(multiply("gate", queues, layer.gate)) * multiply("up", queues, layer.up)
    results = _from_experts(multiply("down", inner, layer.down))
    results = results.reshape(E * C, D).at[at].get(mode="fill", fill_value=0)  # [M, k, D]
    out = jnp.einsum("mkd,mk->md", results, jnp.where(kept, share, 0.0).astype(x.dtype))
    return out, jnp.sum((share > 0) & ~kept, dtype=jnp.float32)


def _plain(name: str, rows: Array, matrices: Array) -> Array:
    return jnp.einsum("ecd,edf->ecf", rows, matrices)


def _to_experts(queues: Float[Array, "E C D"]) -> Float[Array, "e n_C D"]:
    """Every device's queues for the experts that live here."""
    if size(EP) == 1:
        return queues
    return lax.all_to_all(queues, EP, split_axis=0, concat_axis=1, tiled=True)


def _from_experts(results: Float[Array, "e n_C D"]) -> Float[Array, "E C D"]:
    """What all experts made of this device's queues."""
    if size(EP) == 1:
        return results
    return lax.all_to_all(results, EP, split_axis=1, concat_axis=0, tiled=True)


def _ragged(
    layer: MoE, x: Array, share: Array, expert: Array, activation: Activation
) -> Float[Array, "M D"]:
    M, k = expert.shape
    E, n, here = layer.router.shape[-1], size(EP), index(EP)
    order = jnp.argsort(expert.reshape(-1))  # by expert, and so by device
    rows = x[order // k]
    counts = jnp.zeros_like(order, shape=E).at[expert.reshape(-1)].add(1)
    if n == 1:
        results = _grouped(layer, rows, counts, activation)
    else:
        # [from, to, expert there]: what everybody sends to everybody
        sizes = lax.all_gather(counts, EP).reshape(n, n, E // n)
        there = Sizes(jnp.sum(sizes, axis=-1))
        arrived = ragged_all_to_all(rows, n * M * k, there, EP)
        own = sizes[:, here].reshape(-1)
        of_expert = jnp.tile(jnp.arange(E // n, dtype=own.dtype), n)
        # Rows lie by sender and expert; past the last is room that no one filled.
        ids = jnp.repeat(of_expert, own, total_repeat_length=n * M * k)
        ids = jnp.where(jnp.arange(n * M * k) < jnp.sum(own), ids, E // n)
        by_expert = jnp.argsort(ids)
        made = _grouped(layer, arrived[by_expert], jnp.sum(sizes[:, here], axis=0), activation)
        made = jnp.zeros_like(made).at[by_expert].set(made)
        results = ragged_all_to_all(made, M * k, there.back, EP)
    results = jnp.zeros_like(results).at[order].set(results).reshape(M, k, -1)
    return jnp.einsum("mkd,mk->md", results, share.astype(x.dtype))


def _ring(
    layer: MoE, x: Array, share: Array, expert: Array, activation: Activation
) -> Float[Array, "M D"]:
    n, here = size(EP), index(EP)
    e = layer.router.shape[-1] // n
    if n > 1:
        x, share, expert = (lax.all_gather(a, EP, tiled=True) for a in (x, share, expert))
    M, k = expert.shape
    local = expert.reshape(-1) - here * e
    local = jnp.where((local >= 0) & (local < e), local, e)  # those of other devices come last
    order = jnp.argsort(local)
    counts = jnp.zeros_like(order, shape=e).at[local].add(1, mode="drop")
    results = _grouped(layer, x[order // k], counts, activation)
    results = results * share.reshape(-1)[order, None].astype(x.dtype)
    mine = (jnp.arange(M * k) < jnp.sum(counts))[:, None]
    out = jnp.zeros_like(results, shape=x.shape).at[order // k].add(jnp.where(mine, results, 0))
    return lax.psum_scatter(out, EP, tiled=True) if n > 1 else out


def _grouped(
    layer: MoE, rows: Float[Array, "R D"], counts: Int[Array, " e"], activation: Activation
) -> Float[Array, "R D"]:
    """Each row by its expert; rows are sorted by expert, `counts` of each; others give zeros."""
    inner = activation(grouped_matmul(rows, layer.gate, counts))
    inner = inner * grouped_matmul(rows, layer.up, counts)
    return grouped_matmul(inner, layer.down, counts)


def _balance(chosen: Array, probability: Array, real: Array) -> moe.Balance:
    """Means over the tokens of all devices; tensor shards hold the same tokens and agree."""
    sums = (
        jnp.einsum("bte,bt->e", chosen.astype(jnp.float32), real),
        jnp.einsum("bte,bt->e", probability, real),
        jnp.sum(real),
    )
    axes = present(DATA)
    sums = tuple(_everywhere(s, axes) for s in sums)
    count = jnp.maximum(sums[2], 1.0)
    return moe.Balance(sums[0] / count, sums[1] / count)


def _everywhere(x: Array, axes: tuple[str, ...]) -> Array:
    """The sum over the axes of data, the mean over tp where the type knows no better."""
    own = jax.typeof(x).manual_axis_type.varying
    x = lax.psum(x, [a for a in axes if a in own]) if set(axes) & own else x
    return lax.pmean(x, TP) if TP in own else x
