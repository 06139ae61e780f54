"""Runs by reward from a folder's view: begin or resume, step, record, save, end.

All four loops are one here: `step()` gives metrics and, where the host saw it, the experience. What
a run is when it is stopped, by Ctrl-C or by SIGKILL, it is again when it is resumed: a checkpoint
has the trainer's state and, of live runs and replays, the buffer, work under way and the place in
the schedule. The bits are those of a run that was not stopped, for all but live ones, which go on
in another order and record it.

    python -m jaxinfra align grpo --task spell_backward --loop live --system.max-staleness 1
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from align import text_tasks
from align.array_rewards import GraphReward
from align.checkpoint import RunCheckpoints
from align.config import RLConfig
from align.host_loop import HostLoop, JitRollouts
from align.online_commands import WARM, OnlineConfig
from align.packing import rows_of
from align.records import Recorder
from align.rewards import Scorer
from align.step import Problems, Reward, RLState, create, make_step
from align.system import Live, Replay, System
from align.system.schedule import read
from align.tasks import STOP, Task, find
from align.warm_start import make_warm_start
from jaxinfra.errors import UserError
from jaxinfra.loading import Model, load
from jaxinfra.model import params as P
from jaxinfra.model.config import ModelConfig
from jaxinfra.model.params import Params
from jaxinfra.train.metrics import MetricsLog
from jaxinfra.train.signals import stop_asked
from jaxinfra.weights import safetensors
from jaxinfra.weights.open import load_weights

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Setting:
    """What a run is about: problems, how answers are scored and shown, policy and algorithm."""

    problems: Problems
    reward: Reward | None
    """In the graph; None where it is of text."""
    scorer: Callable[[], Scorer]
    """Of the host's loops."""
    decode: Callable[[Sequence[int]], str]
    model: ModelConfig
    config: RLConfig
    dtype: Any
    finetuned: Model | None = None


def setting(config: OnlineConfig) -> Setting:
    """The task's problems and a model that they fit."""
    if config.finetune is not None:
        return _in_words(config, load(config.finetune))
    task = find(config.task)
    if config.easy:
        task = task.easy()
    problems = task.problems(config.problems, seed=config.seed)
    rl = dataclasses.replace(config.rl, stop_id=STOP, max_new_tokens=_room(problems))
    if config.policy is None:
        model = tiny(task, problems["prompts"].shape[1] + rl.max_new_tokens)
    else:
        model, _ = load_weights(config.policy, jnp.float32)
        if model.vocab_size != task.vocab_size:
            raise UserError(
                f"{config.method}: {config.policy} has {model.vocab_size} tokens and the task "
                f"{task.vocab_size}; give a policy that was trained on it"
            )
    return Setting(
        problems, task.reward, lambda: GraphReward(task.reward, name=task.name), task.decode,
        model, rl, jnp.dtype(config.dtype),
    )  # fmt: skip


def _in_words(config: OnlineConfig, start: Model) -> Setting:
    """The task in words, for a model that speaks."""
    task, tokenizer = text_tasks.find(config.task), start.tokenizer
    if config.easy:
        task = task.easy()
    if not tokenizer.eos_ids:
        raise UserError(f"{config.method}: {config.finetune} names no token that ends an answer")
    problems, answers = task.problems(
        config.problems, tokenizer, seed=config.seed, examples=config.examples
    )
    return Setting(
        problems, None, lambda: task.reward(answers, tokenizer), tokenizer.decode, start.config,
        dataclasses.replace(config.rl, stop_id=tokenizer.eos_ids[0]), jnp.dtype(config.dtype),
        start,
    )  # fmt: skip


def tiny(task: Task, room: int) -> ModelConfig:
    """Two layers for a task's alphabet."""
    return ModelConfig(
        family="qwen3", vocab_size=task.vocab_size, num_layers=2, d_model=64, num_heads=4,
        num_kv_heads=2, head_dim=16, d_ff=128, qk_norm=True, tie_embeddings=True, max_seq_len=room,
    )  # fmt: skip


def _room(problems: Mapping[str, Any]) -> int:
    return problems["answer"].shape[1] + 1  # the stop token


