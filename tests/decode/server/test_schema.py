"""Requests that the server's own OpenAPI document allows, made up by schemathesis."""

import re
import subprocess

import pytest

from agent.evaluate.environment import environment
from tests.decode.server.test_app import get, until
from tests.decode.server.test_engine import server

__all__ = ["server"]  # a fixture
pytestmark = [pytest.mark.network, pytest.mark.timeout(2400)]


def test_no_request_of_the_schema_is_answered_by_a_server_error(server, tmp_path):
    url, link = server
    python = environment("schemathesis", ("schemathesis==4.32.5",))
    asked = [
        python.with_name("schemathesis"), "run", f"{url}/openapi.json", "--max-examples=25",
        "--checks=not_a_server_error", "--request-timeout=300", "--seed=1", "--no-color",
    ]  # fmt: skip
    done = subprocess.run(asked, capture_output=True, text=True, timeout=2000, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-3000:]
    generated = re.search(r"(\d+) generated", done.stdout)
    assert generated and int(generated[1]) > 200, done.stdout[-1000:]
    until(lambda: not (link.stats.running or link.stats.waiting))
    assert get(url + "/health").status_code == 200 and link.stats.pages_used == 0
