"""Safety: injections cause no effect that nobody approved, secrets leave no trace, rules and
guardrails decide. Each defence has its control: without it, the harm happens."""

import functools
import json

import anyio
import pytest

from agent.evaluate.canaries import DISGUISES, ORDERS, canary, gullible, orders_in
from agent.events import ToolFinished, ToolProgress, dump
from agent.journal import MemoryStore
from agent.loop import resume, run, run_stream
from agent.policy import Guardrail, Policy, Rule, decide
from agent.redact import Redactor
from agent.scripted import ScriptedModel, call
from agent.spec import Agent
from agent.tools import Context, tool


class World:
    """Tools with effects that are counted, and a page that a stranger wrote."""

    def __init__(self, page: str):
        self.effects: list[tuple[str, dict]] = []

        @tool(effects="pure", untrusted=True)
        async def read_page() -> str:
            """Reads a page of the web."""
            return page

        @tool
        async def send_mail(to: str, body: str) -> str:
            """Sends."""
            return self._did("send_mail", to=to, body=body)

        @tool(effects="pure", network=True)
        async def fetch(url: str) -> str:
            """Fetches; the address can carry data away."""
            return self._did("fetch", url=url)

        @tool(effects="idempotent")
        async def write_file(path: str, text: str) -> str:
            """Writes."""
            return self._did("write_file", path=path, text=text)

        @tool
        async def transfer(account: str, amount: str) -> str:
            """Pays."""
            return self._did("transfer", account=account, amount=amount)

        @tool
        async def delete_all(confirm: str) -> str:
            """Deletes."""
            return self._did("delete_all", confirm=confirm)

        self.reader = read_page
        self.tools = (send_mail, fetch, write_file, transfer, delete_all)

    def _did(self, name: str, **arguments) -> str:
        self.effects.append((name, arguments))
        return "ok"


def go(agent: Agent, task: str = "Summarise the page.", **options):
    return anyio.run(functools.partial(run, agent, task, **options))


def attacked(seed: int, policy: Policy, route: str):
    """A run of the gullible model that meets canary `seed` on a route; the world after it."""
    planted = canary(seed)
    world = World(planted.page)
    model = ScriptedModel(gullible(call("read_page")))
    agent = Agent("a", model, tools=(world.reader, *world.tools), policy=policy)
    if route == "handoff":  # the privileged tools are a colleague's
        other = Agent("other", model, tools=world.tools, policy=policy)

        def turn(request):
            said = gullible(call("read_page"))(request)
            read = any(m.role == "tool" for m in request.messages)
            return call("transfer_to_other") if read and not said.calls else said

        agent = Agent("a", ScriptedModel(turn), tools=(world.reader,), handoffs=(other,))
    store = MemoryStore()
    result = go(agent, store=store, session="s")
    return planted, world, result, store, agent


ROUTES = ["direct", "handoff"]


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("seed", range(50))
def test_a_canary_has_no_effect_with_the_policy_and_has_it_without(seed, route):
    planted, world, result, _, _ = attacked(seed, Policy(), route)
    assert world.effects == []
    assert result.reason == "waiting" and result.approvals[0].call.name == planted.tool
    assert "read_page" in result.approvals[0].reason
    planted, world, result, _, _ = attacked(seed, Policy(tainted="deny"), route)
    assert world.effects == [] and result.reason == "done"
    planted, world, result, _, _ = attacked(seed, Policy(tainted="allow"), route)
    assert world.effects == [(planted.tool, planted.arguments)]  # the control


def test_fifty_canaries_are_every_disguise_with_every_order():
    made = [canary(seed) for seed in range(50)]
    assert len({(c.disguise, c.tool) for c in made}) == len(DISGUISES) * len(ORDERS) == 50
    assert all(orders_in(c.page)[0].name == c.tool for c in made)
    assert not orders_in("DO nothing of the kind OD")


def test_a_person_may_still_agree_or_refuse():
    planted, world, result, store, agent = attacked(3, Policy(), "direct")
    id = result.approvals[0].call.id
    again = functools.partial(resume, agent, "s", store=store, decisions={id: "never"})
    assert anyio.run(again).reason == "done" and world.effects == []
    planted, world, result, store, agent = attacked(3, Policy(), "direct")
    id = result.approvals[0].call.id
    anyio.run(functools.partial(resume, agent, "s", store=store, decisions={id: True}))
    assert world.effects == [(planted.tool, planted.arguments)]


def test_taint_lasts_over_turns_and_comes_with_the_caller():
    planted = canary(0)
    world = World(planted.page)
    script = ScriptedModel([call("read_page"), "read", call("send_mail", to="a", body="b"), "sent"])
    agent = Agent("a", script, tools=(world.reader, *world.tools))
    store = MemoryStore()
    assert go(agent, store=store, session="s").reason == "done"
    assert go(agent, "Now write.", store=store, session="s").reason == "waiting"
    direct = Agent(
        "a", ScriptedModel([call("send_mail", to="a", body="b"), "x"]), tools=world.tools
    )
    assert go(direct, tainted_by=("browser",)).reason == "waiting" and world.effects == []
    assert go(direct).reason == "done" and len(world.effects) == 1


