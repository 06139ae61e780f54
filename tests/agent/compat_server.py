"""The real server with a scripted engine, for clients that call a tool and then answer.

    python -m tests.agent.compat_server

The script sees the chat as the model would: it calls `multiply` first, in the way that the prompt
asks for (a call, or code), and answers out of what the tool gave.
"""

import functools
import json

from decode.server.app import Settings
from decode.server.run import run
from decode.server.transport import InProcess
from jaxinfra.text import Tokenizer
from tests.decode.server.scripted import TOKENIZER, ScriptedEngine

# ChatML, with tools and calls as Hermes models have them.
TEMPLATE = """\
{%- if tools %}<|im_start|>system
Tools: {{ tools | tojson }}<|im_end|>
{% endif %}
{%- for m in messages %}<|im_start|>{{ m.role }}
{{ m.content or "" }}
{%- for c in m.tool_calls or [] %}
<tool_call>
{{ c.function | tojson }}
</tool_call>
{%- endfor %}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def call(name: str, **arguments) -> str:
    """A call as Hermes models write it."""
    body = json.dumps({"name": name, "arguments": arguments})
    return f"<tool_call>\n{body}\n</tool_call>"


def script(prompt: str) -> str:
    """What the model says next."""
    if "multiply" not in prompt:  # an answer by a schema, which is not in the prompt
        return json.dumps({"product": 42})
    said = prompt.count("<|im_start|>assistant") - 1
    if said == 0:
        if "<code>" in prompt:  # CodeAgent's way
            return "I compute.\n<code>\nfinal_answer(multiply(a=6, b=7))\n</code>"
        return call("multiply", a=6, b=7)
    found = "42" if "42" in prompt.rsplit("multiply", 1)[-1] else "nothing"
    if '"name": "final_answer"' in prompt:
        return call("final_answer", answer=f"It is {found}.")
    if '"name": "final_result"' in prompt:
        return call("final_result", product=int(found))
    return f"It is {found}."


class Engine(ScriptedEngine):
    """One that heeds no words by which tests make the other fail."""

    def add(self, request):
        super().add(request)
        self._live[request.id][1] = ""


def build() -> Engine:
    """An engine for another process."""
    engine = Engine(script, a_step=5)
    engine.config.max_len = 1 << 16  # a token is a byte here, and agents' prompts are long
    return engine


if __name__ == "__main__":
    tokenizer = Tokenizer(TOKENIZER.backend, TOKENIZER.special, TOKENIZER.eos_ids, TEMPLATE)
    run(functools.partial(InProcess, build), tokenizer, Settings("scripted"), port=0, drain=5)
