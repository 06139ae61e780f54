"""Text from tokens one at a time, held back until no later token can change it.

A token of a byte-level vocabulary stands for bytes that may end inside a character; a byte token
(`<0xE2>`) of a SentencePiece vocabulary belongs to a run whose reading is known only at its end.
Cost: O(bytes of the token) a push. The decoders mirrored here are `ByteLevel`, `Replace`,
`ByteFallback`, `Fuse` and `Strip` of the tokenizers library, by whose `decode` the tests judge.
"""

from __future__ import annotations

import codecs
import json
import re
from typing import Any

import tokenizers

from jaxinfra.errors import UserError

_BYTE_TOKEN = re.compile("<0x([0-9A-Fa-f]{2})>")
_PIECES = (["Replace", "ByteFallback", "Fuse"], ["Replace", "ByteFallback", "Fuse", "Strip"])


def byte_alphabet() -> list[str]:
    """The printable character that stands for each of the 256 bytes in byte-level vocabularies.

    Source: `bytes_to_unicode` of GPT-2 (Radford et al., 2019): printable Latin-1 characters stand
    for themselves, the others take the code points from 256 on.
    """
    itself = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte if byte in itself else next(others)) for byte in range(256)]


class Stream:
    """An incremental detokeniser: deltas of `push` and `finish` join to `decode` of all tokens.

    Raises UserError for a tokenizer whose decoder can only be run on a whole sequence.
    """

    def __init__(self, backend: tokenizers.Tokenizer, skip_special: bool = True) -> None:
        state = backend.decoder.__getstate__() if backend.decoder else b'{"type": null}'
        decoder: Any = json.loads(state)
        steps = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
        kinds = [step["type"] for step in steps]
        self._backend = backend
        added = backend.get_added_tokens_decoder() if skip_special else {}
        self._skip = {token_id for token_id, token in added.items() if token.special}
        if kinds == ["ByteLevel"]:
            self._bytes = {character: byte for byte, character in enumerate(byte_alphabet())}
            self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        elif kinds in _PIECES and "String" in steps[0]["pattern"] and not steps[-1].get("stop"):
            self._bytes = None
            self._replace = (steps[0]["pattern"]["String"], steps[0]["content"])
            self._run: list[int] = []
            self._lead = steps[-1].get("content", "")
            self._leads = self._strip = steps[-1].get("start", 0)
        else:
            raise UserError(f"tokenizer: text of decoder {kinds} cannot be streamed; use decode")

    def push(self, token_id: int) -> str:
        """The text that is certain after token `token_id` and was not before; may be empty."""
        piece = self._backend.id_to_token(int(token_id))
        if piece is None or token_id in self._skip:
            return ""
        if self._bytes is not None:
            if all(character in self._bytes for character in piece):
                return self._utf8.decode(bytes(self._bytes[character] for character in piece))
            return self._utf8.decode(piece.encode())
        piece = piece.replace(*self._replace)
        byte = _BYTE_TOKEN.fullmatch(piece)
        if byte:
            self._run.append(int(byte[1], 16))
            return ""
        return self._stripped(self._end_of_run() + piece)

    def finish(self) -> str:
        """The text still held back; the stream then starts anew."""
        if self._bytes is not None:
            return self._utf8.decode(b"", final=True)
        text = self._stripped(self._end_of_run())
        self._strip = self._leads
        return text

    def _end_of_run(self) -> str:
        run, self._run = bytes(self._run), []
        try:
            return run.decode()
        except UnicodeDecodeError:
            return "\ufffd" * len(run)

    def _stripped(self, text: str) -> str:
        """`text` without what is still to be stripped from the start of the whole."""
        while self._strip and text:
            if text[0] != self._lead:
                self._strip = 0
                break
            text, self._strip = text[1:], self._strip - 1
        return text
