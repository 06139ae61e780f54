"""A server as a process: it drains on SIGTERM, and ends when its engine cannot start."""

import re
import signal
import subprocess
import sys

import httpx2 as httpx
import pytest

_COMMAND = [sys.executable, "-m", "tests.decode.server.run_scripted"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_drains(number):
    with subprocess.Popen(_COMMAND, stdout=subprocess.PIPE, text=True) as process:
        try:
            line = process.stdout.readline()
            url = re.search(r"http://[0-9.:]+", line)[0]
            body = {"prompt": "say:" + "x" * 50, "max_tokens": 50, "stream": True}
            with httpx.stream("POST", url + "/v1/completions", json=body, timeout=120) as answer:
                lines = answer.iter_lines()
                first = next(lines)
                process.send_signal(number)
                rest = [line for line in lines if line]
            assert rest[-1] == "data: [DONE]" and '"finish_reason":"stop"' in rest[-2]
            assert "".join(re.findall(r'"text":"(x*)"', "".join([first, *rest]))) == "x" * 50
            with pytest.raises(httpx.TransportError):
                httpx.get(url + "/health", timeout=5)
            process.wait(600)
        finally:
            process.kill()
    assert process.returncode in (0, -number)


def test_an_engine_that_cannot_start_ends_the_server():
    done = subprocess.run([*_COMMAND, "broken"], capture_output=True, text=True, timeout=600)
    assert done.returncode == 1
    assert "the engine is gone: UserError: no such model" in done.stderr
