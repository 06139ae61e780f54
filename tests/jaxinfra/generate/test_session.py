"""Conversations: streamed text, a cache kept between turns that is never believed wrongly."""

import dataclasses
import functools
import io

import jax
import pytest
from rich.console import Console

from jaxinfra.errors import UserError
from jaxinfra.generate import Sampling, loop, session
from jaxinfra.loading import Model
from jaxinfra.model import cache as kv
from jaxinfra.model.config import ModelConfig
from jaxinfra.text import Tokenizer
from tests.jaxinfra.model import cases
from tests.jaxinfra.model_families import CONFIGS

PLAIN = "{% for m in messages %}<{{ m.role[0] }}>{{ m.content }}{% endfor %}<a>"
# Drops all turns but the last, as templates that hide earlier reasoning change them.
FORGETFUL = "{{ messages | length }}<u>{{ messages[-1].content }}<a>"


@functools.cache
def model(template: str | None = PLAIN) -> Model:
    config = ModelConfig.from_hf(CONFIGS["smollm2"]).replace(vocab_size=320, max_seq_len=512)
    tokenizer = dataclasses.replace(Tokenizer.byte_level(), chat_template=template)
    return Model(config, cases.params(config), tokenizer)


@pytest.mark.parametrize(
    ("tokens", "says"),
    [
        ([1, 2], r"int64\[2\]; give rows"),
        ([[1], [1, 2]], "rows of different lengths"),
        ("hello", "give rows of token ids"),
        ([[0.5]], "float64"),
        ([[320]], "ids from 320 to 320; size=320"),
    ],
)
def test_what_are_no_tokens_is_said(tokens, says):
    with pytest.raises(UserError, match=says):
        model()(tokens)


@functools.cache
def unstacked():
    return kv.unstack(model().params, model().config)


def conversation(template: str = PLAIN, **options) -> session.Conversation:
    options = {"max_new_tokens": 9, "sampling": Sampling(0.9, seed=2), **options}
    return session.Conversation(unstacked(), model().config, model(template).tokenizer, **options)


def afresh(template: str, messages: list[dict]) -> str:
    """The answer to `messages`, with no cache."""
    talk = conversation(template)
    talk.messages = messages[:-1]
    return "".join(talk.ask(messages[-1]["content"]))


@pytest.mark.parametrize("template", [PLAIN, FORGETFUL])
def test_later_turns_answer_as_if_afresh(template):
    talk = conversation(template)
    for question in ("Hi there", "What is a pipeline?", "And a mesh?"):
        before = [*talk.messages, {"role": "user", "content": question}]
        assert "".join(talk.ask(question)) == afresh(template, before)


def test_believing_the_cache_blindly_is_found(monkeypatch):
    talk = conversation(FORGETFUL)
    "".join(talk.ask("Hi there"))
    monkeypatch.setattr(session, "_shared", lambda a, b: min(len(a), len(b)))
    before = [*talk.messages, {"role": "user", "content": "What is a pipeline?"}]
    found = "".join(talk.ask("What is a pipeline?"))
    monkeypatch.undo()
    assert found != afresh(FORGETFUL, before)


def test_a_turn_computes_only_what_is_new(monkeypatch):
    talk = conversation()
    sizes, real = [], session.Stream

    def noting(params, config, prompts, **options):
        sizes.append(len(prompts[0]))
        return real(params, config, prompts, **options)

    monkeypatch.setattr(session, "Stream", noting)
    "".join(talk.complete("abcdefgh" * 10))
    "".join(talk.complete("abcdefgh" * 10 + "xyz"))
    assert sizes == [81, 3]  # the first with the token that begins a text


def test_an_answer_broken_off_counts_as_said():
    talk = conversation(max_new_tokens=40)
    pieces = talk.ask("Hi there")
    said = next(pieces)
    pieces.close()
    assert talk.messages[-1] == {"role": "assistant", "content": said}
    before = [*talk.messages, {"role": "user", "content": "Go on"}]
    talk._max_new = 9
    assert "".join(talk.ask("Go on")) == afresh(PLAIN, before)


