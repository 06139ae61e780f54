"""LoRA: adapters as a pytree beside frozen parameters, merged for use, saved in PEFT's layout.

    adapters = lora.init(key, config, LoRA(rank=8))
    logits = transformer.forward(lora.attach(params, adapters, LoRA(rank=8)), config, tokens)
    safetensors.save(folder, lora.merge(params, adapters, LoRA(rank=8)), config)

B begins at zero, so that the adapted model begins as the frozen one. Memory beside the frozen
parameters: 16 bytes a number of the adapters (float32, its gradient, AdamW's two moments).
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Key

from align.trainer_config import LoRA, Target
from jaxinfra.errors import UserError
from jaxinfra.model import params as P
from jaxinfra.model.config import ModelConfig
from jaxinfra.model.low_rank import LowRank
from jaxinfra.model.params import Leaf, MoE, Params
from jaxinfra.weights import safetensors
from jaxinfra.weights.files import new_folder
from jaxinfra.weights.names import Tensor, hf_tensors

Adapters = dict[str, "Adapter"]  # by the name of the matrix: "q", "down"

_INPUTS = {"o": 2}  # axes that are inputs, where it is not one
_MLP = ("gate", "up", "down")
_PREFIX = "base_model.model."


@struct.dataclass
class Adapter:
    """The two factors of one matrix's addition, of L stacked layers."""

    a: Leaf  # [L, in..., r]
    b: Leaf  # [L, r, out...]


def init(key: Key[Array, ""], config: ModelConfig, lora: LoRA) -> Adapters:
    """Adapters in float32: A uniform in +-1 / sqrt(in), as in PEFT, and B zero.

    Raises UserError where the rank exceeds a matrix's smaller side, and for experts.
    """

    def adapter(number: int, name: str, shape: tuple[int, ...]) -> Adapter:
        L, *matrix = shape
        n = _INPUTS.get(name, 1)
        inputs, outputs = matrix[:n], matrix[n:]
        small = min(math.prod(inputs), math.prod(outputs))
        if not 1 <= lora.rank <= small:
            raise UserError(
                f"lora: rank={lora.rank} does not fit {name}, a matrix of "
                f"{math.prod(inputs)} x {math.prod(outputs)}; give 1 to {small}"
            )
        bound = math.prod(inputs) ** -0.5
        key_of = jax.random.fold_in(key, number)
        a = jax.random.uniform(key_of, (L, *inputs, lora.rank), jnp.float32, -bound, bound)
        return Adapter(a, jnp.zeros((L, lora.rank, *outputs), jnp.float32))

    layers = P.abstract(config).layers
    _check(layers, lora)
    return {
        name: adapter(number, name, _matrix(layers, name).shape)
        for number, name in enumerate(sorted(lora.targets))
    }


def attach(params: Params, adapters: Adapters, lora: LoRA) -> Params:
    """`params` whose adapted matrices are `LowRank` leaves: for training, W is not touched."""
    scale = lora.alpha / lora.rank
    return _replaced(
        params, {name: LowRank(_matrix(params.layers, name), x.a, x.b, scale)
                 for name, x in adapters.items()}
    )  # fmt: skip


def merge(params: Params, adapters: Adapters, lora: LoRA) -> Params:
    """Plain parameters W + alpha / rank A B, in the dtype of `params`; the sum is in float32."""

    def added(name: str, x: Adapter) -> Array:
        w = jnp.asarray(_matrix(params.layers, name))
        inner = "nh" if name == "o" else "i"
        outer = "d" if name == "o" else "jk"[: w.ndim - 2]
        low = jnp.einsum(
            f"l{inner}r,lr{outer}->l{inner}{outer}",
            x.a.astype(jnp.float32), x.b.astype(jnp.float32),
            precision=jax.lax.Precision.HIGHEST,
        )  # fmt: skip
        return (w.astype(jnp.float32) + lora.alpha / lora.rank * low).astype(w.dtype)

    return _replaced(params, {name: added(name, x) for name, x in adapters.items()})


