"""Samples for learning: every token that was drawn counts, none that was read, and none twice."""

import functools

import anyio
import numpy as np
import pytest

from agent.compress import Compression
from agent.events import ModelResponded
from agent.journal import MemoryStore
from agent.loop import run
from agent.messages import Message, ToolCall
from agent.model import Completion
from agent.scripted import ScriptedModel
from agent.spec import Agent
from agent.tools import tool
from agent.trajectories import Trajectory, drift, trajectories
from jaxinfra.errors import UserError

END = 300


def between(messages, first):
    text = "".join(f"<{m.role}>{m.content}" for m in messages) + "<assistant>"
    return [*([] if first else [10]), *text.encode()]


def said(text: str, *calls: ToolCall, pairs: bool = True) -> Completion:
    """A turn as a model with tokens for pairs of bytes draws it: the first two as one."""
    written = (text + "".join(call.arguments for call in calls)).encode()
    ids = (1000 + written[0], *written[2:], END) if pairs else (*written, END)
    return Completion(Message("assistant", text, calls, tokens=ids), finish="calls" if calls
                      else "stop")  # fmt: skip


@tool(effects="pure")
async def look(n: int) -> str:
    """Looks."""
    return "x" * 100 * n


def session(turns, **options):
    store = MemoryStore()
    agent = Agent("a", ScriptedModel(turns), "Be exact.", (look,), **options)
    result = anyio.run(functools.partial(run, agent, "go", store=store, session="s"))
    return result, anyio.run(store.read, "s")


TURNS = [said("one ", ToolCall("c1", "look", '{"n": 1}')),
         said("two ", ToolCall("c2", "look", '{"n": 2}'), ToolCall("c3", "look", '{"n": 1}')),
         said("done.")]  # fmt: skip


def drawn_in(events):
    return [r.event.message.tokens for r in events if isinstance(r.event, ModelResponded)]


def test_what_was_drawn_counts_and_what_was_read_does_not():
    result, events = session(TURNS)
    (made,) = trajectories(events, between)
    assert result.reason == "done" and len(made.tokens) == len(made.mask)
    drawn = [t for t, m in zip(made.tokens, made.mask, strict=True) if m]
    assert drawn == [t for turn in drawn_in(events) for t in turn]
    read = bytes(t for t, m in zip(made.tokens, made.mask, strict=True) if not m).decode()
    assert read.startswith("<system>Be exact.<user>go<assistant>\n<tool>" + "x" * 40)
    assert read.count("<tool>") == 3 and "one" not in read
    # The whole is a prefix of what a run with one more turn gives.
    _, longer = session([*TURNS[:2], said("more ", ToolCall("c4", "look", '{"n": 1}')), TURNS[2]])
    (long,) = trajectories(longer, between)
    cut = len(made.tokens) - len(drawn_in(events)[-1])
    assert long.tokens[:cut] == made.tokens[:cut] and long.mask[:cut] == made.mask[:cut]


def test_texts_tokenised_again_drift_and_exact_ones_do_not():
    _, events = session(TURNS)
    (exact,) = trajectories(events, between)
    (again,) = trajectories(
        events, between,
        retokenise=lambda m: (*(m.content + "".join(c.arguments for c in m.calls)).encode(), END),
    )  # fmt: skip
    assert drift(exact, exact) == 0.0 < drift(exact, again) < 1.0
    first = exact.mask.index(1)
    assert drift(exact, again) == pytest.approx(1 - first / len(exact.tokens))


def test_a_rewritten_conversation_is_a_sample_of_its_own():
    _, events = session(TURNS, compression=Compression(40, ("trim",), recent=1))
    assert any(r.event.type == "compressed" for r in events)
    made = trajectories(events, between)
    assert len(made) == 2
    drawn = [t for one in made for t, m in zip(one.tokens, one.mask, strict=True) if m]
    assert drawn == [t for turn in drawn_in(events) for t in turn]


def test_turns_without_ids_are_told():
    _, events = session(["done."])
    with pytest.raises(UserError, match="the turn in event 2 has no token ids"):
        trajectories(events, between)
    assert trajectories(events[:1], between) == []


def test_packed_rows_hold_the_tokens_and_only_drawn_ones_get_an_advantage():
    from agent.learning import pack
    from align.config import RLConfig
    from align.experience import judge

    samples = [trajectories(session(turns)[1], between)[0] for turns in (TURNS, [said("done.")])]
    r = pack(samples, pad_id=7)
    for row, sample in enumerate(samples):
        n = len(sample.tokens)
        assert tuple(np.asarray(r.tokens[row, :n]).tolist()) == sample.tokens
        assert np.all(np.asarray(r.tokens[row, n:]) == 7)
        start = int(r.lengths[row])
        assert sample.mask[:start] == (0,) * start and sample.mask[start] == 1
        m = n - start
        assert tuple(np.asarray(r.answer[row, :m]).tolist()) == sample.tokens[start:]
        assert tuple(np.asarray(r.mask[row]).astype(int).tolist()[:m]) == sample.mask[start:]
        assert not np.asarray(r.mask[row, m:]).any()
    config = RLConfig(algorithm="grpo", group_size=2, kl_coef=0.0)
    rewards = np.array([1.0, 0.0], np.float32)
    made, _ = judge(config, r, rewards, None, None, None, np.float32(0.0))
    counted = np.asarray(made.advantages * made.mask)
    assert (counted[0][np.asarray(r.mask[0]) > 0] > 0).all()
    assert (counted[1][np.asarray(r.mask[1]) > 0] < 0).all()
    assert not counted[np.asarray(r.mask) == 0].any()
    with pytest.raises(UserError, match="at least one token"):
        pack([Trajectory((1, 2), (0, 0))])
