"""The kernels of `rms_norm` and `norm_rope`: interpreted against the specification, and lowered.

A family's own file has its cases, and what only it claims. Run as a program, this file is the
interpreter's process: TRITON_INTERPRET is read when triton is imported.
"""

import dataclasses
import functools
import importlib

import jax
import jax.experimental.pallas.tpu as pltpu
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfra.model.config import ModelConfig
from jaxinfra.model.params import init
from jaxinfra.model.transformer import hidden
from tests.pallas_kernels import test_norm_rope, test_rms_norm, triton_process
from tests.pallas_kernels.test_triton import interpreted, on_cuda

__all__ = ["on_cuda"]  # a fixture

FAMILIES = {"norm_rope": test_norm_rope, "rms_norm": test_rms_norm}
every = pytest.mark.parametrize("of", FAMILIES.values(), ids=FAMILIES)


def near(got: dict[str, np.ndarray], want: dict[str, np.ndarray]) -> bool:
    allowed = 2e-5 if want["0"].dtype == np.float32 else 4e-3
    return got.keys() == want.keys() and all(
        got[k].dtype == want[k].dtype and np.allclose(got[k], want[k], atol=allowed, rtol=allowed)
        for k in want
    )


@pytest.fixture(scope="module", params=FAMILIES)
def answers(request, tmp_path_factory):
    """A family, and what the interpreter leaves for its cases and for its mistakes, by name."""
    of = FAMILIES[request.param]
    jobs = {name: {"case": name} for name in of.CASES}
    jobs |= {name: {"case": of, "replace": pair} for name, (of, *pair) in of.MISTAKES.items()}
    for job in jobs.values():
        job["family"] = request.param
    return of, triton_process.ask(__name__, tmp_path_factory.mktemp("triton"), jobs)


@interpreted
def test_interpreted_it_is_the_specification(answers):
    of, found = answers
    for name in of.CASES:
        assert near(found[name], of.results(name, None)), name


@interpreted
def test_a_mistake_shows(answers):
    of, found = answers
    for mistake, (name, *_) in of.MISTAKES.items():
        assert not near(found[mistake], of.results(name, None)), mistake


@every
def test_it_lowers(on_cuda, monkeypatch, of):
    monkeypatch.setattr(of.backend, "refusal", lambda **_: None)
    for arrays in of.LOWERED:
        text = on_cuda(functools.partial(of.slopes, implementation="triton"), 90, *arrays)
        assert text.count("custom_call @triton_kernel_call") == 2


@pytest.fixture
def tpu(monkeypatch):
    """The TPU's kernels are interpreted, by blocks of 16 rows or so."""
    params = pltpu.InterpretParams(uninitialized_memory="nan")
    for of in FAMILIES.values():
        monkeypatch.setattr(of.mosaic_tpu, "refusal", lambda **_: None)
        for name in ("forward", "backward"):
            run = functools.partial(getattr(of.mosaic_tpu, name), block=1, interpret=params)
            monkeypatch.setattr(of.mosaic_tpu, name, run)
        for cached in (of.product._run, of.product._run_back):
            monkeypatch.setattr(of.product, cached.__name__, cached.__wrapped__)


@pytest.mark.parametrize(
    ("of", "name"),
    [
        pytest.param(of, name, marks=[] if name == "edges" else pytest.mark.slow)
        for of in FAMILIES.values()
        for name in sorted(of.CASES)
    ],
)
@pytest.mark.usefixtures("tpu")
def test_the_tpus_kernels_are_the_specification(of, name):
    assert near(of.results(name, "mosaic_tpu"), of.results(name, None))


@every
@pytest.mark.usefixtures("tpu")
def test_rows_behind_the_last_would_show(monkeypatch, of):
    monkeypatch.setattr(jnp, "where", lambda _, yes, no: yes)
    assert not near(of.results("edges", "mosaic_tpu"), of.results("edges", None))


@every
@pytest.mark.usefixtures("tpu")
def test_mapped_plain_mathematics_takes_the_kernels_place(of):
    kernels = functools.partial(of.slopes, implementation="mosaic_tpu")
    for arrays, axes in of.mapped():
        got, want = (jax.jit(jax.vmap(f, axes))(*arrays) for f in (kernels, of.slopes))
        jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), got, want)


@pytest.mark.usefixtures("tpu")
def test_a_model_runs_what_its_config_names():
    config = ModelConfig("qwen3", vocab_size=32, num_layers=1, d_model=32, num_heads=2,
                         num_kv_heads=1, head_dim=128, d_ff=32, qk_norm=True)  # fmt: skip
    params, tokens = init(jax.random.key(0), config), jnp.arange(6)[None]

    def run(config):
        return lambda params: hidden(params, config, tokens)[0]

    named = run(dataclasses.replace(config, norms="mosaic_tpu"))
    assert str(jax.make_jaxpr(named)(params)).count("pallas_call") == 4  # two norms, rotation, last
    np.testing.assert_allclose(jax.jit(named)(params), jax.jit(run(config))(params), atol=2e-5)


if __name__ == "__main__":
    task = triton_process.mend()
    name = task["jobs"][0]["family"]
    of = FAMILIES[name]
    triton_process.stand_in(of.backend._triton_compat)
    of.backend.refusal = lambda **_: None
    of.product.unmapped = lambda kernel, plain: kernel
    small = dataclasses.replace(of.backend.Config(), tile=of.TILE)
    for part in ("forward", "backward"):
        setattr(of.backend, part, functools.partial(getattr(of.backend, part), config=small))
    of.backend._compat.multiprocessors = lambda _: 1
    family = importlib.import_module(f"pallas_kernels.{name}")  # the name there is a function's
    triton_process.answer(family, task, lambda job: of.results(job["case"], "triton"))
