"""BFCL from its own wheel: by its checkers the wanted calls pass, and others fail."""

import ast
import functools
import json
import os

import anyio
import pytest

from agent.evaluate.bfcl import BFCL, MULTI, SINGLE
from agent.evaluate.environment import environment
from agent.evaluate.runner import evaluate, summary
from agent.messages import Message, ToolCall
from agent.scripted import ScriptedModel
from agent.spec import Agent
from jaxinfra.errors import UserError

pytestmark = [pytest.mark.frameworks, pytest.mark.slow, pytest.mark.timeout(2400)]
SIZES = {"simple_python": 400, "multiple": 200, "irrelevance": 240, "live_multiple": 1053,
         "live_relevance": 16, "multi_turn_base": 200}  # fmt: skip


@pytest.fixture(scope="module")
def bench():
    with BFCL() as made:
        yield made


def truth(bench: BFCL, category: str) -> dict:
    """The answers of the wheel, which a task does not show."""
    folder = next(environment_folder().glob("lib/*/site-packages/bfcl_eval/data/possible_answer"))
    lines = (folder / f"BFCL_v4_{category}.json").read_text().splitlines()
    return {i: json.loads(line)["ground_truth"] for i, line in enumerate(lines)}


def environment_folder():
    from agent.evaluate.bfcl import PACKAGES

    return environment("bfcl", PACKAGES, dependencies=False).parent.parent


def single(wanted, spoil=lambda name, arguments: (name, arguments)) -> ScriptedModel:
    """Makes the first allowed call of each that is wanted."""
    calls = []
    for one in wanted:
        ((name, allowed),) = one.items()
        arguments = {k: _first(v) for k, v in allowed.items() if v and v[0] != ""}
        name, arguments = spoil(name.replace(".", "_"), arguments)
        calls.append(ToolCall("", name, json.dumps(arguments)))
    return ScriptedModel([Message("assistant", "", tuple(calls))] if calls else ["I cannot."])


def _first(allowed):
    value = allowed[0]
    if isinstance(value, dict):
        return {k: _first(v) for k, v in value.items() if v and v[0] != ""}
    if isinstance(value, list):
        return [{k: _first(v) for k, v in one.items()} if isinstance(one, dict) else one
                for one in value]  # fmt: skip
    return value


def many(turns) -> ScriptedModel:
    """Makes the calls of every turn, one a step, and says that the turn is done."""
    script = []
    for calls in turns:
        for source in calls:
            call = ast.parse(source, mode="eval").body
            assert isinstance(call, ast.Call) and isinstance(call.func, ast.Name)
            arguments = {k.arg: ast.literal_eval(k.value) for k in call.keywords}
            positional = [ast.literal_eval(one) for one in call.args]
            script.append((call.func.id, arguments, positional))
        script.append(None)
    said: list = []

    def turn(request):
        n = sum(m.role == "assistant" for m in request.messages)
        if script[n] is None:
            return "Done."
        name, arguments, positional = script[n]
        order = {t.name: list(t.parameters["properties"]) for t in request.tools}[name]
        named = {**dict(zip(order, positional, strict=False)), **arguments}
        said.append(name)
        return Message("assistant", "", (ToolCall("", name, json.dumps(named)),))

    return ScriptedModel(turn)


def tried(bench, category, make, most=12):
    tasks = bench.tasks(category, most)
    return anyio.run(functools.partial(
        evaluate, lambda task: Agent("x", make(task)), lambda repeat: tasks, repeats=1
    ))  # fmt: skip


@pytest.mark.parametrize(
    "category",
    ["simple_python", "multiple", "parallel", "parallel_multiple", "live_simple", "live_multiple"],
)
def test_the_wanted_calls_pass_and_spoilt_ones_fail(bench, category):
    wanted = truth(bench, category)
    good = tried(bench, category, lambda task: single(wanted[task.seed]))
    assert [t.fault for t in good if t.fault] == [] and len(good) == 12
    assert summary(good)[-1].malformed == 0

    def without_one(name, arguments):
        return name, dict(list(arguments.items())[1:])

    def renamed(name, arguments):
        return name + "_", arguments

    def as_text(name, arguments):
        return name, {k: f"{v}?" for k, v in arguments.items()}

    for spoil in (without_one, renamed, as_text):
        made = tried(bench, category, lambda task, s=spoil: single(wanted[task.seed], s))
        assert sum(t.passed for t in made) <= 1, spoil.__name__  # a first argument may be optional
    assert not any(t.passed for t in tried(bench, category, lambda task: ScriptedModel(["no"])))


@pytest.mark.parametrize("category", ["irrelevance", "live_irrelevance", "live_relevance"])
def test_whether_anything_is_called_counts_where_that_is_asked(bench, category):
    def calls(task):
        call = ToolCall("", task.tools[0].name, "{}")
        return ScriptedModel([Message("assistant", "", (call,))])

    says = tried(bench, category, lambda task: ScriptedModel(["I cannot."]))
    does = tried(bench, category, calls)
    relevant = category == "live_relevance"
    assert {t.passed for t in says} == {not relevant} and {t.passed for t in does} == {relevant}


@pytest.mark.parametrize("category", MULTI)
def test_turns_run_in_the_simulators_and_states_are_compared(bench, category):
    wanted = truth(bench, category)
    good = tried(bench, category, lambda task: many(wanted[task.seed]), 4)
    assert [t.fault for t in good if t.fault] == []
    assert all(t.called and t.errors == 0 for t in good)

    def lazy(task):
        turns = wanted[task.seed]
        last = max(i for i, turn in enumerate(turns) if turn)
        return many([turn[:-1] if i == last else turn for i, turn in enumerate(turns)])

    assert not any(t.passed for t in tried(bench, category, lazy, 4))
    assert not any(
        t.passed
        for t in tried(bench, category, lambda task: ScriptedModel(lambda request: "Done."), 4)
    )


def test_a_name_of_an_argument_brings_no_code_along(bench, tmp_path):
    (task,) = bench.tasks("multi_turn_base", 1)
    file = tmp_path / "written"
    key = f"x=open({str(file)!r}, 'w')) #"
    model = ScriptedModel(lambda request: "Done." if len(request.messages) % 2 == 0 else Message(
        "assistant", "", (ToolCall("", task.tools[0].name, json.dumps({key: 1})),)
    ))  # fmt: skip
    (tried_,) = anyio.run(functools.partial(
        evaluate, lambda task: Agent("x", model), lambda repeat: [task], repeats=1
    ))  # fmt: skip
    assert not tried_.passed and tried_.errors and not file.exists()


def test_all_of_the_wheels_tasks_are_there(bench):
    for category, size in SIZES.items():
        tasks = bench.tasks(category)
        assert len(tasks) == size
        for task in tasks:
            Agent("x", ScriptedModel([]), tools=task.tools)  # no two of one name
    assert len(SINGLE) == 13
    with pytest.raises(UserError, match="no category 'web_search'"):
        bench.tasks("web_search")


def test_the_environment_has_no_torch_and_ours_has_no_bfcl(bench):
    import importlib.util

    assert importlib.util.find_spec("bfcl_eval") is None
    names = os.listdir(next(environment_folder().glob("lib/*/site-packages")))
    assert "torch" not in names and "numpy" not in names
