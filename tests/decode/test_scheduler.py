"""The scheduler under random loads: every answer ends, no page is lost, no budget is passed."""

import random

import pytest

from decode.buckets import layouts, smallest
from decode.pages import Pages
from decode.policies import Fair, FirstCome, Priority, ShortestRemaining
from decode.prefix_cache import PrefixCache
from decode.request import QueueFull, Request, SamplingParams
from decode.scheduler import Scheduler

SIZE, COUNT, BUDGET, RUNNING = 4, 24, 16, 6
POLICIES = (FirstCome, Priority, ShortestRemaining, Fair)


def token_after(tokens):
    """What a model that is a function of all its tokens would say."""
    return hash(tuple(tokens)) % 50


STOP = 7


class Model:
    """Computes plans over slots that remember the prefix they were made for.

    late: a step's tokens are told after the next is planned. steps, draft: `Scheduler.plan`'s.
    """

    def __init__(self, scheduler, late=False, steps=1, draft=None):
        self.scheduler, self.memory = scheduler, {}
        self.late, self.steps, self.draft = late, steps, draft
        self.truth, self.flight, self.several = {}, None, 0

    def step(self, now):
        scheduler = self.scheduler
        if self.flight is not None and self.draft and scheduler.steady:
            yield from self.told(*self.flight)
            self.flight = None
        draft = self.draft if scheduler.steady and self.flight is None else None
        plan = scheduler.plan(now, steps=1 if draft else self.steps, draft=draft)
        assert plan.tokens <= BUDGET and len(scheduler.running) <= RUNNING
        assert sorted(s.slot for s in scheduler.running) == sorted(
            {s.slot for s in scheduler.running}
        )
        for source, target in plan.copies:
            for place in range(SIZE):
                self.memory[target * SIZE + place] = self.memory.get(source * SIZE + place)
        flight = plan, [self.compute(plan, chunk) for chunk in plan.chunks]
        if not self.late or draft:
            yield from self.told(*flight)
        else:
            if self.flight is not None:
                yield from self.told(*self.flight)
            self.flight = flight if plan.chunks else None
        self.check()

    def compute(self, plan, chunk):
        """The tokens that a chunk makes; the device knows those that the host has not seen."""
        sequence = chunk.sequence
        truth = self.truth.setdefault(sequence, list(sequence.request.prompt))
        before, new = truth[: chunk.end], []
        assert len(before) == chunk.end
        while len(new) < chunk.makes:
            new.append(token_after(before + new))
            if chunk.drafts and (
                len(new) > len(chunk.drafts) or new[-1] != chunk.drafts[len(new) - 1]
            ):
                break
        self.several += len(new) > 1
        written = before + (list(chunk.drafts) or new[: chunk.makes - 1])
        slots = sequence.table.slots(0, len(written))
        for i in range(chunk.start, len(written)):
            self.memory[slots[i]] = tuple(written[: i + 1])
        for i, slot in enumerate(slots):
            assert self.memory[slot] == tuple(written[: i + 1])
        if chunk.makes:
            truth[chunk.end :] = new
        return new

    def told(self, plan, made):
        """Tells the scheduler what a step made; the sequences that ended."""
        self.scheduler.computed(plan, made)
        for chunk, new in zip(plan.chunks, made, strict=True):
            sequence = chunk.sequence
            if sequence.ended or not new:
                continue
            known = sequence.known[len(sequence.request.prompt) :]
            if STOP in known:
                del sequence.tokens[len(sequence.request.prompt) + known.index(STOP) + 1 :]
            if STOP in known or len(known) == sequence.request.params.max_tokens:
                self.scheduler.end(sequence)
                yield sequence

    def check(self):
        scheduler = self.scheduler
        scheduler.pool.check()
        held = sum(len(s.table.pages) for s in (*scheduler.running, *scheduler.waiting))
        kept = scheduler.cache.pages if scheduler.cache else 0
        assert sum(scheduler.pool.holders) == held + kept
        assert not any(s.table.pages for s in scheduler.waiting)


def request(rng, i):
    start = [rng.randrange(2) for _ in range(rng.randrange(1, 30))]
    params = SamplingParams(max_tokens=rng.randrange(1, 20))
    return Request(
        str(i),
        tuple(start),
        params,
        priority=rng.randrange(3),
        tenant=rng.choice("ab"),
        arrival=0.0,
    )


