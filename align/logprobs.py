"""Log-probabilities of sampled tokens, by the sampler's words and by the trainer's.

Both go through `log_distribution`: temperature, then top-k, then top-p, renormalised. A trainer
that takes another temperature, or the whole vocabulary where the sampler drew from a part of it,
has ratios that are not 1 on-policy.

Cost: a forward pass, and the head's logits once more in the backward pass. They never exist
together: without top-k and top-p `pallas_kernels.token_logps` takes the head, by blocks or by a
kernel; a cut needs a row's logits whole, and `MOST_LOGITS` of them are alive at a time.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from align.packing import Plan, hidden
from jaxinfra.generate import Sampling
from jaxinfra.model import transformer as model
from jaxinfra.model.config import ModelConfig
from jaxinfra.model.params import Params
from pallas_kernels import token_logps as head_logps

MOST_LOGITS = 2**28  # float32 logits alive at a time: 1 GiB


def log_distribution(logits: Float[Array, "... V"], sampling: Sampling) -> Float[Array, "... V"]:
    """The log-probabilities that tokens are drawn with; -inf for those cut off.

    Temperature 0 is taken for 1: what greedy choice is compared by. Ties with the last token that
    top-k or top-p keeps are kept.
    """
    logits = _warm(logits, sampling)
    return jax.nn.log_softmax(jnp.where(_kept(logits, sampling), logits, -jnp.inf), axis=-1)


def token_logps(
    logits: Float[Array, "B T V"], tokens: Int[Array, "B T"], sampling: Sampling
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """Of each token its log-probability, and the entropy of where it was drawn from, in nats.

    The token itself is never cut off: the sampler has drawn it, so where the two differ by rounding
    about the last token kept, the trainer's word would be -inf.
    """
    logits = _warm(logits, sampling)
    drawn = jnp.arange(logits.shape[-1]) == tokens[..., None]
    kept = _kept(logits, sampling) | drawn
    logps = jax.nn.log_softmax(jnp.where(kept, logits, -jnp.inf), axis=-1)
    entropy = -jnp.sum(jnp.where(kept, jnp.exp(logps) * logps, 0.0), axis=-1)
    return jnp.take_along_axis(logps, tokens[..., None], axis=-1)[..., 0], entropy


def _warm(logits: Float[Array, "... V"], sampling: Sampling) -> Float[Array, "... V"]:
    return logits.astype(jnp.float32) / (sampling.temperature or 1.0)


def _cuts(V: int, sampling: Sampling) -> bool:
    """Whether tokens are drawn from a part of the vocabulary only."""
    return sampling.top_p < 1.0 or (sampling.top_k is not None and sampling.top_k < V)


def _kept(logits: Float[Array, "... V"], sampling: Sampling) -> Bool[Array, "... V"]:
    """Which tokens top-k and top-p leave, of logits divided by the temperature."""
    logits = jax.lax.stop_gradient(logits)
    kept = jnp.ones(logits.shape, bool)
    if sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
        kept = logits >= jax.lax.top_k(logits, sampling.top_k)[0][..., -1:]
    if sampling.top_p < 1.0:
        p = jax.nn.softmax(jnp.where(kept, logits, -jnp.inf), axis=-1)
        falling = -jnp.sort(-p, axis=-1)
        needed = jnp.cumsum(falling, axis=-1) - falling < sampling.top_p
        kept &= p >= jnp.min(jnp.where(needed, falling, jnp.inf), axis=-1, keepdims=True)
    return kept


def answer_states(
    hidden: Float[Array, "B S D"], lengths: Int[Array, " B"], T: int
) -> Float[Array, "B T D"]:
    """The hidden states that foretell T tokens after each row's prompt of `lengths` tokens.

    Where a row ends before, its last state stands for those beyond.
    """
    places = lengths[:, None] - 1 + jnp.arange(T)
    return jnp.take_along_axis(hidden, places[..., None], axis=1, mode="clip")


def answer_logps(
    params: Params,
    config: ModelConfig,
    tokens: Int[Array, "B S"],
    lengths: Int[Array, " B"],
    T: int,
    sampling: Sampling,
    where: Plan | None = None,
    **options,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """Log-probabilities and entropies of the T tokens after each row's prompt.

    Args:
      tokens: prompts and answers without a gap, padded at the right.
      lengths: tokens of each prompt, 1 or more.
      where: of packed rows, of all tokens but each sequence's last.
      options: those of `align.packing.hidden`: remat, unroll, implementation, sure.
    """
    x = hidden(params, config, tokens[:, :-1], where, **options)
    states = answer_states(x, lengths, T)
    return state_logps(params, config, states, answer_tokens(tokens, lengths, T), sampling)


def answer_tokens(
    tokens: Int[Array, "B S"], lengths: Int[Array, " B"], T: int
) -> Int[Array, "B T"]:
    """The T tokens after each row's prompt; beyond the row its last one again."""
    return jnp.take_along_axis(tokens, lengths[:, None] + jnp.arange(T), axis=1, mode="clip")


def state_logps(
    params: Params,
    config: ModelConfig,
    states: Float[Array, "B T D"],
    answers: Int[Array, "B T"],
    sampling: Sampling,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """Log-probabilities of answers, and entropies, from the states that foretell them."""
    if not _cuts(config.vocab_size, sampling):
        tied = params.unembed is None
        logps, entropy = head_logps(
            states.reshape(-1, states.shape[-1]),
            params.embed if tied else model.unembedding(params),
            answers.reshape(-1),
            temperature=sampling.temperature or 1.0,
            soft_cap=config.logit_soft_cap,
            transpose_w=tied,
        )
        return logps.reshape(answers.shape), entropy.reshape(answers.shape)

    def rows(part: tuple[Array, Array]) -> tuple[Array, Array]:
        return token_logps(model.head(params, config, part[0]), part[1], sampling)

    B, T = answers.shape
    block = max(1, MOST_LOGITS // (T * config.vocab_size))
    if block >= B:
        return rows((states, answers))
    one = jax.checkpoint(lambda part: jax.tree.map(lambda a: a[0], rows(_row(part))))
    return jax.lax.map(one, (states, answers), batch_size=block)


def _row(part: tuple[Array, Array]) -> tuple[Array, Array]:
    return part[0][None], part[1][None]
