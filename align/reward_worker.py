"""The inside of a reward's process: samples come in, numbers go out. Run by `ProcessReward`.

    python align/reward_worker.py DESCRIPTOR

Run as a file, so that nothing is imported but what the reward itself needs.
"""

from __future__ import annotations

import sys
from multiprocessing.connection import Connection


def main() -> None:
    """Receives the function, then samples, until the other end closes."""
    pipe = Connection(int(sys.argv[1]))
    function, _ = pipe.recv()  # the class of the samples comes along, to be imported before they do
    pipe.send(("ready", None))
    while True:
        try:
            sample = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send(("value", function(sample)))
        except Exception as error:
            pipe.send(("raised", f"{type(error).__name__}: {error}"))


if __name__ == "__main__":
    main()
