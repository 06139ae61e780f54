"""Ids, texts and chats equal those of the installed transformers, for every kind of vocabulary."""

import json

import pytest

pytest.importorskip("transformers")

import transformers
from tokenizers import normalizers, pre_tokenizers

from jaxinfra.text import Tokenizer, render
from tests.jaxinfra.text.samples import TEMPLATES, chats, strings
from tests.jaxinfra.text.vocabularies import KINDS, pulled_smollm2, write_folder

pytestmark = [
    pytest.mark.live,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


def assert_same(own: Tokenizer, theirs, add_special: bool = True) -> None:
    ids = theirs(strings(), add_special_tokens=add_special)["input_ids"]
    assert len(ids) == 2000
    assert own.encode_batch(strings(), add_special) == ids
    for skip in (True, False):
        texts = theirs.batch_decode(ids, skip_special_tokens=skip)
        assert [own.decode(i, skip) for i in ids] == texts
    assert (own.bos_id, own.pad_id) == (theirs.bos_token_id, theirs.pad_token_id)
    assert own.eos_ids[0] == theirs.eos_token_id
    assert own.vocab_size == len(theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_reads_as_in_transformers(kind, tmp_path):
    write_folder(kind, tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert_same(Tokenizer.from_folder(tmp_path), theirs)
    assert_same(Tokenizer.from_folder(tmp_path), theirs, add_special=False)


@pytest.mark.parametrize(
    "config, legacy",
    [
        ({"add_bos_token": False}, {}),
        ({"add_eos_token": True}, {}),
        ({"pad_token": "<|new|>"}, {}),
        ({"extra_special_tokens": ["<a>", "<b>"]}, {}),
        ({"additional_special_tokens": ["<a>"]}, {}),
        ({"extra_special_tokens": {"image_token": "<image>"}}, {}),
        ({"image_token": "<image>"}, {}),
        ({"split_special_tokens": True}, {}),
        ({}, {"pad_token": "<|new|>", "eos_token": {"content": "<|eot_id|>", "lstrip": False}}),
        (
            {"added_tokens_decoder": {"700": {"content": "<x> ", "special": False}}},
            {"eos_token": "<|eot_id|>"},
        ),
    ],
)
def test_a_folders_special_tokens_read_as_in_transformers(config, legacy, tmp_path):
    write_folder("llama3", tmp_path, **config)
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(legacy))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    own = Tokenizer.from_folder(tmp_path)
    assert_same(own, theirs)
    assert own.encode("<x> <a><image>") == theirs("<x> <a><image>")["input_ids"]


@pytest.mark.parametrize("kind", [*KINDS, "byte"])
def test_what_we_save_transformers_loads(kind, tmp_path):
    own = Tokenizer.byte_level()
    if kind != "byte":
        write_folder(kind, tmp_path / "first", chat_template=TEMPLATES["qwen"])
        own = Tokenizer.from_folder(tmp_path / "first")
    own.save(tmp_path / "saved")
    model_type = {"llama3": "llama", "gemma": "gemma3_text", "smollm": "llama"}.get(kind, kind)
    if kind not in ("byte", "qwen2"):  # a model's configuration beside it must not change the ids
        (tmp_path / "saved" / "config.json").write_text(json.dumps({"model_type": model_type}))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert_same(own, theirs)
    assert theirs.chat_template == own.chat_template


@pytest.mark.parametrize("name", TEMPLATES)
def test_chats_read_as_in_transformers(name, tmp_path):
    write_folder("smollm", tmp_path, chat_template=TEMPLATES[name])
    own = Tokenizer.from_folder(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert own.chat_template is not None
    for one in chats():
        messages, rest = one["messages"], {k: v for k, v in one.items() if k != "messages"}
        text = theirs.apply_chat_template(messages, tokenize=False, **rest)
        assert render(own.chat_template, **one, **own.special) == text
        ids = theirs.apply_chat_template(messages, return_dict=False, **rest)
        assert own.encode_chat(**one) == ids


@pytest.mark.network
def test_smollm2_reads_as_in_transformers():
    """Against transformers' reading of the GGUF, with the split that its model was trained with.

    transformers splits a `smollm` vocabulary by GPT-2's expression alone; the pre-tokenizer of the
    model's own tokenizer.json, which llama.cpp also names so, isolates digits before it.
    """
    path = pulled_smollm2()
    theirs = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    own = Tokenizer.from_gguf(path)
    plain = [text for text in strings() if not any(c.isnumeric() for c in text)]
    assert len(plain) > 900
    assert own.encode_batch(plain) == theirs(plain)["input_ids"]
    theirs.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    assert_same(own, theirs)
    for one in chats():
        messages, rest = one["messages"], {k: v for k, v in one.items() if k != "messages"}
        ids = theirs.apply_chat_template(messages, return_dict=False, **rest)
        assert own.encode_chat(**one) == ids


def test_another_normalisation_is_rejected(tmp_path):
    write_folder("qwen2", tmp_path)
    own = Tokenizer.from_folder(tmp_path)
    own.backend.normalizer = normalizers.NFKC()
    with pytest.raises(AssertionError):
        assert_same(own, transformers.AutoTokenizer.from_pretrained(tmp_path))
