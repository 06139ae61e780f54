"""The tour's last stage of the ground: a real model, fetched, loaded and asked a question."""

from __future__ import annotations

import time

import jax.numpy as jnp

from jaxinfra.errors import UserError
from jaxinfra.generate import session
from jaxinfra.loading import Model, load
from jaxinfra.model.cache import unstack
from jaxinfra.tour.shell import Tour

QUESTION = "Why is the sky blue? Answer in two sentences."
MODEL = "smollm2-135m"


def stage(tour: Tour) -> None:
    """Asks SmolLM2-135M; where it cannot be fetched, lets the model just trained write on."""
    section = tour.report.section("A model speaks")
    start = time.perf_counter()
    try:
        model, name = load(MODEL, dtype=jnp.float32), MODEL
    except UserError as error:
        tour.console.print(f"[yellow]{MODEL} cannot be had:[/] {error}", highlight=False)
        section.note(f"{MODEL} cannot be had here ({error}).")
        trained = tour.left.get("trained")
        if trained is None:
            return
        model, name = trained, "the model that this tour trained"
    loaded = time.perf_counter() - start
    chat = model.tokenizer.chat_template is not None
    prompt = QUESTION if chat else "def read_file(path"
    tour.console.print(f"[bold]> {prompt}[/bold]", highlight=False)
    answer, line = _ask(tour, model, prompt, chat)
    section.text(f"{name}, float32, greedy; loaded in {loaded:.1f} s.")
    section.verbatim(f"> {prompt}\n\n{answer}")
    section.text(line)


def _ask(tour: Tour, model: Model, prompt: str, chat: bool) -> tuple[str, str]:
    """The answer, streamed to the console, and the line on what it cost."""
    params = unstack(model.params, model.config)
    conversation = session.Conversation(
        params, model.config, model.tokenizer, max_new_tokens=24 if tour.quick else 96
    )
    with tour.console.status("compiling"):
        pieces = conversation.ask(prompt) if chat else conversation.complete(prompt)
    answer = []
    for piece in pieces:
        answer.append(piece)
        tour.console.out(piece, end="", highlight=False)
    assert conversation.stream is not None
    line = session.status(conversation.stream, params, model.config, tour.left.get("bandwidth"))
    tour.console.print(f"\n[dim]{line}[/dim]", highlight=False)
    return "".join(answer), line
