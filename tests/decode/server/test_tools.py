"""However an answer is cut, its pieces join to the same reasoning, content and calls."""

import itertools
import json

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from decode.server.tools import Delta, Reader

CALL = '<tool_call>\n{"name": "get", "arguments": {"city": "A {\\"} </tool_call>"}}\n</tool_call>'
ARGUMENTS = '{"city": "A {\\"} </tool_call>"}'


def join(deltas):
    """(reasoning, content, [(name, arguments)]) of deltas, as a client joins them."""
    reasoning, content, calls = "", "", {}
    for delta in deltas:
        if delta.kind == "reasoning":
            reasoning += delta.text
        elif delta.kind == "content":
            content += delta.text
        elif delta.kind == "name":
            assert delta.index == len(calls), "a call's name comes once, and first"
            calls[delta.index] = [delta.text, ""]
        else:
            calls[delta.index][1] += delta.text
    return reasoning, content, [tuple(call) for call in calls.values()]


def read(pieces, **options):
    reader = Reader(**options)
    return join([delta for piece in pieces for delta in reader.push(piece)] + reader.finish())


HERMES = {
    "a call": (CALL, "", [("get", ARGUMENTS)]),
    "content before": ("Let me see.\n" + CALL, "Let me see.", [("get", ARGUMENTS)]),
    "content after": (CALL + "\n\n done", "done", [("get", ARGUMENTS)]),
    "two": (CALL + "\n" + CALL, "", [("get", ARGUMENTS)] * 2),
    "arguments first": (
        '<tool_call>{"arguments": {"x": [1, {}]}, "name": "f"}</tool_call>', "",
        [("f", '{"x": [1, {}]}')],
    ),
    "no arguments": ('<tool_call>{"name": "f"}</tool_call>', "", [("f", "{}")]),
    "arguments as text": (
        '<tool_call>{"name": "f", "arguments": "{\\"x\\": 1}"}</tool_call>', "",
        [("f", '{"x": 1}')],
    ),
    "more keys": (
        '<tool_call>{"name": "f", "arguments": {"x": {}}, "id": {"y": 1}}</tool_call>', "",
        [("f", '{"x": {}}')],
    ),
    "a brace is missing": (
        '<tool_call>{"name": "f", "arguments": {"x": 1}</tool_call>', "", [("f", '{"x": 1}')],
    ),
    "no closing tag": ('<tool_call>{"name": "f", "arguments": {"x": 1}}', "", [("f", '{"x": 1}')]),
    "cut short": ('<tool_call>{"name": "f", "arguments": {"x": "lon', "", [("f", '{"x": "lon')]),
    "no name": ('<tool_call>{"x": 1}</tool_call> y', '<tool_call>{"x": 1}</tool_call> y', []),
    "no JSON": ("a <tool_call>hm</tool_call>", "a <tool_call>hm</tool_call>", []),
    "a tag alone": ("1 <tool_cal", "1 <tool_cal", []),
    "no call": ("  if a < b: <tool>\n ", "  if a < b: <tool>\n ", []),
}  # fmt: skip
LLAMA = {
    "a call": ('{"name": "f", "parameters": {"x": 1}}', "", [("f", '{"x": 1}')]),
    "two": (
        '<|python_tag|>{"name": "f", "parameters": {"x": 1}} ; {"name": "f", "parameters": {}}', "",
        [("f", '{"x": 1}'), ("f", "{}")],
    ),
    "an unknown name": ('{"name": "g", "parameters": {}} ', '{"name": "g", "parameters": {}} ', []),
    "a JSON answer": (' {"name": "Bob", "age": [3]}', ' {"name": "Bob", "age": [3]}', []),
    "parameters first": ('{"parameters": {"x": 1}, "name": "f"}', "", [("f", '{"x": 1}')]),
    "text": ("  Hi {}", "  Hi {}", []),
    "text after": ('{"name": "f", "parameters": {}}\n ok', "ok", [("f", "{}")]),
    "cut short": ('{"name": "f", "para', '{"name": "f", "para', []),
}  # fmt: skip


@pytest.mark.parametrize("case", sorted(HERMES))
def test_hermes(case):
    text, content, calls = HERMES[case]
    for pieces in ([text], text):
        assert read(pieces, format="hermes") == ("", content, calls)


@pytest.mark.parametrize("case", sorted(LLAMA))
def test_llama(case):
    text, content, calls = LLAMA[case]
    for pieces in ([text], text):
        assert read(pieces, format="llama", names=("f",)) == ("", content, calls)


def test_thinking():
    text = "\n<think>\n a\n\nb \n</think>\n\n hi " + CALL
    for pieces in ([text], text):
        assert read(pieces, format="hermes", thinking="may") == (
            "a\n\nb", "hi", [("get", ARGUMENTS)]
        )  # fmt: skip
        assert read(pieces)[1] == text
    assert read(["x</think>y"], thinking="open") == ("x", "y", [])
    assert read(["x</thin"], thinking="open") == ("x</thin", "", [])
    assert read([" <think"], thinking="may") == ("", " <think", [])
    assert read([" hi"], thinking="may") == ("", " hi", [])
    assert read(["<think> </think> hi"], thinking="may") == ("", "hi", [])


def test_arguments_stream_as_they_are_written():
    reader = Reader("hermes")
    assert reader.push('<tool_call>{"name": "f", "arg') == []
    assert reader.push('uments": {"x') == [Delta("name", "f"), Delta("arguments", '{"x')]
    assert reader.push('": 1}}') == [Delta("arguments", '": 1}')]


PARTS = st.sampled_from(
    ["<think>", "</think>", "<tool_call>", "</tool_call>", '{"name": "f"', ', "arguments": ', "{",
     '{"name": "f", "parameters": {"x": "', "}", '"', "\\", ";", " ", "\n", "a", "é", "<", "[",
     "<|python_tag|>", CALL]
)  # fmt: skip


@settings(max_examples=400, deadline=None)
@given(
    text=st.lists(PARTS, max_size=12).map("".join),
    cuts=st.lists(st.integers(0, 200), max_size=12),
    style=st.sampled_from(["hermes", "llama", None]),
    thinking=st.sampled_from(["open", "may", None]),
)
@example(text="<think>a</think> " + CALL, cuts=[3], style="hermes", thinking="may")
def test_no_cut_matters(text, cuts, style, thinking):
    options = {"format": style, "names": ("f",), "thinking": thinking}
    bounds = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    pieces = [text[a:b] for a, b in itertools.pairwise(bounds)]
    whole = read([text], **options)
    assert read(pieces, **options) == whole
    assert read(text, **options) == whole
    if style is None and thinking is None:
        assert whole == ("", text, [])


def test_a_reader_that_forgets_is_caught():
    """The check can fail: a reader that looks at each piece alone gives another answer."""

    def forgetful(pieces):
        readers = [Reader("hermes") for _ in pieces]
        fed = zip(readers, pieces, strict=True)
        return join([delta for reader, piece in fed for delta in reader.push(piece)])

    assert forgetful([CALL]) == read([CALL], format="hermes")
    assert forgetful([CALL[:8], CALL[8:]]) != read([CALL], format="hermes")


def test_arguments_that_are_json_stay_so():
    value = {"a": [1, {"b": '}{\\"<tool_call>'}], "c": None}
    text = "<tool_call>" + json.dumps({"name": "f", "arguments": value}) + "</tool_call>"
    ((_, arguments),) = read(text, format="hermes")[2]
    assert json.loads(arguments) == value
