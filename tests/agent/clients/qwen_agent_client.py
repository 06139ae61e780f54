"""Qwen-Agent: it renders the tools into the prompt and reads calls out of the text itself."""

import json
import sys
from typing import ClassVar

from qwen_agent.agents import Assistant
from qwen_agent.tools.base import BaseTool, register_tool

called = []


@register_tool("multiply")
class Multiply(BaseTool):
    description = "Multiplies two numbers."
    parameters: ClassVar = {
        "type": "object", "required": ["a", "b"],
        "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
    }  # fmt: skip

    def call(self, params, **kwargs):
        values = self._verify_json_format_args(params)
        called.append([values["a"], values["b"]])
        return str(values["a"] * values["b"])


answers = []
for raw in (False, True):  # by its own prompt, and by the server's tool calls
    config = {"model": "scripted", "model_server": sys.argv[1], "api_key": "none",
              "generate_cfg": {"use_raw_api": raw}}  # fmt: skip
    agent = Assistant(llm=config, function_list=["multiply"])
    *_, last = agent.run([{"role": "user", "content": "What is 6 * 7?"}])
    answers.append(last[-1]["content"])
print(json.dumps({"answers": answers, "called": called}))
