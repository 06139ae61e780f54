"""Agents: tools, a loop that survives crashes, a sandbox, and the policies that bound them.

    from agent import Agent, HTTPModel, run, tool

    @tool(effects="pure")
    def double(n: int) -> int:
        "Doubles a number."
        return 2 * n

    model = HTTPModel("qwen3-0.6b", "http://127.0.0.1:8000/v1")
    result = await run(Agent("clerk", model, "Be brief.", tools=(double,)), "Twice 21?")

Nothing here imports jax: a model is anything that fits `agent.model.Model`.
"""

from agent.compress import Compression
from agent.http_model import HTTPModel
from agent.journal import MemoryStore, Store, fork
from agent.limits import Limits
from agent.loop import Result, resume, run, run_once, run_stream
from agent.messages import Message, ToolCall
from agent.model import Completion, Model, Price, Request, Settings, TransportError, Usage
from agent.policy import Guardrail, Policy, Rule
from agent.react import ReActModel
from agent.redact import Redactor
from agent.scripted import ScriptedModel
from agent.spec import Agent
from agent.sqlite_store import SQLiteStore
from agent.tools import Context, Tool, ToolFailed, tool

__all__ = [
    "Agent", "Completion", "Compression", "Context", "Guardrail", "HTTPModel", "Limits",
    "MemoryStore", "Message", "Model", "Policy", "Price", "ReActModel", "Redactor", "Request",
    "Result", "Rule", "SQLiteStore", "ScriptedModel", "Settings", "Store", "Tool", "ToolCall",
    "ToolFailed", "TransportError", "Usage", "fork", "resume", "run", "run_once", "run_stream",
    "tool",
]  # fmt: skip
