"""Responses by the official client: a stream's events join to the response."""

import openai
import pytest

from decode.server.protocol import Failure
from decode.server.responses import ResponsesRequest, to_chat
from tests.decode.server.test_app import CALL, Made, serving

TOOL = {"type": "function", "name": "get", "parameters": {"type": "object"}, "strict": False}


@pytest.fixture(scope="module")
def made():
    return Made()


@pytest.fixture(scope="module")
def client(made):
    with (
        serving(made) as (url, _),
        openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0) as one,
    ):
        yield one


def items(response):
    told = []
    for item in response.output:
        if item.type == "function_call":
            told.append(("call", item.name, item.arguments))
        else:
            told.append((item.type, item.content[0].text))
        assert item.status == "completed"
    return told


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain ✓", [("message", "plain ✓")]),
        ("<think>hm</think>yes", [("reasoning", "hm"), ("message", "yes")]),
        (
            "so " + CALL + CALL,
            [("message", "so"), ("call", "get", '{"x": "é"}'), ("call", "get", '{"x": "é"}')],
        ),
        ("", []),
    ],
)
def test_events_join_to_the_response(client, text, expected):
    options = {"model": "m", "input": "say:" + text, "tools": [TOOL]}
    if not text:
        options["input"] = "say:"
    whole = client.responses.create(**options)
    assert items(whole) == expected and whole.status == "completed"
    assert whole.usage.output_tokens == len(text.encode()) and whole.usage.input_tokens > 0
    with client.responses.stream(**options) as stream:
        events = list(stream)
        final = stream.get_final_response()
    assert items(final) == expected and final.usage == whole.usage
    assert [event.sequence_number for event in events if event.type != "keepalive"] == sorted(
        event.sequence_number for event in events
    )
    kinds = [event.type for event in events]
    assert kinds[:2] == ["response.created", "response.in_progress"]
    assert kinds[-1] == "response.completed"
    deltas = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert deltas == "".join(told[1] for told in expected if told[0] == "message")
    assert kinds.count("response.output_item.added") == kinds.count("response.output_item.done")


def test_cut_short_and_a_schema(client, made):
    form = {"type": "json_schema", "name": "x", "schema": {"type": "object"}}
    whole = client.responses.create(
        model="m", input="say:abcdef", max_output_tokens=3, text={"format": form}
    )
    assert whole.status == "incomplete" and whole.output_text == "abc"
    assert whole.incomplete_details.reason == "max_output_tokens"
    assert made.engines[0].seen[-1].params.grammar.kind == "json_schema"


def test_a_conversation_with_calls_is_a_chats():
    body = ResponsesRequest.model_validate(
        {
            "instructions": "be brief",
            "input": [
                {"role": "user", "content": [{"type": "input_text", "text": "hi"}]},
                {"type": "reasoning", "summary": []},
                {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"},
                {"type": "function_call", "call_id": "2", "name": "g", "arguments": "{}"},
                {"type": "function_call_output", "call_id": "1", "output": "7"},
            ],
        }
    )
    messages = to_chat(body).messages
    assert [message["role"] for message in messages] == ["system", "user", "assistant", "tool"]
    assert [call["function"]["name"] for call in messages[2]["tool_calls"]] == ["f", "g"]
    assert messages[1]["content"] == "hi" and messages[3]["tool_call_id"] == "1"


def test_what_is_refused(client):
    with pytest.raises(openai.BadRequestError, match="previous_response_id"):
        client.responses.create(model="m", input="x", previous_response_id="resp_1")
    with pytest.raises(openai.BadRequestError, match="web_search"):
        client.responses.create(model="m", input=[{"type": "web_search"}])
    with pytest.raises(Failure, match="give tools"):
        to_chat(ResponsesRequest(input="x", tool_choice="required"))
    with pytest.raises(openai.InternalServerError, match="scripted failure"):
        client.responses.create(model="m", input="fail")
    with client.responses.stream(model="m", input="fail") as stream:
        assert [event.type for event in stream][-1] == "response.failed"
