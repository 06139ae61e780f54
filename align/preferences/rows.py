"""Records as arrays, and batches of them in an order that is a pure function of the step.

A row has k sequences: one for sft, chosen and rejected for pairs, and for kto an answer and another
record's answer to the same prompt. All rows have one shape, so that a step is compiled once; tokens
of padding cost as much as others, unless a run packs (`align.packing`).
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections import Counter, defaultdict
from typing import Any

import numpy as np

from align.packing import rows_for
from align.preferences.encode import Encoder, Sequence
from align.preferences.sources import Record, read
from align.trainer_config import TrainerConfig
from jaxinfra.errors import UserError
from jaxinfra.text.tokenizer import Tokenizer
from jaxinfra.train.order import permute

_MULTIPLE = 16  # of which the length of rows is one
_SPLIT = 1 << 32  # the "epoch" of the permutation that parts held-out from training rows


@dataclasses.dataclass(frozen=True)
class Rows:
    """M rows. `arrays` have a leading M:

    - tokens int32 [M, k, S]: prompt and answer without a gap, then 0;
    - lengths int32 [M, k]: tokens of the prompt; sizes int32 [M, k]: of prompt and answer;
    - mask float32 [M, k, T]: 1 for the tokens after the prompt that are learnt;
    - margin float32 [M] (reward), label bool [M] (kto), belief int32 [M] and target float32 [M, C]
      (gdpo), where `beliefs` are the C tokens.
    """

    arrays: dict[str, np.ndarray]
    cut: int  # answers that lost tokens
    dropped: int  # records whose prompt left no room for an answer
    beliefs: tuple[int, ...] = ()

    @functools.cached_property
    def sha256(self) -> str:
        """Of all arrays: the identity of the data, whatever file it came from."""
        digest = hashlib.sha256()
        for name, array in sorted(self.arrays.items()):
            digest.update(f"{name} {array.dtype} {array.shape}".encode() + array.tobytes())
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self.arrays["tokens"])

    def told(self, max_length: int) -> str:
        """A sentence on what truncation took."""
        k, S = self.arrays["tokens"].shape[1:]
        text = f"{len(self):,} rows of {k} x {S} tokens"
        if self.cut:
            text += f"; {self.cut:,} answers were cut at max_length={max_length}"
        if self.dropped:
            text += f"; {self.dropped:,} rows dropped, whose prompt leaves no room for an answer"
        return text


def build(config: TrainerConfig, tokenizer: Tokenizer) -> Rows:
    """The rows of the data that `config` names.

    Raises UserError that names the record where a field is missing, empty or of the wrong kind.
    """
    records = read(config.data, config.method)
    encode = Encoder(tokenizer)
    sequences: list[list[Sequence]]
    extra: dict[str, np.ndarray] = {}
    beliefs: tuple[int, ...] = ()
    if config.method == "sft":
        sequences = [[encode.supervised(where, record)] for where, record in records]
    elif config.method == "kto":
        sequences = _with_mismatched(
            [encode.answer(where, record, "completion") for where, record in records], config.data
        )
        extra["label"] = np.asarray([_label(where, record) for where, record in records])
    else:
        sequences = [
            [encode.answer(where, record, name) for name in ("chosen", "rejected")]
            for where, record in records
        ]
        if config.method == "reward" and any("margin" in record for _, record in records):
            extra["margin"] = np.asarray([_number(w, r, "margin") for w, r in records], np.float32)
        if config.method == "gdpo":
            said, beliefs, target = _beliefs(records, encode)
            sequences = [[_believing(s, token) for s in row]
                         for row, token in zip(sequences, said, strict=True)]  # fmt: skip
            extra["belief"] = np.asarray([beliefs.index(token) for token in said], np.int32)
            extra["target"] = target
    return _pack(sequences, extra, beliefs, config)


def _pack(
    sequences: list[list[Sequence]], extra: dict[str, np.ndarray], beliefs: tuple[int, ...],
    config: TrainerConfig,
) -> Rows:  # fmt: skip
    fitting = [[s.cut(config.max_length) for s in row] for row in sequences]
    keep = [i for i, row in enumerate(fitting) if None not in row]
    if not keep:
        raise UserError(
            f"{config.data}: no prompt leaves room for an answer in max_length="
            f"{config.max_length}; raise it"
        )
    kept: Any = [fitting[i] for i in keep]
    cut = sum(
        len(new) < len(old)
        for row, i in zip(kept, keep, strict=True)
        for new, old in zip(row, sequences[i], strict=True)
    )
    longest = max(len(s) for row in kept for s in row)
    S = min(-(-longest // _MULTIPLE) * _MULTIPLE, config.max_length)
    T = max(len(s.answer) for row in kept for s in row)
    M, k = len(kept), len(kept[0])
    tokens, lengths, sizes = np.zeros((M, k, S), np.int32), *np.zeros((2, M, k), np.int32)
    mask = np.zeros((M, k, T), np.float32)
    for i, row in enumerate(kept):
        for j, s in enumerate(row):
            tokens[i, j, : len(s)] = s.prompt + s.answer
            mask[i, j, : len(s.answer)] = s.mask
            lengths[i, j], sizes[i, j] = len(s.prompt), len(s)
    arrays = {"tokens": tokens, "lengths": lengths, "sizes": sizes, "mask": mask}
    arrays |= {name: array[keep] for name, array in extra.items()}
    return Rows(arrays, cut, len(sequences) - len(keep), beliefs)


@dataclasses.dataclass(frozen=True)
class Batches:
    """B rows a step: each epoch goes through all training rows in an order of its own."""

    arrays: dict[str, np.ndarray]
    batch_size: int
    seed: int = 0
    validation: float = 0.0  # share of rows held out; at least one if it is not zero

    def __post_init__(self) -> None:
        if self.training < 1:
            raise UserError(f"data: of {self.rows} rows {self.held_out} are held out; give more")

    @property
    def rows(self) -> int:
        return len(self.arrays["tokens"])

    @property
    def held_out(self) -> int:
        """Rows kept for evaluation."""
        return min(self.rows, max(int(self.rows * self.validation), self.validation > 0))

    @property
    def training(self) -> int:
        """Rows of an epoch."""
        return self.rows - self.held_out

    def batch_at(self, step: int) -> dict[str, np.ndarray]:
        """Batch number `step` (from 0), known without those before it."""
        rows = self._rows_at(step)
        return {name: array[rows] for name, array in self.arrays.items()}

    def _rows_at(self, step: int) -> np.ndarray:
        place = np.arange(step * self.batch_size, (step + 1) * self.batch_size)
        epoch, index = np.divmod(place, self.training)
        order = np.empty_like(index)
        for e in np.unique(epoch):
            there = epoch == e
            order[there] = permute(index[there], self.training, self.seed, int(e))
        return self._order(self.held_out + order)

    def packed_rows(self, config: TrainerConfig) -> tuple[int, int, float]:
        """Rows that a forward pass of any of the run's steps needs packed, those it has unpacked,
        and the tokens that a pass has, in rows.

        A pass is of the sequences of a part of a batch; kto's two passes have one of a row each.
        """
        sizes, S = self.arrays["sizes"], self.arrays["tokens"].shape[2]
        less = 0 if config.method == "reward" else 1  # the last token foretells nothing
        most, filled = 0, []
        for step in range(config.steps):
            for part in np.split(sizes[self._rows_at(step)], config.accumulate):
                for pass_ in part.T if config.method == "kto" else (part,):
                    most = max(most, rows_for(pass_.ravel() - less, S - less))
                    filled.append(np.sum(pass_ - less) / (S - less))
        k = 1 if config.method == "kto" else sizes.shape[1]
        return most, config.batch_size // config.accumulate * k, float(np.mean(filled))

    def validation_batches(self) -> list[dict[str, np.ndarray]]:
        """The held-out rows in whole batches, a remainder left out; one smaller batch if few."""
        size = min(self.batch_size, self.held_out)
        starts = range(0, self.held_out - size + 1, size) if size else ()
        chosen = [self._order(np.arange(start, start + size)) for start in starts]
        return [{name: array[rows] for name, array in self.arrays.items()} for rows in chosen]

    def _order(self, places: np.ndarray) -> np.ndarray:
        return permute(places, self.rows, self.seed, _SPLIT)


def _with_mismatched(own: list[Sequence], data: str) -> list[list[Sequence]]:
    """Each sequence with its prompt before the answer of the record before (TRL's rotation)."""
    if len(own) < 2:
        raise UserError(f"{data}: kto compares with other records' answers; give 2 or more")
    others = [own[-1], *own[:-1]]
    return [
        [s, Sequence(s.prompt, other.answer, other.mask)]
        for s, other in zip(own, others, strict=True)
    ]


def _believing(s: Sequence, token: int) -> Sequence:
    """With the belief's token at the end of the prompt."""
    return Sequence([*s.prompt, token], s.answer, s.mask)


def _beliefs(
    records: list[Record], encode: Encoder
) -> tuple[list[int], tuple[int, ...], np.ndarray]:
    """Each record's belief, all of them in order, and what share each has for a record's prompt.

    Shares are the record's `target`, else those counted over the records with its prompt.
    """
    tokens, counts = [], defaultdict(Counter)
    for where, record in records:
        belief = record.get("belief")
        if not isinstance(belief, str) or not belief:
            raise UserError(f"{where}: lacks the field belief; give a text of one token")
        token = encode.token(where, belief)
        tokens.append(token)
        counts[str(record.get("prompt"))][token] += 1
    shares: list[dict[int, float]] = []
    for where, record in records:
        target = record.get("target")
        if target is None:
            shares.append(dict(counts[str(record.get("prompt"))]))
            continue
        if not isinstance(target, dict) or not all(
            isinstance(share, int | float) and share >= 0 for share in target.values()
        ):
            raise UserError(f"{where}: target: give a share for each belief, as {{'A': 0.7}}")
        shares.append({encode.token(where, text): float(share) for text, share in target.items()})
    beliefs = tuple(sorted({*tokens, *(token for share in shares for token in share)}))
    table = np.asarray([[share.get(token, 0.0) for token in beliefs] for share in shares])
    if len(beliefs) < 2 or not np.all(sums := table.sum(axis=1, keepdims=True)):
        raise UserError("gdpo: the records hold one belief or none; a mixture needs two")
    return tokens, beliefs, (table / sums).astype(np.float32)


def _label(where: str, record: dict[str, Any]) -> bool:
    if not isinstance(record.get("label"), bool):
        raise UserError(f"{where}: label is {record.get('label')!r}; give true or false")
    return record["label"]


def _number(where: str, record: dict[str, Any], name: str) -> float:
    value = record.get(name, 0.0)
    if not isinstance(value, int | float) or not np.isfinite(value):
        raise UserError(f"{where}: {name} is {value!r}; give a number")
    return float(value)
