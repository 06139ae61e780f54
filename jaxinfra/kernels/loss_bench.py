"""A head's losses on one Hopper GPU: the kernels beside XLA by blocks, XLA plain, and torch.

Contestants take turns in one process, by device time, on normal bfloat16 data: first schedules of
either kernel, then log-probabilities with entropies and the cross-entropy, forward and with the
gradient, by the best schedules. Each result is first held to the reference's; one that is wrong, or
fails, is named and left out. Memory is what XLA asks for beside arguments and results.

    python -m jaxinfra.kernels.loss_bench [--out benchmarks/results]
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import tyro
from jax import lax
from rich.console import Console
from rich.table import Table

from jaxinfra.errors import UserError
from jaxinfra.hardware.detect import detect
from jaxinfra.kernels import loss_bench_torch
from jaxinfra.measure import Entry, environment, write
from jaxinfra.measure.compare import ratio_interval
from jaxinfra.measure.structure import Memory, memory
from jaxinfra.measure.turns import device_turns
from pallas_kernels.cross_entropy import (
    blocks,
    chunked,
    linear_cross_entropy,
    mosaic_gpu,
    reference,
    supported,
    token_logps,
)
from pallas_kernels.cross_entropy.blocks import Rule
from pallas_kernels.cross_entropy.mosaic_gpu import Schedule
from pallas_kernels.cross_entropy.mosaic_gpu_tiles import Config

M, V = 8192, 151_936
WIDTHS = (2048, 1024)
ROWS = 2048  # of a block, where XLA goes by rows: a quarter, as in training
OURS, PLAIN, BY_ROWS, BY_WORDS = "jaxinfra", "XLA, plain", "XLA, by rows", "XLA, by words"
FORWARD = (
    Config(128, 192, slots=5), Config(128, 128, slots=6), Config(128, 192, slots=5, band=32),
    Config(128, 256, slots=4, ping_pong=False), Config(256, 128, slots=4, ping_pong=False),
)  # fmt: skip
BACKWARD = (
    Config(128, 192, slots=4), Config(128, 128, slots=6), Config(128, 192, slots=4, band=32),
    Config(128, 256, slots=4, ping_pong=False),
)  # fmt: skip
console = Console(width=120)


def bench(out: Path | None = None) -> None:
    """Prints the tables; with `out`, a folder, also writes the ledger's entries."""
    D = WIDTHS[0]
    if reason := supported("mosaic_gpu", (M, D), (D, V), jnp.bfloat16):
        raise UserError(f"loss_bench: {reason}")
    began = time.perf_counter()
    schedule = tuned(inputs(D))
    for D in WIDTHS:
        for entry in measured(inputs(D), schedule, plain=WIDTHS[0] == D):
            if out is not None:
                write(entry, out)
            console.print(f"{time.perf_counter() - began:.0f} s so far\n")


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Rows, a head, targets, and cotangents of log-probabilities and entropies."""

    x: jax.Array
    w: jax.Array
    targets: jax.Array
    of_logp: jax.Array
    of_entropy: jax.Array

    @property
    def D(self) -> int:
        """The model's width."""
        return self.x.shape[1]


def inputs(D: int) -> Inputs:
    """Normal; logits have a standard deviation of 2."""
    keys = jax.random.split(jax.random.key(0), 5)
    w = jax.random.normal(keys[1], (D, V), jnp.bfloat16) * jnp.bfloat16(2 / D**0.5)
    targets = jax.random.randint(keys[2], (M,), 0, V, jnp.int32)
    x = jax.random.normal(keys[0], (M, D), jnp.bfloat16)
    return Inputs(x, w, targets, *(jax.random.normal(key, (M,)) for key in keys[3:]))


