"""Any walk through the masks ends in a valid answer, and a bad grammar is one line."""

import json
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from decode.grammar import Compiler
from decode.request import Grammar
from jaxinfra.text import Tokenizer

TOKENIZER = Tokenizer.byte_level()
VOCAB = TOKENIZER.vocab_size + 13  # more rows than tokens, and no multiple of 32
COMPILER = Compiler(TOKENIZER, VOCAB)
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "é", 'q"']}, "maxItems": 3},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
CHOICES = ["yes", "no", 'a "b"\n', "日本"]


def allowed(matcher):
    row = np.zeros(COMPILER.words, np.int32)
    matcher.fill(row)
    return np.flatnonzero(np.unpackbits(row.view(np.uint8), bitorder="little"))


def walk(matcher, draw):
    """The text of random allowed tokens, until nothing may follow or the end was drawn."""
    taken = []
    while not matcher.done:
        assert len(taken) < 2000
        token = int(draw(allowed(matcher)))
        assert matcher.accept(token)
        if token in TOKENIZER.eos_ids:
            break
        taken.append(token)
    return TOKENIZER.decode(taken)


def valid_person(text):
    value = json.loads(text)
    assert value.keys() <= SCHEMA["properties"].keys() and {"name", "age"} <= value.keys()
    assert isinstance(value["name"], str) and len(value["name"]) <= 6
    assert type(value["age"]) is int and 0 <= value["age"] <= 150
    assert all(tag in ("a", "é", 'q"') for tag in value.get("tags", []))
    assert len(value.get("tags", [])) <= 3


def valid_sum(text):
    assert re.fullmatch(r"\d(\+\d)*", text)


CASES = {
    "choice": (json.dumps(CHOICES), lambda text: CHOICES.index(text)),
    "json_schema": (json.dumps(SCHEMA), valid_person),
    "lark": ('start: DIGIT ("+" DIGIT)*\nDIGIT: /[0-9]/', valid_sum),
    "regex": (r"[a-c]{2,4}-[0-9]+x", lambda text: re.fullmatch("[a-c]{2,4}-[0-9]+x", text)[0]),
}


@settings(max_examples=25, deadline=None)
@pytest.mark.parametrize("kind", sorted(CASES))
@given(seed=st.integers(0, 2**32 - 1))
def test_every_walk_is_valid(kind, seed):
    text, check = CASES[kind]
    check(walk(COMPILER.compile(Grammar(kind, text)), np.random.default_rng(seed).choice))


def test_unmasked_walks_are_rejected():
    """The checks above can fail: tokens at random, without the mask, are invalid."""
    for kind in sorted(CASES):
        text, check = CASES[kind]
        noise = TOKENIZER.decode(np.random.default_rng(0).integers(32, 127, 12))
        with pytest.raises((AssertionError, ValueError, TypeError)):
            check(noise)
        matcher = COMPILER.compile(Grammar(kind, text))
        assert not all(matcher.accept(token) for token in noise.encode())


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), back=st.integers(1, 8))
def test_rollback_is_as_if_never_accepted(seed, back):
    random = np.random.default_rng(seed)
    matcher = COMPILER.compile(Grammar("json_schema", json.dumps(SCHEMA)))
    masks, taken = [], 0
    while not matcher.done and taken < 20:
        masks.append(allowed(matcher))
        matcher.accept(int(random.choice(masks[-1])))
        taken += 1
    back = min(back, taken)
    matcher.rollback(back)
    assert not matcher.done
    np.testing.assert_array_equal(allowed(matcher), masks[taken - back])


def test_the_end_and_a_refusal():
    matcher = COMPILER.compile(Grammar("choice", '["ab"]'))
    assert not matcher.accept(ord("b")) and matcher.accept(ord("a"))
    assert not matcher.done and matcher.accept(ord("b")) and matcher.done
    np.testing.assert_array_equal(allowed(matcher), TOKENIZER.eos_ids)
    matcher.rollback(1)
    assert matcher.accept(ord("b")) and matcher.done
    with pytest.raises(ValueError, match="take back"):
        matcher.rollback(9)


@pytest.mark.parametrize(
    ("kind", "text", "told"),
    [
        ("choice", '["a", 1]', "list of one or more texts"),
        ("choice", "[]", "list of one or more texts"),
        ("choice", "a", "no JSON list"),
        ("json_schema", '{"type": "nope"}', "Invalid type"),
        ("json_schema", '{"if": {}}', "Unimplemented keys"),
        ("json_schema", "[1", "json_schema"),
        ("json_schema", "[" * 5000, "json_schema"),
        ("lark", "start: foo", "unknown name"),
        ("regex", "(a", "unclosed group"),
        ("sql", "x", "no kind 'sql'"),
    ],
)
def test_a_bad_grammar_is_one_line(kind, text, told):
    with pytest.raises(ValueError, match=told) as error:
        COMPILER.compile(Grammar(kind, text))
    assert "\n" not in str(error.value)
