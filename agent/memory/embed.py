"""Texts as unit vectors, so that near texts have a large product.

`Ngrams` needs no model: it hashes the letters' n-grams, so it forgives endings and typos and knows
no synonyms. `HiddenStates` is the mean of a language model's last hidden states.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray


class Embedder(Protocol):
    """Anything that makes vectors of texts; `name` changes when the vectors would."""

    name: str

    def __call__(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """[n, d] float32, each row of length 1 (or 0 for an empty text)."""
        ...


def _unit(rows: NDArray[Any]) -> NDArray[np.float32]:
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    return (rows / np.where(lengths > 0, lengths, 1)).astype(np.float32)


class Ngrams:
    """Signed feature hashing (Weinberger et al., 2009, arXiv:0902.2206) of 3- to 5-grams."""

    def __init__(self, size: int = 512):
        self.name = f"ngrams-{size}"
        self._size = size

    def __call__(self, texts: Sequence[str]) -> NDArray[np.float32]:
        rows = np.zeros((len(texts), self._size), np.float32)
        for row, text in zip(rows, texts, strict=True):
            padded = f" {' '.join(text.lower().split())} "
            grams = Counter(
                padded[i : i + n] for n in (3, 4, 5) for i in range(len(padded) - n + 1)
            )
            for gram, count in grams.items():
                hashed = zlib.crc32(gram.encode())
                row[hashed % self._size] += (1 if hashed >> 31 else -1) * count**0.5
        return _unit(rows)


class HiddenStates:
    """The mean over a text's tokens of a model's last hidden states, less their common direction.

    `model` is what `jaxinfra pull` knows, or a folder. Texts are cut at `length` tokens.
    """

    def __init__(self, model: str, *, length: int = 128, offline: bool = False):
        import jax

        from jaxinfra.loading import load
        from jaxinfra.model.transformer import hidden

        loaded = load(model, offline=offline)
        self._encode, self._length = loaded.tokenizer.encode, length
        states = jax.jit(lambda params, tokens: hidden(params, loaded.config, tokens)[0])
        self._states = lambda tokens: np.asarray(states(loaded.params, tokens), np.float32)
        self.name = f"{model}-{length}"
        # Hidden states share a large mean, which would make all texts near (Mu and Viswanath,
        # 2018, arXiv:1702.01417).
        plain = ("The", "A house by the sea.", "42", "Who wrote it?", "She left early.")
        self._common = self._means(plain).mean(0)

    def __call__(self, texts: Sequence[str]) -> NDArray[np.float32]:
        return _unit(self._means(texts) - self._common)

    def _means(self, texts: Sequence[str]) -> NDArray[np.float32]:
        rows = []
        for text in texts:
            ids = self._encode(text or " ")[: self._length]
            padded = np.zeros((1, self._length), np.int32)  # one shape, so one program
            padded[0, : len(ids)] = ids
            rows.append(self._states(padded)[0, : len(ids)].mean(0))
        return np.stack(rows)
