"""Ids equal recorded ones of transformers; folders, GGUF files and saving keep every rule."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from gguf import GGMLQuantizationType
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers

from jaxinfra.errors import UserError
from jaxinfra.text import Tokenizer
from jaxinfra.text.stream import byte_alphabet
from jaxinfra.weights import gguf_header
from tests.jaxinfra.text.samples import digest, strings
from tests.jaxinfra.text.vocabularies import (
    KINDS,
    NAMED,
    pulled_smollm2,
    train,
    write_folder,
    write_gguf,
)

FIXTURE = json.loads((Path(__file__).parents[2] / "fixtures/tokenizer.json").read_text("utf-8"))


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """A tokenizer of every kind, read from its folder, and that of bytes."""
    root = tmp_path_factory.mktemp("folders")
    for kind in KINDS:
        write_folder(kind, root / kind)
    folders = {kind: Tokenizer.from_folder(root / kind) for kind in KINDS}
    return folders | {"byte": Tokenizer.byte_level()}


@pytest.fixture(scope="module")
def small_gguf(tmp_path_factory):
    """SmolLM2's vocabulary, cut to 300 merges."""
    merged = [merge.replace(" ", "") for merge in FIXTURE["merges"]]
    tokens = [*FIXTURE["special"], *FIXTURE["alphabet"], *merged]
    return write_gguf(
        tmp_path_factory.mktemp("gguf") / "small.gguf",
        tokens,
        model="gpt2",
        pre="smollm",
        merges=FIXTURE["merges"],
        token_type=[3] * len(FIXTURE["special"]) + [1] * (len(tokens) - len(FIXTURE["special"])),
        bos_token_id=1,
        eos_token_id=2,
        padding_token_id=2,
        add_bos_token=False,
        chat_template=FIXTURE["chat_template"],
    )


def differing(tokenizer, recorded: str) -> int:
    """How many of the sample strings have other ids than those recorded by their digests."""
    ids = tokenizer.encode_batch(strings())
    return sum(digest(own) != recorded[8 * i : 8 * i + 8] for i, own in enumerate(ids))


def test_ids_of_a_cut_gguf_are_those_recorded(small_gguf):
    tokenizer = Tokenizer.from_gguf(small_gguf)
    assert differing(tokenizer, FIXTURE["cut"]["ids"]) == 0
    for i, ids in FIXTURE["cut"]["samples"].items():
        assert tokenizer.encode(strings()[int(i)]) == ids
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.pad_id) == (1, (2,), 2)
    assert tokenizer.vocab_size == 17 + 235 + 300  # bytes that no UTF-8 text has are left out


def test_a_split_without_single_digits_is_rejected(small_gguf):
    """GPT-2's split alone takes the space before a digit: other tokens for "  1"."""
    wrong = Tokenizer.from_gguf(small_gguf)
    wrong.backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    assert differing(wrong, FIXTURE["cut"]["ids"]) >= 10


@pytest.mark.network
def test_ids_of_smollm2_are_those_recorded():
    tokenizer = Tokenizer.from_gguf(pulled_smollm2())
    assert digest(tokenizer.encode_batch(strings())) == FIXTURE["whole"]["ids"]
    for i, ids in FIXTURE["whole"]["samples"].items():
        assert tokenizer.encode(strings()[int(i)]) == ids


def as_gguf(kind: str) -> tuple[list[str], dict]:
    """The vocabulary of `train(kind)` as llama.cpp's converter writes it: tokens and metadata."""
    spec = json.loads(train(kind).to_str())
    vocabulary = spec["model"]["vocab"] | {t["content"]: t["id"] for t in spec["added_tokens"]}
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    types = {t["content"]: 3 if t["special"] else 4 for t in spec["added_tokens"]}
    sentencepiece = kind in ("gemma", "mistral")
    byte = {f"<0x{b:02X}>": 6 for b in range(256)} if sentencepiece else {}
    own: dict = {"token_type": [types.get(t) or byte.get(t, 1) for t in tokens]}
    for name, token in NAMED[kind].items():
        key = {"unk_token": "unknown", "pad_token": "padding"}.get(name, name[:3])
        own[f"{key}_token_id"] = vocabulary[token]
    if sentencepiece:  # the pieces come in the order they were learnt, which is what scores say
        own |= {"model": "llama", "scores": [-float(i) for i in range(len(tokens))]}
        own |= {"add_space_prefix": kind == "mistral", "unknown_token_id": vocabulary["<unk>"]}
    else:
        own |= {"model": "gpt2", "pre": {"llama3": "llama-bpe"}.get(kind, kind)}
        own["merges"] = [" ".join(merge) for merge in spec["model"]["merges"]]
    return tokens, own