def tuned(given: Inputs) -> Schedule:
    """The fastest of the schedules for each kernel, and a table of all."""
    rule, default = Rule(), Schedule()
    part = default.block
    w_part = given.w[:, :part]
    rows = jax.jit(partial(_by_words, given.targets))(given.x, given.w)
    cotangents = given.of_logp, -given.of_logp, given.of_entropy
    slopes = blocks.slopes_of(cotangents, *rows[1:])
    wanted_dz = jax.jit(lambda x, w: blocks.derivatives(rule, x, w, given.targets, slopes))(
        given.x, w_part
    )
    forward = {
        config: _compiled(
            lambda x, w, config=config: blocks.merge(
                mosaic_gpu.statistics(rule, config, x, w, given.targets)
            ),
            given.x, given.w,
        )
        for config in FORWARD
    }  # fmt: skip
    backward = {
        config: _compiled(
            lambda x, w, config=config: mosaic_gpu.derivatives(
                rule, config, x, w, given.targets, slopes
            ),
            given.x, w_part,
        )
        for config in BACKWARD
    }  # fmt: skip
    best = []
    for title, runs, wanted, columns in (
        ("Log-sum-exp and entropy", forward, rows, V),
        (f"dz of {part:,} words", backward, wanted_dz, part),
    ):
        held = _held({str(config): run for config, run in runs.items() if run}, wanted)
        table = Table("schedule", "ms", "TFLOP/s", title=f"{title}, D = {given.D:,}")
        seconds = device_turns(held, rounds=2, calls=4)[0] if held else {}
        for name, samples in seconds.items():
            rate = 2 * M * given.D * columns / median(samples) / 1e12
            table.add_row(name, f"{median(samples) * 1e3:.3f}", f"{rate:.0f}")
        console.print(table)
        fastest = min(seconds, key=lambda name: median(seconds[name])) if seconds else None
        best.append(next((config for config in runs if str(config) == fastest), None))
    return Schedule(best[0] or default.forward, best[1] or default.backward, part)


def measured(given: Inputs, schedule: Schedule, *, plain: bool) -> Iterator[Entry]:
    """An entry for each of the losses' passes; `plain`: with XLA's whole logits and torch."""
    both = token_contestants(given, schedule)
    losses = loss_contestants(given, schedule)
    for name, title, of, gradients, flops in (
        ("token-logps-train", "Log-probabilities with entropies, both passes", both, True, 8),
        ("token-logps-forward", "Log-probabilities with entropies, forward", both, False, 2),
        ("cross-entropy-train", "Cross-entropy, both passes", losses, True, 6),
    ):  # fmt: skip
        at = f"{M}x{given.D}x{V}", f"M {M:,}, D {given.D:,}, V {V:,}"
        try:
            seconds, used, clock = _timed(of, given, gradients=gradients, plain=plain)
        except Exception as error:  # costs one comparison, not the rest
            console.print(f"{title}, {at[1]}: {str(error).partition(chr(10))[0]:.200}")
            continue
        work = flops * M * given.D * V
        yield _report(f"{name}-{at[0]}", f"{title}: {at[1]}", seconds, used, work, schedule, clock)


def _timed(
    of: dict[str, Callable[..., Any]], given: Inputs, *, gradients: bool, plain: bool
) -> tuple[dict[str, list[float]], dict[str, Memory], str]:
    """Seconds and memory of those that are right, and the clock; RuntimeError where ours is not."""
    runs, used, wanted = {}, {}, None
    for who, fn in of.items():
        fn = _with_gradients(fn, given) if gradients else fn
        if who == PLAIN:
            wanted = jax.block_until_ready(jax.jit(fn)(given.x, given.w))
            if not plain:
                continue
        compiled = _compile(fn, given.x, given.w, who)
        if compiled is not None:
            runs[who] = partial(compiled, given.x, given.w)
            used[who] = memory(compiled)
    runs = _held(runs, wanted)
    del wanted
    if plain and BY_WORDS in of:  # torch has no part in the cross-entropy
        runs |= loss_bench_torch.contestant(given, gradients, ROWS)
    if OURS not in runs or len(runs) < 2:
        raise RuntimeError("left out: ours is not among those that are right, or is alone")
    seconds, clock = device_turns(runs, rounds=3, calls=4)
    return seconds, used, clock


