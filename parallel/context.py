"""Context parallelism: the positions of a row on several devices, attention over all of them.

A row of T tokens is cut into 2 n chunks and device i holds chunks i and 2 n - 1 - i (zig-zag).
Under a causal mask each device then has 2 n + 1 pairs of chunks to compute; with contiguous parts
the last would have 2 n - 1 times the first one's work. Positions, targets and segments are put into
that order with the tokens, so documents may cross from device to device. Sent, by a device:

    gather    keys and values of all at once             (n-1)/n of whole k and v; holds all of them
    ring      a neighbour's at a time, merged by LSE     the same in n-1 messages; holds a n-th
    ulysses   positions for heads, and back              (n-1)/n^2 of whole q, k, v and the output
    usp       ulysses within groups of u, ring between   (u-1)/(u n) of q, k, v, o; (r-1)/n of k, v

Ring: Liu et al. 2023, arXiv 2310.01889. Ulysses: Jacobs et al. 2023, arXiv 2309.14509; it needs
K >= n. Their product: Fang and Zhao 2024, arXiv 2405.07719; u is the largest number that divides n
and K, r = n / u, and u = 1 is the ring, u = n Ulysses. Backward each sends the transposes.
"""

from __future__ import annotations

import functools
import logging
import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels import flash_attention
from pallas_kernels.flash_attention import DENSE_LIMIT, supported
from pallas_kernels.shards import partitioned
from parallel.mesh import Axis, index, size

_log = logging.getLogger(__name__)

CP = Axis.CP.value


def zigzag(T: int, n: int) -> np.ndarray:
    """The order in which n devices hold T positions; T is a multiple of 2 n."""
    chunks = np.arange(T).reshape(2 * n, -1)
    return np.concatenate([chunks[[i, 2 * n - 1 - i]].reshape(-1) for i in range(n)])


def attend(
    q: Float[Array, "B t N H"],
    k: Float[Array, "B t K H"],
    v: Float[Array, "B t K H"],
    segments: Int[Array, "B t"] | None,
    scale: float,
    method: str,
) -> Float[Array, "B t N H"]:
    """Causal attention of this device's positions to those of all devices of the axis cp."""
    if size(CP) == 1:
        return attention(q, k, v, causal=True, segment_ids=segments, scale=scale)
    return METHODS[method](q, k, v, segments, scale)


def gather(q: Array, k: Array, v: Array, segments: Array | None, scale: float) -> Array:
    """Every device gets all keys and values."""
    n = size(CP)
    natural = np.argsort(zigzag(n * k.shape[1], n))
    whole = lambda x: lax.all_gather(x, CP, axis=1, tiled=True)[:, natural]  # noqa: E731
    k, v = whole(k), whole(v)
    out = []
    for half, part in enumerate(jnp.split(q, 2, axis=1)):
        ids = None
        if segments is not None:
            ids = (jnp.split(segments, 2, axis=1)[half], whole(segments))
        offset = _starts(index(CP), n, part.shape[1])[half]
        out.append(
            attention(part, k, v, causal=True, segment_ids=ids, scale=scale,
                      q_offset=jnp.full(q.shape[:1], offset))
        )  # fmt: skip
    return jnp.concatenate(out, axis=1)


def ring(
    q: Array, k: Array, v: Array, segments: Array | None, scale: float, *, members: int = 1
) -> Array:
    """Keys and values go round; what each step gives is weighted by its log-sum-exp.

    With groups of `members` devices that hold the same positions, each member has a ring of its
    own with those of its number in other groups.
    """
    n, i = size(CP) // members, index(CP) // members
    chunk = q.shape[1] // 2
    halves = functools.partial(jnp.split, indices_or_sections=2, axis=1)
    own = tuple(halves(x) for x in (q, q if segments is None else segments))

    def met(total: list, keys: tuple, owner: Array) -> list:
        """The sums so far and what the keys of device `owner` add to each half of the queries."""
        k, v, ids = (halves(x) for x in keys)
        merged = list(total)
        for a in (0, 1):
            for b in (0, 1):
                ahead = _starts(i, n, chunk)[a] - _starts(owner, n, chunk)[b]
                see = functools.partial(
                    _see, own[0][a], k[b], v[b],
                    None if segments is None else (own[1][a], ids[b]), ahead, scale,
                )  # fmt: skip
                merged[a] = lax.cond(
                    ahead >= 0, lambda old, see=see: _merge(old, see()), lambda old: old, merged[a]
                )
        return merged

    keys = (k, v, k if segments is None else segments)
    nothing = [
        (
            jnp.zeros_like(h).astype(jnp.float32),
            jnp.zeros_like(h[..., 0]).astype(jnp.float32) - jnp.inf,
        )
        for h in own[0]
    ]
    onward = [(j, (j + members) % size(CP)) for j in range(size(CP))]

    def step(carry: tuple, s: Array) -> tuple:
        total, keys = carry
        keys = lax.ppermute(keys, CP, onward)
        return (met(total, keys, (i - s) % n), keys), None

    (total, _), _ = lax.scan(step, (met(nothing, keys, i), keys), jnp.arange(1, n))
    return jnp.concatenate([out for out, _ in total], axis=1).astype(q.dtype)


