"""Records become rows: what is learnt of them, what is cut, and errors that name the record."""

import json
import sys
import types

import numpy as np
import pytest

from align import synthetic
from align.preferences import rows, sources
from align.preferences.encode import Encoder, Sequence
from align.trainer import check
from align.trainer_config import DPO, GDPO, KTO, SFT, LoRA, Reward
from jaxinfra.errors import UserError
from jaxinfra.text.tokenizer import Tokenizer
from tests.align.trainers import MODEL, TOKENIZER, jsonl

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
FORGETFUL = TEMPLATE.replace("{{ m.content }}", "{{ m.content if loop.last else '' }}")


def chat(template=TEMPLATE):
    plain = Tokenizer.byte_level()
    return Tokenizer(plain.backend, plain.special, plain.eos_ids, template)


def said(role, content):
    return {"role": role, "content": content}


def text(s: Sequence) -> tuple[str, str]:
    """The prompt, and the answer with what is not learnt as dots."""
    answer = [token if learnt else ord(".") for token, learnt in zip(s.answer, s.mask, strict=True)]
    return TOKENIZER.decode(s.prompt), TOKENIZER.decode(answer, skip_special=False)


def test_text_ends_with_its_end_and_its_prompt_is_not_learnt():
    s = Encoder(TOKENIZER).answer("x:1", {"prompt": "2+2=", "chosen": "4"}, "chosen")
    assert s == Sequence([256, *b"2+2="], [*b"4", 257], [1, 1])
    s = Encoder(TOKENIZER).supervised("x:1", {"text": "ab"})
    assert s == Sequence([256], [*b"ab", 257], [1, 1, 1])


def test_messages_go_through_the_chat_template():
    encode = Encoder(chat())
    prompt, answer = [said("user", "hi")], [said("assistant", "hello")]
    wanted = ("<user>hi</><assistant>", "hello</>")
    assert text(encode.answer("x:1", {"prompt": prompt, "chosen": answer}, "chosen")) == wanted
    assert text(encode.answer("x:1", {"chosen": prompt + answer}, "chosen")) == wanted
    record = {"prompt": "hi", "chosen": prompt + answer}  # the prompt once more as text
    assert text(encode.answer("x:1", record, "chosen")) == wanted


def test_every_turn_of_the_assistant_is_learnt_and_no_other():
    turns = [said("system", "s"), said("user", "a"), said("assistant", "AB"),
             said("user", "cd"), said("assistant", "EF")]  # fmt: skip
    prompt, answer = text(Encoder(chat()).supervised("x:1", {"messages": turns}))
    assert prompt == "<system>s</><user>a</><assistant>"
    between = "<user>cd</><assistant>"
    assert answer == "AB</>" + "." * len(between) + "EF</>"
    only = Encoder(chat()).answer("x:1", {"prompt": turns[:4], "completion": turns[4:]},
                                  "completion")  # fmt: skip
    assert text(only)[1] == "EF</>" and text(only)[0].endswith("cd</><assistant>")


def test_a_template_that_rewrites_earlier_turns_is_refused_only_where_it_matters():
    turns = [said("user", "a"), said("assistant", "AB"), said("user", "c"), said("assistant", "D")]
    with pytest.raises(UserError, match=r"x:1: the chat template changes earlier turns"):
        Encoder(chat(FORGETFUL)).supervised("x:1", {"messages": turns})
    Encoder(chat(FORGETFUL)).answer("x:1", {"prompt": turns[:3], "chosen": turns[3:]}, "chosen")


def test_rows_are_padded_alike_and_truncation_is_told(tmp_path):
    records = [
        {"prompt": "p", "chosen": "c" * 30, "rejected": "r"},
        {"prompt": "q" * 40, "chosen": "c", "rejected": "r"},
        {"prompt": "p", "chosen": "c", "rejected": "r"},
    ]
    found = rows.build(DPO(data=jsonl(tmp_path, records), max_length=20), TOKENIZER)
    assert len(found) == 2 and found.cut == 1 and found.dropped == 1
    words = found.told(20)
    assert "1 answers were cut at max_length=20" in words and "1 rows dropped" in words
    a = found.arrays
    assert a["tokens"].shape == (2, 2, 20) and a["mask"].shape == (2, 2, 18)
    assert a["sizes"].tolist() == [[20, 4], [4, 4]] and (a["lengths"] == 2).all()
    assert a["mask"].sum(axis=2).tolist() == [[18, 2], [2, 2]]
    assert a["tokens"][1, 0].tolist() == [256, *b"pc", 257] + [0] * 16
    with pytest.raises(UserError, match=r"no prompt leaves room .* max_length=3; raise it"):
        rows.build(DPO(data=jsonl(tmp_path, [records[1]]), max_length=3), TOKENIZER)


