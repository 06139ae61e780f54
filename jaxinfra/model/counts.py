"""Parameters, FLOPs and bytes of a model, counted from its configuration alone. Imports no jax.

Conventions. A multiply-add is 2 FLOPs. Attention counts the (query, key) pairs that causality and
the layer's window let through, and no others. An embedding look-up is 0 FLOPs. Backward of a matrix
product is twice its forward; what rematerialisation or flash attention computes again is not
counted. Mixture-of-experts counts the `top_k` experts a token goes to, as a sparse implementation
would run them.

Bytes are the least an operation must move when it is one kernel: every operand in and every result
out of memory once. A real program moves at least this much, unless it fuses operations further.
"""

from __future__ import annotations

import dataclasses

from jaxinfra.errors import UserError
from jaxinfra.model.config import ModelConfig

PHASES = ("prefill", "decode", "train")
BYTES = {
    "float32": 4,
    "tf32": 4,
    "bfloat16": 2,
    "float16": 2,
    "float8": 1,
    "int8": 1,
    "float4": 0.5,
    "int4": 0.5,
}


@dataclasses.dataclass(frozen=True)
class Operation:
    """One operation of a model, summed over all layers that have it."""

    name: str
    kind: str  # "matmul", "attention", "elementwise" or "lookup"
    layers: int
    flops: int
    bytes_read: int
    bytes_written: int

    @property
    def bytes(self) -> int:
        """Bytes in and out of memory."""
        return self.bytes_read + self.bytes_written

    @property
    def intensity(self) -> float:
        """FLOPs a byte."""
        return self.flops / self.bytes


def num_params(config: ModelConfig) -> int:
    """Elements of `jaxinfra.model.params.abstract(config)`; tied embeddings count once."""
    return _num_params(config, config.experts.num_experts if config.experts else 0)


def num_active_params(config: ModelConfig) -> int:
    """Parameters that one token meets: the router and `top_k` experts, not all of them."""
    return _num_params(config, config.experts.top_k if config.experts else 0)


def kv_bytes_per_token(config: ModelConfig, dtype: str = "bfloat16") -> int:
    """Bytes of keys and values that one token adds to a cache: 2 L K H elements.

    A windowed layer may drop the token again once it is out of the window.
    """
    c = config
    return int(2 * c.num_layers * c.num_kv_heads * c.head_dim * itemsize(dtype))


def train_flops_per_token(config: ModelConfig, seq_len: int) -> float:
    """FLOPs of matrix products and attention, forward and backward, a token of a training step.

    3 (2 P + 4 N H pairs / T) over the layers, P the parameters of matrix products: without the
    look-up, elementwise work, the optimizer and anything computed twice. This is the numerator of
    model FLOP utilisation (PaLM, arXiv 2204.02311, appendix B), with causality counted.
    """
    step = operations(config, phase="train", batch=1, seq_len=seq_len)
    return sum(op.flops for op in step if op.kind in ("matmul", "attention")) / seq_len


def itemsize(dtype: str) -> float:
    """Bytes an element; a UserError where `dtype` is not one of BYTES."""
    if dtype not in BYTES:
        raise UserError(f"dtype {dtype!r} is not known; choose one of {', '.join(BYTES)}")
    return BYTES[dtype]


def pairs(seq_len: int, context: int = 0, window: int | None = None) -> int:
    """(query, key) pairs of causal attention for the tokens from `context` to `seq_len`."""
    return _pairs_from_start(seq_len, window) - _pairs_from_start(context, window)


