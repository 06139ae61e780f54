"""A paged engine, its sampler and structured output, and an OpenAI-compatible server."""

from decode.config import EngineConfig
from decode.engine import Engine
from decode.request import Grammar, Output, QueueFull, Request, SamplingParams
from decode.stats import EngineStats

__all__ = [
    "Engine",
    "EngineConfig",
    "EngineStats",
    "Grammar",
    "Output",
    "QueueFull",
    "Request",
    "SamplingParams",
]
