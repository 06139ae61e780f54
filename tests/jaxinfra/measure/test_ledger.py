"""The ledger keeps what it takes to doubt a figure, and its tables follow it."""

import dataclasses
import json

import pytest

from benchmarks import tables
from jaxinfra.errors import UserError
from jaxinfra.measure import Entry, environment, read_all, write

ENTRY = Entry(
    name="walk", claim="Walking beats standing", command="walk --far", unit="m/s",
    samples={"ours": [2.0, 2.2, 2.1], "theirs": [1.0, 1.1, 1.0]}, ratio=2.1, interval=(1.9, 2.2),
    roofline="7 % of a sprint", inputs="one road", mislead="downhill",
    environment={"device": "legs", "jax": "0.0"},
)  # fmt: skip


def test_round_trip(tmp_path):
    path = write(ENTRY, tmp_path)
    assert read_all(tmp_path) == [ENTRY]
    assert path.read_bytes() == write(ENTRY, tmp_path).read_bytes()


@pytest.mark.parametrize("field", ["claim", "command", "mislead", "inputs", "roofline"])
def test_what_is_left_out_is_named(field):
    with pytest.raises(UserError, match=field):
        dataclasses.replace(ENTRY, **{field: ""})


def test_samples_and_interval_are_asked_for():
    with pytest.raises(UserError, match="samples"):
        dataclasses.replace(ENTRY, samples={"ours": []})
    with pytest.raises(UserError, match="interval"):
        dataclasses.replace(ENTRY, interval=None)


def test_a_damaged_file_is_named(tmp_path):
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(UserError, match=r"bad\.json"):
        read_all(tmp_path)


def test_conditions_name_no_place():
    found = environment()
    assert found["jax"] and found["python"] and found["device"]
    assert "/" not in str(found["cpu"]) and "/root" not in json.dumps(found)


def test_tables_follow_the_ledger():
    text = "before\n<!-- ledger -->\nold\n<!-- /ledger -->\nafter\n"
    shown = tables.render(text, [ENTRY])
    assert "2.10 (1.90–2.20)" in shown and "2.1 m/s" in shown and "old" not in shown
    assert tables.render(shown, [ENTRY]) == shown
    assert tables.render(text, []) == "before\n<!-- ledger -->\n<!-- /ledger -->\nafter\n"


def test_the_committed_tables_are_true():
    assert tables.main(["--check"]) == 0
