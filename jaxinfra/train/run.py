"""The life of a run, whatever it trains: its place, steps, metrics, checkpoints, resume, its end.

The device always has a step to do: batches are made two ahead in another thread, and the metrics of
a step are fetched when the next one but one has been handed over. Ctrl-C and SIGTERM end the step,
save and say how to go on; a resumed run gives the bits of one that was never stopped.
"""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from jaxinfra.errors import UserError
from jaxinfra.train.checkpoint import Checkpoints
from jaxinfra.train.metrics import Meter, MetricsLog
from jaxinfra.train.signals import stop_asked
from jaxinfra.train.step import TrainState

_AHEAD = 2  # batches ready, and steps handed over to the device and not looked at yet


class Settings(Protocol):
    """What a run's configuration has, among other things."""

    @property
    def out(self) -> Path: ...
    @property
    def steps(self) -> int: ...
    @property
    def checkpoint_every(self) -> int: ...
    @property
    def resume(self) -> bool: ...


class Batches(Protocol):
    """What a run's data can do: give batch number `step`, whatever came before it."""

    def batch_at(self, step: int) -> dict[str, Any]: ...


class Run:
    """A run in `config.out`. A subclass makes data, checkpoints, state, step and meter.

    Its metrics have loss, tokens and skipped; what else is in them is logged too.
    """

    config: Any  # Settings
    data: Any  # Batches
    checkpoints: Checkpoints
    state: TrainState
    step: Callable[[TrainState, Any], tuple[TrainState, dict[str, jax.Array]]]
    meter: Meter

    def __init__(self, config: Settings, console: Console, on_row: Callable) -> None:
        """Raises UserError where there is no run to resume, or one that would be overwritten."""
        self.config, self.console, self.on_row = config, console, on_row
        self.out = Path(config.out).expanduser()
        run = any(path.name.isdigit() for path in (self.out / "checkpoints").glob("*"))
        if config.resume:
            if not run:
                raise UserError(f"{self.out}: holds no run to resume; leave --resume out")
        elif run or (self.out / "model").exists():
            what = "a run" if run else "a folder `model`, which this run would replace"
            raise UserError(
                f"{self.out}: holds {what}; add --resume to go on with a run, or give another --out"
            )

    def restored(self, like: TrainState) -> TrainState:
        """The newest state that was saved; UserError where there is none to go on with."""
        restored = self.checkpoints.restore(like)
        if restored is None:
            raise UserError(f"{self.out}: holds no checkpoint to resume from; begin anew")
        if (step := int(restored.step)) > self.config.steps:
            raise UserError(f"{self.out}: is at step {step}; give --steps {step} or more")
        return restored

    def train(self) -> Path | None:
        """Goes through all steps; gives the exported model, or None where the run was stopped."""
        self.first = int(self.state.step)
        self.log = MetricsLog(self.out, self.first)
        self.pending: collections.deque[tuple[int, dict]] = collections.deque()
        self.introduce()
        try:
            with stop_asked() as asked:
                done = self._steps(asked)
                self.checkpoints.finish()
                if done not in self.checkpoints.steps():
                    self.checkpoints.save(self.state)
                self.checkpoints.finish()
        finally:
            self.checkpoints.close()
            self.log.close()
        model = self.export() if done >= self.config.steps else None
        if model is None:
            end = f"stopped after step {done} and saved; the same command with --resume goes on"
        else:
            end = f"the model is in {model}"
        if skipped := int(self.state.skipped):
            end = f"{skipped} of {done} steps were not finite and not applied; {end}"
        self.console.print(end, highlight=False)
        return model

    def introduce(self) -> None:
        """Says what is about to be trained."""

    def now_and_then(self, done: int) -> dict[str, Any]:
        """What is due after step `done` besides training, as metrics of that step."""
        return {}

    def export(self) -> Path:
        """Writes what was trained, after the last step; every subclass has its own."""
        raise NotImplementedError

    def _steps(self, asked: Any) -> int:
        """Trains until the last step or until `asked` holds something; gives the steps done."""
        first, last, done = self.first, self.config.steps, self.first
        with _progress(self.console, first, last) as self.progress:
            for done, batch in enumerate(_ahead(self.data, first, last), first + 1):
                self.state, metrics = self.step(self.state, batch)
                self.pending.append((done, metrics))
                self._look(_AHEAD)
                if more := self.now_and_then(done):
                    self._look(0, more)
                    self.meter.restart()
                if done == first + 1:  # it was compiled in that time
                    self._look(0)
                    self.meter.restart()
                if done % self.config.checkpoint_every == 0:
                    self.checkpoints.save(self.state)
                if asked:
                    break
            self._look(0)
        return done

    def _look(self, keep: int, more: dict[str, Any] | None = None) -> None:
        """Fetches metrics of all steps handed over but the last `keep`; `more` is of the last."""
        while len(self.pending) > keep:
            step, metrics = self.pending.popleft()
            row = {"step": step, **{k: v.item() for k, v in jax.device_get(metrics).items()}}
            row["tokens"] = int(row["tokens"])
            row |= self.meter.add(row["tokens"])
            if more and not self.pending:
                row |= more
            self.log.write(row)
            self.on_row(row)
            self.progress(row)


def dtype_of(name: str) -> Any:
    """The dtype that "auto", "bfloat16" or "float32" names here."""
    if name == "auto":
        name = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return jnp.dtype(name)


def due(done: int, every: int, last: int) -> bool:
    """Whether what happens every so many steps, and after the last, happens after step `done`."""
    return bool(every) and (done % every == 0 or done == last)


def _ahead(data: Batches, first: int, last: int) -> Iterator[dict[str, jax.Array]]:
    """Batches first, ..., last - 1 on the device, made ahead of their use."""
    with ThreadPoolExecutor(1) as pool:
        made: collections.deque = collections.deque()
        for step in range(first, last):
            made.append(pool.submit(lambda step=step: jax.device_put(data.batch_at(step))))
            if len(made) > _AHEAD:
                yield made.popleft().result()
        while made:
            yield made.popleft().result()


@contextlib.contextmanager
def _progress(console: Console, first: int, last: int) -> Iterator[Callable[[dict], None]]:
    """A bar that each row of metrics moves."""
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[told]}"))
    with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
        task = progress.add_task("", total=last, completed=first, told="compiling")

        def show(row: dict[str, Any]) -> None:
            told = f"loss {row['loss']:.3f}"
            if "tokens_per_s" in row:
                told += f"  {row['tokens_per_s']:,.0f} tokens/s"
            if "mfu" in row:
                told += f"  {row['mfu']:.0%} MFU"
            if row["skipped"]:
                told += f"  {row['skipped']} skipped"
            progress.update(task, completed=row["step"], told=told)

        yield show
