"""One GRPO update with its sequences packed into shared rows, beside the same update padded.

    python -m benchmarks.packed_update OUT              # about two minutes on one H200
    python -m benchmarks.packed_update OUT --shape tiny --answers 8 --rounds 5      # on a CPU

128 answers of SmolLM2-135M's shape to prompts of 64 tokens, log-normal lengths up to 256: loss and
gradient of all parameters in bfloat16, both ways in turns, and how far the losses are apart.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from align.config import RLConfig
from align.experience import Experience
from align.objective import policy_objective
from align.packing import rows_for
from align.rollout import Rollout, joined
from jaxinfra.measure import Entry, compare, environment, write
from jaxinfra.model import params as P
from jaxinfra.model.presets import PRESETS

PROMPT, NEW = 64, 256


def experience(answers: int, vocab_size: int) -> Experience:
    """Answers of random tokens whose lengths are log-normal, a median of a quarter of the most."""
    rng = np.random.default_rng(0)
    drawn = np.clip(NEW / 4 * np.exp(rng.normal(0, 0.75, answers)), 1, NEW).astype(int)
    mask = jnp.asarray(np.arange(NEW) < drawn[:, None], jnp.float32)
    prompts, answer = (
        jnp.asarray(rng.integers(1, vocab_size, (answers, n)), jnp.int32) for n in (PROMPT, NEW)
    )
    lengths = jnp.full((answers,), PROMPT, jnp.int32)
    tokens = joined(prompts, lengths, answer, mask, 0)
    even = -np.log(vocab_size) * mask  # about what random weights say: ratios near 1, few clipped
    r = Rollout(tokens, lengths, answer, mask, even, jnp.ones(answers))
    advantages = jnp.asarray(rng.normal(size=(answers, 1)), jnp.float32) * mask
    return Experience(r, r.stopped, mask, advantages)


def main(argv: Sequence[str]) -> None:
    """Measures both ways in turns; prints a line and writes an entry."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.packed_update")
    parser.add_argument("out", type=Path, help="folder of the entry")
    parser.add_argument("--shape", default="smollm2-135m", choices=list(PRESETS))
    parser.add_argument("--answers", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args(argv)
    model, B, S = PRESETS[args.shape], args.answers, PROMPT + NEW - 1
    e = experience(B, model.vocab_size)
    sizes = np.asarray(e.rollout.lengths + jnp.sum(e.mask, axis=1).astype(jnp.int32)) - 1
    rows = rows_for(sizes, S)
    padded = RLConfig(prompts=B // 4, group_size=4, max_new_tokens=NEW, remat="matmuls")
    packed = dataclasses.replace(padded, pack=rows / B)
    params = jax.jit(P.init, static_argnums=(1, 2))(jax.random.key(0), model, jnp.bfloat16)

    def update(config: RLConfig) -> Any:
        def loss(params: Any, e: Experience) -> tuple[jax.Array, Any]:
            return policy_objective(config, model, params, e, jnp.bfloat16)

        valued = jax.jit(jax.value_and_grad(loss, has_aux=True))
        return lambda: valued(params, e)

    ways = {"packed": update(packed), "padded": update(padded)}
    (one, told), _ = ways["packed"]()
    (two, _), _ = ways["padded"]()
    assert float(told["packing/fits"]) == 1.0
    found = compare(ways, rounds=args.rounds)
    apart = abs(float(one) - float(two))
    real = float(sizes.sum())
    print(
        f"{B} rows of {S} tokens, {real / (B * S):.0%} filled; packed {rows} rows, "
        f"{real / (rows * S):.0%} filled; losses {apart:.1e} apart; {found.verdict()}"
    )
    samples = {n: list(s.wall) for n, s in zip(found.names, found.samples, strict=True)}
    entry = Entry(
        name=f"packed-update-{args.shape.replace('.', '-')}",
        claim=f"Loss and gradient of a GRPO update, {B} answers of {args.shape}'s shape in {rows} "
              f"shared rows, beside {B} padded ones",
        command="python -m benchmarks.packed_update OUT",
        unit="s", samples=samples, ratio=found.ratio, interval=found.interval, roofline=None,
        roof=f"no roof; {1 - rows / B:.0%} of the trunk's tokens are saved, of the head's none",
        inputs=f"prompts of {PROMPT} tokens, answers log-normal (median {NEW // 4}, sigma 0.75, at "
               f"most {NEW}); bfloat16, remat matmuls; random weights and tokens",
        mislead="the gain is that of this distribution: with answers of one length there is none, "
                "and sorting by length would save much of it too; optimiser and rollout are not in",
        environment=environment(),
        extra={"filled_padded": real / (B * S), "filled_packed": real / (rows * S),
               "losses_apart": apart},
    )  # fmt: skip
    write(entry, args.out)


if __name__ == "__main__":
    main(sys.argv[1:])
