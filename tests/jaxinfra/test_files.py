"""A file appears whole or not at all, and one that cannot be written is named with the remedy."""

import errno
import os

import pytest

from jaxinfra.errors import UserError
from jaxinfra.files import write_file


def test_a_file_and_its_folder_are_made_and_what_was_there_is_replaced(tmp_path):
    for data in (b"first", b"second"):
        write_file(tmp_path / "new" / "file", data)
        assert (tmp_path / "new" / "file").read_bytes() == data
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["file"]


def test_a_full_disk_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    write_file(tmp_path / "file", b"first")

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"/file: the disk is full: 6 bytes are needed .*make room"):
        write_file(tmp_path / "file", b"second")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_bytes() == b"first"


@pytest.mark.parametrize("place", ["file/below", "folder"])
def test_a_place_that_cannot_be_written_is_named(tmp_path, place):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match=rf"/{place}: cannot be written .*; choose another place"):
        write_file(tmp_path / place, b"data")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]