def operations(
    config: ModelConfig,
    *,
    phase: str,
    batch: int,
    seq_len: int,
    context: int | None = None,
    dtype: str = "bfloat16",
) -> list[Operation]:
    """The operations of one forward pass, or of one training step, in the order they run.

    Args:
      phase: "prefill" and "decode" compute logits of each sequence's last token; "train" those of
        all, forward and backward, without storing them, and an AdamW step on float32 masters.
      batch: sequences.
      seq_len: tokens of each sequence once the pass is done.
      context: tokens of them that were in the cache before: 0, or seq_len - 1 for "decode".
      dtype: of weights, activations and cache, a key of BYTES; logits are float32.
    """
    context = _checked_context(phase, batch, seq_len, context)
    c, width = config, itemsize(dtype)
    D, N, K, H, L, V = (
        c.d_model, c.num_heads, c.num_kv_heads, c.head_dim, c.num_layers, c.vocab_size,
    )  # fmt: skip
    tokens = batch * (seq_len - context)
    train = phase == "train"

    def operation(
        name: str, kind: str, layers: int, flops: float, weights: float, x: float, y: float
    ) -> Operation:
        """`flops` and elements of `weights`, input `x` and output `y` in one layer's forward."""
        read, written = weights + x, y
        if train:  # backward reads x, weights and dy (for dx, and again for the weights' gradient)
            flops *= 3
            read += weights + x + (1 if kind in ("elementwise", "lookup") else 2) * y
            written += weights + x
        count = [round(layers * n) for n in (flops, read * width, written * width)]
        return Operation(name, kind, layers, *count)

    def matmul(name: str, layers: int, rows: float, into: int, out: int, weights: float = 0):
        weights = weights or into * out
        return operation(name, "matmul", layers, 2 * rows * into * out, weights, rows * into,
                         rows * out)  # fmt: skip

    ops = [operation("embed", "lookup", 1, 0, 0, tokens * D, tokens * D)]
    ops.append(matmul("qkv", L, tokens, D, (N + 2 * K) * H))
    for window, layers in _layers_by_window(c).items():
        keys = seq_len if window is None else min(seq_len, window + seq_len - context - 1)
        name = "attention" if window is None else f"attention, window {window}"
        flops = 4 * N * H * batch * pairs(seq_len, context, window)
        x = tokens * N * H + batch * keys * 2 * K * H
        ops.append(operation(name, "attention", layers, flops, 0, x, tokens * N * H))
    ops.append(matmul("out", L, tokens, N * H, D))
    if c.experts:
        E, k, F = c.experts.num_experts, c.experts.top_k, c.experts.d_ff
        touched = E * (1 - (1 - k / E) ** tokens)  # experts that some token goes to, if uniform
        ops.append(matmul("router", L, tokens, D, E))
        ops.append(matmul("experts gate+up", L, tokens * k, D, 2 * F, touched * 2 * D * F))
        ops.append(matmul("experts down", L, tokens * k, F, D, touched * D * F))
    else:
        k, F = 1, c.d_ff
        ops.append(matmul("gate+up", L, tokens, D, 2 * F))
        ops.append(matmul("down", L, tokens, F, D))
    flops, weights, x, y = _elementwise(c, k * F, k)
    pointwise = operation(  # the layers' and the final norm's
        "norms, rope, activation", "elementwise", 1, tokens * (L * flops + 4 * D),
        L * weights + D, tokens * (L * x + D), tokens * (L * y + D),
    )  # fmt: skip
    ops.append(dataclasses.replace(pointwise, layers=L))
    rows = tokens if train else batch
    logits = 0 if train else rows * V * 4 / width
    name = "unembed + loss" if train else "unembed"
    ops.append(operation(name, "matmul", 1, 2 * rows * D * V, D * V, rows * D, logits))
    if train:
        P = num_params(c)  # float32 p, g, m, v in; p, m, v and the computing copy out
        ops.append(Operation("AdamW", "elementwise", 1, 12 * P, 16 * P, round((12 + width) * P)))
    return ops


def _num_params(config: ModelConfig, num_experts: int) -> int:
    c = config
    D, N, K, H = c.d_model, c.num_heads, c.num_kv_heads, c.head_dim
    layer = D * (N + 2 * K) * H + N * H * D + D * (4 if c.post_norms else 2)
    if c.qkv_bias:
        layer += (N + 2 * K) * H
    if c.qk_norm:
        layer += 2 * H
    if c.experts:
        layer += D * c.experts.num_experts + num_experts * 3 * D * c.experts.d_ff
    else:
        layer += 3 * D * c.d_ff
    embeddings = c.vocab_size * D * (1 if c.tie_embeddings else 2)
    return c.num_layers * layer + D + embeddings


def _elementwise(c: ModelConfig, F: int, k: int) -> tuple[int, int, int, int]:
    """(FLOPs, elements in, elements out) a token and (weights) of one layer, with F activations.

    FLOPs an element: 4 norm, 3 rotation, 1 residual or bias, 5 gated activation, 2 sum of experts.
    """
    D, N, K, H = c.d_model, c.num_heads, c.num_kv_heads, c.head_dim
    norms = 4 if c.post_norms else 2
    flops = 4 * D * norms + 2 * D + 3 * (N + K) * H + 5 * F
    weights = norms * D
    if c.qk_norm:
        flops += 4 * (N + K) * H
        weights += 2 * H
    if c.qkv_bias:
        flops += (N + 2 * K) * H
        weights += (N + 2 * K) * H
    if c.experts:
        flops += 2 * k * D
    x = 2 * D + (1 + k) * D + (N + K) * H + 2 * F  # residual streams, block outputs, q and k, gates
    y = 4 * D + (N + K) * H + F
    return flops, weights, x, y


def _layers_by_window(c: ModelConfig) -> dict[int | None, int]:
    windows = [c.window(layer) for layer in range(c.num_layers)]
    return {window: windows.count(window) for window in dict.fromkeys(windows)}


def _pairs_from_start(n: int, window: int | None) -> int:
    full = n if window is None else min(n, window)
    return full * (full + 1) // 2 + (n - full) * full


def _checked_context(phase: str, batch: int, seq_len: int, context: int | None) -> int:
    if phase not in PHASES:
        raise UserError(f"phase {phase!r} is not known; choose one of {', '.join(PHASES)}")
    if batch < 1 or seq_len < 1:
        raise UserError(f"batch={batch}, seq_len={seq_len}: both must be at least 1")
    if context is None:
        context = seq_len - 1 if phase == "decode" else 0
    if not 0 <= context < seq_len or (phase == "train" and context):
        raise UserError(f"context={context} with seq_len={seq_len} in {phase}: choose "
                        + ("0" if phase == "train" else "0 up to seq_len - 1"))  # fmt: skip
    return context
