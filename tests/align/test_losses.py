"""Every loss and advantage on TRL's numbers: values and gradients, in double and single precision.

`test_live` asks an installed TRL again; it needs trl, and TRL_WITH_PPO for PPO's cases.
"""

import functools
import json
import os
from pathlib import Path

import jax
import numpy as np
import pytest

from tests.align import cases, ours

FIXTURE = Path(__file__).parents[1] / "fixtures" / "align" / "trl.npz"
NAMES = {
    "advantages": sorted(cases.ADVANTAGES), "contrastive": sorted(cases.CONTRASTIVE),
    "kto": sorted(cases.KTO), "policy": sorted(cases.POLICY), "ppo": sorted(cases.PPO),
    "preference": sorted(cases.PREFERENCE), "supervised": sorted(cases.SUPERVISED),
}  # fmt: skip
CASES = [(family, name) for family, names in NAMES.items() for name in names]
# Where TRL takes a step in single precision whatever the inputs: Bessel's correction from integers,
# constants made into tensors, a cast.
SINGLE = {
    "batch", "decoupled", "group", "rloo_standardized", "exo_pair", "orpo",
    "sigmoid_alpha_divergence", *cases.PPO,
}  # fmt: skip


def tolerance(name: str) -> float:
    """Relative; SAPO's loss is a small difference of large terms, its constants in float32."""
    return 1e-5 if name == "sapo" else 1e-6 if name in SINGLE else 1e-12


@functools.cache
def load():
    with np.load(FIXTURE) as file:
        return dict(file)


def inputs_of(recorded, dtype=np.float64):
    arrays = {
        name.removeprefix("inputs."): array
        for name, array in recorded.items()
        if name.startswith("inputs.")
    }
    return {k: a.astype(dtype) if a.dtype == np.float64 else a for k, a in arrays.items()}


def results_of(recorded, family, name):
    start = f"{family}.{name}."
    return {k.removeprefix(start): a for k, a in recorded.items() if k.startswith(start)}


def error(got, want) -> float:
    """The largest difference, by the largest number that is wanted."""
    return float(np.max(np.abs(got - want)) / max(np.max(np.abs(want)), 1e-30))


def compare(got, want, most):
    assert set(got) >= set(want) and want
    for what in want:
        assert np.all(np.isfinite(got[what])), what
        assert error(got[what], want[what]) < most, (what, error(got[what], want[what]))


@functools.cache
def in_double(family):
    with jax.enable_x64(True):
        return ours.run(family, NAMES[family], inputs_of(load()))


@pytest.mark.parametrize(("family", "name"), CASES, ids=[f"{f}-{n}" for f, n in CASES])
def test_is_trls(family, name):
    want = results_of(load(), family, name)
    compare(in_double(family)[name], want, tolerance(name))


@pytest.mark.parametrize("family", sorted(NAMES))
def test_is_trls_in_single_precision(family):
    found = ours.run(family, NAMES[family], inputs_of(load(), np.float32))
    for name in NAMES[family]:
        want = results_of(load(), family, name)
        compare(found[name], want, max(tolerance(name), 1e-6))


def test_fixture_says_what_made_it():
    versions = json.loads(str(load()["versions"]))
    assert versions["trl"] == "1.16.0" and versions["trl (PPO)"] == "1.12.0"


@pytest.mark.live
@pytest.mark.parametrize("family", sorted(NAMES))
def test_live(family):
    pytest.importorskip("trl")
    if family == "ppo" and "TRL_WITH_PPO" not in os.environ:
        pytest.skip("TRL_WITH_PPO names no folder with trl 1.12.0")
    from tests.align import trl_oracle

    inputs = cases.inputs()
    oracle, _ = trl_oracle.FAMILIES[family]
    with jax.enable_x64(True):
        found = ours.run(family, NAMES[family], inputs)
    for name in NAMES[family]:
        compare(found[name], oracle(name, inputs), tolerance(name))
