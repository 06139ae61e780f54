"""What chips promise on paper: peak rates, memory, links, each group of numbers with its source.

Dense rates only: where a datasheet quotes 2:4 sparsity, its figure is halved. FLOP/s count a
multiply-add as two, integer operations likewise. A dtype that a chip's matrix units do not take is
absent from `flops`; None means that they take it and no source we found gives the rate. Bandwidths
of links are one direction, all links of the chip together. GB are 1e9 bytes, GiB 2**30. A source
of the form "X, by Y" is document X as page Y quotes it.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping

from jaxinfra.errors import UserError

GB, GIB, MIB, TERA = 10**9, 2**30, 2**20, 1e12


@dataclasses.dataclass(frozen=True)
class Link:
    """A connection to other chips or to the host."""

    name: str
    bandwidth: float  # bytes/s, one direction, all links together
    count: int  # links


@dataclasses.dataclass(frozen=True)
class Chip:
    """One chip as its maker describes it, or as it was measured where nobody does."""

    name: str
    kinds: tuple[str, ...]  # `device_kind` of its jax devices
    flops: Mapping[str, float | None]  # dense FLOP/s by dtype
    memory_bytes: int | None
    bandwidth: float  # bytes/s of its memory
    cores: int  # streaming multiprocessors, TensorCores, or CPU cores
    core: str
    on_chip: Mapping[str, int]  # bytes of caches and scratchpads, over all cores
    links: tuple[Link, ...]
    sources: Mapping[str, str]  # field -> where its numbers are from
    devices: int = 1  # jax devices that one chip shows as
    note: str = ""

    def per_device(self) -> Chip:
        """This chip's share of one jax device: half of a TPU v7x, all of every other chip."""
        n = self.devices
        if n == 1:
            return self
        return dataclasses.replace(
            self,
            name=f"{self.name} (1/{n})",
            flops={dtype: rate and rate / n for dtype, rate in self.flops.items()},
            memory_bytes=self.memory_bytes and self.memory_bytes // n,
            bandwidth=self.bandwidth / n,
            cores=self.cores // n,
            on_chip={name: size // n for name, size in self.on_chip.items()},
            links=tuple(
                dataclasses.replace(link, bandwidth=link.bandwidth / n) for link in self.links
            ),
            devices=1,
        )


def _tera(**rates: float | None) -> dict[str, float | None]:
    return {dtype: None if rate is None else rate * TERA for dtype, rate in rates.items()}


_FIELDS = ("flops", "memory_bytes", "bandwidth", "cores", "on_chip", "links")
_A100 = "NVIDIA A100 datasheet, by glennklockwood.com/garden/processors/A100"
_AMPERE = "CUDA deviceQuery on an A100 (Paderborn Center for Parallel Computing)"
_H100 = "NVIDIA H100 datasheet, SXM, by glennklockwood.com/garden/processors/h100"
_B200 = "NVIDIA Blackwell brief, HGX B200 at 1,000 W, by glennklockwood.com/garden/processors/B200"
_RTX = "hmc-tech.com, NVIDIA RTX PRO 6000 Blackwell; NVIDIA itself gives 4,000 sparse FP4 TFLOP/s"
_TPU = "docs.cloud.google.com/tpu/docs/"
_TPU_INFO = "jax 0.10.2, jax.experimental.pallas.tpu.get_tpu_info_for_chip"
_BOOK = "How to Scale Your Model (jax-ml.github.io/scaling-book)"
_GPUS = f"{_BOOK}, chapter 12"
_NVLINK = "NVIDIA datasheets, both directions halved"
_GUIDE = "CUDA C++ Programming Guide, technical specifications by compute capability"
_TPU_F32 = "float32 runs as several bfloat16 passes, and no source gives a rate"

_A100_RATES = _tera(
    float32=19.5, tf32=156, bfloat16=312, float16=312, int8=624, int4=1248
)  # fmt: skip
_A100_SOURCES = {"flops": _A100, "memory_bytes": _A100, "bandwidth": _A100, "cores": _AMPERE,
                 "on_chip": f"L2: {_AMPERE}; L1: {_GPUS}", "links": _NVLINK}  # fmt: skip
_A100_ON_CHIP = {"L2": 40 * MIB, "L1 and shared memory": 108 * 192 * 1024}
_A100_LINKS = (Link("NVLink 3", 300 * GB, 12), Link("PCIe 4", 32 * GB, 1))
_HOPPER_RATES = _tera(
    float32=67, tf32=494.7, bfloat16=989.4, float16=989.4, float8=1978.9, int8=1978.9
)  # fmt: skip
_HOPPER_LINKS = (Link("NVLink 4", 450 * GB, 18), Link("PCIe 5", 64 * GB, 1))

_RTX_PRO_6000 = Chip(
    name="RTX-PRO-6000", kinds=("NVIDIA RTX PRO 6000 Blackwell Workstation Edition",),
    flops=_tera(float32=126, tf32=251.9, bfloat16=503.8, float16=503.8, float8=1007.6,
                int8=1007.6, float4=2015.2),
    memory_bytes=96 * GB, bandwidth=1792 * GB, cores=188, core="SM",
    on_chip={"L2": 128 * MIB, "L1 and shared memory": 188 * 128 * 1024},
    links=(Link("PCIe 5", 64 * GB, 1),),
    sources=dict.fromkeys(_FIELDS, _RTX)
    | {"on_chip": f"L2: {_RTX}; L1: {_GUIDE}, compute capability 12.0"},
    note="Workstation Edition",
)  # fmt: skip

_TABLE = (
    Chip(
        name="T4", kinds=("Tesla T4", "NVIDIA T4"),
        flops=_tera(float32=8.1, float16=65, int8=130, int4=260),
        memory_bytes=16 * GB, bandwidth=320 * GB, cores=40, core="SM",
        on_chip={"L2": 4 * MIB, "L1 and shared memory": 40 * 96 * 1024},
        links=(Link("PCIe 3", 16 * GB, 1),),
        sources=dict.fromkeys(_FIELDS, "NVIDIA T4 datasheet")
        | {"cores": "sysrqmts.com, Tesla T4",
           "on_chip": f"L2: sysrqmts.com, Tesla T4; L1: {_GUIDE}, compute capability 7.5"},
        note="no bfloat16 and no TF32 in hardware; use float16",
    ),
    Chip(
        name="L4", kinds=("NVIDIA L4",),
        flops=_tera(float32=30.3, tf32=60, bfloat16=121, float16=121, float8=242.5, int8=242.5,
                    int4=None),
        memory_bytes=24 * GB, bandwidth=300 * GB, cores=58, core="SM",
        on_chip={"L2": 48 * MIB, "L1 and shared memory": 58 * 128 * 1024},
        links=(Link("PCIe 4", 32 * GB, 1),),
        sources=dict.fromkeys(_FIELDS, "NVIDIA L4 datasheet, sparse rates halved")
        | {"cores": "7,424 CUDA cores, 128 an SM; agrees with 30.3 TFLOP/s at 2.04 GHz",
           "on_chip": f"L2: cputronic.com, NVIDIA L4; L1: {_GUIDE}, compute capability 8.9"},
    ),
    Chip(
        name="A100-40GB", kinds=("NVIDIA A100-SXM4-40GB", "NVIDIA A100-PCIE-40GB"),
        flops=_A100_RATES, memory_bytes=40 * GB, bandwidth=1555 * GB, cores=108, core="SM",
        on_chip=_A100_ON_CHIP, links=_A100_LINKS, sources=_A100_SOURCES,
    ),
    Chip(
        name="A100-80GB", kinds=("NVIDIA A100-SXM4-80GB",),
        flops=_A100_RATES, memory_bytes=80 * GB, bandwidth=2039 * GB, cores=108, core="SM",
        on_chip=_A100_ON_CHIP, links=_A100_LINKS, sources=_A100_SOURCES,
    ),
    Chip(
        name="H100", kinds=("NVIDIA H100 80GB HBM3",),
        flops=_HOPPER_RATES, memory_bytes=80 * GB, bandwidth=3350 * GB, cores=132, core="SM",
        on_chip={"L2": 50 * MIB, "L1 and shared memory": 132 * 256 * 1024},
        links=_HOPPER_LINKS,
        sources=dict.fromkeys(_FIELDS, _H100) | {"on_chip": _GPUS, "links": _NVLINK},
        note="SXM5; the PCIe and NVL boards are slower",
    ),
    Chip(
        name="H200", kinds=("NVIDIA H200",),
        flops=_HOPPER_RATES, memory_bytes=141 * GB, bandwidth=4800 * GB, cores=132, core="SM",
        on_chip={"L2": 60 * MIB, "L1 and shared memory": 132 * 256 * 1024},
        links=_HOPPER_LINKS,
        sources={"flops": f"as the H100, of the same die: {_GPUS}", "memory_bytes": _GPUS,
                 "bandwidth": _GPUS, "cores": "CUDA driver on an H200", "links": _NVLINK,
                 "on_chip": f"L2: CUDA driver on an H200 (50 MB in {_GPUS}); L1: {_GPUS}"},
        note="SXM5; the NVL board is slower",
    ),
    Chip(
        name="B200", kinds=("NVIDIA B200",),
        flops=_tera(float32=80, tf32=1100, bfloat16=2250, float16=2250, float8=4500, int8=4500,
                    float4=9000),
        memory_bytes=180 * GB, bandwidth=8000 * GB, cores=148, core="SM",
        on_chip={"L2": 126 * MIB, "L1 and shared memory": 148 * 256 * 1024,
                 "tensor memory": 148 * 256 * 1024},
        links=(Link("NVLink 5", 900 * GB, 18), Link("PCIe 5", 64 * GB, 1)),
        sources={"flops": _B200, "bandwidth": _B200, "links": f"{_B200}, both directions halved",
                 "memory_bytes": "NVIDIA HGX B200 datasheet, an eighth of 1.44 TB",
                 "cores": _GPUS, "on_chip": _GPUS},
    ),
    _RTX_PRO_6000,
    dataclasses.replace(
        _RTX_PRO_6000,
        name="RTX-PRO-6000-Server",
        kinds=("NVIDIA RTX PRO 6000 Blackwell Server Edition",),
        bandwidth=1597 * GB,
        note="Server Edition: slower memory; the other numbers are the Workstation Edition's",
    ),
    Chip(
        name="TPU-v4", kinds=("TPU v4",),
        flops=_tera(float32=None, bfloat16=275, int8=275),
        memory_bytes=32 * GIB, bandwidth=1200 * GB, cores=2, core="TensorCore",
        on_chip={"VMEM": 2 * 16 * MIB, "CMEM": 128 * MIB},
        links=(Link("ICI, 3D torus", 6 * 45 * GB, 6),),
        sources={"flops": f"{_TPU}v4; {_TPU_F32}", "memory_bytes": f"{_TPU}v4",
                 "bandwidth": f"{_TPU}v4", "cores": f"{_TPU}v4", "on_chip": _TPU_INFO,
                 "links": f"{_BOOK}, chapter 2: 45 GB/s a link and direction"},
    ),
    Chip(
        name="TPU-v5e", kinds=("TPU v5 lite", "TPU v5e"),
        flops=_tera(float32=None, bfloat16=197, int8=393, int4=788),
        memory_bytes=16 * GIB, bandwidth=819 * GB, cores=1, core="TensorCore",
        on_chip={"VMEM": 128 * MIB}, links=(Link("ICI, 2D torus", 200 * GB, 4),),
        sources={"flops": f"{_TPU}v5e; int4: {_TPU_INFO}; {_TPU_F32}",
                 "memory_bytes": f"{_TPU}v5e; GiB as in {_TPU_INFO}", "bandwidth": f"{_TPU}v5e",
                 "cores": f"{_TPU}v5e", "on_chip": _TPU_INFO,
                 "links": f"{_TPU}v5e: 400 GB/s in both directions"},
    ),
    Chip(
        name="TPU-v5p", kinds=("TPU v5", "TPU v5p"),
        flops=_tera(float32=None, bfloat16=459, float8=459, int8=918, int4=1840),
        memory_bytes=95 * GIB, bandwidth=2765 * GB, cores=2, core="TensorCore",
        on_chip={"VMEM": 2 * 64 * MIB}, links=(Link("ICI, 3D torus", 600 * GB, 6),),
        sources={"flops": f"{_TPU}tpu7x (comparison); int8 and int4: {_TPU_INFO}; {_TPU_F32}",
                 "memory_bytes": f"{_TPU}tpu7x", "bandwidth": f"{_TPU}tpu7x",
                 "cores": f"{_TPU}tpu7x", "on_chip": _TPU_INFO,
                 "links": f"{_TPU}tpu7x: 1,200 GB/s in both directions"},
        note=f"{_TPU_INFO} puts the memory's bandwidth at 2,460 GB/s",
    ),
    Chip(
        name="TPU-v6e", kinds=("TPU v6 lite", "TPU v6e"),
        flops=_tera(float32=None, bfloat16=918, float8=918, int8=1836, int4=3680),
        memory_bytes=32 * GIB, bandwidth=1638 * GB, cores=1, core="TensorCore",
        on_chip={"VMEM": 128 * MIB}, links=(Link("ICI, 2D torus", 400 * GB, 4),),
        sources={"flops": f"{_TPU}v6e; float8: {_TPU}tpu7x; int4: {_TPU_INFO}; {_TPU_F32}",
                 "memory_bytes": f"{_TPU}tpu7x", "bandwidth": f"{_TPU}v6e", "cores": f"{_TPU}v6e",
                 "on_chip": _TPU_INFO, "links": f"{_TPU}v6e: 800 GB/s in both directions"},
    ),
    Chip(
        name="TPU-v7x", kinds=("TPU7x",),
        flops=_tera(float32=None, bfloat16=2307, float8=4614),
        memory_bytes=192 * GIB, bandwidth=7380 * GB, cores=2, core="TensorCore",
        on_chip={"VMEM": 2 * 64 * MIB}, links=(Link("ICI, 3D torus", 600 * GB, 6),),
        sources={"flops": f"{_TPU}tpu7x; {_TPU_F32}", "memory_bytes": f"{_TPU}tpu7x",
                 "bandwidth": f"{_TPU}tpu7x", "cores": f"{_TPU}tpu7x", "on_chip": _TPU_INFO,
                 "links": f"{_TPU}tpu7x: 1,200 GB/s in both directions"},
        devices=2,
    ),
)  # fmt: skip

CHIPS: dict[str, Chip] = {chip.name: chip for chip in _TABLE}


def find(name: str) -> Chip:
    """The chip of the table by name: case, dashes, "NVIDIA" and "TPU" do not matter."""
    wanted = _plain(name)
    found = [chip for chip in CHIPS.values() if _plain(chip.name) == wanted]
    if not found:
        similar = [chip.name for chip in CHIPS.values() if _plain(chip.name).startswith(wanted)]
        hint = f"say which: {', '.join(similar)}" if wanted and similar else (
            f"choose one of {', '.join(CHIPS)}, or 'here' for this machine")  # fmt: skip
        raise UserError(f"chip {name!r} is not in the table; {hint}")
    return found[0]


def of_kind(device_kind: str) -> Chip | None:
    """The chip whose jax devices report `device_kind`, or None where the table has none."""
    return next((chip for chip in CHIPS.values() if device_kind in chip.kinds), None)


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]|nvidia|tpu", "", name.lower())
