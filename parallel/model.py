"""The model inside `shard_map`: the blocks of `jaxinfra.model` on local shards, with collectives.

One forward pass serves every mesh. What an axis does stands where it is needed and is nothing where
the mesh has no such axis: fsdp gathers a layer before its use (`layout.gathered`), tp enters and
leaves each pair of matrices (`tensor`), cp attends to other devices' positions (`context`), ep
sends tokens to their experts (`experts`). The arithmetic is that of `jaxinfra.model.transformer`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from jaxinfra.errors import UserError
from jaxinfra.model import moe, rope, transformer
from jaxinfra.model.config import ModelConfig
from jaxinfra.model.params import MLP, Layer, MoE, Params
from jaxinfra.train.loss import Batch, target_weights
from parallel import context, experts, fp8, tensor
from parallel.layout import gathered, letters
from parallel.mesh import DATA, Axis, ensure_varying, present, varying

# What is kept of a layer beside its input, which offload keeps in the host's memory.
REMAT = {
    "none": "everything",
    "matmuls": "results of matrix products, and what attention's backward pass needs",
    "attention": "what attention's backward pass needs",
    "full": "nothing",
    "offload": "nothing",
}

Rows = Mapping[str, Array]  # [B, T]: inputs, targets, weights, positions, segments where packed


@dataclasses.dataclass(frozen=True)
class Options:
    """How a step is computed; none of it changes what is computed."""

    dtype: Any = jnp.float32  # of the computation
    accumulate: int = 1  # parts of a device's rows, one after the other
    remat: str = "full"  # what the backward pass computes again, one of REMAT
    unroll: int = 1  # layers a turn of their loop, as TrainConfig.unroll
    sequence: bool = True  # under tp, what lies between pairs of matrices is cut by position
    context: str = "ring"  # under cp, one of parallel.context.METHODS
    z_loss: float = 0.0
    capacity_factor: float | None = None  # of experts' queues; None: no token is dropped
    dispatch: str = "padded"  # of tokens to experts, one of parallel.experts.DISPATCH
    fp8: bool = False  # products of layers' matrices in float8

    def __post_init__(self) -> None:
        if self.context not in context.METHODS:
            raise UserError(f"context={self.context!r}: choose one of {', '.join(context.METHODS)}")
        if self.dispatch not in experts.DISPATCH:
            raise UserError(
                f"dispatch={self.dispatch!r}: choose one of {', '.join(experts.DISPATCH)}"
            )
        if self.remat not in REMAT:
            raise UserError(f"remat={self.remat!r}: choose one of {', '.join(REMAT)}")


def rows_of(batch: Batch, cp: int = 1) -> Rows:
    """What the model needs of a batch of B rows of T + 1 tokens, before it is cut over a mesh.

    Positions stand in the order in which `cp` devices hold them.
    """
    rows = _in_order(batch)
    if cp == 1:
        return rows
    order = context.zigzag(rows["inputs"].shape[1], cp)
    return {name: values[:, order] for name, values in rows.items()}


def _in_order(batch: Batch) -> dict[str, Array]:
    tokens, segments = batch["tokens"], batch.get("segment_ids")
    inputs = tokens[:, :-1]
    rows = {"inputs": inputs, "targets": tokens[:, 1:], "weights": target_weights(batch)}
    if segments is None:
        positions = jnp.broadcast_to(jnp.arange(inputs.shape[1]), inputs.shape)
        return rows | {"positions": positions}
    segments = segments[:, :-1]
    return rows | {"segments": segments, "positions": transformer.positions_of(segments)}


def cast_varying(params: Params, options: Options) -> Params:
    """Parameters typed as varying over every axis, so that their gradients stay unsummed.

    A sum is then a line of the step builder and not something that happens inside a loop. Where
    sequences are not cut, norms act on what all tensor shards hold alike, and keep that type.
    """
    whole = [axis for axis in Axis if axis != Axis.TP or options.sequence]
    return ensure_varying(params, whole)


def embed(params: Params, config: ModelConfig, rows: Rows, options: Options) -> Array:
    """The first layer's input [B, t, D]."""
    table = gathered(params.embed, "V D")
    x = tensor.embed(table, config, rows["inputs"], options.sequence)
    return ensure_varying(x, [a for a in Axis if a != Axis.TP or options.sequence])


