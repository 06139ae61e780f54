"""Records of a data set as dictionaries, each with the place it came from, for messages.

| method | fields of a record |
| --- | --- |
| sft | prompt and completion; or messages, whose assistant's turns are learnt; or text |
| reward, dpo, orpo, simpo | prompt, chosen, rejected; reward also margin |
| kto | prompt, completion, label (true or false) |
| gdpo | prompt, belief, chosen, rejected; target: the beliefs' shares, else they are counted |

A prompt or an answer is text or a list of messages. The names are TRL's.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from align.synthetic import records as synthetic_records
from jaxinfra.errors import UserError

Record = tuple[str, dict[str, Any]]  # "pairs.jsonl:3", its fields


def read(data: str, method: str) -> list[Record]:
    """All records of the data that `TrainerConfig.data` names.

    Raises UserError with file and line where a line is not a JSON object, and where there is none.
    """
    if data == "synthetic":
        found = [(f"synthetic:{i}", r) for i, r in enumerate(synthetic_records(method), 1)]
    elif data.startswith("hf:"):
        found = list(_dataset(data.removeprefix("hf:")))
    else:
        path = Path(data).expanduser()
        if not path.is_file():
            raise UserError(
                f"{data}: no such file; give a .jsonl file, hf:OWNER/NAME for a Hugging Face "
                "dataset, or synthetic"
            )
        try:
            with open(path, encoding="utf-8") as lines:
                found = list(_lines(data, lines))
        except UnicodeDecodeError as error:
            raise UserError(f"{data}: not UTF-8 text ({error}); convert it first") from None
    if not found:
        raise UserError(f"{data}: holds no records")
    return found


def _lines(name: str, lines: Iterable[str]) -> Iterator[Record]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{name}:{number}: not valid JSON ({error}); mend the line") from None
        if not isinstance(record, dict):
            kind = type(record).__name__
            raise UserError(f"{name}:{number}: a {kind}, not a JSON object with fields")
        yield f"{name}:{number}", record


def _dataset(name: str) -> Iterator[Record]:
    """The split `train` of a Hugging Face dataset."""
    if importlib.util.find_spec("datasets") is None:
        raise UserError(f"hf:{name}: this needs `pip install datasets`")
    import datasets  # pyright: ignore[reportMissingImports]

    try:
        rows = datasets.load_dataset(name, split="train")
    except Exception as error:  # the hub's library raises many kinds
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"hf:{name}: cannot be loaded ({reason}); check name and network, or save its rows as "
            "a .jsonl file"
        ) from None
    for number, row in enumerate(rows):
        yield f"hf:{name}:{number}", dict(row)
