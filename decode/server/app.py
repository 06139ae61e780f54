"""The HTTP application: OpenAI's API over a Link to the engine.

    jaxinfra serve smollm2-135m

A request is refused before it costs anything (401, 404, 413, 400), by the engine's queue (429 with
Retry-After), or is answered; whoever leaves is aborted in the engine. Errors have OpenAI's body.
Cost: about 0.1 ms of this process a streamed chunk. This module imports no jax.
"""

from __future__ import annotations

import hmac
import time
import uuid
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import anyio
from fastapi import Depends, FastAPI, Request
from fastapi.responses import HTMLResponse, Response

from decode.server import prompts
from decode.server.answers import Answer, Usage
from decode.server.exchange import DONE, EventStream, event, handle_errors, unless_gone
from decode.server.limits import LimitedBody
from decode.server.link import Link
from decode.server.metrics import Metrics
from decode.server.prompts import Ask, Sender
from decode.server.protocol import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    Failure,
    Generation,
    TokenizeRequest,
    encode,
)
from decode.server.responses import ResponseAnswer, ResponsesRequest, to_chat
from jaxinfra.text import Tokenizer, render

_PAGE = (Path(__file__).parent / "page.html").read_text(encoding="utf-8")


@dataclass(frozen=True)
class Settings:
    """What the server is told. `keys` maps tenants to their keys; without any, none is asked."""

    model: str
    keys: Mapping[str, str] = field(default_factory=dict)
    body_bytes: int = 4 << 20  # the most a request may weigh
    version: str = "0"


