"""The commands of the ground. Importing this imports no jax: each command does when it runs."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from jaxinfra.errors import UserError


def doctor() -> None:
    """Says what this machine can run, and which implementation each operation takes and why."""
    from rich.console import Console

    from jaxinfra.hardware.doctor import examine, render

    Console().print(render(examine()))


def roofline(
    model: Positional[str],
    /,
    *,
    chip: str = "here",
    phases: tuple[Literal["prefill", "decode", "train"], ...] = ("prefill", "decode", "train"),
    batch: int = 1,
    seq_len: int = 2048,
    dtype: str | None = None,
    plot: Path | None = None,
) -> None:
    """Shows where each operation of a model stands under a chip's roof.

    Args:
      model: a preset (qwen3-0.6b), a config.json, a model folder or a .gguf file.
      chip: a chip's name (H200, v5e), or "here" for this machine, measured.
      phases: what the model does.
      batch: sequences.
      seq_len: tokens of each.
      dtype: of weights, activations and cache; by default what one computes in on the chip.
      plot: also draw it, into this .svg or .png.
    """
    from rich.console import Console

    from jaxinfra.hardware import roofline_view
    from jaxinfra.hardware.roofline import for_model

    if batch < 1 or seq_len < 1:
        raise UserError(f"roofline: batch={batch}, seq_len={seq_len}: give 1 or more")
    if not phases:
        raise UserError("roofline: no phases; give one or more of prefill, decode, train")
    report = for_model(model, chip, phases=phases, batch=batch, seq_len=seq_len, dtype=dtype)
    Console().print(roofline_view.render_table(report))
    if plot is not None:
        roofline_view.plot(report, plot)
        print(plot)


def pull(name: Positional[str], /, *, offline: bool = False) -> None:
    """Fetches a model and prints where it lies.

    Args:
      name: a short name (smollm2-135m), a Hugging Face id (Qwen/Qwen3-0.6B) or a local path.
      offline: use only what is on this machine, and say what is missing.
    """
    from jaxinfra.weights.pull import pull as fetch

    print(fetch(name, offline=offline))


def generate(
    model: Positional[str],
    prompt: Positional[str | None] = None,
    /,
    *,
    complete: bool = False,
    system: str | None = None,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    seed: int = 0,
    dtype: Literal["auto", "bfloat16", "float32"] = "auto",
    offline: bool = False,
) -> None:
    """Completes a prompt or chats in the terminal, streamed, with tokens/s and their bound.

    Args:
      model: a short name (smollm2-135m), a Hugging Face id, a model folder or a .gguf file.
      prompt: answered once; without it, and on a terminal, a conversation begins.
      complete: go on with the text also where the model has a chat template.
      system: the system's message.
      max_new_tokens: of each answer.
      temperature: 0 takes the most likely token.
      top_k: draw from the k most likely only.
      top_p: draw from the smallest set with this much probability.
      seed: of the draws.
      dtype: of weights and cache; auto: float32 on a CPU, bfloat16 elsewhere.
      offline: use only what is on this machine.
    """
    import jax

    from jaxinfra.generate import Sampling, session
    from jaxinfra.hardware.detect import detect
    from jaxinfra.loading import load

    if prompt is None and not sys.stdin.isatty():
        prompt = sys.stdin.read().strip()
        if not prompt:
            raise UserError("generate: no prompt; give one, or pipe one in")
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    if dtype == "auto":
        dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    session.run(
        load(model, dtype=dtype, offline=offline), prompt, chat=False if complete else None,
        system=system, max_new_tokens=max_new_tokens, sampling=sampling,
        bandwidth=detect().bandwidth,
    )  # fmt: skip


def tour(
    *, out: Path = Path("tour-report.html"), quick: bool = False, only: tuple[str, ...] = ()
) -> None:
    """Goes through the stack, bottom to top, on this machine; ends in an HTML report.

    Args:
      out: the report.
      quick: less of everything.
      only: the stages whose names contain one of these words.
    """
    from jaxinfra.tour import run

    sys.exit(run(out, quick=quick, only=only))


def kernels(
    action: Positional[Literal["bench", "tune", "explain"]],
    kernel: Positional[str] = "matmul",
    /,
    *,
    shapes: tuple[tuple[int, int, int], ...] = (),
    out: Path | None = None,
) -> None:
    """Measures the kernels beside XLA, tunes their schedules, or explains one.

    Args:
      action: bench and tune need a Hopper GPU; explain needs none.
      kernel: matmul, attention, paged-attention, losses, grouped, quantised, decode-layer, norm or
        rope; for explain also a step of a ladder (matmul.ping_pong). tune: matmul alone.
      shapes: M N K of what to tune; by default those that bench measures.
      out: bench: a folder for the ledger's entries; tune: the file of schedules, by default the
        installed one, which `matmul` reads.
    """
    from jaxinfra.kernels import BENCHES, explain, matmul_tune
    from pallas_kernels.matmul.configs import TUNED

    if action == "explain":
        explain.explain(kernel)
    elif kernel not in BENCHES:
        raise UserError(f"kernels {action}: no kernel {kernel!r}; there are {', '.join(BENCHES)}")
    elif action == "bench":
        importlib.import_module(f"jaxinfra.kernels.{BENCHES[kernel]}").bench(out)
    elif kernel != "matmul":
        raise UserError(f"kernels tune: the schedules of {kernel} are fixed; tune matmul")
    else:
        matmul_tune.tune(shapes, out or TUNED)
