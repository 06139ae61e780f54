"""Calls that a model begins by itself are held to their tools, and its words are its own."""

import itertools
import json
import random
from typing import Any

import jsonschema
import numpy as np
import pytest

from decode.grammar import Compiler
from decode.server.calls import held, offered
from decode.server.protocol import Function
from decode.server.tools import Reader
from jaxinfra.text import Tokenizer
from tests.decode.server.test_tools import read

TOKENIZER = Tokenizer.byte_level()
COMPILER = Compiler(TOKENIZER, TOKENIZER.vocab_size)
SCHEMAS = {
    "nest": {
        "type": "object",
        "properties": {
            "who": {"$ref": "#/$defs/who"},
            "tags": {"type": "array", "items": {"enum": ["a", "\u4e09"]}, "maxItems": 2},
        },
        "required": ["who", "tags"], "additionalProperties": False,
        "$defs": {"who": {"anyOf": [{"type": "null"}, {"type": "string", "maxLength": 5}]}},
    },
    "add": {
        "type": "object", "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 9}},
        "required": ["n"], "additionalProperties": False,
    },
}  # fmt: skip
TOOLS = [Function(name=name, parameters=schema) for name, schema in SCHEMAS.items()]
OPENS = ["<tool_call>", "</think>", "<think>", "{", "<|python_tag|>", "</tool_call>"]
CASES = [*itertools.product(["hermes", "llama"], [True, False], [None, "open", "may"])]


def allowed(matcher):
    row = np.zeros(COMPILER.words, np.int32)
    matcher.fill(row)
    return np.flatnonzero(np.unpackbits(row.view(np.uint8), bitorder="little"))


def walk(grammar, seed, most=200):
    """An answer as the engine draws it: what is free is random words and tags, the rest masked."""
    draw, matcher = random.Random(seed), COMPILER.compile(grammar)
    said, free, waiting = [], True, []
    while not matcher.done and (len(said) < most or not matcher.may_end):
        if not free:
            token = int(draw.choice(allowed(matcher)))
            waiting = []
        else:
            if not waiting:
                tag = draw.choice(OPENS) if draw.random() < 0.4 else draw.choice(["a b", "\n", "9"])
                waiting = [*tag.encode()]
            token = waiting.pop(0)
        if token in TOKENIZER.eos_ids:
            break
        fits = matcher.accept(token)
        assert fits or free, "a mask allowed what the matcher does not"
        if fits:
            said.append(token)
        free = fits and matcher.may_end
    return TOKENIZER.decode(said)


def check(calls):
    for name, arguments in calls:
        jsonschema.validate(json.loads(arguments), SCHEMAS[name])


@pytest.mark.parametrize("style, many, thinking", CASES)
def test_no_walk_makes_a_malformed_call(style, many, thinking):
    grammar = offered(TOOLS, style, many, thinking)
    assert grammar.lazy
    most, spoke, seen = 0, 0, set()
    for seed in range(80):
        text = walk(grammar, seed)
        _, content, calls = read([text], format=style, names=[*SCHEMAS], thinking=thinking)
        check(calls)
        most, spoke = max(most, len(calls)), spoke + bool(content and not calls)
        seen |= {name for name, _ in calls}
        if thinking is None:
            assert "<tool_call>" not in content or style == "llama"
    assert seen == set(SCHEMAS) and spoke and (most > 1) == many


def test_a_call_that_is_not_held_is_malformed():
    """The control: its head is right, and the rest is drawn from likely pieces."""
    draw, wrong = random.Random(0), 0
    for _ in range(60):
        words = draw.choices(['"n": 3', "}", ", ", "a"], k=3)
        text = f'<tool_call>{{"name": "add", "arguments": {{{"".join(words)}}}}}</tool_call>'
        try:
            check(read([text], format="hermes")[2])
        except (ValueError, KeyError, jsonschema.ValidationError):
            wrong += 1
    assert 5 < wrong <= 60


def accepted(grammar, text):
    """How much of `text` the grammar takes, and whether it may end there."""
    matcher = COMPILER.compile(grammar)
    for i, token in enumerate(text.encode()):
        if not matcher.accept(token):
            return text[:i], matcher.may_end
    return text, matcher.may_end


def test_words_and_thoughts_are_free():
    call = '<tool_call>\n{"name": "add", "arguments": {"n": 3}}\n</tool_call>'
    cases: list[tuple[str, Any]] = [
        (f"Let me see: {{a}} <tool_cal \u4e09\n{call}\n{call} done", None),
        (f"\n<think>what if <tool_call>x</think>\n{call}", "may"),
        (f"hm <tool_call>x</think>{call}", "open"),
        ("never closed <tool_call>", "open"),
        (f"a <think>{call}", "may"),
    ]
    for text, thinking in cases:
        assert accepted(offered(TOOLS, "hermes", True, thinking), text) == (text, True)
    assert accepted(offered(TOOLS, "hermes", False, None), call + " ")[0] == call
    text = ' {"name": "add", "parameters": {"n": 3}}; {"name": "add", "parameters": {"n": 4}}'
    assert accepted(offered(TOOLS, "llama", True, None), text) == (text, True)
    assert accepted(offered(TOOLS, "llama", True, None), 'I say {"x": 1}')[1]
    assert not accepted(offered(TOOLS, "llama", True, None), '{"x')[1]


@pytest.mark.parametrize("style", ["hermes", "llama"])
def test_an_answer_by_a_schema_or_a_call(style):
    answer = {"type": "object", "properties": {"yes": {"type": "boolean"}},
              "required": ["yes"], "additionalProperties": False}  # fmt: skip
    grammar = held(TOOLS, style, True, answer)
    kinds = set()
    for seed in range(40):
        matcher, draw, said = COMPILER.compile(grammar), random.Random(seed), []
        while not matcher.done:
            said.append(int(draw.choice(allowed(matcher))))
            assert matcher.accept(said[-1])
            if said[-1] in TOKENIZER.eos_ids:
                break
        reader = Reader(style, [*SCHEMAS])
        _, content, calls = read([TOKENIZER.decode(said)], format=style, names=[*SCHEMAS])
        check(calls)
        if content:
            jsonschema.validate(json.loads(content), answer)
        kinds.add((bool(content), bool(calls)))
        assert reader.finish() == []
    assert kinds == {(True, False), (False, True)}


def test_a_keyword_that_is_not_known_holds_strict_functions_alone():
    odd = {"type": "object", "properties": {"a": {"type": "integer"}}, "if": {}}
    loose = offered([Function(name="f", parameters=odd)], "hermes", True, None)
    call = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'
    assert accepted(loose, call) == (call, True)
    strict = offered([Function(name="f", parameters=odd, strict=True)], "hermes", True, None)
    with pytest.raises(ValueError, match="Unimplemented keys"):
        COMPILER.compile(strict)
    broken = {"$ref": "#/nowhere"}
    with pytest.raises(ValueError, match="nowhere"):
        COMPILER.compile(offered([Function(name="f", parameters=broken)], "hermes", True, None))
