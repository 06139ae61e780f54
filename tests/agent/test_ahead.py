"""What an engine does while a turn is written and while its tools run: calls that begin early,
pages in host memory, and what stands before a result, by the engine's own counters."""

import dataclasses
import functools
import threading

import anyio
import anyio.lowlevel
import pytest

from agent import Agent, Context, MemoryStore, run, tool
from agent.engine_sessions import Sessions
from agent.events import ToolFinished, ToolStarted
from agent.execute import PARALLEL
from agent.messages import Message, ToolCall
from agent.model import CallDelta, Completion, Request
from agent.policy import Guardrail, Policy, Rule
from agent.scripted import ScriptedModel, call, calls
from decode.page_moves import PageMoves
from tests.agent.compat_server import call as written
from tests.agent.steered_engine import SHORT, by_script, called, comes, quiet, serving, taken
from tests.agent.test_models import TOOL

SIZE = 16  # tokens of a page


def evict(model, engine):
    """Other sequences take all pages that can be had."""
    quiet(model)
    model._thread.order(lambda: engine.cache.evict(1 << 20, 0.0))
    quiet(model)


def second_turn(model, engine, messages):
    """Goes on in session "s"; what it found cached, and the bits of what it drew."""
    before = model.account("s").cached
    taken(model, Request(messages, (TOOL,), settings=SHORT, session="s"))
    return model.account("s").cached - before, engine.bits(engine.seen[-1].id)


@pytest.fixture(scope="module")
def undisturbed():
    with serving(by_script, leased=0.5) as (model, engine):
        messages = called(model)
        quiet(model)  # what is read ahead of the tool's result is cached, as it is in the others
        engine.script = None
        return second_turn(model, engine, messages)


def backwards(self, pages, held, start=0):
    good(self, pages[::-1], held, start)


good = PageMoves.into


@pytest.mark.parametrize("wrong", [None, "no room", "pages in another order"])
def test_pages_come_back_from_host_memory_bit_for_bit(wrong, undisturbed, monkeypatch):
    if wrong == "pages in another order":
        monkeypatch.setattr(PageMoves, "into", backwards)
    with serving(by_script, leased=0.0, host=float(wrong != "no room")) as (model, engine):
        messages = called(model)
        evict(model, engine)
        engine.script = None
        assert model.leases == 0 and engine.stats().pages_cached == 0
        assert (model.host.pages > 0) == (wrong != "no room")
        found, bits = second_turn(model, engine, messages)
        account = model.account("s")
        restored = model.host.restored
    if wrong == "no room":
        assert restored == 0 and account.recomputed > 0 and account.miss.cause == "evicted"
    else:
        assert restored > 0 and account.recomputed == 0 and model.host.pages == 0
        assert found == undisturbed[0]
    assert (bits == undisturbed[1]) == (wrong != "pages in another order")


def test_pages_are_kept_put_away_or_dropped_by_when_they_are_wanted():
    with serving(by_script, lease=600.0, leased=1.0, host=0.3) as (model, _):

        def hold(session, seconds):
            called(model, session)
            quiet(model)
            model._thread.order(model._thread.hold, session, model.tokens(session), seconds, "")
            quiet(model)
            return session in model._thread.held, session in model.host._stored

        assert hold("soon", 300.0) == (True, False)
        assert hold("later", 3000.0) == (False, True)
        assert hold("never", 30_000.0) == (False, False)
        # Where host memory is full, what is wanted last goes.
        assert hold("sooner", 1000.0) == (False, True) and "later" not in model.host._stored
        assert hold("last", 5900.0) == (False, False) and model.host.pages <= 0.3 * 256
        model.release("sooner")
        assert comes(lambda: model.host.pages == 0)
    with serving(by_script, lease=0.5, leased=1.0, host=1.0) as (model, _):
        called(model)  # its lease ends, and its pages are where there is room
        assert comes(lambda: model.leases == 0 and model.host.pages > 0)


