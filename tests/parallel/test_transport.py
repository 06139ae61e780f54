"""A ring between real processes: the sum, the bytes, and a process that is gone."""

import threading
import time

import numpy as np
import pytest

from jaxinfra.errors import UserError
from parallel import collectives, transport
from parallel.transport import all_reduce, run

N, ROWS = 3, 6


class Counting:
    """A link that counts what goes out."""

    def __init__(self, link):
        self.link, self.messages, self.bytes = link, 0, 0

    def send(self, data):
        self.messages, self.bytes = self.messages + 1, self.bytes + len(data)
        self.link.send(data)

    def receive(self):
        return self.link.receive()


def own(rank):
    return np.random.default_rng(rank).normal(size=(ROWS, 5))


def work(rank, n, link):
    counting = Counting(link)
    return all_reduce(own(rank), rank, n, counting), counting.messages, counting.bytes


def one_leaves(rank, n, link):
    transport.TIMEOUT = 0.3
    return None if rank == 0 else all_reduce(own(rank), rank, n, link)


@pytest.mark.parametrize("kind", ["pipes", "zmq"])
def test_a_ring_of_processes_sums(kind):
    pytest.importorskip("zmq") if kind == "zmq" else None
    expected = sum(own(rank) for rank in range(N))
    cost = collectives.cost("all_reduce", N, expected.nbytes)
    for total, messages, sent in run(work, N, kind):
        np.testing.assert_allclose(total, expected, rtol=1e-12)
        assert (messages, sent) == (cost.steps, cost.bytes)


class Slowing:
    """The end of a pipe whose first message takes its time."""

    def __init__(self, count):
        self.written, self.all = [], threading.Event()
        self.count = count

    def send_bytes(self, data):
        time.sleep(0 if self.written or data != b"0" else 0.2)
        self.written.append(data)
        if len(self.written) == self.count:
            self.all.set()


def test_no_message_overtakes_another():
    end = Slowing(3)
    link = transport.Pipes(end, None)
    for i in range(3):
        link.send(str(i).encode())
    assert end.all.wait(120) and end.written == [b"0", b"1", b"2"]


def test_a_process_that_is_gone_is_told():
    with pytest.raises(TimeoutError, match="did a process end"):
        run(one_leaves, 2, "pipes")


def test_bad_wishes_are_told():
    with pytest.raises(UserError, match="choose pipes or zmq"):
        run(work, 2, "pigeons")
    with pytest.raises(UserError, match="pad them"):
        all_reduce(np.zeros((5, 2)), 0, 2, Counting(None))