@pytest.mark.parametrize("kind", KINDS)
def test_gguf_and_tokenizer_json_of_one_vocabulary_agree(kind, loaded, tmp_path):
    tokens, own = as_gguf(kind)
    tokenizer = Tokenizer.from_gguf(write_gguf(tmp_path / "model.gguf", tokens, **own))
    ids = loaded[kind].encode_batch(strings())
    assert tokenizer.encode_batch(strings()) == ids
    assert tokenizer.special["eos_token"] == NAMED[kind]["eos_token"]
    assert [tokenizer.decode(i) for i in ids] == [loaded[kind].decode(i) for i in ids]


@pytest.mark.parametrize(
    "kind, wrong",
    [
        ("qwen2", {"pre": "gpt-2"}),
        ("llama3", {"pre": "qwen2"}),
        ("llama3", {"add_bos_token": False}),
        ("llama3", {"add_eos_token": True}),
        ("mistral", {"add_space_prefix": False}),
        ("mistral", {"scores": [float(i) for i in range(700)]}),
    ],
)
def test_a_gguf_read_by_another_rule_is_rejected(kind, wrong, loaded, tmp_path):
    tokens, own = as_gguf(kind)
    path = write_gguf(tmp_path / "model.gguf", tokens, **{**own, **wrong})
    right = loaded[kind].encode_batch(strings())
    assert Tokenizer.from_gguf(path).encode_batch(strings()) != right


def test_user_defined_tokens_of_sentencepiece_are_matched_in_the_text(tmp_path):
    """Runs of spaces, which converters write with spaces or with SentencePiece's own character."""
    for spaces in ("   ", "▁▁▁"):
        tokens = ["<unk>", "<bos>", spaces, "▁", "a", "b"]
        own = {"model": "llama", "scores": [0.0] * 6, "token_type": [2, 3, 4, 1, 1, 1]}
        own |= {"unknown_token_id": 0, "bos_token_id": 1, "add_space_prefix": False}
        tokenizer = Tokenizer.from_gguf(write_gguf(tmp_path / "m.gguf", tokens, **own))
        assert tokenizer.encode("a    b") == [1, 4, 2, 3, 5]
        assert tokenizer.decode([4, 2, 3, 5]) == "a    b"


@pytest.mark.parametrize(
    "own, says",
    [
        ({"model": "bert"}, "'bert' is not supported"),
        ({"model": "gpt2", "pre": "tekken"}, "'tekken' is not supported"),
        ({"model": "gpt2"}, "None is not supported"),
        ({"model": "gpt2", "pre": "gpt-2", "merges": ["a z"]}, "damaged"),
        ({"model": "gpt2", "pre": "gpt-2", "merges": ["a"]}, "damaged"),
        ({"model": "gpt2", "pre": "gpt-2", "token_type": [1]}, "damaged"),
        ({"model": "llama"}, "damaged"),
    ],
)
def test_a_gguf_that_cannot_be_read_says_why(own, says, tmp_path):
    path = write_gguf(tmp_path / "bad.gguf", ["a", "b"], **own)
    with pytest.raises(UserError, match=says) as raised:
        Tokenizer.from_gguf(path)
    assert "bad.gguf" in str(raised.value)


def test_a_gguf_with_a_token_twice_is_refused(tmp_path):
    with pytest.raises(UserError, match="twice"):
        Tokenizer.from_gguf(write_gguf(tmp_path / "m.gguf", ["a", "a"], model="gpt2", pre="gpt-2"))


