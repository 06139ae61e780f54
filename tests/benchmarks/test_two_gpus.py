"""What the benchmark on two GPUs reads off traces and logs."""

import jax
import pytest

from benchmarks.two_gpus import table
from benchmarks.two_gpus_ledger import bus, record
from benchmarks.two_gpus_profile import Kernels, collective_time, hidden, is_message
from benchmarks.two_gpus_shape import TINY, heard, told
from jaxinfra.measure import read_all


def test_hidden_time_is_what_two_streams_share():
    kernels = Kernels(messages=[(0, 4), (3, 5), (9, 10)], others=[(1, 2), (4.5, 9.5), (1.5, 2.5)])
    messages, under, busy = hidden(kernels)
    assert messages == 6 and under == pytest.approx(1.5 + 0.5 + 0.5) and busy == 10
    assert hidden(Kernels([(0, 1)], [(1, 2)]))[1] == 0  # touching is not sharing


def test_kernels_of_collectives_are_told_by_name():
    assert is_message("ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)")
    assert not is_message("nvjet_tst_192x192_64x4_2x1_v_bz_coopB_NNT")


def test_a_trace_without_a_gpu_is_told(tmp_path):
    with pytest.raises(RuntimeError, match="wrote no trace"):
        collective_time(str(tmp_path))
    with jax.profiler.trace(str(tmp_path)):
        jax.block_until_ready(jax.numpy.ones(3) + 1)
    with pytest.raises(RuntimeError, match="no kernel of GPU 0"):
        collective_time(str(tmp_path))


def test_lines_between_other_output_are_heard(capsys):
    told("FSDP", {"seconds": [0.5]})
    out = "W0000 warning\n" + capsys.readouterr().out + "NCCL INFO"
    assert heard(out) == {"FSDP": {"seconds": [0.5]}}


def test_bandwidths_count_what_must_be_sent():
    assert bus({"seconds": [1.0]}, "ring all_reduce", 10**9) == 1.0
    assert bus({"seconds": [1.0]}, "all_gather", 10**9) == 0.5
    assert TINY.calls(2**31) == 2 and TINY.calls(1) == TINY.most_calls


def test_entries_are_written_and_the_table_printed(tmp_path, capsys):
    """Of a run in which one strategy failed and nothing was traced."""
    of = lambda s, **more: {"seconds": [s] * 5, "bytes": 10**9, "compile_s": 1.0} | more  # noqa: E731
    size = TINY.message_bytes[-1]
    found = {
        "alone": {"one GPU": of(1.0)},
        "meshes": {"DP": {"error": "out of memory"}, "FSDP": of(1.05, under=(3, 9))},
        "torch": {"FSDP2": of(1.2, torch="2", transformers="5")},
        "plan": {"tp=2": of(1.1, predicted_s=1.0, predicted_bytes=1, remat=True, accumulate=1),
                 "fsdp=2": of(1.0, predicted_s=1.2, predicted_bytes=1, remat=True, accumulate=1)},
        "collectives": {f"all_reduce {size}": of(0.1), f"ring all_reduce {size}": of(0.2)},
        "torch collectives": {f"all_reduce {size}": of(0.1)},
    }  # fmt: skip
    record(found, TINY, tmp_path)
    entries = {entry.name: entry for entry in read_all(tmp_path)}
    assert entries["two-gpus-train-qwen3-1-7b"].ratio == pytest.approx(1.2 / 1.05)
    assert entries["two-gpus-scaling-fsdp"].ratio == pytest.approx(2 / 1.05)
    assert entries["two-gpus-plan"].ratio == pytest.approx(1 / 1.1)
    assert entries["two-gpus-all-reduce"].extra["collectives"][f"ring all_reduce {size}"] > 0
    table(found, TINY)
    told = capsys.readouterr().out
    assert "out of memory" in told and "3/9" in told and "predicted 1000.0 ms" in told
