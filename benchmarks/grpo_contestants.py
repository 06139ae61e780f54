"""The contestants of `benchmarks.grpo_vs_trl`, each a process of its own.

    python -m benchmarks.grpo_contestants "SHAPE|NAME|FOLDER"

FOLDER holds the weights of each shape, which the name `weights` writes.
"""

from __future__ import annotations

import os
import queue
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.turns import answer

PROMPTS = {"smollm2-135m": 16, "qwen3-0.6b": 8, "tiny": 2}
GROUP, PROMPT, NEW = 8, 64, 256
MEAN_LENGTH = 100  # tokens, where EOS is on
RATE = 1e-6
STEPS, SECONDS = 5, 4.0  # the one that comes first ends a phase of a turn: no EOS, then EOS
OURS = "jaxinfra"
GO = "go"  # a file: nobody else touches the device while XLA tries which kernels are fastest
TRL: dict[str, dict[str, Any]] = {
    "TRL, generate": {},
    "TRL, continuous batching": {
        "use_transformers_continuous_batching": True,
        "transformers_continuous_batching_config": {"max_memory_percent": 0.2},
    },
}


class Phases:
    """The steps of one turn, some without EOS and then some with; the first one is dropped."""

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        self.seconds: dict[str, list[float]] = {"off": [], "on": []}
        self.tokens: dict[str, list[float]] = {"off": [], "on": []}
        self._first = True

    @property
    def stop(self) -> str | None:
        """The phase of the next step, None at the turn's end."""
        for phase, seconds in self.seconds.items():
            if len(seconds) < STEPS and sum(seconds) < SECONDS:
                return phase
        return None

    def add(self, phase: str, seconds: float, tokens: float) -> None:
        """Counts a step. A turn's first one also takes back memory given up after the last turn."""
        if not self._first:
            self.seconds[phase].append(seconds)
            self.tokens[phase].append(tokens)
        self._first = False

    def result(self, **more: Any) -> dict[str, Any]:
        return {"seconds": self.seconds, "tokens": self.tokens} | more