def first_params(config: OnlineConfig, at: Setting) -> Params:
    """The policy before its first reward."""
    if at.finetuned is not None:
        return at.finetuned.params
    if config.policy is not None:
        return load_weights(config.policy, jnp.float32)[1]
    begin, learn = jax.random.split(jax.random.key(config.seed))
    params = jax.jit(P.init, static_argnums=1)(begin, at.model)
    if config.warm_steps:
        warm = make_warm_start(at.model, WARM, steps=config.warm_steps, batch=64)
        params, _ = jax.jit(warm)(params, jax.tree.map(jnp.asarray, at.problems), learn)
    return params


class _OneProgram:
    """Steps of one program each."""

    def __init__(self, config: OnlineConfig, at: Setting, state: RLState) -> None:
        assert at.reward is not None
        step = make_step(at.config, at.model, at.reward, steps=config.steps, dtype=at.dtype)
        self._step = jax.jit(step, donate_argnums=0)
        self._problems, self.state = jax.tree.map(jnp.asarray, at.problems), state

    def step(self) -> tuple[dict[str, float], Any]:
        self.state, metrics = self._step(self.state, self._problems)
        return {k: float(v) for k, v in jax.device_get(metrics).items()}, None


class _Host:
    """Steps of the host's loop."""

    def __init__(self, loop: HostLoop, state: RLState) -> None:
        self._loop, self.state = loop, state

    def step(self) -> tuple[dict[str, float], Any]:
        self.state, metrics, experience = self._loop.watched_step(self.state)
        return metrics, experience


def plan(config: OnlineConfig) -> None:
    """Compiles a step and prints what it needs and does."""
    at, console = setting(config), Console()
    rl = at.config
    state = jax.eval_shape(
        lambda: create(rl, P.init(jax.random.key(0), at.model), steps=config.steps)
    )
    reward = at.reward or (lambda r, _: r.stopped)  # text's own costs the device nothing
    step = make_step(rl, at.model, reward, steps=config.steps, dtype=at.dtype)
    problems = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), dict(at.problems))
    memory = jax.jit(step, donate_argnums=0).lower(state, problems).compile().memory_analysis()
    size = lambda tree: sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(tree))  # noqa: E731
    width = at.problems["prompts"].shape[1]
    cache = 2 * at.model.num_layers * rl.answers * (width + rl.max_new_tokens) * at.dtype.itemsize
    rows = [
        ("algorithm", f"{rl.algorithm}: {rl.prompts} prompts x {rl.group_size} answers a step, "
                      f"{rl.epochs} epochs of {rl.minibatches} updates"),
        ("tokens", f"prompts of up to {width}, answers of up to {rl.max_new_tokens}"),
        ("parameters", f"{sum(a.size for a in jax.tree.leaves(P.abstract(at.model))):,}"),
        ("state", f"{size(state) / 1e6:.2f} MB: policy"
                  f"{', critic' * rl.has_critic}{', reference' * rl.has_reference}, moments"),
        ("cache of a rollout",
         f"{cache * at.model.num_kv_heads * at.model.head_dim / 1e6:.2f} MB"),
    ]  # fmt: skip
    if rl.pack:
        count = rl.answers // rl.minibatches
        into = rows_of(rl.pack, count)
        saved = f"{1 - into / count:.0%} of the tokens saved where they fit"
        rows.append(("packed", f"{count} sequences an update in {into} rows, {saved}"))
    if memory is not None:
        peak = memory.temp_size_in_bytes + memory.argument_size_in_bytes
        rows.append(("the step in one program", f"{peak / 1e6:.2f} MB, {config.loop} is asked for"))
    if config.loop in ("live", "replay"):
        how = config.system
        rows.append(("workers", f"{how.workers}, at most {how.max_staleness} steps behind, "
                                f"{how.order} buffer of {how.capacity:,} tokens"))  # fmt: skip
    for name, value in rows:
        console.print(f"{name}: {value}", highlight=False)


