"""The chip table: every number has a source, is a dense rate, and agrees with what jax knows."""

import dataclasses

import pytest

from jaxinfra.errors import UserError
from jaxinfra.hardware import chips
from jaxinfra.hardware.chips import CHIPS, Chip

NUMBERS = ("flops", "memory_bytes", "bandwidth", "cores", "on_chip", "links")
ASKED_FOR = {"T4", "L4", "A100-40GB", "A100-80GB", "H100", "H200", "B200", "RTX-PRO-6000",
             "TPU-v4", "TPU-v5e", "TPU-v5p", "TPU-v6e", "TPU-v7x"}  # fmt: skip
# Dense 16-bit FLOPs a clock of one streaming multiprocessor, from NVIDIA's whitepapers.
PER_CLOCK = {"T4": 1024, "L4": 1024, "A100-40GB": 2048, "A100-80GB": 2048, "H100": 4096,
             "H200": 4096, "B200": 8192, "RTX-PRO-6000": 1024}  # fmt: skip


def test_the_table_has_the_chips_asked_for():
    assert set(CHIPS) == ASKED_FOR | {"RTX-PRO-6000-Server"}


@pytest.mark.parametrize("chip", CHIPS.values(), ids=list(CHIPS))
def test_every_number_has_a_source_and_a_sane_unit(chip):
    assert set(chip.sources) == set(NUMBERS) and all(chip.sources.values())
    assert all(1e12 < rate < 1e16 for rate in chip.flops.values() if rate)
    assert 10e9 < chip.memory_bytes < 300e9 and 1e11 < chip.bandwidth < 1e13
    assert all(1e6 < size < 1e9 for size in chip.on_chip.values())
    assert all(1e10 < link.bandwidth < 1e12 for link in chip.links)


def runs_at_a_possible_clock(chip: Chip, flops: float) -> bool:
    """16-bit rate over cores and FLOPs a clock: boost clocks lie between 1.3 and 2.7 GHz."""
    return 1.3e9 < flops / (chip.cores * PER_CLOCK[chip.name]) < 2.7e9


@pytest.mark.parametrize("name", PER_CLOCK)
def test_rates_are_dense(name):
    chip = CHIPS[name]
    flops = chip.flops["float16"]
    assert runs_at_a_possible_clock(chip, flops)
    assert not runs_at_a_possible_clock(chip, 2 * flops)  # a datasheet's sparse figure


def agrees_with_jax(chip: Chip, bandwidth: float, bfloat16: float, memory: float) -> bool:
    return (
        abs(chip.bandwidth / bandwidth - 1) < 0.13  # v5p: 2,765 GB/s to Google, 2,460 to jax
        and abs(chip.flops["bfloat16"] / bfloat16 - 1) < 0.01
        and abs(chip.memory_bytes / memory - 1) < 0.02
    )


@pytest.mark.parametrize("name", [name for name in CHIPS if name.startswith("TPU")])
def test_tpus_are_as_jax_has_them(name):
    from jax.experimental.pallas import tpu as pltpu

    chip = CHIPS[name]
    version = pltpu.ChipVersion(name.removeprefix("TPU-v"))if name == "TPU-v7x" else (
        pltpu.ChipVersion(name.removeprefix("TPU-")))  # fmt: skip
    info, n = pltpu.get_tpu_info_for_chip(version, 1), chip.cores
    rates = (info.mem_bw_bytes_per_second * n, info.bf16_ops_per_second * n,
             info.hbm_capacity_bytes * n)  # fmt: skip
    assert agrees_with_jax(chip, *rates)
    assert chip.on_chip["VMEM"] == info.vmem_capacity_bytes * n
    if n > 1:  # the rates of one core are not those of the chip
        assert not agrees_with_jax(chip, *(rate / n for rate in rates))


@pytest.mark.parametrize(
    ("name", "found"),
    [("h200", "H200"), ("NVIDIA H100", "H100"), ("a100 80gb", "A100-80GB"), ("v5e", "TPU-v5e"),
     ("TPU v7x", "TPU-v7x"), ("rtx_pro_6000", "RTX-PRO-6000")],
)  # fmt: skip
def test_names_are_found_however_they_are_written(name, found):
    assert chips.find(name).name == found


@pytest.mark.parametrize(
    ("name", "fix"),
    [("A100", "A100-40GB, A100-80GB"), ("MI300X", "choose one of T4"), ("", "choose one of")],
)
def test_unknown_names_say_what_there_is(name, fix):
    with pytest.raises(UserError, match=fix):
        chips.find(name)


def test_device_kinds_are_exact():
    """A slower board of the same name is not the board in the table."""
    assert chips.of_kind("NVIDIA H100 80GB HBM3") is CHIPS["H100"]
    assert chips.of_kind("NVIDIA H100 PCIe") is None
    assert chips.of_kind("NVIDIA H200 NVL") is None
    assert chips.of_kind("TPU v5 lite") is CHIPS["TPU-v5e"]
    assert chips.of_kind("TPU v5") is CHIPS["TPU-v5p"]
    assert chips.of_kind("cpu") is None
    server = chips.of_kind("NVIDIA RTX PRO 6000 Blackwell Server Edition")
    assert server is not None and server.bandwidth < CHIPS["RTX-PRO-6000"].bandwidth
    kinds = [kind for chip in CHIPS.values() for kind in chip.kinds]
    assert len(kinds) == len(set(kinds))


def test_a_jax_device_of_a_v7x_is_half_a_chip():
    chip, half = CHIPS["TPU-v7x"], CHIPS["TPU-v7x"].per_device()
    assert half.flops["bfloat16"] * 2 == chip.flops["bfloat16"]
    assert (half.bandwidth * 2, half.memory_bytes * 2) == (chip.bandwidth, chip.memory_bytes)
    assert half.flops["float32"] is None
    assert CHIPS["H200"].per_device() is CHIPS["H200"]


def test_chips_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        CHIPS["H200"].bandwidth = 1.0
