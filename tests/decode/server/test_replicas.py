"""Servers over Ray: one that is killed is not missed, and comes back."""

import functools
import json
import os
import signal

import httpx2 as httpx
import pytest

from tests.decode.server.test_app import listening, until

ray = pytest.importorskip("ray")
from decode import replicas  # noqa: E402
from decode.route import RoundRobin, router  # noqa: E402
from jaxinfra.errors import UserError  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]


def serve(host, port):
    """A server with a scripted engine."""
    from decode.server.app import Settings
    from decode.server.run import run
    from decode.server.transport import InProcess
    from tests.decode.server.scripted import TOKENIZER, build

    run(functools.partial(InProcess, build), TOKENIZER, Settings("m"), host=host, port=port)


def healthy(url):
    try:
        return httpx.get(url + "/health", timeout=60).status_code == 200
    except httpx.TransportError:
        return False


def gone(process):
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    return False


def test_a_server_that_is_killed_is_not_missed_and_comes_back():
    ray.init(
        num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=100 * 2**20
    )
    try:
        actors = replicas.start(serve, 2)
        urls = ray.get([actor.url.remote() for actor in actors])
        assert all(url.startswith("http://127.0.0.1:") for url in urls)  # no other can reach it
        until(lambda: all(map(healthy, urls)))
        first = ray.get(actors[0].process.remote())
        with listening(router(urls, RoundRobin(), every=0.5)) as url:
            body = {"prompt": "say:abc", "max_tokens": 9}
            for turn in range(8):
                if turn == 2:
                    os.kill(first, signal.SIGKILL)
                answer = httpx.post(url + "/v1/completions", json=body, timeout=250)
                assert answer.status_code == 200, answer.text
                assert answer.json()["choices"][0]["text"] == "abc"
            until(lambda: healthy(urls[0]))
        again = ray.get(actors[0].process.remote())
        assert again != first
        for actor in actors:
            ray.kill(actor)
        until(lambda: gone(again))  # a server does not outlive its actor
    finally:
        ray.shutdown()


def test_when_all_are_given_up_it_ends_and_tells_why():
    ray.init(
        num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=100 * 2**20
    )
    try:
        with pytest.raises(UserError, match=r"every replica is gone.*TypeError"):
            replicas.run(json.loads, 1, host="127.0.0.1", port=0, gpus=None, each=1)
    finally:
        ray.shutdown()
