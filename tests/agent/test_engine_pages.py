"""Pages of sessions: shared by forks, leased while tools run, freed, accounted for."""

import contextlib
import dataclasses
import functools
import time
from types import SimpleNamespace

import anyio
import pytest

from agent.engine_model import EngineModel
from agent.engine_sessions import CacheMiss
from agent.messages import user
from agent.model import Request, Settings, TextDelta
from agent.returns import Returns
from tests.agent.steered_engine import (
    ENDLESS,
    SHORT,
    TOKENIZER,
    Steered,
    by_script,
    called,
    comes,
    grown,
    quiet,
    serving,
    taken,
)
from tests.agent.test_models import TOOL, turn


def branches(messages, names):
    return [
        Request(messages, settings=Settings(max_tokens=20, temperature=0.8, seed=seed), session=n)
        for seed, n in enumerate(names)
    ]


def test_forks_share_pages_and_stay_bit_equal():
    with serving() as (model, shared):
        messages = grown(model)
        names = [f"s/{i}" for i in range(8)]
        for name in names:
            model.fork("s", name)
        assert {model.tokens(n) for n in names} == {model.tokens("s")}
        found = shared.scheduler.found
        taken(model, *branches(messages, names))
        accounts = [model.account(n) for n in names]
        full = (len(model.tokens("s")) - 1) // 16 * 16
        assert min(a.cached for a in accounts) >= full > 300 and shared.copied == 0
        assert shared.scheduler.found - found == sum(a.cached for a in accounts)
        assert sum(a.recomputed for a in accounts) == 0
        assert {r.program for r in shared.seen} == {"s"}
    with serving(prefix_cache=False) as (model, alone):
        messages = grown(model)
        for request in branches(messages, [f"b{i}" for i in range(8)]):
            taken(model, request)
        assert alone.scheduler.found == 0
    both = [
        {r.params.seed: (r.prompt, e.bits(r.id)) for r in e.seen[1:]} for e in (shared, alone)
    ]  # fmt: skip
    assert both[0] == both[1] and len({str(bits) for _, bits in both[0].values()}) > 4


def test_misses_name_the_token_and_the_cause():
    with serving() as (model, engine):
        messages = grown(model)
        ask = functools.partial(Request, settings=SHORT, session="s")
        kept = model.tokens("s")
        again = TOKENIZER.encode(TOKENIZER.decode(kept, skip_special=False), add_special=False)
        assert again != [*kept]  # or the test shows nothing

        def missed(request):
            taken(model, request)
            return model.account("s").miss

        assert missed(ask(messages)) is None
        other = (user("Tell me. Tell us!"), *messages[1:])
        at = TOKENIZER.decode(kept).index("me. Tell me.") + len("me. Tell ")
        assert missed(ask(other)) == CacheMiss(at, "messages")
        found = missed(ask(other, (TOOL,)))
        assert found is not None and found.cause == "template"
        model.salt = "b"
        assert missed(ask(other, (TOOL,))) == CacheMiss(0, "salt")
        assert missed(ask(other, (TOOL,))) is None
        before = model.account("s").recomputed
        assert engine.cache is not None
        engine.cache.clear()
        assert missed(ask(other, (TOOL,))) == CacheMiss(0, "evicted")
        assert model.account("s").recomputed > before


def flood(model):
    """Requests that need 300 pages, more than there are."""
    long = [user(f"{i} " + "word " * 300) for i in range(3)]
    taken(model, *[Request((m,), settings=dataclasses.replace(SHORT, max_tokens=2)) for m in long])


@pytest.mark.parametrize("leased, lost", [(0.5, False), (0.0, True)])
def test_a_lease_keeps_pages_while_tools_run(leased, lost):
    with serving(by_script, leased=leased) as (model, engine):
        messages = called(model)
        engine.script = None
        flood(model)
        taken(model, Request(messages, (TOOL,), settings=SHORT, session="s"))
        account = model.account("s")
        assert (account.recomputed > 0) == lost and model.leases == 0
        assert (account.miss is not None and account.miss.cause == "evicted") == lost


def test_a_lease_ends_in_time_and_gives_way():
    with serving(by_script, lease=0.05) as (model, _):
        called(model)
        assert comes(lambda: model.leases == 0)
    with serving(by_script, leased=1.0) as (model, engine):
        called(model)
        assert comes(lambda: model.leases == 1)
        quiet(model)  # the pool is the engine's thread's while that computes
        held = engine.pool.take(engine.pool.free)  # nothing is free but what the lease keeps
        taken(model, Request((user("?"),), settings=dataclasses.replace(SHORT, max_tokens=2)))
        engine.pool.release(held)


