"""Text to token ids and back, by the tokenizers library; three ways to make one, one to save it.

`Tokenizer.from_folder` reads what a Hugging Face model folder holds, `from_gguf` the metadata of a
GGUF file, `byte_level` needs no file at all. Ids equal those of transformers' AutoTokenizer for the
same folder. This module imports no jax.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors

from jaxinfra.errors import UserError
from jaxinfra.files import write_file
from jaxinfra.text import chat, gguf_vocabulary
from jaxinfra.text.stream import Stream, byte_alphabet

if TYPE_CHECKING:
    from jaxinfra.model.config import ModelConfig

_BYTE_VOCABULARY = 320  # 256 bytes and three special tokens, up to the next multiple of 64


@dataclasses.dataclass(frozen=True, eq=False)
class Tokenizer:
    """A vocabulary with its rules; `special` names its special tokens ("bos_token": "<s>", ...)."""

    backend: tokenizers.Tokenizer
    special: Mapping[str, str] = dataclasses.field(default_factory=dict)
    eos_ids: tuple[int, ...] = ()  # any of them ends a generation
    chat_template: str | None = None

    @classmethod
    def from_path(cls, path: str | Path) -> Tokenizer:
        """The tokenizer of a .gguf file, or of a folder with a tokenizer.json or with one."""
        path = Path(path)
        if path.is_file():
            return cls.from_gguf(path)
        gguf = [] if (path / "tokenizer.json").exists() else sorted(path.glob("*.gguf"))
        return cls.from_gguf(gguf[0]) if gguf else cls.from_folder(path)

    @classmethod
    def from_folder(cls, path: str | Path) -> Tokenizer:
        """Reads `tokenizer.json` and what lies beside it in the folder `path`.

        Special tokens are those of tokenizer_config.json (and special_tokens_map.json, where the
        former lists no added tokens); `eos_ids` also takes those of config.json and
        generation_config.json. The chat template is chat_template.jinja, else chat_template.json,
        else the one in tokenizer_config.json. Raises UserError naming the file at fault.
        """
        folder = Path(path)
        file = folder / "tokenizer.json"
        try:
            backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the tokenizers library raises plain Exception
            if not file.is_file():
                raise UserError(
                    f"{file}: no such file; save one with transformers' "
                    "AutoTokenizer.from_pretrained(...).save_pretrained(...)"
                ) from None
            raise UserError(f"{file}: damaged ({error}); fetch the file again") from None
        backend.no_truncation()
        backend.no_padding()
        config = _read_json(folder / "tokenizer_config.json")
        if "added_tokens_decoder" not in config:
            config |= _read_json(folder / "special_tokens_map.json")
        backend.encode_special_tokens = bool(config.get("split_special_tokens"))
        try:
            special = _add_special(backend, config)
            eos = [special["eos_token"]] if "eos_token" in special else []
            eos = [*map(backend.token_to_id, eos), *config.get("eos_token_ids", [])]
            template = _read_template(folder, config)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(
                f"{folder / 'tokenizer_config.json'}: a wrong value ({error}); fetch the file again"
            ) from None
        for name in ("config.json", "generation_config.json"):
            more = _read_json(folder / name).get("eos_token_id")
            eos += more if isinstance(more, list) else [] if more is None else [more]
        for index in eos:
            if type(index) is not int or not 0 <= index < 1 << 32:
                raise UserError(f"{folder}: {index!r} is given as the id of an eos token")
        eos = [index for index in eos if backend.id_to_token(index) is not None]
        return cls(backend, special, tuple(dict.fromkeys(eos)), template)

    @classmethod
    def from_gguf(cls, path: str | Path) -> Tokenizer:
        """Builds the tokenizer that the metadata of the GGUF file `path` describes.

        Kinds: "gpt2" with the pre-tokenizers of `gguf_vocabulary.PRE_TOKENIZERS`, and "llama"
        (SentencePiece BPE). Raises UserError naming the file, and what of it is not supported.
        """
        from jaxinfra.weights.gguf_header import read_header

        header = read_header(path)
        embedding = header.tensors.get("token_embd.weight")
        template = header.metadata.get("tokenizer.chat_template")
        try:
            backend, special, eos = gguf_vocabulary.build(header.metadata)
            size = backend.get_vocab_size()
            if embedding and embedding.shape[0] != size:
                raise UserError(
                    f"{size:,} tokens for an embedding of {embedding.shape[0]:,} rows; fetch the "
                    "file again"
                )
            if not isinstance(template, str | None):
                raise UserError("its chat template is no text; fetch the file again")
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
        return cls(backend, special, eos, template)

    @classmethod
    def byte_level(cls) -> Tokenizer:
        """One token a byte (id = byte), then bos 256, eos 257, pad 258 and unused ones to 320.

        Every text comes back as it was: text that looks like a special token is encoded as bytes.
        """
        names = ["<|bos|>", "<|eos|>", "<|pad|>"]
        names += [f"<|unused_{i}|>" for i in range(_BYTE_VOCABULARY - 256 - len(names))]
        vocabulary = {token: i for i, token in enumerate([*byte_alphabet(), *names])}
        backend = tokenizers.Tokenizer(models.BPE(vocabulary, []))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.decoder = decoders.ByteLevel()
        backend.add_special_tokens([AddedToken(name, normalized=False) for name in names])
        backend.post_processor = processors.TemplateProcessing(
            single=[names[0], "$A"], special_tokens=[(names[0], vocabulary[names[0]])]
        )
        backend.encode_special_tokens = True
        special = {"bos_token": names[0], "eos_token": names[1], "pad_token": names[2]}
        return cls(backend, special, (vocabulary[names[1]],))

    @functools.cached_property
    def vocab_size(self) -> int:
        """The rows that an embedding needs: the largest id plus one."""
        return max(self.backend.get_vocab().values()) + 1

    @property
    def bos_id(self) -> int | None:
        """The id of the token that begins a text, if there is one."""
        return self._id("bos_token")

    @property
    def pad_id(self) -> int | None:
        """The id that fills short rows, if there is one."""
        return self._id("pad_token")

    def _id(self, name: str) -> int | None:
        return self.backend.token_to_id(self.special[name]) if name in self.special else None

    def check(self, config: ModelConfig) -> None:
        """Raises UserError when this tokenizer does not belong to the model.

        Ids of its vocabulary must be rows of the embedding, and at least half of the rows must have
        an id. Tokens added to the vocabulary may lie beyond: Gemma 3's has one for images that the
        text models have no row for, and `generate` refuses a prompt that names it. Published models
        fill up to a round number and stay far above the half (Qwen 3: 151,669 of 151,936); the
        vocabulary of another model often is far below. Ids of bos and eos say less: some models
        name others in config.json than in their tokenizer (DeepSeek's distillations of Qwen). A
        vocabulary of bytes is let through, as a model of any size may be trained on it.
        """
        size, rows = self.vocab_size, config.vocab_size
        own = self.backend.get_vocab_size(with_added_tokens=False)
        if own > rows:
            fault = f"ids up to {own - 1} do not fit"
        elif _BYTE_VOCABULARY < size < rows / 2:
            fault = f"its {size:,} ids are less than half of"
        else:
            return
        raise UserError(
            f"tokenizer: {fault} the model's vocab_size={rows}; use the tokenizer that belongs to "
            "the model"
        )

    def encode(self, text: str, add_special: bool = True) -> list[int]:
        """Token ids of `text`; `add_special` adds bos (and eos) where the tokenizer has the rule.

        Special tokens written in the text become their ids. Raises UserError for what is not text.
        """
        return self.encode_batch([text], add_special)[0]

    def encode_batch(self, texts: Sequence[str], add_special: bool = True) -> list[list[int]]:
        """`encode` of many texts, in parallel."""
        try:
            encodings = self.backend.encode_batch_fast(list(texts), add_special_tokens=add_special)
        except (TypeError, UnicodeEncodeError):
            for text in texts:
                _check_text(text)
            raise
        return [encoding.ids for encoding in encodings]

    def encode_chat(
        self,
        messages: list[dict[str, Any]],
        *,
        tools: list[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> list[int]:
        """Token ids of a conversation, by the chat template; arguments as in `chat.render`."""
        if self.chat_template is None:
            raise UserError("tokenizer: has no chat template; use encode, or a chat model's one")
        text = chat.render(
            self.chat_template,
            messages,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            **{**self.special, **variables},
        )
        return self.encode(text, add_special=False)

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """The text of token `ids`; bytes that are not UTF-8 become U+FFFD, unknown ids nothing."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=skip_special)

    def stream(self, skip_special: bool = True) -> Stream:
        """A detokeniser fed token by token, whose deltas join to `decode` of all of them."""
        return Stream(self.backend, skip_special)

    def save(self, folder: str | Path) -> None:
        """Writes the files that `from_folder` and transformers' AutoTokenizer read; each at once.

        Raises UserError, leaving no half-written file, when the folder cannot be written.
        """
        folder = Path(folder)
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            "split_special_tokens": self.backend.encode_special_tokens,
            **self.special,
        }
        if self.eos_ids != (self._id("eos_token"),):  # transformers keeps these elsewhere
            config["eos_token_ids"] = list(self.eos_ids)
        template = folder / "chat_template.jinja"
        told = json.dumps(config, indent=2, ensure_ascii=False)
        write_file(folder / "tokenizer.json", self.backend.to_str(pretty=True).encode())
        write_file(folder / "tokenizer_config.json", told.encode())
        if self.chat_template is not None:
            write_file(template, self.chat_template.encode())
        else:
            template.unlink(missing_ok=True)


