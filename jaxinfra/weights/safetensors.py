"""Hugging Face checkpoints: a folder of config.json and safetensors files, read and written.

The format (github.com/huggingface/safetensors): eight bytes little-endian n, n bytes of JSON that
give each tensor's dtype, shape and byte range, then the bytes. It is read here with plain file
reads, not through a memory map, so that what has been read does not stay resident.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import math
import shutil
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jaxinfra.errors import UserError
from jaxinfra.model.config import ModelConfig
from jaxinfra.model.params import Params
from jaxinfra.weights.assemble import assemble, check
from jaxinfra.weights.files import new_folder
from jaxinfra.weights.index import INDEX, parse, weight_map
from jaxinfra.weights.names import Tensor, hf_tensors, leaves

_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
                    "chat_template.jinja", "tokenizer.model", "vocab.json", "merges.txt",
                    "added_tokens.json", "generation_config.json")  # fmt: skip
_BLOCK = 1 << 20
_HEADER_ENTRY = 256  # bytes a tensor takes in header and index, at most


@dataclasses.dataclass(frozen=True)
class Stored:
    """Where a tensor lies in a safetensors file."""

    file: Path
    dtype: str  # as the format spells it: "F32", "BF16"
    shape: tuple[int, ...]
    offset: int  # of its first byte in the file


def load(folder: str | Path, config: ModelConfig, dtype: Any, sharding: Any = None) -> Params:
    """Reads `model.safetensors`, or the shards that its index.json names, as Params in `dtype`.

    Host memory peaks at the size of the model in `dtype` on a CPU, at one stacked array on an
    accelerator (jaxinfra.weights.assemble). `sharding` is as in `assemble`. Raises UserError naming
    the file on a missing or truncated one and on tensors that are not those of `config`.
    """
    folder = Path(folder)
    stored = headers(folder)
    optional = {name for name in stored if name.endswith(".rotary_emb.inv_freq")}
    if config.tie_embeddings:  # some checkpoints hold the embedding a second time
        optional.add("lm_head.weight")
    found = {n: s.shape for n, s in stored.items() if n not in optional}
    tensors = check(folder, hf_tensors(config), found)
    for tensor in tensors:
        if stored[tensor.name].dtype not in _DTYPES:
            raise UserError(
                f"{stored[tensor.name].file}: tensor {tensor.name} is of type "
                f"{stored[tensor.name].dtype}; supported are {', '.join(_DTYPES)}"
            )
    with contextlib.ExitStack() as stack:
        files = {s.file: stack.enter_context(open(s.file, "rb")) for s in stored.values()}

        def read_rows(tensor: Tensor, start: int, stop: int) -> np.ndarray:
            place, columns = stored[tensor.name], tensor.shape[-1]
            dtype = _DTYPES[place.dtype]
            file = files[place.file]
            file.seek(place.offset + start * columns * dtype.itemsize)
            rows = np.frombuffer(file.read((stop - start) * columns * dtype.itemsize), dtype)
            return rows.reshape(stop - start, columns)

        return assemble(config, tensors, dtype, read_rows, sharding)


def headers(folder: Path) -> dict[str, Stored]:
    """Where every tensor of the checkpoint in `folder` lies, by name."""
    index = folder / INDEX
    if not index.exists():
        if not (folder / "model.safetensors").is_file():
            raise UserError(f"{folder}: holds neither model.safetensors nor {INDEX}")
        return header(folder / "model.safetensors")
    places = weight_map(index)
    shards = {shard: header(folder / shard) for shard in sorted(set(places.values()))}
    for name, shard in places.items():
        if name not in shards[shard]:
            raise UserError(
                f"{folder / shard}: lacks tensor {name}, which {INDEX} says it holds; fetch both "
                "files again"
            )
    return {name: shards[shard][name] for name, shard in places.items()}


def header(file: Path) -> dict[str, Stored]:
    """Reads the header of one safetensors file and holds it against the file's length."""
    if not file.is_file():
        raise UserError(f"{file}: no such file, but {INDEX} names it; fetch it again")
    size = file.stat().st_size
    with open(file, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 + length:
            raise UserError(
                f"{file}: truncated or not safetensors: its header needs {8 + length:,} bytes, the "
                f"file has {size:,}; fetch it again"
            )
        raw = stream.read(length)
    try:
        entries = {k: v for k, v in parse(raw).items() if k != "__metadata__"}
        stored, end = {}, 0
        for name, e in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
            shape, (first, last) = tuple(e["shape"]), e["data_offsets"]
            if any(type(n) is not int or n < 0 for n in (*shape, first, last)):
                raise ValueError(f"tensor {name} has a shape or offsets that are no integers")
            if first < end:
                raise ValueError(f"tensor {name} overlaps another")
            dtype = _DTYPES.get(e["dtype"])
            if dtype and math.prod(shape) * dtype.itemsize != last - first:
                raise ValueError(f"tensor {name} has another size than its shape says")
            stored[name] = Stored(file, e["dtype"], shape, 8 + length + first)
            end = last
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{file}: not a safetensors file, or damaged ({error}); fetch it again"
        ) from None
    if size < 8 + length + end:
        raise UserError(
            f"{file}: truncated: its header tells of {8 + length + end:,} bytes, the file has "
            f"{size:,}; fetch it again"
        )
    return stored


