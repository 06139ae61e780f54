"""float16 with a scale on the loss, float8 products: near float32, and the same on every mesh."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

from jaxinfra.errors import UserError
from jaxinfra.train.step import TrainState
from parallel import data, fp8, precision
from parallel import mesh as M
from parallel.layout import Layout
from parallel.model import Options
from parallel.precision import INITIAL, INTERVAL, LossScale
from parallel.train import Strategy, build
from tests.parallel import tiny
from tests.parallel.emulated import cases, over_ring, relative
from tests.parallel.runs import differences, started, trained

HALF = {
    "zero2, tp": ("qwen3", "dp=2,tp=2", "zero2", {"accumulate": 2}),
    "pipeline": ("qwen3", "pp=2", "dp", {"accumulate": 2, "schedule": "1f1b"}),
}


@pytest.mark.parametrize("case", cases(HALF, {"zero2, tp"}))
def test_half_precision_is_near_float32(case):
    name, mesh, builder, options = HALF[case]
    found = trained(name, mesh, builder, scales="float16", dtype=jnp.float16, **options)
    off = differences(found, tiny.one_device(name))
    assert off["loss"] < 2e-3 and off["gradients"] < 3e-2, off


def test_the_scale_halves_at_once_and_doubles_after_many():
    scale = LossScale(jnp.asarray(INITIAL), jnp.asarray(INTERVAL - 2))
    once = scale.after(jnp.asarray(True))
    twice = once.after(jnp.asarray(True))
    assert (once.scale, twice.scale, twice.clean) == (INITIAL, 2 * INITIAL, 0)
    down = twice.after(jnp.asarray(False))
    assert (down.scale, down.clean) == (INITIAL, 0)
    least = LossScale(jnp.asarray(1.0), jnp.asarray(0)).after(jnp.asarray(False))
    assert least.scale == 1.0


def test_a_scale_keeps_what_float16_loses():
    def loss(x, factor):
        small = x * jnp.asarray(1e-4, x.dtype) * jnp.asarray(1e-4, x.dtype)
        return small.astype(jnp.float32) * factor

    half = jnp.asarray(1.0, jnp.float16)
    factor = jnp.asarray(INITIAL)
    assert jax.grad(loss)(half, 1.0) == 0
    kept = precision.unscaled(jax.grad(loss)(half, factor).astype(jnp.float32), factor)
    assert float(kept) == pytest.approx(1e-8, rel=1e-2)


def test_one_shard_that_overflows_stops_all():
    """One device's gradient has one infinite number, which one shard alone keeps after ZeRO-2."""
    layout = Layout(tiny.QWEN, M.make(M.parse("dp=4")))
    options = Options(dtype=jnp.float16)
    right = data.local_gradients(layout, options)

    def overflowing(params, rows, scales):
        metrics, grads = right(params, rows, scales)
        where = (lax.axis_index("dp") == 2) & (rows["inputs"].sum() >= 0)
        gate = grads.layers.mlp.gate.at[0, 0, 0].add(jnp.where(where, jnp.inf, 0.0))
        mlp = grads.layers.mlp.replace(gate=gate)
        return metrics, grads.replace(layers=grads.layers.replace(mlp=mlp))

    tx = precision.scaled(tiny.optimizer(), "float16", layout.config)
    state = TrainState.create(tiny.start(layout.config).params, tx)
    specs = layout.state_specs(tx, layout.cut_further(M.Axis.DP))
    step = data.zero2(layout, tx, options, overflowing)
    placed = layout.place(state, specs)
    after, metrics = tiny.compiled(step, placed)(placed, tiny.batch())
    assert int(metrics["skipped"]) == 1 and float(metrics["loss_scale"]) == INITIAL
    for shard in after.opt_state.loss.scale.addressable_shards:
        assert float(shard.data) == INITIAL / 2
    assert relative(after.params, state.params) == 0
    assert int(after.step) == 1


@functools.cache
def operands():
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(32, 24)), rng.normal(size=(24, 16))
    return x.astype(np.float32), w.astype(np.float32)


def passes(x, w, history=None):
    """The product and its gradients, for a cotangent that is not constant."""

    def loss(x, w, history):
        y = fp8.product(x, w, history)
        return jnp.sum(jnp.sin(y)), y

    grads, y = jax.grad(loss, (0, 1) if history is None else (0, 1, 2), has_aux=True)(x, w, history)
    return y, grads


def test_a_product_of_float8_is_near_the_product():
    x, w = operands()
    y, (dx, dw) = jax.jit(passes)(x, w)
    g = np.cos(y)
    off = [
        np.linalg.norm(a - b) / np.linalg.norm(b)
        for a, b in ((y, x @ w), (dx, g @ w.T), (dw, x.T @ g))
    ]
    assert 1e-3 < off[0] < 0.05 and max(off) < 0.1, off  # e4m3 has three bits of fraction, e5m2 two
    assert np.isfinite(jax.jit(passes)(1e6 * x, w * 0)[0]).all()  # a weight of zeros has no scale


