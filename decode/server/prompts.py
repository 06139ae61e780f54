"""From a request's body to what the engine is asked: prompt ids, sampling, grammar, and a Reader.

This module imports no jax.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from decode.request import Grammar, Request, SamplingParams
from decode.server import calls
from decode.server.protocol import (
    ChatRequest,
    CompletionRequest,
    Failure,
    Generation,
    NamedTool,
    ResponseFormat,
)
from decode.server.tools import Format, Reader
from jaxinfra.text import Tokenizer
from jaxinfra.text.chat import render

# For models whose template knows no tools: what Qwen's template says, in the words of Hermes.
_TOOLS = """You may call functions to help with the user's request. They are, one JSON a line:
<tools>
{}
</tools>
To call one, answer with its name and arguments as JSON within tags:
<tool_call>
{{"name": <name>, "arguments": <arguments>}}
</tool_call>"""


@dataclass(frozen=True)
class Ask:
    """Requests of one HTTP request (a completion may hold several prompts), and their Reader."""

    requests: tuple[Request, ...]
    reader: Callable[[], Reader]


@dataclass(frozen=True)
class Sender:
    """Who asks, and when: the id of the answer, the tenant, seconds by time.monotonic()."""

    id: str
    tenant: str
    arrival: float


def chat(body: ChatRequest, tokenizer: Tokenizer, max_len: int, sender: Sender) -> Ask:
    """What a chat asks. Raises Failure with status 400, or UserError from the template."""
    template = tokenizer.chat_template
    if template is None:
        raise Failure(400, "the model has no chat template; use /v1/completions")
    tools = [
        {"type": "function", "function": tool.function.model_dump(exclude_none=True)}
        for tool in (body.tools or () if body.tool_choice != "none" else ())
    ]
    style = _format(template) if tools else None
    grammar = _held(body, style) or _grammar(body, body.response_format)
    messages = [_message(message, i) for i, message in enumerate(body.messages)]
    if tools and "tools" not in template:
        told = _TOOLS.format("\n".join(json.dumps(tool) for tool in tools))
        messages = _with_system(messages, told)
    variables = dict(body.chat_template_kwargs)
    if body.reasoning_effort is not None:
        variables.setdefault("reasoning_effort", body.reasoning_effort)
        variables.setdefault("enable_thinking", body.reasoning_effort != "none")
    if grammar is not None:
        variables["enable_thinking"] = False  # the grammar holds from the first token on
    text = render(
        template, messages, tools=tools or None, add_generation_prompt=body.add_generation_prompt,
        **{**tokenizer.special, **variables},
    )  # fmt: skip
    thinks = grammar is None and "</think>" in template
    open_ = text.rstrip().endswith("<think>")
    thinking = ("open" if open_ else "may") if thinks else None
    functions = [tool.function for tool in body.tools or ()]
    if grammar is None and style is not None:
        grammar = calls.offered(functions, style, body.parallel_tool_calls is not False, thinking)
    names = [function.name for function in functions]
    most = body.max_completion_tokens or body.max_tokens
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    prompt = tokenizer.encode(text, add_special=False)
    request = _request(body, tokenizer, max_len, sender, prompt, most, logprobs, grammar)
    return Ask((request,), lambda: Reader(style, names, thinking))


def completion(body: CompletionRequest, tokenizer: Tokenizer, max_len: int, sender: Sender) -> Ask:
    """What a completion asks. Raises Failure with status 400, or UserError from the tokenizer."""
    prompts: list[Any] = body.prompt if isinstance(body.prompt, list) else [body.prompt]
    if isinstance(prompts[0], int):
        prompts = [prompts]
    grammar = _grammar(body, None)
    requests = []
    for i, prompt in enumerate(prompts):
        one = Sender(f"{sender.id}-{i}", sender.tenant, sender.arrival)
        ids = tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        most = body.max_tokens or 16  # OpenAI's default
        requests.append(_request(body, tokenizer, max_len, one, ids, most, body.logprobs, grammar))
    return Ask(tuple(requests), Reader)


def _request(
    body: Generation, tokenizer: Tokenizer, max_len: int, sender: Sender, prompt: list[int],
    most: int | None, logprobs: int | None, grammar: Grammar | None,
) -> Request:  # fmt: skip
    size = tokenizer.vocab_size
    if not prompt:
        raise Failure(400, "the prompt is empty", param="prompt")
    room = max_len - len(prompt)
    if room < (most or 1):
        raise Failure(
            400, f"the prompt's {len(prompt)} tokens and {most or 1} more exceed the context of "
            f"{max_len}; shorten either", param="messages" if isinstance(body, ChatRequest)
            else "prompt", code="context_length_exceeded",
        )  # fmt: skip
    for name, ids in (
        ("prompt", prompt), ("allowed_token_ids", body.allowed_token_ids or ()),
        ("stop_token_ids", body.stop_token_ids), ("logit_bias", _bias(body.logit_bias)),
    ):  # fmt: skip
        if any(id >= size for id in ids):
            raise Failure(400, f"{name}: a token id beyond the vocabulary of {size}", param=name)
    stop = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
    top_k = body.top_k if body.top_k is not None and body.top_k > 0 else None
    words = (
        tuple(tokenizer.encode(lead + word.lstrip(), add_special=False))
        for word in body.bad_words for lead in ("", " ")
    )  # fmt: skip
    given = {
        "temperature": body.temperature, "top_p": body.top_p, "top_k": top_k, "min_p": body.min_p,
        "repetition_penalty": body.repetition_penalty, "presence_penalty": body.presence_penalty,
        "frequency_penalty": body.frequency_penalty, "min_tokens": body.min_tokens, "n": body.n,
        "seed": body.seed, "logprobs": logprobs, "prompt_logprobs": body.prompt_logprobs,
        "grammar": grammar, "logit_bias": _bias(body.logit_bias), "bad_words": list(words),
        "allowed_tokens": body.allowed_token_ids, "stop": stop, "ignore_eos": body.ignore_eos,
        "stop_token_ids": tuple(body.stop_token_ids), "max_tokens": most or room,
    }  # fmt: skip
    params = SamplingParams(**{name: value for name, value in given.items() if value is not None})
    return Request(
        id=sender.id, prompt=tuple(prompt), params=params, priority=body.priority,
        tenant=sender.tenant, program=body.prompt_cache_key or "",
        cache_salt=body.cache_salt or "", deadline=body.timeout, arrival=sender.arrival,
    )  # fmt: skip


def _bias(given: Mapping[str, float] | None) -> dict[int, float]:
    made = {}
    for key, value in (given or {}).items():
        if not re.fullmatch(r"[0-9]{1,9}", key) or not -100 <= value <= 100:
            raise Failure(
                400, "logit_bias: token ids to numbers from -100 to 100", param="logit_bias"
            )
        made[int(key)] = value
    return made


def _message(message: dict[str, Any], at: int) -> dict[str, Any]:
    """`message` as templates want it: contents as text, the arguments of calls as values."""
    made = dict(message)
    content = made.get("content")
    if isinstance(content, list):
        for part in content:
            text = part.get("text") if isinstance(part, dict) else None
            if not isinstance(text, str) or part.get("type") not in ("text", "input_text"):
                raise Failure(400, "this model reads text alone", param=f"messages.{at}.content")
        made["content"] = "".join(part["text"] for part in content)
    calls = made.get("tool_calls")
    if isinstance(calls, list):
        made["tool_calls"] = [_call(call) for call in calls]
        made.setdefault("content", "")
    return made


def _call(call: Any) -> Any:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"])
    except (ValueError, RecursionError):
        return call
    return {**call, "function": {**function, "arguments": arguments}}


def _with_system(messages: list[dict[str, Any]], told: str) -> list[dict[str, Any]]:
    first = messages[0]
    if first.get("role") != "system":
        return [{"role": "system", "content": told}, *messages]
    return [{**first, "content": f"{first.get('content', '')}\n\n{told}"}, *messages[1:]]


def _format(template: str) -> Format:
    llama = "<tool_call>" not in template and '"parameters":' in template
    return "llama" if llama else "hermes"


def _grammar(body: Generation, format: ResponseFormat | None) -> Grammar | None:
    asked = body.structured_outputs
    if asked is not None:
        if asked.json_ is not None:
            schema = asked.json_ if isinstance(asked.json_, str) else json.dumps(asked.json_)
            return Grammar("json_schema", schema)
        if asked.choice is not None:
            return Grammar("choice", json.dumps(asked.choice))
        if asked.regex is not None:
            return Grammar("regex", asked.regex)
        return Grammar("lark", asked.grammar or "")
    if format is None or format.type == "text":
        return None
    return Grammar("json_schema", json.dumps(_schema(format)))


def _schema(format: ResponseFormat) -> dict[str, Any]:
    return {"type": "object"} if format.json_schema is None else format.json_schema.schema_


def _held(body: ChatRequest, style: Format | None) -> Grammar | None:
    """What holds the whole answer, where a call or else JSON is asked for."""
    choice, format = body.tool_choice, body.response_format
    if style is None or body.structured_outputs is not None:
        return None
    answer = None
    if choice in (None, "auto"):
        if format is None or format.type == "text":
            return None
        answer = _schema(format)
    named = choice.function.name if isinstance(choice, NamedTool) else None
    tools = [t.function for t in body.tools or () if named in (None, t.function.name)]
    return calls.held(tools, style, named is None and body.parallel_tool_calls is not False, answer)