def ulysses(q: Array, k: Array, v: Array, segments: Array | None, scale: float) -> Array:
    """Each device gets all positions of its share of the heads, and gives its positions back."""
    return _by_heads(q, k, v, segments, scale, size(CP))


def usp(q: Array, k: Array, v: Array, segments: Array | None, scale: float) -> Array:
    """Ulysses within groups of neighbours, as large as the heads allow, and a ring between them."""
    return _by_heads(q, k, v, segments, scale, math.gcd(k.shape[2], size(CP)))


def _by_heads(q: Array, k: Array, v: Array, segments: Array | None, scale: float, u: int) -> Array:
    """Attention where each of u neighbours takes a share of the heads at all their positions.

    Devices g u to g u + u - 1 hold, together and in order, what device g of n / u would.
    """
    groups = np.arange(size(CP)).reshape(-1, u).tolist()
    order = zigzag(u * q.shape[1], u)
    natural = np.argsort(order)
    swap = functools.partial(lax.all_to_all, axis_name=CP, tiled=True, axis_index_groups=groups)
    q, k, v = (swap(x, split_axis=2, concat_axis=1)[:, natural] for x in (q, k, v))
    ids = segments
    if ids is not None:
        ids = lax.all_gather(ids, CP, axis=1, tiled=True, axis_index_groups=groups)[:, natural]
    if u == size(CP):
        out = attention(q, k, v, causal=True, segment_ids=ids, scale=scale)
    else:
        out = ring(q, k, v, ids, scale, members=u)
    return swap(out[:, order], split_axis=1, concat_axis=2)


def attention(q: Array, k: Array, v: Array, **options: Any) -> Any:
    """`flash_attention.attention` of one device's arrays.

    Left to itself it keeps off kernels where there are several devices, for XLA cannot partition
    them; here nothing is left to partition. cuDNN gives a log-sum-exp without a gradient, so it is
    not asked for one. Outside `shard_map` (`data.annotated`) it is left to itself.
    """
    if partitioned():
        return flash_attention.attention(q, k, v, **options)
    asked = {name: value for name, value in options.items() if name != "return_lse"}
    kernels = ("mosaic_tpu",) if options.get("return_lse") else ("mosaic_tpu", "cudnn")
    for kernel in kernels:
        if supported(kernel, q.shape, k.shape, q.dtype, **asked) is None:
            break
    else:
        kernel = "chunked" if q.shape[1] > DENSE_LIMIT else "reference"
    _log.debug("attention %s inside shard_map: %s", q.shape, kernel)
    return flash_attention.attention(q, k, v, implementation=kernel, **options)


METHODS = {"gather": gather, "ring": ring, "ulysses": ulysses, "usp": usp}


def _starts(device: int | Array, n: int, chunk: int) -> tuple:
    """The first positions of a device's two chunks."""
    return device * chunk, (2 * n - 1 - device) * chunk


def _see(
    q: Array, k: Array, v: Array, ids: tuple | None, ahead: Array, scale: float
) -> tuple[Float[Array, "B t N H"], Float[Array, "B t N"]]:
    """(output, log-sum-exp) of a chunk of queries that stands `ahead` positions after the keys'."""
    out, lse = attention(
        q, k, v, causal=True, segment_ids=ids, scale=scale, return_lse=True,
        q_offset=jnp.full(q.shape[:1], ahead),
    )  # fmt: skip
    return out.astype(jnp.float32), jnp.swapaxes(lse, 1, 2)


def _merge(a: tuple[Array, Array], b: tuple[Array, Array]) -> tuple[Array, Array]:
    """Attention to two sets of keys from attention to each (arXiv 2205.14135, section 3.1)."""
    top = lax.stop_gradient(jnp.maximum(a[1], b[1]))
    top = jnp.where(jnp.isfinite(top), top, 0.0)
    weights = [jnp.exp(lse - top) for _, lse in (a, b)]
    total = weights[0] + weights[1]
    seen = total > 0  # a query at padding may have seen no key yet
    total = jnp.where(seen, total, 1.0)
    out = (weights[0][..., None] * a[0] + weights[1][..., None] * b[0]) / total[..., None]
    return out, jnp.where(seen, top + jnp.log(total), -jnp.inf)
