"""Several hosts as one program: who takes part, and arrays that no host holds whole.

Each host runs the same command; `jax.distributed` joins them, and XLA's collectives (NCCL, gloo,
ICI) cross between them. Under Slurm, Kubernetes, Cloud TPU and MPI jax finds the others by itself
("auto"); anywhere else one host's address and everyone's number are given.

    jaxinfra train --mesh dp=2,tp=2 --coordinator 10.0.0.1:8476 --hosts 2 --host 0   # and --host 1
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding

from jaxinfra.errors import UserError


def join(coordinator: str, hosts: int = 0, host: int = -1, *, timeout: int = 300) -> None:
    """Waits for all hosts, once a process and before anything else of jax.

    Args:
      coordinator: "auto", or HOST:PORT of host 0, which listens there.
      hosts: how many there are; host: which this is, from 0.
      timeout: seconds to wait for the others.

    Where a host does not come in time the process ends and says so: jax's own time-out aborts the
    process without a word of what is missing, so ours comes first.
    """
    options: dict[str, Any] = {"initialization_timeout": timeout + 60}
    if coordinator != "auto":
        if ":" not in coordinator or hosts < 1 or not 0 <= host < hosts:
            raise UserError(
                f"hosts: coordinator={coordinator} hosts={hosts} host={host}: give HOST:PORT, the "
                "number of hosts, and this one's place from 0"
            )
        options |= {"coordinator_address": coordinator, "num_processes": hosts, "process_id": host}
    joined = threading.Event()

    def give_up() -> None:
        if not joined.wait(timeout):
            print(
                f"hosts: not all of {hosts or 'the'} hosts joined {coordinator} within {timeout} "
                "s; start the command on each of them",
                file=sys.stderr, flush=True,
            )  # fmt: skip
            os._exit(1)

    threading.Thread(target=give_up, daemon=True).start()
    try:
        jax.distributed.initialize(**options)
    except ValueError as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"hosts: {reason}; give HOST:PORT, --hosts and --host") from None
    finally:
        joined.set()


class Agreed:
    """A wish to stop, true on all hosts at the same step once any host has it.

    A preempted host gets its signal alone, or first; were it to stop alone, the others would wait
    in a collective. So all ask one another, after as many steps as take about `seconds`, a number
    that they agree on too. Its truth is asked once a step.
    """

    def __init__(self, asked: Sequence[int], seconds: float = 2.0) -> None:
        self._asked, self._seconds = asked, seconds
        self._left = self._apart = 1
        self._since = time.monotonic()

    def __bool__(self) -> bool:
        self._left -= 1
        if self._left:
            return False
        now = time.monotonic()
        here = np.array([bool(self._asked), now - self._since], np.float32)
        stop, longest = np.max(multihost_utils.process_allgather(here), axis=0)
        each = max(float(longest) / self._apart, 1e-3)
        self._left = self._apart = max(1, int(self._seconds / each))
        self._since = now
        return bool(stop)


def placed(batch: Mapping[str, Any], sharding: NamedSharding) -> dict[str, jax.Array]:
    """A batch that every host has, of which each puts its own rows on its devices."""

    def one(values: Any) -> jax.Array:
        rows = np.asarray(values)
        return jax.make_array_from_callback(rows.shape, sharding, lambda part: rows[part])

    return {name: one(values) for name, values in batch.items()}


def whole(tree: Any) -> Any:
    """Arrays that lie on all hosts as NumPy arrays on each; all hosts call this together."""
    return multihost_utils.process_allgather(tree, tiled=True)
