"""Where text comes from: Python's standard library, files, folders, Hugging Face datasets.

A source is a list of documents in a fixed order. The built-in corpus is the source of the standard
library of the running Python: 12 MB of code and prose that exists on every machine, the same bytes
wherever the same Python is installed.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

from jaxinfra.errors import UserError

_NOT_LIBRARY = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Documents, and `version`: a text that changes when they do, by which they are cached."""

    name: str
    version: str
    size: int  # in bytes, about
    documents: Callable[[], Iterator[str]]


def find(data: str) -> Corpus:
    """The corpus that `TrainConfig.data` names; UserError says what there is when it is none."""
    if data == "stdlib":
        return standard_library()
    if data.startswith("hf:"):
        return dataset(data.removeprefix("hf:"))
    path = Path(data).expanduser()
    if path.is_file():
        return _of_files(data, path.parent, [path])
    if path.is_dir():
        files = [p for p in sorted(path.rglob("*")) if p.is_file() and not _hidden(p, path)]
        return _of_files(data, path, files)
    raise UserError(
        f"{data}: no such file or folder; give one, or stdlib, or hf:OWNER/NAME for a Hugging Face "
        "dataset"
    )


def standard_library() -> Corpus:
    """The .py files of Python's standard library, its tests left out, sorted by path."""
    root = Path(sysconfig.get_path("stdlib"))
    files = [
        path
        for path in root.rglob("*.py")
        if not _NOT_LIBRARY & set(path.relative_to(root).parts)
        and not path.name.startswith("_sysconfigdata")  # tells of the machine it was built on
    ]
    if not files:
        raise UserError(f"{root}: no source of Python's library here; give --data a text file")
    files.sort(key=lambda path: path.relative_to(root).as_posix())
    corpus = _of_files("stdlib", root, files)
    return dataclasses.replace(corpus, version=f"{sys.implementation.name} {sys.version}")


def dataset(name: str) -> Corpus:
    """The column `text` of the split `train` of a Hugging Face dataset."""
    if importlib.util.find_spec("datasets") is None:
        raise UserError(f"hf:{name}: this needs `pip install datasets`")
    import datasets  # pyright: ignore[reportMissingImports]

    try:
        rows = datasets.load_dataset(name, split="train")
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"hf:{name}: cannot be loaded ({reason}); check name and network") from None
    if "text" not in rows.column_names:
        raise UserError(f"hf:{name}: has columns {', '.join(rows.column_names)}, but not `text`")
    texts = rows.select_columns("text")
    return Corpus(
        f"hf:{name}",
        texts._fingerprint,
        texts.data.nbytes,
        lambda: (row["text"] for row in texts),
    )


def _of_files(name: str, root: Path, files: list[Path]) -> Corpus:
    stats = [path.stat() for path in files]
    version = "\n".join(
        f"{path.relative_to(root).as_posix()} {stat.st_size} {stat.st_mtime_ns}"
        for path, stat in zip(files, stats, strict=True)
    )

    def documents() -> Iterator[str]:
        for path in files:
            try:
                text = path.read_bytes().decode()
            except UnicodeDecodeError:
                if len(files) == 1:
                    raise UserError(f"{path}: not UTF-8 text; convert it first") from None
                continue  # a picture, an archive, text of another encoding
            except OSError as error:
                raise UserError(f"{path}: cannot be read ({error.strerror})") from None
            if text:
                yield text

    return Corpus(name, version, sum(stat.st_size for stat in stats), documents)


def _hidden(path: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(root).parts)
