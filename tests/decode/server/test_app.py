"""The API over HTTP, by the official client and by hand, against an engine that is scripted."""

import asyncio
import contextlib
import functools
import json
import socket
import threading
import time

import httpx2 as httpx
import openai
import pytest
import uvicorn

from decode.server.app import Settings, app
from decode.server.link import Link
from decode.server.transport import InProcess, InThread
from jaxinfra.text import Tokenizer
from tests.decode.server import scripted
from tests.decode.server.scripted import ScriptedEngine, script

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}{# </think> #}"
)
_TOKENIZER = Tokenizer.byte_level()
TOKENIZER = Tokenizer(_TOKENIZER.backend, _TOKENIZER.special, _TOKENIZER.eos_ids, TEMPLATE)
# httpx's own five seconds are too few where the machine is busy.
get, post = (functools.partial(f, timeout=120) for f in (httpx.get, httpx.post))
TOOL = {"type": "function", "function": {"name": "get", "parameters": {"type": "object"}}}
CALL = '<tool_call>\n{"name": "get", "arguments": {"x": "é"}}\n</tool_call>'


@contextlib.contextmanager
def listening(made):
    """An application on a free port; yields its address.

    uvicorn's own logging setup would close this process's handlers, and with absl's its stderr.
    """
    server = uvicorn.Server(uvicorn.Config(made, log_level="error", log_config=None, lifespan="on"))
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


@contextlib.contextmanager
def serving(spawn, **settings):
    """A server; yields (its address, its Link)."""
    link = Link(spawn)
    with listening(app(link, TOKENIZER, Settings("m", **settings))) as url:
        until(lambda: link.ready)
        yield url, link


def until(condition, seconds=600.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.01)


class Made:
    """A thread's engine, at hand for looking at."""

    def __init__(self, **options):
        self.options, self.engines = options, []

    def __call__(self, hear):
        def build():
            self.engines.append(ScriptedEngine(script, **self.options))
            return self.engines[-1]

        return InThread(build, hear)


@pytest.fixture(scope="module")
def made():
    return Made()


@pytest.fixture(scope="module")
def url(made):
    with serving(made, body_bytes=100_000) as (address, _):
        yield address


@pytest.fixture(scope="module")
def client(url):
    with openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0) as one:
        yield one


def say(text):
    return [{"role": "user", "content": "say:" + text}]


def joined(stream):
    """(content, reasoning, calls, finish) of a stream's chunks."""
    content, reasoning, calls, finish = "", "", [], None
    for chunk in stream:
        for choice in chunk.choices:
            delta = choice.delta
            content += delta.content or ""
            reasoning += getattr(delta, "reasoning_content", None) or ""
            for part in delta.tool_calls or ():
                if part.id:
                    calls.append([part.function.name, ""])
                calls[part.index][1] += part.function.arguments or ""
            finish = choice.finish_reason or finish
    return content, reasoning, [tuple(call) for call in calls], finish


@pytest.mark.parametrize(
    ("text", "tools", "expected"),
    [
        ("plain ✓ text", None, ("plain ✓ text", "", [], "stop")),
        ("<think>hm</think>\n\nyes", None, ("yes", "hm", [], "stop")),
        ("so: " + CALL, [TOOL], ("so:", "", [("get", '{"x": "é"}')], "tool_calls")),
        (CALL, None, (CALL, "", [], "stop")),
    ],
)
def test_a_stream_is_the_answer(client, text, tools, expected):
    options = {"model": "m", "messages": say(text), **({"tools": tools} if tools else {})}
    assert joined(client.chat.completions.create(**options, stream=True)) == expected
    choice = client.chat.completions.create(**options).choices[0]
    message = choice.message
    calls = [(c.function.name, c.function.arguments) for c in message.tool_calls or ()]
    reasoning = getattr(message, "reasoning_content", None) or ""
    assert (message.content or "", reasoning, calls, choice.finish_reason) == expected


