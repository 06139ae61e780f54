"""The loss against plain mathematics: which positions count, and by how much."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfra.model import moe, transformer
from jaxinfra.train.loss import next_token_loss, target_weights
from tests.jaxinfra.train.tiny import (
    BIASED,
    CAPPED,
    DENSE,
    SPARSE,
    differences,
    random_params,
    tokens,
)

SEGMENTS = np.array(
    [[1, 1, 1, 2, 2, 2, 2, 0, 0], [1, 1, 1, 1, 1, 1, 1, 1, 1], [0, 0, 5, 5, 5, 5, 5, 6, 6]],
    np.int32,
)


def plain(params, config, batch, *, shift=1, over_padding=False, z_loss=0.0):
    """The same loss by whole logits; `shift` and `over_padding` make known-wrong ones."""
    rows, segments = jnp.asarray(batch["tokens"]), batch.get("segment_ids")
    inputs = None if segments is None else jnp.asarray(segments[:, :-1])
    logits = transformer.forward(params, config, rows[:, :-1], segment_ids=inputs)
    targets = jnp.roll(rows, -shift, axis=1)[:, :-1]
    weights = np.ones(targets.shape, np.float32)
    if segments is not None:
        for b in range(len(rows)):
            for t in range(targets.shape[1]):
                same = segments[b, t] == segments[b, t + 1] and segments[b, t] != 0
                weights[b, t] = float(same)
    logp = jax.nn.log_softmax(logits)
    lse = jax.nn.logsumexp(logits, axis=-1)
    nll = -jnp.take_along_axis(logp, targets[..., None], axis=-1)[..., 0]
    count = weights.size if over_padding else weights.sum()
    loss = jnp.sum(weights * (nll + z_loss * lse**2)) / count
    if config.experts:
        _, balance = transformer.hidden(params, config, rows[:, :-1], segment_ids=inputs)
        loss = loss + config.experts.balance_coef * moe.balance_loss(balance)
    return loss


@pytest.mark.parametrize(
    "config, packed",
    [(DENSE, False), (BIASED, True), (SPARSE, True), (CAPPED, True)],
    ids=["dense", "packed", "experts", "capped"],
)
def test_loss_and_gradient_are_those_of_the_plain_formula(config, packed):
    params = random_params(config)
    batch = {"tokens": tokens(3, 8)} | ({"segment_ids": SEGMENTS} if packed else {})

    @jax.jit
    def both(params):
        own = jax.value_and_grad(
            lambda p: next_token_loss(p, config, batch, z_loss=0.01, block=5)[0]
        )
        return own(params), jax.value_and_grad(lambda p: plain(p, config, batch, z_loss=0.01))(
            params
        )

    got, want = both(params)
    assert differences(got[0], want[0]) < 1e-6
    assert differences(got[1], want[1]) < 2e-5


def test_wrong_losses_are_told_apart():
    params = random_params(DENSE)
    batch = {"tokens": tokens(3, 8), "segment_ids": SEGMENTS}
    own = next_token_loss(params, DENSE, batch)[0]
    assert differences(own, plain(params, DENSE, batch)) < 1e-6
    for wrong in ({"shift": 2}, {"shift": 0}, {"over_padding": True}, {"z_loss": 0.01}):
        assert differences(own, plain(params, DENSE, batch, **wrong)) > 1e-3, wrong


def test_padding_and_document_ends_have_no_target():
    weights = target_weights({"tokens": tokens(3, 8), "segment_ids": SEGMENTS})
    assert weights[0].tolist() == [1, 1, 0, 1, 1, 1, 0, 0]
    assert weights[1].tolist() == [1] * 8
    assert weights[2].tolist() == [0, 0, 1, 1, 1, 1, 0, 1]


def test_a_document_loses_nothing_by_being_packed():
    """Two documents in one row give the sum of what they give alone."""
    params, alone = random_params(DENSE), tokens(2, 7)
    row = {
        "tokens": alone.reshape(1, -1),
        "segment_ids": np.repeat([[1, 2]], 8, axis=1).astype(np.int32),
    }
    one = jnp.ones(())
    packed = next_token_loss(params, DENSE, row, count=one)[0]
    apart = next_token_loss(params, DENSE, {"tokens": alone}, count=one)[0]
    assert differences(packed, apart) < 1e-6


def test_a_batch_of_padding_alone_gives_zero_and_no_nan():
    params = random_params(DENSE)
    batch = {"tokens": tokens(2, 8), "segment_ids": np.zeros((2, 9), np.int32)}
    loss, grads = jax.value_and_grad(lambda p: next_token_loss(p, DENSE, batch)[0])(params)
    assert float(loss) == 0.0
    assert all(not np.any(np.asarray(leaf)) for leaf in jax.tree.leaves(grads))
