"""The roof is the lower of two lines; reports add up, and are drawn the same each time."""

import dataclasses
import io

import pytest
from rich.console import Console

from jaxinfra.errors import UserError
from jaxinfra.hardware import roofline, roofline_view
from jaxinfra.hardware.ceilings import Ceilings
from jaxinfra.hardware.chips import CHIPS
from jaxinfra.model.counts import Operation
from jaxinfra.model.presets import PRESETS

H200 = CHIPS["H200"]
TINY = PRESETS["tiny"]
MEASURED = Ceilings("NVIDIA H200", 4.3e12, 4 << 30, {"bfloat16": 7.9e14}, {"bfloat16": 8192})


def is_a_roof(attainable) -> bool:
    """Never above either line, on one of them everywhere, and where both meet, the peak."""
    peak, bandwidth = H200.flops["bfloat16"], H200.bandwidth
    ridge = roofline.ridge(H200, "bfloat16")
    on_it = [attainable(i) in (pytest.approx(peak), pytest.approx(bandwidth * i))
             and attainable(i) <= peak and attainable(i) <= bandwidth * i * (1 + 1e-12)
             for i in (0.1, 1, ridge / 2, ridge, ridge * 2, 1e5)]  # fmt: skip
    return all(on_it) and attainable(ridge) == pytest.approx(peak)


def test_attainable_is_the_lower_line():
    assert is_a_roof(lambda i: roofline.attainable(H200, i, "bfloat16"))
    peak, bandwidth = H200.flops["bfloat16"], H200.bandwidth
    assert not is_a_roof(lambda i: max(peak, bandwidth * i))
    assert not is_a_roof(lambda i: 1 / (1 / peak + 1 / (bandwidth * i)))  # no overlap
    assert not is_a_roof(lambda i: min(peak, bandwidth / 8 * i))  # bits for bytes


def test_ridge_and_time_of_an_operation():
    assert roofline.ridge(H200, "bfloat16") == pytest.approx(989.4e12 / 4.8e12)
    n = 8192
    product = Operation("product", "matmul", 1, 2 * n**3, 4 * n**2, 2 * n**2)
    assert roofline.time_bound(product, H200, "bfloat16") == pytest.approx(2 * n**3 / 989.4e12)
    vector = Operation("vector", "matmul", 1, 2 * n**2, 2 * n**2 + 2 * n, 2 * n)
    assert roofline.time_bound(vector, H200, "bfloat16") == pytest.approx(
        (2 * n**2 + 4 * n) / 4.8e12
    )
    pointwise = Operation("pointwise", "elementwise", 1, 10**15, 1, 1)
    assert roofline.time_bound(pointwise, H200, "bfloat16") == pytest.approx(1e15 / 67e12)


def test_a_dtype_without_a_rate_is_refused_with_those_that_have_one():
    with pytest.raises(UserError, match=r"T4 takes no bfloat16 .* float32, float16, int8, int4"):
        roofline.peak(CHIPS["T4"], "bfloat16")
    with pytest.raises(UserError, match="TPU-v5e has no published rate for float32"):
        roofline.report(TINY, CHIPS["TPU-v5e"], dtype="float32")
    assert roofline.default_dtype(CHIPS["T4"]) == "float16"
    assert roofline.default_dtype(CHIPS["TPU-v5e"]) == "bfloat16"


def test_batch_one_decode_is_bound_by_the_weights():
    """Qwen3-0.6B reads 1.19 GB a token: at 4.3 TB/s 0.28 ms, and a little cache."""
    chip = dataclasses.replace(H200, bandwidth=4.3e12)
    (phase,) = roofline.report(
        PRESETS["qwen3-0.6b"], chip, phases=["decode"], seq_len=256
    ).phases  # fmt: skip
    assert {row.bound for row in phase.rows} == {"memory"}
    assert 0.277e-3 < phase.seconds < 0.30e-3
    assert phase.tokens_per_second == pytest.approx(1 / phase.seconds)


