"""The engine: requests in, tokens and texts out, a step at a time.

    engine = Engine.load("smollm2-135m", EngineConfig())
    engine.add(Request("a", tuple(ids), SamplingParams(max_tokens=32)))
    while engine.has_work():
        for output in engine.step():
            print(output.text, end="")

A step plans, dispatches, and then reads what the step before it made, so that the host's work falls
into the device's time; an answer that ended is noticed one step late, and what was computed past
its end is thrown away. Where a grammar must see each token before the next, a step is read before
the next is planned. What goes wrong with one request ends that request, as "error".

This module imports no jax; its runner does.
"""

from __future__ import annotations

import math
import random
import time
from collections import Counter, deque
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from decode import batches, buckets
from decode.answer import Answer
from decode.config import POLICIES, EngineConfig
from decode.flight import Flight, Made
from decode.grammar import Compiler
from decode.pages import Pages
from decode.prefix_cache import PrefixCache
from decode.request import FinishReason, Output, Request
from decode.scheduler import Chunk, Plan, Scheduler, Sequence
from decode.speculate import ByModel, Guesses
from decode.stats import EngineStats, Info
from jaxinfra.errors import UserError
from jaxinfra.text import Tokenizer

if TYPE_CHECKING:
    from decode.runner import Runner
    from jaxinfra.loading import Model


