"""Preferences whose best policy is known: what the DPO family finds, and a mixture that GDPO keeps.

    python -m benchmarks.preference_learning OUT                # two minutes on two free cores
    python -m benchmarks.preference_learning OUT sigmoid gdpo   # a part of it

A byte model of one layer (6,000 parameters) is trained by the trainers' own step on four pairs of
two answers, of which one is preferred in three. By each loss the difference that training makes to
the answers' log-ratio has a value at the minimum that a line of calculus gives: no peer is needed
to say whether it is right. GDPO sees two groups of people, seven and three in ten, that prefer
opposite answers; DPO sees the same pairs without their groups. Three seeds are three models.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from align import synthetic
from align.losses import PreferenceLoss, mixture_distance
from align.preferences import rows
from align.trainer_config import DPO, GDPO, TrainerConfig
from align.trainer_losses import make_objective
from align.trainer_step import begin, make_step
from jaxinfra.measure import Entry, environment, write
from jaxinfra.model import params as P
from jaxinfra.model import transformer
from jaxinfra.model.config import ModelConfig
from jaxinfra.model.params import Params
from jaxinfra.text.tokenizer import Tokenizer
from jaxinfra.train.config import OptimizerConfig
from jaxinfra.train.optimizer import make_optimizer, schedule
from jaxinfra.train.step import TrainState

SEEDS, STEPS = 3, 150
MODEL = ModelConfig(
    family="qwen3", vocab_size=320, num_layers=1, d_model=16, num_heads=2, num_kv_heads=1,
    head_dim=8, d_ff=24, qk_norm=True, tie_embeddings=True, max_seq_len=32,
)  # fmt: skip
WORDS = Tokenizer.byte_level()
RATE = OptimizerConfig(
    learning_rate=2e-2, warmup_steps=2, weight_decay=0.0, final_fraction=0.0, clip_norm=10.0
)
P_A, E = 0.75, 0.1  # how often a is preferred to b; label smoothing
LOGIT = math.log(P_A / (1 - P_A))
FAMILY: dict[str, tuple[dict[str, Any], float]] = {
    # by loss (beta 1): its options, and the log-ratio of a over b at the minimum; answers have two
    # tokens
    "sigmoid": ({}, LOGIT),
    "ipo": ({}, 2 * (2 * P_A - 1) / 2),
    "hinge": ({}, 1.0),
    "robust": ({"label_smoothing": E}, math.log((P_A - E) / (1 - P_A - E))),
    "exo_pair": ({"label_smoothing": E}, (2 * P_A - 1) * math.log((1 - E) / E)),
    "nca_pair": ({}, math.log(2 * P_A) - math.log(2 * (1 - P_A))),
    "bco_pair": ({}, 2 * LOGIT),
    "sppo_hard": ({}, 2 * P_A - 1),
    "sigmoid_norm": ({}, 2 * LOGIT),
}
MIXTURE = "gdpo"


def start(seed: int) -> Params:
    """A model whose answers are far from equally likely."""
    drawn = P.init(jax.random.key(seed), MODEL)
    return jax.tree.map(lambda leaf: leaf * (10.0 if leaf.ndim > 1 else 1.0), drawn)


def fit(config: TrainerConfig) -> list[tuple[Params, Params]]:
    """Of each seed, the model before and after all steps on the whole data."""
    found = rows.build(config, WORDS)
    objective = make_objective(config, MODEL, found.beliefs)
    assert objective.reference is not None
    reference = jax.jit(objective.reference)
    optimizer, rate = make_optimizer(RATE, STEPS), schedule(RATE, STEPS)
    step = make_step(config, objective, optimizer, rate, jnp.float32)
    models = []
    for seed in range(SEEDS):
        before = start(seed)
        batch = dict(found.arrays) | {"reference": reference(before, found.arrays)}
        trained, frozen = begin(config, MODEL, jax.tree.map(jnp.array, before))
        params: Any = trained
        state = TrainState.create(params, optimizer)
        for _ in range(STEPS):
            state, _ = step(state, batch, frozen)
        assert state.params.params is not None
        models.append((before, state.params.params))
    return models


@functools.partial(jax.jit, static_argnums=(1, 2))
def logps(params: Params, answers: str, belief: str = "") -> jax.Array:
    """Of each one-letter answer with its end, after the prompt and a belief."""
    before = WORDS.encode(synthetic.PROMPT) + list(belief.encode())
    ids = jnp.asarray([[*before, ord(answer), *WORDS.eos_ids] for answer in answers])
    each = jax.nn.log_softmax(transformer.forward(params, MODEL, ids), axis=-1)[:, :-1]
    said = jnp.take_along_axis(each, ids[:, 1:, None], axis=-1)[..., 0]
    return jnp.sum(said[:, len(before) - 1 :], axis=1)


def shares(params: Params, belief: str = "") -> np.ndarray:
    """Of the answers a and b."""
    return np.asarray(jax.nn.softmax(logps(params, "ab", belief)))


def _data(folder: str, records: Sequence[dict]) -> str:
    file = Path(folder) / "data.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(file)


_RUN: dict[str, Any] = {"optimizer": RATE, "steps": STEPS, "max_length": 32, "dtype": "float32"}


def optimum(kind: str) -> tuple[list[float], list[float], float]:
    """(log-ratios moved by training, the same as shares of the optimum, the optimum)."""
    options, wanted = FAMILY[kind]
    pairs = [("a", "b")] * 3 + [("b", "a")]
    records = [{"prompt": synthetic.PROMPT, "chosen": c, "rejected": r} for c, r in pairs]
    with tempfile.TemporaryDirectory() as folder:
        loss: Any = PreferenceLoss(kind=kind, beta=1.0, **options)  # pyright: ignore
        models = fit(DPO(data=_data(folder, records), loss=loss, **_RUN))
    moved = [np.asarray(logps(after, "ab") - logps(before, "ab")) for before, after in models]
    found = [float(m[0] - m[1]) for m in moved]
    return found, [x / wanted for x in found], wanted


def family(kinds: Sequence[str]) -> Entry:
    """The entry of the DPO family: how much of each loss's known optimum is reached."""
    samples, extra = {}, {}
    for kind in kinds:
        found, ratios, wanted = optimum(kind)
        samples[kind] = ratios
        extra[kind] = {"optimum": round(wanted, 4), "found": [round(x, 4) for x in found]}
        shown = " ".join(f"{x:.4f}" for x in found)
        worst = max(abs(1 - x) for x in ratios)
        print(f"{kind:13s} optimum {wanted:.4f}  found {shown}  off by {worst:.2%} at most",
              flush=True)  # fmt: skip
    worst = max(abs(1 - x) for values in samples.values() for x in values)
    return Entry(
        name="preference-learning",
        claim=f"{len(samples)} losses of the DPO family, by the share of their known optimum that "
              f"training finds (1 is exact; the worst of {SEEDS} seeds is off by {worst:.2%})",
        command="python -m benchmarks.preference_learning OUT",
        unit="of the optimum",
        samples=samples, ratio=None, interval=None, roofline=None,
        roof="1 is the optimum, from below or above",
        inputs=f"four pairs of two answers, one preferred in three of them; {STEPS} steps of all "
               f"pairs, beta 1, a byte model of one layer, {SEEDS} first models; float32",
        mislead="two answers and one prompt: it shows that loss and gradient have their minimum in "
                "the right place, and says nothing about generalisation or about real preferences",
        environment=environment(),
        extra=extra,
    )  # fmt: skip


