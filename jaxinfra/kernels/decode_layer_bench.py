"""A token through 28 layers of Qwen3-0.6B's shape on one NVIDIA GPU: a kernel a layer, and XLA's.

    jaxinfra kernels bench decode-layer

Seconds are those of the wall for 20 tokens in one device loop, the gaps between kernels included:
they are what is to be saved. Weights differ by layer, so that they come from memory and not from
the cache. The kernel's outputs are first held to its specification's.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp

from jaxinfra.errors import UserError
from jaxinfra.hardware.detect import here
from jaxinfra.model.cache import unstack
from jaxinfra.model.params import init
from jaxinfra.model.presets import PRESETS
from pallas_kernels import decode_layer as fused
from pallas_kernels.decode_layer import reference, triton

CONFIG, TOKENS, LENGTH, PAGE = PRESETS["qwen3-0.6b"], 20, 640, 16
CONFIGS = [
    triton.Config(tile=tile, columns=columns, warps=warps)
    for tile, columns, warps in itertools.product((2**14, 2**15), (1024, 4096), (8, 16))
] + [triton.Config(keys=32), triton.Config(keys=128)]


def layers() -> list[fused.LayerWeights]:
    """Random weights of every layer."""
    make = jax.jit(lambda key: unstack(init(key, CONFIG, jnp.bfloat16), CONFIG))
    found: list[Any] = list(make(jax.random.key(0)).layers)
    return [
        fused.LayerWeights(
            layer.attn_norm, layer.attn.qkv, layer.attn.o, layer.mlp_norm, layer.mlp.gate_up,
            layer.mlp.down, layer.attn.qkv_bias, layer.attn.q_norm, layer.attn.k_norm,
        ) for layer in found
    ]  # fmt: skip


def inputs(count: int) -> dict[str, Any]:
    """A residual stream, pages of `count` layers that hold LENGTH - 1 tokens, and facts."""
    K, H, M = CONFIG.num_kv_heads, CONFIG.head_dim, 64
    keys = jax.random.split(jax.random.key(1), 2)
    pages = jax.random.normal(keys[0], (M, K, PAGE, H), jnp.bfloat16)
    angle = LENGTH * 1e6 ** (-jnp.arange(H // 2) / (H // 2))
    table = jax.random.permutation(keys[1], M).astype(jnp.int32)
    slot = table[(LENGTH - 1) // PAGE] * PAGE + (LENGTH - 1) % PAGE
    return {
        "x": jax.random.normal(keys[0], (CONFIG.d_model,)), "pool": [(pages, pages)] * count,
        "cos": jnp.cos(angle), "sin": jnp.sin(angle), "table": table,
        "facts": jnp.stack([jnp.int32(LENGTH), slot]),
    }  # fmt: skip


def token(weights: list, given: dict[str, Any], **options: Any) -> tuple[Any, list]:
    """x and pages behind all layers."""
    x, pool, count = given["x"], [], fused.counters(CONFIG.num_kv_heads)
    for layer, (k, v) in zip(weights, given["pool"], strict=True):
        x, k, v, count = fused.decode_layer(
            x, k, v, count, layer, given["cos"], given["sin"], given["table"],
            given["facts"], scale=CONFIG.scale, eps=CONFIG.norm_eps, **options,
        )  # fmt: skip
        pool.append((k, v))
    return x, pool


def seconds(of: Callable[[], Any], rounds: int = 7) -> float:
    """Of the wall, the median of some calls."""
    taken = []
    for turn in range(rounds + 3):
        start = time.perf_counter()
        jax.block_until_ready(of())
        if turn >= 3:
            taken.append(time.perf_counter() - start)
    return median(taken)


def bench(out: Path | None = None) -> None:
    """Prints of every configuration microseconds a token, and the share of the speed of a copy.

    It leaves no entry: `out` is what all benches take.
    """
    del out
    if jax.default_backend() != "gpu":
        raise UserError("kernels bench decode-layer: no NVIDIA GPU here")
    weights = layers()
    given = inputs(len(weights))
    (k, v), (length, slot) = given["pool"][0], given["facts"]
    want = reference.decode_layer(
        given["x"], k, v, weights[0], given["cos"], given["sin"], given["table"], length, slot,
        scale=CONFIG.scale, eps=CONFIG.norm_eps,
    )[0]  # fmt: skip
    moved = sum(a.nbytes for a in jax.tree.leaves(weights))
    floor = moved / here().bandwidth
    print(f"{moved / 1e9:.2f} GB of weights, {floor * 1e6:.0f} us at the speed of a copy")
    for config in CONFIGS:
        try:
            one = {**given, "pool": given["pool"][:1]}
            got = jax.jit(lambda w, g, c=config: token(w, g, config=c)[0])(weights[:1], one)
            off = float(jnp.linalg.norm(got - want) / jnp.linalg.norm(want - given["x"]))

            def many(weights, given, config=config):
                def body(_, carry):
                    x, pool = token(weights, {**given, "x": carry[0], "pool": carry[1]},
                                    config=config)  # fmt: skip
                    return x / jnp.linalg.norm(x), pool

                return jax.lax.fori_loop(0, TOKENS, body, (given["x"], given["pool"]))[0]

            run = jax.jit(many)
            took = seconds(lambda run=run: run(weights, given)) / TOKENS
        except Exception as error:  # a compiler's, of any class
            print(f"{config}: {str(error).strip().splitlines()[0]:.120}")
            continue
        print(f"{config}: {took * 1e6:.0f} us a token, {floor / took:.2f} of the floor's speed, "
              f"off by {off:.1e}", flush=True)  # fmt: skip


if __name__ == "__main__":
    bench()