def test_prefill_and_training_of_long_sequences_are_bound_by_computing():
    found = roofline.report(PRESETS["qwen3-0.6b"], H200, batch=8, seq_len=4096)
    for phase in found.phases:
        bound = {row.operation.name: row.bound for row in phase.rows}
        want = "memory" if phase.name == "decode" else "compute"
        assert {bound[name] for name in ("qkv", "attention", "gate+up", "down")} == {want}
        assert sum(row.share for row in phase.rows) == pytest.approx(1)
        assert phase.tokens == (8 if phase.name == "decode" else 8 * 4096)


def test_ceilings_stand_beside_the_paper_and_never_promise_more():
    found = roofline.report(PRESETS["qwen3-0.6b"], H200, measured=MEASURED)
    assert found.ceiling and found.ceiling.bandwidth == 4.3e12
    for phase in found.phases:
        assert phase.measured > phase.seconds
        assert phase.measured_tokens_per_second < phase.tokens_per_second
    without = roofline.report(PRESETS["qwen3-0.6b"], H200)
    assert without.ceiling is None and without.phases[0].measured_tokens_per_second is None


def text_of(found: roofline.RooflineReport) -> str:
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(roofline_view.render_table(found))
    return console.export_text()


def test_the_table_shows_all_operations_and_the_ceilings_only_where_they_are():
    found = roofline.report(TINY, H200, model="tiny", measured=MEASURED)
    text = text_of(found)
    for word in ("prefill", "decode", "train", "AdamW", "tokens/s", "H200 on paper", "989 TFLOP/s",
                 "measured here", "4.3 TB/s", "time here"):  # fmt: skip
        assert word in text, word
    assert "measured here" not in text_of(roofline.report(TINY, H200))


def test_what_does_not_fit_is_said():
    text = text_of(roofline.report(PRESETS["llama-3.1-70b"], CHIPS["H100"], phases=["decode"]))
    assert "142 GB for weights and cache does not fit in 80 GB" in text


@pytest.mark.parametrize("suffix", ["svg", "png"])
def test_plots_are_the_same_bytes_each_time(tmp_path, suffix):
    found = roofline.report(TINY, H200, model="tiny", measured=MEASURED)
    for name in "ab":
        roofline_view.plot(found, tmp_path / f"{name}.{suffix}")
    first, second = (tmp_path / f"{name}.{suffix}" for name in "ab")
    assert first.read_bytes() == second.read_bytes()
    assert first.stat().st_size > 10_000
    if suffix == "svg":
        svg = first.read_text()
        assert "<dc:date>" not in svg and "gate+up" in svg and "measured here" in svg


def test_a_plot_of_unknown_kind_is_refused_and_nothing_is_written(tmp_path):
    found = roofline.report(TINY, H200)
    with pytest.raises(UserError, match=r"\.svg or \.png"):
        roofline_view.plot(found, tmp_path / "roof.gif")
    assert not list(tmp_path.iterdir())


def test_for_model_finds_models_and_chips_by_name():
    found = roofline.for_model("qwen3-0.6b", "h200", phases=["decode"], batch=4)
    assert (found.chip, found.dtype, found.ceiling) == (H200, "bfloat16", None)
    with pytest.raises(UserError, match="chip 'H900' is not in the table"):
        roofline.for_model("tiny", "H900")
    with pytest.raises(UserError, match="neither a preset"):
        roofline.for_model("no-such-model", "h200")


@pytest.mark.parametrize(
    ("value", "shown"),
    [(989.4e12, "989 TFLOP/s"), (999.7, "1e+03 FLOP/s"), (0, "0 FLOP/s"), (4.8e12, "4.8 TFLOP/s")],
)
def test_quantities(value, shown):
    assert roofline_view.quantity(value, "FLOP/s") == shown


@pytest.mark.parametrize(("value", "shown"), [(2.5, "2.5 s"), (1.2e-3, "1.2 ms"), (3e-6, "3 µs")])
def test_durations(value, shown):
    assert roofline_view.duration(value) == shown
