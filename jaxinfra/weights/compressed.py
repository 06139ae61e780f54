"""Quantised checkpoints in the layout of compressed-tensors, which transformers and vLLM load.

A folder as `jaxinfra.weights.safetensors` writes it, but of a quantised matrix NAME.weight [o, i]
it holds, with `quantization_config` in config.json telling the format:

    pack-quantized   NAME.weight_packed  int32 [o, i / 8] (4 bits) or [o, i / 4] (8 bits): values
                                         plus 8 or 128, the first in the lowest bits
                     NAME.weight_shape   int64 [2]: o, i
    float-quantized  NAME.weight         float8_e4m3fn [o, i]
    both             NAME.weight_scale   bfloat16 [o, g], value times scale is the weight

It was chosen before GPTQ's own layout (qweight, qzeros, scales) because one layout holds 4 bits, 8
bits and float8, groups or not, and because its bytes are those of `QuantizedMatrix`. Read are
symmetric values, groups in order. Source: `compressed_tensors` 0.20, compressors/pack_quantized.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from jaxinfra.errors import UserError
from jaxinfra.model.config import ModelConfig
from jaxinfra.model.params import Params, abstract
from jaxinfra.model.quantized import QuantizedMatrix, is_quantized
from jaxinfra.text.tokenizer import Tokenizer
from jaxinfra.weights.files import new_folder
from jaxinfra.weights.names import Tensor, hf_tensors, leaves
from jaxinfra.weights.safetensors import Stored, headers

KEY = "quantization_config"
_DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I32": np.dtype(np.int32),
    "I64": np.dtype(np.int64),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
_FORMATS = ("pack-quantized", "float-quantized")


def quantization(folder: str | Path) -> dict[str, Any] | None:
    """The `quantization_config` of the folder's config.json, None where it has none."""
    file = Path(folder) / "config.json"
    try:
        told = json.loads(file.read_text()).get(KEY)
    except (OSError, ValueError, AttributeError, RecursionError):
        return None  # `ModelConfig.from_file` says what is wrong
    return told if isinstance(told, dict | None) else {"quant_method": told}


def load(folder: str | Path, config: ModelConfig, dtype: Any, sharding: Any = None) -> Params:
    """The parameters, quantised matrices as `QuantizedMatrix`, the others in `dtype`.

    `sharding`: None or one `jax.sharding.Sharding` for all arrays. Raises UserError naming what the
    folder holds that is not read here, and what it lacks.
    """
    folder, told = Path(folder), quantization(folder) or {}
    if told.get("quant_method") != "compressed-tensors" or told.get("format") not in _FORMATS:
        raise UserError(
            f"{folder}: quantised by {told.get('quant_method')!r} as {told.get('format')!r}; read "
            f"are compressed-tensors as {' or '.join(_FORMATS)}; take the model that is not "
            "quantised and use `jaxinfra quantize`"
        )
    if sharding is not None and not isinstance(sharding, jax.sharding.Sharding):
        raise UserError(f"{folder}: a quantised model takes one sharding for all its arrays")
    stored = headers(folder)
    for name in stored:
        if name.endswith((".weight_zero_point", ".weight_g_idx")):
            raise UserError(f"{folder}: {name}: only symmetric values, groups in order, are read")
    of_leaf: dict[str, list[Tensor]] = {}
    for tensor in hf_tensors(config):
        of_leaf.setdefault(tensor.path, []).append(tensor)
    arrays = []
    for path, shape in leaves(config):
        whole = _quantised if _prefix(of_leaf[path][0]) + ".weight_scale" in stored else _floats
        leaf = whole(folder, stored, of_leaf[path], shape, np.dtype(dtype))
        arrays.append(jax.device_put(leaf, sharding))
    return jax.tree.unflatten(jax.tree.structure(abstract(config)), arrays)


def save(folder: str | Path, params: Params, config: ModelConfig, tokenizer: Tokenizer) -> None:
    """Writes the folder, whole or not at all; raises UserError as `new_folder` does.

    Arrays that are not quantised keep their dtype. Needs a little-endian machine.
    """
    assert sys.byteorder == "little"
    entries: dict[str, Any]
    entries, writers, end = {"__metadata__": {"format": "pt"}}, [], 0
    for name, dtype, shape, make in _entries(params, config):
        size = math.prod(shape) * dtype.itemsize
        entries[name] = {
            "dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [end, end + size],
        }  # fmt: skip
        writers.append(make)
        end += size
    head = json.dumps(entries).encode()
    head += b" " * (-len(head) % 8)
    told = config.to_hf() | {
        "dtype": np.dtype(params.embed.dtype).name,
        KEY: _describe(params),
    }
    with new_folder(folder, end + len(head) + 8) as new:
        tokenizer.save(new)
        (new / "config.json").write_text(json.dumps(told, indent=2) + "\n")
        with open(new / "model.safetensors", "wb") as stream:
            stream.write(len(head).to_bytes(8, "little") + head)
            for make in writers:
                stream.write(np.ascontiguousarray(make()).tobytes())