def mixture() -> Entry:
    """The entry of GDPO: how far two groups' mixture is, beside DPO on the same pairs."""
    loss = PreferenceLoss(beta=0.1)
    groups, sizes = list(synthetic.GROUPS), [n for *_, n in synthetic.GROUPS.values()]
    target = np.asarray(sizes) / sum(sizes)
    apart: dict[str, list[float]] = {"GDPO": [], "DPO, groups pooled": [], "before": []}
    said: list[list[float]] = []
    distance = lambda m: max(0.0, float(mixture_distance(jnp.asarray(target), jnp.asarray(m))))  # noqa: E731
    for before, after in fit(GDPO(loss=loss, **_RUN)):
        ids = jnp.asarray([WORDS.encode(synthetic.PROMPT)])
        first = jax.nn.softmax(transformer.forward(after, MODEL, ids)[0, -1])
        beliefs = np.asarray(first)[[ord(g) for g in groups]]
        mix: Any = sum(b * shares(after, g) for b, g in zip(beliefs, groups, strict=True))
        apart["GDPO"].append(distance(mix))
        apart["before"].append(distance(shares(before)))
        said.append([round(float(b), 4) for b in beliefs])
    pooled = [{k: r[k] for k in ("prompt", "chosen", "rejected")}
              for r in synthetic.records("gdpo")]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        for _, after in fit(DPO(data=_data(folder, pooled), loss=loss, **_RUN)):
            apart["DPO, groups pooled"].append(distance(shares(after)))
    for name, values in apart.items():
        print(
            f"{name:19s} {' '.join(f'{x:.5f}' for x in values)} nats from the mixture", flush=True
        )
    return Entry(
        name="preference-learning-mixture",
        claim="A mixture of two groups that prefer opposites: Jensen-Shannon divergence of what "
              "GDPO (arXiv 2412.20299) answers from it; 0 is exact",
        command="python -m benchmarks.preference_learning OUT gdpo",
        unit="nats", samples=apart, ratio=None, interval=None, roofline=None,
        roof="0 is exact, log 2 the most",
        inputs=f"groups of {sizes} people, {STEPS} steps of all pairs, beta 0.1, a byte model of "
               f"one layer, {SEEDS} first models; float32",
        mislead="two answers and two beliefs of one token each; DPO is not told the groups, which "
                "is the point and not a fair race",
        environment=environment(),
        extra={"target": target.tolist(), "beliefs": said},
    )  # fmt: skip


def main(argv: Sequence[str]) -> None:
    """All losses, or those named; a table and an entry of each kind."""
    every = [*FAMILY, MIXTURE]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.preference_learning")
    parser.add_argument("out", type=Path, help="folder of the entries")
    parser.add_argument("kinds", nargs="*", metavar="LOSS", help=", ".join(every))
    args = parser.parse_args(argv)
    if unknown := set(args.kinds) - set(every):
        parser.error(f"{', '.join(sorted(unknown))}: choose of {', '.join(every)}")
    begun, asked = time.perf_counter(), args.kinds or every
    if losses := [kind for kind in asked if kind != MIXTURE]:
        write(family(losses), args.out)
    if MIXTURE in asked:
        write(mixture(), args.out)
    print(f"{time.perf_counter() - begun:.0f} s in all")


if __name__ == "__main__":
    main(sys.argv[1:])
