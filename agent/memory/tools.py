"""Memory as tools, and as a note beside what the user says.

The note goes into the user's new message and never into what was said before: a memory that changes
does not change the prefix of a conversation, so it costs no cached token.

What a tainted conversation writes down is tainted, and whoever reads it back is tainted by it: an
injection cannot wait in memory for a cleaner day.
"""

from __future__ import annotations

from typing import Annotated

import anyio.to_thread

from agent.memory.facts import Fact, Memories
from agent.messages import Message, user
from agent.tools import Context, Tool, ToolFailed, tool


def memory_tools(memories: Memories) -> tuple[Tool, ...]:
    """`remember`, `recall` and `forget_fact`, over one user's memory."""

    async def remember(
        ctx: Context,
        text: Annotated[str, "one fact, in a sentence that is clear by itself"],
        key: Annotated[str | None, "a name, if a later value shall replace this one"] = None,
        importance: Annotated[float, "0 to 1"] = 0.5,
    ) -> str:
        """Keeps a fact for later conversations."""

        def add():
            return memories.add(
                text, key=key, importance=min(1.0, max(0.0, importance)), origin=ctx.key or None,
                source=f"session {ctx.session}, call {ctx.call_id}", tainted=bool(ctx.tainted_by),
            )  # fmt: skip

        return f"kept as fact {(await anyio.to_thread.run_sync(add)).id}"

    async def recall(ctx: Context, query: str, most: int = 5) -> str:
        """Finds what was remembered in earlier conversations."""
        found = await anyio.to_thread.run_sync(
            lambda: memories.search(query, most=min(20, max(1, most)))
        )
        if any(fact.tainted for fact in found):
            ctx.taint("memory")
        return _listed(found) or "nothing is remembered about this"

    async def forget_fact(ctx: Context, id: Annotated[int, "the fact's number"]) -> str:
        """Deletes a fact, and what was concluded from it, for good."""
        gone = await anyio.to_thread.run_sync(lambda: memories.delete([id]))
        if not gone:
            raise ToolFailed(f"there is no fact {id}")
        return f"{gone} deleted"

    return (
        tool(effects="idempotent", guarded=False)(remember),
        tool(effects="pure")(recall),
        tool(effects="idempotent")(forget_fact),
    )


def with_memories(
    memories: Memories, task: str, *, most: int = 5
) -> tuple[tuple[Message, ...], tuple[str, ...]]:
    """The user's message with what is remembered about it, and what taints it: give both to `run`
    (`task` and `tainted_by`)."""
    found = memories.search(task, most=most)
    if not found:
        return (user(task),), ()
    tainted = ("memory",) if any(fact.tainted for fact in found) else ()
    return (user(f"{task}\n\n[Remembered from before:\n{_listed(found)}]"),), tainted


def _listed(found: list[Fact]) -> str:
    return "\n".join(f"{fact.id}. {fact.text} (from {fact.source})" for fact in found)
