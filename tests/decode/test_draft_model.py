"""A model that guesses changes how fast an answer comes, and nothing of what is likely."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decode import engine as engine_module
from decode import forward as paged
from decode import sampler
from decode.config import EngineConfig
from decode.draft import Drafter, first_layers
from decode.engine import Engine
from decode.packing import Layout
from decode.pages import Pages, Table
from decode.request import Request, SamplingParams
from decode.runner import Runner
from decode.scheduler import Sequence
from decode.speculate import ByModel
from decode.step import State, step
from jaxinfra.errors import UserError
from jaxinfra.loading import Model
from jaxinfra.model.cache import unstack
from jaxinfra.model.params import init
from tests.decode import engines

SIZES = dataclasses.replace(engines.SMALL, steps=1, draft=3)
FIRST = dataclasses.replace(SIZES, draft_model="first:1")


def smaller():
    config = dataclasses.replace(engines.CONFIG, num_layers=1, windows=None, d_ff=32)
    params = jax.tree.map(lambda a: a * 3, init(jax.random.key(4), config))
    return Drafter(config, unstack(params, config))


@functools.cache
def runner(who):
    drafter = {"first": lambda: None, "smaller": smaller,
               "itself": lambda: Drafter(engines.CONFIG, engines.params())}[who]()  # fmt: skip
    config = FIRST if who == "first" else SIZES
    made = Runner(engines.params(), engines.CONFIG, config, drafter)
    made.finish()
    return made


@pytest.fixture
def always(monkeypatch):
    """Drafts whatever a step takes here."""
    monkeypatch.setattr(ByModel, "pay", lambda self, running: running > 0)


def engine(who, **changes):
    return Engine(runner(who), engines.TOKENIZER, dataclasses.replace(SIZES, **changes))


OTHERS = [pytest.param(who, marks=pytest.mark.slow) for who in ("first", "itself")]


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("who", ["smaller", *OTHERS])
def test_greedy_answers_are_the_models(who, cached, always):
    prompts = engines.prompts(9)
    one = engine(who, prefix_cache=cached)
    told = engines.run(one, engines.requests(prompts))
    for i, prompt in enumerate(prompts):
        assert engines.tokens(told[str(i), 0]) == engines.greedy(prompt, 20), i
    stats = one.stats()
    assert stats.preemptions > 0 and stats.compiles == 0 and stats.drafted > 20
    assert (stats.prefix_hits > 0) == cached
    if who == "itself":  # it has read all, through preemptions, and knows what will be drawn
        assert stats.accepted == stats.drafted
    engines.whole(one)


@pytest.mark.slow
def test_a_draft_model_that_has_not_read_is_caught(always, monkeypatch):
    """The control: its guesses are poor then, and the answer is right all the same."""
    monkeypatch.setattr(ByModel, "catch_up", lambda self, *a: True)
    prompts = engines.prompts(4)
    one = engine("itself")
    told = engines.run(one, engines.requests(prompts))
    for i, prompt in enumerate(prompts):
        assert engines.tokens(told[str(i), 0]) == engines.greedy(prompt, 20), i
    assert one.stats().accepted < 0.8 * one.stats().drafted


@pytest.mark.parametrize("who", ["smaller", OTHERS[0]])
def test_an_answer_with_a_seed_is_the_same_without_drafts(who, always):
    prompts = engines.prompts(5)
    asked = [
        *engines.requests(prompts, engines.DRAWN),
        Request("cut", prompts[0], dataclasses.replace(engines.DRAWN, top_p=0.8, top_k=9)),
        Request("counted", prompts[1], dataclasses.replace(engines.DRAWN, frequency_penalty=0.5)),
    ]
    one = engine(who)
    told, right = engines.run(one, asked), engines.run(engines.engine(draft=0, steps=1), asked)
    for key, outputs in right.items():
        assert engines.tokens(told[key]) == engines.tokens(outputs), key
    assert one.stats().drafted > 20
    engines.whole(one)


def off(counts, chances):
    """Chi-square of what was counted, and by how many deviations it is more than expected."""
    expected = chances * counts.sum()
    square = float(np.sum((counts - expected) ** 2 / expected))
    freedom = len(chances) - 1
    return (square - freedom) / np.sqrt(2 * freedom)


def test_answers_without_a_seed_are_as_likely_as_the_model_has_them(always, monkeypatch):
    """Of three tokens, all 27 answers of three; the last two of each are guessed first."""
    seeds = itertools.count(1)
    monkeypatch.setattr(engine_module.random, "getrandbits", lambda bits: next(seeds))
    prompt, words, count = engines.prompts(1)[0][:9], (1, 2, 3), 1500
    params = SamplingParams(max_tokens=3, ignore_eos=True, allowed_tokens=words, temperature=1.5)
    chances = {}
    for answer in itertools.product(words, repeat=3):
        rows = engines.logits([*prompt, *answer])[len(prompt) - 1 : -1][:, list(words)] / 1.5
        p = np.exp(rows - rows.max(axis=-1, keepdims=True))
        p /= p.sum(axis=-1, keepdims=True)
        chances[answer] = np.prod([row[words.index(t)] for row, t in zip(p, answer, strict=True)])
    one = engine("smaller", max_waiting=count)
    told = engines.run(one, [Request(str(i), prompt, params) for i in range(count)])
    said = [engines.tokens(outputs) for outputs in told.values()]
    counts = np.array([said.count(answer) for answer in chances])
    assert counts.sum() == count and off(counts, np.array([*chances.values()])) < 4
    stats = one.stats()
    assert 0.2 * stats.drafted < stats.accepted < 0.9 * stats.drafted and stats.compiles == 0


def test_guesses_leave_the_chances_as_they_are():
    rng = np.random.default_rng(0)
    S, V = 20_000, 7
    model, draft = (jnp.broadcast_to(rng.normal(size=V) * 1.5, (S, V)).astype("float32")
                    for _ in range(2))  # fmt: skip
    rows = {"key_0": jnp.arange(S), "key_1": jnp.full(S, 5), "seeded": jnp.zeros(S, jnp.int32),
            "temperature": jnp.full(S, 0.9)}  # fmt: skip
    at = jnp.full(S, 3)

    @jax.jit
    def draw(model, draft):
        guesses, chances = sampler.offer(draft, rows, at, None)
        offered = sampler.Offered(guesses, chances, jnp.ones(S, bool))
        drawn = sampler.sample(model, rows, at, None, offered)
        p, u = jax.nn.softmax(model / 0.9), sampler.uniform(*rows_of(rows), at)
        again = sampler._draw(p, sampler.uniform(*rows_of(rows), at, 9))
        over, _ = sampler._passing(jnp.maximum(p - chances, 0.0), u)  # of u, not of u times all
        return drawn, guesses, again, over

    drawn, guesses, again, over = draw(model, draft)
    p, q = (np.asarray(jax.nn.softmax(a[0] / 0.9)) for a in (model, draft))
    stood = drawn.tokens == guesses
    assert off(counted(drawn.tokens, V), p) < 4
    assert drawn.logps == pytest.approx(np.log(p)[drawn.tokens], abs=1e-4)
    # No way takes more guesses.
    assert float(jnp.mean(stood)) == pytest.approx(np.minimum(p, q).sum(), abs=0.015)
    for name, wrong in {
        "takes every guess": guesses,
        "draws from the model where one is refused": jnp.where(stood, guesses, again),
        "does not normalise what the model has more": jnp.where(stood, guesses, over),
    }.items():
        assert off(counted(wrong, V), p) > 10, name


def rows_of(rows):
    return rows["key_0"], rows["key_1"]


def counted(tokens, V):
    return np.bincount(np.asarray(tokens), minlength=V)


@pytest.mark.slow
def test_first_layers_guess_on_devices_that_share_a_step(always):
    config = dataclasses.replace(FIRST, tp=2, max_running=2, draft=2)
    made = Runner(engines.params(), engines.CONFIG, config)
    made.finish()
    one, prompts = Engine(made, engines.TOKENIZER, config), engines.prompts(2)
    told = engines.run(one, engines.requests(prompts))
    for i, prompt in enumerate(prompts):
        assert engines.tokens(told[str(i), 0]) == engines.greedy(prompt, 20), i
    assert one.stats().drafted > 5 and one.stats().compiles == 0
    engines.whole(one)


@pytest.mark.parametrize("drafts, steps", [(3, 1), (0, 4)])
def test_no_row_is_read_past_its_pages(drafts, steps, monkeypatch):
    """A row that ends with its page, in a call that goes on for others."""
    lengths, right = [], paged.paged_attention

    def attention(*arguments, **options):
        jax.debug.callback(lambda a: lengths.append(int(a.max())), arguments[5])
        return right(*arguments, **options)

    monkeypatch.setattr(paged, "paged_attention", attention)
    layout = Layout(T=1 + drafts, B=1, M=2, S=1 + drafts, steps=steps, drafts=drafts)
    packed, view = layout.empty()
    view["starts"][1:], view["sample"][0] = 1, 0
    view["rows"]["length"], view["rows"]["left"], view["table"][:] = 16, 1, [[0, 1]]
    params, config = engines.params(), engines.CONFIG
    empty = State(
        pool=paged.empty(config, 3, 8, "float32"), last=jnp.zeros(1, jnp.int32),
        counts=jnp.zeros((1, config.vocab_size), jnp.int32),
        bias=jnp.zeros((1, config.vocab_size)),
    )  # fmt: skip
    mask = jnp.full((layout.S, config.vocab_size // 32), 0xFFFFFFFF, jnp.uint32)
    drafter = first_layers(config, 1) if drafts else None
    jax.jit(functools.partial(step, config=config, layout=layout, drafter=drafter))(
        params, empty, packed, mask
    )
    jax.effects_barrier()
    assert len(lengths) >= drafts + steps and max(lengths) == 16


@pytest.mark.parametrize(
    "params", [dict(frequency_penalty=0.5), dict(max_tokens=3), dict(allowed_tokens=(1,))]
)
def test_a_draft_model_reads_only_what_it_may_guess_for(params):
    prompt, read = tuple(range(9)), []
    wanted = SamplingParams(**{"max_tokens": 20, **params})
    pool = Pages(9, 4)
    table = Table(pool)
    table.grow(11)
    one = Sequence(Request("a", prompt, wanted), 0, 1, [*prompt, 1, 2], table)
    assert ByModel(3, separate=True).catch_up([one], 8, read.extend)
    assert bool(read) == ("allowed_tokens" in params)


def test_what_cannot_guess_is_told():
    with pytest.raises(UserError, match="give draft=4"):
        EngineConfig(draft_model="first:1")
    with pytest.raises(UserError, match="first:N, N layers"):
        EngineConfig(draft_model="first:x", draft=2)
    with pytest.raises(UserError, match="not cut"):
        EngineConfig(draft_model="smollm2-135m", draft=2, tp=2)
    with pytest.raises(UserError, match="give 1 to 1 layers"):
        Runner(engines.params(), engines.CONFIG, dataclasses.replace(FIRST, draft_model="first:2"))
    model = Model(engines.CONFIG, init(jax.random.key(3), engines.CONFIG), engines.TOKENIZER)
    named = dataclasses.replace(SIZES, draft_model="smaller")
    with pytest.raises(UserError, match="draft_model='smaller' is not loaded"):
        Engine.of(model, named)
    other = dataclasses.replace(engines.CONFIG, vocab_size=400)
    with pytest.raises(UserError, match="same vocabulary"):
        Runner(engines.params(), engines.CONFIG, SIZES, Drafter(other, engines.params()))
