"""Seeing a run: spans and metrics by the conventions, a page that shows hostile text as text, costs
that add up."""

import functools
import re
from html.parser import HTMLParser

import anyio
import pytest

from agent import genai_names as names
from agent.journal import MemoryStore, fork
from agent.loop import run
from agent.many import agent_tool
from agent.messages import Message
from agent.model import Completion, Usage
from agent.redact import Redactor
from agent.scripted import ScriptedModel, call
from agent.spec import Agent
from agent.telemetry import export
from agent.tools import tool
from agent.trace_page import family, page
from jaxinfra.errors import UserError

HOSTILE = "<script>alert('x')</script><img src=x onerror=alert(1)>"


@tool(effects="pure", untrusted=True)
async def browse() -> str:
    """Reads."""
    return HOSTILE


@tool(effects="pure")
async def fail() -> str:
    """Fails."""
    raise RuntimeError("no")


def sample(session: str = "s", redactor=None) -> MemoryStore:
    store = MemoryStore()
    turns = [call("browse"), call("fail"), call("helper", task="sum"), HOSTILE]

    def turn(request):
        said = sum(m.role == "assistant" for m in request.messages)
        message = turns[said] if isinstance(turns[said], Message) else Message("assistant", HOSTILE)
        return Completion(message, Usage(100, 10, 60, 0.25), "calls" if message.calls else "stop")

    helper = Agent("helper", ScriptedModel([Completion(Message("assistant", "3"),
                                                       Usage(7, 3, 0, 0.5))]))  # fmt: skip
    agent = Agent("chief", ScriptedModel(turn), "Be careful with hunter2-hunter2.",
                  tools=(browse, fail, agent_tool(helper, store)))  # fmt: skip
    anyio.run(functools.partial(run, agent, HOSTILE, store=store, session=session,
                                redactor=redactor))  # fmt: skip
    return store


def test_spans_follow_the_conventions():
    sdk = pytest.importorskip("opentelemetry.sdk.trace")
    from opentelemetry.sdk.metrics import MeterProvider
    from opentelemetry.sdk.metrics.export import InMemoryMetricReader
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    kept, reader = InMemorySpanExporter(), InMemoryMetricReader()
    provider, meters = sdk.TracerProvider(), MeterProvider([reader])
    provider.add_span_processor(SimpleSpanProcessor(kept))
    events = anyio.run(sample(redactor=Redactor({"PW": "hunter2-hunter2"})).read, "s")
    options = {"tracer_provider": provider, "meter_provider": meters}
    assert export(events, "s", **options) == len(kept.get_finished_spans()) == 8
    by_name: dict = {}
    for span in kept.get_finished_spans():
        by_name.setdefault(span.name, []).append(span)
    (root,) = by_name["invoke_agent chief"]
    chats = by_name["chat scripted"]
    (browsed,), (failed,) = by_name["execute_tool browse"], by_name["execute_tool fail"]
    assert len(chats) == 4 and root.parent is None
    assert all(s.parent.span_id == root.context.span_id for s in (*chats, browsed, failed))
    assert all(root.start_time <= s.start_time <= s.end_time <= root.end_time + 1 for s in chats)
    got = dict(chats[0].attributes)
    assert got[names.INPUT_TOKENS] == 100 and got[names.CACHED_TOKENS] == 60
    assert got[names.CONVERSATION] == "s" and got[names.OPERATION] == "chat"
    assert browsed.attributes[names.TAINTED] and failed.attributes[names.ERROR] == "exception"
    assert not failed.status.is_ok and browsed.status.is_ok
    assert HOSTILE not in str([dict(s.attributes) for s in kept.get_finished_spans()])
    data = reader.get_metrics_data().resource_metrics[0].scope_metrics[0].metrics
    tokens = next(m for m in data if m.name == "gen_ai.client.token.usage")
    sums = {p.attributes[names.TOKEN_TYPE]: p.sum for p in tokens.data.data_points}
    assert sums == {"input": 400, "output": 40} and tokens.unit == "{token}"
    kept.clear()
    export(events, "s", content=True, **options)
    text = str([dict(s.attributes) for s in kept.get_finished_spans()])
    assert "alert" in text and "hunter2" not in text
    provider.shutdown()
    meters.shutdown()


def test_names_are_those_of_the_conventions():
    found = pytest.importorskip("opentelemetry.semconv._incubating.attributes.gen_ai_attributes")
    known = {value for name, value in vars(found).items() if name.startswith("GEN_AI")}
    ours = {v for v in vars(names).values() if isinstance(v, str) and v.startswith("gen_ai.")}
    assert ours and ours <= known


class Checker(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple] = []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs


def test_the_page_shows_everything_and_runs_nothing():
    store = sample()
    made = page("s", anyio.run(family, store, "s"))
    checker = Checker()
    checker.feed(made)
    assert not {"script", "img", "iframe", "link"} & set(checker.tags)
    assert not [a for a, _ in checker.attributes if a.startswith("on") or a in ("src", "href")]
    assert "&lt;script&gt;" in made and "a stranger may have written this" in made
    assert checker.tags.count("rect") == 8 + 2  # our spans and the helper's
    assert "default-src &#x27;none&#x27;" in made or "default-src 'none'" in made


def test_costs_of_branches_add_up():
    store = sample()

    async def main():
        await fork(store, "s", "branch", at=3)
        return await family(store, "s")

    found = anyio.run(main)
    assert set(found) == {"s", "branch", next(n for n in found if n.endswith(":helper"))}
    made = page("s", found)
    total = re.search(r"<tr><th>all<th><th>(.*?)</table>", made)
    assert total is not None
    assert "<th>1.5</th>" in total.group(1)  # 4 turns at 0.25, the helper's 0.5, the fork nothing
    assert "<th>407</th>" in total.group(1)
    with pytest.raises(UserError, match="no session 'x'"):
        anyio.run(family, store, "x")


def test_a_crashed_run_is_shown_as_unfinished():
    store = sample()

    async def main():
        events = await store.read("s")
        cut = MemoryStore()
        await cut.append("s", 0, [r.event for r in events[:3]])
        return await family(cut, "s")

    assert "&quot;error.type&quot;: &quot;unfinished&quot;" in page("s", anyio.run(main))