def train(config: OnlineConfig, console: Console | None = None) -> RLState:
    """The run in `config.out`; gives its last state.

    Raises UserError where `out` holds a run and `resume` is not set, or the other way round.
    """
    console, out = console or Console(), Path(config.out).expanduser()
    found = next((out / "checkpoints").glob("[0-9]*"), None)
    if config.resume and found is None:
        raise UserError(f"{out}: holds no run to resume; leave --resume out")
    if not config.resume and found is not None:
        raise UserError(f"{out}: holds a run; add --resume to go on, or give another --out")
    at = setting(config)
    out.mkdir(parents=True, exist_ok=True)
    checkpoints = RunCheckpoints(out / "checkpoints", _about(config), keep=config.keep)
    saved: Mapping[str, np.ndarray] | None = None
    if config.resume:
        begin = create(at.config, P.init(jax.random.key(0), at.model), steps=config.steps)
        restored = checkpoints.restore(begin)
        assert restored is not None
        state, saved = restored
    else:
        state = create(at.config, first_params(config, at), seed=config.seed, steps=config.steps)
    try:
        return _run(config, at, out, checkpoints, state, saved, console)
    finally:
        checkpoints.close()


def _run(
    config: OnlineConfig, at: Setting, out: Path, checkpoints: RunCheckpoints, state: RLState,
    saved: Mapping[str, np.ndarray] | None, console: Console,
) -> RLState:  # fmt: skip
    first = int(state.step)
    recorder = None
    if config.records:
        recorder = Recorder(
            out, at.config, at.model, groups=config.records, decode=at.decode, step=first,
            dtype=at.dtype,
        )  # fmt: skip
    runner, system = _runner(config, at, out, state, saved)
    done, last = first, config.steps
    live = runner if config.loop == "live" else contextlib.nullcontext()
    log = MetricsLog(out, first)
    with contextlib.closing(log), stop_asked() as asked, live:
        for done in range(first + 1, last + 1):
            metrics, experience = runner.step()
            state = runner.state if system is None else system.state
            _tell(log, {"step": done, **metrics})
            if recorder is not None:
                recorder.write(state, experience)
            if done % config.checkpoint_every == 0 or done == last or asked:
                checkpoints.save(state, _host_side(system))
            if done % max(1, last // 10) == 0:
                console.print(f"step {done}: reward {metrics.get('reward', float('nan')):.3f}")
            if asked:
                break
    if done < last:
        console.print(f"stopped after step {done} and saved; --resume goes on")
    else:
        _export(out, at, state)
    return state


def _runner(
    config: OnlineConfig, at: Setting, out: Path, state: RLState,
    saved: Mapping[str, np.ndarray] | None,
) -> tuple[Any, System | None]:  # fmt: skip
    """What makes the steps, and the system behind it where there is one."""
    if config.loop == "jit":
        return _OneProgram(config, at, state), None
    workers = config.loop in ("live", "replay")
    chunk = config.system.chunk if workers else 0
    rollouts = JitRollouts(at.config, at.model, chunk=chunk or None, dtype=at.dtype)
    loop = HostLoop(
        at.config, at.model, at.problems, [at.scorer()],
        steps=config.steps, rollouts=rollouts, dtype=at.dtype,
    )  # fmt: skip
    if not workers:
        return _Host(loop, state), None
    system = System(loop, config.system, state, folder=out, saved=saved or None)
    schedule = config.schedule
    return Live(system) if schedule is None else Replay(system, read(schedule)), system


def _host_side(system: System | None) -> dict[str, np.ndarray] | None:
    if system is None:
        return None
    with system.lock:
        return system.saved()


def _tell(log: MetricsLog, row: dict[str, Any]) -> None:
    try:
        log.write(row)
    except UserError as error:
        _log.warning("%s; the run goes on", error)


def _export(out: Path, at: Setting, state: RLState) -> None:
    new = out / ".model.new"
    shutil.rmtree(new, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=out) as words:
        if at.finetuned is not None:
            at.finetuned.tokenizer.save(words)
        safetensors.save(new, state.trained.policy, at.model, tokenizer_from=words)
    shutil.rmtree(out / "model", ignore_errors=True)
    os.replace(new, out / "model")


def _about(config: OnlineConfig) -> dict[str, Any]:
    """What may not change at a resume."""
    run = dataclasses.asdict(config)
    for name in ("out", "resume", "checkpoint_every", "keep", "records", "dry_run", "schedule"):
        del run[name]
    return run | {"policy": str(config.policy), "method": config.method}
