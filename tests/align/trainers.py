"""A byte model small enough for tests of trainers, and a fit of it by their parts."""

import functools
import json
import tempfile

import jax
import jax.numpy as jnp
import numpy as np

from align.preferences import rows
from align.trainer_losses import make_objective
from align.trainer_mesh import place
from align.trainer_step import begin, make_step, merged
from jaxinfra.model import params as P
from jaxinfra.model import transformer
from jaxinfra.model.config import ModelConfig
from jaxinfra.text.tokenizer import Tokenizer
from jaxinfra.train.config import OptimizerConfig
from jaxinfra.train.optimizer import make_optimizer, schedule
from jaxinfra.train.step import TrainState
from jaxinfra.weights import safetensors

MODEL = ModelConfig(
    family="qwen3", vocab_size=320, num_layers=1, d_model=16, num_heads=2, num_kv_heads=1,
    head_dim=8, d_ff=24, qk_norm=True, tie_embeddings=True, max_seq_len=32,
)  # fmt: skip
TOKENIZER = Tokenizer.byte_level()
FAST = OptimizerConfig(
    learning_rate=2e-2, warmup_steps=2, weight_decay=0.0, final_fraction=0.0, clip_norm=10.0
)


@functools.cache
def params(model=MODEL):
    with jax.ensure_compile_time_eval():
        drawn = P.init(jax.random.key(3), model)
        return jax.tree.map(lambda leaf: leaf * (10.0 if leaf.ndim > 1 else 1.0), drawn)


def model_file(folder):
    """A config.json of MODEL, as --model takes it."""
    file = folder / "config.json"
    file.write_text(json.dumps(MODEL.to_hf()))
    return str(file)


def model_folder(folder):
    """params() and their tokenizer, as --finetune takes them."""
    with tempfile.TemporaryDirectory() as words:
        TOKENIZER.save(words)
        safetensors.save(folder / "start", params(), MODEL, tokenizer_from=words)
    return str(folder / "start")


def jsonl(folder, records, name="data.jsonl"):
    file = folder / name
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(file)


def built(config, model=MODEL):
    """(rows, objective, a batch of all rows with the reference's part)."""
    found = rows.build(config, TOKENIZER)
    objective = make_objective(config, model, found.beliefs)
    batch = dict(found.arrays)
    if objective.reference is not None:
        of_batch = jax.jit(objective.reference)
        batch["reference"] = np.asarray(of_batch(params(model), batch))
    return found, objective, batch


def start(config, model=MODEL):
    """The first state, what is frozen, and the step, compiled; on the config's mesh."""
    _, objective, batch = built(config, model)
    optimizer = make_optimizer(config.optimizer, config.steps)
    trained, frozen = begin(config, model, jax.tree.map(jnp.array, params(model)))
    state, where = TrainState.create(trained, optimizer), None
    if placement := place(config, model):
        state = jax.device_put(state, placement.state(state, optimizer))
        frozen = None if frozen is None else jax.device_put(frozen, placement.frozen)
        where = placement.rows
    rate = schedule(config.optimizer, config.steps)
    step = make_step(config, objective, optimizer, rate, jnp.float32, where)
    kept = jax.jit(step)  # inside, the state is not donated: tests begin from it again
    return state, frozen, lambda state, batch: kept(state, batch, frozen), batch


def fit(config):
    """(the model after all steps on the whole data, metrics of the first and the last step)."""
    state, frozen, step, batch = start(config)
    first = metrics = None
    for _ in range(config.steps):
        state, metrics = step(state, batch)
        first = metrics if first is None else first
    return merged(state.params, frozen, config.lora), first, metrics


def logp(model, prompt: str, answer: str, belief: str = "") -> float:
    """Of an answer and the end after it, by a forward pass of that row alone."""
    before = TOKENIZER.encode(prompt) + list(belief.encode())
    ids = before + list(answer.encode()) + list(TOKENIZER.eos_ids)
    logits = transformer.forward(model, MODEL, jnp.asarray([ids]))[0]
    each = jax.nn.log_softmax(logits, axis=-1)
    return float(sum(each[i - 1, ids[i]] for i in range(len(before), len(ids))))


def logps(model, answers, prompt="?", belief=""):
    return np.asarray([logp(model, prompt, answer, belief) for answer in answers])
