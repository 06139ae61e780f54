"""Chats read as recorded from transformers; bad messages and hostile templates are a UserError."""

import itertools
import json
import time
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import jinja2
import pytest

from jaxinfra.errors import UserError
from jaxinfra.text import Tokenizer, chat, render, sandbox
from tests.jaxinfra.text.samples import TEMPLATES, TOOLS, chats, digest
from tests.jaxinfra.text.vocabularies import pulled_smollm2

FIXTURE = json.loads((Path(__file__).parents[2] / "fixtures/tokenizer.json").read_text("utf-8"))
ALL = TEMPLATES | {"smollm2": FIXTURE["chat_template"]}
SPECIAL = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
USER = [{"role": "user", "content": "hello"}]


def differing(texts: list[str], name: str) -> int:
    recorded = FIXTURE["texts"][name]["digests"]
    return sum(digest(text) != recorded[8 * i : 8 * i + 8] for i, text in enumerate(texts))


@pytest.mark.parametrize("name", ALL)
def test_texts_are_those_recorded(name):
    texts = [render(ALL[name], **one, **SPECIAL) for one in chats()]
    assert texts[21] == FIXTURE["texts"][name]["one"]
    assert differing(texts, name) == 0


@pytest.mark.parametrize("wrong", ["trim_blocks", "lstrip_blocks", "tojson"])
def test_an_environment_of_other_rules_is_rejected(wrong, monkeypatch):
    environment = chat.ChatEnvironment()
    if wrong == "tojson":
        environment.filters["tojson"] = jinja2.Environment().filters["tojson"]  # escapes HTML
    else:
        setattr(environment, wrong, False)
    texts = [environment.from_string(ALL["chatml"]).render(**one) for one in chats()]
    assert differing(texts, "chatml") > 0


@pytest.mark.network
def test_ids_of_chats_of_smollm2_are_those_recorded():
    tokenizer = Tokenizer.from_gguf(pulled_smollm2())
    ids = [tokenizer.encode_chat(**one) for one in chats()]
    assert "".join(map(digest, ids)) == FIXTURE["whole"]["chats"]


def test_a_tokenizer_encodes_a_chat_by_its_template_and_special_tokens():
    tokenizer = Tokenizer.byte_level()
    with pytest.raises(UserError, match="no chat template"):
        tokenizer.encode_chat(USER)
    template = "{{ bos_token ~ messages[0].content ~ mood }}"
    tokenizer = Tokenizer(tokenizer.backend, tokenizer.special, chat_template=template)
    assert tokenizer.decode(tokenizer.encode_chat(USER, mood="!")) == "<|bos|>hello!"


def test_variables_and_functions_of_templates():
    assert render("{{ x }} {{ documents is none }} {{ tools is none }}", USER, x=[1, None]) == (
        "[1, None] True True"
    )
    assert render("{{ strftime_now('%Y') }}", USER) == time.strftime("%Y")
    assert render("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}",
                  USER) == "01"  # fmt: skip
    assert render("{% generation %}{% set x = 1 %}a{% endgeneration %}{{ x }}", USER) == "a"
    assert render("{{ {'a': 'é<'} | tojson }}", USER) == '{"a": "é<"}'
    assert render("{{ messages[0].name is defined }}", [USER[0] | {"name": None}]) == "False"
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}
    assert render("{{ messages[0].tool_calls[0].name }}", [call]) == "f"
    parts = [{"role": "user", "content": [{"type": "text", "text": "a"}]}]
    assert render("{{ messages[0].content[0].text }}", parts) == "a"


@pytest.mark.parametrize(
    "messages, says",
    [
        ("hello", "list"),
        ([], "list"),
        (None, "list"),
        (["hello"], r"messages\[0\]: a str"),
        ([{"content": "a"}], "role"),
        ([{"role": 1, "content": "a"}], "role"),
        ([*USER, {"role": "user"}], r"messages\[1\]: lacks a 'content'"),
        ([{"role": "user", "content": None}], "content"),
        ([{"role": "user", "content": 7}], "content is a int"),
        ([{"role": "user", "content": "a", "file": Path()}], "not JSON"),
    ],
)
def test_bad_messages_say_what_is_wrong(messages, says):
    with pytest.raises(UserError, match=says):
        render(ALL["chatml"], messages)


