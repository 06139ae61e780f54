"""An environment is made once, again where that was interrupted, and says why it fails."""

import subprocess
import zipfile

import pytest

from agent.evaluate.environment import environment
from jaxinfra.errors import UserError


def test_an_environment_is_made_once_and_holds_what_was_asked(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXINFRA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    wheel = tmp_path / "lonely-1.0-py3-none-any.whl"
    head = "Metadata-Version: 2.1\nName: lonely\nVersion: 1.0\n"
    told = {"METADATA": f"{head}Requires-Dist: absent\n",
            "WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
            "RECORD": ""}  # fmt: skip
    with zipfile.ZipFile(wheel, "w") as file:
        file.writestr("lonely.py", "import sys; here = sys.prefix")
        for name, text in told.items():
            file.writestr(f"lonely-1.0.dist-info/{name}", text)
    with pytest.raises(UserError, match=r"lonely: pip install .*absent"):
        environment("lonely", (str(wheel),))
    python = environment("lonely", (str(wheel),), dependencies=False)
    asked = [python, "-c", "import lonely; print(lonely.here)"]
    told = subprocess.run(asked, capture_output=True, text=True, check=True)
    assert told.stdout.strip() == str(python.parent.parent)
    mark = python.parent.parent / "made"
    made = mark.stat().st_mtime_ns
    assert environment("lonely", (str(wheel),), dependencies=False) == python
    assert mark.stat().st_mtime_ns == made
    mark.unlink()  # as if it had been killed before its end
    (python.parent.parent / "left-over").touch()
    environment("lonely", (str(wheel),), dependencies=False)
    assert mark.exists() and not (python.parent.parent / "left-over").exists()
