"""Tasks in words: reasoning-gym's questions and scores, and a run of a model that speaks."""

import io
from typing import Any

import jax
import numpy as np
import pytest
from rich.console import Console

from align import online
from align.config import RLConfig
from align.online_commands import GRPO
from align.rewards import Answers
from align.rollout import Rollout
from align.text_tasks import TEXT_TASKS
from jaxinfra import load
from jaxinfra.errors import UserError
from jaxinfra.model import params as P
from jaxinfra.model.config import ModelConfig
from jaxinfra.text.tokenizer import Tokenizer
from jaxinfra.train.metrics import read_metrics
from jaxinfra.weights import safetensors

TOKENIZER = Tokenizer.byte_level()
NUMBERS = ["", "7", " 7\n", "07", "7.0", "the answer is 7", "-7", "77", "1,000", "seven"]
SAID = {
    "chain_sum": NUMBERS,
    "products": NUMBERS,
    "spell_backward": ["", "sun", "Sun", "su", "sunny", "nus", "sxn", "xsun", " sun "],
}
ANSWER = {"chain_sum": "7", "products": "7", "spell_backward": "sun"}
TINY = {"chain_sum": "1-2=", "products": "1*2=", "spell_backward": "abc="}


@pytest.mark.parametrize("name", sorted(TEXT_TASKS))
def test_scores_and_questions_are_reasoning_gyms(name):
    gym = pytest.importorskip("reasoning_gym").create_dataset(name, size=50, seed=0)
    task = TEXT_TASKS[name]
    for said in SAID[name]:
        want = gym.score_answer(said.strip(), {"answer": ANSWER[name]})
        assert task.score(said, ANSWER[name]) == pytest.approx(want), said
    question, begin = gym[0]["question"], task.ask(TINY[name])
    assert question.split(":")[0] == begin.split(":")[0]
    assert question.partition(".")[2] == begin.partition(".")[2]
    rng = np.random.default_rng(0)
    for _ in range(50):
        prompt, answer, _ = task.draw(rng)
        said = task.ask(prompt).rpartition(":")[2].partition(".")[0].strip(" =")
        assert answer == (said[::-1] if name == "spell_backward" else str(eval(said)))


def test_examples_stand_before_each_question_and_are_never_asked():
    task = TEXT_TASKS["products"].easy()
    shown = task.examples(3)
    problems, answers = task.problems(300, TOKENIZER, seed=1, examples=3)
    plain, _ = task.problems(300, TOKENIZER, seed=1)
    texts = [TOKENIZER.decode(row[:n]) for row, n in
             zip(problems["prompts"], problems["lengths"], strict=True)]  # fmt: skip
    begin = "".join(f"{task.ask(prompt)} {answer}\n" for prompt, answer in shown.items())
    assert all(text.startswith(begin) for text in texts)
    asked = {text.removeprefix(begin) for text in texts}
    assert len(shown) == 3 and not asked & {task.ask(prompt) for prompt in shown}
    assert any(TOKENIZER.decode(row[:n]) in map(task.ask, shown) for row, n in
               zip(plain["prompts"], plain["lengths"], strict=True))  # fmt: skip
    assert answers[0] == str(eval(texts[0].rpartition(":")[2].partition(".")[0]))


def test_the_reward_reads_each_answers_own_problem():
    task = TEXT_TASKS["chain_sum"]
    problems, answers = task.problems(4, TOKENIZER, seed=1)
    assert len(set(answers)) > 1
    texts = [TOKENIZER.encode(a, add_special=False) for a in answers]
    T = max(map(len, texts)) + 1
    answer, mask = np.zeros((4, T), np.int32), np.zeros((4, T), np.float32)
    for row, text in enumerate(texts):
        answer[row, : len(text) + 1] = [*text, TOKENIZER.eos_ids[0]]
        mask[row, : len(text) + 1] = 1
    arrays: Any = (problems["prompts"], problems["lengths"], answer, mask, mask, np.ones(4))
    r = Rollout(*arrays)
    reward = task.reward(answers, TOKENIZER)
    assert list(reward(Answers(r, problems))) == [1.0] * 4
    shifted = dict(problems, number=np.roll(problems["number"], 1))  # the planted mistake
    assert list(reward(Answers(r, shifted))) != [1.0] * 4


@pytest.mark.slow
def test_a_model_that_speaks_is_finetuned_by_the_reward_of_its_text(tmp_path):
    model = ModelConfig(
        family="llama", vocab_size=320, num_layers=1, d_model=16, num_heads=2, num_kv_heads=1,
        head_dim=8, d_ff=24, tie_embeddings=True, max_seq_len=256, eos_ids=(257,),
    )  # fmt: skip
    TOKENIZER.save(tmp_path / "words")
    safetensors.save(
        tmp_path / "start", P.init(jax.random.key(0), model), model,
        tokenizer_from=tmp_path / "words",
    )  # fmt: skip
    rl = RLConfig(prompts=2, group_size=2, max_new_tokens=4)
    config = GRPO(
        finetune=str(tmp_path / "start"), loop="host", steps=2, problems=4, rl=rl, records=1,
        examples=1, out=tmp_path / "run",
    )  # fmt: skip
    state = online.train(config, Console(file=io.StringIO()))
    assert int(state.step) == 2
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2] and "rewards/chain_sum/mean" in rows[0]
    again = load(tmp_path / "run" / "model")
    assert again.tokenizer.decode(TOKENIZER.encode("7")) == "7"
    with pytest.raises(UserError, match="give a model to --finetune"):
        GRPO(examples=2)
    with pytest.raises(UserError, match="add --loop host"):
        GRPO(finetune="smollm2-135m")
    with pytest.raises(UserError, match="in words: choose one of"):
        online.train(GRPO(finetune=config.finetune, loop="host", task="number_sorting",
                          out=tmp_path / "other"))  # fmt: skip
