"""A call that the server's grammar forces out of a model with random weights: URL FRAMEWORK."""

import json
import sys
from typing import Annotated, Literal

from pydantic import BaseModel, Field

URL, FRAMEWORK = sys.argv[1:]
booked = []


City = Literal["Oslo", "Århus"]
Extras = Annotated[list[Literal["Föhn", "TV"]], Field(max_length=2)]


def book(city: City, beds: Literal[1, 2, 3], extras: Extras) -> str:
    """Books a room."""
    booked.append([city, beds, extras])
    return "booked"


class Booking(BaseModel):
    city: City
    beds: Literal[1, 2, 3]
    extras: Extras


async def openai_agents() -> None:
    from agents import (
        Agent,
        ModelSettings,
        OpenAIChatCompletionsModel,
        Runner,
        function_tool,
        set_tracing_disabled,
    )
    from openai import AsyncOpenAI

    set_tracing_disabled(True)
    client = AsyncOpenAI(base_url=URL, api_key="none")
    model = OpenAIChatCompletionsModel(model="random", openai_client=client)
    settings = ModelSettings(tool_choice="required", max_tokens=200, parallel_tool_calls=False)
    agent = Agent(name="a", tools=[function_tool(book)], model=model, model_settings=settings,
                  tool_use_behavior="stop_on_first_tool")  # fmt: skip
    for _ in range(3):
        await Runner.run(agent, "Book a room.")


async def pydantic_ai() -> None:
    from pydantic_ai import Agent, ToolOutput
    from pydantic_ai.models.openai import OpenAIChatModel
    from pydantic_ai.providers.openai import OpenAIProvider

    model = OpenAIChatModel("random", provider=OpenAIProvider(base_url=URL, api_key="none"))
    agent = Agent(model, output_type=ToolOutput(Booking, name="book"), retries=0,
                  model_settings={"max_tokens": 200})  # fmt: skip
    for _ in range(3):
        made = (await agent.run("Book a room.")).output
        book(**made.model_dump())


async def langgraph() -> None:
    from langchain_openai import ChatOpenAI

    model = ChatOpenAI(model="random", base_url=URL, api_key="none", max_tokens=200)
    # Strict: else its schema allows any property besides, and random weights write many.
    bound = model.bind_tools([book], tool_choice="any", strict=True, parallel_tool_calls=False)
    for _ in range(3):
        (made,) = (await bound.ainvoke("Book a room.")).tool_calls
        book(**Booking(**made["args"]).model_dump())


if __name__ == "__main__":
    import asyncio

    asyncio.run(globals()[FRAMEWORK]())
    print("\n" + json.dumps({"booked": booked}))
