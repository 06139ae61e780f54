"""The router: policies by themselves, then two servers behind one address."""

import contextlib
import socket
import threading

import httpx2 as httpx
import openai
import pytest

from decode.route import Affinity, LeastLoad, Prefix, RoundRobin, Server, router
from decode.server.transport import InProcess
from tests.decode.server import scripted
from tests.decode.server.test_app import (
    CHAT,
    Made,
    get,
    leave,
    listening,
    post,
    say,
    serving,
    until,
)


def servers(count=3, loads=()):
    made = [Server(f"http://{i}") for i in range(count)]
    for server, load in zip(made, loads, strict=False):
        server.load = load
    return made


def firsts(policy, among, count, text="", session=""):
    return [policy.order(among, text, session)[0].url[-1] for _ in range(count)]


def test_round_robin_and_least_load():
    assert "".join(firsts(RoundRobin(), servers(), 6)) == "012012"
    assert sorted(firsts(LeastLoad(), servers(), 6)) == list("001122")
    assert set(firsts(LeastLoad(), servers(3, (2, 1, 3)), 4)) == {"1"}


def test_a_session_stays_and_only_those_of_a_lost_server_move():
    policy, among = Affinity(), servers(4)
    homes = {str(i): policy.order(among, "", str(i))[0] for i in range(400)}
    counts = [sum(home is server for home in homes.values()) for server in among]
    assert min(counts) > 60, "sessions spread"
    for session, home in homes.items():
        now = policy.order(among[1:], "", session)[0]
        assert now is home or home is among[0]


def test_a_prefix_goes_where_it_is_known_unless_that_one_is_busy():
    policy, among = Prefix(gap=3, chunk=4), servers(3)
    shared = "a long beginning "
    home = policy.order(among, shared + "1", "")[0]
    assert {policy.order(among, shared + str(i), "")[0] for i in range(9)} == {home}
    assert policy.order(among, shared[:8] + "another end", "")[0] is home, "a part counts"
    home.load = 3
    other = policy.order(among, shared + "x", "")[0]
    assert other is not home, "the load overrides"
    home.load = 0
    starts = {policy.order(among, f"{i}" * 40, "")[0].url for i in range(9)}
    assert len(starts) == 3, "what is new spreads"


def test_what_is_known_is_bounded():
    policy, among = Prefix(chunk=1, room=10), servers(1)
    policy.order(among, "abcdefghijklmnopqrstuvwxyz", "")
    assert len(among[0].known) == 10


@contextlib.contextmanager
def two(policy, first=None, second=None):
    """Two servers and a router; yields (its address, the two engines' makers)."""
    made = Made(**(first or {})), Made(**(second or {}))
    with (
        serving(made[0]) as (one, _),
        serving(made[1]) as (other, _),
        listening(router([one, other + "/v1"], policy, every=0.1)) as url,
    ):
        yield url, made


def test_clients_see_one_server():
    with two(RoundRobin()) as (url, made):
        with openai.OpenAI(base_url=url + "/v1", api_key="k", max_retries=0) as client:
            for text in ("a", "b"):
                whole = client.chat.completions.create(model="m", messages=say(text))
                assert whole.choices[0].message.content == text
            stream = client.chat.completions.create(model="m", messages=say("ccccc"), stream=True)
            assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == "ccccc"
            with pytest.raises(openai.BadRequestError, match="temperature"):
                client.chat.completions.create(model="m", messages=say("x"), temperature=-1)
            with pytest.raises(openai.NotFoundError):
                client.chat.completions.create(model="x", messages=say("x"))
            assert client.models.list().data[0].id == "m"
        assert [len(one.engines[0].seen) for one in made] == [2, 1]
        assert get(url + "/health").status_code == 200
        loads = [line for line in get(url + "/metrics").text.splitlines()
                 if line.startswith("jaxinfra_route_load{")]  # fmt: skip
        assert [line.split()[-1] for line in loads] == ["0.0", "0.0"]


def test_a_full_server_passes_it_on_and_two_say_so():
    with two(RoundRobin(), {"room": 0}) as (url, made):
        for _ in range(4):
            assert post(url + CHAT, json={"messages": say("x")}).status_code == 200
        assert len(made[1].engines[0].seen) == 4
    with two(RoundRobin(), {"room": 0}, {"room": 0}) as (url, _):
        answer = post(url + CHAT, json={"messages": say("x")})
        assert answer.status_code == 429 and int(answer.headers["retry-after"]) >= 1


def test_no_server_and_one_that_is_gone():
    with serving(Made()) as (alive, _):
        urls = ["http://127.0.0.1:1", alive]
        with listening(router(urls, RoundRobin(), every=60)) as url:
            for _ in range(3):
                assert post(url + CHAT, json={"messages": say("x")}).status_code == 200
    with listening(router(["http://127.0.0.1:1"], RoundRobin(), every=0.1)) as url:
        answer = post(url + CHAT, json={"messages": say("x")})
        assert answer.status_code == 503 and "retry-after" in answer.headers
        until(lambda: get(url + "/health").status_code == 503)


def test_a_broken_stream_is_told_and_never_sent_again():
    lives = []

    def spawn(hear):
        lives.append(InProcess(scripted.build_slow, hear))
        return lives[-1]

    spare = Made()
    with serving(spawn) as (one, link), serving(spare) as (other, _):
        with listening(router([one, other], Affinity(), every=60)) as url:
            session = next(str(i) for i in range(99) if Affinity().order(
                [Server(one), Server(other)], "", str(i))[0].url == one)  # fmt: skip
            body = {"messages": say("x" * 900), "stream": True, "user": session}
            with httpx.stream("POST", url + CHAT, json=body, timeout=120) as answer:
                lines = answer.iter_lines()
                next(lines)
                lives[0]._process.kill()
                rest = [line for line in lines if line]
            assert "the engine died" in rest[-2] and rest[-1] == "data: [DONE]"
        assert not spare.engines[0].seen
        until(lambda: link.ready)


def test_a_connection_that_breaks_in_a_stream_is_told():
    def half(listener):
        for _ in range(2):  # a health check comes too
            connection, _ = listener.accept()
            with connection:
                if b"/health" in connection.recv(65536):
                    connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")
                    continue
                connection.sendall(
                    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n"
                    b"transfer-encoding: chunked\r\n\r\n9\r\ndata: 1\n\n\r\n"
                )

    spare = Made()
    with socket.create_server(("127.0.0.1", 0)) as listener, serving(spare) as (other, _):
        thread = threading.Thread(target=half, args=(listener,))
        thread.start()
        broken = f"http://127.0.0.1:{listener.getsockname()[1]}"
        with listening(router([broken, other], RoundRobin(), every=60)) as url:
            answer = post(url + CHAT, json={"messages": say("x"), "stream": True})
        thread.join()
    lines = [line for line in answer.text.splitlines() if line]
    assert lines[0] == "data: 1" and "broke off" in lines[1] and lines[2] == "data: [DONE]"
    assert not spare.engines[0].seen


def test_who_leaves_the_router_is_aborted_behind_it():
    slow = {"a_step": 1, "pause": 0.1}
    with two(RoundRobin(), slow, slow) as (url, made):

        def count(what):
            return sum(len(getattr(one.engines[0], what)) for one in made)

        leave(url, True, lambda: count("seen") == 1)
        leave(url, False, lambda: count("seen") == 2)
        until(lambda: count("aborted") == 2)
