"""Conversations as tokens, by the templates of models."""

import dataclasses
import functools

import pytest

from agent.engine_sessions import Sessions
from agent.messages import Message, ToolCall, to_openai, user
from agent.model import Request
from jaxinfra.text import Tokenizer
from tests.agent.compat_server import TEMPLATE
from tests.agent.steered_engine import BYTES
from tests.agent.test_models import TOOL
from tests.jaxinfra.text.samples import TEMPLATES


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_of_models_can_be_appended_to(name):
    tokenizer = Tokenizer(BYTES.backend, BYTES.special, BYTES.eos_ids, TEMPLATES[name])
    encode = functools.partial(tokenizer.encode, add_special=False)
    answers = [Message("assistant", text, tokens=tuple(encode(text))) for text in ("One.", "Two.")]
    said = (Message("system", "S."), user("a"), answers[0], user("b"), answers[1], user("c"))
    made = Sessions(tokenizer).turn(Request(said), 9999).tokens
    assert [*made] == tokenizer.encode_chat([to_openai(m) for m in said])
    assert Sessions(tokenizer).turn(Request(said[2:]), 9999).tokens  # as after a compression
    drawn = tuple(encode("what was drawn"))
    called = Message("assistant", calls=(ToolCall("123456789", "multiply", "{}"),), tokens=drawn)
    said = (user("a"), called, Message("tool", "42", call_id="123456789"))
    text = tokenizer.decode(Sessions(tokenizer).turn(Request(said, (TOOL,)), 9999).tokens)
    before, _, after = text.partition("what was drawn")
    whole = tokenizer.decode(Sessions(tokenizer).turn(Request(
        (said[0], dataclasses.replace(called, tokens=None), said[2]), (TOOL,)), 9999).tokens
    )  # fmt: skip
    assert whole.startswith(before) and whole.endswith(after) and "42" in after


@pytest.mark.parametrize("drawn", [(65, 257), (65,)], ids=["it ended", "it was cut"])
def test_the_end_of_a_turn_stands_once(drawn):
    """Where the template writes the token that ends a turn, and the model may have drawn it."""
    backend = Tokenizer.byte_level().backend
    backend.encode_special_tokens = False
    template = TEMPLATE.replace("<|im_end|>", "<|eos|>")
    tokenizer = Tokenizer(backend, BYTES.special, BYTES.eos_ids, template)
    said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "A"},
            {"role": "user", "content": "b"}]  # fmt: skip
    messages = (user("a"), Message("assistant", "A", tokens=drawn), user("b"))
    made = Sessions(tokenizer).turn(Request(messages), 1000).tokens
    assert [*made] == tokenizer.encode_chat(said)
