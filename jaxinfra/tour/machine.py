"""The tour's first stage: this machine, and where a model's operations stand under its roof."""

from __future__ import annotations

from jaxinfra.hardware import roofline_view
from jaxinfra.hardware.detect import detect
from jaxinfra.hardware.doctor import examine, render
from jaxinfra.hardware.roofline import for_model
from jaxinfra.tour.shell import Tour

MODEL = "smollm2-135m"


def stage(tour: Tour) -> None:
    """Doctor, this machine's ceilings, and the roofline of SmolLM2-135M on it."""
    section = tour.report.section("This machine")
    doctor = examine()
    tour.console.print(render(doctor))
    rows = [(choice.operation, choice.implementation, choice.reason) for choice in doctor.choices]
    section.table("What operations run as", ("operation", "runs as", "because"), rows)
    with tour.console.status("measuring this machine's ceilings"):
        chip = detect()
        report = for_model(MODEL, "here", phases=("prefill", "decode"), seq_len=512)
    tour.left["bandwidth"] = chip.bandwidth
    tour.console.print(roofline_view.render_table(report))
    rates = [(f"products of matrices, {dtype}", roofline_view.quantity(rate, "FLOP/s"))
             for dtype, rate in chip.flops.items() if rate]  # fmt: skip
    if chip.bandwidth:
        rates.append(("memory", roofline_view.quantity(chip.bandwidth, "B/s")))
    section.table(f"{chip.name} ({chip.note or 'on paper'})", ("what", "rate"), rates)
    section.figure(
        f"Operations of {MODEL} at 512 tokens: a dot lies on the roof at its FLOPs a byte; its "
        "area is its share of the time",
        roofline_view.figure(report),
    )
    for phase in report.phases:
        bounds = [f"{phase.name}: at most {phase.tokens_per_second:,.0f} tokens/s"]
        section.text(" ".join(bounds))
