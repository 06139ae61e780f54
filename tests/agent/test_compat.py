"""Frameworks and clients of others, each in an environment of its own, unmodified against our
servers: they call a tool, get its result and answer."""

import json
import re
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

from agent.evaluate.environment import environment
from tests.agent.random_model import write

pytestmark = [pytest.mark.frameworks, pytest.mark.slow, pytest.mark.timeout(2400)]
CLIENTS = Path(__file__).with_name("clients")
FRAMEWORKS = {
    "openai_agents": ("openai-agents==0.24.0",),
    "pydantic_ai": ("pydantic-ai-slim[openai]==2.68.0",),
    "smolagents": ("smolagents[openai]==1.26.0",),
    "langgraph": ("langgraph==1.2.24", "langchain==1.5.2", "langchain-openai==1.7.4"),
    # What it imports and does not ask for comes after it.
    "qwen_agent": ("qwen-agent==0.0.34", "numpy", "python-dateutil", "soundfile", "tqdm"),
}
INSPECTOR = "@modelcontextprotocol/inspector@2.12.0"


@contextmanager
def server(*module: str):
    """A server of ours as a process; gives the address that it prints."""
    command = [sys.executable, "-m", *module]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            found = re.search(r"http://\S+?(?=,|\s|$)", process.stdout.readline())
            assert found is not None
            yield found[0]
        finally:
            process.terminate()
            process.wait(200)


def client(script: str, name: str, packages: tuple[str, ...], *arguments: str) -> dict:
    """What a client's script says of its run."""
    python = environment(name, packages)
    done = subprocess.run(
        [python, "-I", CLIENTS / f"{script}_client.py", *arguments], capture_output=True,
        text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout[done.stdout.rindex('{"') :] if name == "smolagents"
                      else done.stdout.splitlines()[-1])  # fmt: skip


@pytest.fixture(scope="module")
def openai_server():
    with server("tests.agent.compat_server") as address:
        yield address


@pytest.mark.parametrize("name", FRAMEWORKS)
def test_a_framework_calls_its_tool_and_answers(name, openai_server):
    told = client(name, name, FRAMEWORKS[name], openai_server)
    assert told["called"] and all(arguments == [6, 7] for arguments in told["called"])
    assert len(told["called"]) == len(told["answers"])
    assert all("42" in answer for answer in told["answers"]), told
    if name != "qwen_agent":  # it drops the usage
        assert told["tokens"] > 0
    if name == "pydantic_ai":
        assert told["native"] == 42
    if name == "langgraph":  # as the lesson on frameworks says
        assert told["sent"] == "abbc"


@pytest.fixture(scope="module")
def random_server(tmp_path_factory):
    """`jaxinfra serve` with a model whose weights are random."""
    folder = tmp_path_factory.mktemp("random")
    write(folder / "model")
    options = ("--port", "0", "--name", "random", "--max-len", "4096", "--max-running", "4")
    with server("jaxinfra", "serve", str(folder / "model"), *options) as address:
        yield address


@pytest.mark.parametrize("name", ["openai_agents", "pydantic_ai", "langgraph"])
def test_a_model_with_random_weights_is_held_to_valid_calls(name, random_server):
    told = client("forced", name, FRAMEWORKS[name], random_server, name)
    assert len(told["booked"]) == 3
    for city, beds, extras in told["booked"]:
        assert city in ("Oslo", "Århus") and beds in (1, 2, 3)
        assert len(extras) <= 2 and set(extras) <= {"Föhn", "TV"}


def test_a_client_of_mcps_old_protocol_lists_and_calls():
    stdio = (sys.executable, "-m", "tests.agent.mcp_stdio")
    with server("tests.agent.mcp_http") as address:
        told = client("mcp", "mcp", ("mcp==1.30.0",), address, *stdio)
    assert told["stdio"] == told["http"]
    assert told["stdio"]["tools"] == ["add", "refuse"] and told["stdio"]["good"] == "3"
    assert told["stdio"]["wrong"][0] and "Field required" in told["stdio"]["wrong"][1]
    assert told["stdio"]["unknown"][0]


@pytest.mark.skipif(shutil.which("npx") is None, reason="no npx to run MCP's inspector with")
def test_mcps_inspector_lists_and_calls(tmp_path):
    def inspect(address: str, *asked: str) -> dict:
        done = subprocess.run(
            ["npx", "-y", INSPECTOR, "--cli", address, "--transport", "http", *asked],
            capture_output=True, text=True, cwd=tmp_path, timeout=600,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
        return json.loads(done.stdout)

    with server("tests.agent.mcp_http") as address:
        listed = inspect(address, "--method", "tools/list")
        called = inspect(address, "--method", "tools/call", "--tool-name", "add",
                         "--tool-arg", "a=19", "--tool-arg", "b=23")  # fmt: skip
    assert [tool["name"] for tool in listed["tools"]] == ["add", "refuse"]
    assert called["content"] == [{"type": "text", "text": "42"}] and not called.get("isError")