def app(link: Link, tokenizer: Tokenizer, settings: Settings) -> FastAPI:
    """The application; its lifespan starts and ends the engine behind `link`."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with link.running():
            yield

    made = FastAPI(
        title="jaxinfra", version=settings.version, docs_url=None, redoc_url=None,
        lifespan=lifespan,
    )  # fmt: skip
    made.add_middleware(LimitedBody, limit=settings.body_bytes)
    handle_errors(made)
    metrics = Metrics(link, settings.model)
    created = int(time.time())

    def tenant(request: Request) -> str:
        if not settings.keys:
            return ""
        given = request.headers.get("authorization", "").removeprefix("Bearer ").encode()
        # All are compared, so that the time tells nothing.
        same = [name for name, key in settings.keys.items()
                if hmac.compare_digest(key.encode(), given)]  # fmt: skip
        if not same:
            raise Failure(401, "give your key: Authorization: Bearer KEY", code="invalid_api_key")
        return same[0]

    def check_model(name: str) -> None:
        if name and name != settings.model:
            raise Failure(404, f"no model {name!r} here; there is {settings.model!r}",
                          param="model", code="model_not_found")  # fmt: skip

    def info() -> Any:
        if not link.ready or link.info is None:
            raise Failure(503, "the engine is not ready", retry_after=5)
        return link.info

    async def answer(
        http: Request, body: Generation, tenant: str,
        ask_of: Callable[[Any, Tokenizer, int, Sender], Ask], said: ResponseAnswer | None = None,
    ) -> Response:  # fmt: skip
        check_model(body.model)
        chat = isinstance(body, ChatRequest)
        sender = Sender(
            f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}", tenant, time.monotonic()
        )
        # Templates and tokenizers take milliseconds for long texts: others should not wait.
        ask = await anyio.to_thread.run_sync(ask_of, body, tokenizer, info().max_len, sender)
        params = ask.requests[0].params
        made = Answer(
            sender.id, settings.model, tokenizer, Usage(sum(len(r.prompt) for r in ask.requests)),
            params.n * len(ask.requests), ask.reader, chat=chat, logprobs=params.logprobs,
            token_ids=body.return_token_ids,
        )  # fmt: skip
        places = {request.id: i * params.n for i, request in enumerate(ask.requests)}
        watches = {request.id: metrics.watch(request) for request in ask.requests}
        stack = AsyncExitStack()

        async def chunks() -> AsyncIterator[list[dict[str, Any]]]:
            if isinstance(body, CompletionRequest) and body.echo:
                for request in ask.requests:
                    text = tokenizer.decode(request.prompt)
                    for i in range(params.n):
                        yield [made.echo(text, places[request.id] + i)]
            async for output in outputs:
                watches[output.request_id].take(len(output.token_ids), output.finish_reason)
                yield made.take(output, places[output.request_id] + output.index)

        async def rest() -> None:
            async for several in chunks():
                if said is not None:
                    for chunk in several:
                        said.take(chunk)

        try:
            entering = stack.enter_async_context(link.submit(ask.requests))
            outputs = await unless_gone(http, entering)
            if body.stream:
                events = (
                    _events(chunks(), made, body) if said is None
                    else _response_events(chunks(), made, said)
                )  # fmt: skip
                return EventStream(events, stack)
            await unless_gone(http, rest())
        except BaseException:
            await stack.aclose()
            raise
        await stack.aclose()
        if said is not None:
            said.end(made.usage)
        whole = made.whole() if said is None else said.body(made.usage)
        return Response(encode(whole), media_type="application/json")

    @made.post("/v1/chat/completions")
    async def chat(body: ChatRequest, http: Request, tenant: str = Depends(tenant)) -> Response:
        return await answer(http, body, tenant, prompts.chat)

    @made.post("/v1/completions")
    async def complete(
        body: CompletionRequest, http: Request, tenant: str = Depends(tenant)
    ) -> Response:
        return await answer(http, body, tenant, prompts.completion)

    @made.post("/v1/responses")
    async def respond(
        body: ResponsesRequest, http: Request, tenant: str = Depends(tenant)
    ) -> Response:
        said = ResponseAnswer(body, settings.model)
        return await answer(http, to_chat(body), tenant, prompts.chat, said)

    @made.get("/v1/models")
    async def models(tenant: str = Depends(tenant)) -> dict[str, Any]:
        length = link.info.max_len if link.info else None
        model = {"id": settings.model, "object": "model", "created": created,
                 "owned_by": "jaxinfra", "max_model_len": length}  # fmt: skip
        return {"object": "list", "data": [model]}

    @made.post("/tokenize")
    def tokenize(body: TokenizeRequest, tenant: str = Depends(tenant)) -> dict[str, Any]:
        check_model(body.model)
        if body.prompt is not None:
            ids = tokenizer.encode(body.prompt, add_special=body.add_special_tokens)
        elif tokenizer.chat_template is None:
            raise Failure(400, "the model has no chat template; give a prompt")
        else:
            variables: dict[str, Any] = dict(tokenizer.special)
            text = render(
                tokenizer.chat_template, body.messages or [],
                add_generation_prompt=body.add_generation_prompt, **variables,
            )  # fmt: skip
            ids = tokenizer.encode(text, add_special=False)
        told: dict[str, Any] = {"count": len(ids), "tokens": ids, "max_model_len": info().max_len}
        if body.return_token_strs:
            told["token_strs"] = [tokenizer.backend.id_to_token(id) for id in ids]
        return told

    @made.post("/detokenize")
    def detokenize(body: DetokenizeRequest, tenant: str = Depends(tenant)) -> dict[str, str]:
        check_model(body.model)
        if any(id >= tokenizer.vocab_size for id in body.tokens):
            raise Failure(400, f"tokens: the vocabulary is {tokenizer.vocab_size}", param="tokens")
        return {"prompt": tokenizer.decode(body.tokens, skip_special=False)}

    @made.get("/health")
    async def health() -> Response:
        return Response(status_code=200 if link.ready else 503)

    @made.get("/metrics")
    async def exposition() -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @made.get("/version")
    async def version() -> dict[str, str]:
        return {"version": settings.version}

    @made.get("/load")
    async def load(tenant: str = Depends(tenant)) -> dict[str, Any]:
        """The engine's figures as it last told them, for the page and for routers."""
        return {"ready": link.ready, "stats": asdict(link.stats) if link.stats else None}

    @made.get("/", include_in_schema=False)
    async def page() -> HTMLResponse:
        return HTMLResponse(_PAGE)

    return made


async def _events(
    chunks: AsyncIterator[list[dict[str, Any]]], answer: Answer, body: Generation
) -> AsyncIterator[bytes]:
    options = body.stream_options
    try:
        for chunk in answer.opening():
            yield event(chunk)
        async for made in chunks:
            for chunk in made:
                if options is not None and options.continuous_usage_stats:
                    chunk["usage"] = answer.usage.body()
                yield event(chunk)
        if options is not None and options.include_usage:
            yield event(answer.chunk_of_usage())
    except Failure as failure:  # the status is sent already
        yield event(failure.body)
    yield DONE


async def _response_events(
    chunks: AsyncIterator[list[dict[str, Any]]], answer: Answer, said: ResponseAnswer
) -> AsyncIterator[bytes]:
    try:
        for made in said.begin():
            yield made
        async for several in chunks:
            for chunk in several:
                for made in said.take(chunk):
                    yield made
        for made in said.end(answer.usage):
            yield made
    except Failure as failure:  # the status is sent already
        yield said.fail(failure)
