"""The order of examples: permutations, known from (seed, epoch, index) alone."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxinfra.train.order import permute


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5000), st.integers(0, 2**40), st.integers(0, 2**33))
def test_it_is_a_permutation(n, seed, epoch):
    assert np.array_equal(np.sort(permute(np.arange(n), n, seed, epoch)), np.arange(n))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 10**12), st.integers(0, 100), st.data())
def test_an_index_goes_to_the_same_place_whatever_else_is_asked(n, seed, data):
    index = np.array(data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=20)))
    together = permute(index, n, seed, 3)
    assert together.min() >= 0 and together.max() < n
    assert together.tolist() == [
        permute(index[i : i + 1], n, seed, 3)[0] for i in range(len(index))
    ]


def test_epochs_and_seeds_are_different_and_well_mixed():
    n = 10_007
    base = permute(np.arange(n), n, 0, 0)
    for other in (permute(np.arange(n), n, 0, 1), permute(np.arange(n), n, 1, 0), np.arange(n)):
        assert np.sum(base == other) < 12  # one is to be expected of random permutations
        assert abs(np.corrcoef(base, other)[0, 1]) < 0.04
    steps = np.abs(np.diff(base))
    assert abs(steps.mean() / n - 1 / 3) < 0.02  # of two numbers drawn at random


def test_an_index_outside_is_refused():
    for bad in (-1, 7):
        with pytest.raises(ValueError, match=r"outside \[0, 7\)"):
            permute(np.array([bad]), 7, 0, 0)
