"""The commands import no jax, say what is wrong in one line, and do their work."""

import json
import subprocess
import sys

import pytest

from decode import commands
from jaxinfra.errors import UserError
from tests.decode.server.test_app import Made, serving
from tests.decode.server.test_batch import line


def test_importing_them_imports_no_jax():
    modules = "sys, decode.commands, decode.server.run, decode.route, decode.batch"
    code = f"import {modules}; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_they_run(tmp_path, capsys):
    (tmp_path / "in.jsonl").write_text(line("a", "x"))
    with serving(Made()) as (url, _):
        commands.batch(tmp_path / "in.jsonl", tmp_path / "out.jsonl", url=url)
        figures = tmp_path / "figures.json"
        commands.bench_serve(url=url + "/v1", requests=4, answer=5, concurrency=2, out=figures)
    assert json.loads(figures.read_text())["answered"] == 4
    printed = capsys.readouterr().out
    assert "1 answered" in printed and "4 of 4 answered" in printed and "TTFT" in printed


@pytest.mark.parametrize("options", [{"requests": 0}, {"rate": 0}, {"rate": 1, "concurrency": 1}])
def test_a_wrong_option_is_told(options):
    with pytest.raises(UserError, match="bench-serve"):
        commands.bench_serve(**options)


@pytest.mark.parametrize("urls", [(), ("localhost:8000",), ("http://a", "http://a")])
def test_a_wrong_address_is_told(urls):
    with pytest.raises(UserError, match="route"):
        commands.route(urls)
