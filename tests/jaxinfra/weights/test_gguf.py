"""GGUF files: llama.cpp's layout undone for every architecture, damage met by one UserError."""

import struct
import time

import gguf as package
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import ARCHITECTURES, CONFIGS, as_llama_cpp_stores, random_params, write_gguf

from jaxinfra.errors import UserError
from jaxinfra.model.config import Rope
from jaxinfra.weights import gguf as own
from jaxinfra.weights.gguf_header import read_header


def _worst(a, b) -> float:
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return max(float(jnp.abs(x - y).max()) for x, y in pairs)


@pytest.fixture
def llama(tmp_path):
    """A small Llama as a GGUF file: (file, config, params)."""
    config = CONFIGS["llama"]
    params = random_params(config)
    file = write_gguf(tmp_path / "m.gguf", config, as_llama_cpp_stores(params, config))
    return file, config, params


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_what_llama_cpp_stores_is_read_back(tmp_path, family):
    config = CONFIGS[family]
    params = random_params(config)
    file = write_gguf(tmp_path / "m.gguf", config, as_llama_cpp_stores(params, config))
    assert own.read_config(file) == config
    worst = _worst(own.load(file, jnp.float32), params)
    assert (
        worst < 1e-6 if family == "gemma3_text" else worst == 0
    )  # Gemma: the one added, taken off


def test_rotary_order_and_gemmas_one_matter(tmp_path):
    """What the check above would say of a loader that undid neither."""
    for family, part in (("llama", "attn_q"), ("gemma3_text", "attn_norm")):
        config = CONFIGS[family]
        params = random_params(config)
        stored = as_llama_cpp_stores(params, config)
        name = f"blk.1.{part}.weight"
        stored[name] = stored[name] - 1 if part == "attn_norm" else stored[name][::-1].copy()
        file = write_gguf(tmp_path / f"{family}.gguf", config, stored)
        assert _worst(own.load(file, jnp.float32), params) > 0.1


def test_the_header_is_that_of_the_gguf_package(llama):
    header, reader = read_header(llama[0]), package.GGUFReader(llama[0])
    theirs = {k: f.contents() for k, f in reader.fields.items() if not k.startswith("GGUF.")}
    assert header.metadata.keys() == theirs.keys()
    for key, value in theirs.items():
        expected = pytest.approx(value, rel=1e-7) if isinstance(value, float) else value
        assert header.metadata[key] == expected
    for tensor in reader.tensors:
        stored = header.tensors[tensor.name]
        assert stored.offset == tensor.data_offset
        assert stored.shape == tensor.data.shape
        assert stored.type == tensor.tensor_type


def test_llama3_rope_scaling_is_recovered_from_its_frequencies(tmp_path):
    config = CONFIGS["llama"].replace(
        head_dim=64, rope=Rope(5e5, "llama3", 32.0, 1.0, 4.0, original_max_seq_len=8192)
    )
    divisors = []
    for i in range(32):  # transformers' _compute_llama3_parameters, one frequency at a time
        wavelength = 2 * np.pi * 5e5 ** (2 * i / 64)
        smooth = (8192 / wavelength - 1) / (4 - 1)
        if wavelength < 8192 / 4:
            divisors.append(1)
        elif wavelength > 8192 / 1:
            divisors.append(32)
        else:
            divisors.append(1 / ((1 - smooth) / 32 + smooth))
    stored = as_llama_cpp_stores(random_params(config), config)
    stored["rope_freqs.weight"] = np.array(divisors, np.float32)
    file = write_gguf(tmp_path / "m.gguf", config, stored)
    assert own.read_config(file) == config
    own.load(file, jnp.float32)
    stored["rope_freqs.weight"][20] *= 1.1
    file = write_gguf(tmp_path / "other.gguf", config, stored)
    with pytest.raises(UserError, match=r"other\.gguf: the rope scaling"):
        own.read_config(file)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("blk.1.ffn_up.weight"), "blk.1.ffn_up.weight is missing"),
        (lambda s: s.update(extra=np.zeros(4, np.float32)), "extra has no place"),
        (
            lambda s: s.update({"output_norm.weight": np.zeros(35, np.float32)}),
            r"output_norm.weight has shape \[35\], the config says \[36\]",
        ),
        (
            lambda s: s.update({"output_norm.weight": np.zeros(36, np.float64)}),
            "output_norm.weight is of type F64; supported are F32",
        ),
        (lambda s: s.pop("token_embd.weight"), "lacks 'token_embd.weight'"),
    ],
)
def test_tensors_that_are_not_the_models_are_refused(tmp_path, change, message):
    config = CONFIGS["llama"]
    stored = as_llama_cpp_stores(random_params(config), config)
    change(stored)
    file = write_gguf(tmp_path / "m.gguf", config, stored)
    with pytest.raises(UserError, match=message) as error:
        own.load(file, jnp.float32)
    assert str(file) in str(error.value)