def block(
    x: Float[Array, "B t D"],
    layer: Layer,
    config: ModelConfig,
    rows: Rows,
    options: Options,
    largest: fp8.History = None,
    bias: Float[Array, " E"] | None = None,
) -> tuple[Float[Array, "B t D"], Any]:
    """One layer, its parameters cut as `layout.RULES` says.

    Also what routing did, where there are experts: (balance, choices dropped on this device).
    `largest` are what delayed scales of float8 go by, `bias` is that of the router.
    """

    def before(x: Array, layer: Layer, largest: fp8.History) -> tuple[Array, Array, Array]:
        layer = gathered(layer, _dims(layer))
        cos_sin = rope.table(config.rope, config.head_dim, rows["positions"])
        h = tensor.enter(transformer.norm(x, layer.attn_norm, config), options.sequence)
        if options.fp8:
            q, k, v = fp8.project_qkv(layer.attn, h, largest)
        else:
            q, k, v = transformer.project_qkv(layer.attn, h)
        q, k = checkpoint_name(q, "matmul"), checkpoint_name(k, "matmul")
        return *transformer.rotate_qk(layer.attn, q, k, config, cos_sin), v

    def after(
        x: Array, out: Array, layer: Layer, largest: fp8.History, bias: Array | None
    ) -> tuple[Array, Any]:
        layer = gathered(layer, _dims(layer))
        if options.fp8:
            out = fp8.project_out(layer.attn, out, largest)
        else:
            out = jnp.einsum("btnh,nhd->btd", out, layer.attn.o)
        out = checkpoint_name(out, "matmul")
        x = transformer.residual(
            x, tensor.leave(out, options.sequence), layer.post_attn_norm, config
        )
        h = tensor.enter(transformer.norm(x, layer.mlp_norm, config), options.sequence)
        if options.fp8 and isinstance(layer.mlp, MLP):
            act = transformer.activation(config)
            out, routing = fp8.feed_forward(layer.mlp, h, act, largest), None
        else:
            out, routing = _feed_forward(layer, h, config, rows, options, largest, bias)
        out = tensor.leave(out, options.sequence)
        return transformer.residual(x, out, layer.post_mlp_norm, config), routing

    # Where no loop is between a layer and its copy, XLA would take them for the same.
    apart = options.unroll > 1
    # Attention stands outside these two, so that what its own backward pass needs is kept.
    if options.remat in ("matmuls", "attention"):
        names = ("matmul",) if options.remat == "matmuls" else ()
        policy = jax.checkpoint_policies.save_only_these_names(*names)
        before = jax.checkpoint(before, policy=policy, prevent_cse=apart)
        after = jax.checkpoint(after, policy=policy, prevent_cse=apart)
    q, k, v = before(x, layer, largest)
    out = context.attend(q, k, v, rows.get("segments"), config.scale, options.context)
    return after(x, out, layer, largest, bias)


def _feed_forward(
    layer: Layer,
    h: Array,
    config: ModelConfig,
    rows: Rows,
    options: Options,
    largest: fp8.History,
    bias: Array | None,
) -> tuple[Array, Any]:
    if not isinstance(layer.mlp, MoE) or config.experts is None:
        return transformer.feed_forward(layer, h, config)[0], None
    real = (rows["segments"] > 0) if "segments" in rows else jnp.ones(h.shape[:2], bool)
    out, balance, dropped = experts.feed_forward(
        layer.mlp, h, config.experts, transformer.activation(config), real.astype(jnp.float32),
        options.capacity_factor, options.dispatch, bias,
        multiply=functools.partial(fp8.by_expert, history=largest) if options.fp8 else None,
    )  # fmt: skip
    return out, (balance, dropped)


def blocks(
    layers: Layer,
    config: ModelConfig,
    x: Array,
    rows: Rows,
    options: Options,
    largest: Float[Array, "l products 3 steps"] | None = None,
    bias: Float[Array, "l E"] | None = None,
    real: Float[Array, " l"] | None = None,
) -> tuple[Float[Array, "B t D"], Any]:
    """Stacked layers [l, ...] one after the other; those where `real` is 0 are passed by."""

    def one(x: Array, scanned: tuple[Layer, fp8.History, Any, Any]) -> tuple[Array, Any]:
        layer, largest, bias, here = scanned

        def through(x: Array, layer: Layer, bias: Array | None) -> Array:
            return block(x, layer, config, rows, options, bias=bias)[0]

        if here is not None:
            return jax.lax.cond(here > 0, through, lambda x, *_: x, x, layer, bias), None
        return block(checkpoint_name(x, "input"), layer, config, rows, options, largest, bias)

    if options.remat in ("full", "offload"):
        policy = None
        if options.remat == "offload":
            policy = jax.checkpoint_policies.save_and_offload_only_these_names(
                names_which_can_be_saved=[], names_which_can_be_offloaded=["input"],
                offload_src="device", offload_dst="pinned_host",
            )  # fmt: skip
        one = jax.checkpoint(one, prevent_cse=options.unroll > 1, policy=policy)
    unroll = min(options.unroll, layers.attn_norm.shape[0])
    return jax.lax.scan(one, x, (layers, largest, bias, real), unroll=unroll)


