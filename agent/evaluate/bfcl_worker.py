"""The process that holds BFCL's own data and checkers, in an environment of its own.

    python -I agent/evaluate/bfcl_worker.py        # JSON lines in, JSON lines out

Nothing of the benchmark is written again here: tasks come from the wheel's loader, tools from its
conversion for OpenAI's API, results of tools from its simulators, verdicts from its checkers. One
module of it is left out: the table of models, which imports the clients of thirty vendors and of
which the checkers only ask whether a model's tool names have `_` for `.`; ours do.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

import json
import keyword
import os
import sys
import tempfile
import types
from typing import Any

MODEL = "jaxinfra"
_HELD: dict[str, dict[str, dict[str, Any]]] = {}  # entries by category and id


def _without_vendors() -> None:
    table = types.ModuleType("bfcl_eval.constants.model_config")
    vars(table)["MODEL_CONFIG_MAPPING"] = {MODEL: types.SimpleNamespace(underscore_to_dot=True)}
    sys.modules[table.__name__] = table


def load(category: str, most: int | None) -> list[dict[str, Any]]:
    """The first tasks of a category: id, turns of messages, tools, and tools that come later by the
    turn in which they do."""
    from bfcl_eval.constants.default_prompts import DEFAULT_USER_PROMPT_FOR_ADDITIONAL_FUNCTION_FC
    from bfcl_eval.utils import load_dataset_entry, load_ground_truth_entry

    entries = load_dataset_entry(category)[:most]
    answers = [] if "relevance" in category else load_ground_truth_entry(category)
    truth = {answer["id"]: answer["ground_truth"] for answer in answers}
    plain = {e["id"]: e for e in load_dataset_entry(category, include_language_specific_hint=False)}
    made = []
    for entry in entries:
        id = entry["id"]
        _HELD.setdefault(category, {})[id] = {**plain[id], "truth": truth.get(id)}
        later = {turn: _tools(f) for turn, f in entry.get("missed_function", {}).items()}
        asked = [{"role": "user", "content": DEFAULT_USER_PROMPT_FOR_ADDITIONAL_FUNCTION_FC}]
        turns = [turn or asked for turn in entry["question"]]
        made.append({"id": id, "turns": turns, "tools": _tools(entry["function"]), "later": later})
    return made


def _tools(functions: list[dict[str, Any]]) -> list[dict[str, Any]]:
    from bfcl_eval.constants.enums import ModelStyle
    from bfcl_eval.constants.type_mappings import GORILLA_TO_OPENAPI
    from bfcl_eval.model_handler.utils import convert_to_tool

    made = convert_to_tool(functions, GORILLA_TO_OPENAPI, ModelStyle.OPENAI_COMPLETIONS)
    return [tool["function"] for tool in made]


def execute(category: str, id: str, name: str, call: list[Any]) -> str:
    """What the simulators of a task say to one call, in the world called `name`."""
    from bfcl_eval.eval_checker.multi_turn_eval.multi_turn_utils import execute_multi_turn_func_call

    entry = _HELD[category][id]
    (told,), _ = execute_multi_turn_func_call(
        _as_source([call]), entry["initial_config"], entry["involved_classes"], name, id,
        long_context="long_context" in category,
    )  # fmt: skip
    return told


def _as_source(calls: list[Any]) -> list[str]:
    """Calls as the Python source that the simulators evaluate. A name that is none could bring code
    of its own along: it is refused."""
    from bfcl_eval.model_handler.utils import convert_to_function_call

    for name, arguments in calls:
        for word in (name, *arguments):
            if not word.isidentifier() or keyword.iskeyword(word):
                raise ValueError(f"{word!r} is no name")
    return convert_to_function_call([{name: arguments} for name, arguments in calls])


def check(category: str, id: str, name: str, turns: list[list[list[Any]]]) -> str | None:
    """What is wrong, or None. `turns` hold steps, steps hold calls [name, arguments]; arguments
    are None where they are no JSON object."""
    from bfcl_eval.constants.enums import Language
    from bfcl_eval.eval_checker.ast_eval.ast_checker import ast_checker

    entry = _HELD[category][id]
    if category.startswith("multi_turn"):
        return _check_turns(category, entry, name, turns)
    first = turns[0][0] if turns and turns[0] else []
    good = bool(first) and all(arguments is not None for _, arguments in first)
    if "relevance" in category:
        wanted = "irrelevance" not in category
        return None if good == wanted else f"{len(first)} calls"
    if not good:
        return "no call that can be read"
    language = {"simple_java": Language.JAVA, "simple_javascript": Language.JAVASCRIPT}
    calls = [{called: arguments} for called, arguments in first]
    verdict = ast_checker(entry["function"], calls, entry["truth"],
                          language.get(category, Language.PYTHON), category, MODEL)  # fmt: skip
    return None if verdict["valid"] else f"{verdict['error_type']}: {verdict['error']}"


def _check_turns(
    category: str, entry: dict[str, Any], name: str, turns: list[list[list[Any]]]
) -> str | None:
    from bfcl_eval.eval_checker.multi_turn_eval import multi_turn_utils
    from bfcl_eval.eval_checker.multi_turn_eval.multi_turn_checker import multi_turn_checker

    try:
        if len(turns) != len(entry["truth"]):
            return f"ended in turn {len(turns)} of {len(entry['truth'])}"
        decoded = []
        for steps in turns:
            decoded.append([])
            for step in steps:
                try:
                    source = _as_source(step)
                except (ValueError, AttributeError, TypeError):
                    continue  # what cannot be read is no call
                if source:
                    decoded[-1].append(source)
        verdict = multi_turn_checker(decoded, entry["truth"], entry, category, name)
        return None if verdict["valid"] else f"{verdict['error_type']}: {verdict['error_message']}"
    finally:  # the worlds are globals of that module, by name
        for world in [one for one in vars(multi_turn_utils) if one.startswith(f"{name}_")]:
            del vars(multi_turn_utils)[world]


def main() -> None:
    """Answers one request a line until the input closes."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # the simulators print
    with tempfile.TemporaryDirectory() as folder:
        os.environ["BFCL_PROJECT_ROOT"] = folder  # else it makes folders beside the wheel
        _without_vendors()
        doing = {"load": load, "execute": execute, "check": check}
        for line in sys.stdin:
            do, *given = json.loads(line)
            try:
                answer = {"ok": doing[do](*given)}
            except Exception as error:
                answer = {"error": f"{type(error).__name__}: {error}"}
            print(json.dumps(answer, default=str), file=out, flush=True)


if __name__ == "__main__":
    main()