def guess(sequence):
    """A draft of which some tokens are right."""
    tokens = list(sequence.tokens)
    for _ in range(3):
        tokens.append(token_after(tokens) if len(tokens) % 4 else 0)
    return tokens[-3:]


def answers(policy, cached, seed, scheduler=Scheduler, patience=600, **modes):
    """Every answer of a random load, by request; raises where one does not come in time."""
    rng, pool = random.Random(seed), Pages(COUNT, SIZE)
    cache = PrefixCache(pool) if cached else None
    s = scheduler(
        pool, budget=BUDGET, max_running=RUNNING, max_waiting=20, policy=policy(), cache=cache
    )
    model, found, asked, gone = Model(s, **modes), {}, {}, set()
    for step in range(patience):
        if step < 60 and rng.random() < 0.5:
            one = request(rng, step)
            try:
                s.add(one)
                asked[one.id] = one
            except QueueFull:
                assert len(s.waiting) == 20
        if asked and rng.random() < 0.05:
            name = rng.choice(sorted(asked))
            if s.cancel(name):
                gone.add(name)
            model.check()
        for sequence in model.step(float(step)):
            found[sequence.request.id] = sequence.tokens
        if step > 60 and not s.running and not s.waiting and model.flight is None:
            break
    assert set(found) == set(asked) - gone
    for name, tokens in found.items():
        want = list(asked[name].prompt)
        for _ in range(asked[name].params.max_tokens):
            want.append(token_after(want))
            if want[-1] == STOP:
                break
        assert tokens == want
    if cache:
        cache.evict(COUNT, 1e9)
    assert pool.free == COUNT and sorted(s._slots) == list(range(RUNNING))
    return s, model


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("policy", POLICIES)
def test_every_answer_comes_and_is_right(policy, cached):
    preempted = sum(answers(policy, cached, seed)[0].preempted for seed in range(20))
    assert preempted > 20  # the load is more than the pages hold


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize(
    "modes",
    [{"late": True}, {"steps": 4}, {"late": True, "steps": 4}, {"draft": guess},
     {"late": True, "draft": guess}],
)  # fmt: skip
def test_tokens_told_late_or_several_at_once(modes, cached):
    made = [answers(Priority, cached, seed, **modes) for seed in range(20)]
    assert sum(s.preempted for s, _ in made) > 20
    if modes != {"late": True}:
        assert sum(model.several for _, model in made) > 20


class KeepsPages(Scheduler):
    def _preempt(self, sequence):
        self.running.remove(sequence)
        self._slots.append(sequence.slot)
        self.waiting.append(sequence)


class ForgetsBudget(Scheduler):
    def _schedule(self, plan, sequence, left, drafts=()):
        return super()._schedule(plan, sequence, BUDGET)


class RecomputesNothing(Scheduler):
    """Takes a sequence back as if its pages still held what it had."""

    def _take_prefix(self, sequence):
        if sequence.made:
            sequence.table.pages = self.pool.take(1)
            sequence.table.length = 1


class KeepsWrongDrafts(Scheduler):
    """Leaves the table as long as if all drafts had been right."""

    def computed(self, plan, made):
        for chunk, tokens in zip(plan.chunks, made, strict=True):
            chunk.sequence.tokens[chunk.end : chunk.end + chunk.makes] = tokens


@pytest.mark.parametrize(
    "wrong, modes",
    [(ForgetsBudget, {}), (KeepsPages, {}), (RecomputesNothing, {}),
     (KeepsWrongDrafts, {"draft": guess})],
)  # fmt: skip
def test_a_mistake_is_found(wrong, modes):
    with pytest.raises((AssertionError, KeyError, ValueError, IndexError)):
        for seed in range(20):
            answers(FirstCome, False, seed, wrong, **modes)