def test_usage_choices_and_logprobs(client):
    options = {"model": "m", "messages": say("abc"), "n": 2, "logprobs": True, "top_logprobs": 2}
    whole = client.chat.completions.create(**options)
    assert [choice.index for choice in whole.choices] == [0, 1]
    assert whole.usage.completion_tokens == 6
    assert whole.usage.prompt_tokens_details.cached_tokens == 2
    shown = whole.choices[1].logprobs.content
    assert [one.token for one in shown] == ["a", "b", "c"]
    assert [one.bytes for one in shown] == [[97], [98], [99]]
    assert all(len(one.top_logprobs) == 2 and one.logprob == -0.5 for one in shown)
    chunks = list(
        client.chat.completions.create(**options, stream=True,
                                       stream_options={"include_usage": True})
    )  # fmt: skip
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage
    assert chunks[0].choices[0].delta.role == "assistant"
    for index in (0, 1):
        tokens = [
            one.token for chunk in chunks for choice in chunk.choices
            if choice.index == index and choice.logprobs for one in choice.logprobs.content
        ]  # fmt: skip
        assert tokens == ["a", "b", "c"]


def test_part_of_a_character_has_its_own_bytes(client):
    whole = client.chat.completions.create(
        model="m", messages=say("é"), logprobs=True, max_tokens=2
    )
    assert [one.bytes for one in whole.choices[0].logprobs.content] == [[0xC3], [0xA9]]


def test_completions(client):
    whole = client.completions.create(
        model="m", prompt=["say:ab", "say:cdef"], max_tokens=3, logprobs=1, n=2, echo=True
    )
    assert [choice.text for choice in whole.choices] == ["say:abab", "say:abab"] + [
        "say:cdefcde"
    ] * 2
    assert [choice.finish_reason for choice in whole.choices] == ["stop"] * 2 + ["length"] * 2
    assert whole.choices[2].logprobs.text_offset == [0, 1, 2]
    stream = client.completions.create(model="m", prompt=list(b"say:hi"), stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == "hi"


def test_what_the_engine_is_asked(client, made):
    client.chat.completions.create(
        model="m", messages=say("x"), max_completion_tokens=7, temperature=0, top_p=0.5, seed=3,
        stop=["a", "b"], logit_bias={"65": 5}, extra_body={
            "top_k": 4, "min_p": 0.1, "priority": -2, "cache_salt": "s", "timeout": 9,
            "bad_words": ["no"], "stop_token_ids": [1], "allowed_token_ids": [2, 3],
        },
    )  # fmt: skip
    request = made.engines[0].seen[-1]
    params = request.params
    assert (request.priority, request.cache_salt, request.deadline) == (-2, "s", 9)
    assert (params.max_tokens, params.temperature, params.top_p, params.seed) == (7, 0, 0.5, 3)
    assert (params.stop, params.logit_bias, params.top_k) == (("a", "b"), {65: 5}, 4)
    assert tuple(map(tuple, params.bad_words)) == (tuple(b"no"), tuple(b" no"))
    assert (params.stop_token_ids, tuple(params.allowed_tokens)) == ((1,), (2, 3))
    assert _TOKENIZER.decode(request.prompt).endswith("<|im_start|>assistant\n")


@pytest.mark.parametrize(
    ("extra", "kind", "part"),
    [
        ({"response_format": {"type": "json_object"}}, "json_schema", '"object"'),
        ({"structured_outputs": {"regex": "a+"}}, "regex", "a+"),
        ({"structured_outputs": {"choice": ["a", "b"]}}, "choice", '["a", "b"]'),
        ({"tools": [TOOL], "tool_choice": "required"}, "lark", "call+"),
        (
            {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "get"}}},
            "lark", "start: call\n",
        ),
    ],
)  # fmt: skip
def test_grammars_compile_and_reach_the_engine(url, made, extra, kind, part):
    from decode.grammar import Compiler

    body = {"messages": say("x"), **extra}
    assert post(url + "/v1/chat/completions", json=body).status_code == 200
    grammar = made.engines[0].seen[-1].params.grammar
    assert grammar.kind == kind and part in grammar.text
    matcher = Compiler(TOKENIZER, TOKENIZER.vocab_size).compile(grammar)
    if kind == "lark":
        text = '<tool_call>\n{"name": "get", "arguments": {"x": 1}}\n</tool_call>'
        assert all(matcher.accept(byte) for byte in text.encode())


CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


