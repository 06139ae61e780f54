"""The index of a checkpoint in shards: which safetensors file holds each tensor."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from jaxinfra.errors import UserError

INDEX = "model.safetensors.index.json"

_SHARD = re.compile(r"[\w .+-]{1,200}\.safetensors", re.ASCII)  # in the folder, never outside it


def weight_map(file: Path) -> dict[str, str]:
    """The shard of each tensor as the index `file` tells; raises UserError where it is damaged."""
    try:
        places = parse(file.read_bytes())["weight_map"]
        if not all(_SHARD.fullmatch(shard) for shard in places.values()):
            raise ValueError("it names a file that is no .safetensors beside it")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{file}: not a safetensors index ({error}); fetch it again") from None
    return places


def parse(raw: bytes) -> dict[str, Any]:
    """JSON whose keys are each there once: of two entries for a name, which one is meant?"""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) < len(pairs):
            raise ValueError("a key twice")
        return dict(pairs)

    return json.loads(raw, object_pairs_hook=unique)
