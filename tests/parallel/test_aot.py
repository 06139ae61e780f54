"""Steps compiled for pods that are not here, and the commands that compile without running."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxinfra.errors import UserError
from jaxinfra.model import cache, presets
from jaxinfra.model.counts import kv_bytes_per_token, num_params
from jaxinfra.model.params import init
from parallel import aot, aot_decode, commands
from parallel import mesh as M
from parallel.census import overlap, totals
from parallel.collective_matmul import all_gather_matmul, matmul_reduce_scatter
from parallel.train import Strategy
from tests.pallas_kernels.tpu_topology import kernels, needs_libtpu
from tests.parallel.emulated import relative

GIB = 2**30
POD = {  # name: model, chip, count, mesh, rows, tokens a row, GiB that a chip has
    "llama 8B, v5e": ("llama-3.1-8b", "v5e", 16, "fsdp=16", 16, 2048, 16),
    "llama 8B, v6e": ("llama-3.1-8b", "v6e", 16, "fsdp=16", 16, 2048, 32),
    "llama 70B, 256 v5p": ("llama-3.1-70b", "v5p", 256, "fsdp=64,tp=4", 256, 4096, 95),
    "qwen3 30B, experts on 64 v5p": (
        "qwen3-30b-a3b", "v5p", 64, "fsdp=8,ep=8", 64, 4096, 95),
}  # fmt: skip


@needs_libtpu
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("case", sorted(POD))
def test_a_step_compiles_for_a_pod_and_fits(case):
    model, chip, count, mesh, rows, seq_len, has = POD[case]
    found = aot.compile_step(
        presets.find(model), Strategy(mesh), aot.devices(chip, count), rows=rows, seq_len=seq_len
    )
    m = found.memory
    assert m.aliased > 0.99 * (m.arguments - rows * (seq_len + 1) * 4 - 2**20)  # donated
    assert found.peak < has * GIB
    assert kernels(found.program) > 0  # attention of this project's, not the fallback
    assert "all-gather" in totals(found.collectives)
    assert ("all-to-all" in totals(found.collectives)) == ("ep" in mesh)


@needs_libtpu
def test_a_step_that_does_not_fit_is_told():
    with pytest.raises(UserError, match=r"aot: the step needs .* on each device"):
        aot.compile_step(
            presets.find("qwen3-1.7b"), Strategy("dp=4"), aot.devices("v5e", 4), rows=8,
            seq_len=2048,
        )  # fmt: skip


def test_a_decode_step_is_cut_by_annotations():
    """On devices that are here: the tokens and the cache of one device, and few messages."""
    config = presets.find("tiny").replace(num_layers=2, d_model=32, num_heads=4, num_kv_heads=2,
                                          head_dim=8, d_ff=64)  # fmt: skip
    found = aot_decode.compile_decode(
        config, "dp=2,tp=2", jax.devices(), rows=4, seq_len=16, dtype=jnp.float32
    )
    params = jax.jit(lambda: cache.unstack(init(jax.random.key(0), config), config))()
    placed = aot_decode.shardings(M.make(M.parse("dp=2,tp=2")), config)
    tokens = np.arange(4, dtype=np.int32)[:, None]
    here = (params, tokens, cache.empty(config, 4, 16))
    there = jax.device_put(here, placed)
    plain = jax.jit(aot_decode.step, static_argnums=1)
    for _ in range(3):
        token, held = plain(here[0], config, here[1], here[2])
        other, moved = found.program(*there)
        assert token.tolist() == other.tolist()
        assert relative(moved, held) < 1e-5
        here, there = (params, token, held), (there[0], other, moved)
    # No weight and no cache travels: activations of two rows do, and logits' winners.
    assert max(c.bytes for c in found.collectives) <= 2 * (64 + 3 * 32) * 4
    with pytest.raises(UserError, match="over tp and dp, not pp"):
        aot_decode.compile_decode(config, "pp=2", jax.devices(), rows=4, seq_len=16)
    with pytest.raises(UserError, match="K=2 is no multiple of 4"):
        aot_decode.compile_decode(config, "tp=4", jax.devices(), rows=4, seq_len=16)


@needs_libtpu
@pytest.mark.parametrize("chip", ["v5e", "v6e"])
def test_a_decode_step_compiles_for_chips(chip):
    config = presets.find("llama-3.1-8b").replace(num_layers=8)
    rows, room = 32, 4096
    found = aot_decode.compile_decode(config, "tp=4", aot.devices(chip, 4), rows=rows, seq_len=room)
    keys = rows * room * kv_bytes_per_token(config, "bfloat16") // 4
    weights = 2 * num_params(config) // 4
    assert found.memory.arguments == pytest.approx(keys + weights, rel=0.02)
    assert found.memory.aliased > 0.99 * keys  # the cache is written in place
    assert found.peak < 1.2 * (keys + weights)


@needs_libtpu
def test_ragged_messages_compile():
    large = presets.find("qwen3-30b-a3b")
    experts = dataclasses.replace(large.experts, num_experts=16, top_k=2, d_ff=256)
    config = large.replace(num_layers=2, d_model=512, experts=experts)
    found = aot.compile_step(
        config, Strategy("ep=8", dispatch="ragged"), aot.devices("v5p", 8), rows=8, seq_len=1024
    )
    counts = totals(found.collectives)
    # There and back, again in the backward pass's repetition, and both transposed; a layer each.
    assert counts["ragged-all-to-all"][0] % config.num_layers == 0
    assert counts["ragged-all-to-all"][0] >= 4 * config.num_layers


@needs_libtpu
def test_products_run_under_the_messages_of_a_collective_matmul():
    """All but the last of n products, for the last has no message to wait for."""
    n = 8
    mesh = M.make({M.Axis.TP: n}, aot.devices("v5p", n))
    x = jax.ShapeDtypeStruct((16384, 4096), jnp.bfloat16)
    w = jax.ShapeDtypeStruct((4096, 16384), jnp.bfloat16)

    def scheduled(product, ins, out):
        local = jax.shard_map(product, mesh=mesh, in_specs=ins, out_specs=out)
        shapes = [
            jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=NamedSharding(mesh, spec))
            for a, spec in zip((x, w), ins, strict=True)
        ]
        return overlap(jax.jit(local).lower(*shapes).compile().as_text())

    columns = (P("tp", None), P(None, "tp")), P(None, "tp")
    ring = scheduled(lambda x, w: all_gather_matmul(x, w, "tp"), *columns)
    plain = scheduled(lambda x, w: lax.all_gather(x, "tp", tiled=True) @ w, *columns)
    assert ring == (n - 1, n) and plain[0] == 0
    rows = (P(None, "tp"), P("tp", None)), P("tp", None)
    under, products = scheduled(lambda x, w: matmul_reduce_scatter(x, w, "tp"), *rows)
    assert products >= n and under >= n - 2


def test_slices_are_as_even_as_they_can_be():
    assert aot.shape("v5e", 16) == "4x4" and aot.shape("v6e", 8) == "2x4"
    assert aot.shape("v5p", 256) == "4x8x8" and aot.shape("v5p", 4) == "2x2x1"
    with pytest.raises(UserError, match="there are v5e, v5p, v6e"):
        aot.shape("H100", 8)
    with pytest.raises(UserError, match="power of two, 4 or more"):
        aot.shape("v5p", 12)


def test_the_command_tells_collectives_without_running(capsys):
    commands.census("tiny", mesh="dp=8", seq_len=16)
    told = capsys.readouterr().out
    line = next(line for line in told.splitlines() if line.startswith("all-reduce"))
    _, loops, devices, times, each, sent = line.split()
    assert (loops, devices, times) == ("0", "8", "1")
    assert float(sent) == pytest.approx(float(each) * 2 * 7 / 8, abs=0.01)


@needs_libtpu
def test_offloaded_inputs_of_layers_wait_in_the_hosts_memory():
    config = presets.find("qwen3-0.6b").replace(num_layers=4)
    rows, seq_len = 8, 1024
    found = aot.compile_step(
        config, Strategy("fsdp=4"), aot.devices("v5p", 4), rows=rows, seq_len=seq_len,
        remat="offload",
    )  # fmt: skip
    there = found.program.memory_analysis().host_temp_size_in_bytes
    assert there == config.num_layers * rows // 4 * seq_len * config.d_model * 2
