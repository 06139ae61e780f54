"""JAX's half of each contrast: exact counts and bytes; needs no PyTorch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from contrast import (
    autodiff,
    batching,
    capture,
    compile_cost,
    data_parallel,
    fusion,
    graphs,
    in_place,
    ir_ladder,
    memory,
    precision,
    randomness,
    recompilation,
    remat,
)


def test_a_trace_runs_python_once_and_keeps_old_numbers():
    found = capture.in_jax()
    assert found["a list it appends to, after 3 calls"] == 1
    assert found["lines it prints in 3 calls"] == 1
    assert found["a branch on a value"] == "refused: TracerBoolConversionError"
    assert found["a number changed between two calls"] == "old one used"
    assert found["programs then"] == 1
    # the control: without jit the same function does all of it each time
    assert capture.printed(capture.Impure(jnp).prints, jnp.ones(4)) == 3


def test_the_ladder_grows_and_shrinks():
    found = ir_ladder.in_jax()
    assert found["of them products"] == 2
    assert found["captured"] < found["taken apart"] > found["kernels"] >= 3


def test_a_chain_of_operations_moves_more_than_it_must():
    found = fusion.in_jax()
    assert found["kernels, compiled"] < found["kernels, operation by operation"]
    assert found["times the least bytes, operation by operation"] > 5
    one = jax.make_jaxpr(jnp.sin)(jnp.ones((4, 8))).eqns[0]
    assert fusion._bytes(one) == 2 * 4 * 8 * 4


def test_residuals_are_counted_in_bytes():
    x = jax.ShapeDtypeStruct((100,), jnp.float32)
    assert autodiff.residual_bytes(lambda x: x + 1.0, x) == 0
    assert autodiff.residual_bytes(jnp.sin, x) == 400
    found = autodiff.in_jax()
    assert found["bytes kept a number: gelu"] > 2 * found["bytes kept a number: sin"]
    orders = [found[f"operations of derivative {n}"] for n in autodiff.ORDERS]
    assert orders == sorted(orders) and orders[-1] > 2 * orders[-2] > 4  # no sharing between orders


@pytest.mark.slow
def test_policies_keep_less_and_compute_more():
    found = remat.in_jax()
    kept = [found[f"numbers kept a position and layer: {p}"] for p in remat.POLICIES]
    assert kept[0] > kept[1] > kept[2] == remat.D
    assert kept[1] == remat.D + remat.F
    flops = [found[f"FLOPs of products, to those of a forward: {p}"] for p in remat.POLICIES]
    assert flops == [3.0, 3.0, 3.5]  # the last product of a layer is not computed again
    loops = [found[f"temporary KiB, one loop compiled: {p}"] for p in remat.POLICIES]
    assert loops[0] > loops[1] > loops[2]


@pytest.mark.slow
def test_a_loop_s_program_does_not_grow_with_depth():
    found = compile_cost.in_jax()
    few, many = compile_cost.DEPTHS
    unrolled = found[f"unrolled, L = {few}: operations"], found[f"unrolled, L = {many}: operations"]
    assert unrolled[1] > 2.5 * unrolled[0]
    assert found[f"one loop, L = {few}: operations"] == found[f"one loop, L = {many}: operations"]
    x, ws = jnp.ones((2, 4)), jax.random.normal(jax.random.key(0), (3, 4, 4))
    same = compile_cost.unrolled(x, ws), compile_cost.scanned(x, ws)
    np.testing.assert_allclose(*same, rtol=1e-6)


def test_programs_over_a_stream_of_lengths():
    found = recompilation.in_jax()
    lengths = set(recompilation.LENGTHS)
    assert found["programs, by default"] == len(lengths)
    assert found["programs, padded to powers of two"] == len(
        set(map(recompilation.buckets, lengths))
    )
    assert found["programs, one symbolic size"] == f"1 traced, {len(lengths)} compiled"
    assert found["largest difference, padded to exact"] < 1e-6
    assert [recompilation.buckets(n) for n in (1, 2, 3, 4, 5, 33)] == [1, 2, 4, 4, 8, 64]
    assert recompilation.waste([3, 5]) == pytest.approx(1 - 8 / 12)


def test_a_donated_update_copies_nothing():
    found = in_place.in_jax()
    assert found["copies of the cache in one update"] == 1  # what `copies` must see
    assert found["copies, memory given up"] == found["copies in a loop of 8 updates"] == 0
    assert found["bytes that output shares with input"] == in_place.S * in_place.D * 4
    assert found["the same address after the update"]
    assert "deleted" in found["using the old value afterwards"]


def test_donated_weights_are_outputs():
    found = memory.in_jax()
    assert found["KiB of outputs in donated memory"] == found["KiB of weights"]
    kept, given = (found[f"KiB at once, old weights {how}"] for how in ("kept", "given up"))
    assert given < kept


def test_errors_grow_with_fewer_bits():
    *_, exact = precision.matrices()
    assert precision.error(exact, exact) == 0
    assert precision.error(exact * (1 + 2.0**-23), exact) == pytest.approx(1, rel=0.5)
    found = precision.in_jax()
    full = found["float32, highest: ULP"]
    assert full < 50 < 100 * full < found["bfloat16, result float32: ULP"]
    assert found["bfloat16, result float32: ULP"] < found["bfloat16, result bfloat16: ULP"]


def test_a_batch_costs_the_operations_of_one():
    found = batching.in_jax()
    one = found["operations of one gradient"]
    assert found["operations of 16, by vmap"] <= one + 2
    assert found["operations of 16, in a loop"] > 10 * one
    assert found["largest difference"] < 1e-6
    assert found["a branch on a batched value"] == "both run, select"
    assert found["branches on a value of the whole"] == "one runs"


def test_a_draw_depends_on_its_key_alone():
    found = randomness.in_jax()
    assert found["the same draw after another one"] and found["a batch of draws is the loop's"]
    assert found["drawn on 8 devices: as on one"] and found["messages between devices for it"] == 0
    assert found["computed again, the same mask"]


def test_messages_and_bytes_of_a_step():
    found = data_parallel.in_jax()
    size, n = data_parallel.PARAMETERS / 1024, data_parallel.RANKS
    assert found["replicated (DDP): all-reduce, KiB sent"] == 2 * (n - 1) / n * size
    assert found["sharded (FSDP): all-gather"] == 2 * data_parallel.L
    assert found["sharded (FSDP): all-gather, KiB sent"] == 2 * (n - 1) / n * size
    assert found["sharded (FSDP): reduce-scatter"] == data_parallel.L
    assert found["sharded (FSDP): reduce-scatter, KiB sent"] == (n - 1) / n * size


def test_the_chain_that_is_replayed_is_a_power():
    x, w = graphs.inputs()
    wanted = x @ np.linalg.matrix_power(w.astype(np.float64), graphs.STEPS)
    np.testing.assert_allclose(graphs.chain(x, w), wanted, atol=1e-3)
