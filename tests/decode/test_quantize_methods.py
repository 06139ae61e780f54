"""GPTQ and AWQ against rounding on a model that learnt, folders, and the command."""

import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from decode.quantize import METHODS, Scheme, awq, compare, quantize, run
from decode.quantize.calibrate import Calibration, layer_of, windows
from jaxinfra import cli
from jaxinfra.errors import UserError
from jaxinfra.generate import generate
from jaxinfra.loading import load
from jaxinfra.model.params import init
from jaxinfra.weights import compressed, safetensors
from tests.decode.quantize_cases import CONFIG, trained, untrained
from tests.jaxinfra.train.tiny import SPARSE

FOUR = Scheme(4, 32)


@functools.cache
def quantised(scheme: Scheme = FOUR, head: bool = False):
    return quantize(untrained()[0].params, CONFIG, scheme, "rtn", head=head)


@functools.cache
def kl(method: str, scheme: Scheme = FOUR) -> float:
    model, text, held_out = trained()
    params = quantize(model.params, CONFIG, scheme, method, text)
    return compare(model.params, params, CONFIG, held_out).kl


@pytest.mark.slow
def test_calibration_beats_rounding_on_text_not_seen():
    """At 4 bits; a model that did not change has no divergence at all."""
    model, _, held_out = trained()
    assert compare(model.params, model.params, CONFIG, held_out).kl == pytest.approx(0, abs=1e-6)
    assert 1e-5 < kl("gptq") < 0.3 * kl("rtn")
    assert 1e-5 < kl("awq") < 0.3 * kl("rtn")


@pytest.mark.slow
def test_eight_bits_change_little():
    assert kl("rtn", Scheme(8)) < 0.05 * kl("rtn")
    assert kl("rtn", Scheme(8, float8=True)) < kl("rtn")


def test_awqs_factors_alone_change_nothing(monkeypatch):
    """Scaled up here and down there, the layer computes what it did; the norms in bfloat16."""

    def roots(w, inputs, scheme, width):
        return jnp.sqrt(inputs.magnitude / jnp.mean(inputs.magnitude))

    monkeypatch.setattr(awq, "_search", roots)
    model, text = untrained()
    layer = layer_of(model.params.layers, 0)
    calibration = Calibration(model.params.embed, CONFIG, text[:4])
    inputs = calibration.inputs(layer, 0)
    scaled, of_scaled = awq.scaled(layer, inputs, CONFIG, FOUR)
    assert np.abs(np.asarray(scaled.mlp.down) - np.asarray(layer.mlp.down)).max() > 0.01
    again = calibration.inputs(scaled, 0)
    for name in ("qkv", "o", "gate_up", "down"):
        told, found = getattr(of_scaled, name).gram, getattr(again, name).gram
        assert np.abs(told - found).max() < 1e-3 * np.abs(found).max(), name
    before, after = (Calibration(model.params.embed, CONFIG, text[:4]) for _ in range(2))
    before.advance(layer, 0)
    after.advance(scaled, 0)
    scale = np.abs(before._x[0]).max()
    assert np.abs(np.asarray(before._x[0]) - np.asarray(after._x[0])).max() < 1e-4 * scale