def test_kto_compares_with_the_answer_of_another_record(tmp_path):
    triples = (("1", "a", True), ("2", "b", False), ("3", "c", True))
    records = [{"prompt": p, "completion": c, "label": good} for p, c, good in triples]
    found = rows.build(KTO(data=jsonl(tmp_path, records)), TOKENIZER)
    pairs = [[bytes(row[1:3].tolist()) for row in rows] for rows in found.arrays["tokens"]]
    assert pairs == [[b"1a", b"1c"], [b"2b", b"2a"], [b"3c", b"3b"]]
    assert found.arrays["label"].tolist() == [True, False, True]


def test_beliefs_are_counted_for_each_prompt_or_given(tmp_path):
    def record(prompt, belief, **more):
        return {"prompt": prompt, "belief": belief, "chosen": "c", "rejected": "r", **more}

    records = [record("1", "X"), record("1", "X"), record("1", "Y"), record("2", "Y"),
               record("2", "Y", target={"X": 1, "Y": 3})]  # fmt: skip
    found = rows.build(GDPO(data=jsonl(tmp_path, records)), TOKENIZER)
    assert found.beliefs == (ord("X"), ord("Y"))
    assert found.arrays["belief"].tolist() == [0, 0, 1, 1, 1]
    wanted = [[2 / 3, 1 / 3]] * 3 + [[0, 1], [0.25, 0.75]]
    np.testing.assert_allclose(found.arrays["target"], wanted, rtol=1e-6)
    assert found.arrays["tokens"][0, 0, :4].tolist() == [256, *b"1Xc"]
    assert (found.arrays["lengths"] == 3).all()  # the belief is not learnt as an answer


def test_an_epoch_goes_through_all_training_rows_and_no_other():
    arrays = {"tokens": np.arange(11)}
    data = rows.Batches(arrays, batch_size=4, seed=3, validation=0.2)
    assert (data.held_out, data.training) == (2, 9)
    seen = np.concatenate([data.batch_at(step)["tokens"] for step in range(9)])
    held = [batch["tokens"].tolist() for batch in data.validation_batches()]
    for epoch in seen.reshape(4, 9):
        assert sorted([*epoch, *held[0]]) == list(range(11))
    assert (seen[:9] != seen[9:18]).any()
    again = rows.Batches(arrays, batch_size=4, seed=3, validation=0.2).batch_at(5)["tokens"]
    assert (again == seen[20:24]).all()  # known without the batches before


def test_the_synthetic_set_has_the_odds_it_says():
    pairs = [(r["chosen"], r["rejected"]) for r in synthetic.records("dpo")]
    for a, w in synthetic.WEIGHTS.items():
        for b, v in synthetic.WEIGHTS.items():
            if a != b:
                won, lost = pairs.count((a, b)), pairs.count((b, a))
                assert won / (won + lost) == w / (w + v)


