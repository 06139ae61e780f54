"""The jinja2 environment of chat templates: transformers' rules inside bounds on time and memory.

A template comes with a model and is a program by a stranger. jinja2's immutable sandbox keeps it
from Python's internals. Here every value it makes is measured too, before it is made where that can
be foreseen, and each loop step and call looks at the clock. One built-in function may overrun the
time, on at most SIZE, and what many values take together is not counted.
"""

from __future__ import annotations

import contextvars
import datetime
import functools
import json
import re
import string
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jinja2
import jinja2.ext
import jinja2.visitor
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

SECONDS = 5.0
SIZE = 16_000_000  # characters of any one value and of the text written; an entry counts as eight
LARGEST_COUNT = 10_000  # of a width, an indent, a precision

_GROWING = ("join", "indent", "tojson", "expandtabs", "wordwrap")  # write an argument many times
_COUNTED = ("center", "ljust", "rjust", "zfill", "expandtabs", "indent", "tojson", "batch", "round")
_WIDE = re.compile(r"%(\([^)]*\))?[-+ #0_^]*(\*|\d{5}|\d*\.(\*|\d{5}))")  # a format of printf

deadline = contextvars.ContextVar("deadline", default=float("inf"))  # by time.monotonic()


def tick() -> None:
    """Raises OverflowError once the deadline has passed."""
    if time.monotonic() > deadline.get():
        raise OverflowError(f"computes for more than {SECONDS:g} s")


def measure(*values: Any) -> int:
    """The size of nested values; raises OverflowError where it is beyond SIZE."""
    todo, size = list(values), len(values)
    while todo:
        value = todo.pop()
        if isinstance(value, str | bytes):
            size += len(value)
        elif isinstance(value, range):
            size += 8 * len(value)
        elif isinstance(value, int) and abs(value) >= 2**63:
            raise OverflowError("computes with a number beyond 64 bits")
        elif isinstance(value, list | tuple):
            size += 8 * len(value)
            todo += value
        elif isinstance(value, dict):
            size += 8 * len(value)
            todo += [*value, *value.values()]
        elif isinstance(value, Namespace):
            raise SecurityError("uses a namespace as a value")
        if size > SIZE:
            raise OverflowError(f"builds a value of more than {SIZE:,} characters")
    return size


def _measured(value: Any) -> Any:
    measure(value)
    return value


