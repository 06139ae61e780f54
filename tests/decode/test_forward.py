"""The model over pages: queries, keys and values by one kernel are those of the model's pieces."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decode import forward
from jaxinfra.model import cache as kv
from jaxinfra.model import rope
from jaxinfra.model.params import init
from pallas_kernels import page_write
from pallas_kernels.page_write import reference
from tests.decode.engines import CONFIG

FORMS = {
    "norms": CONFIG,
    "biases": dataclasses.replace(CONFIG, family="qwen2", qk_norm=False, qkv_bias=True),
    "norms from one": dataclasses.replace(CONFIG, norm_plus_one=True),
}
SLOTS = jnp.asarray([3, -1, 8, 14], jnp.int32)


def written(config, **replaced):
    """Queries and pages of four tokens in layer 0."""
    layer = kv.unstack(init(jax.random.key(0), config), config).layers[0]
    layer = jax.tree.map(lambda a: a + 0.1 * jax.random.normal(jax.random.key(1), a.shape), layer)
    h = jax.random.normal(jax.random.key(2), (1, 4, config.d_model))
    angles = rope.table(config.rope, config.head_dim, jnp.arange(4)[None] + 9)
    (pages, *_) = forward.empty(config, 2, 8, "float32")
    q, pages = forward._write(layer.attn, h, config, angles, pages, SLOTS)
    return [np.asarray(a) for a in (q, pages.k, pages.v)]


@pytest.mark.parametrize("form", FORMS)
def test_the_kernel_is_asked_for_what_the_models_pieces_give(monkeypatch, form):
    want = written(FORMS[form])
    monkeypatch.setattr(page_write, "supported", lambda *_, **__: None)
    calls = []

    def by_reference(*arrays, norms, **options):
        calls.append(norms is not None)
        return reference.page_write(*arrays, norms=norms, **options)

    monkeypatch.setattr(page_write, "page_write", by_reference)
    for got, expected in zip(written(FORMS[form]), want, strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-5)
    assert calls == [FORMS[form].qk_norm]
