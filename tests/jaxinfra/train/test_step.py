"""The training step: accumulation, the guard, donation, dtypes, what it holds in memory."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfra.model import params as P
from jaxinfra.model import transformer
from jaxinfra.train.config import OptimizerConfig
from jaxinfra.train.loss import next_token_loss
from jaxinfra.train.optimizer import make_optimizer, schedule
from jaxinfra.train.step import TrainState, make_evaluation, make_step
from tests.jaxinfra.train.tiny import DENSE, differences, equal_bits, random_params, start, tokens


def packed(B: int, T: int):
    """Rows with very different numbers of targets."""
    segments = np.ones((B, T + 1), np.int32)
    for row in range(B // 2):
        segments[row, 3:] = 0
    return {"tokens": tokens(B, T), "segment_ids": segments}


def test_accumulation_gives_what_the_big_batch_gives():
    batch, results = packed(8, 10), {}
    for parts in (1, 4):
        state, step = start(DENSE, dtype=jnp.float32, accumulate=parts)
        for _ in range(2):
            state, metrics = step(state, batch)
        results[parts] = (state.params, state.opt_state, metrics)
    assert differences(results[4][2], results[1][2]) < 1e-6
    # Adam divides by the root of the second moment, which makes the smallest gradients large.
    assert differences(results[4][0], results[1][0]) < 1e-4


def test_gradients_are_summed_over_targets_not_averaged_over_parts():
    """The mean of the parts' means is another number where parts have unequal targets."""
    params, batch = random_params(DENSE), packed(8, 10)
    whole, gradient = jax.jit(jax.value_and_grad(lambda p, b: next_token_loss(p, DENSE, b)[0]))(
        params, batch
    )
    parts = [jax.tree.map(lambda rows, i=i: rows[2 * i : 2 * i + 2], batch) for i in range(4)]
    of_means = jax.jit(lambda p: sum(next_token_loss(p, DENSE, part)[0] for part in parts) / 4)(
        params
    )
    assert differences(of_means, whole) > 1e-4
    state, step = start(DENSE, dtype=jnp.float32, accumulate=4)
    _, metrics = step(state, batch)
    assert differences(metrics["loss"], whole) < 1e-6
    norm = jnp.sqrt(sum(jnp.sum(g**2) for g in jax.tree.leaves(gradient)))
    assert differences(metrics["grad_norm"], norm) < 1e-6


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_step_that_is_not_finite_is_skipped(poison):
    state, step = start(DENSE)
    state, _ = step(state, {"tokens": tokens(2, 8)})
    broken = state.params.replace(final_norm=state.params.final_norm.at[3].set(poison))
    state = state.replace(params=broken)
    before = jax.tree.map(np.array, state)
    state, metrics = step(state, {"tokens": tokens(2, 8, seed=1)})
    assert not np.isfinite(metrics["loss"]) or not np.isfinite(metrics["grad_norm"])
    assert int(metrics["skipped"]) == 1
    assert equal_bits(state.params, before.params)
    assert equal_bits(state.opt_state, before.opt_state)
    assert int(state.step) == 2 and int(state.skipped) == 1


def test_a_step_that_is_finite_is_applied():
    state, step = start(DENSE)
    before = jax.tree.map(np.array, state)
    state, metrics = step(state, {"tokens": tokens(2, 8)})
    assert int(metrics["skipped"]) == 0 and int(metrics["tokens"]) == 16
    for path, leaf in jax.tree.leaves_with_path(state.params):
        old = before.params
        for entry in path:
            old = getattr(old, entry.name)
        assert not equal_bits(leaf, old), path


def test_masters_and_moments_are_float32_and_donated():
    state, step = start(DENSE)
    buffers = jax.tree.leaves(state)
    new, metrics = step(state, {"tokens": tokens(2, 8)})
    assert all(leaf.is_deleted() for leaf in buffers)
    for leaf in jax.tree.leaves((new.params, new.opt_state, metrics)):
        assert leaf.dtype in (jnp.float32, jnp.int32)


