"""OpenAI's requests as pydantic models, and its error body.

Fields and their meanings: platform.openai.com/docs/api-reference (chat, completions); those below
"beyond OpenAI's" are vLLM's, by the same names. A field that is not listed is an error that names
it, as with OpenAI; fields that name what this server does not have (`user`, `store`, ...) are read
and do nothing. This module imports no jax.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

# Bounds on lists, so that no request costs much before the engine has seen it.
_MOST_MESSAGES, _MOST_STOPS, _MOST_PROMPTS, _MOST_TOOLS = 4096, 64, 256, 256

Id = Annotated[int, Field(ge=0, lt=1 << 31)]
Text = Annotated[str, Field(min_length=1, max_length=1024)]


class Failure(Exception):
    """An answer that is an error: `{"error": {"message", "type", "param", "code"}}`."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.retry_after = status, retry_after
        kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
        kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
        error = {"message": message, "type": kind, "param": param, "code": code}
        self.body = {"error": error}


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class StreamOptions(_Body):
    """What a stream carries besides text: `include_usage` adds a last chunk with the usage."""

    include_usage: bool = False
    continuous_usage_stats: bool = False


class Function(_Body):
    """A tool: its parameters are a JSON schema."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(_Body):
    """OpenAI's wrapping of a function."""

    type: Literal["function"]
    function: Function


class _Name(_Body):
    name: str


class NamedTool(_Body):
    """The tool that must be called."""

    type: Literal["function"] = "function"
    function: _Name


class JSONSchema(_Body):
    """The schema of `response_format`."""

    name: str = "answer"
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(_Body):
    """Text, any JSON object, or JSON by a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JSONSchema | None = None

    @model_validator(mode="after")
    def _schema_is_there(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema belongs to type json_schema, and to it alone")
        return self


class StructuredOutputs(_Body):
    """vLLM's: exactly one of them."""

    json_: dict[str, Any] | str | None = Field(default=None, alias="json")
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None

    @model_validator(mode="after")
    def _one(self) -> StructuredOutputs:
        if len(self.model_fields_set) != 1:
            raise ValueError("give exactly one of json, regex, choice, grammar")
        return self


class Generation(_Body):
    """What a chat and a completion have in common."""

    model: str = ""
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=1024)] | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)] | None = None
    stop: Text | Annotated[list[Text], Field(max_length=_MOST_STOPS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    # Beyond OpenAI's.
    top_k: Annotated[int, Field(ge=-1, lt=1 << 31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=1e-3, le=10)] | None = None
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    ignore_eos: bool = False
    stop_token_ids: Annotated[list[Id], Field(max_length=_MOST_STOPS)] = []
    allowed_token_ids: Annotated[list[Id], Field(min_length=1, max_length=65536)] | None = None
    bad_words: Annotated[list[Text], Field(max_length=256)] = []
    prompt_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    structured_outputs: StructuredOutputs | None = None
    return_token_ids: bool = False
    priority: Annotated[int, Field(ge=-(1 << 31), lt=1 << 31)] = 0
    cache_salt: Annotated[str, Field(max_length=256)] | None = None
    timeout: Annotated[float, Field(gt=0, le=86_400)] | None = None
    # Of one key are the calls of one agent's run, for policies that schedule whole runs.
    prompt_cache_key: Annotated[str, Field(max_length=256)] | None = None
    # Read, and without effect here.
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_retention: str | None = None

    @model_validator(mode="after")
    def _options_of_a_stream(self) -> Generation:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options are for stream=true")
        return self


class ChatRequest(Generation):
    """POST /v1/chat/completions."""

    messages: Annotated[list[dict[str, Any]], Field(min_length=1, max_length=_MOST_MESSAGES)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Tool], Field(max_length=_MOST_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: str | None = None
    modalities: list[Literal["text"]] | None = None
    verbosity: str | None = None
    # Beyond OpenAI's.
    add_generation_prompt: bool = True
    chat_template_kwargs: dict[str, Any] = {}

    @model_validator(mode="after")
    def _together(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs are for logprobs=true")
        if self.tool_choice not in (None, "none", "auto") and not self.tools:
            raise ValueError("tool_choice asks for a tool; give tools")
        names = [tool.function.name for tool in self.tools or ()]
        if len(set(names)) != len(names):
            raise ValueError("tools: two of them have one name")
        if isinstance(self.tool_choice, NamedTool) and self.tool_choice.function.name not in names:
            raise ValueError("tool_choice names none of the tools")
        if self.structured_outputs and self.response_format:
            raise ValueError("give structured_outputs or response_format, not both")
        return self


Prompt = (
    str
    | Annotated[list[str], Field(min_length=1, max_length=_MOST_PROMPTS)]
    | Annotated[list[Id], Field(min_length=1)]
    | Annotated[list[Annotated[list[Id], Field(min_length=1)]],
                Field(min_length=1, max_length=_MOST_PROMPTS)]
)  # fmt: skip


class CompletionRequest(Generation):
    """POST /v1/completions: a text or token ids, or several of either."""

    prompt: Prompt
    echo: bool = False
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    best_of: Literal[1] | None = None
    suffix: None = None


class TokenizeRequest(_Body):
    """POST /tokenize: a text, or a conversation by the chat template."""

    model: str = ""
    prompt: str | None = None
    messages: Annotated[list[dict[str, Any]], Field(max_length=_MOST_MESSAGES)] | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    return_token_strs: bool = False

    @model_validator(mode="after")
    def _one(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give a prompt or messages")
        return self


class DetokenizeRequest(_Body):
    """POST /detokenize."""

    model: str = ""
    tokens: list[Id]


def from_validation(errors: Any) -> Failure:
    """The first of pydantic's errors as a Failure with status 400; it echoes no input."""
    first = errors[0]
    # Of a union's members only the path to the field matters.
    path = [str(part) for part in first["loc"] if part != "body"]
    param = ascii(".".join(path[:3]))[1:-1] or None
    reason = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        reason = "this server has no such field"
    elif first["type"] == "json_invalid":
        param, reason = None, "the body is not JSON; send application/json"
    return Failure(400, f"{param}: {reason}" if param else reason, param=param)


def encode(body: Any) -> bytes:
    """JSON in ASCII: a lone surrogate in a text must not break the answer."""
    return json.dumps(body, separators=(",", ":")).encode()
