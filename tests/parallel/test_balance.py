"""The bias that balances experts, against one device that computes every expert for every token."""

import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

from jaxinfra.errors import UserError
from jaxinfra.model import moe, transformer
from jaxinfra.train.loss import next_token_loss
from parallel import balance, experts
from parallel.census import census
from parallel.model import Options
from tests.parallel import tiny
from tests.parallel.emulated import cases, relative
from tests.parallel.runs import differences, started, trained

RATE = 0.05  # large enough to change choices in three steps
CASES = {
    "ep, dp, tp": ("moe", "dp=2,ep=2,tp=2", "zero1", {}),
    "ep, parts": ("moe", "ep=4", "dp", {"accumulate": 2}),
    "ep, fsdp, cp, ragged": ("moe", "fsdp=2,ep=2,cp=2", "zero3", {"dispatch": "ragged"}),
    "tp, whole sequences": ("moe", "tp=2,dp=4", "zero2", {"sequence": False, "remat": "matmuls"}),
    "ring": ("moe", "ep=4", "dp", {"dispatch": "ring", "unroll": 4}),
    "1f1b": ("unbalanced", "pp=2,ep=2,dp=2", "zero2", {"schedule": "1f1b", "accumulate": 2}),
    "1f1b, uneven": (
        "unbalanced", "pp=2,ep=2", "dp", {"schedule": "1f1b", "accumulate": 4, "layers": (3, 1)}
    ),
    "interleaved": ("unbalanced", "pp=2", "dp", {"schedule": "interleaved", "accumulate": 4}),
    "zb-h1": ("unbalanced", "pp=2,ep=2", "dp", {"schedule": "zb-h1", "accumulate": 4}),
}  # fmt: skip
DEFAULT = {"ep, dp, tp"}


def route(x, router, experts):
    """`moe.route` with the bias as the router's last row."""
    router, bias = router[:-1], router[-1]
    probability = jax.nn.softmax(x @ router, axis=-1)
    _, chosen = lax.top_k(lax.stop_gradient(probability + bias), experts.top_k)
    weight = jnp.zeros_like(probability)
    for k in range(experts.top_k):
        weight += jax.nn.one_hot(chosen[..., k], experts.num_experts) * probability
    return weight / weight.sum(axis=-1, keepdims=True), probability


@functools.cache
def one_device(name):
    """What `tiny.run` gives, from the loss alone: bias and parameters updated here."""
    config, tx = tiny.MODELS[name], tiny.optimizer()
    state = tiny.start(config)
    params, opt_state = state.params, state.opt_state
    bias = np.zeros((config.num_layers, config.experts.num_experts), np.float32)

    @jax.jit
    def step(params, bias, opt_state, batch):
        def loss_of(params):
            mlp = params.layers.mlp
            router = jnp.concatenate([mlp.router, bias[:, None]], axis=1)
            layers = params.layers.replace(mlp=mlp.replace(router=router))
            params = params.replace(layers=layers)
            seen = {"segment_ids": batch["segment_ids"][:, :-1]}
            _, found = transformer.hidden(params, config, batch["tokens"][:, :-1], **seen)
            return next_token_loss(params, config, batch)[0], found.chosen

        (loss, chosen), grads = jax.value_and_grad(loss_of, has_aux=True)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return loss, chosen, grads, optax.apply_updates(params, updates), opt_state

    found = {}
    with mock.patch.object(moe, "route", route):
        for seed in range(3):
            batch = tiny.batch(seed=seed)
            loss, chosen, grads, params, opt_state = step(params, bias, opt_state, batch)
            real = (batch["segment_ids"][:, :-1] > 0).sum()
            loads = np.rint(np.asarray(chosen) * real)
            mean = loads.mean(axis=-1, keepdims=True)
            bias = bias + np.float32(RATE) * np.sign(mean - loads).astype(np.float32)
            found = found or {"loss": loss, "gradients": grads}
    return found | {"params": params, "last": loss, "bias": bias}


