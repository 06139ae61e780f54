"""PyTorch's half of each contrast: exact counts and bytes, against JAX's where they must agree."""

import pytest

torch = pytest.importorskip("torch")

from contrast import (  # noqa: E402
    autodiff,
    batching,
    capture,
    compile_cost,
    data_parallel,
    dispatch,
    fusion,
    in_place,
    inductor_source,
    ir_ladder,
    memory,
    one_triton_source,
    precision,
    randomness,
    recompilation,
    remat,
    tape,
)

pytestmark = [
    pytest.mark.live,
    pytest.mark.filterwarnings("default"),  # of another project's making
]


def test_dynamo_breaks_guards_and_compiles_again():
    found = capture.in_torch()
    assert found["a list it appends to, after 3 calls"] == 3
    assert found["lines it prints in 3 calls"] == 3
    assert found["graphs around the print"] == 2
    assert found["a branch on a value"].startswith("2 graphs")
    assert found["a number changed between two calls"] == "new one used"
    assert found["programs then"] == 2
    assert found["guards on the plain function"] > 5


def test_the_ladder_and_the_chain_end_in_few_kernels():
    found = ir_ladder.in_torch()
    assert found["of them products"] == 2
    assert found["captured"] > found["kernels"] >= 3
    chain = fusion.in_torch()
    assert chain["kernels, operation by operation"] == 12 and chain["kernels, compiled"] == 1


def test_inductor_writes_one_triton_kernel_for_a_chain_and_two_around_a_product():
    pytest.importorskip("triton")
    x, g, w = torch.ones(64, 256), torch.ones(256), torch.ones(256, 256)
    chain = inductor_source.program(lambda x, g: fusion.gated_norm(torch, x, g), x, g)
    (source,) = inductor_source.kernels(chain).values()
    assert source.count("tl.load(") == 2 and source.count("tl.store(") == 1  # read and written once
    product = inductor_source.program(lambda x, w: torch.relu(torch.sin(x) @ w) + 1, x, w)
    launched = inductor_source.launches(product)
    assert [name.startswith("triton_") for name in launched] == [True, False, True]
    # nothing is left changed: the next program is C++ and runs
    assert torch.compile(lambda x: torch.sin(x) + 1)(x)[0, 0] == torch.sin(torch.tensor(1.0)) + 1


def test_the_tape_keeps_inputs_and_the_compiler_keeps_less():
    found = autodiff.in_torch()
    assert {found[f"bytes kept a number: {n}"] for n in ("sin", "tanh", "relu", "gelu")} == {4.0}

    def chain(x):
        for _ in range(4):
            x = torch.sin(torch.nn.functional.gelu(x)) * torch.tanh(x)
        return x

    x = torch.linspace(-1, 1, 64, requires_grad=True)
    _, _, between = tape.partitioned(chain, x)
    assert between == x.nbytes  # elementwise: all of it is computed again from the input
    assert tape.saved_bytes(chain, x) > 10 * x.nbytes


def test_memory_is_what_lives():
    x = torch.ones(1000)
    with tape.watched(x) as seen:
        y = x * 2
        z = y + 1
        del y
        v = z.view(10, 100)
        w = v * 3
    assert seen.live == 2 * x.nbytes  # z, which v looks at, and w
    assert seen.peak == 2 * x.nbytes and seen.kernels == 3
    assert seen.moved == 6 * x.nbytes
    del z
    assert seen.live == 2 * x.nbytes
    del v
    assert seen.live == w.nbytes


def test_both_need_the_same_memory_and_operations():
    theirs, ours = memory.in_torch(), memory.in_jax()
    for how in ("kept", "given up"):
        name = f"KiB at once, old weights {how}"
        assert 0.8 < theirs[name] / ours[name] < 1.25
    theirs, ours = remat.in_torch(), remat.in_jax()
    for policy in remat.POLICIES:
        name = f"FLOPs of products, to those of a forward: {policy}"
        assert theirs[name] == ours[name]
    kept = [theirs[f"numbers kept a position and layer: {p}"] for p in remat.POLICIES]
    chosen = theirs["numbers kept a position and layer: compiler's choice"]
    assert kept[0] > chosen > kept[1] > kept[2]


def test_dynamic_shapes_need_two_programs_and_static_ones_give_up():
    found = recompilation.in_torch()
    assert found["programs, by default"] == 2
    assert found["programs, one symbolic size"] == "1 compiled"
    assert found["programs, dynamic=False"] == "8, then eager"
    assert found["programs, by default, and a length of 1"] == 3


def test_a_block_is_compiled_once_for_all_layers():
    found = compile_cost.in_torch()
    few, many = compile_cost.DEPTHS
    regional = "a block at a time, L = {}: operations".format
    assert found[regional(few)] == found[regional(many)] == 3
    unrolled = "unrolled, L = {}: operations".format
    assert found[unrolled(many)] > 3 * found[unrolled(few)]


def test_mutation_copies_nothing_and_its_victims_are_told():
    found = in_place.in_torch()
    assert found["the same address after the update"]
    assert found["copies, memory given up"] == found["copies in a loop of 8 updates"] == 0
    assert "inplace" in found["using the old value afterwards"]
    assert "select_scatter" in found["mutations in the functional graph"]


def test_a_batch_costs_the_operations_of_one():
    found = batching.in_torch()
    one = found["operations of one gradient"]
    assert found["operations of 16, by vmap"] <= one + 2
    assert found["operations of 16, in a loop"] > 10 * one
    assert found["largest difference"] < 1e-6
    assert found["a branch on a batched value"].startswith("refused")


def test_generators_are_state():
    found = randomness.in_torch()
    assert not found["the same draw after another one"]
    assert found["a batch of draws is the loop's"].startswith("refused")
    assert found["computed again, the same mask"]
    assert not found["computed again, the same mask, state not put back"]


def test_autocast_chooses_and_errors_agree():
    theirs, ours = precision.in_torch(), precision.in_jax()
    assert theirs["dtypes, the program asked for bfloat16 products"].startswith("mm bfloat16")
    name = "bfloat16, result bfloat16: ULP"
    assert theirs[name] == pytest.approx(ours[name], rel=0.02)


def test_dispatch_is_asynchronous_in_jax_alone_on_a_cpu():
    ours, theirs = dispatch.jax_side(), dispatch.torch_side()
    assert {len(v) for v in dispatch.host_cost(ours, 5).values()} == {5}
    for side in (ours, theirs):
        assert dispatch.facts(side, n=64, steps=3)["answers equal"]


def test_both_send_the_same_bytes():
    ours, theirs = data_parallel.in_jax(), data_parallel.in_torch()
    sent = [row for row in ours if row.endswith("KiB sent")]
    assert len(sent) == 3 and [ours[row] for row in sent] == [theirs[row] for row in sent]
    assert theirs["sharded (FSDP): all-gather"] == ours["sharded (FSDP): all-gather"]
    assert theirs["replicated (DDP): all-reduce"] == 2  # buckets; JAX's compiler needs one


def test_the_triton_source_runs_from_torch():
    pytest.importorskip("triton")
    assert 0 < one_triton_source.interpreted() < 2e-3
