"""An engine with the real one's interface that answers with what a script says, byte by byte."""

import time
from dataclasses import dataclass
from types import SimpleNamespace

from decode.request import Output, QueueFull
from jaxinfra.text import Tokenizer

TOKENIZER = Tokenizer.byte_level()


@dataclass(frozen=True)
class Stats:
    running: int
    waiting: int = 0
    pages_used: int = 1
    pages_cached: int = 2
    pages_free: int = 5
    tokens_per_second: float = 1.0
    prefix_queries: int = 4
    prefix_hits: int = 3
    preemptions: int = 0
    compiles: int = 0
    drafted: int = 0
    accepted: int = 0


class ScriptedEngine:
    """`script(prompt text)` is the answer; a few bytes a step; room for `room` requests.

    A prompt with "die" in it makes a step raise; with "fail", its request ends as an error.
    `seen` holds the requests, `aborted` the ids.
    """

    def __init__(self, script, room=8, a_step=3, pause=0.0):
        self.config = SimpleNamespace(max_len=4096, page_size=16, pages=8)
        self._script, self._room, self._a_step, self._pause = script, room, a_step, pause
        self._live = {}
        self.seen, self.aborted = [], []

    def add(self, request):
        self.seen.append(request)
        if len(self._live) >= self._room:
            raise QueueFull("the queue is full; try again later")
        if request.params.grammar and request.params.grammar.text == "(bad":
            raise ValueError("regex: unclosed group")
        prompt = TOKENIZER.decode(request.prompt)
        self._live[request.id] = [request, prompt, self._script(prompt).encode(), 0]

    def abort(self, id):
        if self._live.pop(id, None):
            self.aborted.append(id)

    def close(self):
        pass

    def has_work(self):
        return bool(self._live)

    def step(self):
        time.sleep(self._pause)
        outputs = []
        for id, state in list(self._live.items()):
            request, prompt, answer, at = state
            if "die" in prompt:
                raise RuntimeError("scripted death")
            if "fail" in prompt:
                outputs.append(Output(id, finish_reason="error", error="scripted failure"))
                del self._live[id]
                continue
            end = min(at + self._a_step, len(answer), request.params.max_tokens)
            state[3] = end
            over = end == len(answer) or end == request.params.max_tokens
            finish = ("stop" if end == len(answer) else "length") if over else None
            tokens = tuple(answer[at:end])
            text = answer[:end].decode(errors="ignore")[len(answer[:at].decode(errors="ignore")) :]
            logprobs = None
            if request.params.logprobs is not None:
                logprobs = tuple({token: -0.5, 65: -1.0, 66: -2.0} | {token: -0.5}
                                 for token in tokens)  # fmt: skip
            outputs += [
                Output(id, i, tokens, text, logprobs, finish_reason=finish, cached_tokens=2)
                for i in range(request.params.n)
            ]
            if over:
                del self._live[id]
        return outputs

    def stats(self):
        return Stats(len(self._live))


def script(prompt):
    """What the engines of these tests answer."""
    return prompt.rsplit("say:", 1)[-1].split("<|im_end|>")[0] if "say:" in prompt else "héllo ✓"


def build():
    """An engine for another process."""
    return ScriptedEngine(script)


def build_slow():
    """An engine that needs a while a step."""
    return ScriptedEngine(script, a_step=1, pause=0.02)