def test_bad_tools_and_variables_say_what_is_wrong():
    with pytest.raises(UserError, match="tools"):
        render("", USER, tools=[print])  # pyright: ignore[reportArgumentType]
    with pytest.raises(UserError, match=r"variables\['x'\]"):
        render("", USER, x=object())


BIG = "{% set x = 'a' * 100000 %}"
GROW = "{% set ns = namespace(s='ab') %}{% for i in range(60) %}{% set ns.s = BODY %}{% endfor %}"
HOSTILE = {
    # Ways out of the sandbox
    "class": "{{ ''.__class__.__mro__ }}",
    "subclasses": "{{ [].__class__.__base__.__subclasses__() }}",
    "globals": "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "self": "{{ self.__init__.__globals__ }}",
    "function": "{{ raise_exception.__globals__['__name__'] }}",
    "generator": "{{ (messages | map('upper')).gi_frame }}{{ messages.append(1) }}",
    "change": "{{ messages.append(1) }}",
    "file": "{% include '/etc/passwd' %}",
    "import": "{% import 'os' as os %}",
    "namespace": "{% set ns = namespace(__class__=1) %}",
    "namespace attribute": "{% set ns = namespace() %}{% set ns._x = 1 %}",
    # Endless work
    "range": "{% for i in range(10**9) %}{% endfor %}",
    "long range": "{{ range(999999999) | list }}",
    "loops": "{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "calls": "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}"
    "{{ f(60) }}",
    "recursive loop": "{% for x in [1, 2] recursive %}{% if loop.depth < 60 %}{{ loop([1, 2]) }}"
    "{% endif %}{% endfor %}",
    "nested map": "{{ ([range(9999)] * 9999) | map('list') | list | length }}",
    "numbers": "{% set ns = namespace(n=3) %}{% for i in range(99) %}{% set ns.n = ns.n * ns.n %}"
    "{% endfor %}",
    "power": "{{ 9 ** 9999999 }}",
    "deep": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    # Endless memory
    "output": "{% for i in range(9999) %}{{ 'x' * 9999 }}{% endfor %}",
    "times": "{{ 'a' * 999999999 }}",
    "list times": "{{ [0] * 999999999 }}",
    "doubled": GROW.replace("BODY", "ns.s ~ ns.s"),
    "added": GROW.replace("BODY", "ns.s + ns.s"),
    "nested lists": GROW.replace("BODY", "[ns.s, ns.s]"),
    "nested dicts": GROW.replace("BODY", "dict(a=ns.s, b=ns.s)"),
    "namespaces": "{% set ns = namespace() %}{% set ns.a = ns %}",
    "blocks": "{% set s = 'ab' %}" + "{% set s %}{{ s }}{{ s }}{% endset %}" * 60,
    "width": "{{ 'a'.ljust(999999999) }}",
    "filter width": "{{ 'a' | center(999999999) }}",
    "percent": "{{ '%999999999d' % 1 }}",
    "percent star": "{{ '%*d' % (999999999, 1) }}",
    "format": "{{ '{:>999999999}'.format(1) }}",
    "format of width": "{{ '{:>{}}'.format(1, 999999999) }}",
    "format filter": "{{ '%999999999d' | format(1) }}",
    "time": "{{ strftime_now('%999999999d') }}",
    "replace": BIG + "{{ x.replace('a', x) }}",
    "replace filter": BIG + "{{ x | replace('a', x) }}",
    "join": BIG + "{{ x.join(range(9999) | map('string')) }}",
    "join filter": BIG + "{{ range(9999) | join(x) }}",
    "indent": "{{ ('a\n' * 100000) | indent(9999) }}",
    "tojson": "{{ range(9999) | list | tojson(indent=9999) }}",
    "format of text": "{{ '{:>{}}'.format(1, '999999999') }}",
    "precision": "{{ '%.*f' % (999999999, 1) }}{{ '%.999999999f' % 1 }}",
    "round": "{{ 1.5 | round(999999999, 'floor') }}",
    "batch": "{{ [1] | batch(999999999, 'x') | list }}",
    "bytes": "{{ (1).to_bytes(999999999, 'big') }}",
    "bytes times": "{{ ('a' * 1000).encode() * 999999 }}",
    "translate": "{{ 'a'.translate({97: 'b'}) }}",
    # Mistakes
    "syntax": "{% if %}",
    "unknown filter": "{{ 1 | nothing }}",
    "missing": "{{ messages[0].nothing.more }}",
    "types": "{{ 'a' + 1 }}",
    "raised": "{{ raise_exception('only user and assistant') }}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_and_broken_templates_end_in_one_error(name, monkeypatch):
    monkeypatch.setattr(chat, "SECONDS", 0.3)
    start = time.process_time()
    with pytest.raises(UserError, match=r"^chat template: "):
        render(HOSTILE[name], USER)
    assert time.process_time() - start < 30  # minutes or gigabytes without the bounds