@pytest.mark.parametrize(
    "key, value",
    [
        ("tokens", 5),
        ("tokens", "abc"),
        ("tokens", [1, 2]),
        ("token_type", 5),
        ("token_type", ["a", "b"]),
        ("merges", 7),
        ("merges", [1]),
        ("bos_token_id", "x"),
        ("bos_token_id", 1.5),
        ("bos_token_id", -1),
        ("eos_token_id", 2),
        ("eos_token_id", [1]),
        ("eot_token_id", True),
        ("unknown_token_id", "x"),
        ("chat_template", 5),
    ],
)
def test_metadata_of_another_type_is_refused(key, value, tmp_path, monkeypatch):
    path = write_gguf(tmp_path / "bad.gguf", ["a", "b"], model="gpt2", pre="gpt-2", eos_token_id=1)
    header = gguf_header.read_header(path)
    assert Tokenizer.from_gguf(path).eos_ids == (1,)
    prefix = "tokenizer." if key == "chat_template" else "tokenizer.ggml."
    header.metadata[prefix + key] = value
    monkeypatch.setattr(gguf_header, "read_header", lambda _: header)
    with pytest.raises(UserError, match=r"bad\.gguf: .*fetch the file again"):
        Tokenizer.from_gguf(path)


def test_an_id_that_means_no_padding_is_passed_over(tmp_path):
    own = {"model": "gpt2", "pre": "gpt-2", "padding_token_id": 2**32 - 1}
    assert Tokenizer.from_gguf(write_gguf(tmp_path / "m.gguf", ["a"], **own)).pad_id is None


