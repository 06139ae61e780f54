"""Two engines behind one transport: each dies in turn, and nobody waits for ever."""

import functools
import os
import queue
import signal
import threading
import time
from pathlib import Path

import pytest

from decode.request import Request
from decode.server import restarts
from decode.server.transport import InProcess
from decode.server.two_engines import HALVES, TwoEngines, take_gpu
from tests.decode import engines
from tests.decode.server import scripted as scripted_engine
from tests.decode.test_handover import SIZES


class Scripted:
    """Stands for an engine: what was posted, and what it is made to say."""

    def __init__(self, build, hear):
        self.build, self.hear, self.posted, self.closed = build, hear, [], False

    def post(self, message):
        self.posted.append(message)

    def close(self, timeout=10.0):
        self.closed = True


class Info:
    page_size = 8


@pytest.fixture
def scripted():
    made, heard = [], []

    def start(build, hear):
        made.append(Scripted(build, hear))
        return made[-1]

    two = TwoEngines(lambda folder: "first", lambda folder: "second", heard.append, start)
    assert [one.build() for one in made] == ["second", "first"]
    made[1].hear(("ready", Info))
    yield two, made[1], made[0], made, heard
    two.close()
    assert not two.folder.exists() and made[0].closed


LONG = Request("a", tuple(range(20)), engines.GREEDY)


def done(id):
    from decode.request import Output

    return ("outputs", [Output(id, finish_reason="length")])


def test_a_prompt_goes_to_one_and_then_to_the_other(scripted):
    two, first, second, _, heard = scripted
    two.post(("add", LONG))
    assert first.posted == [("add", LONG)] and not second.posted
    first.hear(("accepted", "a"))
    first.hear(("stats", None))
    first.hear(done("a"))
    assert second.posted == [("add", LONG)]
    second.hear(("accepted", "a"))  # it was said when the first took it: once, and early
    assert heard == [("accepted", "a")]
    two.post(("abort", "a"))
    assert second.posted[-1] == ("abort", "a")
    short = Request("b", (1, 2), engines.GREEDY)
    two.post(("add", short))
    assert second.posted[-1] == ("add", short)
    second.hear(("accepted", "b"))
    assert heard[1:] == [("accepted", "b")]


def test_prompts_of_one_request_are_computed_together(scripted):
    two, first, second, _, heard = scripted
    for id in "ab":
        two.post(("add", Request(id, LONG.prompt, engines.GREEDY)))
        first.hear(("accepted", id))
    assert heard == [("accepted", "a"), ("accepted", "b")] and not second.posted
    first.hear(done("a"))
    second.hear(("refused", "a", 429, "full"))
    first.hear(("died", "killed"))
    second.hear(("accepted", "b"))
    assert heard[2:] == [("refused", "a", 429, "full")] and not two._accepted


def test_who_leaves_while_the_prompt_is_computed_leaves_nothing(scripted):
    two, first, second, *_ = scripted
    two.post(("add", LONG))
    two.post(("abort", "a"))
    assert first.posted[-1] == ("abort", "a") and not second.posted
    (two.folder / "a").write_bytes(b"pages")  # it was done already
    first.hear(done("a"))
    assert not second.posted and not list(two.folder.iterdir())


def test_when_the_first_dies_or_refuses_the_second_computes(scripted):
    two, first, second, made, heard = scripted
    two.post(("add", LONG))
    first.hear(("refused", "a", 429, "full"))
    assert second.posted == [("add", LONG)]
    two.post(("add", LONG))
    (two.folder / "a.part").write_bytes(b"half")
    first.hear(("died", "killed"))
    second.hear(("accepted", "a"))
    assert heard == [("accepted", "a")]
    assert second.posted == [("add", LONG)] * 2 and not list(two.folder.iterdir())
    two.post(("add", LONG))  # the new first engine is not ready yet
    assert second.posted == [("add", LONG)] * 3
    made[2].hear(("ready", Info))
    two.post(("add", LONG))
    assert made[2].posted == [("add", LONG)] and len(second.posted) == 3
    for _ in range(9):
        made[-1].hear(("died", "again"))
    assert len(made) == 2 + 5 and second.posted[3:] == [("add", LONG)]
    second.hear(("died", "too"))
    assert heard[1:] == [("died", "too")]


