"""openai-agents: a run and a streamed run with a function tool."""

import asyncio
import json
import sys

from agents import Agent, OpenAIChatCompletionsModel, Runner, function_tool, set_tracing_disabled
from openai import AsyncOpenAI

called = []


@function_tool
def multiply(a: int, b: int) -> int:
    """Multiplies two numbers."""
    called.append([a, b])
    return a * b


async def main() -> dict:
    set_tracing_disabled(True)
    client = AsyncOpenAI(base_url=sys.argv[1], api_key="none")
    model = OpenAIChatCompletionsModel(model="scripted", openai_client=client)
    agent = Agent(name="a", instructions="Use the tool.", tools=[multiply], model=model)
    whole = await Runner.run(agent, "What is 6 * 7?")
    streamed = Runner.run_streamed(agent, "What is 6 * 7?")
    kinds = [event.name async for event in streamed.stream_events()
             if event.type == "run_item_stream_event"]  # fmt: skip
    usage = whole.context_wrapper.usage
    return {"answers": [whole.final_output, streamed.final_output], "called": called,
            "kinds": kinds, "tokens": usage.total_tokens}  # fmt: skip


print(json.dumps(asyncio.run(main())))
