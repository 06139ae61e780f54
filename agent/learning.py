"""Trajectories of agents as the rollouts that `align` learns from.

    r = pack(samples)                       # then align.experience.judge, align.objective, ...

Tools' words stand inside the answer with mask 0, so no loss and no divergence counts them; the
advantage is the whole run's. Rows of a group, the tries of one task, stand together, as in
`align.rollout`.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from agent.trajectories import Trajectory
from align.rollout import Rollout
from jaxinfra.errors import UserError


def pack(samples: Sequence[Trajectory], *, pad_id: int = 0) -> Rollout:
    """B samples as a Rollout: the prompt is what precedes the first drawn token, S = P + T by the
    longest of each. `logps` are NaN, which `align` reads as unknown: the trainer's own count.
    Raises UserError for a sample in which nothing was drawn.
    """
    if not samples or any(1 not in sample.mask for sample in samples):
        raise UserError("pack: give samples with at least one token that the model drew")
    lengths = np.array([sample.mask.index(1) for sample in samples], np.int32)
    rests = [len(sample.tokens) - n for sample, n in zip(samples, lengths, strict=True)]
    B, P, T = len(samples), int(lengths.max()), max(rests)
    tokens = np.full((B, P + T), pad_id, np.int32)
    answer = np.full((B, T), pad_id, np.int32)
    mask = np.zeros((B, T), np.float32)
    for row, (sample, n, m) in enumerate(zip(samples, lengths, rests, strict=True)):
        tokens[row, : n + m] = sample.tokens
        answer[row, :m], mask[row, :m] = sample.tokens[n:], sample.mask[n:]
    logps = np.where(mask > 0, np.nan, 0.0).astype(np.float32)
    arrays = tokens, lengths, answer, mask, logps, np.ones(B, np.float32)
    return Rollout(*map(jnp.asarray, arrays))