def test_leases_take_their_share_and_what_is_wanted_last_goes():
    with serving(by_script, leased=0.4) as (model, _):  # 102 of 256 pages
        held, room = model._thread.held, 0
        for i, seconds in enumerate((59.0, 20.0, 40.0)):
            called(model, f"s{i}")
            quiet(model)
            assert f"s{i}" in held
            model._thread.order(model._thread.hold, f"s{i}", model.tokens(f"s{i}"), seconds, "")
            room = max(room, len(model.tokens(f"s{i}")) // 16)
        assert comes(lambda: len(held) == 2)
        assert 102 / 3 < room < 102 / 2 and sorted(held) == ["s1", "s2"]
        model.release("s2")
        assert comes(lambda: sorted(held) == ["s1"])


def test_tools_are_expected_when_they_usually_return(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("agent.returns.time.monotonic", lambda: now[0])
    returns = Returns()
    for _ in range(20):
        for name, seconds in (("slow", 30.0), ("fast", 0.2)):
            returns.leaves("s", [name])
            now[0] += seconds
            returns.comes("s")
    assert returns.leaves("a", ["slow"]) == pytest.approx(30, rel=0.01)
    assert returns.leaves("b", ["fast"]) == pytest.approx(0.2, rel=0.01)
    assert returns.leaves("c", ["fast", "slow"]) == pytest.approx(30, rel=0.01)
    assert returns.leaves("d", ["new"]) == 1.0
    returns.forget("a")
    now[0] += 1000
    returns.comes("a")
    returns.comes("never left")
    assert returns.leaves("a", ["slow"]) == pytest.approx(30, rel=0.01)


async def left(when, model, asked):
    """Goes away from a turn."""
    async with anyio.create_task_group() as group:
        group.start_soon(turn, model, asked)
        while not when():
            await anyio.sleep(0.01)
        group.cancel_scope.cancel()


def test_whoever_goes_away_leaves_no_page():
    async def main(model):
        asked = Request((user("Go."),), settings=ENDLESS)
        stream = model.stream(asked)
        async with contextlib.aclosing(stream):
            async for item in stream:
                assert isinstance(item, TextDelta)
                break
        await left(lambda: len(engine.seen) == 2, model, asked)

    with serving() as (model, engine):
        anyio.run(main, model)
        assert comes(lambda: not engine.has_work())
    assert not engine.has_work() and not engine.scheduler.running
    assert engine.stats().pages_used == 0
    assert len(engine.seen) == 2 and max(o.completion_tokens for o in engine.told) < 1500


def test_an_abort_frees_pages_before_the_next_step():
    steps = []

    class Counting(Steered):
        def abort(self, id):
            super().abort(id)
            steps.append((self.stats().pages_used, id in self._ids))

    engine = Counting()
    with EngineModel(engine, TOKENIZER) as model:
        asked = Request((user("Go."),), settings=ENDLESS)
        anyio.run(left, lambda: engine.scheduler.running, model, asked)
    assert steps == [(0, False)]


def test_accounts_add_up_to_the_engine(monkeypatch):
    clock = SimpleNamespace(perf_counter=lambda: now[0], monotonic=time.monotonic)
    monkeypatch.setattr("agent.engine_thread.time", clock)
    now = [0.0]

    def second():
        now[0] += 1.0
        return step()

    with serving() as (model, engine):
        step, engine.step = engine.step, second
        names = ["a", "b", "c"]
        for _ in range(2):
            few = [dataclasses.replace(SHORT, max_tokens=10 + 20 * i) for i in range(3)]
            asked = zip(names, few, strict=True)
            taken(model, *[Request((user(n * 200),), settings=x, session=n) for n, x in asked])
        accounts = [model.account(n) for n in names]
        total = model.total
    assert sum(a.engine_s for a in accounts) == pytest.approx(total.engine_s)
    assert total.engine_s == now[0] > 40
    assert sum(a.page_s for a in accounts) == pytest.approx(total.page_s) and total.page_s > 0
    assert accounts[0].engine_s < accounts[2].engine_s and accounts[0].page_s < accounts[2].page_s
