"""A batch: what comes out is in order, once, whole, and survives being stopped."""

import asyncio
import json

import pytest

from decode.batch import read, run
from jaxinfra.errors import UserError
from tests.decode.server.test_app import Made, say, serving, until


def line(id, text, **body):
    chat = {"custom_id": id, "method": "POST", "url": "/v1/chat/completions"}
    return json.dumps({**chat, "body": {"messages": say(text), **body}})


def write(path, *lines):
    path.write_text("".join(one + "\n" for one in lines))
    return path


def contents(out):
    rows = [json.loads(one) for one in out.read_text().splitlines()]
    return {
        row["custom_id"]: row["response"]["body"]["choices"][0]["message"]["content"]
        if row["response"]["status_code"] == 200 else row["response"]["status_code"] for row in rows
    }  # fmt: skip


def test_order_and_failures(tmp_path):
    lines = [line(f"r{i}", "x" * (20 - i)) for i in range(10)] + [line("bad", "x", n=0)]
    source, out = write(tmp_path / "in.jsonl", *lines), tmp_path / "out.jsonl"
    with serving(Made(room=3)) as (url, _):  # fewer than are under way: some are refused at first
        done = asyncio.run(
            run(source, out, url=url + "/v1", concurrency=8, pause=0.01, retries=400)
        )
    assert done == {"resumed": 0, "answered": 10, "failed": 1}
    assert list(contents(out)) == [f"r{i}" for i in range(10)] + ["bad"]
    assert contents(out) == {f"r{i}": "x" * (20 - i) for i in range(10)} | {"bad": 400}
    assert not list(tmp_path.glob("*.partial"))


def test_it_resumes(tmp_path):
    lines = [line(f"r{i}", f"{i}") for i in range(6)]
    source, out = write(tmp_path / "in.jsonl", *lines), tmp_path / "out.jsonl"
    partial = tmp_path / "out.jsonl.partial"
    made = Made()

    async def stopped(url):
        task = asyncio.create_task(run(source, out, url=url, concurrency=1))
        while not partial.exists() or len(partial.read_text().splitlines()) < 4:
            await asyncio.sleep(0.002)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    with serving(made) as (url, link):
        asyncio.run(stopped(url))
        until(lambda: not link._waiting)
        assert not out.exists()
        kept = len(partial.read_text().splitlines()) - 1
        with partial.open("a") as file:
            file.write('{"custom_id": "r5", "resp')  # as a machine that lost its power leaves it
        done = asyncio.run(run(source, out, url=url))
        assert done == {"resumed": kept, "answered": 6, "failed": 0} and kept >= 3
        # Only what was under way when it stopped may have been asked twice.
        assert len(made.engines[0].seen) <= 6 + 1
    assert contents(out) == {f"r{i}": f"{i}" for i in range(6)}


def test_no_server(tmp_path):
    source, out = write(tmp_path / "in.jsonl", line("a", "x")), tmp_path / "out.jsonl"
    for _ in range(3):  # stopped before any answer
        with pytest.raises(TimeoutError):
            asyncio.run(asyncio.wait_for(run(source, out, url="http://127.0.0.1:1"), 0.1))
    done = asyncio.run(run(source, out, url="http://127.0.0.1:1", retries=1, pause=0.01))
    assert done["failed"] == 1 and json.loads(out.read_text())["error"]["code"] == "no_answer"


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        (["{"], "in.jsonl:1: not a batch"),
        ([line("a", "x"), line("a", "y")], "in.jsonl:2: custom_id 'a' is there twice"),
        ([line("a", "x", stream=True)], "in.jsonl:1: a batch cannot stream"),
        ([line("a", "x").replace("/v1/chat", "/v2/chat")], "in.jsonl:1: only POST"),
        ([], "no request"),
    ],
)
def test_a_bad_file_is_told_before_anything_is_asked(tmp_path, lines, told):
    with pytest.raises(UserError, match=told):
        read(write(tmp_path / "in.jsonl", *lines))


def test_another_sources_answers_are_not_taken(tmp_path):
    source, out = write(tmp_path / "in.jsonl", line("a", "x")), tmp_path / "out.jsonl"
    write(tmp_path / "out.jsonl.partial", '{"source": "0"}')
    with pytest.raises(UserError, match="from another source"):
        asyncio.run(run(source, out, url="http://127.0.0.1:1"))
