"""A real engine on random weights, for tests of the model over it; a script may choose answers."""

import contextlib
import dataclasses
import functools
import json
import threading
import time
from typing import Any

import anyio
import numpy as np
import tokenizers

from agent.engine_model import EngineModel
from agent.messages import Message, user
from agent.model import Request, Settings
from decode.config import EngineConfig
from decode.engine import Engine
from decode.request import Grammar
from decode.runner import Runner
from jaxinfra.text import Tokenizer
from tests.agent.compat_server import TEMPLATE, call
from tests.agent.test_models import TEXT, TOOL, turn
from tests.decode import engines

SIZES = EngineConfig(
    max_len=2048, page_size=16, pages=256, max_running=16, budget=16, invariant=True
)  # fmt: skip
BYTES = Tokenizer.byte_level()
TOKENIZER = Tokenizer(BYTES.backend, BYTES.special, BYTES.eos_ids, TEMPLATE)
TAG = 300  # in the tokenizer of `tagged`


@functools.cache
def tagged() -> Tokenizer:
    """The tokenizer with a token for the tag that opens a call, as Qwen's has it."""
    made = json.loads(BYTES.backend.to_str())
    (added,) = [one for one in made["added_tokens"] if one["id"] == TAG]
    made["model"]["vocab"]["<tool_call>"] = made["model"]["vocab"].pop(added["content"])
    added |= {"content": "<tool_call>", "special": False}
    backend = tokenizers.Tokenizer.from_str(json.dumps(made))
    return Tokenizer(backend, BYTES.special, BYTES.eos_ids, TEMPLATE)


SHORT = Settings(max_tokens=12, temperature=0.8, seed=5)
ENDLESS = Settings(max_tokens=1500, seed=3)


@functools.cache
def runner() -> Runner:
    """Invariant: one program."""
    config = dataclasses.replace(engines.CONFIG, max_seq_len=2048)
    made = Runner(engines.params(), config, SIZES)
    made.finish()
    return made


class Steered(Engine):
    """An engine whose answers a script may choose, drawn token by token all the same.

    `seen` holds the requests, `read` those that only read, `told` the outputs; `copied` counts
    pages; `bias` is added to logits.
    """

    def __init__(self, script=None, tokenizer=TOKENIZER, bias=None, **changes):
        super().__init__(runner(), tokenizer, dataclasses.replace(SIZES, **changes))
        self.bias = bias or {}
        self.script, self.seen, self.told, self.copied = script, [], [], 0
        self.read = []

    def add(self, request):
        script = self.script if request.params.max_tokens > 1 else None
        wanted = script and script(TOKENIZER.decode(request.prompt))
        endless = request.params.max_tokens == ENDLESS.max_tokens
        params = dataclasses.replace(
            request.params, logprobs=0, ignore_eos=endless, logit_bias=self.bias
        )
        if wanted:
            grammar = Grammar("choice", json.dumps([wanted]))
            params = dataclasses.replace(params, grammar=grammar)
        request = dataclasses.replace(request, params=params)
        super().add(request)
        (self.seen if request.params.max_tokens > 1 else self.read).append(request)

    def _dispatch(self, plan, drafting):
        self.copied += len(plan.copies)
        return super()._dispatch(plan, drafting)

    def step(self):
        outputs = super().step()
        self.told += outputs
        return outputs

    def bits(self, id):
        """Tokens of an answer with the bits of their log-probabilities."""
        said = [one for o in self.told if o.request_id == id for one in o.logprobs or ()]
        return [(t, np.float32(p).view(np.int32).item()) for one in said for t, p in one.items()]


@contextlib.contextmanager
def serving(script=None, tokenizer=TOKENIZER, lease=600.0, leased=0.5, host=0.0, **changes):
    engine = Steered(script, tokenizer, **changes)
    kept = {"lease": lease, "leased": leased, "host": host}
    with EngineModel(engine, tokenizer, "tiny", **kept) as model:
        yield model, engine
    engine.pool.check()


def comes(what):
    """Whether it is so within five minutes."""
    return any(what() or time.sleep(0.01) for _ in range(30_000))


def quiet(model):
    """Waits until the engine's thread has done all that it was told."""
    assert comes(lambda: not model._thread._asked and model._thread._orders.empty())
    done = threading.Event()
    model._thread.order(done.set)
    assert done.wait(300)


def taken(model, *requests):
    """The completions of requests that are made side by side."""

    async def main():
        ends: list[Any] = [None] * len(requests)

        async def one(i, request):
            ends[i] = (await turn(model, request))[1]

        async with anyio.create_task_group() as group:
            for i, request in enumerate(requests):
                group.start_soon(one, i, request)
        return ends

    return anyio.run(main)


def by_script(prompt: str) -> str:
    return call("multiply", a=6, b=7) if "multiply" in prompt else TEXT


def grown(model, session="s", words=30):
    """A first turn, and the messages with which the second goes on."""
    first = (user("Tell me. " * words),)
    (end,) = taken(model, Request(first, settings=SHORT, session=session))
    return (*first, end.message, user("Go on."))


def called(model, session="s"):
    first = (user("Tell me. " * 30),)
    (end,) = taken(model, Request(first, (TOOL,), "required", SHORT_CALL, session=session))
    (made,) = end.message.calls
    return (*first, end.message, Message("tool", "42", call_id=made.id))


SHORT_CALL = Settings(max_tokens=400, seed=1)