def _check_text(text: object) -> None:
    if not isinstance(text, str):
        raise UserError(f"text: {type(text).__name__} is not text; give a str")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"text: character {error.start} is the lone surrogate U+{ord(text[error.start]):04X}; "
            'read the text with errors="replace"'
        ) from None


def _add_special(backend: tokenizers.Tokenizer, config: dict[str, Any]) -> dict[str, str]:
    """Adds the tokens that tokenizer_config.json lists to the vocabulary; gives the named ones."""

    def content(token: Any) -> str:
        return token["content"] if isinstance(token, dict) else token

    special = {
        name: content(token)
        for name, token in config.items()
        if name.endswith("_token") and isinstance(token, str | dict)
    }
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    if isinstance(extra, dict):
        special |= {name: content(token) for name, token in extra.items()}
        extra = []
    declared = config.get("added_tokens_decoder", {})
    for index in sorted(declared, key=int):
        backend.add_tokens([AddedToken(**declared[index])])
    names = [*special.values(), *map(content, extra)]
    backend.add_special_tokens([AddedToken(name, normalized=False) for name in names])
    return special


def _read_text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); fetch the file again") from None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(_read_text(path) or "{}")
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error}); fetch the file again") from None
    if not isinstance(raw, dict):
        raise UserError(f"{path}: holds a {type(raw).__name__}, not a JSON object")
    return raw


def _read_template(folder: Path, config: dict[str, Any]) -> str | None:
    template = _read_text(folder / "chat_template.jinja")
    if template is None:
        own = _read_json(folder / "chat_template.json")
        template = own.get("chat_template", config.get("chat_template"))
    if isinstance(template, list):  # several, each with a name
        template = next((t["template"] for t in template if t["name"] == "default"), None)
    if not isinstance(template, str | None):
        raise TypeError("the chat template is no text")
    return template
