"""`jaxinfra quantize`: load, quantise, compare with what it was, save; and a table of what it cost.

The folder appears whole or not at all, after the comparison, so a run that is broken off leaves
nothing. Time on two CPU cores is in the table's caption; most of it is the text's way through the
layers.
"""

from __future__ import annotations

import time
from pathlib import Path

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from decode.quantize.calibrate import windows
from decode.quantize.model import check, quantize
from decode.quantize.quality import Quality, compare
from decode.quantize.weights import Scheme, default_group
from jaxinfra.errors import UserError
from jaxinfra.generate import generate
from jaxinfra.loading import Model, load
from jaxinfra.model.cache import unstack
from jaxinfra.model.config import ModelConfig
from jaxinfra.model.params import Params
from jaxinfra.model.quantized import is_quantized
from jaxinfra.weights import compressed

NEW_TOKENS = 33  # of a timed answer
ROUNDS = 3


def run(
    name: str,
    out: str | Path,
    *,
    method: str = "rtn",
    bits: int = 8,
    group: int | None = None,
    float8: bool = False,
    head: bool = False,
    data: str = "stdlib",
    count: int = 32,
    length: int = 512,
    held_out: int = 8,
    offline: bool = False,
    console: Console | None = None,
) -> Quality:
    """Quantises the model `name` into the folder `out` and prints the table.

    Args:
      method, bits, group, float8, head: as `Scheme` and `quantize` take them; 4 bits without a
        group get 128 inputs a scale, or the most below that divides.
      data, count, length: text to calibrate on, `count` windows of `length` tokens.
      held_out: windows of other text that both models are compared on.

    Raises UserError, before anything is computed, for what cannot be done.
    """
    console = console or Console()
    Scheme(bits, group, float8)
    if min(count, held_out) < 1 or length < 2:
        raise UserError("quantize: windows and held-out: 1 or more; length: 2 or more")
    if (out := Path(out)).exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: exists already; remove it or choose another name")
    model = load(name, dtype=jnp.float32, offline=offline)
    config = model.config
    if bits == 4 and group is None:
        group = default_group(config.d_model, config.num_heads * config.head_dim, config.d_ff)
    scheme = Scheme(bits, group, float8)
    check(model.params, config, scheme, method)
    length = min(length, config.max_seq_len)
    texts = windows(data, model.tokenizer, count=count, length=length, held_out=held_out)
    began = time.perf_counter()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
               TextColumn("layers"), TimeRemainingColumn())  # fmt: skip
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(method, total=config.num_layers)
        params = quantize(
            model.params, config, scheme, method, texts[0],
            head=head, done=lambda layers: bar.update(task, completed=layers),
        )  # fmt: skip
    took = time.perf_counter() - began
    with console.status("comparing on held-out text"):
        quality = compare(model.params, params, config, texts[1])
    new = Model(config.replace(tie_embeddings=params.unembed is None), params, model.tokenizer)
    _save(out, new)
    with console.status("timing"):
        speeds = _speeds([model, new], texts[1][0, : min(64, length // 2)].tolist())
    console.print(_table(model, new, out, scheme, method, quality, speeds, took, texts))
    return quality


def _save(out: Path, model: Model) -> None:
    def stored(leaf):
        return leaf if is_quantized(leaf) else leaf.astype(jnp.bfloat16)

    params = jax.tree.map(stored, model.params, is_leaf=is_quantized)
    compressed.save(out, params, model.config, model.tokenizer)


def _speeds(models: list[Model], prompt: list[int]) -> list[float]:
    """Decoded tokens a second of each at batch 1, the best of ROUNDS that take turns."""
    best = [0.0] * len(models)
    ready = [(_working(model.params, model.config), model.config) for model in models]
    for _ in range(ROUNDS):
        for i, (params, config) in enumerate(ready):
            room = min(NEW_TOKENS, config.max_seq_len - len(prompt))
            timings = generate(params, config, [prompt], max_new_tokens=room).timings
            best[i] = max(best[i], timings.decode_tokens_per_second)
    return best


def _working(params: Params, config: ModelConfig):
    """As `jaxinfra generate` has them: float32 on a CPU, bfloat16 elsewhere."""
    dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16

    def cast(leaf):
        return leaf if is_quantized(leaf) else leaf.astype(dtype)

    return unstack(jax.tree.map(cast, params, is_leaf=is_quantized), config)


def _table(model, new, out, scheme, method, quality, speeds, took, texts) -> Table:
    kind = "float8" if scheme.float8 else f"int{scheme.bits}"
    per = f"groups of {scheme.group}" if scheme.group else "a scale an output"
    dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    table = Table(
        title=f"{out}: {kind}, {per}, {method}",
        caption=f"quantised in {took:.0f} s on {texts[0].size if method != 'rtn' else 0:,} tokens, "
        f"compared on {texts[1].size:,} others; tokens/s at batch 1, the rest of the model in "
        f"{dtype}",
    )
    for column in ("", "MB", "perplexity", "KL, nats", "same top token", "tokens/s"):
        table.add_column(column, justify="right" if column else "left")
    before = 2 * sum(leaf.size for leaf in jax.tree.leaves(model.params))
    after = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    table.add_row(
        "bfloat16", f"{before / 1e6:.1f}", f"{quality.before:.3f}", "", "", f"{speeds[0]:.1f}"
    )
    table.add_row(
        kind, f"{after / 1e6:.1f}", f"{quality.after:.3f}", f"{quality.kl:.5f}",
        f"{quality.same_top:.1%}", f"{speeds[1]:.1f}",
    )  # fmt: skip
    return table
