"""Batches: rows cut from a token file, in an order that is a pure function of the step.

The file is cut into n windows of T tokens (each reads one more, the last target). One permutation
parts them into held-out and training windows, one of each epoch's own orders those: batch `step` is
known from (seed, step) alone, so nothing but the step need be saved, and rows may be shared out
over any number of processes.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

from jaxinfra.errors import UserError
from jaxinfra.text.tokenizer import Tokenizer
from jaxinfra.train import corpus, tokens
from jaxinfra.train.config import TrainConfig
from jaxinfra.train.order import permute
from jaxinfra.train.tokens import TokenFile

_SPLIT = 1 << 32  # the "epoch" of the permutation that parts held-out from training windows


@dataclasses.dataclass(frozen=True)
class Data:
    """A token file as batches of B rows of T + 1 tokens."""

    file: TokenFile
    batch_size: int
    seq_len: int
    seed: int = 0
    validation: float = 0.0  # share of windows held out; at least one if it is not zero
    separate_documents: bool = False

    def __post_init__(self) -> None:
        if self.training_windows < 1:
            raise UserError(
                f"data: {len(self.file.ids):,} tokens make {self.windows} rows of seq_len="
                f"{self.seq_len}, {self.held_out} of them held out; give more text or a smaller "
                "seq_len"
            )

    @property
    def windows(self) -> int:
        """Rows that the file can be cut into."""
        return (len(self.file.ids) - 1) // self.seq_len

    @functools.cached_property
    def held_out(self) -> int:
        """Rows kept for evaluation."""
        return min(self.windows, max(int(self.windows * self.validation), self.validation > 0))

    @property
    def training_windows(self) -> int:
        """Rows of an epoch."""
        return self.windows - self.held_out

    def batch_at(self, step: int, rank: int = 0, world: int = 1) -> dict[str, np.ndarray]:
        """Batch number `step` (from 0): {"tokens": int32 [B, T + 1]}, perhaps "segment_ids" too.

        With `world` processes, the rows of process `rank`: B / world of the same B rows.
        """
        share = self.batch_size // world
        if share * world != self.batch_size:
            raise UserError(f"data: batch_size={self.batch_size} is no multiple of {world} hosts")
        first = step * self.batch_size + rank * share
        epoch, index = np.divmod(np.arange(first, first + share), self.training_windows)
        order = np.empty_like(index)
        for e in np.unique(epoch):
            there = epoch == e
            order[there] = permute(index[there], self.training_windows, self.seed, int(e))
        return self._rows(self.held_out + order)

    def validation_batches(self, most: int) -> list[dict[str, np.ndarray]]:
        """At most `most` whole batches of held-out rows; one smaller batch if there are few."""
        count = min(most, max(1, self.held_out // self.batch_size))
        rows = np.arange(min(count * self.batch_size, self.held_out))
        return [self._rows(part) for part in np.array_split(rows, count) if part.size]

    def _rows(self, places: np.ndarray) -> dict[str, np.ndarray]:
        """The windows at `places` of the split: held-out ones come first there."""
        window = permute(places, self.windows, self.seed, _SPLIT)
        span = np.arange(self.seq_len + 1)
        rows = self.file.ids[window[:, None] * self.seq_len + span].astype(np.int32)
        if not self.separate_documents:
            return {"tokens": rows}
        ended = np.cumsum(rows[:, :-1] == self.file.end_id, axis=1, dtype=np.int32)
        return {"tokens": rows, "segment_ids": np.pad(ended, ((0, 0), (1, 0))) + 1}


def open_data(config: TrainConfig, tokenizer: Tokenizer) -> Data:
    """The data that `config` names, tokenised now if it is not in the cache.

    Raises UserError when tokens there are of another tokenizer, and when documents shall be
    separated but the tokenizer marks no ends.
    """
    if tokens.is_token_folder(config.data):
        file = tokens.read(config.data)
        if file.tokenizer != tokens.fingerprint(tokenizer):
            raise UserError(
                f"{config.data}: was tokenised by another tokenizer than this run's; give "
                "--tokenizer the one that made it, or --data the text"
            )
    else:
        file = tokens.tokenised(corpus.find(config.data), tokenizer)
    if config.separate_documents and file.end_id is None:
        raise UserError("separate_documents: this tokenizer has no end-of-sequence token")
    return Data(
        file,
        config.batch_size,
        config.seq_len,
        config.seed,
        config.validation,
        config.separate_documents,
    )