def token_contestants(given: Inputs, schedule: Schedule) -> dict[str, Callable[..., Any]]:
    """Functions of x and w, the reference first."""
    targets = given.targets
    return {
        PLAIN: lambda x, w: reference.token_logps(x, w, targets),
        OURS: lambda x, w: token_logps(
            x, w, targets, implementation="mosaic_gpu", schedule=schedule
        ),
        BY_WORDS: lambda x, w: token_logps(x, w, targets, implementation="xla"),
        BY_ROWS: lambda x, w: _logps(by_rows(x, w, targets)),
    }


def loss_contestants(given: Inputs, schedule: Schedule) -> dict[str, Callable[..., Any]]:
    """The same of the weighted cross-entropy."""
    targets, weights = given.targets, jnp.abs(given.of_logp)
    rows: Any = chunked.linear_cross_entropy
    return {
        PLAIN: lambda x, w: reference.linear_cross_entropy(x, w, targets, weights)[0],
        OURS: lambda x, w: linear_cross_entropy(
            x, w, targets, weights, implementation="mosaic_gpu", schedule=schedule
        )[0],
        BY_ROWS: lambda x, w: rows(x, w, targets, weights, 0.0, None, ROWS)[0],
    }


def _with_gradients(fn: Callable[..., Any], given: Inputs) -> Callable[..., Any]:
    def run(x, w):
        out, pull = jax.vjp(fn, x, w)
        pair = isinstance(out, tuple)
        return out, pull((given.of_logp, given.of_entropy) if pair else jnp.ones((), jnp.float32))

    return run


def _by_words(targets: jax.Array, x: jax.Array, w: jax.Array) -> Any:
    part = partial(blocks.statistics, Rule())
    _, given = blocks.over(
        V, 8192,
        lambda start, size, carry: (
            carry, part(x, Rule().block(w, start, size), targets - start)
        ),
        None,
    )  # fmt: skip
    return blocks.merge(jnp.concatenate([jnp.swapaxes(x, 0, 1) for x in given], axis=1))


@jax.custom_vjp
def by_rows(x: jax.Array, w: jax.Array, targets: jax.Array) -> tuple[jax.Array, ...]:
    """Hit, log-sum-exp and entropy by XLA, with all logits of `ROWS` rows at a time."""

    def one(rows):
        return blocks.merge(blocks.statistics(Rule(), rows[0], w, rows[1])[:, None])

    parts = lax.map(one, (x.reshape(-1, ROWS, x.shape[1]), targets.reshape(-1, ROWS)))
    return tuple(part.reshape(-1) for part in parts)


def _by_rows_backward(kept: Any, cotangents: Any) -> Any:
    x, w, targets, lse, entropy = kept
    slopes = blocks.slopes_of(cotangents, lse, entropy)

    def body(dw, rows):
        x, targets, *numbers = rows
        dz = blocks.derivatives(Rule(), x, w, targets, blocks.Slopes(*numbers))
        dw += jnp.einsum("md,mv->dv", x, dz, preferred_element_type=jnp.float32)
        return dw, jnp.einsum("mv,dv->md", dz, w)

    numbers = [slopes.hit, slopes.a, slopes.b, slopes.lse]
    rows = [a.reshape(-1, ROWS, *a.shape[1:]) for a in (x, targets, *numbers)]
    dw, dx = lax.scan(body, jnp.zeros(w.shape, jnp.float32), rows)
    return dx.reshape(x.shape), dw.astype(w.dtype), None


def _by_rows_forward(x: jax.Array, w: jax.Array, targets: jax.Array) -> Any:
    rows: Any = by_rows(x, w, targets)
    return rows, (x, w, targets, *rows[1:])


by_rows.defvjp(_by_rows_forward, _by_rows_backward)