def test_a_gguf_has_a_token_for_every_row_of_its_embedding(tmp_path, monkeypatch):
    path = write_gguf(tmp_path / "m.gguf", ["a", "b"], model="gpt2", pre="gpt-2")
    header = gguf_header.read_header(path)
    kind = GGMLQuantizationType.F32
    monkeypatch.setattr(gguf_header, "read_header", lambda _: header)
    header.tensors["token_embd.weight"] = gguf_header.Stored(kind, (2, 32), 0)
    Tokenizer.from_gguf(path)
    header.tensors["token_embd.weight"] = gguf_header.Stored(kind, (3, 32), 0)
    with pytest.raises(UserError, match=r"m\.gguf: 2 tokens for an embedding of 3 rows"):
        Tokenizer.from_gguf(path)


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_folder_loads_as_the_same_tokenizer(kind, loaded, tmp_path):
    tokenizer = dataclasses.replace(loaded[kind], eos_ids=(5, 6), chat_template="{{ messages }}")
    tokenizer.save(tmp_path / "saved")
    again = Tokenizer.from_folder(tmp_path / "saved")
    assert again.special == tokenizer.special
    assert set(again.eos_ids) >= {5, 6}
    assert again.chat_template == "{{ messages }}"
    assert again.encode_batch(strings()) == tokenizer.encode_batch(strings())
    assert sorted(p.name for p in (tmp_path / "saved").iterdir()) == [
        "chat_template.jinja",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    Tokenizer(tokenizer.backend).save(tmp_path / "saved")  # no template: the old one goes
    assert Tokenizer.from_folder(tmp_path / "saved").chat_template is None


def test_a_folder_that_cannot_be_written_is_named_and_left_as_it_was(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file"):
        Tokenizer.byte_level().save(tmp_path / "file")
    (tmp_path / "m" / "tokenizer_config.json").mkdir(parents=True)
    with pytest.raises(UserError, match=r"tokenizer_config\.json"):
        Tokenizer.byte_level().save(tmp_path / "m")
    assert not list((tmp_path / "m").glob(".*"))


def test_a_folder_s_tokenizer_json_comes_before_a_gguf_beside_it(tmp_path):
    """As the weights of a folder with a config.json do."""
    (tmp_path / "model.gguf").write_bytes(b"of something else")
    with pytest.raises(UserError, match=r"model\.gguf: not a GGUF file"):
        Tokenizer.from_path(tmp_path)
    Tokenizer.byte_level().save(tmp_path)
    assert Tokenizer.from_path(tmp_path).vocab_size == 320


def test_special_tokens_are_read_as_transformers_does(tmp_path):
    spec = write_folder("llama3", tmp_path)
    write = lambda name, value: (tmp_path / name).write_text(json.dumps(value))  # noqa: E731
    write("special_tokens_map.json", {"eos_token": {"content": "<|eot_id|>"}, "pad_token": "<p>"})
    write("generation_config.json", {"eos_token_id": [1, 2]})
    write("config.json", {"eos_token_id": 0})
    tokenizer = Tokenizer.from_folder(tmp_path)
    size = spec.get_vocab_size()
    assert tokenizer.eos_ids == (2, 0, 1)  # its own first
    assert tokenizer.pad_id == size  # one that tokenizer.json lacks is added
    assert tokenizer.vocab_size == size + 1
    declared = {str(size): {"content": "<x>", "special": False, "normalized": False}}
    write("tokenizer_config.json", {**NAMED["llama3"], "added_tokens_decoder": declared})
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.encode("<x>", add_special=False) == [size]
    assert tokenizer.pad_id is None  # the map counts only where no added tokens are declared
    assert tokenizer.decode([size]) == "<x>"


def test_truncation_and_padding_in_the_file_do_not_apply(tmp_path):
    trained = write_folder("llama3", tmp_path)
    trained.enable_truncation(2)
    trained.enable_padding()
    trained.save(str(tmp_path / "tokenizer.json"))
    short, long = Tokenizer.from_folder(tmp_path).encode_batch(["a", "a b c d e"])
    assert len(long) > 4 and len(short) == 2


def test_the_chat_template_is_found_in_order(tmp_path):
    write_folder("qwen2", tmp_path)
    assert Tokenizer.from_folder(tmp_path).chat_template is None
    several = [{"name": "rag", "template": "r"}, {"name": "default", "template": "list"}]
    write_folder("qwen2", tmp_path, chat_template=several)
    assert Tokenizer.from_folder(tmp_path).chat_template == "list"
    (tmp_path / "chat_template.json").write_text('{"chat_template": "json"}')
    assert Tokenizer.from_folder(tmp_path).chat_template == "json"
    (tmp_path / "chat_template.jinja").write_text("jinja")
    assert Tokenizer.from_folder(tmp_path).chat_template == "jinja"


@pytest.mark.parametrize(
    "name, content, says",
    [
        ("tokenizer.json", None, "no such file"),
        ("tokenizer.json", '{"model": ', "damaged"),
        ("tokenizer_config.json", "{", "not valid JSON"),
        ("tokenizer_config.json", "[]", "not a JSON object"),
        ("generation_config.json", "\x00", "not valid JSON"),
        ("tokenizer_config.json", "[" * 200_000, "not valid JSON"),
        ("tokenizer_config.json", '{"bos_token": {}}', "a wrong value"),
        ("tokenizer_config.json", '{"eos_token_ids": 5}', "a wrong value"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": {}}}', "a wrong value"),
        ("tokenizer_config.json", '{"added_tokens_decoder": 5}', "a wrong value"),
        ("tokenizer_config.json", '{"extra_special_tokens": {"a": 5}}', "a wrong value"),
        ("tokenizer_config.json", '{"chat_template": 5}', "a wrong value"),
        ("tokenizer_config.json", '{"chat_template": [5]}', "a wrong value"),
        ("config.json", '{"eos_token_id": "x"}', "'x' is given as the id"),
        ("config.json", '{"eos_token_id": -1}', "-1 is given as the id"),
        ("generation_config.json", '{"eos_token_id": [1.5]}', "1.5 is given as the id"),
    ],
)
def test_a_damaged_folder_names_the_file(name, content, says, tmp_path):
    Tokenizer.byte_level().save(tmp_path)
    (tmp_path / name).unlink(missing_ok=True)
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=says) as raised:
        Tokenizer.from_folder(tmp_path)
    assert str(tmp_path) in str(raised.value)


def test_an_end_that_the_tokenizer_has_not_is_passed_over(tmp_path):
    """As after training a preset, whose ids are of a large vocabulary, on bytes."""
    Tokenizer.byte_level().save(tmp_path)
    (tmp_path / "config.json").write_text('{"eos_token_id": [128001, 5]}')
    assert Tokenizer.from_folder(tmp_path).eos_ids == (257, 5)


def test_bytes_are_tokens_and_come_back(tmp_path):
    tokenizer = Tokenizer.byte_level()
    assert tokenizer.vocab_size % 64 == 0
    for text in strings():
        ids = tokenizer.encode(text, add_special=False)
        assert ids == list(text.encode())
        assert tokenizer.decode(ids) == text
    assert tokenizer.encode("<|bos|>")[0] == tokenizer.bos_id == 256
    assert tokenizer.encode("<|bos|>").count(256) == 1
    tokenizer.save(tmp_path)
    assert Tokenizer.from_folder(tmp_path).encode("<|bos|>é") == tokenizer.encode("<|bos|>é")


def test_what_is_no_text_is_refused():
    tokenizer = Tokenizer.byte_level()
    with pytest.raises(UserError, match=r"character 1 is the lone surrogate U\+D800"):
        tokenizer.encode("a\ud800")
    with pytest.raises(UserError, match="bytes is not text"):
        tokenizer.encode(b"a")  # pyright: ignore[reportArgumentType]
    with pytest.raises(UserError, match="NoneType"):
        tokenizer.encode_batch(["a", None])  # pyright: ignore[reportArgumentType]


def test_a_vocabulary_beyond_the_models_is_refused():
    tokenizer = Tokenizer.byte_level()
    tokenizer.check(SimpleNamespace(vocab_size=320))  # pyright: ignore[reportArgumentType]
    with pytest.raises(UserError, match=r"ids up to 319.*vocab_size=319"):
        tokenizer.check(SimpleNamespace(vocab_size=319))  # pyright: ignore[reportArgumentType]


def test_a_token_added_beyond_the_models_rows_is_let_through():
    backend = Backend(models.WordLevel({str(i): i for i in range(10)}, "0"))
    backend.add_special_tokens(["<image>"])
    tokenizer = Tokenizer(backend)
    tokenizer.check(SimpleNamespace(vocab_size=10))  # pyright: ignore[reportArgumentType]
    with pytest.raises(UserError, match=r"ids up to 9 .*vocab_size=9"):
        tokenizer.check(SimpleNamespace(vocab_size=9))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    "ids, rows, fits",
    [
        (151_669, 151_936, True),  # Qwen 3: rows to a round number
        (50_295, 51_200, True),  # Phi 2
        (320, 320, True),
        (259, 128_256, True),  # bytes, for a model trained from nothing
        (49_152, 128_256, False),  # SmolLM2's for Llama 3
        (32_000, 262_144, False),  # Llama 2's for Gemma 3
        (151_669, 128_256, False),
    ],
)
def test_the_vocabulary_of_another_model_is_refused(ids, rows, fits):
    tokenizer = Tokenizer(Backend(models.WordLevel({str(i): i for i in range(ids)}, "0")))
    config: Any = SimpleNamespace(vocab_size=rows)
    if fits:
        return tokenizer.check(config)
    with pytest.raises(UserError, match="use the tokenizer that belongs to the model"):
        tokenizer.check(config)


def check_stream(tokenizer, ids, skip=True):
    whole = tokenizer.decode(ids, skip_special=skip)
    stream = tokenizer.stream(skip_special=skip)
    for _ in range(2):  # a finished stream starts anew
        deltas = [stream.push(i) for i in ids]
        assert "".join(deltas) + stream.finish() == whole


@given(ids=st.lists(st.integers(0, 720), max_size=40), skip=st.booleans())
@pytest.mark.parametrize("kind", [*KINDS, "byte"])
def test_streamed_deltas_join_to_the_whole(kind, loaded, ids, skip):
    check_stream(loaded[kind], ids, skip)


@given(content=st.binary(max_size=40))
@pytest.mark.parametrize("kind", ["byte", "mistral"])
def test_streamed_bytes_join_to_the_whole_where_they_are_no_text(kind, loaded, content):
    backend = loaded[kind].backend
    byte = [f"<0x{b:02X}>" for b in range(256)] if kind == "mistral" else byte_alphabet()
    check_stream(loaded[kind], [backend.token_to_id(byte[b]) for b in content])


@pytest.mark.parametrize("kind", [*KINDS, "byte"])
def test_streamed_texts_come_back_and_are_not_held_for_long(kind, loaded):
    for text in strings()[:400]:
        check_stream(loaded[kind], loaded[kind].encode(text))
    stream, plain = loaded[kind].stream(), "the next token"
    ids = loaded[kind].encode(plain, add_special=False)
    assert "".join(stream.push(i) for i in ids) == plain  # nothing is held back


@pytest.mark.parametrize("kind", [*KINDS, "byte"])
def test_decoding_token_by_token_is_rejected(kind, loaded):
    """It breaks characters of several tokens, or loses the space before a piece."""
    text = "the \U00012345 token"
    ids = loaded[kind].encode(text, add_special=False)
    assert loaded[kind].decode(ids) == text
    assert "".join(loaded[kind].decode([i]) for i in ids) != text


def test_a_decoder_that_needs_the_whole_text_says_so(tmp_path):
    tokenizer = Tokenizer(train("smollm"))
    tokenizer.backend.decoder = None
    with pytest.raises(UserError, match="cannot be streamed"):
        tokenizer.stream()


def test_the_module_imports_no_jax():
    code = "import sys, jaxinfra.text; assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