GOOD = {"prompt": "p", "chosen": "c", "rejected": "r"}
BAD = {
    "missing": (DPO, {"prompt": "p", "chosen": "c"}, "lacks the field rejected; it has prompt"),
    "empty answer": (DPO, GOOD | {"rejected": ""}, "rejected is empty"),
    "no messages": (DPO, GOOD | {"chosen": []}, "chosen is empty"),
    "a number": (DPO, GOOD | {"chosen": 3}, "chosen is a int; give text or messages"),
    "mixed": (DPO, GOOD | {"prompt": [said("user", "p")]}, "make them alike"),
    "no template": (DPO, GOOD | {"chosen": [said("user", "p"), said("assistant", "c")]},
                    "the tokenizer has no chat template"),
    "nothing of sft": (SFT, {"question": "p"}, "none of messages, text, prompt with completion"),
    "no prompt": (SFT, {"completion": "c"}, "lacks the field prompt"),
    "label": (KTO, {"prompt": "p", "completion": "c", "label": 1}, "label is 1; give true"),
    "margin": (Reward, GOOD | {"margin": "big"}, "margin is 'big'; give a number"),
    "belief": (GDPO, GOOD, "lacks the field belief"),
    "long belief": (GDPO, GOOD | {"belief": "two"}, "belief 'two' is 3 tokens"),
    "target": (GDPO, GOOD | {"belief": "X", "target": [1]}, "give a share for each belief"),
    "surrogate": (DPO, GOOD | {"chosen": "\ud800"}, "lone surrogate"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_records_are_named(tmp_path, name):
    kind, record, words = BAD[name]
    good = (
        {"text": "t"} if kind is SFT else GOOD | {"completion": "c", "label": True, "belief": "X"}
    )
    file = jsonl(tmp_path, [good, record])
    with pytest.raises(UserError, match=words) as raised:
        rows.build(kind(data=file), TOKENIZER)
    assert str(raised.value).startswith(f"{file}:2: ")


@pytest.mark.parametrize(
    ("line", "words"),
    [('{"prompt": "p"', "data.jsonl:3: not valid JSON"), ("[1]", "data.jsonl:3: a list, not a"),
     ("[" * 100_000, "data.jsonl:3: not valid JSON")],
)  # fmt: skip
def test_a_malformed_line_is_named_by_its_number(tmp_path, line, words):
    file = tmp_path / "data.jsonl"
    file.write_text(json.dumps(GOOD) + "\n\n" + line + "\n")
    with pytest.raises(UserError, match=words):
        sources.read(str(file), "dpo")


def test_files_that_hold_nothing_or_are_none(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(UserError, match="holds no records"):
        sources.read(str(tmp_path / "empty.jsonl"), "dpo")
    with pytest.raises(UserError, match=r"no such file; give a \.jsonl file"):
        sources.read("nowhere.jsonl", "dpo")
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "\xe9"}\n')
    with pytest.raises(UserError, match="not UTF-8"):
        sources.read(str(tmp_path / "latin.jsonl"), "dpo")
    with pytest.raises(UserError, match="one belief or none"):
        rows.build(GDPO(data=jsonl(tmp_path, [GOOD | {"belief": "X"}])), TOKENIZER)


def test_hugging_face_datasets(monkeypatch):
    """Rows of the split train; and what is said where the hub, or the package, is not there."""
    library = types.ModuleType("datasets")
    library.__spec__ = types.SimpleNamespace(name="datasets")  # pyright: ignore
    library.load_dataset = lambda name, split: [GOOD] * 2  # pyright: ignore
    monkeypatch.setitem(sys.modules, "datasets", library)
    found = sources.read("hf:some/pairs", "dpo")
    assert found == [("hf:some/pairs:0", GOOD), ("hf:some/pairs:1", GOOD)]

    def offline(name, split):
        raise ConnectionError("no route to the hub\nand more")

    library.load_dataset = offline  # pyright: ignore
    with pytest.raises(UserError, match=r"cannot be loaded \(no route to the hub\); check name"):
        sources.read("hf:some/pairs", "dpo")
    monkeypatch.setattr(sources.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install datasets"):
        sources.read("hf:some/pairs", "dpo")


def test_a_tokenizer_a_length_or_a_rank_that_does_not_fit():
    with pytest.raises(UserError, match="vocab_size=200; use the tokenizer that belongs"):
        check(DPO(max_length=16), MODEL.replace(vocab_size=200), TOKENIZER)
    with pytest.raises(UserError, match="max_length=512 exceeds the model's max_seq_len=32"):
        check(DPO(), MODEL, TOKENIZER)
    with pytest.raises(UserError, match="rank=99 does not fit"):
        check(DPO(max_length=16, lora=LoRA(rank=99)), MODEL, TOKENIZER)
    check(DPO(max_length=32, lora=LoRA(rank=4)), MODEL, TOKENIZER)
