"""pydantic-ai: text, a stream, and structured results by a tool and by a schema."""

import asyncio
import json
import sys

from pydantic import BaseModel
from pydantic_ai import Agent, NativeOutput, ToolOutput
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider

called = []


class Answer(BaseModel):
    product: int


def multiply(a: int, b: int) -> int:
    """Multiplies two numbers."""
    called.append([a, b])
    return a * b


async def main() -> dict:
    provider = OpenAIProvider(base_url=sys.argv[1], api_key="none")
    model = OpenAIChatModel("scripted", provider=provider)
    agent = Agent(model, instructions="Use the tool.", tools=[multiply])
    whole = await agent.run("What is 6 * 7?")
    async with agent.run_stream("What is 6 * 7?") as stream:
        streamed = await stream.get_output()
    typed = Agent(model, tools=[multiply], output_type=ToolOutput(Answer, name="final_result"))
    structured = await typed.run("What is 6 * 7?")
    native = await Agent(model, output_type=NativeOutput(Answer)).run("What is 6 * 7?")
    return {"answers": [whole.output, streamed, f"It is {structured.output.product}."],
            "called": called, "tokens": whole.usage.total_tokens,
            "native": native.output.product}  # fmt: skip


print(json.dumps(asyncio.run(main())))
