"""Attention over pages: the specification and plain XLA against float64 mathematics; appending."""

import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import _triton_compat
from pallas_kernels.paged_attention import (
    append,
    choose,
    paged_attention,
    quantize,
    supported,
    xla,
)
from tests.pallas_kernels.paged_cases import (
    CASES,
    DECODE,
    MIXED,
    QUANTISED,
    SINKS,
    Batch,
    altered,
    in_other_company,
)


def check(batch, implementation, **more):
    arrays, options = batch.arguments()
    named = {key: x for key, x in options.items() if isinstance(x, jax.Array)}
    known = {key: x for key, x in options.items() if key not in named} | more
    attend = BACKENDS.get(implementation)
    if attend is None:
        attend = functools.partial(paged_attention, implementation=implementation)
    call = compiled(attend, *sorted(known.items()))
    return np.asarray(call(*arrays, **named), np.float64)


@functools.cache
def compiled(attend, *known):
    return jax.jit(functools.partial(attend, **dict(known)))


xla_with = functools.partial(altered, xla)
BACKENDS = {"xla, off a CPU": xla_with(("cpu=loop", "cpu=gather"))}


@pytest.mark.parametrize(
    ("form", "name"),
    [("xla", name) for name in CASES]
    + [("reference", name) for name in ("soft cap and sinks", "window")]
    + [("xla, off a CPU", name) for name in CASES if CASES[name]["rows"] is DECODE],
)
def test_it_is_the_mathematics(name, form):
    batch = Batch(**CASES[name])
    np.testing.assert_allclose(check(batch, form), batch.wanted(), atol=1e-5)


@pytest.mark.parametrize("name", QUANTISED)
def test_quantised_pages(name):
    batch = Batch(**QUANTISED[name])
    np.testing.assert_allclose(check(batch, "xla"), batch.wanted(), atol=1e-5)


def test_quantised_pages_of_the_specification():
    batch = Batch(**QUANTISED["int8, mixed"])
    np.testing.assert_allclose(check(batch, "reference"), batch.wanted(), atol=1e-5)


