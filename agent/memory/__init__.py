"""What an agent knows beyond a conversation: facts and past runs, found by words and by meaning.

memories = Memories.of_user(folder, "ada")
agent = Agent("clerk", model, tools=memory_tools(memories))
"""

from agent.memory.embed import Embedder, HiddenStates, Ngrams
from agent.memory.episodes import record_episode
from agent.memory.facts import Fact, Memories
from agent.memory.tools import memory_tools, with_memories

__all__ = [
    "Embedder", "Fact", "HiddenStates", "Memories", "Ngrams", "memory_tools",
    "record_episode", "with_memories",
]  # fmt: skip