def test_ctrl_c_inside_a_call_leaves_a_conversation_that_goes_on(monkeypatch):
    """The call has been given the cache and what it gave back never arrived."""
    compiled = loop._compiled

    def interrupting(function, *args, **options):
        program = compiled(function, *args, **options)
        if function is not loop.decode:
            return program

        def call(*arguments):
            program(*arguments)
            raise KeyboardInterrupt

        return call

    talk = conversation(max_new_tokens=40)
    monkeypatch.setattr(loop, "_compiled", interrupting)
    pieces = talk.ask("Hi there")
    with pytest.raises(KeyboardInterrupt):
        list(pieces)
    monkeypatch.undo()
    assert talk.stream is not None and "tokens, " in session.status(
        talk.stream, unstacked(), model().config, 1e9
    )
    before = [*talk.messages, {"role": "user", "content": "Go on"}]
    talk._max_new = 9
    assert "".join(talk.ask("Go on")) == afresh(PLAIN, before)


def test_pieces_join_to_the_decoded_tokens():
    talk = conversation(max_new_tokens=30)
    text = "".join(talk.complete("def f(x):"))
    assert talk.stream is not None
    assert text == model().tokenizer.decode(talk.stream.tokens[0])


def test_system_and_reset():
    talk = conversation(system="Be brief.")
    "".join(talk.ask("Hi"))
    assert [m["role"] for m in talk.messages] == ["system", "user", "assistant"]
    talk.reset()
    assert [m["role"] for m in talk.messages] == ["system"]


def test_a_full_context_says_so():
    talk = conversation()
    with pytest.raises(UserError, match=r"takes 512; begin a new one"):
        talk.ask("x" * 512)
    assert talk.messages == []


def test_bytes_of_a_token():
    config, params = model().config, unstacked()
    leaves = sum(leaf.nbytes for leaf in jax.tree.leaves(params)) - params.embed.nbytes
    keys = 2 * 4 * config.num_layers * config.num_kv_heads * config.head_dim * 100
    norm = params.final_norm.nbytes
    assert session.token_bytes(params, config, 100) == leaves - norm + keys

    mixture = ModelConfig.from_hf(CONFIGS["mixtral"])  # two of five experts
    params = kv.unstack(cases.params(mixture), mixture)
    expert = 3 * mixture.d_model * mixture.d_ff * 4
    leaves = sum(leaf.nbytes for leaf in jax.tree.leaves((params.layers, params.unembed)))
    wanted = leaves - mixture.num_layers * 3 * expert
    assert session.token_bytes(params, mixture, 0) == wanted


def screen(monkeypatch, lines: list[str], template: str | None, **options) -> str:
    """What `run` shows while `lines` are typed."""
    console = Console(file=io.StringIO(), width=120)
    typed = iter(lines)

    def read(*_):
        try:
            return next(typed)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", read)
    session.run(model(template), console=console, max_new_tokens=6, **options)
    return console.file.getvalue()  # pyright: ignore


def test_chat_in_the_terminal(monkeypatch):
    lines = ["Hi there", "", "/help", "/reset", "x" * 600, "Hi there", "/exit", "never asked"]
    shown = screen(monkeypatch, lines, PLAIN, bandwidth=1e12)
    assert shown.count("6 tokens, ") == 2
    assert shown.count("of the 1000 GB/s bound") == 2
    assert shown.count(session.COMMANDS) == 2
    assert "begin a new one (/reset)" in shown
    answers = [b.split("\n6 tokens")[0] for b in shown.split("> ") if "6 tokens, " in b]
    assert answers[0] == answers[1]


def test_completion_without_a_template(monkeypatch):
    shown = screen(monkeypatch, [], None, prompt="def f(x):")
    assert "6 tokens, " in shown and session.COMMANDS not in shown
    with pytest.raises(UserError, match="no chat template"):
        session.run(model(None), "Hi", chat=True, console=Console(file=io.StringIO()))
    with pytest.raises(UserError, match="only a chat has a system's message"):
        session.run(model(None), "Hi", system="Be brief.", console=Console(file=io.StringIO()))


def test_ctrl_c_ends_the_answer_only(monkeypatch):
    real = session.Conversation.ask

    def interrupted(self, text):
        pieces = real(self, text)
        yield next(pieces)
        pieces.close()
        raise KeyboardInterrupt

    monkeypatch.setattr(session.Conversation, "ask", interrupted)
    shown = screen(monkeypatch, ["Hi there", "And then?", "/exit"], PLAIN)
    assert shown.count(" tokens/s, ") == 2


def test_ctrl_c_while_compiling_ends_the_answer_only(monkeypatch):
    real, calls = session.Conversation.ask, []

    def interrupted(self, text):
        calls.append(text)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return real(self, text)

    monkeypatch.setattr(session.Conversation, "ask", interrupted)
    shown = screen(monkeypatch, ["Hi there", "And then?", "/exit"], PLAIN)
    assert calls == ["Hi there", "And then?"] and shown.count(" tokens/s, ") == 1