class Engine:
    """Continuous batching over one model. Not thread-safe: one thread owns it."""

    def __init__(self, runner: Runner, tokenizer: Tokenizer | None, config: EngineConfig) -> None:
        """`tokenizer`: of texts, stop strings and grammars; without one an engine speaks ids."""
        self._runner, self._tokenizer, self._asked = runner, tokenizer, config
        self.config = Info(runner.max_len, runner.page_size, runner.pages)
        self.pool = Pages(runner.pages, runner.page_size)
        self.cache = PrefixCache(self.pool) if config.prefix_cache else None
        self.scheduler = Scheduler(
            self.pool, budget=runner.budget, max_running=config.max_running,
            max_waiting=config.max_waiting, policy=POLICIES[config.policy](), cache=self.cache,
        )  # fmt: skip
        self._eos = frozenset(runner.config.eos_ids) | frozenset(
            tokenizer.eos_ids if tokenizer else ()
        )
        self._answers: dict[Sequence, Answer] = {}
        self._ids: Counter[str] = Counter()  # answers under way of each request
        self._broken: list[tuple[Sequence, str]] = []
        self._keys: dict[Sequence, tuple[int, int]] = {}
        self._grammars: Compiler | None = None
        drafter = runner.drafter
        self._guesses = (
            ByModel(config.draft, separate=drafter.params is not None) if drafter
            else Guesses(config.draft)
        )  # fmt: skip
        self._flight: Flight | None = None
        self._early: list[Output] = []
        self._speed: deque[tuple[float, int]] = deque(maxlen=64)
        self._steps, self._host_s = 0, 0.0

    @classmethod
    def load(
        cls, name: str, config: EngineConfig, *, dtype: Any = None, offline: bool = False
    ) -> Engine:
        """An engine for a model by name, as `jaxinfra.load` takes it. Raises UserError."""
        import jax

        import jaxinfra

        dtype = dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
        model = jaxinfra.load(name, dtype=dtype, offline=offline)
        if config.draft_model is None or config.draft_layers is not None:
            return cls.of(model, config)
        draft = jaxinfra.load(config.draft_model, dtype=dtype, offline=offline)
        return cls.of(model, config, draft)

    @classmethod
    def of(cls, model: Model, config: EngineConfig, draft: Model | None = None) -> Engine:
        """An engine for a loaded model; `draft` is the smaller one that guesses, if any.

        Raises UserError where `config` names a smaller one that is not given.
        """
        if config.draft_model is not None and config.draft_layers is None and draft is None:
            raise UserError(
                f"engine: draft_model={config.draft_model!r} is not loaded; give it as `draft`, or "
                "use Engine.load"
            )
        from decode.draft import Drafter
        from decode.runner import Runner
        from jaxinfra.model.cache import unstack

        drafter = draft and Drafter(draft.config, unstack(draft.params, draft.config))
        runner = Runner(unstack(model.params, model.config), model.config, config, drafter)
        return cls(runner, model.tokenizer, config)

    def add(self, request: Request) -> None:
        """Queues a request. Raises QueueFull, or ValueError for what can never be answered."""
        params = request.params
        V, room = self._runner.config.vocab_size, self.config.max_len
        if len(request.prompt) + params.max_tokens > room:
            raise ValueError(
                f"request {request.id}: {len(request.prompt)} tokens and max_tokens="
                f"{params.max_tokens} exceed max_len={room}"
            )
        if request.id in self._ids:
            raise ValueError(f"request {request.id}: that id is under way already")
        ids = (*request.prompt, *params.logit_bias, *(params.allowed_tokens or ()))
        if not 0 <= min(ids) <= max(ids) < V:
            raise ValueError(f"request {request.id}: token ids outside the vocabulary of {V}")
        if (params.stop or params.grammar) and self._tokenizer is None:
            raise ValueError("stop strings and grammars need the engine to have a tokenizer")
        matchers = [self._matcher(request) for _ in range(params.n)]
        seed = random.getrandbits(63) if params.seed is None else params.seed
        for sequence, matcher in zip(self.scheduler.add(request), matchers, strict=True):
            self._keys[sequence] = _key_of(seed, sequence.index)
            self._answers[sequence] = Answer(sequence, self._tokenizer, self._eos, matcher)
            self._ids[request.id] += 1

    def abort(self, request_id: str) -> None:
        """Ends a request without a word; its pages are free at once. An unknown id is none."""
        for sequence in self.scheduler.cancel(request_id):
            self._forget(sequence)

    def lease(self, tokens: tuple[int, ...], seconds: float, salt: str = "") -> int | None:
        """Tells that the prefix `tokens` is wanted again in some seconds; None if it is not cached.

        Where pages are needed, what is wanted last goes first. Whoever took a lease gives it up.
        """
        if self.cache is None:
            return None
        return self.cache.lease(tokens, time.monotonic() + seconds, salt)

    def give_up(self, lease: int) -> None:
        """Ends a lease; one that has ended is none."""
        if self.cache is not None:
            self.cache.give_up(lease)

    def has_work(self) -> bool:
        """Whether `step` has something to do."""
        return bool(self._early or self._flight or self.scheduler.running or self.scheduler.waiting)

    def step(self) -> list[Output]:
        """Goes on by one step; what came out, in no promised order between requests."""
        start = time.perf_counter()
        outputs, self._early = self._early, []
        drafted = self._flight is not None and self._flight.drafting
        drafting = self._drafting()
        if drafted or drafting or self._watching():
            outputs += self._read()
            drafting = drafting and self._drafting()
        self.scheduler.budget = self._runner.budget
        steps = 1 if drafting else self._steps_a_call()
        drafting = drafting and self._guesses.catch_up(
            self.scheduler.running, self._runner.budget, self._draft_reads
        )
        plan = self.scheduler.plan(
            time.monotonic(), steps=steps,
            draft=self._guesses.after if drafting else None,
        )  # fmt: skip
        outputs += [self._end(s, "timeout") for s in plan.timed_out]
        last, self._flight = self._flight, self._dispatch(plan, drafting) if plan.chunks else None
        outputs += [self._end(sequence, "error", why) for sequence, why in self._broken]
        self._broken.clear()
        waited = 0.0
        if last is not None:
            waiting = time.perf_counter()
            last.wait()
            waited = time.perf_counter() - waiting
            outputs += self._take(last)
        self._steps += bool(plan.chunks)
        self._host_s += time.perf_counter() - start - waited
        return outputs

    def generate(self, requests: list[Request]) -> Iterator[Output]:
        """The outputs of `requests` until all have ended, other requests going on beside them."""
        left = {request.id: request.params.n for request in requests}
        others: list[Output] = []
        try:
            for request in requests:
                self.add(request)
            while left:
                for output in self.step():
                    if output.request_id not in left:
                        others.append(output)
                        continue
                    if output.finish_reason is not None:
                        left[output.request_id] -= 1
                        if not left[output.request_id]:
                            del left[output.request_id]
                    yield output
        finally:
            for id in left:
                self.abort(id)
            self._early += others

    def update_weights(self, params: Any) -> None:
        """Other weights (`jaxinfra.model.cache.unstack`ed) from the next step on.

        What runs goes on with the keys and values it has; the prefix cache is emptied.
        """
        self._runner.swap(params)
        self.forget()

    def forget(self) -> None:
        """Empties the prefix cache."""
        if self.cache is not None:
            self.cache.clear()

    def finish(self) -> None:
        """Waits until every program is compiled. Raises what the compiler raised."""
        self._runner.finish()

    def close(self) -> None:
        """Compiles no further program."""
        self._runner.close()

    def stats(self) -> EngineStats:
        """How it stands."""
        scheduler = self.scheduler
        cached = self.cache.evictable if self.cache else 0
        now = time.monotonic()
        recent = [count for at, count in self._speed if now - at < 5]
        since = min((at for at, _ in self._speed if now - at < 5), default=now)
        return EngineStats(
            running=len(scheduler.running), waiting=len(scheduler.waiting),
            pages_used=len(self.pool.holders) - self.pool.free - cached, pages_cached=cached,
            pages_free=self.pool.free,
            tokens_per_second=sum(recent) / max(now - since, 1e-3) if len(recent) > 1 else 0.0,
            prefix_queries=scheduler.looked_up, prefix_hits=scheduler.found,
            preemptions=scheduler.preempted, compiles=self._runner.compiles,
            drafted=self._guesses.drafted, accepted=self._guesses.accepted,
            steps=self._steps, host_s=self._host_s,
            ready=len(self._runner.ready), programs=self._runner.programs,
        )  # fmt: skip

    def _matcher(self, request: Request) -> Any:
        if request.params.grammar is None:
            return None
        if self._grammars is None:
            assert self._tokenizer is not None
            self._grammars = Compiler(self._tokenizer, self._runner.config.vocab_size)
        return self._grammars.compile(request.params.grammar)

    def _drafting(self) -> bool:
        ready = self.scheduler.steady and self._runner.complete
        return ready and self._guesses.pay(len(self.scheduler.running))

    def _watching(self) -> bool:
        return any(s.watched for s in self.scheduler.running)

    def _steps_a_call(self) -> int:
        """Tokens a row, as many as programs for it are there."""
        steps, running = self._asked.steps or self._runner.steps, self.scheduler.running
        longest = max((len(s.tokens) + steps for s in running), default=0)
        pages = -(-longest // self.pool.size)
        plain = all(s.plain for s in running)
        fits = any(
            one.steps == steps and len(running) <= one.B and pages <= one.M and one.plain <= plain
            for one in self._runner.ready
        )
        return steps if fits else 1

    def _dispatch(self, plan: Plan, drafting: bool) -> Flight:
        wanted = batches.size(plan, self._runner.drafts if self._runner.drafter else 0)
        layout = buckets.smallest(self._runner.ready, **wanted)
        if layout is None:
            raise RuntimeError(
                f"no program holds a step of {wanted}; this is a mistake of the engine"
            )
        for sequence in plan.admitted:
            self._admit(sequence)
        if plan.copies:
            self._runner.copy(plan.copies)
        mask = batches.mask(plan, layout, self._runner.words, self._fill)
        packed = batches.pack(plan, layout, self._keys)
        out = self._runner.run(layout, packed, mask)
        return Flight(plan, layout, out, drafting, time.monotonic())

    def _draft_reads(self, chunks: list[Chunk]) -> None:
        """The draft model computes `chunks`."""
        plan = Plan(chunks)
        layout = buckets.smallest(self._runner.ready, **batches.size(plan), reads=True)
        assert layout is not None
        self._runner.run(layout, batches.pack(plan, layout, self._keys), None)
        self._runner.wait()

    def _admit(self, sequence: Sequence) -> None:
        """Tells the device what penalties and biases look at, where it matters."""
        params, slot = sequence.request.params, sequence.slot
        others = 0.0 if params.allowed_tokens is None else -math.inf
        bias = dict.fromkeys(params.allowed_tokens or (), 0.0) | {
            token: value for token, value in params.logit_bias.items()
            if params.allowed_tokens is None or token in params.allowed_tokens
        }  # fmt: skip
        if bias or params.penalised or slot in self._runner.biased:
            prompt = len(sequence.request.prompt)
            self._runner.admit(slot, sequence.known, prompt, bias, others)

    def _fill(self, sequence: Sequence, row: np.ndarray) -> None:
        """Writes a mask's row. A grammar that fails ends its own request, after this step."""
        try:
            self._answers[sequence].fill(row)
        except ValueError as error:
            self._broken.append((sequence, str(error)))

    def _read(self) -> list[Output]:
        flight, self._flight = self._flight, None
        return self._take(flight) if flight else []

    def _take(self, flight: Flight) -> list[Output]:
        """The step's tokens into their sequences, and what they mean."""
        made = flight.read(self._guesses.judge)
        self.scheduler.computed(flight.plan, [one.tokens for one in made])
        for one in made if flight.drafting else ():
            self._guesses.stood(one.chunk, len(one.tokens))
        outputs = [output for one in made for output in self._told(flight, one)]
        now, count = time.monotonic(), sum(len(one.tokens) for one in made)
        if all(one.tokens for one in made):
            since = max(flight.dispatched, self._speed[-1][0] if self._speed else 0.0)
            self._guesses.measured(len(made), flight.drafting, count, now - since)
        self._speed.append((now, count))
        return outputs

    def _told(self, flight: Flight, made: Made) -> list[Output]:
        sequence = made.chunk.sequence
        answer = self._answers.get(sequence)
        if answer is None or made.chunk.stale:
            return []
        try:
            if sequence.request.params.prompt_logprobs is not None:
                answer.score(made.chunk, made.at, flight.out.prompt)
            if not made.tokens:
                return []
            output = answer.take(made.tokens, made.logps, made.likeliest)
        except Exception as error:
            return [self._end(sequence, "error", f"{type(error).__name__}: {error}")]
        sequence.watched, length = answer.watched, len(sequence.request.prompt) + answer.count
        if answer.watched and len(sequence.tokens) > length:
            self.scheduler.cut(sequence, length)
        if output.finish_reason is not None:
            del sequence.tokens[length:]
            self.scheduler.end(sequence)
            self._forget(sequence)
        return [output]

    def _end(self, sequence: Sequence, reason: FinishReason, error: str | None = None) -> Output:
        if not sequence.ended:
            self.scheduler.end(sequence)
        output = self._answers[sequence].broken_off(reason, error)
        self._forget(sequence)
        return output

    def _forget(self, sequence: Sequence) -> None:
        del self._answers[sequence], self._keys[sequence]
        self._ids[sequence.request.id] -= 1
        if not self._ids[sequence.request.id]:
            del self._ids[sequence.request.id]


def _key_of(seed: int, index: int) -> tuple[int, int]:
    """The key of answer `index` of a request with this seed, as two int32."""
    words = np.random.SeedSequence((seed % (1 << 64), index)).generate_state(2, np.uint32)
    first, second = words.view(np.int32)
    return int(first), int(second)
