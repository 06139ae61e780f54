"""The ledger keeps what it takes to doubt a figure."""

import dataclasses
import json
import math

import pytest

from jaxinfra.errors import UserError
from jaxinfra.measure import Entry, environment, read_all, write

ENTRY = Entry(
    name="walk", claim="Walking beats standing", command="walk --far", unit="m/s",
    samples={"ours": [2.0, 2.2, 2.1], "theirs": [1.0, 1.1, 1.0]}, ratio=2.1, interval=(1.9, 2.2),
    roofline=0.07, roof="a sprint", inputs="one road", mislead="downhill",
    environment={"device": "legs", "jax": "0.0"},
)  # fmt: skip


def test_round_trip(tmp_path):
    path = write(ENTRY, tmp_path)
    before = path.read_bytes()
    assert read_all(tmp_path) == [ENTRY]
    assert write(ENTRY, tmp_path).read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["walk.json"]
    assert read_all(tmp_path / "absent") == []


def test_real_conditions_and_no_ratio(tmp_path):
    alone = dataclasses.replace(
        ENTRY, samples={"ours": [1.0]}, ratio=None, interval=None, roofline=None,
        roof="no roof: it waits for the network", environment=environment(),
    )  # fmt: skip
    write(alone, tmp_path)
    assert read_all(tmp_path) == [alone]


@pytest.mark.parametrize("field", ["name", "claim", "command", "unit", "roof", "inputs", "mislead"])
@pytest.mark.parametrize("value", ["", "  ", None])
def test_what_is_left_out_is_named(field, value):
    with pytest.raises(UserError, match=field):
        dataclasses.replace(ENTRY, **{field: value})


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("name", {"name": "../walk"}),
        ("samples", {"samples": {}}),
        ("samples", {"samples": {"ours": []}}),
        ("samples", {"samples": {"ours": [1.0, math.nan], "theirs": [1.0]}}),
        ("samples", {"samples": {"ours": [1.0]}}),
        ("interval", {"interval": None}),
        ("interval", {"interval": (2.2, 1.9)}),
        ("ratio", {"ratio": -1.0}),
        ("ratio", {"ratio": math.inf}),
        ("roofline", {"roofline": 0.0}),
        ("environment", {"environment": {"jax": "0.0"}}),
    ],
)
def test_the_impossible_is_named(field, change):
    with pytest.raises(UserError, match=field):
        dataclasses.replace(ENTRY, **change)


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda raw: raw.pop("mislead"), "mislead"),
        (lambda raw: raw.pop("interval"), "interval"),
        (lambda raw: raw.update(mislead=""), "mislead"),
        (lambda raw: raw.update(colour="red"), "colour"),
        (lambda raw: raw.update(interval=[1.0]), "ledger entry"),
        (lambda raw: raw.update(samples=3), "ledger entry"),
        (lambda raw: raw.update(name="run"), "its name is 'run'"),
    ],
)
def test_a_damaged_file_is_named_with_its_field(tmp_path, damage, named):
    raw = dataclasses.asdict(ENTRY)
    damage(raw)
    (tmp_path / "walk.json").write_text(json.dumps(raw))
    with pytest.raises(UserError, match=named) as caught:
        read_all(tmp_path)
    assert "walk.json" in str(caught.value)


@pytest.mark.parametrize("text", ["", "[]", "{}", '"x"', "{"])
def test_what_is_no_entry_at_all(tmp_path, text):
    (tmp_path / "bad.json").write_text(text)
    with pytest.raises(UserError, match=r"bad\.json"):
        read_all(tmp_path)