def test_the_lower_priority_goes_first_and_loses_its_pages_last():
    s = Scheduler(Pages(4, 4), budget=8, max_running=4, policy=Priority())
    for name, priority in (("late", 1), ("soon", 0)):
        s.add(Request(name, tuple(range(6)), SamplingParams(max_tokens=6), priority=priority))
    plan = s.plan(0.0)
    assert [c.sequence.request.id for c in plan.chunks] == ["soon", "late"]
    assert [c.count for c in plan.chunks] == [6, 2]
    model = Model(s)
    s.computed(plan, [model.compute(plan, chunk) for chunk in plan.chunks])
    ended = [x.request.id for step in range(40) for x in model.step(0.0)]
    assert ended == ["soon", "late"] and s.preempted >= 1


def test_tenants_get_like_shares():
    s = Scheduler(Pages(200, 4), budget=8, max_running=1, policy=Fair())
    for i in range(6):
        s.add(Request(f"a{i}", (1, 2), SamplingParams(max_tokens=4), tenant="a"))
    s.add(Request("b", (1, 2), SamplingParams(max_tokens=4), tenant="b"))
    model = Model(s)
    ended = [x.request.id for step in range(60) for x in model.step(0.0)]
    assert ended.index("b") <= 1 and len(ended) == 7


def test_a_tenant_that_comes_back_begins_where_the_others_are():
    policy, s = Fair(), Scheduler(Pages(50, 4), budget=8, max_running=2)
    (a,) = s.add(Request("a", (1,), SamplingParams(), tenant="a"))
    (b,) = s.add(Request("b", (1,), SamplingParams(), tenant="b"))
    policy.served(a, 100)
    for _ in range(5000):
        policy.served(b, 100)
    policy.served(a, 1)
    assert policy.rank(a)[0] == policy.rank(b)[0] + 1


def test_a_lease_keeps_nobody_from_running():
    pool = Pages(4, 4)
    cache = PrefixCache(pool)
    s = Scheduler(pool, budget=16, max_running=2, cache=cache)
    pages = pool.take(4)
    cache.insert(range(16), pages)
    pool.release(pages)
    cache.lease(range(16), wanted=10.0)
    s.add(Request("a", tuple(range(100, 108)), SamplingParams(max_tokens=4)))
    assert s.plan(5.0).chunks and len(cache.match(range(17))) == 2


def test_answers_that_can_never_all_wait_are_refused_for_good():
    s = Scheduler(Pages(8, 4), budget=4, max_running=1, max_waiting=2)
    with pytest.raises(ValueError, match="at most 2 answers may wait"):
        s.add(Request("a", (1,), SamplingParams(max_tokens=1, n=3)))


def test_layouts_stand_once_and_hold_what_they_must():
    for running, budget in ((16, 16), (4, 4), (1, 1), (16, 256), (7, 64)):
        made = layouts(max_running=running, budget=budget, pages=40, steps=1, drafts=4,
                       reads_dead_pages=True)  # fmt: skip
        assert len(made) == len(set(made))
        most = {"tokens": budget, "rows": running, "pages": 40, "steps": 1, "everywhere": False,
                "plain": False}  # fmt: skip
        assert smallest(made, **most) and smallest(made[:1], **{**most, "tokens": running})


def test_a_deadline_ends_what_waits_and_what_runs():
    s = Scheduler(Pages(8, 4), budget=4, max_running=1)
    for name in "ab":
        s.add(Request(name, (1,) * 4, SamplingParams(max_tokens=8), deadline=5.0, arrival=0.0))
    model = Model(s)
    assert list(model.step(1.0)) == [] and len(s.running) == len(s.waiting) == 1
    assert [x.request.id for x in s.plan(6.0).timed_out] == ["b", "a"]
    assert s.pool.free == 8 and not s.running and not s.waiting


def test_what_never_fits_is_told_at_once():
    s = Scheduler(Pages(2, 4), budget=4, max_running=2, max_waiting=1)
    with pytest.raises(ValueError, match="exceed the 8 tokens of all pages"):
        s.add(Request("long", (1,) * 5, SamplingParams(max_tokens=4)))
    s.add(Request("one", (1,), SamplingParams(max_tokens=1)))
    with pytest.raises(QueueFull, match="1 answers wait; at most 1 may"):
        s.add(Request("two", (1,), SamplingParams(max_tokens=1)))
    with pytest.raises(ValueError, match="budget=1 is below max_running=2"):
        Scheduler(Pages(2, 4), budget=1, max_running=2)
