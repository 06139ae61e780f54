"""Run by an environment that has Inspect: its own checks of a provider, and a task, as JSON."""

import asyncio
import inspect
import json
import sys

from inspect_ai import Task, eval
from inspect_ai._util.entrypoints import ensure_entry_points
from inspect_ai.dataset import Sample
from inspect_ai.model import ModelOutput, ModelUsage, get_model
from inspect_ai.scorer import includes
from inspect_ai.solver import generate, use_tools
from inspect_ai.tool import bash
from inspect_ai.util import SandboxEnvironment
from inspect_ai.util._sandbox import self_check
from inspect_ai.util._sandbox.registry import registry_find_sandboxenv


async def checks() -> dict[str, str]:
    """What each of Inspect's checks of a sandbox said; empty where it passed."""
    ensure_entry_points()
    provider = registry_find_sandboxenv("jaxinfra")
    await provider.task_init("t", None)
    told = {}
    for name, check in inspect.getmembers(self_check, inspect.iscoroutinefunction):
        if not name.startswith("test_"):
            continue
        environments: dict[str, SandboxEnvironment] = await provider.sample_init("t", None, {})
        try:
            await check(environments["default"])
            told[name] = ""
        except BaseException as error:
            told[name] = f"{type(error).__name__}: {error}"[:200]
        await provider.sample_cleanup("t", None, environments, False)
    return told


async def escapes(secret: str) -> dict[str, str]:
    """What a link out of the box, made by a command, leads to."""
    provider = registry_find_sandboxenv("jaxinfra")
    environments = await provider.sample_init("t", None, {})
    box = environments["default"]
    made = await box.exec(["ln", "-s", secret, "link"])
    assert made.success, made
    told = {}
    for name, act in (("read", box.read_file("link")), ("write", box.write_file("link", "x"))):
        try:
            told[name] = str(await act)
        except OSError as error:
            told[name] = type(error).__name__
    net = await box.exec(["/bin/sh", "-c", "cat /proc/net/dev | wc -l; id -u"])
    told["interfaces, user"] = net.stdout
    await provider.sample_cleanup("t", None, environments, False)
    return told


def evaluated() -> dict[str, str]:
    """A task whose model uses Inspect's bash tool in our sandbox, and writes and reads a file."""
    calls = ["echo $((6 * 7)) > answer", "cat answer"]
    outputs = [ModelOutput.for_tool_call("mockllm/model", "bash", {"command": c}) for c in calls]
    outputs.append(ModelOutput.from_content("mockllm/model", "It is 42."))
    for output in outputs:  # else Inspect fetches a tokenizer to count
        output.usage = ModelUsage(input_tokens=1, output_tokens=1, total_tokens=2)
    task = Task(
        dataset=[Sample("6 * 7?", target="42", files={"given.txt": "hello"})],
        solver=[use_tools(bash()), generate()], scorer=includes(), sandbox="jaxinfra",
    )  # fmt: skip
    model = get_model("mockllm/model", custom_outputs=outputs)
    (log,) = eval(task, model=model, display="none", log_dir=sys.argv[2], log_format="json")
    assert log.samples, log.error
    results = [m.text for m in log.samples[0].messages if m.role == "tool"]
    return {"status": log.status, "results": str(results), "error": str(log.error)[:300]}


if __name__ == "__main__":
    told = {"checks": asyncio.run(checks()), "escapes": asyncio.run(escapes(sys.argv[1])),
            "task": evaluated()}  # fmt: skip
    print(json.dumps(told))