def test_products_of_experts_are_those_of_each():
    """One scale for all: of two matrices, one is half as large as the scale is for."""
    x, w = operands()
    xs, ws = x.reshape(2, 16, 24), np.stack([w, 0.5 * w])

    def loss(x, w):
        y = fp8.by_expert("up", x, w, None)
        return jnp.sum(jnp.sin(y)), y

    (dx, dw), y = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(xs, ws)
    plain = np.einsum("ecd,edf->ecf", xs, ws)
    g = np.cos(y)
    wanted = plain, np.einsum("ecf,edf->ecd", g, ws), np.einsum("ecd,ecf->edf", xs, g)
    off = [np.linalg.norm(a - b) / np.linalg.norm(b)
           for a, b in zip((y, dx, dw), wanted, strict=True)]  # fmt: skip
    assert 1e-3 < off[0] < 0.05 and max(off) < 0.1, off


def test_the_mesh_does_not_change_a_product():
    """Rows over eight devices: the scale is that of all of them."""
    x, w = operands()
    x = x * np.repeat(2.0 ** np.arange(8), 4)[:, None].astype(np.float32)  # shards of other sizes
    whole = jax.jit(lambda x, w: passes(x, w)[0])(x, w)
    rows = over_ring(lambda x, w: fp8.product(x, w, None), ins=(P("tp"), P()))
    assert relative(rows(x, w), whole) == 0

    def own(here, history, dtype):
        return float(jnp.finfo(dtype).max) / here

    right, fp8.scale = fp8.scale, own
    try:
        wrong = over_ring(lambda x, w: fp8.product(x, w, None), ins=(P("tp"), P()))(x, w)
    finally:
        fp8.scale = right
    assert relative(wrong, whole) > 1e-4


def test_delayed_scales_learn_and_clip():
    x, w = operands()
    program = jax.jit(passes)
    known = np.zeros((3, 4), np.float32)
    known[:2, 2] = np.abs(x).max(), np.abs(w).max()
    known[2] = 1.0
    y, (dx, _, seen) = program(x, w, known)
    now, (dx_now, _) = program(x, w)
    assert relative(y, now) == 0 and relative(dx, dx_now) < 0.2
    largest = [np.abs(x).max(), np.abs(w).max(), np.abs(np.cos(y)).max()]
    np.testing.assert_allclose(seen[:, 0], largest, rtol=1e-6)
    assert not np.any(seen[:, 1:])
    clipped, _ = program(8 * x, w, known)  # eight times what was known: the ends, and no NaN
    assert np.isfinite(clipped).all() and relative(clipped, 8 * now) > 0.3


@functools.cache
def in_eight_bits(name, mesh, builder, scales):
    # Parts of a batch are other rows on another mesh, and current scales are those of a part.
    options = Options(fp8=True, accumulate=2 if scales == "float8-delayed" else 1)
    step, state = started(name, mesh, builder, options, None, scales)
    step, losses = tiny.compiled(step, state), []
    for _ in range(4):
        state, metrics = step(state, tiny.batch())
        losses.append(float(metrics["loss"]))
    return losses, jax.device_get(state)


@pytest.mark.slow
@pytest.mark.parametrize("scales", ["float8", "float8-delayed"])
@pytest.mark.parametrize(("name", "axis"), [("qwen3", "fsdp"), ("moe", "ep")])
def test_training_in_float8_is_the_same_on_every_mesh(name, axis, scales):
    here, one = in_eight_bits(name, "dp=1", "dp", scales)
    there, cut = in_eight_bits(name, f"{axis}=2,tp=2", "zero3", scales)
    exact = tiny.one_device(name)["loss"]
    assert there[0] == pytest.approx(here[0], rel=2e-3)
    assert there == pytest.approx(here, rel=2e-2)  # one rounding the other way, and steps after it
    assert here[0] == pytest.approx(float(exact), rel=0.05) and here[0] != float(exact)
    assert here[-1] < here[0]
    if scales == "float8-delayed":
        seen = one.opt_state.largest
        assert np.all(seen[..., :4] > 0) and not np.any(seen[..., 4:])
        assert relative(cut.opt_state.largest[..., 3], seen[..., 3]) < 0.02  # the first step's


def test_bad_wishes_are_told():
    with pytest.raises(UserError, match="choose one of float16, float8, float8-delayed"):
        Strategy(precision="int4")
    with pytest.raises(UserError, match="choose dispatch=padded"):
        build(Strategy("ep=2", dispatch="ring", precision="float8"), tiny.MOE, tiny.optimizer())
    with pytest.raises(UserError, match="stages have no scales"):
        trained("qwen3", "pp=2", "dp", schedule="1f1b", accumulate=2, fp8=True)