def loss_sums(
    params: Params, config: ModelConfig, x: Array, rows: Rows, options: Options
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """(loss, nll) summed over this device's targets, from the last layer's output.

    Typed as varying over all axes but tp, along which they are already sums.
    """
    x = transformer.norm(x, gathered(params.final_norm, "D"), config)
    x = tensor.enter(x, options.sequence)
    if params.unembed is None:
        w = gathered(params.embed, "V D").T
    else:
        w = gathered(params.unembed, "D V")
    # float16 gradients need the loss scale, which comes with the backward pass.
    again = options.remat in ("full", "offload") or x.dtype == jnp.float16
    sums = tensor.cross_entropy(
        x.reshape(-1, x.shape[-1]), w, rows["targets"].reshape(-1), rows["weights"].reshape(-1),
        config, z_loss=options.z_loss, again=again,
    )  # fmt: skip
    return ensure_varying(sums, (Axis.PP, *DATA))


def local_loss(
    params: Params,
    config: ModelConfig,
    rows: Rows,
    count: Array,
    options: Options,
    largest: Float[Array, "L products 3 steps"] | None = None,
    bias: Float[Array, "L E"] | None = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """This device's share of the loss and {"nll": its share of the mean nll}; sums over DATA."""
    x = embed(params, config, rows, options)
    x, routing = blocks(params.layers, config, x, rows, options, largest, bias)
    loss, nll = loss_sums(params, config, x, rows, options)
    loss, aux = loss / count, {"nll": nll / count}
    if config.experts is not None:
        balance, dropped = routing
        if config.experts.balance_coef:  # or its sums in every layer are for nothing
            whole = jax.lax.psum(1, present(DATA)) if present(DATA) else 1
            # Of a part of the batch its share, as on one device; each device tells the same.
            share = count_of(rows) / count / whole
            loss = loss + share * config.experts.balance_coef * moe.balance_loss(balance)
        dropped = ensure_varying(jnp.sum(dropped), DATA)
        aux["dropped"] = jax.lax.pmean(dropped, "tp") if "tp" in varying(dropped) else dropped
    return loss, aux


def count_of(rows: Rows) -> Float[Array, ""]:
    """Targets in the whole batch, at least one."""
    own = ensure_varying(jnp.sum(rows["weights"]), DATA)
    axes = present(DATA)
    return jnp.maximum(jax.lax.psum(own, axes) if axes else own, 1.0)


def check(config: ModelConfig, mesh_shape: Mapping[str, int], batch: Batch, options: Options):
    """Raises UserError where a batch does not divide over a mesh."""
    B, T = batch["tokens"].shape[0], batch["tokens"].shape[1] - 1
    if config.max_seq_len < T:
        raise UserError(f"tokens: T={T} exceeds max_seq_len={config.max_seq_len}; truncate")
    parts = options.accumulate
    for axis in (Axis.DP, Axis.FSDP, Axis.EP):
        parts *= mesh_shape.get(axis, 1)
    if B % parts:
        raise UserError(
            f"batch: B={B} rows are no multiple of {parts} (dp * fsdp * ep * accumulate); give more"
        )
    tp, cp = mesh_shape.get(Axis.TP, 1), mesh_shape.get(Axis.CP, 1)
    parts = (tp if options.sequence else 1) * cp
    parts = math.lcm(parts, 2 * cp) if cp > 1 else parts
    if T % parts:
        raise UserError(f"batch: T={T} positions are no multiple of {parts}; give another length")
    if options.context == "ulysses" and config.num_kv_heads % (tp * cp):
        raise UserError(
            f"context=ulysses: K={config.num_kv_heads} heads are no multiple of tp * cp = "
            f"{tp * cp}; choose ring or gather"
        )


def _dims(layer: Layer) -> Any:
    """Letters of one layer's arrays, without the L of the stack."""
    stacked = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((1, *leaf.shape), leaf.dtype), layer)
    return jax.tree.map(lambda dims: dims.removeprefix("L "), letters(stacked))