def save(
    folder: str | Path, adapters: Adapters, lora: LoRA, config: ModelConfig, base: str | None = None
) -> None:
    """Writes adapter_config.json and adapter_model.safetensors, as PEFT's `from_pretrained` reads.

    `base`: the name or folder of the frozen model, which PEFT's AutoPeftModel loads.
    """
    arrays = {
        f"{name}.{side}": np.asarray(getattr(x, side))
        for name, x in adapters.items() for side in ("a", "b")
    }  # fmt: skip
    tensors = sorted(_tensors(config, lora), key=lambda t: t.path)
    with new_folder(folder, 2 * sum(array.nbytes for array in arrays.values()) + 65_536) as new:
        about = {
            "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base,
            "r": lora.rank, "lora_alpha": lora.alpha, "lora_dropout": 0.0, "bias": "none",
            "fan_in_fan_out": False, "inference_mode": True,
            "target_modules": sorted({t.name.rsplit(".", 3)[1] for t in tensors}),
        }  # fmt: skip
        (new / "adapter_config.json").write_text(json.dumps(about, indent=2) + "\n")
        safetensors.write(new / "adapter_model.safetensors", tensors, arrays)


def load(folder: str | Path, config: ModelConfig) -> tuple[Adapters, LoRA]:
    """What `save`, or PEFT for the same matrices, has written; UserError when it does not fit."""
    folder = Path(folder)
    try:
        about = json.loads((folder / "adapter_config.json").read_text())
        modules = {f"{name}_proj": name for name in get_args(Target)}
        targets = tuple(modules[module] for module in sorted(about["target_modules"]))
        lora = LoRA(about["r"], float(about["lora_alpha"]), targets)
        for kind in ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "modules_to_save"):
            if about.get(kind):
                raise ValueError(f"{kind}={about[kind]}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{folder}/adapter_config.json: not one of LoRA's that this reads ({error})"
        ) from None
    shapes = jax.eval_shape(lambda: init(jax.random.key(0), config, lora))
    arrays = {
        f"{name}.{side}": np.empty(getattr(x, side).shape, np.float32)
        for name, x in shapes.items() for side in ("a", "b")
    }  # fmt: skip
    safetensors.read(folder / "adapter_model.safetensors", list(_tensors(config, lora)), arrays)
    return {
        name: Adapter(jnp.asarray(arrays[f"{name}.a"]), jnp.asarray(arrays[f"{name}.b"]))
        for name in shapes
    }, lora


def _tensors(config: ModelConfig, lora: LoRA) -> list[Tensor]:
    """PEFT's tensors: lora_A is [r, in], lora_B [out, r], one of each a layer and matrix."""
    found = []
    for t in hf_tensors(config):
        name = t.path.rpartition(".")[2]
        if not t.path.startswith("layers.") or name not in lora.targets:
            continue
        out, inner = t.shape
        stem = _PREFIX + t.name.removesuffix(".weight")
        for side, shape in (("a", (lora.rank, inner)), ("b", (out, lora.rank))):
            tensor = f"{stem}.lora_{side.upper()}.weight"
            found.append(Tensor(tensor, f"{name}.{side}", t.index, shape, transposed=True))
    return found


def _check(layers: P.Layer, lora: LoRA) -> None:
    if isinstance(layers.mlp, MoE) and (experts := set(lora.targets) & set(_MLP)):
        raise UserError(
            f"lora: targets={sorted(experts)} are experts in this model; adapt q, k, v, o only"
        )


def _matrix(layers: P.Layer, name: str) -> Any:
    return getattr(layers.mlp if name in _MLP else layers.attn, name)


def _replaced(params: Params, matrices: dict[str, Any]) -> Params:
    layers: Any = params.layers
    mlp = {name: w for name, w in matrices.items() if name in _MLP}
    attn = {name: w for name, w in matrices.items() if name not in _MLP}
    layers = layers.replace(attn=layers.attn.replace(**attn), mlp=layers.mlp.replace(**mlp))
    return params.replace(layers=layers)  # pyright: ignore[reportAttributeAccessIssue]