def ids_of_prompts(vocab_size: int, rows: int) -> list[list[int]]:
    """The same random tokens for all; none is special."""
    import numpy as np

    low = min(1000, vocab_size // 2)
    high = min(vocab_size - 1, 100_000)
    return np.random.default_rng(0).integers(low, high, (rows, PROMPT)).tolist()


def weights(shape: str, folder: Path) -> None:
    """Writes random weights with which a random answer has about MEAN_LENGTH tokens.

    Embeddings get a part in common, and hidden states with them, which alone would hardly have one:
    it shifts all logits alike. The stop token's row is a length of the mean state's direction
    instead, found so that answers of random tokens, which such weights draw, end as wanted.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np

    from jaxinfra.model import transformer
    from jaxinfra.model.params import init
    from jaxinfra.model.presets import PRESETS
    from jaxinfra.weights import safetensors

    config = PRESETS[shape]
    params = jax.jit(init, static_argnums=(1, 2))(jax.random.key(0), config, jnp.bfloat16)
    same = jax.random.normal(jax.random.key(1), (config.d_model,))
    same *= 2 * jnp.linalg.norm(params.embed, axis=1).mean() / jnp.linalg.norm(same)
    params = params.replace(embed=params.embed + same.astype(jnp.bfloat16))

    @jax.jit
    def states(params: Any, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        x = transformer.hidden(params, config, tokens)[0][:, PROMPT - 1 :]
        others = jax.nn.logsumexp(transformer.head(params, config, x), axis=-1)
        return x.astype(jnp.float32), others

    rows = np.random.default_rng(1).integers(0, config.vocab_size, (16, PROMPT + NEW - 1))
    x, others = map(np.asarray, states(params, jnp.asarray(rows, jnp.int32)))
    middle = x[:8].mean(axis=(0, 1))
    direction = middle / np.linalg.norm(middle)
    x, others = x[8:], others[8:]  # a direction fits the states best that it was made of

    def length(scale: float) -> float:
        ends = np.exp(-np.logaddexp(0, others - scale * (x @ direction)))
        return float(np.mean(1 + np.sum(np.cumprod(1 - ends[:, :-1], axis=1), axis=1)))

    low, high = 0.0, 100.0
    for _ in range(40):
        scale = (low + high) / 2
        low, high = (low, scale) if length(scale) < MEAN_LENGTH else (scale, high)
    row = jnp.asarray(low * direction, params.embed.dtype)
    embed = params.embed.at[stop_of(config)].set(row)
    safetensors.save(folder, params.replace(embed=embed), config)


def stop_of(config: Any) -> int:
    """The stop token of a shape."""
    return config.eos_ids[0] if config.eos_ids else config.vocab_size - 1


def ours(shape: str, folder: Path) -> None:
    """Turns of this project: the whole step is one program, compiled before the first turn.

    A second program, the rollout alone, compiles while the others get ready.
    """
    import dataclasses

    import jax
    import jax.numpy as jnp

    from align.config import RLConfig
    from align.rollout import Rollout
    from align.step import Problems, RLState, batch_of, create, make_parts, make_step
    from jaxinfra.model.presets import PRESETS
    from jaxinfra.train.config import OptimizerConfig
    from jaxinfra.weights.open import load_weights

    model = PRESETS[shape]
    rate = OptimizerConfig(learning_rate=RATE, warmup_steps=0, final_fraction=1.0, weight_decay=0.0)
    config = RLConfig(
        prompts=PROMPTS[shape], group_size=GROUP, max_new_tokens=NEW, optimizer=rate,
        remat="matmuls",
    )  # fmt: skip

    def reward(r: Rollout, _: Problems) -> jax.Array:
        return jnp.sum(r.answer % 2 * r.mask, axis=1) / jnp.maximum(jnp.sum(r.mask, axis=1), 1.0)

    def told_to_stop(at: jax.Array) -> RLConfig:
        traced: Any = at  # so that both phases are one program
        return dataclasses.replace(config, stop_id=traced)

    def one(state: RLState, problems: Problems, stop: jax.Array) -> tuple[RLState, Any]:
        step = make_step(told_to_stop(stop), model, reward, dtype=jnp.bfloat16)
        return step(state, problems)

    def drawn(state: RLState, problems: Problems, stop: jax.Array) -> jax.Array:
        parts = make_parts(told_to_stop(stop), model, dtype=jnp.bfloat16)
        return parts.rollout(state, batch_of(problems, config, state)).tokens

    params = load_weights(folder, jnp.bfloat16)[1]
    state = jax.jit(lambda p: create(config, p))(params)
    prompts = jnp.asarray(ids_of_prompts(model.vocab_size, 512), jnp.int32)
    problems = {"prompts": prompts, "lengths": jnp.full((512,), PROMPT, jnp.int32)}
    stops = {"off": jnp.int32(-1), "on": jnp.int32(stop_of(model))}
    clock = [time.perf_counter()]
    lowered = jax.jit(one, donate_argnums=0).lower(state, problems, stops["off"])
    clock.append(time.perf_counter())
    step = lowered.compile()
    clock.append(time.perf_counter())
    traced, compiled = clock[1] - clock[0], clock[2] - clock[1]
    phases, pool = Phases(), ThreadPoolExecutor()
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), state)
    drawing = pool.submit(lambda: jax.jit(drawn).lower(shapes, problems, stops["off"]).compile())

    def rollout_seconds(stop: jax.Array) -> float:
        start = time.perf_counter()
        jax.block_until_ready(drawing.result()(state, problems, stop))
        return time.perf_counter() - start

    def turn() -> dict:
        nonlocal state
        phases.begin()
        mismatch = []
        while phase := phases.stop:
            start = time.perf_counter()
            state, metrics = step(state, problems, stops[phase])
            told = jax.device_get(metrics)
            seconds = time.perf_counter() - start
            phases.add(phase, seconds, float(told["completions/mean_length"]))
            mismatch.append(float(told["mismatch_kl"]))
        drawing.result()
        alone = {phase: rollout_seconds(stop) for phase, stop in stops.items()}
        peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
        return phases.result(
            peak_bytes=peak, mismatch_kl=mismatch, compile_s=compiled, trace_s=traced,
            rollout_s=alone,
        )  # fmt: skip

    serve(turn, ready=lambda: {"ready": True, "trace_s": traced, "compile_s": compiled})


def theirs(shape: str, folder: Path, how: str) -> None:
    """Turns of TRL's trainer, whose loop waits between two of them."""
    import datasets
    import torch
    import transformers
    import trl

    from jaxinfra.model.presets import PRESETS

    model_config = PRESETS[shape]
    answers, stop = PROMPTS[shape] * GROUP, stop_of(model_config)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, attn_implementation="sdpa"
    )
    while not (folder.parent / GO).exists():
        time.sleep(0.1)
    model.to(device)
    model.generation_config.eos_token_id = model.config.eos_token_id = stop
    rows = ids_of_prompts(model_config.vocab_size, 512)
    asked: queue.Queue[bool] = queue.Queue()
    told: queue.Queue[dict] = queue.Queue()
    phases, cuda = Phases(), torch.cuda

    def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [sum(token % 2 for token in ids) / max(len(ids), 1) for ids in completion_ids]

    table = datasets.table.InMemoryTable.from_pydict(
        {"prompt": [" ".join(map(str, row)) for row in rows]}
    )
    trainer = trl.GRPOTrainer(
        model=model,
        reward_funcs=reward,
        args=trl.GRPOConfig(
            output_dir=tempfile.mkdtemp(), use_cpu=device == "cpu", max_steps=10_000, bf16=False,
            per_device_train_batch_size=answers // 2, gradient_accumulation_steps=2,
            num_generations=GROUP, max_completion_length=NEW, learning_rate=RATE,
            lr_scheduler_type="constant", gradient_checkpointing=False, report_to=[],
            logging_strategy="no", save_strategy="no", disable_tqdm=True, **TRL[how],
        ),
        train_dataset=datasets.Dataset(table, fingerprint="prompts"),
        processing_class=words(model_config.vocab_size, stop),
    )  # fmt: skip

    def set_stop(phase: str) -> None:
        ids = [stop] if phase == "on" else [-1]  # the id that no token has
        trainer.eos_token_ids = trainer.generation_config.eos_token_id = ids
        trainer.generation_kwargs["eos_token_id"] = ids

    def turn() -> dict:
        asked.put(True)
        return told.get()

    class TakeTurns(transformers.TrainerCallback):
        waiting, warm = False, False

        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            if self.waiting:
                asked.get()
                self.waiting = False
                phases.begin()
                if cuda.is_available():
                    cuda.reset_peak_memory_stats()
            self.phase = phases.stop or "off"
            set_stop(self.phase)
            self.start = _synchronised(cuda)

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            seconds = _synchronised(cuda) - self.start
            length = trainer._metrics["train"]["completions/mean_length"][-1]
            if self.warm:
                phases.add(self.phase, seconds, float(length))
            else:  # the step before the first turn, whose kernels and graphs are made
                threading.Thread(target=serve, args=(turn,), daemon=True).start()
            if not self.warm or phases.stop is None:
                peak = cuda.max_memory_allocated() if cuda.is_available() else None
                cuda.empty_cache()
                if self.warm:
                    told.put(phases.result(peak_bytes=peak))
                self.waiting = self.warm = True

    trainer.add_callback(TakeTurns())
    trainer.train()


def serve(turn: Callable[[], dict], ready: Callable[[], dict] = lambda: {"ready": True}) -> None:
    """Answers the first line when all is compiled, and every other by a turn."""
    calls = iter([ready])
    sys.stdout = sys.__stdout__
    answer(lambda: next(calls, turn)())
    os._exit(0)


def _synchronised(cuda: Any) -> float:
    if cuda.is_available():
        cuda.synchronize()
    return time.perf_counter()


def words(size: int, stop: int) -> Any:
    """A tokenizer whose tokens are the numbers of their ids, but for padding, 0, and the stop."""
    import tokenizers
    import transformers

    names = [str(i) for i in range(size)]
    names[0], names[stop] = "<pad>", "<stop>"
    ids = {name: i for i, name in enumerate(names)}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token="<pad>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<stop>"
    )


def contestant(told: str) -> None:
    """What a process of its own does: "SHAPE|NAME|FOLDER"."""
    shape, name, folder = told.split("|")
    sys.stdout = sys.stderr  # the other side reads answers alone
    place = Path(folder) / shape
    if name == "weights":
        weights(shape, place)
    elif name == OURS:
        ours(shape, place)
    else:
        theirs(shape, place, name)


if __name__ == "__main__":
    contestant(sys.argv[-1])
