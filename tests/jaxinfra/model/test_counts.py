"""The counts agree with the parameters themselves, with published sizes and with XLA's own count.

XLA's count is of a chain of plain matrix products written out here, layer by layer, query by query
and expert by expert, so that nothing is computed that the model does not need.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxinfra.errors import UserError
from jaxinfra.model import counts
from jaxinfra.model.config import ModelConfig
from jaxinfra.model.counts import operations
from jaxinfra.model.params import abstract
from jaxinfra.model.presets import PRESETS
from tests.jaxinfra.model_families import CONFIGS

FAMILIES = {name: ModelConfig.from_hf(raw) for name, raw in CONFIGS.items()}
T = 12  # longer than the windows of the windowed families


def small(config: ModelConfig, head_dim: int, d_ff: int) -> ModelConfig:
    """Two layers of which attention is a larger or smaller part."""
    c = config
    experts = c.experts and dataclasses.replace(c.experts, d_ff=d_ff)
    return c.replace(num_layers=2, d_model=32, head_dim=head_dim, d_ff=d_ff, vocab_size=32,
                     windows=c.windows and c.windows[-2:], experts=experts)  # fmt: skip


def config_of(name: str, phase: str) -> ModelConfig:
    """Forward, much attention, so that errors show; backward, less, as XLA adds up its pieces."""
    return small(FAMILIES[name], 8, 96) if phase == "train" else small(FAMILIES[name], 16, 32)


@pytest.mark.parametrize("config", [*FAMILIES.values(), *PRESETS.values()])
def test_num_params_is_the_number_of_elements(config):
    assert counts.num_params(config) == sum(x.size for x in jax.tree.leaves(abstract(config)))


PUBLISHED = {  # as model cards and checkpoints give them
    "smollm2-135m": 134_515_008,
    "qwen3-0.6b": 596_049_920,
    "llama-3.1-8b": 8_030_261_248,
    "mixtral-8x7b": 46_702_792_704,
    "qwen3-30b-a3b": 30_532_122_624,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name):
    assert counts.num_params(PRESETS[name]) == PUBLISHED[name]


def test_active_parameters_of_mixtures_and_of_dense_models():
    assert counts.num_active_params(PRESETS["qwen3-30b-a3b"]) / 1e9 == pytest.approx(3.35, abs=0.01)
    assert counts.num_active_params(PRESETS["mixtral-8x7b"]) / 1e9 == pytest.approx(12.88, abs=0.01)
    dense = PRESETS["qwen3-0.6b"]
    assert counts.num_active_params(dense) == counts.num_params(dense)


def products(config: ModelConfig, weights: list, x: jax.Array, context: int, last: bool):
    """Every matrix product of the model and no other work: x [T, D] -> hidden states and logits.

    There is no softmax, norm or activation; token t goes to experts t, t + 1, ... modulo E.
    """
    unembed, *layers = weights
    for i, (q, k, v, o, mlp, past) in enumerate(layers):
        queries = jnp.einsum("td,dkgh->tkgh", x, q)
        keys = jnp.concatenate([past[0], jnp.einsum("td,dkh->tkh", x, k)])
        values = jnp.concatenate([past[1], jnp.einsum("td,dkh->tkh", x, v)])
        outs = []
        for t in range(x.shape[0]):
            stop = context + t + 1
            seen = slice(max(0, stop - (config.window(i) or stop)), stop)
            scores = jnp.einsum("kgh,skh->kgs", queries[t], keys[seen])
            outs.append(jnp.einsum("kgs,skh->kgh", scores, values[seen]))
        x = jnp.einsum("tkgh,kghd->td", jnp.stack(outs), o)
        x = mixture(x, *mlp, config.experts.top_k) if config.experts else feed_forward(x, *mlp)
    return x, (x[-1:] if last else x) @ unembed


def mixture(x, router, experts, top_k):
    share, out = x @ router, jnp.zeros_like(x)
    for e, expert in enumerate(experts):
        rows = [t for t in range(x.shape[0]) if (e - t) % len(experts) < top_k]
        if rows:
            rows = jnp.array(rows)
            out = out.at[rows].add(share[rows, e, None] * feed_forward(x[rows], *expert))
    return out


def feed_forward(x, gate, up, down):
    return ((x @ gate) * (x @ up)) @ down


def shapes(config: ModelConfig, context: int) -> list:
    c = config
    D, K, H, G = c.d_model, c.num_kv_heads, c.head_dim, c.num_heads // c.num_kv_heads

    def leaf(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    if c.experts:
        E, F = c.experts.num_experts, c.experts.d_ff
        mlp = (leaf(D, E), [(leaf(D, F), leaf(D, F), leaf(F, D))] * E)
    else:
        mlp = (leaf(D, c.d_ff), leaf(D, c.d_ff), leaf(c.d_ff, D))
    layer = (leaf(D, K, G, H), leaf(D, K, H), leaf(D, K, H), leaf(K, G, H, D), mlp,
             (leaf(context, K, H), leaf(context, K, H)))  # fmt: skip
    return [leaf(D, c.vocab_size), *[layer] * c.num_layers]


@functools.cache
def xla_flops(name: str, phase: str) -> float:
    """FLOPs that XLA counts in the compiled chain: one forward, or one with its backward."""
    config, context = config_of(name, phase), T - 1 if phase == "decode" else 0
    weights, x = shapes(config, context), jax.ShapeDtypeStruct((T - context, config.d_model), "f4")
    run = functools.partial(products, config, context=context, last=phase != "train")
    if phase == "train":
        dy = jax.ShapeDtypeStruct((T, config.vocab_size), jnp.float32)

        def run(weights, x, dy):
            forward = functools.partial(products, config, context=context, last=False)
            y, back = jax.vjp(lambda *args: forward(*args)[1], weights, x)
            return y, back(dy)

        return jax.jit(run).lower(weights, x, dy).compile().cost_analysis()["flops"]
    return jax.jit(run).lower(weights, x).compile().cost_analysis()["flops"]


def agrees(counted: float, name: str, phase: str) -> bool:
    """XLA also counts gates and, backward, the sums of what queries leave for the same key."""
    return abs(counted / xla_flops(name, phase) - 1) < (0.04 if phase == "train" else 0.01)


def counted(config: ModelConfig, phase: str) -> float:
    ops = operations(config, phase=phase, batch=1, seq_len=T)
    return sum(op.flops for op in ops if op.kind in ("matmul", "attention"))


FORWARD = ("smollm2", "qwen3", "gemma3", "mistral", "mixtral")
CASES = [*((name, phase) for name in FORWARD for phase in ("prefill", "decode")),
         ("qwen3", "train"), ("mixtral", "train")]  # fmt: skip


@pytest.mark.parametrize(("name", "phase"), CASES)
def test_flops_are_those_xla_counts(name, phase):
    assert agrees(counted(config_of(name, phase), phase), name, phase)


def all_experts(config: ModelConfig) -> ModelConfig:
    E = config.experts.num_experts
    return config.replace(experts=dataclasses.replace(config.experts, top_k=E))


def more_pairs(config: ModelConfig, pairs: int) -> float:
    c = config
    return counted(c, "prefill") + 4 * c.num_heads * c.head_dim * c.num_layers * pairs


def more_logits(config: ModelConfig) -> float:
    return counted(config, "prefill") + 2 * (T - 1) * config.d_model * config.vocab_size


WRONG = {  # what one gets wrong: (family, phase, the wrong count)
    "a multiply-add as one": ("qwen3", "prefill", lambda c: counted(c, "prefill") / 2),
    "keys as many as queries": ("qwen3", "decode", lambda c: counted(
        c.replace(num_kv_heads=c.num_heads), "decode")),
    "causality forgotten": ("qwen3", "prefill", lambda c: more_pairs(c, T * (T - 1) // 2)),
    "windows forgotten": ("mistral", "prefill", lambda c: counted(
        c.replace(windows=None), "prefill")),
    "backward as one forward": ("qwen3", "train", lambda c: counted(c, "train") * 2 / 3),
    "all experts": ("mixtral", "decode", lambda c: counted(all_experts(c), "decode")),
    "logits of all positions": ("smollm2", "prefill", more_logits),
}  # fmt: skip


@pytest.mark.parametrize("mistake", WRONG)
def test_wrong_counts_are_rejected(mistake):
    name, phase, wrong = WRONG[mistake]
    config = config_of(name, phase)
    assert agrees(counted(config, phase), name, phase)
    assert not agrees(wrong(config), name, phase)


def test_train_flops_per_token_by_hand():
    """Llama 3 8B at 8,192 tokens: 7,504,658,432 parameters in matrix products, by hand."""
    layer = 4096 * (4096 + 2 * 1024) + 4096 * 4096 + 3 * 4096 * 14_336
    matmul = 32 * layer + 128_256 * 4096
    assert matmul == 7_504_658_432
    attention = 32 * 4 * 4096 * (8193 / 2)
    got = counts.train_flops_per_token(PRESETS["llama-3.1-8b"], 8192)
    assert got == pytest.approx(3 * (2 * matmul + attention), rel=1e-12)


@pytest.mark.parametrize("name", FAMILIES)
def test_train_flops_per_token_is_of_a_step(name):
    config = FAMILIES[name]
    assert counts.train_flops_per_token(config, T) * T == pytest.approx(counted(config, "train"))


@pytest.mark.parametrize("name", [n for n, c in FAMILIES.items() if c.experts is None])
def test_decode_reads_each_weight_once(name):
    """What does not grow with the batch is the weights: all but an embedding that is looked up."""
    config = FAMILIES[name]

    def read(batch: int) -> int:
        ops = operations(config, phase="decode", batch=batch, seq_len=T, dtype="float32")
        return sum(op.bytes_read for op in ops)

    looked_up = 0 if config.tie_embeddings else config.vocab_size * config.d_model
    assert 2 * read(1) - read(2) == 4 * (counts.num_params(config) - looked_up)


def test_decode_reads_the_cache_once():
    config = FAMILIES["qwen3"]

    def read(seq_len: int) -> int:
        ops = operations(config, phase="decode", batch=3, seq_len=seq_len, dtype="bfloat16")
        return sum(op.bytes_read for op in ops)

    per_token = counts.kv_bytes_per_token(config, "bfloat16")
    assert read(101) - read(100) == 3 * per_token
    assert per_token == 2 * 4 * 2 * 8 * 2  # k and v, L, K, H, bytes
    assert per_token != 2 * 4 * 6 * 8 * 2  # were it the query heads


def test_decode_of_a_windowed_model_stops_growing():
    config = FAMILIES["mistral"]
    first, second = (
        operations(config, phase="decode", batch=1, seq_len=n) for n in (50, 100)
    )  # fmt: skip
    assert first == second
    assert operations(config, phase="decode", batch=1, seq_len=3) != first


@pytest.mark.parametrize("tokens", [1, 2, 1000])
def test_experts_read_are_those_that_tokens_go_to(tokens):
    config = PRESETS["qwen3-30b-a3b"]
    ops = operations(config, phase="decode", batch=tokens, seq_len=64)
    (down,) = (op for op in ops if op.name == "experts down")
    rows = 2 * 48 * tokens * 8 * 768
    experts = (down.bytes_read - rows) / (2 * 48 * 768 * 2048)
    want = {1: 8, 2: 15.5, 1000: 128}[tokens]
    assert experts == pytest.approx(want, rel=1e-6)


@given(st.integers(1, 60), st.integers(0, 60), st.none() | st.integers(1, 70))
def test_pairs_are_those_of_the_mask(new, context, window):
    seq_len = context + new
    mask = sum(k <= q and (window is None or q - k < window)
               for q in range(context, seq_len) for k in range(seq_len))  # fmt: skip
    assert counts.pairs(seq_len, context, window) == mask


def test_windowed_and_full_layers_are_told_apart():
    ops = operations(FAMILIES["gemma3"], phase="prefill", batch=1, seq_len=T)
    layers = {op.name: op.layers for op in ops if op.kind == "attention"}
    assert layers == {"attention, window 5": 3, "attention": 1}


@pytest.mark.parametrize(
    ("wrong", "fix"),
    [
        ({"phase": "serve"}, "prefill, decode, train"),
        ({"dtype": "fp16"}, "float16"),
        ({"batch": 0}, "at least 1"),
        ({"context": 8}, "seq_len - 1"),
        ({"phase": "train", "context": 2}, "choose 0"),
    ],
)
def test_impossible_requests_name_the_fix(wrong, fix):
    asked = {"phase": "prefill", "batch": 1, "seq_len": 8} | wrong
    with pytest.raises(UserError, match=fix):
        operations(FAMILIES["llama"], **asked)