MISTAKES = {  # the mistake, a case that shows it, and what makes it
    "stale page": (
        "mixed",
        "dynamic_slice(page_table, (row, c",
        "dynamic_slice(page_table, (row, 0 * c",
    ),
    "mask off by one": ("decode", "key <= position)", "key <= position + 1)"),
    "window off by one": ("window", "position - self.window + 1", "position - self.window"),
    "merge without rescaling": (
        "mixed",
        "return acc * shrink[..., None] + added",
        "return acc + added",
    ),
    "total without rescaling": ("mixed", "total = total * shrink", "total = total"),
    "pages that nobody owns": (
        "mixed",
        "jnp.where((key < lengths[row])[:, None], call.v.of(table), 0.0)",
        "call.v.of(table)",
    ),
    "wrong key head": (
        "mixed",
        "here = jnp.moveaxis(here, 0, 2)",
        "here = jnp.moveaxis(here[:, ::-1], 0, 2)",
    ),
    "a chunk left out": ("mixed", "end = position[0] // chunk + 1", "end = position[0] // chunk"),
    "sink left out": (
        "soft cap and sinks",
        "top = jnp.repeat(sinks, block, axis=1)",
        "top = jnp.repeat(sinks - jnp.inf, block, axis=1)",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_shows(mistake, monkeypatch):
    name, right, wrong = MISTAKES[mistake]
    small = ("CHUNK = 128", "CHUNK = 8")
    batch = Batch(**CASES[name])
    monkeypatch.setitem(BACKENDS, "wrong", xla_with(small, (right, wrong)))
    found = check(batch, "wrong")
    assert not np.allclose(found, batch.wanted(), atol=1e-3)


def test_chunks_that_end_within_pages(monkeypatch):
    """Small chunks of pages of another size, as the mistakes above have them, but right."""
    monkeypatch.setitem(BACKENDS, "small", xla_with(("CHUNK = 128", "CHUNK = 8")))
    for name in ("mixed", "window", "decode"):
        batch = Batch(**CASES[name])
        np.testing.assert_allclose(check(batch, "small"), batch.wanted(), atol=1e-5)


def bits_differ(length, run, **shape):
    """Whether an output of row 7 has other bits in one company than in another."""
    known = {}
    for batch, at, position, n in in_other_company(length, **shape):
        found = run(batch)
        np.testing.assert_allclose(found, batch.wanted(), atol=1e-5)
        for i in range(n):
            bits = found[at + i].tobytes()
            if known.setdefault(position + i, bits) != bits:
                return True
    return False


def test_bits_depend_on_the_row_alone(monkeypatch):
    monkeypatch.setitem(BACKENDS, "small", xla_with(("CHUNK = 128", "CHUNK = 16")))
    invariant = functools.partial(check, implementation="small", invariant=True)
    options = {"window": 19, "soft_cap": 3.0} | SINKS
    assert not bits_differ(37, invariant, options=options)


def test_that_bits_differ_shows():
    """The specification sums over the table's whole width, and compilers take it as they like."""
    assert bits_differ(37, functools.partial(check, implementation="reference"))


def test_bfloat16():
    batch = Batch(MIXED, dtype=jnp.bfloat16)
    np.testing.assert_allclose(check(batch, "xla"), batch.wanted(), atol=0.03)


PAGES = jnp.zeros((3, 2, 4, 8))
NEW = jnp.asarray(np.random.default_rng(0).standard_normal((5, 2, 8)), jnp.float32)
SLOTS = jnp.asarray([7, -1, 0, 12, 11])  # 12 is past the last page


def test_append_writes_its_slots_and_nothing_else():
    found = np.asarray(append(PAGES, NEW, SLOTS))
    wanted = np.zeros(PAGES.shape)
    for t in (0, 2, 4):
        wanted[SLOTS[t] // 4, :, SLOTS[t] % 4] = NEW[t]
    np.testing.assert_array_equal(found, wanted.astype(np.float32))


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
def test_append_quantises_a_token_and_head_at_a_time(dtype):
    pages, scales = append(PAGES.astype(dtype), NEW, SLOTS, jnp.ones((3, 2, 4)))
    whole = np.asarray(pages.astype(jnp.float32) * scales[..., None])
    error = np.abs(whole[1, :, 3] - NEW[0])
    step = 0.5 / 127 if dtype == "int8" else 1 / 16
    assert (error <= step * np.abs(NEW[0]).max(-1, keepdims=True) + 1e-7).all()
    assert not whole[1, :, :3].any() and (scales[1, :, :3] == 1).all()


def test_a_head_of_zeros_is_quantised_to_zeros():
    numbers, scales = quantize(jnp.zeros((1, 1, 8)), "int8")
    assert not numbers.any() and (scales == 1).all()


def test_append_in_place_under_donation():
    donated = jax.jit(append, donate_argnums=(0, 3))
    pages, scales = PAGES.astype(jnp.int8), jnp.ones((3, 2, 4))
    program = donated.lower(pages, NEW, SLOTS, scales).compile()
    memory = program.memory_analysis()
    assert memory is not None and memory.alias_size_in_bytes == pages.nbytes + scales.nbytes
    assert "copy(" not in "".join(
        x for x in str(program.as_text()).splitlines() if "s8[3,2,4,8]" in x
    )


def small():
    return Batch([(1, 3)], N=2, K=1, H=16).arguments()


def test_a_cpu_gets_plain_xla_and_is_told_why(caplog):
    facts = ((1, 2, 64), (9, 1, 16, 64), jnp.bfloat16, jnp.bfloat16)
    name, why = choose(*facts)
    assert name == "xla" and "triton: Triton needs an NVIDIA GPU" in why
    with caplog.at_level(logging.DEBUG, "pallas_kernels.paged_attention"):
        arrays, options = small()
        jax.eval_shape(functools.partial(paged_attention, **options), *arrays)
    assert "xla (triton: Triton needs" in caplog.text


def test_a_gpu_gets_triton_where_it_takes_the_call_and_no_kernel_for_hopper(monkeypatch):
    monkeypatch.setattr(_triton_compat, "missing", lambda: None)
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    facts = ((1, 2, 64), (9, 1, 16, 64), jnp.bfloat16, jnp.bfloat16)
    assert choose(*facts, platform="gpu")[0] == "triton"
    name, why = choose((1, 2, 96), (9, 1, 16, 96), *facts[2:], platform="gpu")
    assert name == "xla" and "96" in why
    monkeypatch.setattr(jax, "device_count", lambda: 2)
    name, why = choose(*facts, platform="gpu")
    assert name == "xla" and "shard_map" in why


def test_what_is_refused():
    facts = ((1, 2, 16), (9, 1, 16, 16), jnp.float32, jnp.float32)
    assert supported("xla", *facts, invariant=True) is None
    assert "no implementation 'cuda'" in (supported("cuda", *facts) or "")
    assert "not batch-invariant" in (supported("reference", *facts, invariant=True) or "")
    arrays, options = small()
    with pytest.raises(ValueError, match=r"'triton'.*arrays are on cpu"):
        paged_attention(*arrays, **options, implementation="triton")


def test_a_window_as_long_as_the_table_is_none():
    arrays, options = small()
    plain, wide = (
        paged_attention(*arrays, **options, window=window, implementation="reference")
        for window in (None, 2**31 - 1)
    )
    np.testing.assert_array_equal(plain, wide)


@pytest.mark.parametrize(
    ("place", "wrong", "says"),
    [
        (0, jnp.zeros((1, 2, 8)), "must share H"),
        (0, jnp.zeros((1, 2)), r"want \[T,N,H\]"),
        (2, jnp.zeros((64, 1, 4, 8)), r"want \[T,N,H\]"),
        (3, jnp.zeros((2, 9), jnp.int32), "with a row at least"),
        (4, jnp.zeros(3, jnp.int32), "with a row at least"),
        (2, jnp.zeros((64, 1, 4, 16), jnp.bfloat16), "want one dtype"),
        ("sinks", jnp.zeros(3), "one a query head"),
        ("window", 0, "want one key at least"),
        ("k_scale", jnp.zeros((64, 1, 4)), "k_scale .* want None"),
    ],
)
def test_errors_name_what_does_not_fit(place, wrong, says):
    arrays, options = small()
    if isinstance(place, str):
        options[place] = wrong
    else:
        arrays = (*arrays[:place], wrong, *arrays[place + 1 :])
    with pytest.raises(ValueError, match=says):
        paged_attention(*arrays, **options)


def test_append_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match=r"new\(5, 3, 8\)"):
        append(PAGES, jnp.zeros((5, 3, 8)), SLOTS)
    with pytest.raises(ValueError, match="pages of int8 need scales"):
        append(PAGES.astype(jnp.int8), NEW, SLOTS)
    with pytest.raises(ValueError, match="pages of float32 take no scales"):
        append(PAGES, NEW, SLOTS, jnp.ones((3, 2, 4)))