@pytest.mark.parametrize(
    ("path", "body", "status", "told"),
    [
        (CHAT, {"messages": []}, 400, "messages"),
        (CHAT, {"messages": [{"content": "x"}]}, 400, "role"),
        (CHAT, {"messages": say("x"), "model": "gpt"}, 404, "no model 'gpt'"),
        (CHAT, {"messages": say("x"), "model": "\ud800"}, 404, "no model"),
        (CHAT, {"messages": say("\ud800")}, 400, "surrogate"),
        (CHAT, {"messages": say("x"), "\ud800": 1}, 400, "unicode string"),
        (CHAT, {"messages": say("x"), "colour": 1}, 400, "colour: this server has no such field"),
        (CHAT, {"messages": say("x"), "max_tokens": -1}, 400, "max_tokens"),
        (CHAT, {"messages": say("x"), "max_tokens": 5000}, 400, "context of 4096"),
        (CHAT, {"messages": say("x"), "temperature": "hot"}, 400, "temperature"),
        (CHAT, {"messages": say("x"), "stop": ["s"] * 10_000}, 400, "stop"),
        (CHAT, {"messages": say("x"), "logit_bias": {"-1": 1}}, 400, "logit_bias"),
        (CHAT, {"messages": say("x"), "logit_bias": {"9999": 1}}, 400, "vocabulary"),
        (CHAT, {"messages": say("x"), "tool_choice": "required"}, 400, "give tools"),
        (CHAT, {"messages": say("x"), "top_logprobs": 2}, 400, "logprobs=true"),
        (CHAT, {"messages": say("x"), "structured_outputs": {"regex": "(bad"}}, 400, "unclosed"),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "text"),
        (CHAT, {"messages": say("x" * 5000)}, 400, "context of 4096"),
        (CHAT, {"messages": say("fail")}, 500, "scripted failure"),
        (CHAT, {"messages": say("x" * 100_000)}, 413, "larger than 100000"),
        (TEXT, {"prompt": ""}, 200, None),  # a byte-level prompt begins with bos
        (TEXT, {"prompt": []}, 400, "prompt"),
        (TEXT, {"prompt": [99999]}, 400, "vocabulary"),
        (TEXT, {"prompt": "x", "stream_options": {}}, 400, "stream=true"),
        ("/tokenize", {}, 400, "prompt or messages"),
        ("/detokenize", {"tokens": [-1]}, 400, "tokens"),
        ("/detokenize", {"tokens": [99999]}, 400, "vocabulary"),
        ("/nowhere", {}, 404, "Not Found"),
    ],
)  # fmt: skip
def test_bad_input(url, path, body, status, told):
    answer = post(url + path, content=json.dumps(body),
                        headers={"content-type": "application/json"})  # fmt: skip
    assert answer.status_code == status, answer.text
    if told is not None:
        error = answer.json()["error"]
        assert told in error["message"] and error.keys() == {"message", "type", "param", "code"}


@pytest.mark.parametrize("raw", [b"", b"{", b"\xff", b"[1]", b'"x"', b"[" * 50_000, b'{"a":NaN}'])
def test_bodies_that_are_no_request(url, raw):
    answer = post(url + CHAT, content=raw, headers={"content-type": "application/json"})
    assert answer.status_code == 400 and "message" in answer.json()["error"]


def test_the_small_routes(url, client):
    assert [model.id for model in client.models.list()] == ["m"]
    ids = post(url + "/tokenize", json={"prompt": "hé", "return_token_strs": True}).json()
    assert ids["tokens"] == [256, *"hé".encode()] and ids["count"] == 4
    text = post(url + "/detokenize", json={"tokens": ids["tokens"][1:]}).json()
    assert text == {"prompt": "hé"}
    assert post(url + "/tokenize", json={"messages": say("x")}).json()["count"] > 10
    assert get(url + "/health").status_code == 200
    assert get(url + "/version").json() == {"version": "0"}
    assert "<title>jaxinfra" in get(url).text
    assert get(url + "/load").json()["stats"]["pages_free"] == 5
    assert "/v1/chat/completions" in get(url + "/openapi.json").json()["paths"]


def test_metrics_count(url, client):
    def value(name):
        lines = get(url + "/metrics").text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(name))

    names = ("vllm:request_success_total", "vllm:generation_tokens_total",
             "vllm:time_to_first_token_seconds_count")  # fmt: skip
    before = [value(name) for name in names]
    client.chat.completions.create(model="m", messages=say("abcd"))
    assert [value(name) for name in names] == [before[0] + 1, before[1] + 4, before[2] + 1]
    assert value("vllm:kv_cache_usage_perc") == 1 / 8
    assert value("vllm:prefix_cache_hits_total") == 3


