"""Data: the built-in corpus, token files, and batches as a pure function of the step."""

import dataclasses
import importlib.util
import sysconfig
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxinfra.errors import UserError
from jaxinfra.text.tokenizer import Tokenizer
from jaxinfra.train import corpus, tokens
from jaxinfra.train.config import TrainConfig
from jaxinfra.train.data import Data, open_data
from jaxinfra.train.tokens import TokenFile

BYTES = Tokenizer.byte_level()
END = BYTES.eos_ids[0]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXINFRA_CACHE", str(tmp_path / "cache"))


def counted(tokens: int, **options) -> Data:
    """Data whose token at place i is i."""
    file = TokenFile(np.arange(tokens, dtype=np.uint32), "", "", None)
    return Data(file, **{"batch_size": 4, "seq_len": 5, "seed": 3, **options})


@settings(max_examples=40, deadline=None)
@given(st.integers(40, 400), st.sampled_from([0.0, 0.1, 0.5]), st.integers(0, 9))
def test_an_epoch_shows_every_training_row_once_and_none_held_out(length, validation, seed):
    data = counted(length, validation=validation, seed=seed, batch_size=1)
    n = data.training_windows
    epochs = [
        [int(data.batch_at(e * n + i)["tokens"][0, 0]) // 5 for i in range(n)] for e in range(2)
    ]
    held = [row[0] // 5 for b in data.validation_batches(10**6) for row in b["tokens"].tolist()]
    for epoch in epochs:
        assert sorted(epoch + held) == list(range((length - 1) // 5))
    assert n < 8 or epochs[0] != epochs[1]


def test_rows_hold_a_target_for_their_last_token():
    for row in counted(200).batch_at(7)["tokens"]:
        assert row.dtype == np.int32 and len(row) == 6
        assert np.array_equal(np.diff(row), np.ones(5)) and row[0] % 5 == 0


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 300), st.sampled_from([1, 2, 3, 4, 6, 12]))
def test_hosts_share_the_rows_of_every_batch_whatever_their_number(step, world):
    """Epoch ends included: 12 rows of an epoch of 18."""
    data = counted(100, batch_size=12, validation=0.05)
    parts = [data.batch_at(step, rank, world)["tokens"] for rank in range(world)]
    assert np.array_equal(np.concatenate(parts), data.batch_at(step)["tokens"])


def test_a_batch_that_hosts_cannot_share_is_refused():
    with pytest.raises(UserError, match="batch_size=4 is no multiple of 3 hosts"):
        counted(100).batch_at(0, 0, 3)


def test_too_little_text_is_refused():
    with pytest.raises(UserError, match="make 1 rows of seq_len=5, 1 of them held out"):
        counted(8, validation=0.1)


def test_documents_in_a_row_are_numbered(tmp_path):
    for name, text in (("a.txt", "abc"), ("b.txt", "defghij"), ("c.txt", "k" * 40)):
        (tmp_path / name).write_text(text)
    config = TrainConfig(
        data=str(tmp_path), seq_len=18, batch_size=1, validation=0.0, separate_documents=True
    )
    data = open_data(config, BYTES)
    rows = {int(b["tokens"][0, 1]): b for b in map(data.batch_at, range(data.training_windows))}
    first = rows[ord("a")]
    bos = BYTES.bos_id
    wanted = [bos, *b"abc", END, bos, *b"defghij", END, bos, *b"kkkk"]
    assert first["tokens"][0].tolist() == wanted
    assert first["segment_ids"][0].tolist() == [1] * 5 + [2] * 9 + [3] * 5


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=200), st.integers(1, 20))
def test_pieces_of_a_document_join_to_it(text, size):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokens, "_PIECE", size)
        pieces = list(tokens._pieces(text))
    assert "".join(pieces) == text and max(map(len, pieces)) <= size


