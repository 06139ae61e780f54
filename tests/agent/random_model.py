"""Writes a tiny model with random weights, a byte tokenizer and a chat template into a folder.

python -m tests.agent.random_model FOLDER        # then: jaxinfra serve FOLDER
"""

import sys
from pathlib import Path

import jax

from jaxinfra.model.config import ModelConfig
from jaxinfra.model.params import init
from jaxinfra.text import Tokenizer
from jaxinfra.weights.safetensors import save
from tests.agent.compat_server import TEMPLATE
from tests.decode.server.scripted import TOKENIZER

CONFIG = ModelConfig(
    family="qwen3", vocab_size=320, num_layers=2, d_model=32, num_heads=4, num_kv_heads=2,
    head_dim=16, d_ff=64, max_seq_len=32768, qk_norm=True,
)  # fmt: skip


def write(folder: Path, seed: int = 0) -> None:
    """The model for a seed."""
    tokenizer = Tokenizer(TOKENIZER.backend, TOKENIZER.special, TOKENIZER.eos_ids, TEMPLATE)
    save(folder, init(jax.random.key(seed), CONFIG), CONFIG)
    tokenizer.save(folder)


if __name__ == "__main__":
    write(Path(sys.argv[1]))
