"""Preferences whose optimum is known: C answers, a reward for each, and every pair with its odds.

Of two answers i and j, i is preferred with probability sig(r_i - r_j) (Bradley and Terry). DPO's
best policy on such pairs is pi_i in proportion to ref_i e^(r_i / beta) (arXiv 2305.18290, equation
4): where a policy is a table of C logits, nothing else explains a distance from it.
"""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from align.losses import PreferenceLoss, preference_loss


def optimum(
    rewards: Float[Array, " C"], reference: Float[Array, " C"], beta: float
) -> Float[Array, " C"]:
    """Probabilities of the best policy; `reference` are log-probabilities."""
    return jax.nn.softmax(reference + rewards / beta)


def train_table(
    rewards: Float[Array, " C"],
    reference: Float[Array, " C"],
    config: PreferenceLoss,
    *,
    steps: int,
) -> tuple[Float[Array, " C"], Float[Array, " steps"]]:
    """A table of logits trained from the reference on all pairs: its probabilities, the losses.

    Every ordered pair counts with the probability that it is drawn so.
    """
    i, j = jnp.meshgrid(jnp.arange(len(rewards)), jnp.arange(len(rewards)), indexing="ij")
    i, j = i[i != j], j[i != j]
    odds = jax.nn.sigmoid(rewards[i] - rewards[j])

    def of_pair(c: Array, j: Array, ref_c: Array, ref_j: Array) -> Array:
        return preference_loss(c[None], j[None], ref_c[None], ref_j[None], config)[0]

    def loss(logits: Array) -> Array:
        logps = jax.nn.log_softmax(logits)
        each = jax.vmap(of_pair)(logps[i], logps[j], reference[i], reference[j])
        return jnp.sum(odds * each) / jnp.sum(odds)

    tx = optax.sgd(1 / config.beta**2, momentum=0.9)  # the loss is as flat as beta is small

    def step(carry: tuple, _: None) -> tuple[tuple, Array]:
        logits, state = carry
        value, gradient = jax.value_and_grad(loss)(logits)
        updates, state = tx.update(gradient, state)
        return (optax.apply_updates(logits, updates), state), value

    (logits, _), losses = jax.lax.scan(step, (reference, tx.init(reference)), length=steps)
    return jax.nn.softmax(logits), losses


WEIGHTS = {"a": 3, "b": 1, "c": 1}  # e^reward of each answer
GROUPS = {"X": ("a", "b", 7), "Y": ("b", "a", 3)}  # what each prefers to what, and its size
PROMPT = "?"


def records(method: str) -> list[dict[str, Any]]:
    """Records for a trainer of `align.preferences`, whose optimum is known.

    Of two answers each is chosen as often as Bradley and Terry say, w_i / (w_i + w_j), in whole
    numbers: 4 records a pair. sft has each answer as often as its weight, kto each answer once for
    each time it was chosen (good) or not. gdpo has two groups of people that prefer opposites.
    """
    if method == "sft":
        return [{"prompt": PROMPT, "completion": a} for a, w in WEIGHTS.items() for _ in range(w)]
    if method == "gdpo":
        return [
            {"prompt": PROMPT, "belief": belief, "chosen": chosen, "rejected": rejected}
            for belief, (chosen, rejected, size) in GROUPS.items() for _ in range(size)
        ]  # fmt: skip
    pairs = []
    for (a, w), (b, v) in itertools.combinations(WEIGHTS.items(), 2):
        won = 4 * w // (w + v)
        pairs += [(a, b)] * won + [(b, a)] * (4 - won)
    if method == "kto":
        return [
            {"prompt": PROMPT, "completion": answer, "label": good}
            for pair in pairs for answer, good in zip(pair, (True, False), strict=True)
        ]  # fmt: skip
    return [{"prompt": PROMPT, "chosen": a, "rejected": b} for a, b in pairs]
