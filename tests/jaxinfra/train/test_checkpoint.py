"""Checkpoints: the same bits back, the wrong run refused, damage passed over, a full disk."""

import logging
import shutil

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from jaxinfra.errors import UserError
from jaxinfra.train.checkpoint import Checkpoints, checksum
from tests.jaxinfra.train.tiny import DENSE, equal_bits, start, tokens

ABOUT = {"model": {"layers": 2, "windows": (1, 2)}, "batch": {"rows": 4, "seq_len": 8}}
HOW = {"steps": 4, "remat": "none"}
BATCH = {"tokens": tokens(2, 8)}


def like(state):
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), state)


def saved(folder, steps=2, keep=3):
    """A folder with checkpoints of steps 1, ..., `steps`; the states, as numpy arrays."""
    state, step = start(DENSE)
    checkpoints, states = Checkpoints(folder, ABOUT, keep, HOW), {}
    for number in range(1, steps + 1):
        state, _ = step(state, BATCH)
        states[number] = jax.tree.map(np.array, state)
        checkpoints.save(state)  # and the next step donates it at once
    state, _ = step(state, BATCH)
    checkpoints.finish()
    checkpoints.close()
    return states


def restored(folder, about=ABOUT, how=None):
    checkpoints = Checkpoints(folder, about, 3, how or HOW)
    try:
        return checkpoints.restore(like(start(DENSE)[0]))
    finally:
        checkpoints.close()


def test_the_newest_comes_back_bit_by_bit_and_the_last_k_are_kept(tmp_path):
    states = saved(tmp_path, steps=4, keep=2)
    assert equal_bits(restored(tmp_path), states[4])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["3", "4"]


def test_an_empty_folder_has_none(tmp_path):
    assert restored(tmp_path / "new") is None


def test_another_run_is_refused_and_what_differs_is_named(tmp_path):
    saved(tmp_path, steps=1)
    other = {"model": ABOUT["model"], "batch": {"rows": 8, "seq_len": 8}, "data": "x"}
    with pytest.raises(UserError, match=r"1: is of another run: batch.rows was 4, now 8; data was"):
        restored(tmp_path, other)


def test_what_may_change_is_told_when_it_does(tmp_path, caplog):
    states = saved(tmp_path, steps=1)
    with caplog.at_level(logging.WARNING, "jaxinfra.train.checkpoint"):
        assert equal_bits(restored(tmp_path), states[1])
        assert not caplog.text
        assert equal_bits(restored(tmp_path, how=HOW | {"steps": 8}), states[1])
    assert "1: steps was 4, now 8; not the bits of an uninterrupted run" in caplog.text


def _truncate(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def _flip(file):
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 4
    file.write_bytes(bytes(raw))


@pytest.mark.parametrize("damage", [_truncate, _flip, lambda file: file.unlink()])
@pytest.mark.slow
def test_a_damaged_one_is_passed_over_with_a_warning(tmp_path, damage, caplog):
    states = saved(tmp_path)
    files = [path for path in (tmp_path / "2" / "state").rglob("d/*") if path.is_file()]
    damage(max(files, key=lambda path: path.stat().st_size))
    with caplog.at_level(logging.WARNING, "jaxinfra.train.checkpoint"):
        checkpoints = Checkpoints(tmp_path, ABOUT, 3, HOW)
        state = checkpoints.restore(like(start(DENSE)[0]))
    assert equal_bits(state, states[1])
    assert "2: damaged, passed over" in caplog.text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2.damaged"]
    # The run goes on from there and writes step 2 anew.
    state, _ = start(DENSE)[1](state, BATCH)
    checkpoints.save(state)
    checkpoints.finish()
    checkpoints.close()
    assert equal_bits(restored(tmp_path), states[2])


def test_a_half_written_one_is_never_looked_at(tmp_path):
    states = saved(tmp_path)
    half = tmp_path / "3.orbax-checkpoint-tmp"
    shutil.copytree(tmp_path / "2", half)
    (half / "_CHECKPOINT_METADATA").unlink()
    assert equal_bits(restored(tmp_path), states[2])


def test_when_none_is_whole_a_usererror_says_so(tmp_path):
    saved(tmp_path)
    for folder in list(tmp_path.iterdir()):
        shutil.rmtree(folder / "state" / "d")
        shutil.rmtree(folder / "state" / "ocdbt.process_0")
    with pytest.raises(UserError, match="none of 2 checkpoints can be read"):
        restored(tmp_path)


def test_a_full_disk_leaves_the_one_before(tmp_path, monkeypatch):
    states = saved(tmp_path, steps=1)
    state, step = start(DENSE)
    state, _ = step(jax.device_put(states[1]), BATCH)
    checkpoints = Checkpoints(tmp_path, ABOUT, 1, HOW)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(UserError, match=r"2: the disk is full; make room .* are whole: 1\)"):
        checkpoints.save(state)
    (tmp_path / "3.orbax-checkpoint-tmp").mkdir()  # as a thread leaves it that could not go on
    monkeypatch.undo()
    # There was room, and while it is written there is none any more.

    async def full(*_, **__):
        raise ValueError("RESOURCE_EXHAUSTED: write failed: No space left on device")

    handler = ocp.type_handlers.ArrayHandler
    monkeypatch.setattr(handler, "serialize", full)
    with pytest.raises(UserError, match="the disk is full"):
        checkpoints.save(state)
        checkpoints.finish()
    checkpoints.close()
    monkeypatch.undo()
    assert not (tmp_path / "3.orbax-checkpoint-tmp").exists()
    assert equal_bits(restored(tmp_path), states[1])


def test_orbax_s_threads_print_no_tracebacks(tmp_path, caplog):
    checkpoints = Checkpoints(tmp_path, ABOUT, 1, HOW)
    logging.getLogger("absl").error("a traceback")
    assert not caplog.records
    checkpoints.close()
    logging.getLogger("absl").error("of somebody else")
    assert len(caplog.records) == 1


def test_the_checksum_sees_every_changed_and_every_moved_word():
    a = {"x": np.arange(12, dtype=np.float32).reshape(3, 4), "y": np.ones(5, np.int32)}
    whole = int(checksum(a))
    assert whole == int(checksum(jax.tree.map(np.copy, a)))
    for row, column in np.ndindex(3, 4):
        for bit in (0, 7, 31):
            b = jax.tree.map(np.copy, a)
            b["x"].view(np.uint32)[row, column] ^= np.uint32(1 << bit)
            assert int(checksum(b)) != whole
    moved = {"x": a["x"][::-1].copy(), "y": a["y"]}
    assert int(checksum(moved)) != whole
    # Where numbers have few bits set, a plain weighted sum of words would miss this.
    far = np.ones(1024, np.float32)
    far[0], swapped = 2.0, np.ones(1024, np.float32)
    swapped[256] = 2.0
    assert int(checksum({"x": far})) != int(checksum({"x": swapped}))
