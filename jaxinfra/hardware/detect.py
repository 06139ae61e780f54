"""Which chip this is: the table's entry for jax's first device, or one built by measurement."""

from __future__ import annotations

import functools
import os
import platform
from pathlib import Path

import jax

from jaxinfra.hardware import chips
from jaxinfra.hardware.ceilings import Ceilings, ceilings, memory_bytes
from jaxinfra.hardware.chips import Chip


def lookup(device: jax.Device | None = None) -> Chip | None:
    """The table's chip for `device` (the default one if None); None for CPUs and unknown chips.

    What one jax device has of it: half of a TPU v7x.
    """
    chip = chips.of_kind((device or jax.local_devices()[0]).device_kind)
    return chip and chip.per_device()


@functools.cache
def detect() -> Chip:
    """The chip of jax's default device.

    On a CPU, or a chip that the table lacks, its rates are measured once a process, in about three
    seconds.
    """
    device = jax.local_devices()[0]
    return lookup(device) or measured(device, here())


@functools.cache
def here() -> Ceilings:
    """The ceilings of jax's default device, measured once a process."""
    return ceilings()


def measured(device: jax.Device, rates: Ceilings) -> Chip:
    """A chip that has what was measured of it."""
    cpu = device.platform == "cpu"
    how = (f"measured here: copy of {rates.copied_bytes / 1e6:,.0f} MB; products of "
           + ", ".join(f"{dtype} [{n}, {n}]" for dtype, n in rates.sizes.items()))  # fmt: skip
    return Chip(
        name=cpu_name() if cpu else device.device_kind,
        kinds=(device.device_kind,),
        flops=dict(rates.flops),
        memory_bytes=memory_bytes(device),
        bandwidth=rates.bandwidth,
        cores=usable_cpus() if cpu else getattr(device, "core_count", 0),
        core="CPU core" if cpu else "core",
        on_chip={},
        links=(),
        sources={"flops": how, "bandwidth": how, "cores": "operating system",
                 "memory_bytes": "operating system" if cpu else "jax"},
        note="measured, not from a datasheet",
    )  # fmt: skip


def usable_cpus() -> int:
    """CPUs that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpu_name() -> str:
    """The processor's name, as well as the operating system knows it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine() or "CPU"
