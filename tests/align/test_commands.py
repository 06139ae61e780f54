"""`jaxinfra align` on fixed data: its flags, its plan, its run, and what it refuses."""

import io
import json

import pytest
from rich.console import Console

from align.commands import COMMANDS
from align.trainer_config import DPO, METHODS, LoRA
from align.trainer_plan import plan
from jaxinfra import cli
from jaxinfra.errors import UserError
from jaxinfra.train.config import OptimizerConfig
from tests.align.trainers import MODEL, jsonl, model_file


def run(*argv):
    cli.main(["align", *map(str, argv)])


def test_every_method_has_its_command(capsys):
    assert set(METHODS) == {"sft", "reward", "dpo", "kto", "orpo", "simpo", "gdpo"}
    assert set(METHODS) <= set(COMMANDS)
    for name, config in METHODS.items():
        with pytest.raises(SystemExit):
            run(name, "--help")
        shown = " ".join(capsys.readouterr().out.split())
        assert "--lora.rank INT" in shown and "--dry-run" in shown
        assert (config.__doc__ or "").split(":")[0][:40] in shown


def count(*, rank=0):
    """Numbers of MODEL's parameters, or of adapters of q and down."""
    c = MODEL
    if rank:
        inner = c.num_heads * c.head_dim
        return c.num_layers * rank * (c.d_model + inner + c.d_ff + c.d_model)
    heads = 2 * c.num_heads + 2 * c.num_kv_heads
    layer = c.d_model * heads * c.head_dim + 3 * c.d_model * c.d_ff
    return c.vocab_size * c.d_model + c.d_model + c.num_layers * (
        layer + 2 * c.d_model + 2 * c.head_dim
    )  # fmt: skip


def planned(tmp_path, **options):
    config = DPO(model=model_file(tmp_path), out=tmp_path / "run", max_length=16, batch_size=4,
                 steps=6, **options)  # fmt: skip
    with io.StringIO() as shown:
        told = plan(config, Console(file=shown, width=200))
        return told, shown.getvalue()


def test_the_plan_counts_bytes_and_trains_nothing(tmp_path):
    told, shown = planned(tmp_path)
    assert told["frozen"] == 0 and told["temporary"] > 0
    assert abs(told["trained"] - 12 * count()) < 100  # counters beside parameters and moments
    assert told["donated"] >= told["trained"] - 100
    assert told["tokens"] == 4 * 2 * 4 and told["epochs"] == 2.0
    assert "2.0 epochs" in shown and "12 rows of 2 x 16 tokens" in shown
    assert "memory in all" in shown and not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_the_plan_of_adapters(tmp_path, name):
    """Muon takes no factors of adapters for matrices of layers: they go to Adam."""
    lora = LoRA(rank=2, targets=("q", "down"))
    told, _ = planned(tmp_path, lora=lora, optimizer=OptimizerConfig(name=name))
    assert told["frozen"] == 4 * count() and abs(told["trained"] - 12 * count(rank=2)) < 100


@pytest.mark.slow
def test_the_plan_of_a_mesh_counts_a_devices_share(tmp_path):
    one, two = (planned(tmp_path, mesh=mesh)[0] for mesh in (None, "fsdp=2"))
    assert 0.5 <= two["trained"] / one["trained"] < 0.52  # norms of heads are whole on both


@pytest.mark.slow
def test_a_plan_from_the_command_line(tmp_path, capsys):
    run("dpo", "--dry-run", "--model", model_file(tmp_path), "--max-length", 16, "--lora.rank", 2,
        "--lora.targets", "q", "down", "--batch-size", 4, "--steps", 6)  # fmt: skip
    assert "2.0 epochs" in capsys.readouterr().out


@pytest.mark.slow
def test_a_run_from_the_command_line(tmp_path, capsys):
    out = tmp_path / "run"
    records = [{"prompt": "1+1=", "completion": "2"}, {"prompt": "1+2=", "completion": "3" * 40}]
    flags = ("sft", "--data", jsonl(tmp_path, records), "--model", model_file(tmp_path),
             "--out", out, "--max-length", 20, "--steps", 2, "--batch-size", 2)  # fmt: skip
    run(*flags)
    shown = " ".join(capsys.readouterr().out.split())
    assert "1 answers were cut at max_length=20" in shown and "the model is in" in shown
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2] and rows[0]["tokens"] == 7 + 20
    with pytest.raises(SystemExit) as stopped:
        run(*flags)
    assert stopped.value.code == 2 and "add --resume" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["dpo", "--data", "/no/such.jsonl", "--max-length", "16"], "/no/such.jsonl: no such file"),
        (["dpo", "--steps", "0"], "dpo: steps=0: give 1 or more"),
        (["sft", "--batch-size", "6", "--accumulate", "4"], "sft: batch_size=6 is not a multiple"),
        (["dpo", "--loss.kind", "exo_pair"], "exo_pair needs label_smoothing"),
        (["dpo", "--lora.rank", "9999"], "lora: rank=9999 does not fit"),
        (["dpo", "--tail-weight", "2"], "dpo: tail_weight=2.0"),
        (["orpo", "--resume"], "holds no run to resume"),
        (["kto", "--validation", "1"], "kto: validation=1.0"),
        (["dpo", "--finetune", "/no/such/model"], "/no/such/model: no such file"),
        (["reward", "--max-length", "9999"], "max_length=9999 exceeds the model's max_seq_len"),
    ],
)
def test_bad_wishes_are_told_in_one_line(tmp_path, capsys, argv, words):
    with pytest.raises(SystemExit) as stopped:
        run(argv[0], "--out", tmp_path / "run", *argv[1:])
    shown = capsys.readouterr()
    assert stopped.value.code == 2
    assert words in shown.err + shown.out, shown
    assert not (tmp_path / "run").exists()


def test_an_unknown_loss_is_refused(capsys):
    with pytest.raises(SystemExit):
        run("dpo", "--loss.kind", "dpo")
    with pytest.raises(UserError, match="beta=-1"):
        DPO().loss.__class__(beta=-1.0)
