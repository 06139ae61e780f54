"""What the benchmark on two GPUs reads off traces and logs."""

import jax
import pytest

from benchmarks.two_gpus_ledger import bus
from benchmarks.two_gpus_profile import Kernels, collective_time, hidden, is_message
from benchmarks.two_gpus_shape import TINY, heard, told


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
