"""The command `jaxinfra`: a thin shell over the commands that the layers register.

A layer registers a command as an entry point of the group `jaxinfra.commands`: a function whose
parameters become flags (tyro) and whose docstring's first line is its summary. Listing commands
reads those lines from the source, so `jaxinfra --help` imports no layer and no jax.
"""

from __future__ import annotations

import ast
import importlib.metadata
import os
import sys
from importlib.machinery import PathFinder
from pathlib import Path

from jaxinfra.errors import UserError

GROUP = "jaxinfra.commands"


def main(argv: list[str] | None = None) -> None:
    """Runs one command; a UserError becomes one line on standard error and exit status 2."""
    argv = sys.argv[1:] if argv is None else argv
    commands = {ep.name: ep for ep in importlib.metadata.entry_points(group=GROUP)}
    if not argv or argv[0] in ("-h", "--help"):
        print(_overview(commands))
        return
    if argv[0] in ("-V", "--version"):
        print(f"jaxinfra {importlib.metadata.version('jaxinfra')}")
        return
    name, *rest = argv
    if name not in commands:
        _fail(f"no command {name!r}; there are: {', '.join(sorted(commands))}")
    try:
        import tyro

        tyro.cli(commands[name].load(), prog=f"jaxinfra {name}", args=rest)
    except UserError as error:
        _fail(str(error))
    except KeyboardInterrupt:
        print(f"\njaxinfra {name}: interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output has gone: nobody is left to tell
        sys.stderr.close()
        sys.exit(141)
    except OSError as error:
        _fail(": ".join(str(part) for part in (error.filename, error.strerror or error) if part))
    except Exception:
        if _device_is_there():
            raise
        _fail(
            f"JAX_PLATFORMS={os.environ['JAX_PLATFORMS']}: jax finds no such device here; unset it "
            "or install what the device needs (pip install 'jaxinfra[cuda]' or 'jaxinfra[tpu]')"
        )


def _fail(message: str) -> None:
    print(f"jaxinfra: {message}", file=sys.stderr)
    sys.exit(2)


def _device_is_there() -> bool:
    """False where JAX_PLATFORMS asks for a device that jax does not find."""
    jax = sys.modules.get("jax")
    if jax is None or not os.environ.get("JAX_PLATFORMS"):
        return True
    try:
        return bool(jax.devices())
    except (RuntimeError, AssertionError):
        return False


def _overview(commands: dict[str, importlib.metadata.EntryPoint]) -> str:
    width = max(len(name) for name in commands)
    rows = [f"  {name:<{width}}  {_summary(ep)}" for name, ep in sorted(commands.items())]
    return "\n".join(
        [
            "usage: jaxinfra COMMAND [OPTIONS]     (jaxinfra COMMAND --help tells its options)",
            "",
            "The AI-infrastructure stack in JAX, from the kernel to the agent.",
            "",
            *rows,
        ]
    )


def _summary(entry_point: importlib.metadata.EntryPoint) -> str:
    """The first line of the command's docstring, read without importing its module."""
    package, *inner = entry_point.module.split(".")
    spec = PathFinder.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        return f"(its package {package} is not installed)"
    path = Path(next(iter(spec.submodule_search_locations)), *inner).with_suffix(".py")
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef) and node.name == entry_point.attr:
            return (ast.get_docstring(node) or "").partition("\n")[0]
    return ""
