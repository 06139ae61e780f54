"""A whole server with a scripted engine, to be started as a process: run_scripted.py [broken]."""

import functools
import sys

from decode.server.app import Settings
from decode.server.run import run
from decode.server.transport import InProcess
from jaxinfra.errors import UserError
from tests.decode.server.scripted import TOKENIZER, build_slow


def broken():
    """An engine that cannot be built."""
    raise UserError("no such model")


if __name__ == "__main__":
    build = broken if "broken" in sys.argv else build_slow
    try:
        run(functools.partial(InProcess, build), TOKENIZER, Settings("m"), port=0, drain=200)
    except UserError as error:
        sys.exit(str(error))
