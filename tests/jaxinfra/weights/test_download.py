"""Downloads: resumed, checked, whole or not at all, against a server with real servers' faults."""

import errno
import hashlib
import urllib.request

import numpy as np
import pytest
from file_server import serving

from jaxinfra.errors import UserError
from jaxinfra.weights import download

_CONTENT = np.random.default_rng(0).bytes(1_000_003)
_SHA256 = hashlib.sha256(_CONTENT).hexdigest()


@pytest.fixture
def server():
    with serving(_CONTENT) as running:
        yield running


def _fetch(server, file, sha256=_SHA256):
    download.fetch(server.url, file, sha256, progress=False, pause=0.001)


def test_a_file_comes_whole_and_nothing_else_stays(server, tmp_path):
    _fetch(server, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == _CONTENT
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_cut_connection_is_resumed_where_it_broke(server, tmp_path):
    server.cut_after = [300_000, 0, 400_000]
    _fetch(server, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == _CONTENT
    assert server.seen == [None, "bytes=300000-", "bytes=300000-", "bytes=700000-"]


def test_a_later_run_goes_on_from_the_part(server, tmp_path):
    server.cut_after = [500_000, 0, 0, 0, 0]
    with pytest.raises(UserError, match=r"broke off .* run it again to go on from byte 500,000"):
        _fetch(server, tmp_path / "file")
    assert not (tmp_path / "file").exists()
    server.cut_after, server.seen = [], []
    _fetch(server, tmp_path / "file")
    assert server.seen == ["bytes=500000-"]
    assert (tmp_path / "file").read_bytes() == _CONTENT


def test_a_server_without_range_starts_again(server, tmp_path):
    server.ranges, server.cut_after = False, [300_000]
    _fetch(server, tmp_path / "file")
    assert server.seen == [None, "bytes=300000-"]
    assert (tmp_path / "file").read_bytes() == _CONTENT


def test_a_whole_part_needs_no_download(server, tmp_path):
    (tmp_path / "file.part").write_bytes(_CONTENT)
    _fetch(server, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == _CONTENT


@pytest.mark.parametrize("part", [b"of another file", b"longer" * 200_000])
def test_a_part_of_another_file_is_thrown_away_once(server, tmp_path, part):
    (tmp_path / "file.part").write_bytes(part)
    _fetch(server, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == _CONTENT


def test_another_checksum_is_refused_and_nothing_stays(server, tmp_path):
    with pytest.raises(UserError, match="file: what was downloaded has another SHA-256"):
        _fetch(server, tmp_path / "file", sha256="0" * 64)
    assert not list(tmp_path.iterdir())
    assert len(server.seen) == 1


def test_a_passing_server_error_is_tried_again_and_a_refusal_is_not(server, tmp_path):
    server.status = [503, 500]
    _fetch(server, tmp_path / "file")
    server.status, server.seen = [404], []
    with pytest.raises(UserError, match="the server answers 404"):
        _fetch(server, tmp_path / "other")
    assert len(server.seen) == 1


def test_no_server_is_a_usererror(server, tmp_path):
    server.server_close()
    with pytest.raises(UserError, match="broke off"):
        _fetch(server, tmp_path / "file")


def test_a_full_disk_is_a_usererror_and_not_tried_again(server, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(download, "_continue", full)
    with pytest.raises(UserError, match="the disk is full"):
        _fetch(server, tmp_path / "file")


def test_a_disk_that_fills_up_at_the_last_flush_keeps_the_part(server, tmp_path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(UserError, match=r"/file: the disk is full .*make room"):
            _fetch(server, tmp_path / "file")
    assert (tmp_path / "file.part").read_bytes() == _CONTENT


@pytest.mark.parametrize("place", ["folder", "a file/file"])
def test_a_place_that_cannot_be_written_is_named(server, tmp_path, place):
    (tmp_path / "folder").mkdir()
    (tmp_path / "a file").touch()
    with pytest.raises(UserError, match=rf"{place}: cannot be written"):
        _fetch(server, tmp_path / place)


def test_file_addresses_work(tmp_path):
    (tmp_path / "source").write_bytes(_CONTENT)
    url = (tmp_path / "source").as_uri()
    download.fetch(url, tmp_path / "file", _SHA256, progress=False)
    assert (tmp_path / "file").read_bytes() == _CONTENT


def test_the_bar_goes_to_stderr(server, tmp_path, capsys):
    download.fetch(server.url, tmp_path / "file", _SHA256, progress=True)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "file" in captured.err


def test_a_downloader_that_appends_blindly_is_caught(server, tmp_path, monkeypatch):
    def append(url, part, bar, task):
        with urllib.request.urlopen(url) as response, open(part, "ab") as stream:
            stream.write(response.read())

    (tmp_path / "file.part").write_bytes(_CONTENT[:1000])
    monkeypatch.setattr(download, "_continue", append)
    server.content = _CONTENT[:-1]
    with pytest.raises(UserError, match="SHA-256"):
        _fetch(server, tmp_path / "file")
