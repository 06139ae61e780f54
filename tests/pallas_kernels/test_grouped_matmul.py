"""The grouped product: its specification against float64, XLA's against it, tiles of rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import grouped_matmul
from pallas_kernels.grouped_matmul import Config, configs, reference, schedule, supported

# Rows, and rows of each group: mostly of one shape, which is compiled once.
COUNTS = {
    "a sum below M": (40, [7, 0, 21, 1]),
    "empty groups": (40, [0, 0, 24, 0]),
    "nothing": (40, [0, 0, 0, 0]),
    "one group": (19, [19]),
    "uneven": (40, [9, 17, 4, 10]),
}


def draw(*shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def case(name, K=12, N=20, dtype=jnp.float32):
    """x, w, counts and a cotangent; x and it are NaN behind the last group."""
    M, counts = COUNTS[name]
    x, dy = draw(M, K), draw(M, N, seed=1)
    behind = (np.arange(M) >= sum(counts))[:, None]
    x, dy = (jnp.where(behind, jnp.nan, a).astype(dtype) for a in (x, dy))
    return x, draw(len(counts), K, N, seed=2, dtype=dtype), jnp.asarray(counts, jnp.int32), dy


def exact(x, w, counts, dy):
    """The product and its gradients in float64, group by group."""
    x, w, dy = (np.asarray(a, np.float64) for a in (x, w, dy))
    out, dx = np.zeros(dy.shape), np.zeros(x.shape)
    dw, start = np.zeros(w.shape), 0
    for g, count in enumerate(np.asarray(counts)):
        rows = slice(start, start + count)
        out[rows], dx[rows] = x[rows] @ w[g], dy[rows] @ w[g].T
        dw[g], start = x[rows].T @ dy[rows], start + count
    return out, dx, dw


def with_gradients(function, x, w, counts, dy):
    out, pull = jax.vjp(lambda x, w: function(x, w, counts), x, w)
    return out, *pull(dy)


@pytest.mark.parametrize("name", sorted(COUNTS))
def test_product_and_gradients(name):
    arrays = case(name)
    for function in (grouped_matmul, reference.grouped_matmul):
        found = with_gradients(function, *arrays)
        for got, want in zip(found, exact(*arrays), strict=True):
            np.testing.assert_allclose(got, want, atol=1e-5)


def test_gradients_are_those_of_the_specification():
    x, w, counts, dy = case("a sum below M")
    kept = jnp.nan_to_num(x)
    found = with_gradients(grouped_matmul, kept, w, counts, dy)
    wanted = with_gradients(reference.grouped_matmul, kept, w, counts, dy)
    for got, want in zip(found, wanted, strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5)


def test_a_group_too_far_is_seen():
    """The check above tells a product whose groups begin a row late from the right one."""
    arrays = case("uneven")
    late = grouped_matmul(arrays[0], arrays[1], arrays[2] + jnp.asarray([1, -1, 0, 0]))
    assert np.abs(late - exact(*arrays)[0]).max() > 0.1


def test_sums_are_float32():
    x, w = jnp.ones((8, 4096), jnp.bfloat16), jnp.full((1, 4096, 1), 1.0, jnp.bfloat16)
    assert float(grouped_matmul(x, w, jnp.asarray([8]))[0, 0]) == 4096


def test_it_is_mapped_and_compiled():
    x, w, counts, _ = case("uneven")
    stacks = (jnp.stack(pair) for pair in ([x, 2 * x], [w, w], [counts, counts[::-1]]))
    found = jax.jit(jax.vmap(grouped_matmul))(*stacks)
    np.testing.assert_allclose(found[0], grouped_matmul(x, w, counts), atol=1e-5)
    np.testing.assert_allclose(found[1], grouped_matmul(2 * x, w, counts[::-1]), atol=1e-5)


def covered(counts, M, tile):
    """The group that each row is stored by, by the table of tiles; len(counts) for zeros."""
    of = schedule.row_tiles(jnp.asarray(counts, jnp.int32), M, tile)
    group, first, low, high, some = (np.asarray(x) for x in (
        of.group, of.first, of.low, of.high, of.some
    ))  # fmt: skip
    owner = np.full(M, -1)
    assert some[1] <= len(group)
    for t in range(some[1]):
        assert first[t] % 8 == 0 and 0 <= low[t] < high[t] <= tile
        assert first[t] + tile <= max(-(-M // 8) * 8, tile)
        assert (group[t] == len(counts)) == (t >= some[0])
        rows = owner[first[t] + low[t] : first[t] + high[t]]
        assert (rows == -1).all(), "two tiles store a row"
        rows[:] = group[t]
    return owner


def rows_of_groups(M):
    """Counts of four groups that M rows hold."""
    cuts = st.lists(st.integers(0, M), min_size=4, max_size=4).map(sorted)
    return cuts.map(lambda ends: [b - a for a, b in zip([0, *ends], ends, strict=False)])


@settings(max_examples=40, deadline=None)
@given(counts=rows_of_groups(84), tile=st.sampled_from([8, 16, 128]))
def test_every_row_is_stored_once_by_its_group(counts, tile):
    wanted = np.repeat(np.arange(5), [*counts, 84 - sum(counts)])
    np.testing.assert_array_equal(covered(counts, 84, tile), wanted)


def test_a_table_that_is_off_by_one_is_seen(monkeypatch):
    right = schedule.bounds
    monkeypatch.setattr(schedule, "bounds", lambda *of: (right(*of)[0], right(*of)[1] + 1))
    with pytest.raises(AssertionError):
        covered([5, 9], 14, 8)


@settings(max_examples=40, deadline=None)
@given(counts=rows_of_groups(84))
def test_steps_reach_every_row_of_a_group(counts):
    M, step = 84, 16
    of = schedule.row_steps(jnp.asarray(counts, jnp.int32), M, step)
    for g, count in enumerate(counts):
        start, end, begin, number = (int(x[g]) for x in (of.start, of.end, of.begin, of.number))
        assert end - start == count and begin % 8 == 0 and (number > 0) == (count > 0)
        if count:
            assert begin <= start and begin + (number - 1) * step < end <= begin + number * step


def test_more_rows_than_there_are_stay_inside():
    assert covered([5, 9], 10, 8).tolist() == [0] * 5 + [1] * 5


def test_bands_are_a_permutation():
    down, across = 5, 7
    places = [schedule.in_bands(jnp.int32(i), down, across, 3) for i in range(35)]
    assert {(int(t), int(n)) for t, n in places} == {(t, n) for t in range(5) for n in range(7)}
    assert [int(n) for _, n in places[:6]] == [0, 1, 2, 0, 1, 2]


@pytest.mark.parametrize(
    ("shapes", "dtypes", "says"),
    [
        (((4, 8), (2, 9, 3), (2,)), ("float32", "float32", "int32"), r"x\(4, 8\), w\(2, 9, 3\)"),
        (((4, 8), (2, 8, 3), (3,)), ("float32", "float32", "int32"), r"counts\(3,\)"),
        (((0, 8), (2, 8, 3), (2,)), ("float32", "float32", "int32"), "must not be empty"),
        (((4, 8), (2, 8, 3), (2,)), ("float32", "bfloat16", "int32"), "one floating-point dtype"),
        (((4, 8), (2, 8, 3), (2,)), ("int32", "int32", "int32"), "one floating-point dtype"),
        (((4, 8), (2, 8, 3), (2,)), ("float32", "float32", "float32"), "want integers"),
    ],
)
def test_what_does_not_fit(shapes, dtypes, says):
    arrays = (jnp.zeros(s, d) for s, d in zip(shapes, dtypes, strict=True))
    with pytest.raises(ValueError, match=says):
        grouped_matmul(*arrays)


def test_refusals(monkeypatch):
    monkeypatch.setattr(schedule.jax, "default_backend", lambda: "cpu")
    assert supported("xla", jnp.float32) is None
    assert "there are mosaic_gpu, xla" in (supported("cutlass", jnp.bfloat16) or "")
    assert "are on cpu" in (supported("mosaic_gpu", jnp.bfloat16) or "")
    assert "not float32" in (supported("mosaic_gpu", jnp.float32, platform="gpu") or "")
    assert supported("mosaic_gpu", jnp.float16, platform="gpu") is None
    with pytest.raises(ValueError, match="are on cpu"):
        grouped_matmul(*case("uneven")[:3], implementation="mosaic_gpu")


def test_the_choice_is_logged(caplog):
    with caplog.at_level("DEBUG", logger="pallas_kernels.grouped_matmul.product"):
        grouped_matmul(*case("uneven")[:3])
    assert "are on cpu" in caplog.text


def test_the_schedule_follows_the_shape():
    assert configs.choose(65536, 768, 128) == Config(128, 192)
    assert configs.choose(65536, 256, 128) == Config(128, 128)
    assert configs.choose(64, 768, 128).tile_m == 64
