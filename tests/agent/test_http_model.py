"""The model behind HTTP, against a real server in this process."""

import functools
from typing import Literal

import anyio
import pytest
from pydantic import BaseModel

from agent.events import CallDelta, Retried, TextDelta
from agent.http_model import HTTPModel
from agent.loop import run, run_stream
from agent.model import Price, Settings
from agent.spec import Agent
from agent.tools import tool
from tests.agent.chat_server import serving, tool_call


@tool(effects="pure")
def weather(city: str, days: int = 1) -> str:
    """Forecasts."""
    return f"{city}: snow for {days} days"


def ask(agent: Agent, task: str = "How is Oslo?"):
    return anyio.run(functools.partial(run, agent, task))


def test_two_turns_with_a_tool(monkeypatch):
    monkeypatch.setenv("TEST_KEY", "sesame-open-123")
    turns = [
        {"content": "Let me look.", "tool_calls": [tool_call("a", "weather", city="Oslo ☃"),
                                                   tool_call("b", "weather", city="Rome", days=2)]},
        {"content": "Snow — everywhere."},
    ]  # fmt: skip
    with serving(*turns) as server:
        model = HTTPModel("m", server.url, "TEST_KEY", price=Price(1.0, 2.0, 0.5))
        settings = Settings(temperature=0.0, max_tokens=64, seed=7, stop=("END",))
        agent = Agent("a", model, "Be brief.", (weather,), settings=settings)
        result = ask(agent)
    assert (result.reason, result.output) == ("done", "Snow — everywhere.")
    first, second = server.seen
    assert first["tools"][0]["function"]["parameters"]["required"] == ["city"]
    assert (first["seed"], first["stop"], first["max_tokens"]) == (7, ["END"], 64)
    assert first["prompt_cache_key"] == second["prompt_cache_key"] == result.session
    assert second["messages"][: len(first["messages"])] == first["messages"]
    said, *told = second["messages"][2:]
    assert said["content"] == "Let me look." and len(said["tool_calls"]) == 2
    assert [t["content"] for t in told] == ["Oslo ☃: snow for 1 days", "Rome: snow for 2 days"]
    assert server.headers[0]["Authorization"] == "Bearer sesame-open-123"
    assert "sesame" not in repr(model) and "sesame" not in repr(result)
    spent = result.state.spent
    assert spent.tokens == 220
    assert spent.cost == pytest.approx(2 * (40 * 1.0 + 60 * 0.5 + 10 * 2.0) / 1e6)


def test_faults_that_may_pass_are_retried_and_named():
    turns = [{"status": 503}, {"content": "abcdefgh", "cut": 2}, {"status": 429}, {"content": "ok"}]
    with serving(*turns) as server:
        agent = Agent("a", HTTPModel("m", server.url))
        events: list = []

        async def main():
            async with run_stream(agent, "hi") as stream:
                async for event in stream:
                    events.append(event)
            return stream.result

        result = anyio.run(main)
    assert result is not None and result.output == "ok"
    assert [e.attempt for e in events if isinstance(e, Retried)] == [1, 2, 3]
    texts = [e.text for e in events if isinstance(e, TextDelta)]
    assert texts == ["abcd", "ok"]
    errors = [e.error for e in events if isinstance(e, Retried)]
    assert "503" in errors[0] and "ended" in errors[1] and "429" in errors[2]


def test_faults_that_stay_end_the_run_in_words():
    with serving({"status": 400}) as server:
        result = ask(Agent("a", HTTPModel("m", server.url)))
    assert result.reason == "error" and "400" in result.detail and len(server.seen) == 1
    gone = Agent("a", HTTPModel("m", "http://127.0.0.1:9/v1"), transport_retries=1)
    result = ask(gone)
    assert result.reason == "error" and "127.0.0.1:9" in result.detail


class Verdict(BaseModel):
    label: Literal["good", "bad"]
    score: int


def test_structured_answers_with_and_without_tools():
    with serving({"content": '{"label": "fine", "score": 1}'},
                 {"content": '{"label": "good", "score": 1}'}) as server:  # fmt: skip
        result = ask(Agent("a", HTTPModel("m", server.url), output_type=Verdict))
        assert result.output == Verdict(label="good", score=1)
        sent = server.seen[0]["response_format"]["json_schema"]["schema"]
        assert sent["properties"]["label"]["enum"] == ["good", "bad"]
        assert "does not fit its schema: label" in server.seen[1]["messages"][-1]["content"]
    answer = {"label": "bad", "score": 2}
    with serving({"tool_calls": [tool_call("", "weather", city="Oslo")]},
                 {"tool_calls": [tool_call("", "final_result", answer={"label": "?"})]},
                 {"tool_calls": [tool_call("", "final_result", answer=answer)]},
                 ) as server:  # fmt: skip
        agent = Agent("a", HTTPModel("m", server.url), "", (weather,), output_type=Verdict)
        result = ask(agent)
        assert result.output == Verdict(label="bad", score=2)
        assert [s["tool_choice"] for s in server.seen] == ["required"] * 3
        ids = [c["id"] for m in server.seen[-1]["messages"] for c in m.get("tool_calls", ())]
        assert len(set(ids)) == len(ids) == 2 and all(ids)


def test_argument_deltas_are_streamed():
    with serving({"tool_calls": [tool_call("a", "weather", city="Oslo")]}, {"content": "x"}) as s:
        pieces: list[str] = []

        async def main():
            agent = Agent("a", HTTPModel("m", s.url), "", (weather,))
            async with run_stream(agent, "hi") as stream:
                async for event in stream:
                    if isinstance(event, CallDelta):
                        pieces.append(event.arguments)

        anyio.run(main)
    assert "".join(pieces) == '{"city": "Oslo"}' and len(pieces) > 3
