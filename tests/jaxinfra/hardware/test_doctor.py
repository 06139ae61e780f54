"""The doctor answers whatever is missing, as JSON and as text; lessons are told apart."""

import dataclasses
import io
import json
import subprocess
import sys

import pytest
from rich.console import Console

from jaxinfra.hardware import doctor as doctoring
from jaxinfra.hardware import lessons
from jaxinfra.hardware.doctor import Device, Doctor


def text_of(found: Doctor) -> str:
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(doctoring.render(found))
    return console.export_text()


def test_examination_of_this_machine():
    found = doctoring.examine()
    assert found.troubles == ()
    assert len(found.devices) == 8 and found.devices[0].platform == "cpu"
    assert json.loads(json.dumps(dataclasses.asdict(found)))["versions"]["Python"]
    text = text_of(found)
    for word in ("8 x cpu", "jaxlib", "attention, 4,096 tokens", "need a GPU or a TPU",
                 "head and loss", "processor", "compiled programs"):  # fmt: skip
        assert word in text, word


PIECES = ("_versions", "_version", "_system", "_devices", "_chip", "_caches", "_choices",
          "_lessons")  # fmt: skip


@pytest.mark.parametrize("pieces", [*([piece] for piece in PIECES), PIECES])
def test_missing_pieces_are_named_and_stop_nothing(pieces, monkeypatch):
    def broken(*_):
        raise RuntimeError("no such piece, [bold]")

    for piece in pieces:
        monkeypatch.setattr(doctoring, piece, broken)
    found = doctoring.examine()
    assert "no such piece" in found.troubles[0]
    assert "no such piece, [bold]" in text_of(found)
    json.dumps(dataclasses.asdict(found))


def test_no_heavy_package_is_imported():
    heavy = {"torch", "transformers", "matplotlib"}
    code = f"import sys; from jaxinfra.hardware.doctor import examine; examine(); print({heavy!r}"
    code += " & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def taken(platform: str) -> dict[str, str]:
    return {c.operation: c.implementation for c in doctoring.attention_choices(platform)}


def test_attention_takes_what_the_kernels_say(monkeypatch):
    assert taken("cpu") == {
        "attention, 4,096 tokens, bfloat16": "chunked",
        "attention, 4,096 tokens, float32": "chunked",
        "attention, 4,096 tokens, packed documents": "chunked",
        "attention, 1,024 tokens, bfloat16": "reference",
    }
    assert taken("gpu")["attention, 4,096 tokens, bfloat16"] == "cudnn"  # of eight devices
    monkeypatch.setattr("jax.device_count", lambda: 1)
    gpu = taken("gpu")
    assert gpu["attention, 4,096 tokens, bfloat16"] == "mosaic_gpu"
    assert gpu["attention, 4,096 tokens, float32"] == "chunked"


def engine(platform: str) -> dict[str, str]:
    return {c.operation: c.implementation for c in doctoring.other_choices(platform)[3:]}


def test_an_engines_step_takes_tritons_kernels_on_one_gpu_that_has_them(monkeypatch):
    steps = ("a layer for one token, bfloat16", "drawing tokens", "weights of 8 or 4 bits, 16 rows")
    assert engine("cpu") == dict.fromkeys(steps, "xla")
    monkeypatch.setattr("pallas_kernels._triton_compat.missing", lambda: None)
    monkeypatch.setattr("pallas_kernels._triton_compat.capability", lambda: 90)
    assert engine("gpu") == dict.fromkeys(steps, "xla")  # of eight devices
    monkeypatch.setattr("jax.device_count", lambda: 1)
    assert engine("gpu") == dict.fromkeys(steps, "triton")
    monkeypatch.setattr("pallas_kernels._triton_compat.capability", lambda: 75)
    assert engine("gpu") == dict.fromkeys(steps, "xla")


def test_chips_are_described():
    gpu = Device("NVIDIA H200", "gpu", 10**11, "9.0")
    assert "H200: " in doctoring._chip((gpu,)) and "989 TFLOP/s" in doctoring._chip((gpu,))
    assert "not in the table" in doctoring._chip((Device("GeForce", "gpu", None, "8.9"),))
    assert doctoring._chip(()) == "no device"
    assert "1 x NVIDIA H200 (gpu, 100.0 GB, compute capability 9.0)" in doctoring._counted((gpu,))


MACHINES = {
    "cpu": lessons.machine_has("cpu", None, 1),
    "T4": lessons.machine_has("gpu", "7.5", 1),
    "L4": lessons.machine_has("gpu", "8.9", 1),
    "H200": lessons.machine_has("gpu", "9.0", 1),
    "B200": lessons.machine_has("gpu", "10.0", 8),
    "TPU": lessons.machine_has("tpu", None, 8),
}
RUNS = {  # front matter -> how it runs on each of MACHINES
    "": ["native"] * 6,
    "needs: [cpu]": ["native"] * 6,
    "needs: [sm80]": ["no", "no", "native", "native", "native", "no"],
    "needs: [sm90]": ["no", "no", "no", "native", "native", "no"],
    "needs: [sm90]\ninterpreted: true": ["interpreted"] * 3 + ["native"] * 2 + ["interpreted"],
    "needs: [tpu]": ["no"] * 5 + ["native"],
    "needs: [mesh8]": ["interpreted"] * 4 + ["native"] * 2,
    "needs: [mesh8, sm90]": ["no"] * 4 + ["native", "no"],
    "needs: [sm70]": ["no"] * 6,
}


@pytest.mark.parametrize("front", RUNS)
def test_lessons_run_where_their_needs_are_met(front, tmp_path):
    page = tmp_path / "tiles.md"
    page.write_text(f"---\njupytext:\n  needs: [tpu]\n{front}\n---\n\n# Tiles\n\nneeds: [tpu]\n")
    assert [lessons.read(page, has).runs for has in MACHINES.values()] == RUNS[front]


def test_versions_are_compared_as_numbers():
    """As text, "10.0" comes before "8.0"."""
    assert {"sm80", "sm90"} <= MACHINES["B200"]


def test_pages_without_front_matter_need_a_cpu(tmp_path):
    page = tmp_path / "plain.md"
    page.write_text("# Plain\n\n---\nneeds: [tpu]\n---\n")
    assert lessons.read(page, {"cpu"}) == lessons.Lesson("plain", ("cpu",), "native", "")


def test_lessons_are_read_from_the_source_tree_or_said_to_be_elsewhere(tmp_path, monkeypatch):
    monkeypatch.setattr(lessons, "folder", lambda: None)
    assert "source repository" in text_of(doctoring.examine())
    (tmp_path / "warps.md").write_text("---\nneeds: [sm90]\n---\n")
    monkeypatch.setattr(lessons, "folder", lambda: tmp_path)
    found = doctoring.examine().lessons
    assert found == (lessons.Lesson("warps", ("sm90",), "no", "needs sm90"),)