def test_weights_that_changed_make_host_pages_worthless():
    with serving(by_script, leased=0.0, host=1.0) as (model, engine):
        messages = called(model)
        quiet(model)
        assert model.host.pages > 0
        engine.cache.clear()
        engine.script = None
        second_turn(model, engine, messages)
        assert model.host.restored == 0 and model.account("s").recomputed > 0


@pytest.mark.parametrize("wrong", [None, "nothing is read", "what never comes is read"])
def test_what_stands_before_a_result_is_read_while_the_tool_runs(wrong, monkeypatch):
    ahead = []

    def spoilt(self, request, known, max_len):
        ahead.append(right(self, request, known, max_len))
        return {"nothing is read": (), "what never comes is read": (65,) * 40}.get(wrong, ahead[-1])

    right = Sessions.ahead
    monkeypatch.setattr(Sessions, "ahead", spoilt)
    with serving(by_script) as (model, engine):
        messages = called(model)
        quiet(model)
        assert len(engine.read) == (wrong != "nothing is read")
        engine.script = None
        before, tokens = model.account("s").cached, len(model.tokens("s"))
        taken(model, Request(messages, (TOOL,), settings=SHORT, session="s"))
        found = model.account("s").cached - before
        prompt = engine.seen[-1].prompt
    assert prompt[tokens : tokens + len(ahead[0])] == ahead[0] and len(ahead[0]) > SIZE
    assert prompt[tokens + len(ahead[0]) :][:2] == tuple(b"42")  # the result is what is new
    whole = (tokens + len(ahead[0])) // SIZE * SIZE
    assert (found == whole) == (wrong is None) and found >= (tokens - 1) // SIZE * SIZE


def test_a_result_that_is_there_already_ends_the_reading():
    with serving(by_script) as (model, engine):
        messages = called(model)  # and at once:
        taken(model, Request(messages, (TOOL,), settings=SHORT, session="s"))
        assert model.account("s").recomputed == 0
        quiet(model)
        assert engine.stats().pages_used == 0


def two_calls(prompt):
    if prompt.count("<|im_start|>assistant") > 1:
        return "Done."
    return written("look", at="here") + "\n" + written("look", at="there" * 12)


@pytest.mark.parametrize("effects", ["pure", "idempotent"])
def test_a_tool_begins_when_its_arguments_close(effects):
    """Counted in steps of the engine: the second call's tokens are drawn after the first began."""
    begun, store, one_began = [], MemoryStore(), threading.Event()

    @tool(effects=effects)
    async def look(at: str) -> str:
        """Looks."""
        begun.append((at, engine._steps))
        one_began.set()
        return at

    def patient():
        """Where a call is to begin early, the engine waits for it, soon behind the call."""
        first = len(engine.seen[0].prompt) // SIZE + len(written("look", at="here"))
        if effects == "pure" and engine._steps == first + 10:
            one_began.wait(60)
        return step()

    with serving(two_calls) as (model, engine):
        step, engine.step = engine.step, patient
        agent = Agent("a", model, "Look.", (look,))
        result = anyio.run(functools.partial(run, agent, "Where?", store=store, session="s"))
        steps = len(engine.seen[0].prompt) // SIZE + len(result.state.messages[1].tokens)
    assert [at for at, _ in begun] == ["here", "there" * 12] and result.output == "Done."
    early = begun[0][1] < steps - 50
    assert early == (effects == "pure"), (begun, steps)
    events = [r.event for r in anyio.run(store.read, "s")]
    ended = [e for e in events if isinstance(e, ToolFinished)]
    ids = [c.id for c in result.state.messages[1].calls]
    assert [e.call_id for e in ended] == ids and all(e.error is None for e in ended)
    assert sum(isinstance(e, ToolStarted) for e in events) == 2


async def turns(count):
    """Lets every other task run so many times: a wait that is as long on any machine."""
    for _ in range(count):
        await anyio.lowlevel.checkpoint()