def test_other_architectures_and_files_are_refused(tmp_path):
    writer = package.GGUFWriter(tmp_path / "m.gguf", "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UserError, match="architecture 'mamba' is not supported"):
        own.read_config(tmp_path / "m.gguf")
    (tmp_path / "text.gguf").write_text("The quick brown fox jumps over the lazy dog.")
    with pytest.raises(UserError, match=r"text\.gguf: not a GGUF file"):
        own.read_config(tmp_path / "text.gguf")
    with pytest.raises(UserError, match="No such file"):
        own.read_config(tmp_path / "none.gguf")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s, m: m.update(block_count=10**9), "1,000,000,000 blocks of 21 tensors"),
        (lambda s, m: m.update(block_count=2**31 - 1), "blocks of 21 tensors"),
        (
            lambda s, m: (
                m.update({"attention.key_length": 2**31 - 2}),
                s.update({"rope_freqs.weight": np.ones(4, np.float32)}),
            ),
            "rope_freqs.weight is not 1,073,741,823 numbers",
        ),
        (lambda s, m: m.update(bos_token_id="x"), "token_id=.* is no token id"),
        (lambda s, m: m.update(eos_token_id=-1), "token_id=.* is no token id"),
    ],
)
def test_metadata_that_asks_for_too_much_is_refused_at_once(tmp_path, monkeypatch, change, message):
    config, own_keys = CONFIGS["llama"], {}
    stored = as_llama_cpp_stores(random_params(config), config)
    change(stored, own_keys)
    file = write_gguf(tmp_path / "m.gguf", config, stored)
    header = read_header(file)
    for key, value in own_keys.items():
        prefix = "tokenizer.ggml." if key.endswith("_id") else "llama."
        header.metadata[prefix + key] = value
    monkeypatch.setattr(own, "read_header", lambda _: header)
    start = time.process_time()
    with pytest.raises(UserError, match=message):
        own.load(file, jnp.float32)
    assert time.process_time() - start < 5


def _header(*entries: tuple[str, int, int, int], keys: int = 0) -> bytes:
    """A GGUF header of rows of F32 or Q8_0: name, width, type, offset; and `keys` like ones."""
    text = lambda t: struct.pack("<Q", len(t)) + t.encode()  # noqa: E731
    head = b"GGUF" + struct.pack("<IQQ", 3, len(entries), keys)
    head += (text("key") + struct.pack("<II", 4, 7)) * keys
    for name, width, kind, offset in entries:
        head += text(name) + struct.pack("<IQIQ", 1, width, kind, offset)
    return head + bytes(-len(head) % 32) + bytes(256)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (_header(("a", 8, 0, 0), ("a", 8, 0, 32)), "tensor a is there twice"),
        (_header(("a", 16, 0, 0), ("b", 8, 0, 32)), "tensor b begins at byte .* within another"),
        (_header(("a", 8, 0, 2)), "tensor a begins at byte .* out of step"),
        (_header(("a", 48, 8, 0)), "tensor a has rows of 48, no multiple of its block of 32"),
        (_header(("a", 8, 0, 0), keys=2), "key twice"),
        (_header(("a", 2**63, 0, 0)), "truncated: tensor a ends"),
    ],
)
def test_headers_that_contradict_themselves_are_refused(tmp_path, content, message):
    file = tmp_path / "m.gguf"
    file.write_bytes(_header(("b", 8, 0, 32), ("a", 8, 0, 0), keys=1))
    assert read_header(file).tensors.keys() == {"a", "b"}
    file.write_bytes(content)
    with pytest.raises(UserError, match=rf"m\.gguf: .*{message}"):
        read_header(file)


def test_every_truncation_is_a_usererror(llama):
    file, _, _ = llama
    good = file.read_bytes()
    for left in [*range(0, 2_000, 37), *range(2_000, len(good) - 1, 2_999), len(good) - 33]:
        file.write_bytes(good[:left])
        with pytest.raises(UserError, match=r"m\.gguf: "):
            own.load(file, jnp.float32)


def test_damage_never_gives_anything_but_a_usererror(llama):
    file, _, _ = llama
    good = file.read_bytes()
    draws = np.random.default_rng(0)
    refused = 0
    for _ in range(300):
        bad = bytearray(good)
        for place in draws.integers(0, 3_500, 3):
            bad[place] = draws.integers(256)
        file.write_bytes(bad)
        try:
            own.load(file, jnp.float32)
        except UserError as error:
            assert str(file) in str(error)
            refused += 1
    assert refused > 150