def test_a_long_document_is_one_document(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("one line\nanother line\n" * 10)
    monkeypatch.setattr(tokens, "_PIECE", 16)
    file = tokens.tokenised(corpus.find(str(tmp_path / "a.txt")), BYTES)
    assert file.ids.dtype == np.uint16
    assert file.ids.tolist() == [BYTES.bos_id, *b"one line\nanother line\n" * 10, END]


def test_text_is_tokenised_once_and_again_when_it_changes(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_text("some text")
    first = tokens.tokenised(corpus.find(str(path)), BYTES)
    with monkeypatch.context() as patch:
        patch.setattr(tokens, "_write", lambda *_: pytest.fail("tokenised twice"))
        again = tokens.tokenised(corpus.find(str(path)), BYTES)
    assert again.sha256 == first.sha256
    path.write_text("other text")
    assert tokens.tokenised(corpus.find(str(path)), BYTES).sha256 != first.sha256


def test_token_folders_are_taken_as_they_are_if_the_tokenizer_made_them(tmp_path):
    (tmp_path / "a.txt").write_text("some text " * 50)
    tokens.tokenised(corpus.find(str(tmp_path / "a.txt")), BYTES)
    (folder,) = (tmp_path / "cache" / "tokens").iterdir()
    config = TrainConfig(data=str(folder), seq_len=8, batch_size=2)
    assert len(open_data(config, BYTES).file.ids) == 502
    about = (folder / "tokens.json").read_text()
    (folder / "tokens.json").write_text(about.replace(tokens.fingerprint(BYTES), "other"))
    with pytest.raises(UserError, match="tokenised by another tokenizer"):
        open_data(config, BYTES)


def test_damaged_token_files_are_named(tmp_path):
    (tmp_path / "a.txt").write_text("some text")
    found = corpus.find(str(tmp_path / "a.txt"))
    tokens.tokenised(found, BYTES)
    (folder,) = (tmp_path / "cache" / "tokens").iterdir()
    whole = (folder / "tokens.bin").read_bytes()
    (folder / "tokens.bin").write_bytes(whole[:-3])
    with pytest.raises(UserError, match=r"tokens.bin: has 19 bytes, tokens.json tells of 22"):
        tokens.tokenised(found, BYTES)
    about = (folder / "tokens.json").read_text()
    for damaged in ("{", about.replace(": 11,", ': "11",'), about.replace("<u2", "<f2")):
        assert damaged != about
        (folder / "tokens.json").write_text(damaged)
        with pytest.raises(UserError, match=r"tokens.json: not readable"):
            tokens.tokenised(found, BYTES)


def test_two_processes_may_tokenise_a_corpus_at_once(tmp_path):
    (tmp_path / "a.txt").write_text("some text")
    found = corpus.find(str(tmp_path / "a.txt"))

    def documents():
        tokens.tokenised(found, BYTES)  # the other process ends first
        return found.documents()

    file = tokens.tokenised(dataclasses.replace(found, documents=documents), BYTES)
    assert file.ids.tolist() == [BYTES.bos_id, *b"some text", END]
    assert len(list((tmp_path / "cache" / "tokens").iterdir())) == 1


def test_the_standard_library_without_its_tests_in_a_fixed_order():
    found = corpus.standard_library()
    documents = list(found.documents())
    assert len(documents) > 300 and found.size > 5e6
    assert documents == list(corpus.standard_library().documents())
    root = Path(sysconfig.get_path("stdlib"))
    assert (root / "json" / "decoder.py").read_text() in documents
    assert not any("class TestCase(" in text and "import test." in text for text in documents)


def test_folders_are_read_in_order_without_what_is_not_text(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "x.md").write_text("second")
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "c.png").write_bytes(b"\x89PNG\xff\xfe")
    (tmp_path / ".hidden").write_text("no")
    assert list(corpus.find(str(tmp_path)).documents()) == ["first", "second"]


def test_bad_sources_are_named(tmp_path):
    with pytest.raises(UserError, match="nowhere: no such file or folder; give one, or stdlib"):
        corpus.find("nowhere")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match=r"latin\.txt: not UTF-8"):
        tokens.tokenised(corpus.find(str(tmp_path / "latin.txt")), BYTES)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty: holds no text"):
        tokens.tokenised(corpus.find(str(tmp_path / "empty")), BYTES)
    assert not list((tmp_path / "cache" / "tokens").iterdir())


def test_datasets_need_their_package():
    if importlib.util.find_spec("datasets"):
        pytest.skip("datasets is installed")
    with pytest.raises(UserError, match="this needs `pip install datasets`"):
        corpus.find("hf:owner/name")
