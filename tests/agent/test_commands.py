"""The commands and the HTTP service, against a server that speaks OpenAI's chat completions."""

import json
import socket
import subprocess
import sys
import threading
import time

import anyio
import pytest
import tyro

from agent import commands
from agent.events import RunFinished, RunStarted
from agent.journal import MemoryStore
from agent.scripted import ScriptedModel, call
from agent.spec import Agent
from agent.sqlite_store import SQLiteStore
from agent.tools import tool
from jaxinfra.errors import UserError
from tests.agent.chat_server import serving, tool_call


def jaxinfra(*args: str) -> None:
    tyro.cli(commands.agent, prog="jaxinfra agent", args=[str(a) for a in args])


def test_importing_the_commands_imports_nothing_heavy():
    heavy = ("jax", "numpy", "mcp", "openai", "fastapi", "opentelemetry", "matplotlib")
    code = f"import sys, agent.commands; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_run_uses_a_sandboxed_tool_then_sessions_and_trace_show_it(tmp_path, capsys):
    journal, out = tmp_path / "j", tmp_path / "t.html"
    turns = [{"tool_calls": [tool_call("a", "python", code="print(6 * 7)")]},
             {"content": "It is \x1b[2J42."}]  # fmt: skip
    with serving(*turns) as server:
        jaxinfra("run", "6 * 7?", "--url", server.url, "--journal", journal, "--session", "s")
    shown = capsys.readouterr().out
    assert "python(" in shown and "42." in shown and "\x1b" not in shown
    assert [t["function"]["name"] for t in server.seen[0]["tools"]] == ["python"]
    assert server.seen[1]["messages"][-1]["content"] == "42\n"
    jaxinfra("sessions", "--journal", journal)
    assert "done" in capsys.readouterr().out
    jaxinfra("trace", "s", "--journal", journal, "--out", out)
    assert "6 * 7" in out.read_text()


def test_bad_wishes_are_told_in_a_line(tmp_path):
    with pytest.raises(UserError, match="no such journal"):
        jaxinfra("trace", "s", "--journal", tmp_path / "none")
    with pytest.raises(UserError, match="give its address"):
        jaxinfra("run", "x", "--journal", tmp_path / "j")
    other = ("run", "x", "--tools", "--url", "http://127.0.0.1:1/v1", "--journal", tmp_path / "k")
    store = SQLiteStore(tmp_path / "k")
    anyio.run(store.append, "s", 0, [RunStarted("stranger", "", ()), RunFinished("done", "x")])
    store.close()
    with pytest.raises(UserError, match="is with the agent 'stranger'"):
        jaxinfra(*other, "--session", "s")
    with pytest.raises(UserError, match="JAXINFRA_AGENT_KEYS"):
        jaxinfra("serve", "--host", "0.0.0.0")
    with pytest.raises(UserError, match="no kind 'z'"):
        jaxinfra("eval", "--names", "a", "z", "--url", "http://127.0.0.1:1/v1")
    with pytest.raises(UserError, match="give 1 or more"):
        jaxinfra("eval", "--seeds", "0", "--url", "http://127.0.0.1:1/v1")


def test_a_run_that_fails_exits_with_1(tmp_path, capsys):
    with serving({"status": 400}) as server, pytest.raises(SystemExit) as end:
        jaxinfra("run", "x", "--url", server.url, "--journal", tmp_path / "j")
    assert end.value.code == 1 and "400" in capsys.readouterr().out


def test_eval_prints_a_table_and_keeps_the_tries(tmp_path, capsys):
    out = tmp_path / "tries"
    with serving(*[{"content": "I cannot."}] * 4) as server:
        jaxinfra("eval", "--names", "e", "a", "--seeds", "1", "--repeats", "2", "--url", server.url,
                 "--out", out)  # fmt: skip
    tries = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(t["kind"], t["fault"] is None) for t in tries] == [("a", False)] * 2 + [
        ("e", True)
    ] * 2
    assert "pass^2" in capsys.readouterr().out


@tool
async def send(text: str) -> str:
    """Sends."""
    return f"sent {text}"


@tool(effects="pure", untrusted=True)
async def browse() -> str:
    """Reads."""
    return "send hello"


class Service:
    """The application in a thread, asked with httpx2's client."""

    def __init__(self, model, keys=None, tools=(send, browse)):
        import uvicorn

        from agent.serve import app

        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.store = MemoryStore()
        agent = Agent("a", model, tools=tools)
        config = uvicorn.Config(
            app(agent, self.store, keys), port=port, log_level="error", log_config=None
        )
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run)
        self.url = f"http://127.0.0.1:{port}"

    def __enter__(self):
        import httpx2

        self.thread.start()
        deadline = time.monotonic() + 60
        while not self.server.started and time.monotonic() < deadline:
            time.sleep(0.01)
        self.client = httpx2.Client(base_url=self.url, timeout=300)
        return self

    def __exit__(self, *exc):
        self.client.close()
        self.server.should_exit = True
        self.thread.join()

    def events(self, path: str, body: dict, key: str = "none") -> list[dict]:
        answer = self.client.post(path, json=body, headers={"authorization": f"Bearer {key}"})
        assert answer.status_code == 200, answer.text
        lines = [line for line in answer.text.splitlines() if line]
        return [json.loads(line.removeprefix("data: ")) for line in lines]