def _prefix(tensor: Tensor) -> str:
    return tensor.name.removesuffix(".weight")


def _read(folder: Path, stored: dict[str, Stored], name: str) -> np.ndarray:
    place = stored.get(name)
    if place is None:
        raise UserError(f"{folder}: tensor {name} is missing; fetch the folder again")
    if place.dtype not in _DTYPES:
        raise UserError(f"{place.file}: tensor {name} is of type {place.dtype}, which is not read")
    count = math.prod(place.shape)
    flat = np.fromfile(place.file, _DTYPES[place.dtype], count, offset=place.offset)
    return flat.reshape(place.shape)


def _floats(
    folder: Path, stored: dict[str, Stored], tensors: list[Tensor], shape: tuple, dtype: np.dtype
) -> np.ndarray:
    host = np.empty(shape, dtype)
    for tensor in tensors:
        read = _read(folder, stored, tensor.name)
        if read.shape != tensor.shape:
            raise UserError(
                f"{folder}: {tensor.name}: {read.shape}, the config says {tensor.shape}"
            )
        tensor.view(host)[...] = read
    return host


def _quantised(
    folder: Path, stored: dict[str, Stored], tensors: list[Tensor], shape: tuple, _: np.dtype
) -> QuantizedMatrix:
    values, scales = [], []
    for tensor in tensors:
        o, i = tensor.shape
        scale = _read(folder, stored, _prefix(tensor) + ".weight_scale").astype(np.float32)
        if f"{_prefix(tensor)}.weight_packed" in stored:
            found = _read(folder, stored, _prefix(tensor) + ".weight_packed").view(np.uint8)
            if found.shape == (o, i):  # 8 bits: a byte is the value plus 128
                found = (found ^ 128).view(np.int8)
        else:
            found = _read(folder, stored, tensor.name)
        g = scale.size // o
        if scale.size % o or i % g or found.shape not in ((o, i), (o, i // 2)):
            raise UserError(
                f"{folder}: {tensor.name}: values {list(found.shape)} and scales "
                f"{list(scale.shape)} are not those of a matrix {[o, i]}; fetch the folder again"
            )
        values.append(found.reshape(o, g, -1).swapaxes(0, 1))
        scales.append(scale.reshape(o, g).T)
    layered = bool(tensors[0].index)
    stack: Callable = np.stack if layered else (lambda arrays: np.ascontiguousarray(arrays[0]))
    return QuantizedMatrix(stack(values), stack(scales), shape=shape[layered:])


def _entries(
    params: Params, config: ModelConfig
) -> Iterator[tuple[str, np.dtype, tuple[int, ...], Callable[[], np.ndarray]]]:
    """Name, dtype, shape and maker of every tensor of the file."""
    for tensor in hf_tensors(config):
        leaf: Any = params
        for name in tensor.path.split("."):
            leaf = getattr(leaf, name)
        if not is_quantized(leaf):
            host = np.asarray(leaf)
            yield tensor.name, host.dtype, tensor.shape, lambda h=host, t=tensor: t.view(h)
            continue
        values, scales = np.asarray(leaf.values)[tensor.index], leaf.scales[tensor.index]
        matrix, name = values.swapaxes(0, 1).reshape(tensor.shape[0], -1), _prefix(tensor)
        if values.dtype == ml_dtypes.float8_e4m3fn:
            yield tensor.name, values.dtype, tensor.shape, lambda m=matrix: m
        else:
            raw = matrix if values.dtype == np.uint8 else matrix.view(np.uint8) ^ 128
            packed = np.ascontiguousarray(raw).view(np.int32)
            yield f"{name}.weight_packed", packed.dtype, packed.shape, lambda p=packed: p
            sizes = np.asarray(tensor.shape, np.int64)
            yield f"{name}.weight_shape", sizes.dtype, (2,), lambda s=sizes: s
        scale = np.asarray(scales).T.astype(ml_dtypes.bfloat16)
        yield f"{name}.weight_scale", scale.dtype, scale.shape, lambda s=scale: s


def _describe(params: Params) -> dict[str, Any]:
    """The `quantization_config`: what compressed-tensors 0.20 writes for weights alone."""
    matrix = next(filter(is_quantized, jax.tree.leaves(params, is_leaf=is_quantized)))
    groups = matrix.values.shape[-3]
    float8 = matrix.values.dtype == jnp.float8_e4m3fn
    weights = {
        "num_bits": 4 if matrix.values.dtype == jnp.uint8 else 8,
        "type": "float" if float8 else "int",
        "symmetric": True,
        "dynamic": False,
        "strategy": "group" if groups > 1 else "channel",
        "group_size": matrix.inputs // groups if groups > 1 else None,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": _FORMATS[float8],
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": [] if is_quantized(params.unembed) else ["lm_head"],
    }
