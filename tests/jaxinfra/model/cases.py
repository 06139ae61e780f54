"""What model and oracle are both given: weights, tokens and the ways of laying them out in rows."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfra.model import transformer
from jaxinfra.model.config import ModelConfig
from jaxinfra.model.params import Params, abstract

GRADIENT_FAMILIES = ("llama", "qwen3", "qwen3_moe")
T = 12  # longer than the windows of the windowed families


def params(config: ModelConfig, seed: int = 0) -> Params:
    """Random parameters from NumPy, so that they are the same everywhere; no norm weight is one."""
    rng = np.random.default_rng(seed)

    def leaf(path, shape: jax.ShapeDtypeStruct) -> jax.Array:
        draw = rng.standard_normal(shape.shape).astype(np.float32)
        if path[-1].name.endswith("norm"):
            draw = 0.2 * draw + (0.0 if config.norm_plus_one else 1.0)
        else:
            draw = 0.15 * draw
        return jnp.asarray(draw)

    return jax.tree_util.tree_map_with_path(leaf, abstract(config))


def tokens(config: ModelConfig) -> np.ndarray:
    """[2, T] tokens, none of them the padding token 0."""
    return np.random.default_rng(1).integers(3, config.vocab_size, (2, T)).astype(np.int32)


LENGTHS = (T, 7)  # of the two rows where they are padded


def padded(config: ModelConfig, side: str) -> tuple[np.ndarray, np.ndarray]:
    """(tokens, mask), both [2, T]: row 1 holds its first LENGTHS[1] tokens and padding."""
    rows, mask = tokens(config), np.zeros((2, T), np.int32)
    for row, length in enumerate(LENGTHS):
        real = rows[row, :length].copy()
        rows[row] = 0
        place = slice(T - length, T) if side == "left" else slice(0, length)
        rows[row, place], mask[row, place] = real, 1
    return rows, mask


def packed(config: ModelConfig) -> tuple[np.ndarray, np.ndarray]:
    """(tokens, segment ids), both [1, 2 T]: documents of T and 7 tokens, then padding."""
    rows = tokens(config)
    row, segments = np.zeros((1, 2 * T), np.int32), np.zeros((1, 2 * T), np.int32)
    row[0, :T], segments[0, :T] = rows[0], 1
    row[0, T : T + LENGTHS[1]], segments[0, T : T + LENGTHS[1]] = rows[1, : LENGTHS[1]], 2
    return row, segments


@functools.partial(jax.jit, static_argnums=1)
def forward(params: Params, config: ModelConfig, tokens, segment_ids=None) -> jax.Array:
    """The model under test, compiled once a family and shape."""
    return transformer.forward(params, config, tokens, segment_ids=segment_ids)


def gradients(params: Params, config: ModelConfig, tokens, remat: str) -> dict[str, np.ndarray]:
    """Gradients of the mean next-token loss, by dotted path."""

    @jax.jit
    def gradient(params):
        def loss(params):
            logits = transformer.forward(params, config, tokens[:, :-1], remat=remat)
            logp = jax.nn.log_softmax(logits)
            return -jnp.mean(jnp.take_along_axis(logp, tokens[:, 1:, None], axis=-1))

        return jax.grad(loss)(params)

    flat = jax.tree_util.tree_flatten_with_path(gradient(params))[0]
    return {".".join(key.name for key in path): np.asarray(leaf) for path, leaf in flat}


def relative_error(got, want) -> float:
    """The largest error at any position, relative to that position's norm."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    error = np.linalg.norm(got - want, axis=-1) / np.linalg.norm(want, axis=-1)
    return float(np.max(error))


def summary(gradient: np.ndarray) -> tuple[float, float]:
    """A gradient's norm and its product with a random direction of norm one."""
    direction = np.random.default_rng(2).standard_normal(gradient.shape)
    direction /= np.linalg.norm(direction)
    return float(np.linalg.norm(gradient)), float(np.sum(gradient * direction))