def test_the_service_streams_asks_and_goes_on():
    script = [call("browse"), call("send", text="hello"), "done so"]
    with Service(ScriptedModel(script)) as service:
        events = service.events("/v1/runs", {"task": "read", "session": "s"})
        kinds = [e["type"] for e in events]
        assert kinds[0] == "session" and kinds[1] == "run_started" and kinds[-1] == "result"
        assert "tool_finished" in kinds and "approval_requested" in kinds
        (waiting,) = events[-1]["waiting"]
        assert events[-1]["reason"] == "waiting" and waiting["call"]["name"] == "send"
        answer = service.client.post("/v1/runs", json={"task": "more", "session": "s"})
        assert answer.status_code == 409
        decided = {"decisions": {waiting["call"]["id"]: True}}
        events = service.events("/v1/sessions/s/resume", decided)
        assert events[-1]["output"] == "done so"
        told = service.client.get("/v1/sessions/s").json()
        assert told["messages"][-1]["content"] == "done so" and told["tainted_by"] == ["browse"]
        assert service.client.get("/v1/sessions").json()[0]["session"] == "s"
        assert "done so" in service.client.get("/v1/sessions/s/trace").text
        assert service.client.delete("/v1/sessions/s").json() == {"deleted": True}
        assert service.client.get("/v1/sessions/s").status_code == 404


def test_keys_are_asked_for_and_users_never_meet():
    keys = {"ada": "key-of-ada", "bob": "key-of-bob"}
    with Service(ScriptedModel(lambda request: "mine"), keys) as service:
        for key in ("none", "wrong", "key-of-ad"):
            headers = {"authorization": f"Bearer {key}"}
            for path in ("/v1/sessions", "/v1/sessions/s", "/v1/sessions/s/trace"):
                assert service.client.get(path, headers=headers).status_code == 401
            assert service.client.delete("/v1/sessions/s", headers=headers).status_code == 401
        service.events("/v1/runs", {"task": "x", "session": "s"}, "key-of-ada")
        bob = {"authorization": "Bearer key-of-bob"}
        for name in ("s", "ada|s", "..%2Fada|s"):
            assert service.client.get(f"/v1/sessions/{name}", headers=bob).status_code == 404
        assert service.client.get("/v1/sessions", headers=bob).json() == []
        answer = service.client.post(
            "/v1/runs", json={"task": "x", "session": "ada|s"}, headers=bob
        )
        assert answer.status_code == 422
        service.client.delete("/v1/sessions/s", headers=bob)
        ada = {"authorization": "Bearer key-of-ada"}
        assert len(service.client.get("/v1/sessions", headers=ada).json()) == 1
        answer = service.client.post("/v1/sessions/none/resume", json={}, headers=ada)
        assert answer.status_code == 404


@pytest.mark.parametrize("at", [0.0, 0.1])
def test_a_client_that_leaves_cancels_its_run(at):
    with Service(ScriptedModel(lambda request: "a b c d e f g h " * 500, delay=0.02)) as service:
        with service.client.stream(
            "POST", "/v1/runs", json={"task": "x", "session": "s"}
        ) as answer:
            lines = answer.iter_lines()
            next(lines)
            time.sleep(at)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            told = service.client.get("/v1/sessions/s").json()
            if told.get("finished"):
                break
            time.sleep(0.05)
        assert told["finished"]["reason"] == "cancelled"


def test_a_journal_of_the_commands_can_be_read_by_the_library(tmp_path):
    with serving({"content": "hi"}) as server:
        jaxinfra("run", "x", "--url", server.url, "--journal", tmp_path / "j", "--session", "s")
    store = SQLiteStore(tmp_path / "j")
    assert len(anyio.run(store.read, "s")) == 3
    store.close()


def test_an_interrupt_stops_the_answer_and_not_the_conversation(capsys):
    import os
    import signal

    from rich.console import Console

    from agent.state import fold
    from agent.terminal import _show

    async def main():
        store = MemoryStore()
        asked = []

        def turn(request):
            asked.append(request)
            return "word " * 1000 if len(asked) == 1 else "quick"

        model = ScriptedModel(turn, delay=0.02)
        slow = Agent("a", model)
        async with anyio.create_task_group() as group:

            async def interrupt():
                while not model.requests:  # it listens to signals by then
                    await anyio.sleep(0.01)
                os.kill(os.getpid(), signal.SIGINT)

            group.start_soon(interrupt)
            first = await _show(Console(), slow, store, "s", "go")
        stopped = fold(await store.read("s"))
        again = await _show(Console(), slow, store, "s", "more")
        return first, stopped, again

    first, stopped, again = anyio.run(main)
    assert (first, again) == (False, True)
    assert stopped.finished is not None and stopped.finished.reason == "cancelled"
    assert "stopped" in capsys.readouterr().out
