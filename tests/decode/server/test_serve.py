"""What `serve` hands to its engines and replicas, and what it refuses."""

import json
import pickle

import pytest

from decode import commands, handover, replicas
from decode.config import EngineConfig
from decode.server import restarts, run, two_engines
from jaxinfra.errors import UserError
from jaxinfra.text import Tokenizer
from jaxinfra.weights import pull


@pytest.mark.parametrize("options", [{"replicas": 0}, {"gpus": 1}, {"replicas": 2, "gpus": -1}])
def test_a_wrong_number_of_replicas_is_told(options):
    with pytest.raises(UserError, match="serve"):
        commands.serve("m", **options)


@pytest.mark.parametrize("file", [True, False])
def test_keys_are_read_where_the_command_runs(file, tmp_path, monkeypatch):
    """A replica's machine may have neither the file nor the variable."""
    started, asked = [], {}
    monkeypatch.setattr(replicas, "run", lambda one, count, **o: started.append((one, o)))
    monkeypatch.setattr(run, "run", lambda spawn, tokenizer, settings, **o: asked.update(
        settings.keys))  # fmt: skip
    monkeypatch.setattr(pull, "pull", lambda model, offline: tmp_path)
    monkeypatch.setattr(Tokenizer, "from_path", lambda path: None)
    path = tmp_path / "keys.json"
    path.write_text('{"a": "secret"}')
    monkeypatch.setenv("JAXINFRA_API_KEY", "secret")
    commands.serve("m", replicas=2, keys=path if file else None)
    path.unlink()
    monkeypatch.delenv("JAXINFRA_API_KEY")
    ((one, options),) = started
    assert options["gpus"] is None and options["each"] == 1
    pickle.loads(pickle.dumps(one))(host="127.0.0.1", port=0)
    assert asked == {"a" if file else "default": "secret"}


@pytest.mark.parametrize("kind, drafts", [("Prefills", 0), ("Decodes", 4)])
def test_only_the_engine_for_answers_guesses(kind, drafts, tmp_path, monkeypatch):
    class Half:
        def load(self, path, config, **options):
            self.config = config
            return self

        def carry(self, folder):
            self.folder = folder

    monkeypatch.setattr(handover, kind, Half())
    monkeypatch.setattr(two_engines, "take_gpu", lambda kind: None)
    config = EngineConfig(draft=4, draft_model="first:1")
    made = commands._half("m", config, None, kind, tmp_path)
    assert made.config.draft == drafts and (made.config.draft_model is None) == (drafts == 0)
    assert made.folder == tmp_path


def test_a_few_deaths_in_a_while_are_too_many(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(restarts, "monotonic", lambda: now[0])
    often, seldom = restarts.Restarts(), restarts.Restarts()
    assert [often.another() for _ in range(7)] == [True] * 5 + [False] * 2
    for _ in range(20):
        now[0] += restarts.WITHIN / restarts.MOST
        assert seldom.another()


def test_a_replica_that_cannot_start_is_given_up_and_tells_why(monkeypatch):
    monkeypatch.setattr(restarts, "MOST", 1)
    monkeypatch.setattr(replicas, "_PAUSE", 0.01)
    one = replicas._Replica(json.loads, "127.0.0.1")  # which takes no host
    assert one.ended().startswith("TypeError: ")


def test_gpus_are_shared_out():
    assert replicas.shared(0, 3, 2) == 0 and replicas.shared(4, 2, 2) == 2
    with pytest.raises(UserError, match="3 replicas of 2 GPUs; the cluster has 4"):
        replicas.shared(4, 3, 2)
