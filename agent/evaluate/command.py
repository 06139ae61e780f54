"""`jaxinfra agent eval`: tasks of a suite, tried and shown as a table."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import anyio
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from agent.evaluate.runner import INSTRUCTIONS, Task, Try, evaluate, summary
from agent.evaluate.suite import KINDS, suite
from agent.limits import Limits
from agent.policy import Policy
from agent.spec import Agent
from agent.terminal import open_model
from jaxinfra.errors import UserError
from jaxinfra.files import write_file

if TYPE_CHECKING:
    from agent import commands

Tasks = Callable[[int], Sequence[Task]]


def evaluate_suite(command: commands.Eval) -> None:
    """Tries the suite and prints a table of it."""
    if min(command.seeds, command.repeats, command.difficulty, command.width) < 1:
        raise UserError("agent eval: give 1 or more of seeds, repeats, difficulty and width")
    # Nobody sits there to approve, so what would be asked is refused, and the injection has failed.
    agent = Agent("solver", open_model(command.who), INSTRUCTIONS, policy=Policy(tainted="deny"),
                  limits=Limits(turns=command.who.turns))  # fmt: skip
    console = Console()
    with contextlib.ExitStack() as stack:
        tasks = _tasks(command, stack)
        bar = stack.enter_context(Progress(console=console))
        kinds = len(command.names) or len(KINDS)
        done = bar.add_task("tries", total=kinds * command.seeds * command.repeats)

        async def main() -> list[Try]:
            return await evaluate(
                lambda task: agent, tasks, repeats=command.repeats, width=command.width,
                progress=lambda one: bar.advance(done),
            )  # fmt: skip

        tries = anyio.run(main)
    console.print(_table(tries, command.repeats))
    if command.out is not None:
        lines = [json.dumps(dataclasses.asdict(one)) for one in tries]
        write_file(command.out, ("\n".join(lines) + "\n").encode())


def _tasks(command: commands.Eval, stack: contextlib.ExitStack) -> Tasks:
    if command.suite == "own":
        names = "".join(command.names) or "".join(KINDS)
        if unknown := sorted(set(names) - set(KINDS)):
            raise UserError(f"agent eval: no kind {unknown[0]!r}; there are {''.join(KINDS)}")
        return lambda repeat: suite(
            range(command.seeds), difficulty=command.difficulty, kinds=names
        )
    if not command.names:
        raise UserError(f"agent eval: --suite {command.suite} needs --names; see --help")
    if command.suite == "bfcl":
        from agent.evaluate.bfcl import BFCL

        of_name = stack.enter_context(BFCL()).tasks
        return lambda repeat: [t for name in command.names for t in of_name(name, command.seeds)]
    from agent.evaluate.gym import gym_tasks

    seeds = range(command.seeds)
    return lambda repeat: [t for name in command.names for t in gym_tasks(name, seeds)]


def _table(tries: Sequence[Try], repeats: int) -> Table:
    table = Table("kind", "success, 95 %", f"pass^{repeats}", "malformed", "arguments",
                  "recovered", "tokens", "s", "cost", box=None)  # fmt: skip
    for line in summary(tries, repeats):
        table.add_row(
            line.kind, f"{line.success:.2f} {line.low:.2f}-{line.high:.2f}",
            *("-" if math.isnan(share) else f"{share:.2f}" for share in (
                line.pass_k, line.malformed, line.arguments, line.recovery)),
            f"{line.tokens:.0f}", f"{line.seconds:.1f}", f"{line.cost:.3g}",
        )  # fmt: skip
    return table