def test_who_dies_seldom_is_started_each_time(scripted, monkeypatch):
    made, clock = scripted[3], iter(range(0, 10_000, 200))
    monkeypatch.setattr(restarts, "monotonic", lambda: float(next(clock)))
    for _ in range(9):
        made[-1].hear(("died", "again"))
    assert len(made) == 2 + 9


def test_what_is_posted_to_a_dead_process_waits_for_nobody():
    heard = queue.Queue()
    engine = InProcess(scripted_engine.build, heard.put)
    try:
        assert heard.get(timeout=250)[0] == "ready"
        engine._process.kill()
        while heard.get(timeout=250)[0] != "died":
            pass
        posting = threading.Thread(target=engine.post, args=(("add", LONG),), daemon=True)
        posting.start()
        posting.join(120)
        assert not posting.is_alive()
    finally:
        engine.close()


def test_an_engine_that_is_told_to_end_before_it_listens_ends():
    engine = InProcess(scripted_engine.build, print)
    start = time.monotonic()
    engine.close(timeout=250)
    assert not engine._process.is_alive() and time.monotonic() - start < 200


@pytest.mark.parametrize("named, seen", [("", ""), ("3,5", "5"), ("7", "7")])
def test_an_engine_takes_of_the_gpus_that_are_named(named, seen, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.9")
    monkeypatch.setattr(Path, "glob", lambda self, pattern: ["a", "b"])  # the machine's
    take_gpu("Decodes")
    assert os.environ["CUDA_VISIBLE_DEVICES"] == seen


def build(kind, folder):
    """Run in an engine's process."""
    from decode import handover
    from decode.runner import Runner

    runner = Runner(engines.params(), engines.CONFIG, SIZES)
    made = getattr(handover, kind)(runner, engines.TOKENIZER, SIZES)
    made.carry(folder)
    (folder.parent / f"{folder.name}-{kind}").write_text(str(os.getpid()))
    return made


def answers(heard, names, until=300.0):
    """Tokens by request, and how much of its prompt was known, once all have ended."""
    said, known, left = {name: [] for name in names}, {}, set(names)
    end = time.monotonic() + until
    while left:
        message = heard.get(timeout=end - time.monotonic())
        assert message[0] not in ("died", "refused"), message
        if message[0] == "outputs":
            for output in message[1]:
                said[output.request_id] += output.token_ids
                known[output.request_id] = output.cached_tokens
                if output.finish_reason is not None:
                    assert output.finish_reason == "length", output
                    left.discard(output.request_id)
    return said, known


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_processes_answer_as_one_and_outlive_a_kill():
    heard = queue.Queue()
    first, second = (functools.partial(build, kind) for kind in HALVES)
    two = TwoEngines(first, second, heard.put)
    pids = [two.folder.parent / f"{two.folder.name}-{kind}" for kind in ("Prefills", "Decodes")]
    try:
        while two._page == 0 or not pids[1].exists():
            time.sleep(0.1)
        prompts = engines.prompts(8)
        names = [f"r{i}" for i in range(8)]
        for name, prompt in zip(names, prompts, strict=True):
            two.post(("add", Request(name, prompt, engines.GREEDY)))
        said, known = answers(heard, names)
        for name, prompt in zip(names, prompts, strict=True):
            assert tuple(said[name]) == engines.greedy(prompt, 20)
            assert known[name] == (len(prompt) - 1) // 8 * 8
        first = int(pids[0].read_text())
        for i, prompt in enumerate(prompts):
            two.post(("add", Request(f"s{i}", prompt[::-1], engines.GREEDY)))
        os.kill(first, signal.SIGKILL)
        two.post(("abort", "nobody"))
        two.post(("add", Request("s8", prompts[2], engines.GREEDY)))  # nobody knows it died
        said, _ = answers(heard, [f"s{i}" for i in range(9)])
        for i, prompt in enumerate(prompts):
            assert tuple(said[f"s{i}"]) == engines.greedy(prompt[::-1], 20)
        while two._page == 0:  # another is there
            time.sleep(0.1)
        assert int(pids[0].read_text()) != first
        two.post(("add", Request("t", prompts[0] + prompts[1], engines.GREEDY)))
        said, known = answers(heard, ["t"])
        assert tuple(said["t"]) == engines.greedy(prompts[0] + prompts[1], 20) and known["t"] > 16
        assert not list(two.folder.iterdir())
    finally:
        two.close()
        for path in pids:
            path.unlink(missing_ok=True)
    assert not two.folder.exists()
