"""Triton's interpreter, which reads TRITON_INTERPRET when triton is imported: in its own process.

A test file runs itself as a program: `ask` starts it, and its last lines begin with `mend()`.
"""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[2]


def ask(module: str, folder: Path, jobs: list[dict]) -> dict[str, np.ndarray]:
    """The arrays that `python -m module` leaves for `jobs`, by name."""
    answer = str(folder / "answer.npz")
    task = json.dumps({"jobs": jobs, "answer": answer})
    done = subprocess.run(
        [sys.executable, "-m", module, task], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "TRITON_INTERPRET": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    with np.load(answer) as found:
        return dict(found)


def mend() -> dict[str, Any]:
    """The other side: triton's interpreter made to work with this numpy, and the task."""
    from triton.runtime import interpreter

    patch_tensor = interpreter._patch_lang_tensor

    def patch(tensor, scope):
        """triton 3.6 takes an array of one number for a number; numpy 2.4 no longer does."""
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patch
    task = json.loads(sys.argv[1])
    sys.path.insert(0, str(Path(task["answer"]).parent))
    return task


def plant(package: Any, task: dict[str, Any], number: int, replace: tuple[str, str] | None) -> None:
    """Gives `package` its Triton source, with one text replaced by another where they are given."""
    source = importlib.import_module(f"{package.__name__}.triton_source")
    if replace is not None:
        right, wrong = replace
        text = Path(source.__file__ or "").read_text()
        assert right in text, right
        name = f"mistaken{number}"
        Path(task["answer"]).with_name(f"{name}.py").write_text(text.replace(right, wrong))
        source = importlib.import_module(name)
    package.triton_source = source