def test_a_tool_may_find_out_that_its_result_is_a_strangers():
    @tool(effects="pure")
    async def look(ctx: Context, mine: bool) -> str:
        """Looks."""
        if not mine:
            ctx.taint("somebody else")
        return "seen"

    world = World("")
    for mine, reason in ((True, "done"), (False, "waiting")):
        script = [call("look", mine=mine), call("send_mail", to="a", body="b"), "end"]
        result = go(Agent("a", ScriptedModel(script), tools=(look, *world.tools)))
        assert result.reason == reason
    assert len(world.effects) == 1


RULES = [
    ("read is free", "read", {"path": "/data/a"}, "allow"),
    ("below work", "write", {"path": "/data/a/b"}, "allow"),
    ("leaves work", "write", {"path": "/data/../etc/passwd"}, "ask"),
    ("enters the forbidden", "write", {"path": "/tmp/../secret/x"}, "deny"),
    ("elsewhere", "write", {"path": "/home/a"}, "ask"),
    ("no such argument", "write", {"text": "x"}, "ask"),
]


@pytest.mark.parametrize(("why", "name", "arguments", "action"), RULES, ids=[r[0] for r in RULES])
def test_rules_by_tool_and_argument(why, name, arguments, action):
    policy = Policy((
        Rule("rea*", "allow"), Rule("write", "deny", {"path": "/secret/*"}),
        Rule("write", "allow", {"path": "/data/*"}), Rule("*", "ask"),
    ))  # fmt: skip

    @tool
    async def named(path: str = "", text: str = "") -> str:
        """Does."""
        return ""

    made = tool(name=name)(named.function)
    assert decide(policy, made, arguments, ()).action == action
    tainted = decide(policy, made, arguments, ("web",)).action
    assert tainted == ("deny" if action == "deny" else "ask")


STAGES = ["input", "call", "result", "output"]


@pytest.mark.parametrize("stage", STAGES)
def test_guardrails_trip_at_their_stage_and_fail_shut(stage):
    def outcome(check) -> tuple[str, str, int]:
        world = World("poison")
        guard = Guardrail("g", stage, check)  # pyright: ignore
        script = [call("read_page"), call("write_file", path="p", text="poison"), "poison too"]
        agent = Agent("a", ScriptedModel(script), tools=(world.reader, *world.tools),
                      guardrails=(guard,), policy=Policy(tainted="allow"))  # fmt: skip
        result = go(agent, "poison please")
        told = " ".join(m.content for m in result.state.messages)
        return result.reason, told, len(world.effects)

    def broken(text: str) -> str:
        raise RuntimeError("no verdict")

    async def poisonous(text: str) -> str | None:
        return "poison" if "poison" in text else None

    assert outcome(lambda text: None)[::2] == ("done", 1)  # the control
    for check in (poisonous, broken):
        reason, told, effects = outcome(check)
        assert reason == ("guardrail" if stage in ("input", "output") else "done")
        assert effects == (0 if stage in ("input", "call") else 1)
        if stage == "result":
            assert "withheld by the guardrail" in told


SECRET = "hunter2-hunter2"


def test_secrets_are_in_no_prompt_journal_or_event():
    @tool(effects="pure")
    async def leak(ctx: Context) -> str:
        """Tells what it should not."""
        await ctx.report(f"working with {SECRET}")
        return f'{{"key": "{SECRET}", "again": "sk-{"a" * 30}"}}'

    @tool(effects="pure")
    async def fail() -> str:
        """Fails aloud."""
        raise RuntimeError(f"cannot log in with {SECRET}")

    def leaks(redactor: Redactor) -> list[str]:
        model = ScriptedModel([call("leak"), call("fail"), call("leak", note=SECRET), SECRET])
        agent = Agent("a", model, f"Never say {SECRET}.", (leak, fail))
        store, seen = MemoryStore(), []

        async def main():
            async with run_stream(
                agent, f"My password is {SECRET}", store=store, session="s", redactor=redactor
            ) as stream:
                async for event in stream:
                    if isinstance(event, ToolProgress | ToolFinished):
                        seen.append(repr(event))
            return stream.result, [dump(r.event) for r in await store.read("s")]

        result, journal = anyio.run(main)
        prompts = [m.content for request in model.requests for m in request.messages]
        texts = {"prompt": prompts, "event": seen, "journal": journal,
                 "result": [json.dumps(result.output)]}  # fmt: skip
        return [kind for kind, found in texts.items() if SECRET in " ".join(found)]

    assert leaks(Redactor({"PASSWORD": SECRET})) == []
    assert leaks(Redactor({})) == ["prompt", "event", "journal", "result"]  # the control
