"""One way into every kind of checkpoint: safetensors folder, GGUF file or Orbax folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jaxinfra.errors import UserError
from jaxinfra.model.config import ModelConfig
from jaxinfra.model.params import Params
from jaxinfra.weights import compressed, gguf, safetensors


def read_config(path: str | Path) -> ModelConfig:
    """The configuration of the checkpoint `path`, whatever its kind; reads no weights."""
    path = _locate(path)
    if path.is_file():
        return gguf.read_config(path)
    if _is_orbax(path):
        from jaxinfra.weights import orbax  # takes a second to import

        return orbax.read_config(path)
    return ModelConfig.from_file(path)


def load_weights(path: str | Path, dtype: Any, sharding: Any = None) -> tuple[ModelConfig, Params]:
    """Configuration and parameters, in `dtype`, of the checkpoint `path`.

    `path` is a folder of config.json and safetensors, a .gguf file or a folder with exactly one, or
    an Orbax folder of `jaxinfra.weights.orbax`; a quantised folder's matrices stay as they are
    (`jaxinfra.weights.compressed`). `sharding`: None for the default device, one
    `jax.sharding.Sharding` for all arrays, or a tree of them like Params (`read_config` and
    `jaxinfra.model.params.abstract` tell its shapes). Raises UserError naming the file and the fix.
    """
    path = _locate(path)
    config = read_config(path)
    if path.is_file():
        return config, gguf.load(path, dtype, sharding)
    if _is_orbax(path):
        from jaxinfra.weights import orbax

        return config, orbax.load(path, dtype, sharding)
    if compressed.quantization(path):
        return config, compressed.load(path, config, dtype, sharding)
    return config, safetensors.load(path, config, dtype, sharding)


def _locate(path: str | Path) -> Path:
    """The .gguf file or the folder that holds the checkpoint."""
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such file or folder; `jaxinfra pull NAME` fetches a model")
    if path.is_file():
        if path.suffix != ".gguf":
            raise UserError(f"{path}: not a .gguf file; for safetensors give the folder it is in")
        return path
    if _is_orbax(path) or (path / "config.json").exists():
        return path
    files = sorted(path.glob("*.gguf"))
    if len(files) == 1:
        return files[0]
    if files:
        raise UserError(f"{path}: holds {len(files)} .gguf files; give one, such as {files[0]}")
    hint = ""
    if (path / "model").is_dir():
        hint = f"; a run's model is in {path / 'model'}"
    elif (path / "checkpoints").is_dir():
        hint = "; a run that has not ended: `jaxinfra train --resume` goes on with it"
    raise UserError(
        f"{path}: no model here: neither config.json nor a .gguf file nor Orbax's files{hint}"
    )


def _is_orbax(path: Path) -> bool:
    return (path / "_CHECKPOINT_METADATA").exists()