def _logps(rows: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
    return rows[0] - rows[1], rows[2]


def _compile(fn: Callable[..., Any], x: Any, w: Any, who: Any) -> Any:
    """The compiled function; None, and a line that says so, where it does not compile."""
    try:
        return jax.jit(fn).lower(x, w).compile()
    except Exception as error:
        console.print(f"{who} does not compile: {str(error).partition(chr(10))[0]:.200}")
        return None


def _compiled(fn: Callable[..., Any], x: Any, w: Any) -> Callable[[], Any] | None:
    compiled = _compile(fn, x, w, "a schedule")
    return None if compiled is None else partial(compiled, x, w)


def _held(runs: dict[str, Callable[[], Any]], wanted: Any) -> dict[str, Callable[[], Any]]:
    """Those that give what is wanted, by the largest and the mean square difference."""
    good = {}
    for name, run in runs.items():
        try:
            found = jax.block_until_ready(run())
        except Exception as error:
            console.print(f"{name} fails: {str(error).partition(chr(10))[0]:.200}")
            continue
        off = max(map(_off, jax.tree.leaves(found), jax.tree.leaves(wanted)))
        del found
        if off < 0.02:  # a sum's last bit of bfloat16 is 0.004 of it
            good[name] = run
        else:
            console.print(f"{name} is wrong: off by {off:.2g}")
    return good


@jax.jit
def _distance(got: jax.Array, want: jax.Array) -> jax.Array:
    got, want = got.astype(jnp.float32), want.astype(jnp.float32)
    largest = jnp.max(jnp.abs(got - want)) / jnp.max(jnp.abs(want))
    return jnp.maximum(largest, jnp.sqrt(jnp.mean((got - want) ** 2) / jnp.mean(want**2)))


def _off(got: jax.Array, want: jax.Array) -> float:
    distance = float(_distance(got, want))
    return distance if distance == distance else float("inf")


def _report(
    name: str,
    claim: str,
    seconds: dict[str, list[float]],
    used: dict[str, Memory],
    flops: float,
    schedule: Schedule,
    clock: str,
) -> Entry:
    """The table of one loss and pass, and its entry: ours against the fastest of XLA by blocks."""
    table = Table("", "ms", "TFLOP/s", "temporary MB", "peak MB", title=claim)
    for who, samples in sorted(seconds.items(), key=lambda item: median(item[1])):
        here = used.get(who)
        sizes = ("-", "-") if here is None else (
            f"{here.temporary / 1e6:,.0f}", f"{here.peak / 1e6:,.0f}"
        )  # fmt: skip
        speed = f"{median(samples) * 1e3:.2f}", f"{flops / median(samples) / 1e12:.0f}"
        table.add_row(who, *speed, *sizes)
    console.print(table)
    peers = [who for who in (BY_WORDS, BY_ROWS) if who in seconds] or [
        who for who in seconds if who != OURS
    ]
    best = min(peers, key=lambda who: median(seconds[who]))
    ours, theirs = tuple(seconds[OURS]), tuple(seconds[best])
    ratio, interval = median(theirs) / median(ours), ratio_interval(ours, theirs)
    shares = {
        who: used[OURS].temporary / max(1, used[who].temporary) for who in peers if who in used
    }
    console.print(
        f"{ratio:.3f} times {best} ({interval[0]:.3f}-{interval[1]:.3f}); temporary memory of ours "
        + ", ".join(f"{share:.3f} of that of {who}" for who, share in shares.items())
    )
    peak = detect().flops["bfloat16"]
    assert peak is not None
    rates = {
        who: [flops / s / 1e12 for s in seconds[who]]
        for who in dict.fromkeys((OURS, best, *seconds))
    }
    return Entry(
        name=name, claim=f"{claim}, bfloat16", command="python -m jaxinfra.kernels.loss_bench",
        unit="TFLOP/s", samples=rates, ratio=ratio, interval=interval,
        roofline=median(rates[OURS]) * 1e12 / peak,
        roof=f"{peak / 1e12:.0f} TFLOP/s bfloat16 on paper",
        inputs="normal, logits of standard deviation 2, in turns in one process, warm; seconds of "
        "the device: " + clock,
        mislead="FLOPs are 2 M D V forward, 8 of log-probabilities in both passes and 6 of the "
        "cross-entropy, whatever is computed: our cross-entropy makes its logits twice, 8; the "
        f"ratio is to {best}; blocks of {ROWS:,} rows by choice, more take more memory",
        environment=environment(),
        extra={
            "temporary_bytes": {who: m.temporary for who, m in used.items()},
            "peak_bytes": {who: m.peak for who, m in used.items()},
            "schedule": dataclasses.asdict(schedule),
        },
    )  # fmt: skip


if __name__ == "__main__":
    tyro.cli(bench)
