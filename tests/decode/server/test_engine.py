"""The API by the official client, over the real engine with a tiny random model."""

import json
from concurrent.futures import ThreadPoolExecutor

import httpx2 as httpx
import openai
import pytest

from decode.config import EngineConfig
from decode.server.transport import InThread
from tests.decode import engines
from tests.decode.server.test_app import TOKENIZER, joined, serving, until

CONFIG = EngineConfig(max_len=1024, page_size=16, max_running=4, max_waiting=6, budget=64)
TOOL = {
    "type": "function",
    "function": {
        "name": "book",
        "parameters": {
            "type": "object",
            "properties": {
                "seats": {"type": "array", "items": {"enum": ["1a", "2b"]}, "maxItems": 2},
                "who": {"type": "object", "properties": {"vip": {"type": "boolean"}},
                        "required": ["vip"], "additionalProperties": False},
            },
            "required": ["seats", "who"],
            "additionalProperties": False,
        },
    },
}  # fmt: skip
HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def server():
    def build():
        from decode.engine import Engine

        return Engine(engines.runner(CONFIG), TOKENIZER, CONFIG)

    with serving(lambda hear: InThread(build, hear)) as (url, link):
        yield url, link


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=server[0] + "/v1", api_key="none", max_retries=0) as one:
        yield one


def test_a_stream_is_the_answer_and_a_seed_repeats_it(client):
    asked = {"model": "m", "messages": HELLO, "max_tokens": 24, "seed": 3, "temperature": 0.9}
    whole = client.chat.completions.create(**asked)
    (choice,) = whole.choices
    content, *_, finish = joined(client.chat.completions.create(**asked, stream=True))
    assert (content, finish) == (choice.message.content or "", choice.finish_reason)
    assert whole.usage.completion_tokens <= 24
    again = client.chat.completions.create(**asked)
    assert again.choices[0].message.content == choice.message.content
    assert again.usage.prompt_tokens_details.cached_tokens >= 16
    other = client.chat.completions.create(**{**asked, "seed": 4})
    assert other.choices[0].message.content != choice.message.content


def test_several_answers_with_their_log_probabilities(client):
    made = client.chat.completions.create(
        model="m", messages=HELLO, max_tokens=6, n=3, seed=1, logprobs=True, top_logprobs=2,
        extra_body={"ignore_eos": True},
    )  # fmt: skip
    assert len(made.choices) == 3 and made.usage.completion_tokens == 18
    for choice in made.choices:
        assert len(choice.logprobs.content) == 6
        assert all(one.logprob <= 0 and one.top_logprobs for one in choice.logprobs.content)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "book"}}])
def test_a_call_that_is_asked_for_is_made_even_by_a_random_model(client, choice):
    for seed in range(5):
        made = client.chat.completions.create(
            model="m", messages=HELLO, tools=[TOOL], tool_choice=choice, seed=seed, max_tokens=200,
            parallel_tool_calls=False,
        )  # fmt: skip
        (call,) = made.choices[0].message.tool_calls
        arguments = json.loads(call.function.arguments)
        assert call.function.name == "book" and isinstance(arguments["who"]["vip"], bool)
        assert set(arguments["seats"]) <= {"1a", "2b"} and len(arguments["seats"]) <= 2
        assert made.choices[0].finish_reason == "tool_calls"


def test_a_call_whose_schema_refers_to_itself(client):
    tree = {"type": "object", "additionalProperties": False, "required": ["leaf"],
            "properties": {"leaf": {"enum": [1, 2]}, "left": {"$ref": "#/$defs/tree"}}}  # fmt: skip
    root = {"root": {"$ref": "#/$defs/tree"}}
    parameters = {"type": "object", "additionalProperties": False, "required": ["root"],
                  "properties": root, "$defs": {"tree": tree}}  # fmt: skip
    grow = {"type": "function", "function": {"name": "grow", "parameters": parameters}}
    for choice in ("required", {"type": "function", "function": {"name": "grow"}}):
        made = client.chat.completions.create(
            model="m", messages=HELLO, tools=[grow], tool_choice=choice, max_tokens=300, seed=1,
            parallel_tool_calls=False,
        )  # fmt: skip
        (call,) = made.choices[0].message.tool_calls
        assert json.loads(call.function.arguments)["root"]["leaf"] in (1, 2)


def test_a_json_answer(client):
    schema = {"type": "object", "properties": {"n": {"type": "integer", "maximum": 99}},
              "required": ["n"], "additionalProperties": False}  # fmt: skip
    made = client.chat.completions.create(
        model="m", messages=HELLO, max_tokens=60, seed=2,
        response_format={"type": "json_schema", "json_schema": {"name": "n", "schema": schema}},
    )  # fmt: skip
    assert isinstance(json.loads(made.choices[0].message.content)["n"], int)
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(
            model="m", messages=HELLO,
            response_format={"type": "json_schema",
                             "json_schema": {"name": "n", "schema": {"type": "no such"}}},
        )  # fmt: skip


def test_many_at_once_are_all_answered_or_told_to_come_later(client, server):
    url, link = server

    def ask(i):
        body = {"prompt": f"{i} " * 20, "max_tokens": 12, "seed": i, "ignore_eos": True}
        return httpx.post(url + "/v1/completions", json=body, timeout=120)

    with ThreadPoolExecutor(24) as pool:
        answers = list(pool.map(ask, range(24)))
    good = [a for a in answers if a.status_code == 200]
    busy = [a for a in answers if a.status_code == 429]
    assert len(good) + len(busy) == 24 and len(good) >= 10
    assert all(int(a.headers["retry-after"]) >= 1 for a in busy)
    assert all(a.json()["usage"]["completion_tokens"] == 12 for a in good)
    first = next(i for i, a in enumerate(answers) if a.status_code == 200)
    assert ask(first).json()["choices"] == answers[first].json()["choices"]
    until(lambda: link.stats.running == 0 and link.stats.waiting == 0)
    assert link.stats.pages_used == 0 and link.stats.compiles == 0
