"""Episodic memory: past runs, with what to do differently, found when a task is like theirs.

A success keeps its plan (the calls it made) as a procedure; a failure keeps a reflection (Shinn et
al., 2023, arXiv:2303.11366), by the model where one is given, else what went wrong.
"""

from __future__ import annotations

from agent.memory.facts import Fact, Memories
from agent.messages import user
from agent.model import Model, Request, Settings, complete
from agent.state import State

_ASK = (
    "This attempt at a task failed. "
    "Say in one or two sentences what to do differently next time.\n\n"
)


async def record_episode(
    memories: Memories, session: str, state: State, *, succeeded: bool,
    reflector: Model | None = None,
) -> Fact:  # fmt: skip
    """Remembers the last run of a session; twice the same run is one episode."""
    task = next((m.content for m in reversed(state.messages) if m.role == "user"), "")
    calls = [c for m in state.messages for c in m.calls]
    steps = ", then ".join(f"{c.name}({c.arguments})" for c in calls) or "no tool"
    reason = state.finished.reason if state.finished else "unfinished"
    if succeeded:
        text = f"Task: {task[:300]}\nWhat worked: {steps[:1200]}"
    else:
        errors = [r.content for r in state.results.values() if r.error]
        lesson = f"it ended with {reason}; " + "; ".join(errors)[:300]
        if reflector is not None:
            asked = _ASK + f"Task: {task}\nSteps: {steps}\nEnd: {lesson}"
            request = Request((user(asked),), settings=Settings(max_tokens=120))
            said = (await complete(reflector, request)).message.content
            lesson = said.strip() or lesson
        text = f"Task: {task[:300]}\nWhat failed: {steps[:600]}\nNext time: {lesson}"
    return memories.add(
        text, kind="procedure" if succeeded else "episode", source=f"session {session}",
        origin=f"{session}#{state.runs}", importance=0.6 if succeeded else 0.8,
        tainted=bool(state.tainted_by),
    )  # fmt: skip
