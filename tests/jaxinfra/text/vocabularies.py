"""Small vocabularies of every kind, as model folders and as GGUF files."""

import contextlib
import json
import os
from pathlib import Path

import gguf
import pytest
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from jaxinfra.errors import UserError
from jaxinfra.weights.pull import pull
from tests.jaxinfra.text.samples import strings

_SPECIAL = {
    "llama3": ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"],
    "qwen2": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    "smollm": ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>"],
    "gemma": ["<pad>", "<eos>", "<bos>", "<unk>"],
    "mistral": ["<unk>", "<s>", "</s>"],
}
KINDS = tuple(_SPECIAL)


def _splits(kind: str):
    if kind == "smollm":
        return [pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    digits = r"\p{N}{1,3}" if kind == "llama3" else r"\p{N}"
    regex = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|" + digits + "|"
        r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    return [
        pre_tokenizers.Split(Regex(regex), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]


def train(kind: str) -> Tokenizer:
    """A vocabulary of `kind` learnt from half of the sample strings, with that kind's pipeline."""
    special = _SPECIAL[kind]
    options = {"vocab_size": 700, "special_tokens": special, "show_progress": False}
    if kind in ("gemma", "mistral"):
        tokens = [f"<0x{byte:02X}>" for byte in range(256)]
        options |= {"special_tokens": special + tokens, "limit_alphabet": 150}
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
        prefix = [normalizers.Prepend("▁")] if kind == "mistral" else []
        tokenizer.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", "▁")])
        strip = [decoders.Strip(" ", 1, 0)] if kind == "mistral" else []
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
        )
        # The trainer needs words; the finished pipeline runs over whole texts.
        tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    else:
        tokenizer = Tokenizer(models.BPE(ignore_merges=kind == "llama3"))
        tokenizer.normalizer = normalizers.NFC() if kind == "qwen2" else None
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(_splits(kind))
        tokenizer.decoder = decoders.ByteLevel()
        options["initial_alphabet"] = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(strings()[::2], trainers.BpeTrainer(**options))
    if kind in ("gemma", "mistral"):
        # Byte tokens must be special to be learnt first, and must not be afterwards.
        spec = json.loads(tokenizer.to_str())
        spec["pre_tokenizer"] = None
        spec["added_tokens"] = spec["added_tokens"][: len(special)]
        tokenizer = Tokenizer.from_str(json.dumps(spec))
    if kind in ("llama3", "gemma", "mistral"):
        bos = {"llama3": special[0], "gemma": "<bos>", "mistral": "<s>"}[kind]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[bos, "$A"], special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    if kind == "qwen2":
        tokenizer.add_tokens([AddedToken("<think>", normalized=False, special=False)])
    return tokenizer


NAMED = {
    "llama3": {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"},
    "qwen2": {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
    "smollm": {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"},
    "gemma": {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"},
    "mistral": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
}


def write_folder(kind: str, folder: Path, **config: object) -> Tokenizer:
    """Writes `train(kind)` as a Hugging Face folder, `config` into its tokenizer_config.json."""
    tokenizer = train(kind)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **NAMED[kind], **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return tokenizer


def write_gguf(path: Path, tokens: list[str], **own: object) -> Path:
    """Writes a GGUF file of no tensors; `own` are the keys after "tokenizer.ggml."."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_token_list(tokens)
    for key, value in own.items():
        key = f"tokenizer.{key}" if key == "chat_template" else f"tokenizer.ggml.{key}"
        add = {str: writer.add_string, bool: writer.add_bool, int: writer.add_uint32,
               list: writer.add_array}[type(value)]  # fmt: skip
        add(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def pulled_smollm2() -> Path:
    """The model's GGUF file, pulled where it is not here, or the test is skipped."""
    with contextlib.suppress(UserError):  # no way out of this machine
        pull("smollm2-135m")
    own = os.environ.get("JAXINFRA_CACHE")
    base = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    found = sorted(Path(own or base / "jaxinfra").rglob("SmolLM2-135M-Instruct*.gguf"))
    if not found:
        pytest.skip("`jaxinfra pull smollm2-135m` finds no GGUF file")
    return found[0]
