"""LangGraph: its prebuilt agent over LangChain's OpenAI model, whole and streamed."""

import json
import sys

from langchain.agents import create_agent
from langchain_openai import ChatOpenAI
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import START, StateGraph

called = []


def multiply(a: int, b: int) -> int:
    """Multiplies two numbers."""
    called.append([a, b])
    return a * b


model = ChatOpenAI(model="scripted", base_url=sys.argv[1], api_key="none", stream_usage=True)
agent = create_agent(model, tools=[multiply], system_prompt="Use the tool.")
asked = {"messages": [{"role": "user", "content": "What is 6 * 7?"}]}
whole = agent.invoke(asked)["messages"]
text = "".join(
    piece.text for piece, _ in agent.stream(asked, stream_mode="messages")
    if piece.type.startswith("AIMessage")
)  # fmt: skip

# What docs/lessons/agent-frameworks.md says of it: the node under way runs again.
sent = ""


def node(letter):
    def send(state):
        global sent
        sent += letter
        if sent == "ab":
            raise RuntimeError("killed")
        return {"last": letter}

    return send


builder = StateGraph(dict)
for letter, before in zip("abc", (START, "a", "b"), strict=True):
    builder.add_node(letter, node(letter))
    builder.add_edge(before, letter)
graph = builder.compile(checkpointer=InMemorySaver())
thread = {"configurable": {"thread_id": "1"}}
try:
    graph.invoke({"last": ""}, thread)
except RuntimeError:
    graph.invoke(None, thread)

print(json.dumps({"sent": sent, "answers": [whole[-1].text, text], "called": called,
                  "tokens": whole[-1].usage_metadata["total_tokens"],
                  "kinds": [m.type for m in whole]}))  # fmt: skip
