"""A model behind any server that speaks OpenAI's chat completions.

The client is the official one, with its own retries off: a request that may be repeated raises
TransportError and the loop, which can journal it, decides. `prompt_cache_key` names the run, so
that a server finds its cache, and can schedule its calls together.
"""

from __future__ import annotations

import functools
import os
import ssl
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from agent.model import (
    Completion,
    Delta,
    Parts,
    Price,
    ReasoningDelta,
    Request,
    TransportError,
    Usage,
    openai_body,
)
from jaxinfra.errors import UserError

_FINISH: dict[str, Any] = {
    "stop": "stop",
    "tool_calls": "calls",
    "length": "length",
    "content_filter": "filter",
}


@dataclass
class HTTPModel:
    """`name` at `base_url` (".../v1"). The key is read from the environment variable `key_variable`
    when a request is made, and is held nowhere."""

    name: str
    base_url: str
    key_variable: str = "OPENAI_API_KEY"
    timeout: float = 120.0
    price: Price = field(default_factory=Price)

    async def stream(self, request: Request) -> AsyncIterator[Delta | Completion]:
        import httpx2
        import openai

        client = openai.AsyncOpenAI(
            base_url=self.base_url, api_key=os.environ.get(self.key_variable) or "none",
            max_retries=0, timeout=self.timeout,
            http_client=openai.DefaultAsyncHttpxClient(verify=_certificates()),
        )  # fmt: skip
        parts, finish, usage = Parts(), None, Usage()
        body = openai_body(request, request.messages) | {"model": self.name, "stream": True}
        body |= {"prompt_cache_key": request.program} if request.program else {}
        body |= {"stream_options": {"include_usage": True}}
        try:
            async with client, await client.chat.completions.create(**body) as chunks:
                async for chunk in chunks:
                    if chunk.usage is not None:
                        usage = self._usage(chunk.usage)
                    for choice in chunk.choices[:1]:
                        finish = choice.finish_reason or finish
                        delta = choice.delta
                        if thought := getattr(delta, "reasoning_content", None):
                            yield ReasoningDelta(thought)
                        if delta.content:
                            yield parts.text(delta.content)
                        for part in delta.tool_calls or ():
                            name = part.function and part.function.name
                            written = part.function and part.function.arguments
                            yield parts.call(part.index, name or "", written or "", part.id or "")
        except openai.APIStatusError as error:
            message = f"{self.base_url}: {error.status_code} {error.message}"
            if error.status_code in (408, 409, 429) or error.status_code >= 500:
                raise TransportError(message, _retry_after(error)) from None
            raise UserError(message) from None
        except openai.APIError as error:  # no connection, cut in its middle, time-out
            raise TransportError(f"{self.base_url}: {error.message}") from None
        except openai.OpenAIError as error:
            raise UserError(f"{self.base_url}: {error}") from None
        except (httpx2.TransportError, ValueError) as error:
            raise TransportError(f"{self.base_url}: the stream broke ({error})") from None
        if finish is None:
            raise TransportError(f"{self.base_url}: the stream ended without a finish_reason")
        message = parts.message()
        # Some servers say "stop" after calls: the calls are what counts.
        called = message.calls and finish != "length"
        yield Completion(message, usage, "calls" if called else _FINISH.get(finish, "stop"))

    def _usage(self, usage: Any) -> Usage:
        details = usage.prompt_tokens_details
        cached = (details.cached_tokens or 0) if details is not None else 0
        return self.price.usage(usage.prompt_tokens, usage.completion_tokens, cached)


@functools.cache
def _certificates() -> ssl.SSLContext:
    """Read once: reading them is 30 ms of CPU, and a client, which belongs to one event loop, is
    made for each turn."""
    import httpx2

    return httpx2.create_ssl_context()


def _retry_after(error: Any) -> float | None:
    try:
        return max(0.0, min(60.0, float(error.response.headers.get("retry-after"))))
    except (TypeError, ValueError):
        return None