class Slowly(ScriptedModel):
    """Closes its calls' arguments, says what comes behind them, be it nothing, gives all other
    tasks many turns, and then ends its own, or says another."""

    def __init__(self, script, other=None):
        super().__init__(script)
        self.other = other

    async def stream(self, request):
        async for item in super().stream(request):
            if isinstance(item, CallDelta):
                closed = item.arguments.rstrip()
                yield dataclasses.replace(item, arguments=closed)
                item = dataclasses.replace(item, arguments=item.arguments[len(closed) :])
            if isinstance(item, Completion) and item.message.calls:
                await turns(100)
                if self.other is not None:
                    item = dataclasses.replace(item, message=self.other)
            yield item


@pytest.fixture
def world():
    """Tools that note when they begin and what they were ended in."""

    class World:
        def __init__(self):
            self.log = []

        def tools(self, **options):
            @tool(effects="pure", **options)
            async def read(n: int) -> str:
                """Reads."""
                self.log.append(f"begin {n}")
                try:
                    await (turns(20) if n < 9 else anyio.sleep_forever())
                except anyio.get_cancelled_exc_class():
                    self.log.append(f"cancelled {n}")
                    raise
                return f"{n}"

            @tool(effects="write")
            async def write(n: int) -> str:
                """Writes."""
                self.log.append(f"write {n}")
                return "written"

            @tool(effects="pure")
            async def recall(ctx: Context, n: int) -> str:
                """Reads what the session has."""
                self.log.append(f"recall for {ctx.key}")
                return ctx.call_id

            return read, write, recall

        def run(self, turn, other=None, policy=None, guardrails=(), **options):
            model = Slowly([turn, "end"], other)
            agent = Agent("a", model, tools=self.tools(**options), policy=policy or Policy(),
                          guardrails=guardrails)  # fmt: skip
            seen = []

            async def main():
                hear = model.stream

                async def stream(request):
                    async for item in hear(request):
                        if isinstance(item, Completion | CallDelta):
                            seen.append((type(item).__name__, list(self.log)))
                        yield item

                model.stream = stream
                return await run(agent, "go")

            self.result = anyio.run(main)
            return next(log for kind, log in seen if kind == "Completion")

    return World()


def plain(name, arguments):
    return Message("assistant", calls=(ToolCall("", name, arguments),))


@pytest.mark.parametrize("behind", ["", "\n"])
def test_only_what_nobody_misses_begins_early(world, behind):
    turn = calls(plain("read", '{"n": 1}' + behind), call("read", n=2))
    assert world.run(turn) == ["begin 1", "begin 2"]
    assert world.log == ["begin 1", "begin 2"]  # and does not run again


def test_as_many_begin_early_as_may_run_side_by_side(world):
    turn = calls(*(call("read", n=-i) for i in range(3 * PARALLEL)))
    assert len(world.run(turn)) == PARALLEL
    assert sorted(world.log) == sorted(f"begin {-i}" for i in range(3 * PARALLEL))


@pytest.mark.parametrize(
    "turn, options",
    [
        (calls(call("write", n=1), call("read", n=2)), {}),
        (calls(plain("write", ""), call("read", n=2)), {}),
        (call("recall", n=1), {}),
        (call("read", n=1), {"policy": Policy((Rule("read", "ask"),))}),
        (call("read", n=1), {"policy": Policy((Rule("read", "deny"),))}),
        (call("read", n=1), {"guardrails": (Guardrail("g", "call", lambda text: "no"),)}),
        (call("read", n=1), {"serial": True}),
        (call("read", n="one"), {}),
        (call("reed", n=1), {}),
    ],
    ids=[
        "behind a write",
        "behind one without arguments",
        "takes context",
        "asks",
        "denied",
        "guarded",
        "serial",
        "arguments",
        "unknown",
    ],
)
def test_what_may_not_begin_early(world, turn, options):
    assert world.run(turn, **options) == []


def test_what_the_turn_does_not_hold_is_ended(world):
    other = call("read", n=3)
    world.run(call("read", n=9), other)
    assert world.log == ["begin 9", "begin 3", "cancelled 9"]
    assert [m.content for m in world.result.state.messages if m.role == "tool"] == ["3"]