def test_keys():
    made = Made()
    with serving(made, keys={"ann": "k1", "bob": "k2"}) as (url, _):
        for headers in ({}, {"authorization": "Bearer k3"}, {"authorization": "Bearer \xe9"}):
            raw = {name: value.encode("latin-1") for name, value in headers.items()}
            answer = post(url + CHAT, json={"messages": say("x")}, headers=raw)
            assert answer.status_code == 401
            assert answer.json()["error"]["code"] == "invalid_api_key"
        assert not made.engines[0].seen and get(url + "/health").status_code == 200
        with openai.OpenAI(base_url=url + "/v1", api_key="k2") as client:
            client.chat.completions.create(model="m", messages=say("x"), prompt_cache_key="run")
        (seen,) = made.engines[0].seen
        assert (seen.tenant, seen.program) == ("bob", "run")


def test_a_full_queue_says_when_to_come_back():
    made = Made(room=0)
    with serving(made) as (url, _):
        for stream in (False, True):
            answer = post(url + CHAT, json={"messages": say("x"), "stream": stream})
            assert answer.status_code == 429 and int(answer.headers["retry-after"]) >= 1
            assert answer.json()["error"]["type"] == "rate_limit_error"


def leave(url, stream, when):
    """Asks for a long answer and goes away once `when` says so: of a stream, after its beginning,
    else before there is any answer."""

    async def main():
        body = {"messages": say("x" * 2000), "stream": stream}
        begun = asyncio.Event()

        async def ask():
            async with (
                httpx.AsyncClient(timeout=None) as client,
                client.stream("POST", url + CHAT, json=body) as answer,
            ):
                await anext(answer.aiter_raw())
                begun.set()
                await asyncio.sleep(200)

        asking = asyncio.create_task(ask())
        await asyncio.wait_for(begun.wait(), 120) if stream else None
        await asyncio.to_thread(until, when)
        assert begun.is_set() == stream
        asking.cancel()
        await asyncio.wait([asking])

    asyncio.run(main())


@pytest.mark.parametrize("stream", [False, True])
def test_who_leaves_is_aborted(stream):
    made = Made(a_step=1, pause=0.1)  # an answer of 200 s
    with serving(made) as (url, link):
        leave(url, stream, lambda: made.engines[0].seen)
        until(lambda: made.engines[0].aborted)
        until(lambda: not link._waiting)


def test_the_engine_dies_and_another_answers():
    made = Made(a_step=1, pause=0.01)
    with serving(made) as (url, link):
        answers = []

        def ask(text, stream):
            body = {"messages": say(text), "stream": stream}
            answers.append(post(url + CHAT, json=body))

        threads = [threading.Thread(target=ask, args=("y" * 2000, stream)) for stream in (0, 1)]
        for thread in threads:
            thread.start()
        until(lambda: len(made.engines[0].seen) == 2)
        ask("die", False)
        for thread in threads:
            thread.join()
        assert sorted(answer.status_code for answer in answers) == [200, 500, 500]
        for answer in answers:
            assert "the engine died" in answer.text
        until(lambda: link.ready)
        ask("again", False)
        assert answers[-1].json()["choices"][0]["message"]["content"] == "again"
        assert link.restarts == 1 and len(made.engines) == 2


def test_a_process_is_killed_and_another_answers():
    def spawn(hear):
        made = InProcess(scripted.build_slow, hear)
        lives.append(made)
        return made

    lives = []
    with serving(spawn) as (url, link):
        body = {"messages": say("z" * 2000), "stream": True}
        with httpx.stream("POST", url + CHAT, json=body, timeout=120) as answer:
            lines = answer.iter_lines()
            assert next(lines).startswith("data: ")
            lives[0]._process.kill()
            assert any("the engine died" in line for line in lines)
        assert get(url + "/health").status_code == 503 or link.ready
        until(lambda: link.ready)
        whole = post(url + CHAT, json={"messages": say("ok")}).json()
        assert whole["choices"][0]["message"]["content"] == "ok" and link.restarts == 1
    assert not any(life._process.is_alive() for life in lives)
