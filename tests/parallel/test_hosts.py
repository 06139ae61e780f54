"""Two hosts as two processes over gloo: the losses of one, and a host killed in mid-step."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from jaxinfra.errors import UserError
from parallel import hosts
from tests.parallel import tiny

STEPS = 16
TIMEOUT = 400  # seconds, on a machine that is busy with other tests; alone it takes a few
patient = pytest.mark.timeout(4 * TIMEOUT)


def command(folder, mesh, emulate, *more):
    shape, text = folder / "config.json", folder / "text.txt"
    if not shape.exists():
        shape.write_text(json.dumps(tiny.LLAMA.replace(vocab_size=320, bos_id=None).to_hf()))
        text.write_text("the quick brown fox jumps over the lazy dog. " * 40)
    told = (
        f"--data {text} --model {shape} --batch-size 8 --seq-len 16 "
        f"--sample-every 0 --eval-every 0 --checkpoint-every 4 --dtype float32 --emulate {emulate} "
        f"--mesh {mesh} --optimizer.warmup-steps 1"
    )
    code = "import tyro; from parallel import commands; tyro.cli(commands.train)"
    steps = () if "--steps" in more else ("--steps", str(STEPS))
    return [sys.executable, "-c", code, *told.split(), *steps, *more]


def environment(folder, host):
    return os.environ | {
        "XDG_CACHE_HOME": str(folder / f"cache-{host}"),
        "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }


def start(folder, out, host, port, *more):
    joined = ("--coordinator", f"127.0.0.1:{port}", "--hosts", "2", "--host", str(host))
    return subprocess.Popen(
        command(folder, "dp=2,tp=2", 2, "--out", str(out), *joined, *more),
        env=environment(folder, host), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as held:
        return held.getsockname()[1]


def ended(processes):
    try:
        told = [p.communicate(timeout=TIMEOUT)[0] for p in processes]
    finally:
        for p in processes:
            p.kill()
            p.communicate()
    assert [p.returncode for p in processes] == [0, 0], told
    return told


def losses(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows}


def one_process(folder, out, *more):
    done = subprocess.run(
        command(folder, "fsdp=2", 2, "--out", str(out), *more), env=environment(folder, 0),
        capture_output=True, text=True, timeout=TIMEOUT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(a folder, the losses there of a run that nothing stopped)."""
    folder, port = tmp_path_factory.mktemp("hosts"), free_port()
    ended([start(folder, folder / "whole", host, port) for host in (0, 1)])
    found = losses(folder / "whole")
    assert losses(folder / "whole" / "host-1") == found and len(found) == STEPS
    return folder, found


def has_a_checkpoint(out, process):
    deadline = time.monotonic() + TIMEOUT
    while not any(path.name.isdigit() for path in (out / "checkpoints").glob("*")):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)


@patient
@pytest.mark.slow
def test_a_killed_host_is_survived_to_the_bit(whole):
    folder, wanted = whole
    port, out = free_port(), folder / "killed"
    both = [start(folder, out, host, port) for host in (0, 1)]
    try:
        has_a_checkpoint(out, both[0])
        both[1].send_signal(signal.SIGKILL)
        assert both[1].wait(TIMEOUT) == -signal.SIGKILL
    finally:
        for process in both:
            process.kill()
            process.communicate()
    assert len(losses(out)) < STEPS

    port = free_port()
    ended([start(folder, out, host, port, "--resume") for host in (0, 1)])
    assert losses(out) == wanted  # all steps, to the bit
    one_process(folder, out, "--resume", "--steps", str(STEPS + 2))
    assert sorted(losses(out)) == list(range(1, STEPS + 3))


@patient
@pytest.mark.slow
def test_a_host_that_is_preempted_stops_all(whole):
    """The signal reaches one host of two; both end after the same step, which is saved."""
    folder, wanted = whole
    port, out = free_port(), folder / "preempted"
    more = ("--steps", "100000")
    both = [start(folder, out, host, port, *more) for host in (0, 1)]
    try:
        has_a_checkpoint(out, both[0])
        both[1].send_signal(signal.SIGTERM)
    finally:
        told = ended(both)
    assert "stopped after step" in told[0]
    done = losses(out)
    assert max(done) == max(losses(out / "host-1")) < 100000
    kept = sorted(int(path.name) for path in (out / "checkpoints").glob("[0-9]*"))
    assert kept[-1] == max(done)
    assert done[1] == wanted[1]


def test_a_host_that_never_joins_is_told():
    code = f"from parallel import hosts\nhosts.join('127.0.0.1:{free_port()}', 2, 0, timeout=1)\n"
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=TIMEOUT
    )
    assert found.returncode != 0
    assert "hosts: not all of 2 hosts joined" in found.stderr, found.stderr


def test_a_place_that_is_not_there_is_told():
    with pytest.raises(UserError, match="this one's place from 0"):
        hosts.join("127.0.0.1:1", 2, 2)