def save(
    folder: str | Path,
    params: Params,
    config: ModelConfig,
    max_shard_bytes: int = 5_000_000_000,
    tokenizer_from: str | Path | None = None,
) -> None:
    """Writes config.json and safetensors files that transformers loads, in the dtype of `params`.

    Shards hold at most `max_shard_bytes`, or one tensor. The tokenizer files of the folder
    `tokenizer_from` are copied along. The folder appears whole or not at all; raises UserError when
    it exists with something in it, and when the disk is full.
    """
    arrays = {path: _attribute(params, path) for path, _ in leaves(config)}
    for path, shape in leaves(config):
        if arrays[path] is None or arrays[path].shape != shape:
            raise UserError(
                f"params: {path} is {getattr(arrays[path], 'shape', None)}, config says {shape}"
            )
        if np.dtype(arrays[path].dtype) not in _CODES:
            raise UserError(f"params: {path} is of dtype {arrays[path].dtype}; cast it to a float")
    sizes = {t: math.prod(t.shape) * arrays[t.path].dtype.itemsize for t in hf_tensors(config)}
    shards: list[list[Tensor]] = [[]]
    filled = 0
    for tensor, size in sizes.items():
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += size
    total = sum(sizes.values())
    extra = [Path(tokenizer_from) / name for name in _TOKENIZER_FILES] if tokenizer_from else []
    extra = [file for file in extra if file.is_file()]
    size = total + sum(f.stat().st_size for f in extra) + _HEADER_ENTRY * len(sizes)
    with new_folder(folder, size) as new:
        raw = config.to_hf() | {"dtype": np.dtype(arrays["embed"].dtype).name}
        (new / "config.json").write_text(json.dumps(raw, indent=2) + "\n")
        for file in extra:
            shutil.copyfile(file, new / file.name)
        weight_map = {}
        for number, shard in enumerate(shards, 1):
            name = f"model-{number:05}-of-{len(shards):05}.safetensors"
            name = name if len(shards) > 1 else "model.safetensors"
            write(new / name, shard, arrays)
            weight_map |= {tensor.name: name for tensor in shard}
        if len(shards) > 1:
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (new / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def read(file: Path, tensors: list[Tensor], arrays: dict[str, np.ndarray]) -> None:
    """Fills `arrays`, by their paths, with the tensors of one file, which has no others."""
    stored = header(file)
    for tensor in check(file, tensors, {name: s.shape for name, s in stored.items()}):
        place = stored[tensor.name]
        if place.dtype not in _DTYPES:
            raise UserError(f"{file}: tensor {tensor.name} is of type {place.dtype}")
        flat = np.fromfile(file, _DTYPES[place.dtype], math.prod(place.shape), offset=place.offset)
        tensor.view(arrays[tensor.path])[...] = flat.reshape(place.shape)


def write(file: Path, shard: list[Tensor], arrays: dict[str, Any]) -> None:
    """One safetensors file of `arrays`, by their paths; tensors of one array stand together."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers asks for this
    end = 0
    for t in shard:
        dtype = np.dtype(arrays[t.path].dtype)
        start, end = end, end + math.prod(t.shape) * dtype.itemsize
        entries[t.name] = {
            "dtype": _CODES[dtype], "shape": t.shape, "data_offsets": [start, end],
        }  # fmt: skip
    head = json.dumps(entries).encode()
    head += b" " * (-len(head) % 8)
    with open(file, "wb") as stream:
        stream.write(len(head).to_bytes(8, "little") + head)
        for path, tensors in itertools.groupby(shard, lambda t: t.path):
            host = np.asarray(arrays[path])
            for tensor in tensors:
                view = np.atleast_2d(tensor.view(host))
                step = max(1, _BLOCK // view[0].nbytes)
                for start in range(0, len(view), step):
                    stream.write(np.ascontiguousarray(view[start : start + step]).tobytes())


def _attribute(params: Params, path: str) -> Any:
    value: Any = params
    for name in path.split("."):
        value = getattr(value, name)
    return value
