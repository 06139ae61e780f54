"""An engine over several devices: each has its heads, its part of the feed-forward and the words.

The step runs inside `shard_map` on a smaller model: N / n query and K / n key heads, F / n inner
units, V / n rows of the unembedding; embeddings and norms are whole everywhere. What leaves
attention and feed-forward is summed over the devices (Megatron-LM, arXiv 1909.08053, section 3),
logits are gathered, and all devices draw the same tokens. Pages are cut by key heads.

Cost of a device and step: its share of the weights, keys and values, two sums of [T, D] a layer and
one gathering of [S, V] logits.
"""

from __future__ import annotations

import dataclasses
from typing import Any, cast

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as Spec

from decode.step import State
from jaxinfra.errors import UserError
from jaxinfra.model import cache as kv
from jaxinfra.model.config import ModelConfig
from parallel import mesh as M

TP = M.Axis.TP.value
_OUTPUTS = ("qkv", "qkv_bias", "gate_up", "unembed")  # cut in their first dimension
_INPUTS = ("o", "down")  # and in their last


class Devices:
    """Where an engine's arrays are cut, over `count` devices."""

    def __init__(self, config: ModelConfig, count: int) -> None:
        """Raises UserError where the model cannot be cut so, or devices are missing."""
        if config.experts:
            raise UserError("engine: experts are not cut; leave out tp")
        for name in ("num_heads", "num_kv_heads", "d_ff", "vocab_size"):
            if getattr(config, name) % count:
                raise UserError(f"engine: {name}={getattr(config, name)} is no multiple of "
                                f"tp={count}; give another tp")  # fmt: skip
        self.config, self.count = config, count
        self.mesh: Mesh = M.make({M.Axis.TP: count})
        self.local = dataclasses.replace(
            config, num_heads=config.num_heads // count, d_ff=config.d_ff // count,
            num_kv_heads=config.num_kv_heads // count,
        )  # fmt: skip

    def place(self, params: kv.DecodeParams) -> kv.DecodeParams:
        """`params` cut, the rows of merged matrices in the order of devices."""
        N, K, H, F = (getattr(self.config, n) for n in
                      ("num_heads", "num_kv_heads", "head_dim", "d_ff"))  # fmt: skip
        orders = {"qkv": self._order(N * H, K * H, K * H), "gate_up": self._order(F, F)}
        orders["qkv_bias"] = orders["qkv"]

        def one(path: tuple, leaf: Any) -> jax.Array:
            if not hasattr(leaf, "shape") or leaf.dtype.itemsize == 1:
                raise UserError("engine: quantised weights are not cut; leave out tp")
            name = path[-1].name
            if name in orders:
                leaf = leaf[orders[name]]
            return jax.device_put(leaf, NamedSharding(self.mesh, _spec(path, leaf)))

        return jax.tree.map_with_path(one, params)

    def keep(self, state: State) -> State:
        """`state` with its pages cut."""
        return jax.tree.map(
            lambda a, spec: jax.device_put(a, NamedSharding(self.mesh, spec)), state, _held(state)
        )

    def run(self, step: Any, params: kv.DecodeParams, state: State) -> Any:
        """`step` of (params, state, packed, mask) inside `shard_map`."""
        cut = jax.tree.map_with_path(_spec, params)
        held = _held(state)
        return jax.shard_map(
            step, mesh=self.mesh, in_specs=(cut, held, Spec(), Spec()), out_specs=(held, Spec()),
            check_vma=False,  # what all devices compute alike is not typed so
        )  # fmt: skip

    def _order(self, *sizes: int) -> np.ndarray:
        """Rows of matrices laid one under another, those of each device together."""
        starts = np.cumsum([0, *sizes[:-1]])
        parts = [
            start + np.arange(size).reshape(self.count, -1)
            for start, size in zip(starts, sizes, strict=True)
        ]
        return np.concatenate(parts, axis=1).reshape(-1)


def _spec(path: tuple, leaf: Any) -> Spec:
    name = path[-1].name
    if name in _OUTPUTS:
        return Spec(TP)
    return Spec(None, TP) if name in _INPUTS else Spec()


def _held(state: State) -> State:
    pool = jax.tree.map(lambda _: Spec(None, TP), state.pool)
    return cast(State, State(pool=pool, last=Spec(), counts=Spec(), bias=Spec()))  # pyright: ignore