def _ticked(values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        tick()
        yield value


def _joined(values: Iterable[Any]) -> str:
    texts = [str(value) for value in values]
    measure(texts)
    return "".join(texts)


def _check_percent(text: Any) -> None:
    """For the operator %, the filter `format` and strftime."""
    if isinstance(text, str) and _WIDE.search(text.replace("%%", "")):
        raise OverflowError("formats with a width beyond 9,999, or one that is an argument")


def _check_braces(text: Any) -> None:
    """For the method `format`."""
    for _, _, width, _ in string.Formatter().parse(text):
        if re.search(r"\d{5}|{", width or ""):
            raise OverflowError("formats with a width beyond 9,999, or one that is an argument")


def _guarded(name: str, subject: Any, options: list[Any], function: Callable[[], Any]) -> Any:
    """The result of a filter or method called `name`, within bounds before and after the call."""
    tick()
    size = measure(subject, *options)
    counts = [o for o in options if isinstance(o, int)] if name in _COUNTED else []
    if any(abs(count) > LARGEST_COUNT for count in counts):
        raise OverflowError(f"{name}: a number beyond {LARGEST_COUNT:,}")
    texts = [option for option in options if isinstance(option, str)]
    if name == "replace":
        grown = max([str(subject).count(t) for t in texts], default=0) * max(map(len, texts))
    elif name == "format":
        grown = measure(*options) * max(subject.count("%"), subject.count("{"))
    elif name in _GROWING:
        texts += [subject] if name == "join" and isinstance(subject, str) else []
        grown = size * max([*counts, *map(len, texts)], default=0)
    else:
        grown = 0
    if grown > SIZE:
        raise OverflowError(f"{name}: builds a value of more than {SIZE:,} characters")
    result = function()
    if isinstance(result, Iterator):  # of map, select, batch, ...
        entries, size = [], 0
        for entry in _ticked(result):
            entries.append(entry)
            size += measure(entry)
            if size > SIZE:
                raise OverflowError(f"{name}: builds a list of more than {SIZE:,} characters")
        return entries
    return _measured(result)


def _guarded_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    takes_context = hasattr(function, "jinja_pass_arg")

    @functools.wraps(function)  # also copies the mark that asks for the context
    def guarded(*args: Any, **kwargs: Any) -> Any:
        context, (subject, *options) = args[:takes_context], args[takes_context:]
        if name == "format":
            _check_percent(subject)
        given = _ticked(subject) if name == "sum" else subject  # a sum of lists copies every part
        call = functools.partial(function, *context, given, *options, **kwargs)
        return _guarded(name, subject, [*options, *kwargs.values()], call)

    return guarded


class _Namespace(Namespace):
    """A namespace of plain values under plain names."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # so that `namespace(self=...)` works
        Namespace.__init__(args[0])
        for name, value in dict(*args[1:], **kwargs).items():
            args[0][name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise SecurityError(f"namespace: {name!r} starts with an underscore")
        Namespace.__setitem__(self, name, _measured(value))


class _Bounds(jinja2.visitor.NodeTransformer):
    """Has loops look at the clock, and literals and `~` measure their values."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = self._filter(node.iter, "_ticked")
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Filter:
        self.generic_visit(node)
        return self._filter(nodes.List(node.nodes, lineno=node.lineno), "_joined")

    def visit_List(self, node: nodes.List | nodes.Dict) -> nodes.Node:
        self.generic_visit(node)
        return self._filter(node, "_measured")

    visit_Dict = visit_List

    def _filter(self, node: Any, name: str) -> nodes.Filter:
        return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks what the assistant wrote; its content is rendered as it is."""

    tags = {"generation"}  # noqa: RUF012  (jinja2's own declaration)

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class ChatEnvironment(ImmutableSandboxedEnvironment):
    """The sandbox; templates made from it must be rendered with `deadline` set."""

    concat = staticmethod(_joined)  # of the pieces of a macro, a block, a whole template
    intercepted_binops = frozenset({"+", "*", "%", "**"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, jinja2.ext.loopcontrols],
            finalize=_measured,
        )
        self.filters["tojson"] = _to_json
        self.filters = {
            name: _guarded_filter(name, function) for name, function in self.filters.items()
        }
        self.filters |= {"_ticked": _ticked, "_measured": _measured, "_joined": _joined}
        del self.globals["lipsum"]
        self.globals |= {
            "namespace": _Namespace,
            "raise_exception": _raise_exception,
            "strftime_now": _strftime_now,
        }

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        return _Bounds().visit(super()._parse(source, name, filename))

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """As in jinja2, and without three methods whose growth is hard to foresee."""
        refused = ("translate", "format_map", "to_bytes")
        return attr not in refused and super().is_safe_attribute(obj, attr, value)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """An arithmetic operator, measured."""
        tick()
        if operator == "**":
            raise SecurityError("uses the operator **")
        size = measure(left, right)
        if operator == "*" and not (
            isinstance(left, float | int) and isinstance(right, float | int)
        ):
            times = next((n for n in (left, right) if isinstance(n, int)), 0)
            if times * size > SIZE:
                raise OverflowError(f"builds a value of more than {SIZE:,} characters")
        result = functools.partial(super().call_binop, context, operator, left, right)
        if operator == "%" and isinstance(left, str):
            _check_percent(left)
            return _guarded("format", left, [right], result)
        return _measured(result())

    def call(self, context: Any, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        """A call; methods of text and functions of the environment are measured."""
        tick()
        call = functools.partial(super().call, context, obj, *args, **kwargs)
        subject = getattr(getattr(obj, "__wrapped__", obj), "__self__", None)  # format is wrapped
        if isinstance(subject, str) or obj is dict:
            if obj.__name__ == "format":
                _check_braces(subject)
            return _guarded(obj.__name__, subject, [*args, *kwargs.values()], call)
        return call()


def _to_json(
    x: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    _check_percent(format)
    return datetime.datetime.now().strftime(format)