@pytest.mark.parametrize(
    "template",
    [
        "{% macro m() %}{% for i in range(60) %}{{ x }}{% endfor %}{% endmacro %}{% set y = m() %}",
        "{% set y %}{% for i in range(60) %}{{ x }}{% endfor %}{% endset %}",
        "{% set y = ('%(a)s' * 60) % {'a': x} %}",
        "{% set y = ('{0}' * 60).format(x) %}",
        "{% set y = " + " ~ ".join(["x"] * 60) + " %}",
    ],
)
def test_values_are_measured_before_they_are_joined(template):
    tracemalloc.start()
    with pytest.raises(UserError, match="builds a value of more than"):
        render(template, USER, x="a" * 5_000_000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 50_000_000  # 300,000,000 where the join comes first


def test_a_sum_of_lists_looks_at_the_clock(monkeypatch):
    assert render("{{ [[1], [2]] | sum(start=[]) }}", USER) == "[1, 2]"
    clock = SimpleNamespace(monotonic=itertools.count().__next__)  # a second from look to look
    monkeypatch.setattr(chat, "time", clock)
    monkeypatch.setattr(sandbox, "time", clock)
    with pytest.raises(UserError, match="computes for more than"):
        render("{{ ([[1]] * 100) | sum(start=[]) | length }}", USER)


@pytest.mark.parametrize(
    "template, text",
    [
        ("{{ x | default(32768) }}", "32768"),
        ("{{ 'since 20250 %s' % 'x' }}", "since 20250 x"),
        ("{{ '100%% of 12345, 100%%12345 %5.2f' % 1 }}", "100% of 12345, 100%12345  1.00"),
        ("{{ '20250 %s' | format('x') }}", "20250 x"),
        ("{{ 'Port 12345: {:>3}'.format(54321) }}", "Port 12345: 54321"),
        ("""{{ '{{"id": 12345, "of": {}}}'.format(1) }}""", '{"id": 12345, "of": 1}'),
        ("{% for i in range(20000) %}{% endfor %}ok", "ok"),
        ("{{ 'a b' | truncate(20000) }}{{ 'a' | wordwrap(20000) }}", "a ba"),
        ("{{ 1 ~ none ~ [2] ~ nothing ~ 'a' }}", "1None[2]a"),
        ("{{ strftime_now('20250') }}", "20250"),
    ],
)
def test_large_numbers_that_make_nothing_large_are_let_through(template, text):
    assert render(template, USER) == text


@pytest.mark.parametrize("name", ["class", "subclasses", "function", "change"])
def test_an_environment_without_a_sandbox_is_rejected(name):
    """The templates do reach what they are after where nothing stops them."""
    unsafe = jinja2.Environment()
    unsafe.globals["raise_exception"] = lambda message: None
    assert unsafe.from_string(HOSTILE[name]).render(messages=[])


@pytest.mark.parametrize(
    "template",
    [
        "{{ '' | attr('__class__') }}",
        "{{ '{0.__class__}'.format('') }}",
        "{{ raise_exception.__globals__ }}",
    ],
)
def test_an_unsafe_attribute_reads_as_nothing(template):
    assert render(template, USER) == ""


def test_long_chats_are_within_the_bounds():
    messages = [{"role": "user", "content": "word " * 2000}, {"role": "assistant", "content": "x"}]
    text = render(ALL["qwen"], messages * 200, tools=TOOLS * 20)
    assert len(text) > 2_000_000


def test_the_message_of_raise_exception_reaches_the_user():
    with pytest.raises(UserError, match="unknown role judge"):
        render(ALL["chatml"], [{"role": "judge", "content": ""}])
