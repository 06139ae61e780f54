"""A2A: a round trip between two of our agents over HTTP; strangers stay strangers."""

import inspect
import socket
import threading
import time

import anyio
import pytest

from agent.agent2agent import a2a_app, a2a_tool
from agent.journal import MemoryStore
from agent.loop import run
from agent.messages import Message
from agent.scripted import ScriptedModel, call
from agent.spec import Agent
from agent.tools import tool
from jaxinfra.errors import UserError

uvicorn = pytest.importorskip("uvicorn")
pytest.importorskip("a2a", reason="a2a-sdk is optional")
sent: list[str] = []


@tool
async def send(text: str) -> str:
    """Sends."""
    sent.append(text)
    return "sent"


def remote(request) -> Message:
    said = request.messages[-1]
    if said.role == "tool":
        return Message("assistant", "done")
    if said.content == "slowly":
        time.sleep(0.5)
    if said.content == "send it":
        return call("send", text="x")
    return Message("assistant", said.content.upper())


@pytest.fixture(scope="module")
def url():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    where = f"http://127.0.0.1:{port}"
    agent = Agent("clerk", ScriptedModel(remote), tools=(send,), description="Shouts.")
    app = a2a_app(agent, MemoryStore(), where)
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="error", log_config=None))
    thread = threading.Thread(target=server.run)
    thread.start()
    deadline = time.monotonic() + 60
    while not server.started and time.monotonic() < deadline:
        time.sleep(0.01)
    yield where
    server.should_exit = True
    thread.join()


def ask(url: str, task: str):
    made = a2a_tool(url, "clerk")
    agent = Agent("a", ScriptedModel([call("clerk", task=task), "end"]), tools=(made,))
    return anyio.run(run, agent, "go")


def test_an_agent_asks_another_and_is_tainted_by_its_answer(url):
    result = ask(url, "hello there")
    assert result.state.messages[2].content == "HELLO THERE"
    assert result.reason == "done" and result.state.tainted_by == ("clerk",)


def test_an_agent_that_takes_its_time_is_waited_for(url, monkeypatch):
    httpx = pytest.importorskip("httpx")
    usual = inspect.signature(httpx.AsyncClient).parameters["timeout"].default
    monkeypatch.setattr(usual, "read", 0.2)  # five seconds, of a client that is told nothing
    assert ask(url, "slowly").state.messages[2].content == "SLOWLY"


def test_who_asks_from_elsewhere_can_cause_no_unapproved_effect(url):
    result = ask(url, "send it")
    assert sent == []
    assert "TASK_STATE_AUTH_REQUIRED" in result.state.messages[2].content


def test_the_card_tells_who_it_is_and_absence_is_one_line(url):
    import httpx2

    card = httpx2.get(f"{url}/.well-known/agent-card.json", timeout=120).json()
    assert card["name"] == "clerk" and card["description"] == "Shouts."
    result = ask("http://127.0.0.1:9", "x")
    assert "clerk at http://127.0.0.1:9" in result.state.messages[2].content
    with pytest.raises(UserError, match="models know letters"):
        a2a_tool(url, "not a name")
