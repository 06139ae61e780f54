"""Tools: Python functions that a model may call, described by their own signatures.

    @tool
    async def weather(city: Annotated[str, "a town"], days: int = 1) -> str:
        "Forecasts the weather."

The JSON schema comes from the type hints (pydantic), the descriptions from the docstring and from
`Annotated`; arguments are validated against it before the function sees them. A first parameter
annotated `Context` is given the call's context and stays out of the schema. Functions may be sync
or async, plain or generators: each value a generator yields is progress, and the result is all of
them together.
"""

from __future__ import annotations

import enum
import functools
import inspect
import pkgutil
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints, overload

import docstring_parser
from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model
from pydantic.errors import PydanticUserError
from pydantic_core import PydanticSerializationError, to_json

from agent.model import ToolSpec
from jaxinfra.errors import UserError

ANY_ARGUMENTS = create_model("any", __config__=ConfigDict(extra="allow"))  # a schema says which
Effects = Literal["pure", "idempotent", "write"]
Approval = bool | Callable[[dict[str, Any]], bool]


async def ignore(told: object) -> None:
    """Listens to nothing."""


@dataclass(frozen=True)
class Context:
    """What a call knows about where it comes from.

    `key` is the same for every attempt at one call, also after a crash: a service that keeps keys
    turns "at least once" into "exactly once". `deps` is what the caller gave to `run`.
    `tainted_by` names the tools through which a stranger may have written what the model has read;
    a tool that finds out only when it runs that its result is a stranger's says so by `taint`.
    """

    deps: Any = None
    session: str = ""
    agent: str = ""
    call_id: str = ""
    key: str = ""
    tainted_by: tuple[str, ...] = ()
    report: Callable[[str], Awaitable[None]] = field(default=ignore, repr=False)
    taints: list[str] = field(default_factory=list, repr=False)

    def taint(self, source: str) -> None:
        """Marks this call's result as what a stranger may have written, through `source`."""
        self.taints.append(source)


@dataclass(frozen=True)
class Tool:
    """A function with what the loop must know about it.

    Args:
      context: the parameter, its first, that is given the call's context.
      effects: "pure" may be called at will; "idempotent" may be called again with the same key;
        "write" is called at most once, alone, and never again when a crash left its end in doubt.
      approval: whether a person must agree, or a function of the arguments that says so.
      network: whether it can send data away.
      guarded: whether a tainted conversation needs leave to call it; by default, if it has effects
        or network.
      untrusted: whether a stranger may have written its results.
      timeout: seconds; then the call ends. A sync function with a timeout runs in its own process,
        which is killed; an async one is cancelled.
      retries: attempts after the first when `retry_on` is raised, with backoff.
      serial: runs alone among the calls of its turn.
      max_result: characters of the result that the model sees.
    """

    name: str
    description: str
    function: Callable[..., Any]
    arguments: type[BaseModel]
    context: str | None = None
    effects: Effects = "write"
    approval: Approval = False
    network: bool = False
    guarded: bool | None = None
    untrusted: bool = False
    timeout: float | None = None
    retries: int = 0
    retry_on: tuple[type[Exception], ...] = (ConnectionError, TimeoutError)
    serial: bool = False
    max_result: int = 20_000
    schema: Mapping[str, Any] | None = None

    @functools.cached_property
    def spec(self) -> ToolSpec:
        """What the model is told."""
        # Titles only repeat the names.
        schema = self.schema or without(self.arguments.model_json_schema(), "title")
        return ToolSpec(self.name, self.description, schema)

    @property
    def privileged(self) -> bool:
        """Whether a stranger's words must not be enough to call it."""
        return self.effects != "pure" or self.network if self.guarded is None else self.guarded

    @functools.cached_property
    def kind(self) -> Literal["async", "async generator", "generator", "sync"]:
        """What its function is; looked at once, as each call asks."""
        if inspect.isasyncgenfunction(self.function):
            return "async generator"
        if inspect.iscoroutinefunction(self.function):
            return "async"
        return "generator" if inspect.isgeneratorfunction(self.function) else "sync"

    @property
    def own_process(self) -> bool:
        """Whether a call is a process that can be killed."""
        return self.timeout is not None and self.kind in ("generator", "sync")

    def parse(self, text: str) -> dict[str, Any]:
        """The arguments as Python values; raises ArgumentError, which is written for the model."""
        try:
            return dict(self.arguments.model_validate_json(text or "{}"))
        except (ValidationError, UnicodeError) as error:
            told = faults(error) if isinstance(error, ValidationError) else str(error)
            raise ArgumentError(f"arguments of {self.name}: {told}") from None


class ArgumentError(ValueError):
    """The model wrote arguments that the tool does not take."""


class ToolFailed(Exception):
    """Raised by a tool: its message is the observation, and no retry is tried."""


