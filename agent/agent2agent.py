"""The Agent2Agent protocol on the official SDK: an agent as a service, a service as a tool.

    app = a2a_app(agent, store, "https://clerk.example.org")       # for uvicorn
    tools = (a2a_tool("https://clerk.example.org", "clerk"),)

A request is a run in a session of its own, named after the task. Whoever asks is a stranger: the
run is tainted from its first word, and what then needs leave waits for a person on this side, never
for the one who asked. Needs a2a-sdk[http-server].
"""

from __future__ import annotations

from typing import Any

from agent.journal import Store
from agent.loop import run
from agent.spec import Agent
from agent.tools import Context, Tool, ToolFailed, as_text, tool
from jaxinfra.errors import UserError

_ANSWER = 600.0  # seconds without a byte of an answer


def a2a_app(agent: Agent, store: Store, url: str) -> Any:
    """An ASGI application: the agent's card, and JSON-RPC at /. `url` is where others reach it."""
    from a2a import types
    from a2a.helpers import new_task_from_user_message
    from a2a.server.agent_execution import AgentExecutor
    from a2a.server.request_handlers import DefaultRequestHandler
    from a2a.server.routes import create_agent_card_routes, create_jsonrpc_routes
    from a2a.server.tasks import InMemoryTaskStore, TaskUpdater
    from starlette.applications import Starlette

    class Executor(AgentExecutor):
        async def execute(self, context: Any, event_queue: Any) -> None:
            task = context.current_task or new_task_from_user_message(context.message)
            if context.current_task is None:
                await event_queue.enqueue_event(task)
            updater = TaskUpdater(event_queue, task.id, task.context_id)
            await updater.start_work()
            result = await run(
                agent, context.get_user_input(), store=store, session=f"a2a/{task.id}",
                tainted_by=("a2a",),
            )  # fmt: skip
            if result.reason == "done":
                await updater.add_artifact([types.Part(text=as_text(result.output))])
                await updater.complete()
            elif result.reason == "waiting":
                told = "a call waits for a person who watches over this agent"
                await updater.requires_auth(updater.new_agent_message([types.Part(text=told)]))
            else:
                told = f"{result.reason}: {result.detail}"
                await updater.failed(updater.new_agent_message([types.Part(text=told)]))

        async def cancel(self, context: Any, event_queue: Any) -> None:
            await TaskUpdater(event_queue, context.task_id, context.context_id).cancel()

    skill = types.AgentSkill(
        id=agent.name, name=agent.name, description=agent.description, tags=["agent"]
    )
    card = types.AgentCard(
        name=agent.name, description=agent.description or agent.name, version="1",
        supported_interfaces=[
            types.AgentInterface(url=url, protocol_binding="JSONRPC", protocol_version="1.0")
        ],
        capabilities=types.AgentCapabilities(streaming=True), skills=[skill],
        default_input_modes=["text/plain"], default_output_modes=["text/plain"],
    )  # fmt: skip
    handler = DefaultRequestHandler(Executor(), InMemoryTaskStore(), card)
    return Starlette(routes=[*create_agent_card_routes(card), *create_jsonrpc_routes(handler, "/")])


def a2a_tool(url: str, name: str, **options: Any) -> Tool:
    """The agent at `url` as a tool that takes a task; a stranger's, as in `agent.mcp`. `options`
    are fields of Tool. Raises UserError for a name that a model could not write."""

    async def ask(ctx: Context, task: str) -> str:
        import httpx
        from a2a.client import ClientConfig, create_client
        from a2a.client.errors import A2AClientError, AgentCardResolutionError
        from a2a.helpers import get_stream_response_text, new_text_message
        from a2a.types import Role, SendMessageRequest, TaskState

        message = new_text_message(task, role=Role.ROLE_USER)
        message.message_id = ctx.key or message.message_id
        texts: list[str] = []
        state = None
        # An answer is a whole run, of which httpx's own limit would see five seconds.
        patient = httpx.AsyncClient(timeout=httpx.Timeout(_ANSWER, connect=30.0))
        try:
            async with patient:
                config = ClientConfig(streaming=False, httpx_client=patient)
                client = await create_client(url, config)
                async for answer in client.send_message(SendMessageRequest(message=message)):
                    texts.append(get_stream_response_text(answer))
                    if answer.HasField("task"):
                        state = answer.task.status
        except (A2AClientError, AgentCardResolutionError, OSError) as error:
            raise ToolFailed(f"{name} at {url}: {error}") from None
        if state is not None and state.state != TaskState.TASK_STATE_COMPLETED:
            said = "".join(part.text for part in state.message.parts)
            raise ToolFailed(f"{name} ended with {TaskState.Name(state.state)}: {said}")
        return "\n".join(filter(None, texts))

    ask.__doc__ = f"Gives a task to the agent {name} at another place."
    if not name.isidentifier():
        raise UserError(f"a2a: {name!r}; models know letters, digits and _")
    fields: dict[str, Any] = {"effects": "write", "network": True, "untrusted": True, **options}
    return tool(name=name, **fields)(ask)
