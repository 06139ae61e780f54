"""A tokenizers pipeline from the vocabulary in GGUF metadata.

GGUF stores tokens, merges or scores, and the name of a pre-tokenizer; the pipeline itself is known
by that name. Names and their splits: `llama-vocab.cpp` of llama.cpp. Where readers differ, this
follows the `tokenizer.json` that the model was trained with:

- `smollm`: every digit by itself, then the GPT-2 split; llama.cpp too. transformers 5.23 makes the
  GPT-2 split alone when it reads a GGUF: "a  1" becomes a, Ġ, Ġ, 1 and not a, ĠĠ, 1, and 136 of the
  tests' 2,000 strings get other ids.
- `qwen2`: NFC normalisation first, which llama.cpp and transformers leave out.
- `llama-bpe`: bos first unless the file says otherwise; llama.cpp too, transformers not.
- `llama` (SentencePiece): a space goes before the text and before what follows a special token;
  llama.cpp too. transformers puts one before the whole only, and none where it begins with one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from jaxinfra.errors import UserError

PRE_TOKENIZERS = ("gpt-2", "smollm", "llama-bpe", "qwen2")

_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4  # `llama_token_type` of llama.cpp
_OPTIONAL = ("unknown", "padding")  # tokens without which a text can be read and written
_SPACE = "\u2581"  # SentencePiece writes a space so
_SPLIT = (  # Llama 3 takes up to three digits together, Qwen2 one
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,DIGITS}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def build(metadata: Mapping[str, Any]) -> tuple[Tokenizer, dict[str, str], tuple[int, ...]]:
    """The pipeline, the named special tokens ("bos_token": "<s>", ...) and the end-of-text ids.

    Raises UserError on a kind or pre-tokenizer that is not supported and on a damaged vocabulary.
    """
    own = {k.removeprefix("tokenizer.ggml."): v for k, v in metadata.items()}
    tokens = own.get("tokens")
    if not tokens:
        raise UserError("holds no tokenizer; fetch a complete file or give a tokenizer.json")
    if not isinstance(tokens, list) or not isinstance(tokens[0], str):  # an array has one type
        raise UserError("damaged vocabulary (tokens are no texts); fetch the file again")
    kinds = own.get("token_type") or [_NORMAL] * len(tokens)
    if not isinstance(kinds, list) or len(kinds) != len(tokens) or not isinstance(kinds[0], int):
        raise UserError("damaged vocabulary (not a type for every token); fetch the file again")
    model = own.get("model")
    if model not in ("gpt2", "llama"):
        raise UserError(f"tokenizer {model!r} is not supported; supported are 'gpt2' and 'llama'")
    if model == "llama":  # converters write spaces of user-defined tokens in both ways
        tokens = [
            token.replace(_SPACE, " ") if kind == _USER_DEFINED else token
            for token, kind in zip(tokens, kinds, strict=True)
        ]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        raise UserError("damaged vocabulary (a token twice); fetch the file again")
    names = ("bos", "eos", "eot", "eom", *_OPTIONAL)
    ids = {name: _id(own, name, len(tokens)) for name in names}
    named = {
        f"{name[:3]}_token": tokens[index]
        for name in ("bos", "eos", *_OPTIONAL)
        if (index := ids[name]) is not None
    }
    try:
        pipeline = (_bpe if model == "gpt2" else _sentencepiece)(own, vocabulary, kinds, named)
    except UserError:
        raise
    except Exception as error:  # the tokenizers library raises plain Exception
        raise UserError(f"damaged vocabulary ({error}); fetch the file again") from None
    for kind in (_CONTROL, _USER_DEFINED):
        pipeline.add_tokens(
            [
                AddedToken(token, normalized=False, special=kind == _CONTROL)
                for token, its_kind in zip(tokens, kinds, strict=True)
                if its_kind == kind
            ]
        )
    pipeline.add_special_tokens([AddedToken(t, normalized=False) for t in named.values()])
    first = own.get("add_bos_token", model == "llama" or own.get("pre") == "llama-bpe")
    ends = [named["bos_token"]] if first and "bos_token" in named else []
    ends += ["$A"]
    ends += [named["eos_token"]] if own.get("add_eos_token") and "eos_token" in named else []
    if len(ends) > 1:
        pipeline.post_processor = processors.TemplateProcessing(
            single=ends, special_tokens=[(t, vocabulary[t]) for t in ends if t != "$A"]
        )
    eos = [ids[name] for name in ("eos", "eot", "eom")]
    return pipeline, named, tuple(dict.fromkeys(i for i in eos if i is not None))


def _id(own: Mapping, name: str, size: int) -> int | None:
    """The id of a special token, if there is one."""
    index = own.get(f"{name}_token_id")
    if index is None or (type(index) is int and 0 <= index < size):
        return index
    if name in _OPTIONAL and type(index) is int:
        return None  # converters write such an id for "none"; llama.cpp passes over it
    raise UserError(
        f"damaged vocabulary ({name}_token_id={index!r} of {size:,} tokens); fetch the file again"
    )


def _bpe(own: Mapping, vocabulary: dict[str, int], kinds: list[int], named: dict) -> Tokenizer:
    """Byte-level BPE with the split that `tokenizer.ggml.pre` names."""
    pre = own.get("pre")
    if pre not in PRE_TOKENIZERS:
        raise UserError(
            f"pre-tokenizer {pre!r} is not supported; supported are {', '.join(PRE_TOKENIZERS)}; "
            "load the model's tokenizer.json instead"
        )
    merges = [tuple(merge.split(" ", 1)) for merge in own.get("merges", ())]
    pipeline = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=pre == "llama-bpe"))
    if pre in ("gpt-2", "smollm"):
        split = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        digits = [pre_tokenizers.Digits(individual_digits=True)] if pre == "smollm" else []
        pipeline.pre_tokenizer = pre_tokenizers.Sequence([*digits, split])
    else:
        expression = _SPLIT.replace("DIGITS", "3" if pre == "llama-bpe" else "1")
        pipeline.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(expression), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    if pre == "qwen2":
        pipeline.normalizer = normalizers.NFC()
    pipeline.decoder = decoders.ByteLevel()
    return pipeline


def _sentencepiece(
    own: Mapping, vocabulary: dict[str, int], kinds: list[int], named: dict
) -> Tokenizer:
    """SentencePiece BPE: merges are the ways to cut each piece in two pieces, best score first."""
    pieces = {
        piece: (-score, index)
        for (piece, index), score, kind in zip(
            vocabulary.items(), own.get("scores", ()), kinds, strict=True
        )
        if kind == _NORMAL
    }
    merges = sorted(
        (pieces[piece][0], pieces[left][1], pieces[right][1], left, right)
        for piece in pieces
        for left, right in ((piece[:cut], piece[cut:]) for cut in range(1, len(piece)))
        if left in pieces and right in pieces
    )
    pipeline = Tokenizer(
        models.BPE(
            vocabulary,
            [merge[-2:] for merge in merges],
            unk_token=named.get("unk_token"),
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefix = own.get("add_space_prefix", True)
    pipeline.normalizer = normalizers.Sequence(
        [*([normalizers.Prepend(_SPACE)] if prefix else []), normalizers.Replace(" ", _SPACE)]
    )
    pipeline.decoder = decoders.Sequence(
        [
            decoders.Replace(_SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            *([decoders.Strip(" ", 1, 0)] if prefix else []),
        ]
    )
    return pipeline