@overload
def tool(function: Callable[..., Any], /) -> Tool: ...
@overload
def tool(*, name: str | None = None, **options: Any) -> Callable[[Callable[..., Any]], Tool]: ...
def tool(
    function: Callable[..., Any] | None = None, /, *, name: str | None = None, **options: Any
) -> Any:
    """Makes a Tool of a function; `options` are fields of Tool. Raises UserError where the
    signature cannot be told to a model."""
    if function is None:
        return lambda function: tool(function, name=name, **options)  # pyright: ignore
    name = name or function.__name__
    if not name.isidentifier() or len(name) > 64:
        raise UserError(f"tool {name!r}: give a name of letters, digits and _, at most 64")
    doc = docstring_parser.parse(inspect.getdoc(function) or "")
    described = {p.arg_name: p.description or "" for p in doc.params}
    arguments, context = _arguments(function, name, described)
    description = "\n".join(filter(None, (doc.short_description, doc.long_description)))
    made = Tool(name, description, function, arguments, context, **options)
    if made.retries and made.effects == "write":
        raise UserError(f"tool {name}: it writes, so it is not retried; say effects='idempotent'")
    if made.own_process:
        _check_importable(made)
    return made


def _arguments(
    function: Callable[..., Any], name: str, described: Mapping[str, str]
) -> tuple[type[BaseModel], str | None]:
    try:
        hints = get_type_hints(function, include_extras=True)
    except NameError as error:
        raise UserError(
            f"tool {name}: {error}; its annotations must name module-level types"
        ) from None
    fields: dict[str, Any] = {}
    context = None
    for i, (parameter, p) in enumerate(inspect.signature(function).parameters.items()):
        if hints.get(parameter) is Context:
            if i:
                raise UserError(f"tool {name}: its context must be the first parameter")
            context = parameter
            continue
        if p.kind in (p.POSITIONAL_ONLY, p.VAR_POSITIONAL, p.VAR_KEYWORD):
            raise UserError(f"tool {name}: parameter {parameter} has no name a model could use")
        if parameter not in hints:
            raise UserError(f"tool {name}: parameter {parameter} needs a type annotation")
        hint = hints[parameter]
        told = get_args(hint)[1:] if get_origin(hint) is Annotated else ()
        texts = [text for text in told if isinstance(text, str)]
        description = texts[0] if texts else described.get(parameter)
        default = ... if p.default is p.empty else p.default
        fields[parameter] = (Annotated[hint, Field(description=description)], default)
    try:
        model = create_model(name, __config__=ConfigDict(extra="forbid"), **fields)
        model.model_json_schema()
    except (PydanticUserError, NameError, TypeError) as error:
        raise UserError(f"tool {name}: {str(error).splitlines()[0]}") from None
    return model, context


def _check_importable(made: Tool) -> None:
    function = made.function
    if made.context:
        raise UserError(
            f"tool {made.name}: with a timeout it runs in its own process, where there is no "
            "context; make it async or drop the parameter"
        )
    if "<" in function.__qualname__ or function.__module__ == "__main__":
        raise UserError(
            f"tool {made.name}: with a timeout it runs in its own process, which imports it; "
            "define it at the top of a module, or make it async"
        )


def importable(name: str) -> Tool:
    """The tool that is, or is made of, what another process finds as `module:qualname`."""
    found: Any = pkgutil.resolve_name(name)
    return found if isinstance(found, Tool) else tool(found)


def without(schema: Any, *keywords: str) -> Any:
    """The JSON schema without these keywords, at any depth; properties of such names stay."""
    if isinstance(schema, list):
        return [without(item, *keywords) for item in schema]
    if not isinstance(schema, Mapping):
        return schema
    named = ("properties", "$defs", "definitions")
    return {
        key: {name: without(inner, *keywords) for name, inner in value.items()}
        if key in named else without(value, *keywords)
        for key, value in schema.items() if key not in keywords
    }  # fmt: skip


def faults(error: ValidationError) -> str:
    """What is wrong with the values, for a model to read."""
    return "; ".join(
        f"{'.'.join(map(str, e['loc'])) or 'value'}: {e['msg']}" for e in error.errors()[:5]
    )


def as_text(value: Any) -> str:
    """A result as the model reads it: text as it is, the rest as JSON. Raises ToolFailed where it
    has no JSON."""
    if isinstance(value, str):
        return value
    if isinstance(value, enum.Enum):
        value = value.value
    try:
        return to_json(value, inf_nan_mode="strings").decode()
    except (PydanticSerializationError, ValueError, RecursionError) as error:
        kind = type(value).__name__
        raise ToolFailed(f"its result, a {kind}, has no JSON ({error})") from None


async def stream_of(called: Tool, args: Mapping[str, Any]) -> AsyncGenerator[str, None]:
    """The results of a call in this process, as text: one, or those that a generator yields.

    A sync function runs in a worker thread. A cancelled caller leaves that thread behind.
    """
    import anyio.to_thread

    function = called.function
    in_thread = functools.partial(anyio.to_thread.run_sync, abandon_on_cancel=True)
    if called.kind == "async generator":
        async for value in function(**args):
            yield as_text(value)
    elif called.kind == "async":
        yield as_text(await function(**args))
    elif called.kind == "generator":
        values = function(**args)
        end = object()
        while (value := await in_thread(next, values, end)) is not end:
            yield as_text(value)
    else:
        value = await in_thread(functools.partial(function, **args))
        yield as_text(await value if inspect.isawaitable(value) else value)
