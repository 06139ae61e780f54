"""Each GGUF type against a float64 reading of its format, on random bytes.

The oracles follow the block structures in `ggml-common.h` and the scalar loops of `ggml-quants.c`
in llama.cpp, one value at a time and without numpy's broadcasting tricks.
"""

import struct

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from checkpoints import CONFIGS, as_llama_cpp_stores, random_params, write_gguf
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from jaxinfra.errors import UserError
from jaxinfra.weights import gguf as own

_CONFIG = CONFIGS["qwen3"].replace(d_model=256, d_ff=256, vocab_size=16, num_layers=1)


def _half(block: bytes, at: int) -> float:
    return float(struct.unpack_from("<e", block, at)[0])


def _f32(block):
    return list(struct.unpack("<f", block))


def _f16(block):
    return [_half(block, 0)]


def _bf16(block):
    return [struct.unpack("<f", b"\0\0" + block)[0]]


def _q8_0(block):
    return [_half(block, 0) * q for q in struct.unpack_from("<32b", block, 2)]


def _nibbles(raw):
    return [byte & 15 for byte in raw] + [byte >> 4 for byte in raw]


def _q4_0(block):
    return [_half(block, 0) * (q - 8) for q in _nibbles(block[2:])]


def _q4_1(block):
    return [_half(block, 0) * q + _half(block, 2) for q in _nibbles(block[4:])]


def _scale_and_min(packed, j):
    if j < 4:
        return packed[j] & 63, packed[j + 4] & 63
    scale = (packed[j + 4] & 15) | ((packed[j - 4] >> 6) << 4)
    return scale, (packed[j + 4] >> 4) | ((packed[j] >> 6) << 4)


def _k4_or_k5(block, quants, high):
    d, dmin, packed = _half(block, 0), _half(block, 2), block[4:16]
    values = []
    for j in range(8):
        scale, low = _scale_and_min(packed, j)
        for i in range(32):
            q = (quants[32 * (j // 2) + i] >> (4 * (j % 2))) & 15
            q += 16 * ((high[i] >> j) & 1)
            values.append(d * scale * q - dmin * low)
    return values


def _q4_k(block):
    return _k4_or_k5(block, block[16:], bytes(32))


def _q5_k(block):
    return _k4_or_k5(block, block[48:], block[16:48])


def _q6_k(block):
    low, high, scales = block[:128], block[128:192], struct.unpack_from("<16b", block, 192)
    d = _half(block, 208)
    values = [0.0] * 256
    for half in range(2):
        for i in range(32):
            for quarter in range(4):
                q = low[64 * half + 32 * (quarter % 2) + i] >> (4 * (quarter // 2)) & 15
                q |= (high[32 * half + i] >> (2 * quarter) & 3) << 4
                scale = scales[8 * half + 2 * quarter + i // 16]
                values[128 * half + 32 * quarter + i] = d * scale * (q - 32)
    return values


ORACLES = {
    "F32": _f32, "F16": _f16, "BF16": _bf16, "Q8_0": _q8_0, "Q4_0": _q4_0, "Q4_1": _q4_1,
    "Q4_K": _q4_k, "Q5_K": _q5_k, "Q6_K": _q6_k,
}  # fmt: skip
WRONG = {
    "Q8_0": lambda b: [_half(b, 0) * q for q in b[2:]],  # unsigned
    "Q4_0": lambda b: [_half(b, 0) * q for q in _nibbles(b[2:])],  # not centred
    "Q4_1": lambda b: [_half(b, 0) * n + _half(b, 2) for q in b[4:] for n in (q & 15, q >> 4)],
    "Q4_K": lambda b: _k4_or_k5(b, b[16:], b[48:80]),  # takes a fifth bit from somewhere
    "Q5_K": lambda b: _k4_or_k5(b, b[48:], bytes(32)),  # leaves the fifth bit out
    "Q6_K": lambda b: [v + _half(b, 208) for v in _q6_k(b)],
}
_HALVES = {"Q8_0": (0,), "Q4_0": (0,), "Q4_1": (0, 2), "Q4_K": (0, 2), "Q5_K": (0, 2),
           "Q6_K": (208,)}  # fmt: skip


def _random_rows(name: str, rows: int, columns: int) -> np.ndarray:
    """Rows of blocks of random bits, with finite scales."""
    draws = np.random.default_rng(len(name) + ord(name[1]))
    if name in ("F32", "F16", "BF16"):
        dtype = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}[name]
        return draws.standard_normal((rows, columns)).astype(dtype).view(np.uint8)
    values, size = GGML_QUANT_SIZES[GGMLQuantizationType[name]]
    blocks = draws.integers(0, 256, (rows * columns // values, size), np.uint8)
    for at in _HALVES[name]:
        scale = draws.standard_normal(len(blocks)).astype(np.float16)
        blocks[:, at : at + 2] = scale[:, None].view(np.uint8)
    return blocks.reshape(rows, -1)


def _read(oracle, name: str, rows: np.ndarray) -> np.ndarray:
    size = GGML_QUANT_SIZES[GGMLQuantizationType[name]][1]
    raw = rows.tobytes()
    values = [oracle(raw[i : i + size]) for i in range(0, len(raw), size)]
    return np.array(values, np.float64).reshape(len(rows), -1)


def _load_down(tmp_path, name: str, rows: np.ndarray) -> np.ndarray:
    """ffn_down [D, F] of a file that holds it in type `name`, as Params has it."""
    stored: dict = as_llama_cpp_stores(random_params(_CONFIG), _CONFIG)
    stored["blk.0.ffn_down.weight"] = (rows, GGMLQuantizationType[name])
    file = write_gguf(tmp_path / "m.gguf", _CONFIG, stored)
    return np.asarray(own.load(file, jnp.float32).layers.mlp.down)[0].T


def _matches(loaded: np.ndarray, expected: np.ndarray) -> bool:
    return np.allclose(loaded, expected, rtol=1e-6, atol=1e-6 * np.abs(expected).max())


@pytest.mark.parametrize("name", ORACLES)
def test_values_are_those_of_the_format(tmp_path, name):
    rows = _random_rows(name, 256, 256)
    loaded = _load_down(tmp_path, name, rows)
    assert _matches(loaded, _read(ORACLES[name], name, rows))
    if name in WRONG:
        assert not _matches(loaded, _read(WRONG[name], name, rows))


def test_all_supported_types_are_tested():
    assert set(ORACLES) == set(own.TYPES)


@pytest.mark.parametrize("name", ["Q2_K", "Q5_0", "IQ4_XS"])
def test_other_types_are_refused_by_name(tmp_path, name):
    values, size = GGML_QUANT_SIZES[GGMLQuantizationType[name]]
    rows = np.zeros((256, 256 // values * size), np.uint8)
    with pytest.raises(UserError, match=f"blk.0.ffn_down.weight is of type {name}; supported are"):
        _load_down(tmp_path, name, rows)