@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("scheme", [FOUR, Scheme(8), Scheme(8, float8=True)], ids=str)
def test_a_folder_comes_back_bit_for_bit(tmp_path, scheme, head):
    params = quantised(scheme, head)
    config = CONFIG.replace(tie_embeddings=not head)
    compressed.save(tmp_path / "q", params, config, untrained()[0].tokenizer)
    model = load(tmp_path / "q")
    assert model.config == config
    assert jax.tree.structure(model.params) == jax.tree.structure(params)
    for wanted, found in zip(jax.tree.leaves(params), jax.tree.leaves(model.params), strict=True):
        assert wanted.dtype == found.dtype
        np.testing.assert_array_equal(np.asarray(wanted), np.asarray(found))
    told = json.loads((tmp_path / "q" / "config.json").read_text())["quantization_config"]
    assert told["ignore"] == ([] if head else ["lm_head"])
    assert told["config_groups"]["group_0"]["weights"]["num_bits"] == scheme.bits


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The model, saved as any other."""
    model, path = untrained()[0], tmp_path_factory.mktemp("model") / "floats"
    safetensors.save(path, model.params, CONFIG)
    model.tokenizer.save(path)
    return path


@pytest.mark.slow
def test_the_command_writes_a_model_that_speaks(folder, tmp_path, capsys, monkeypatch):
    out = tmp_path / "q"
    code = cli.main(["quantize", str(folder), str(out), "--method", "rtn", "--bits", "4",
                     "--length", "96", "--held-out", "4"])  # fmt: skip
    table = capsys.readouterr().out
    assert not code, table
    figures = re.search(
        r"int4 +│ +([\d.]+) │ +([\d.]+) │ +([\d.]+) │ +([\d.]+)% │ +([\d.]+)", table
    )
    assert figures and float(figures[3]) > 0 and float(figures[5]) > 0, table
    assert "groups of 64" in table
    assert not list(tmp_path.glob(".*"))
    model = load(out)
    prompt = model.tokenizer.encode("import os\n")
    said = generate(model.params, model.config, [prompt], max_new_tokens=6).tokens[0]
    logits = np.asarray(model([prompt + said]))[0, len(prompt) - 1 : -1]
    chosen = logits[np.arange(len(said)), said]
    assert (chosen > logits.max(axis=-1) - 1e-2).all()  # of the whole forward too, ties apart
    assert not cli.main(["generate", str(out), "import os", "--max-new-tokens", "6"])
    assert "tokens/s" in capsys.readouterr().out


def silent() -> Console:
    return Console(quiet=True)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"bits": 3}, "bits=3"),
        ({"bits": 4, "group": 48}, "group=48 does not divide the 64 inputs"),
        ({"data": "/no/such/text.txt"}, "no such file"),
        ({"method": "magic"}, "choose one of " + ", ".join(METHODS)),
        ({"method": "gptq", "float8": True}, "float8 is rounded to nearest"),
        ({"count": 0}, "1 or more"),
    ],
)
def test_bad_wishes_leave_nothing(folder, tmp_path, options, words):
    with pytest.raises(UserError, match=words):
        run.run(str(folder), tmp_path / "q", console=silent(), **options)
    assert not list(tmp_path.iterdir())


def test_too_little_text_is_told(folder, tmp_path):
    (tmp_path / "short.txt").write_text("a few words\n" * 20)
    with pytest.raises(UserError, match="tokens of calibration text, 8,192 are needed"):
        run.run(str(folder), tmp_path / "q", data=str(tmp_path / "short.txt"), console=silent(),
                length=256)  # fmt: skip


def test_a_model_is_quantised_once(folder, tmp_path):
    compressed.save(tmp_path / "q", quantised(), CONFIG, untrained()[0].tokenizer)
    with pytest.raises(UserError, match="quantised already"):
        run.run(str(tmp_path / "q"), tmp_path / "again", console=silent())
    with pytest.raises(UserError, match="exists already"):
        run.run(str(folder), tmp_path / "q", console=silent())
    with pytest.raises(UserError, match="mixture of experts"):
        quantize(init(jax.random.key(0), SPARSE), SPARSE, Scheme(8))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"quant_method": "gptq"}, "quantised by 'gptq'.*jaxinfra quantize"),
        ({"format": "nvfp4-pack-quantized"}, "pack-quantized or float-quantized"),
    ],
)
def test_other_layouts_are_refused(tmp_path, change, words):
    compressed.save(tmp_path / "q", quantised(), CONFIG, untrained()[0].tokenizer)
    file = tmp_path / "q" / "config.json"
    raw = json.loads(file.read_text())
    raw["quantization_config"] |= change
    file.write_text(json.dumps(raw))
    with pytest.raises(UserError, match=words):
        load(tmp_path / "q")


def test_a_cut_folder_is_refused(tmp_path):
    compressed.save(tmp_path / "q", quantised(), CONFIG, untrained()[0].tokenizer)
    file = tmp_path / "q" / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-5])
    with pytest.raises(UserError, match="truncated"):
        load(tmp_path / "q")
    file.write_bytes(whole.replace(b"k_proj.weight_packed", b"k_proj.weight_pickle"))
    with pytest.raises(UserError, match=r"k_proj.weight is missing"):
        load(tmp_path / "q")


def test_calibration_and_held_out_text_share_nothing(tmp_path):
    lines = "".join(f"line {i} of the text\n" for i in range(20_000))
    (tmp_path / "text").write_text(lines)
    tokenizer = untrained()[0].tokenizer
    seen, held_out = windows(str(tmp_path / "text"), tokenizer, count=40, length=200, held_out=10)
    numbers = [set(re.findall(r"line (\d+) ", tokenizer.decode(part.ravel())))
               for part in (seen, held_out)]  # fmt: skip
    assert all(numbers) and not numbers[0] & numbers[1]
    assert max(map(int, numbers[0])) > 10_000  # from all of it
