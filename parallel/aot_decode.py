"""A decode step compiled for chips that are not here: one token for each of many rows.

The step is `jaxinfra.model.cache`'s, cut by annotations alone: matrices by their outputs (of the
second of each pair by their inputs), the cache by key heads and rows, over the axes tp and dp.
Where to reduce is the compiler's finding, and the census tells what it found.

Cost of a device and token: its share of the weights read once, 2 S K H / tp numbers of cache a row
and layer, and two all-reduces of [B / dp, D] a layer: latency, not bandwidth.

    python -m jaxinfra aot llama-3.1-8b --decode --chip v6e --count 4 --mesh tp=4 --rows 64
"""

from __future__ import annotations

import time
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as Spec
from jaxtyping import Array, Int

from jaxinfra.errors import UserError
from jaxinfra.measure.structure import memory
from jaxinfra.model import cache
from jaxinfra.model import params as P
from jaxinfra.model.config import ModelConfig
from parallel import mesh as M
from parallel.aot import Compiled, compiled_or_told
from parallel.census import census
from parallel.mesh import Axis

TP, DP = Axis.TP.value, Axis.DP.value
_OUTPUTS = ("qkv", "qkv_bias", "gate_up", "unembed", "embed")  # cut in their first dimension
_INPUTS = ("o", "down")  # and in their last


def step(
    params: cache.DecodeParams, config: ModelConfig, tokens: Int[Array, "B 1"], held: cache.Cache
) -> tuple[Int[Array, "B 1"], cache.Cache]:
    """The most likely next token of each row, and the cache with this one in it."""
    x, held = cache.extend(params, config, tokens, held)
    return jnp.argmax(cache.head(params, config, x), axis=-1).astype(jnp.int32), held


def shardings(mesh: Any, config: ModelConfig) -> tuple[Any, NamedSharding, cache.Cache]:
    """Of parameters, of tokens [B, 1], of the cache."""
    axis = lambda name: name if name in mesh.shape else None  # noqa: E731
    tp, dp = axis(TP), axis(DP)

    def of(path: tuple, leaf: Any) -> NamedSharding:
        name = path[-1].name
        spec = [None] * len(leaf.shape)
        if name in _OUTPUTS:
            spec[0] = tp
        elif name in _INPUTS and len(leaf.shape) == 2:
            spec[-1] = tp
        return NamedSharding(mesh, Spec(*spec))

    shapes = jax.eval_shape(lambda p: cache.unstack(p, config), P.abstract(config))
    keys = NamedSharding(mesh, Spec(dp, tp))
    layers = (keys,) * config.num_layers
    held = cache.Cache(layers, layers, NamedSharding(mesh, Spec(dp)))  # pyright: ignore
    return jax.tree.map_with_path(of, shapes), NamedSharding(mesh, Spec(dp, None)), held


def compile_decode(
    config: ModelConfig,
    mesh: str,
    places: list[Any],
    *,
    rows: int,
    seq_len: int,
    dtype: Any = jnp.bfloat16,
) -> Compiled:
    """One token for `rows` sequences with room for `seq_len` tokens each; the cache is donated.

    Args:
      mesh: sizes of dp and tp.
      places: `aot.devices(...)` or `jax.devices()`.

    Raises UserError where the mesh has other axes, heads or rows do not divide, experts are to be
    cut, or a chip has too little memory.
    """
    sizes = M.parse(mesh)
    tp, dp = sizes.get(Axis.TP, 1), sizes.get(Axis.DP, 1)
    if other := [str(axis) for axis, size in sizes.items() if axis not in (TP, DP) and size > 1]:
        raise UserError(f"aot: a decode step is cut over tp and dp, not {', '.join(other)}")
    if config.experts and tp > 1:
        raise UserError("aot: experts are not cut in a decode step; give dp")
    for what, size, parts in (("K", config.num_kv_heads, tp), ("rows", rows, dp),
                              ("V", config.vocab_size, tp)):  # fmt: skip
        if size % parts:
            raise UserError(f"aot: {what}={size} is no multiple of {parts}; give another mesh")
    placed = shardings(M.make(sizes, places), config)
    shapes = (
        jax.eval_shape(lambda p: cache.unstack(p, config), P.abstract(config, dtype)),
        jax.ShapeDtypeStruct((rows, 1), jnp.int32),
        jax.eval_shape(lambda: cache.empty(config, rows, seq_len, dtype)),
    )
    arguments = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        shapes, placed,
    )  # fmt: skip
    jitted = jax.jit(
        lambda params, tokens, held: step(params, config, tokens, held),
        donate_argnums=2, out_shardings=(placed[1], placed[2]),
    )  # fmt: skip
    begun = time.perf_counter()
    with mock.patch.object(jax, "default_backend", lambda: places[0].platform):
        lowered = jitted.lower(*arguments)
    program = compiled_or_told(lowered)
    seconds = round(time.perf_counter() - begun, 1)
    return Compiled(memory(program), census(program), seconds, program)
