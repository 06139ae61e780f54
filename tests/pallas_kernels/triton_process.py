"""Triton's interpreter, which reads TRITON_INTERPRET when triton is imported: in its own process.

A test file runs itself as a program: its fixture `answers` starts it, once for many jobs, and
its last lines begin with `mend()`.
"""

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]


def answers(module: str, jobs: dict[str, dict]) -> Any:
    """A fixture: what `python -m module` answers to all `jobs`, arrays by name, by a job's name."""

    @pytest.fixture(scope="module")
    def answers(tmp_path_factory):
        return ask(module, tmp_path_factory.mktemp("triton"), jobs)

    return answers


def ask(module: str, folder: Path, jobs: dict[str, dict]) -> dict[str, dict[str, np.ndarray]]:
    """The arrays that `answer` leaves for each of `jobs`, in one process."""
    answer = str(folder / "answer.npz")
    task = json.dumps({"jobs": list(jobs.values()), "answer": answer})
    done = subprocess.run(
        [sys.executable, "-m", module, task], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "TRITON_INTERPRET": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found: dict[str, dict[str, np.ndarray]] = {name: {} for name in jobs}
    with np.load(answer) as arrays:
        for name, x in arrays.items():
            number, _, part = name.partition(" ")
            found[list(jobs)[int(number)]][part] = x
    return found


def answer(package: Any, task: dict[str, Any], run: Callable[[dict], dict[str, Any]]) -> None:
    """The other side: leaves what `run` gives of each job, whose mistake is planted."""
    answers = {}
    for number, job in enumerate(task["jobs"]):
        plant(package, task, number, job.get("replace"))
        answers |= {f"{number} {name}": x for name, x in run(job).items()}
    np.savez(task["answer"], **answers)


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


def stand_in(compat: Any) -> None:
    """Gives `_triton_compat` a `call` that runs the interpreter on concrete arrays."""
    import jax.numpy as jnp
    import torch

    def call(kernel, inputs, outputs, *, programs, num_warps, num_stages, **constants):
        tensors = [x if isinstance(x, int) else torch.from_numpy(np.array(x)) for x in inputs]
        kinds = [getattr(torch, out.dtype.name) for out in outputs]
        made = [torch.full(o.shape, np.nan, dtype=k) for o, k in zip(outputs, kinds, strict=True)]
        kernel[(programs,)](*tensors, *made, **constants)
        return [jnp.asarray(out.numpy()) for out in made]

    compat.call = call
