"""A run by reward that SIGKILLs itself in its midst, for tests that resume it.

python -m tests.align.killed LOOP OUT [SCHEDULE]
"""

import os
import signal
import sys
from pathlib import Path

from align import online
from align.online_commands import GRPO
from align.system import SystemConfig
from tests.align.tiny import CONFIGS, MODEL, STEPS

KILLED = 5  # of STEPS, after a checkpoint at 3, and a step more
CONFIG = CONFIGS["reinforce++"]  # it has a controller


def config(loop, out, schedule=None, **options):
    return GRPO(
        task="chain_sum", out=Path(out), warm_steps=0, problems=12, steps=STEPS,
        rl=CONFIG, loop=loop, checkpoint_every=3, schedule=schedule and Path(schedule),
        system=SystemConfig(max_staleness=2, workers=2, chunk=1), **options,
    )  # fmt: skip


def small(task, room):
    """One layer, in place of the command's two."""
    return MODEL


def main() -> None:
    online.tiny = small
    loop, out, *schedule = sys.argv[1:]
    write = online._tell

    def tell(log, row):
        write(log, row)
        if row["step"] == KILLED:
            os.kill(os.getpid(), signal.SIGKILL)

    online._tell = tell
    online.train(config(loop, out, *schedule))


if __name__ == "__main__":
    main()
