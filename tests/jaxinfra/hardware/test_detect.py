"""Known devices are looked up, others are measured; the measurement keeps to size and budget."""

import types

import jax
import pytest

from jaxinfra.hardware import ceilings as measuring
from jaxinfra.hardware import detect as detecting
from jaxinfra.hardware import roofline
from jaxinfra.hardware.chips import CHIPS


def device(kind: str, platform: str = "gpu", **attributes):
    return types.SimpleNamespace(
        device_kind=kind, platform=platform, memory_stats=lambda: {"bytes_limit": 10**9},
        **attributes,
    )  # fmt: skip


def test_known_devices_are_looked_up():
    assert detecting.lookup(device("NVIDIA H200")) is CHIPS["H200"]
    assert detecting.lookup(device("TPU7x", "tpu")).devices == 1
    assert detecting.lookup(device("NVIDIA GeForce RTX 4090")) is None
    assert detecting.lookup() is None  # a CPU


def test_ceilings_of_this_cpu():
    found = measuring.ceilings(budget=0.05)
    assert set(found.flops) == {"float32", "bfloat16"} == set(found.sizes)
    assert all(1e7 < rate < 1e15 for rate in found.flops.values())
    assert 1e7 < found.bandwidth < 1e13
    assert 16 << 20 <= found.copied_bytes <= 4 << 30


@pytest.fixture
def quick(monkeypatch):
    """Detection with a measurement that takes no time, and counts how often it was asked."""
    asked = []

    def fake():
        asked.append(1)
        rates = {"float32": 1e11, "bfloat16": 5e10}
        return measuring.Ceilings("cpu", 2e10, 1 << 28, rates, {"float32": 1024, "bfloat16": 512})

    monkeypatch.setattr(detecting, "ceilings", fake)
    cached = (detecting.detect, detecting.here)
    for function in cached:
        function.cache_clear()
    yield asked
    for function in cached:
        function.cache_clear()


def test_a_cpu_is_built_from_its_measurement_once(quick):
    chip = detecting.detect()
    assert detecting.detect() is chip and len(quick) == 1
    assert (chip.flops["float32"], chip.bandwidth) == (1e11, 2e10)
    assert chip.cores >= 1 and chip.memory_bytes > 1e8 and chip.name
    assert "measured here" in chip.sources["flops"] and "[1024, 1024]" in chip.sources["flops"]
    assert roofline.default_dtype(chip) == "float32"


def test_here_is_this_machine_and_is_not_compared_with_itself(quick):
    found = roofline.for_model("tiny", seq_len=64)
    assert found.chip is detecting.detect() and found.ceiling is None
    assert found.roof.name == "measured here" and found.dtype == "float32"


def test_a_known_chip_here_is_shown_with_its_ceilings(quick, monkeypatch):
    monkeypatch.setattr(detecting, "lookup", lambda: CHIPS["H200"])
    monkeypatch.setattr(detecting, "detect", lambda: CHIPS["H200"])
    for name in ("here", "h200"):
        found = roofline.for_model("tiny", name, seq_len=64)
        assert found.ceiling and found.ceiling.flops == 5e10
    assert roofline.for_model("tiny", "h100", seq_len=64).ceiling is None


class Clock:
    """A machine that needs `rate` seconds a unit of work."""

    def __init__(self, rate: float, power: int):
        self.rate, self.power, self.sizes = rate, power, []

    def __call__(self, size: int) -> float:
        self.sizes.append(size)
        return self.rate * size**self.power


@pytest.mark.parametrize("power", [1, 3])
@pytest.mark.parametrize("rate", [1e-18, 1e-15, 1e-12, 1e-9, 1e-3])
def test_sizes_grow_into_the_budget_and_not_beyond(rate, power):
    clock = Clock(rate, power)
    size = measuring._grow(clock, 256, 16_384, power, 1.0)
    assert clock.sizes == [256]
    assert 256 <= size <= 16_384
    assert size == 256 or clock(size) <= 0.1
    assert size == 16_384 or clock(size * 2) > 0.1


def test_memory_of_a_device():
    assert measuring.memory_bytes(device("x")) == 10**9
    assert measuring.memory_bytes(jax.local_devices()[0]) > 1e8
