"""Token files: a corpus tokenised once, then memory-mapped.

A folder with `tokens.bin`, the ids of all documents one after the other as little-endian uint16 or
uint32, and `tokens.json`, which describes them. Each document begins with what the tokenizer puts
before a text (bos, if it has that rule) and ends with the end-of-sequence token.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from jaxinfra.errors import UserError
from jaxinfra.text.tokenizer import Tokenizer
from jaxinfra.train.corpus import Corpus
from jaxinfra.weights.files import new_folder
from jaxinfra.weights.pull import cache_folder

_PIECE = 1 << 18  # characters that are tokenised at once; a longer document is cut at line ends
_AT_ONCE = 64  # pieces


@dataclasses.dataclass(frozen=True)
class TokenFile:
    """Memory-mapped ids and what `tokens.json` says of them."""

    ids: np.ndarray  # uint16 or uint32 [tokens]
    sha256: str  # of the bytes: the data's identity wherever it lies
    tokenizer: str  # `fingerprint` of the one that made them
    end_id: int | None  # the last token of every document


def tokenised(corpus: Corpus, tokenizer: Tokenizer) -> TokenFile:
    """The tokens of `corpus`: from the cache, or made now and kept there."""
    made_by = fingerprint(tokenizer)
    name = hashlib.sha256(f"{corpus.version}\n{made_by}".encode()).hexdigest()[:16]
    folder = cache_folder() / "tokens" / name
    if not is_token_folder(folder):
        try:
            _write(folder, corpus, tokenizer, made_by)
        except UserError:
            if not is_token_folder(folder):  # or another process was faster
                raise
    return read(folder)


def is_token_folder(path: str | Path) -> bool:
    """Whether `path` is a folder that `read` takes."""
    return (Path(path).expanduser() / "tokens.json").is_file()


def read(folder: str | Path) -> TokenFile:
    """Maps the token file in `folder`; UserError when it is damaged."""
    folder = Path(folder).expanduser()
    try:
        about = json.loads((folder / "tokens.json").read_text())
        dtype, count = np.dtype(about["dtype"]), about["tokens"]
        known = (about["sha256"], about["tokenizer"], about["end_id"])
        if dtype.str not in ("<u2", "<u4") or type(count) is not int or count < 1:
            raise ValueError(f"{count!r} numbers of type {dtype}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{folder}/tokens.json: not readable ({error}); delete the folder"
        ) from None
    file = folder / "tokens.bin"
    size = file.stat().st_size if file.exists() else 0
    if size != count * dtype.itemsize:
        raise UserError(
            f"{file}: has {size:,} bytes, tokens.json tells of {count * dtype.itemsize:,}; "
            "delete the folder, and it is made again"
        )
    return TokenFile(np.memmap(file, dtype, mode="r"), *known)


def fingerprint(tokenizer: Tokenizer) -> str:
    """A digest of all that decides a tokenizer's ids."""
    text = tokenizer.backend.to_str() + json.dumps([tokenizer.special, tokenizer.eos_ids])
    return hashlib.sha256(text.encode()).hexdigest()


def _write(folder: Path, corpus: Corpus, tokenizer: Tokenizer, made_by: str) -> None:
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
    digest, count = hashlib.sha256(), 0
    with new_folder(folder, corpus.size) as new:
        with open(new / "tokens.bin", "wb") as stream:
            for ids in _ids(corpus, tokenizer):
                raw = np.asarray(ids, dtype).tobytes()
                stream.write(raw)
                digest.update(raw)
                count += len(ids)
        if not count:
            raise UserError(f"{corpus.name}: holds no text; give another file or folder")
        about = {
            "dtype": dtype.str,
            "tokens": count,
            "sha256": digest.hexdigest(),
            "corpus": corpus.name,
            "tokenizer": made_by,
            "end_id": _end_id(tokenizer),
        }
        (new / "tokens.json").write_text(json.dumps(about, indent=2) + os.linesep)


def _ids(corpus: Corpus, tokenizer: Tokenizer) -> Iterator[list[int]]:
    """Ids of every piece of every document, special tokens at the ends of documents."""
    before, end = tokenizer.encode(""), _end_id(tokenizer)
    before = [token for token in before if token != end]
    after = [] if end is None else [end]
    waiting: list[tuple[str, bool, bool]] = []

    def encoded() -> Iterator[list[int]]:
        batch = tokenizer.encode_batch([text for text, _, _ in waiting], add_special=False)
        for ids, (_, first, last) in zip(batch, waiting, strict=True):
            yield (before if first else []) + ids + (after if last else [])
        waiting.clear()

    for document in corpus.documents():
        pieces = list(_pieces(document))
        for number, piece in enumerate(pieces):
            waiting.append((piece, number == 0, number == len(pieces) - 1))
        if len(waiting) >= _AT_ONCE:
            yield from encoded()
    yield from encoded()


def _end_id(tokenizer: Tokenizer) -> int | None:
    return tokenizer.eos_ids[0] if tokenizer.eos_ids else None


def _pieces(text: str) -> Iterator[str]:
    start = 0
    while len(text) - start > _PIECE:
        cut = text.rfind("\n", start, start + _PIECE) + 1 or start + _PIECE
        yield text[start:cut]
        start = cut
    yield text[start:]
