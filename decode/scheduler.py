"""What each step of the engine computes: continuous batching over pages. Imports no jax.

A step takes at most `budget` tokens. Sequences that make answers get one each; what is left goes to
prompts, in chunks, so that a long prompt delays nobody by more than a step. A sequence keeps its
pages until it ends; where a step needs more than are free, the prefix cache gives some up, and then
the sequence that the policy ranks last loses its pages and is computed again later: from the prefix
cache as far as that still has it (recomputation: PagedAttention, arXiv 2309.06180, section 4.5;
chunked prompts: Sarathi-Serve, arXiv 2403.02310).

    plan = scheduler.plan(now)          # chunks to compute, pages to copy first, what has timed out
    scheduler.computed(plan, made)      # the new tokens of each chunk that makes some

The next step may be planned before the tokens of the last one are known: they stand as PENDING at
the end of their sequences, and the device knows them.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Many
from dataclasses import dataclass, field

from decode.pages import Pages, Table
from decode.policies import FirstCome, Policy
from decode.prefix_cache import PrefixCache
from decode.request import QueueFull, Request

PENDING = -1  # a token that the device has made and the host has not seen


@dataclass(eq=False)
class Sequence:
    """One answer: its prompt and what was made so far, and the pages of what is computed."""

    request: Request
    index: int
    number: int  # in order of arrival
    tokens: list[int]
    table: Table
    first: Sequence | None = None  # answer 0 of the same request, for the others
    slot: int = -1  # its own among those that run
    cached: int = 0  # prompt tokens that the prefix cache had, the first time
    epoch: int = 0  # of the prefix cache, when its pages began to be computed
    watched: bool = False  # the host must see its last token before the next is drawn
    cuts: int = 0  # times that tokens under way were given up
    read: int = 0  # tokens that a draft model has read
    constants: tuple[int, ...] = ()  # of its row in a step (`decode.batches`)
    ended: bool = False

    @property
    def made(self) -> int:
        """Tokens of the answer, those included that are under way."""
        return len(self.tokens) - len(self.request.prompt)

    @property
    def left(self) -> int:
        """Tokens that it may still make."""
        return self.request.params.max_tokens - self.made

    @property
    def drafts(self) -> int:
        """That may stand behind its last token: none where wrong ones would be counted."""
        if self.watched or self.request.params.penalised:
            return 0
        return max(self.left - 1, 0)

    @property
    def pending(self) -> bool:
        """Whether the host does not know its last token yet."""
        return self.tokens[-1] == PENDING

    @property
    def plain(self) -> bool:
        """Whether its next token has a temperature and no other wish."""
        return self.request.params.plain and not self.watched

    @property
    def known(self) -> list[int]:
        """Its tokens as far as the host knows them."""
        tokens = self.tokens
        return tokens[: tokens.index(PENDING)] if self.pending else tokens


@dataclass(frozen=True)
class Chunk:
    """`count` tokens of a sequence from position `start`, to be computed in this step.

    It makes `makes` tokens, at most: none where more of a prompt is to come, several in a step of
    several tokens or where `drafts`, which follow the `count` tokens, prove right.
    """

    sequence: Sequence
    start: int
    count: int
    makes: int
    drafts: tuple[int, ...] = ()
    cuts: int = 0  # of the sequence, when it was planned

    @property
    def stale(self) -> bool:
        """Whether the sequence was cut since, so that nobody wants what it makes."""
        return self.cuts != self.sequence.cuts

    @property
    def end(self) -> int:
        """The position of the first token that it makes."""
        return self.start + self.count


@dataclass
class Plan:
    """A step: (source, target) pages to copy, chunks to compute, and what ran out of time.

    admitted: sequences that begin to run with it. steps: the most tokens that a row makes, by
    itself, without drafts.
    """

    chunks: list[Chunk] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)
    timed_out: list[Sequence] = field(default_factory=list)
    admitted: list[Sequence] = field(default_factory=list)
    steps: int = 1

    @property
    def tokens(self) -> int:
        """That the step computes, at first."""
        return sum(chunk.count + len(chunk.drafts) for chunk in self.chunks)


Draft = Callable[[Sequence], Many[int]]


class Scheduler:
    """Sequences that wait and that run, over one pool of pages."""

    def __init__(
        self,
        pool: Pages,
        *,
        budget: int = 512,
        max_running: int = 64,
        max_waiting: int = 1024,
        policy: Policy | None = None,
        cache: PrefixCache | None = None,
    ) -> None:
        """`cache`: of prefixes, over the same pool; without one nothing is shared."""
        if budget < max_running:
            raise ValueError(
                f"scheduler: budget={budget} is below max_running={max_running}; "
                "a step must have a token for each that runs"
            )
        self.pool, self.cache, self.policy = pool, cache, policy or FirstCome()
        self.budget, self.max_running, self.max_waiting = budget, max_running, max_waiting
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.preempted = 0  # times that a sequence lost its pages
        self.looked_up = self.found = 0  # tokens, in the prefix cache
        self._slots = list(range(max_running - 1, -1, -1))
        self._numbers = 0
        self._now = 0.0

    @property
    def steady(self) -> bool:
        """Whether nobody waits, and all that run go on by one token."""
        return not self.waiting and all(self._missing(s) == 1 for s in self.running)

    def add(self, request: Request) -> list[Sequence]:
        """Queues the request's answers. Raises QueueFull, or ValueError for what can never fit."""
        most = len(request.prompt) + request.params.max_tokens
        room = len(self.pool.holders) * self.pool.size
        if most > room:
            raise ValueError(
                f"request {request.id}: {len(request.prompt)} tokens and max_tokens="
                f"{request.params.max_tokens} exceed the {room} tokens of all pages"
            )
        if request.params.n > self.max_waiting:
            raise ValueError(f"n: {request.params.n}; at most {self.max_waiting} answers may wait")
        if len(self.waiting) + request.params.n > self.max_waiting:
            raise QueueFull(f"{len(self.waiting)} answers wait; at most {self.max_waiting} may")
        added: list[Sequence] = []
        for index in range(request.params.n):
            self._numbers += 1
            first = added[0] if added else None
            prompt, table = list(request.prompt), Table(self.pool)
            made = Sequence(request, index, self._numbers, prompt, table, first)
            made.watched = request.params.watched
            added.append(made)
        self.waiting += added
        return added

    def cancel(self, request_id: str) -> list[Sequence]:
        """Takes a request's answers out at once; their pages are free."""
        found = [s for s in (*self.waiting, *self.running) if s.request.id == request_id]
        for sequence in found:
            self.end(sequence)
        return found

    def end(self, sequence: Sequence) -> None:
        """The answer is whole, or nobody wants it: its pages go to the prefix cache or are free."""
        if sequence in self.running:
            self._stop(sequence)
        else:
            self.waiting.remove(sequence)
        sequence.ended = True

    def plan(self, now: float, steps: int = 1, draft: Draft | None = None) -> Plan:
        """The next step. Every sequence of it has the pages that it needs.

        Args:
          now: seconds, by which deadlines and leases end.
          steps: tokens to make a row, where the scheduler is `steady`.
          draft: what may follow a sequence; give it only where the scheduler is `steady` and no
            token is PENDING.
        """
        plan, self._now = Plan(), now
        for sequence in [*self.waiting, *self.running]:
            limit = sequence.request.deadline
            if limit is not None and now - sequence.request.arrival > limit:
                self.end(sequence)
                plan.timed_out.append(sequence)
        left = self.budget
        ranked = sorted(filter(_can_go_on, self.running), key=self.policy.rank)
        plan.steps = self._steps(ranked, steps)
        # Those that make answers first, then prompts under way, then prompts that wait.
        for i, sequence in enumerate(sorted(ranked, key=lambda s: self._missing(s) > 1)):
            if sequence.slot >= 0:  # none that lost its pages to one before it
                spare = left - (len(ranked) - i)
                drafts = tuple(draft(sequence))[: max(spare, 0)] if draft else ()
                left -= self._schedule(plan, sequence, left, drafts)
        alone = plan.steps > 1 or draft is not None
        for sequence in [] if alone else sorted(self.waiting, key=self.policy.rank):
            if left == 0 or len(self.running) == self.max_running:
                break
            if sequence.pending or self._first_is_on_its_way(sequence):
                continue
            self._take_prefix(sequence)
            known, found = len(sequence.tokens), sequence.table.length
            taken = self._schedule(plan, sequence, left)
            if not taken:
                sequence.table.close()
                break
            if self.cache is not None:
                self.looked_up += known
                self.found += found
            left -= taken
            self.waiting.remove(sequence)
            self.running.append(sequence)
            sequence.slot = self._slots.pop()
            plan.admitted.append(sequence)
        return plan

    def computed(self, plan: Plan, made: Many[Many[int]]) -> None:
        """`made`: the new tokens of each chunk; fewer than it was to make where drafts were wrong.

        Fewer may come only before the next step is planned.
        """
        for chunk, tokens in zip(plan.chunks, made, strict=True):
            sequence = chunk.sequence
            if sequence.ended or chunk.stale:
                continue
            sequence.tokens[chunk.end : chunk.end + chunk.makes] = tokens
            if len(tokens) < chunk.makes and sequence.slot >= 0:
                sequence.table.shrink(len(sequence.tokens) - 1)

    def cut(self, sequence: Sequence, length: int) -> None:
        """Takes back the sequence's tokens from `length` on, and what is under way for it."""
        del sequence.tokens[length:]
        sequence.cuts += 1
        if sequence.table.length >= length:
            sequence.table.shrink(length - 1)
        sequence.read = min(sequence.read, sequence.table.length)

    def _missing(self, sequence: Sequence) -> int:
        return len(sequence.tokens) - sequence.table.length

    def _steps(self, ranked: list[Sequence], steps: int) -> int:
        """`steps` where all rows can make so many and nothing else is to be done, else 1."""
        if steps == 1 or not self.steady or any(s.watched for s in self.running):
            return 1
        wanted = sum(s.table.missing(min(steps, s.left)) for s in ranked)
        short = wanted - self.pool.free
        if short > 0 and self.cache is not None:
            short -= self.cache.evict(short, self._now)
        return steps if short <= 0 else 1

    def _schedule(
        self, plan: Plan, sequence: Sequence, left: int, drafts: tuple[int, ...] = ()
    ) -> int:
        """Adds the sequence's next chunk, if it can have pages; returns the chunk's tokens."""
        missing = self._missing(sequence)
        count = min(missing, left)
        drafts = drafts[: sequence.drafts] if count == missing else ()
        makes = min(max(plan.steps, 1 + len(drafts)), sequence.left) if count == missing else 0
        grown = count + len(drafts) + (max(makes - 1, 0) if plan.steps > 1 else 0)
        if count == 0 or not self._make_room(plan, sequence, grown):
            return 0
        start = sequence.table.length
        plan.copies += sequence.table.grow(grown)
        plan.chunks.append(Chunk(sequence, start, count, makes, drafts, sequence.cuts))
        self.policy.served(sequence, grown)
        prompt = len(sequence.request.prompt)
        if start < prompt <= start + count:
            self._keep(sequence, sequence.request.prompt)
        sequence.tokens += [PENDING] * makes
        return count + len(drafts)

    def _first_is_on_its_way(self, sequence: Sequence) -> bool:
        """Whether its prompt is being computed already, for another answer to it."""
        first = sequence.first
        if self.cache is None or first is None or first.ended or sequence.made:
            return False
        return first.table.length < len(first.request.prompt)

    def _make_room(self, plan: Plan, sequence: Sequence, count: int) -> bool:
        """Whether the sequence can grow, after others were sent away if it runs already."""
        while (short := sequence.table.missing(count) - self.pool.free) > 0:
            if self.cache is not None and self.cache.evict(short, self._now):
                continue
            scheduled = {id(chunk.sequence) for chunk in plan.chunks}
            others = [s for s in self.running if s is not sequence and id(s) not in scheduled]
            behind = [s for s in others if self.policy.rank(s) > self.policy.rank(sequence)]
            if sequence in self.running and behind:
                self._preempt(max(behind, key=self.policy.rank))
            elif sequence in self.running and not plan.chunks and others:
                self._preempt(max(others, key=self.policy.rank))
            else:
                return False
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self._stop(sequence)
        self.waiting.append(sequence)
        self.preempted += 1

    def _stop(self, sequence: Sequence) -> None:
        """It runs no more; its pages go to the prefix cache or are free."""
        self.running.remove(sequence)
        self._slots.append(sequence.slot)
        sequence.slot, sequence.read = -1, 0
        self._keep(sequence, sequence.known[: sequence.table.length])
        sequence.table.close()

    def _keep(self, sequence: Sequence, tokens: Many[int]) -> None:
        """The pages of its first `tokens` go to the prefix cache, unless that was emptied since."""
        if self.cache is not None and sequence.epoch == self.cache.epoch:
            self.cache.insert(tokens, sequence.table.pages, sequence.request.cache_salt)

    def _take_prefix(self, sequence: Sequence) -> None:
        if self.cache is None:
            return
        sequence.epoch = self.cache.epoch
        if sequence.request.params.prompt_logprobs is None:
            pages = self.cache.match(sequence.tokens, sequence.request.cache_salt)
            sequence.table.pages = pages
            sequence.table.length = len(pages) * self.pool.size
            if not sequence.made:
                sequence.cached = sequence.table.length


def _can_go_on(sequence: Sequence) -> bool:
    """Whether it has tokens to make, and the host knows what it must know for the next."""
    return sequence.left > 0 and not (sequence.pending and sequence.watched)
