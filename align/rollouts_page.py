"""A run by reward as one page of HTML that needs nothing else: curves, and answers by the token.

    jaxinfra rollouts RUN

Tokens are coloured by what is chosen above them; all numbers of one stand in its tooltip. Whatever
a model wrote is shown as text, and the page runs no script.
"""

from __future__ import annotations

import html
import io
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from align import records
from jaxinfra.errors import UserError
from jaxinfra.files import write_file
from jaxinfra.train.metrics import read_metrics

CURVES = (
    ("reward", "mean reward"),
    ("kl", "divergence from the reference, nats a token"),
    ("mismatch_kl", "sampler against trainer, nats a token"),
    ("entropy", "entropy, nats a token"),
    ("completions/mean_length", "tokens an answer"),
    ("clip_ratio/region_mean", "share of ratios that are clipped"),
)
# What colours a token: the number's name, how far from `middle` is full colour.
_COLOURS = {"advantage": (0.0, 2.0), "ratio": (1.0, 0.2), "entropy": (0.0, 2.0), "new": (0.0, 3.0)}
_CSS = """
body{font:15px/1.5 system-ui,sans-serif;max-width:1000px;margin:2em auto;padding:0 1em}
svg{width:100%;height:auto}.answer{margin:.2em 0;overflow-wrap:anywhere}
.t{font:14px ui-monospace,monospace;white-space:pre-wrap;padding:1px 0;border-right:1px solid #fff}
.off{opacity:.35}.r{display:inline-block;min-width:6em;color:#57606a}
pre{white-space:pre-wrap;background:#f6f8fa;padding:.5em;margin:.4em 0}summary{cursor:pointer}
""" + "".join(f"#c-{name}:checked~main .t{{background:var(--{name})}}" for name in _COLOURS)


def write(run: str | Path, out: str | Path | None = None, *, steps: int = 20) -> Path:
    """Renders RUN/rollouts.jsonl and RUN/metrics.jsonl; gives the file, RUN/rollouts.html.

    Args:
      steps: to show answers of, the last ones.
    """
    folder = Path(run)
    if not folder.is_dir():
        raise UserError(f"{folder}: no folder of a run")
    metrics = read_metrics(folder / "metrics.jsonl")
    path = Path(out) if out is not None else folder / "rollouts.html"
    answers = records.read(folder / records.FILE)
    write_file(path, page(folder.name, answers, metrics, steps=steps).encode())
    return path


def page(
    title: str, answers: Sequence[Mapping[str, Any]], metrics: Sequence[Mapping[str, Any]], *,
    steps: int = 20,
) -> str:  # fmt: skip
    """The HTML of records (`align.records`) and rows of metrics."""
    shown = sorted({answer["step"] for answer in answers})[-steps:]
    choices = "".join(
        f"<input type=radio name=c id=c-{name}{' checked' * (name == 'advantage')}>"
        f"<label for=c-{name}>{name}</label> "
        for name in _COLOURS
    )
    body = "".join(
        _step(number, [a for a in answers if a["step"] == number], number == shown[-1])
        for number in shown
    )
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{_e(title)}</title>"
        f"<meta http-equiv=Content-Security-Policy content=\"default-src 'none'; "
        f"style-src 'unsafe-inline'\"><style>{_CSS}</style><body><h1>{_e(title)}</h1>"
        f"{curves(metrics)}<h2>Answers</h2>colour: {choices}<main>{body}</main></body></html>"
    )


def curves(metrics: Sequence[Mapping[str, Any]]) -> str:
    """An SVG with a plot of each of CURVES that the run has."""
    from matplotlib.figure import Figure

    drawn = []
    for name, label in CURVES:
        points = [(row["step"], row[name]) for row in metrics if row.get(name) is not None]
        if points:
            drawn.append((name, label, points))
    if not drawn:
        return "<p>No metrics yet.</p>"
    lines = -(-len(drawn) // 2)
    fig = Figure(figsize=(10, 2.4 * lines), layout="constrained")
    axes = fig.subplots(lines, 2, squeeze=False).ravel()
    for ax, (name, label, points) in zip(axes, drawn, strict=False):
        ax.plot(*zip(*points, strict=True), color="#4c78a8", linewidth=1.2)
        ax.set_title(f"{name}: {label}", fontsize=9)
        ax.grid(alpha=0.3)
    for ax in axes[len(drawn) :]:
        ax.set_axis_off()
    file = io.StringIO()
    fig.savefig(file, format="svg", metadata={"Date": None})
    text = file.getvalue()
    return text[text.index("<svg") :]


def _step(number: int, answers: Sequence[Mapping[str, Any]], is_open: bool) -> str:
    groups = []
    for _, found in itertools.groupby(answers, key=lambda a: a["group"]):
        group = list(found)
        rows = "".join(_answer(answer) for answer in group)
        groups.append(f"<pre>{_e(group[0]['prompt'])}</pre>{rows}")
    rewards = [a["reward"] for a in answers if a["reward"] is not None]
    mean = f", mean reward {sum(rewards) / len(rewards):.3f}" if rewards else ""
    return (
        f"<details{' open' * is_open}><summary>step {number}: {len(answers)} answers{mean}"
        f"</summary>{''.join(groups)}</details>"
    )


def _answer(answer: Mapping[str, Any]) -> str:
    tokens = "".join(_token(answer, i) for i in range(len(answer["tokens"])))
    reward = "no reward" if answer["reward"] is None else f"{answer['reward']:.3f}"
    end = "" if answer["stopped"] else " <i>cut off</i>"
    return f"<div class=answer><span class=r>{reward}</span>{tokens}{end}</div>"


def _token(answer: Mapping[str, Any], i: int) -> str:
    numbers = {
        name: values[i]
        for name, values in answer.items()
        if isinstance(values, list) and name not in ("tokens", "texts")
    }
    told = ", ".join(f"{k} {'none' if v is None else f'{v:.4g}'}" for k, v in numbers.items())
    style = ";".join(
        f"--{name}:{_colour(numbers.get(name), *scale)}" for name, scale in _COLOURS.items()
    )
    off = "" if numbers["mask"] else " off"
    text = answer["texts"][i].replace("\n", "⏎\n") or "∅"
    title = _e(f"token {answer['tokens'][i]}: {told}")
    return f'<span class="t{off}" style="{style}" title="{title}">{_e(text)}</span>'


def _colour(value: float | None, middle: float, reach: float) -> str:
    """Green above, red below, the stronger the further."""
    if value is None:
        return "#d0d7de"
    strength = min(abs(value - middle) / reach, 1.0)
    return f"rgba({'26,127,55' if value >= middle else '207,34,46'},{0.6 * strength:.2f})"


def _e(text: object) -> str:
    return html.escape(str(text))