@pytest.mark.slow
def test_bfloat16_gradients_are_near_float32s_for_tokens_that_come_often():
    """Embeddings and norms sum thousands of small terms; in bfloat16 they would be lost.

    What the matrix products add up is the compiler's: XLA of jax 0.12 on a CPU does some of it in
    bfloat16.
    """
    config = DENSE.replace(num_layers=1)
    batch = {"tokens": np.full((8, 513), 7, np.int32)}
    batch["tokens"][:, ::16] = tokens(8, 32)
    gradient = jax.jit(jax.grad(lambda params: next_token_loss(params, config, batch)[0]))
    exact = gradient(random_params(config))
    half = gradient(jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), random_params(config)))
    for (path, near), leaf in zip(
        jax.tree.leaves_with_path(half), jax.tree.leaves(exact), strict=True
    ):
        if path[-1].name.endswith(("embed", "norm")):
            error = jnp.linalg.norm(near.astype(jnp.float32) - leaf) / jnp.linalg.norm(leaf)
            assert error < 0.02, path


def test_it_learns_one_batch_by_heart():
    state, step = start(DENSE)
    batch = {"tokens": tokens(2, 8)}
    state, first = step(state, batch)
    for _ in range(149):
        state, last = step(state, batch)
    assert float(first["nll"]) > 3.5 and float(last["nll"]) < 0.3


@pytest.mark.slow
def test_remat_changes_memory_not_numbers():
    batch = {"tokens": tokens(8, 10)}
    plain, again = (
        step(state, batch)[1]
        for state, step in (
            start(DENSE, dtype=jnp.float32, **options) for options in ({}, {"remat": "full"})
        )
    )
    assert differences(again, plain) < 1e-6


def test_evaluation_sums_over_targets():
    params, evaluate = random_params(DENSE), make_evaluation(DENSE, dtype=jnp.float32)
    nll, count = evaluate(params, packed(8, 10))
    assert int(count) == 4 * 10 + 4 * 2
    mean = next_token_loss(params, DENSE, packed(8, 10))[1]["nll"]
    assert differences(nll / count, mean) < 1e-6


def _program(B: int, T: int, V: int, whole_logits: bool = False) -> str:
    """A step (or one that is known to hold all logits) as XLA is given it."""
    config = DENSE.replace(vocab_size=V, num_layers=1, max_seq_len=T)
    shapes = P.abstract(config)
    batch = {"tokens": jax.ShapeDtypeStruct((B, T + 1), jnp.int32)}
    if whole_logits:

        def loss(params, batch):
            logits = transformer.forward(
                params, config, batch["tokens"][:, :-1], implementation="reference"
            )
            return jnp.mean(jax.nn.logsumexp(logits, axis=-1) ** 2)

        return jax.jit(jax.grad(loss)).lower(shapes, batch).as_text()
    tx = make_optimizer(OptimizerConfig(), 10)
    state = jax.eval_shape(lambda p: TrainState.create(p, tx), shapes)
    step = make_step(config, tx, schedule(OptimizerConfig(), 10))
    return step.lower(state, batch).as_text()  # pyright: ignore


def _held(program: str, B: int, T: int, V: int) -> tuple[bool, bool]:
    """Whether it has an array of all logits in float32, and one of T x T."""
    shapes = {
        (dtype, tuple(int(n) for n in dims.split("x") if n))
        for dims, dtype in re.findall(r"\btensor<((?:\d+x)+)(f32|bf16|i1)>", program)
    }
    logits = any(d == "f32" and np.prod(s) >= B * T * V and V in s for d, s in shapes)
    return logits, any(s.count(T) > 1 for _, s in shapes)


def test_neither_the_logits_nor_the_attention_matrix_are_ever_whole():
    B, T, V = 2, 2304, 997
    assert _held(_program(B, T, V), B, T, V) == (False, False)
    assert _held(_program(B, T, V, whole_logits=True), B, T, V) == (True, True)
    assert _held(_program(16, 256, V), 16, 256, V)[0] is False  # few rows are split as well