def compared(name, mesh, builder, **options):
    """`differences`, and that of the bias and the third loss."""
    found, wanted = trained(name, mesh, builder, rate=RATE, **options), one_device(name)
    more = {key: relative(found[key], wanted[key]) for key in ("bias", "last")}
    return differences(found, wanted) | more


@pytest.mark.parametrize("case", cases(CASES, DEFAULT))
def test_equals_one_device(case):
    name, mesh, builder, options = CASES[case]
    found = compared(name, mesh, builder, **options)
    assert max(found.values()) < 1e-5, found


def test_the_bias_changes_what_is_learnt():
    """Or the comparison above would show nothing."""
    wanted, plain = one_device("moe"), tiny.one_device("moe")
    assert np.ptp(wanted["bias"], axis=-1).min() > RATE
    assert relative(plain["loss"], wanted["loss"]) < 1e-6
    assert relative(plain["params"], wanted["params"]) > 1e-3


def test_a_bias_of_local_loads_is_rejected(monkeypatch):
    right = balance.total

    def of_the_first(loads):
        return right(jnp.where(lax.axis_index("ep") == 0, loads, 0.0))

    monkeypatch.setattr(balance, "total", of_the_first)
    found = compared("moe", "ep=2", "dp")
    assert found["bias"] > 0.1, found


def test_a_bias_in_the_weights_is_rejected(monkeypatch):
    def leaking(x, router, config, bias):
        probability = jax.nn.softmax(jnp.einsum("btd,de->bte", x, router), axis=-1)
        top, chosen = lax.top_k(probability + bias, config.top_k)
        onehot = jax.nn.one_hot(chosen, config.num_experts)
        weight = jnp.einsum("btk,btke->bte", top, onehot)
        return weight / weight.sum(axis=-1, keepdims=True), probability

    monkeypatch.setattr(experts, "route", leaking)
    found = compared("moe", "ep=2", "dp")
    assert found["last"] > 1e-4 and found["params"] > 1e-3, found


def test_what_is_sent():
    """The loads with the gradients, once a step; where there is no balance loss, no means."""
    L, E = tiny.UNBALANCED.num_layers, tiny.UNBALANCED.experts.num_experts
    step, state = started("unbalanced", "dp=4", "dp", Options(), rate=RATE)
    found = [c for c in census(tiny.compiled(step, state)) if c.op == "all-reduce"]
    assert {c.executed for c in found} == {1}, found
    numbers = sum(leaf.size for leaf in jax.tree.leaves(state.params)) + L * E
    metrics = sum(c.bytes for c in found) - 4 * numbers
    assert 0 <= metrics < 32, found


def test_a_bias_balances_without_a_loss():
    """Tokens that prefer some experts, until the bias of those is low enough."""
    rng = np.random.default_rng(0)
    config, D = tiny.MOE.experts, 6
    x = jnp.asarray(rng.normal(size=(4, 64, D)) + 0.5, jnp.float32)
    router = jnp.asarray(0.5 * rng.normal(size=(D, config.num_experts)), jnp.float32)

    def step(bias, _):
        weight, _ = experts.route(x, router, config, bias)
        chosen = jnp.mean((weight > 0).astype(jnp.float32), axis=(0, 1))
        return balance.adjusted(bias, chosen, 0.002), chosen

    bias, chosen = jax.jit(lambda: jax.lax.scan(step, jnp.zeros(config.num_experts), length=600))()
    even = config.top_k / config.num_experts
    assert chosen[0].max() > 1.5 * even and chosen[-20:].max() < 1.15 * even
    plain = moe.route(x, router, config)
    assert relative(experts.route(x, router, config, jnp.zeros_like(bias)), plain) < 1e-6
    weight, _ = experts.route(x, router, config, bias)
    kept = jnp.where(weight > 0, plain[1], 0)  # weights are of what was learnt, not of the bias
    assert relative(weight, kept / kept.sum(axis=-1, keepdims=True)) < 1e-6


def test_what_does_not_fit_is_told():
    with pytest.raises(UserError, match="the model has no experts"):
        balance.balanced(tiny.optimizer(), RATE, tiny.QWEN)
