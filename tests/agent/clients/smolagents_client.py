"""smolagents: an agent that calls tools, and one that writes code."""

import json
import sys

from smolagents import CodeAgent, OpenAIModel, ToolCallingAgent, tool

called = []


@tool
def multiply(a: int, b: int) -> int:
    """Multiplies two numbers.

    Args:
        a: One.
        b: The other.
    """
    called.append([a, b])
    return a * b


model = OpenAIModel(model_id="scripted", api_base=sys.argv[1], api_key="none")
answers = []
for kind in (ToolCallingAgent, CodeAgent):
    for stream in (False, True):
        agent = kind(tools=[multiply], model=model, max_steps=3, verbosity_level=-1,
                     stream_outputs=stream)  # fmt: skip
        answers.append(str(agent.run("What is 6 * 7?")))
        tokens = agent.monitor.get_total_token_counts().total_tokens
print(json.dumps({"answers": answers, "called": called, "tokens": tokens}))
