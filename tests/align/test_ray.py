"""Rollouts over Ray: the synchronous run's answers, though a worker is killed on the way."""

import os
import signal

import pytest

from align.system import Live, System, SystemConfig
from tests.align.test_system import CONFIG, STEPS, host, loop, state
from tests.align.tiny import MODEL, difference

ray = pytest.importorskip("ray")
from align.system.ray_workers import RayRollouts  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]


@pytest.fixture(scope="module")
def cluster():
    ray.init(
        num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=100 * 2**20
    )
    yield
    ray.shutdown()


def test_a_worker_that_is_killed_is_replaced_and_its_batch_drawn_again(cluster):
    made = []

    def make():
        made.append(RayRollouts(CONFIG, MODEL))
        return made[-1]

    system = System(loop(), SystemConfig(), state(), make_rollouts=make)
    with Live(system) as running:
        for number in range(STEPS):
            if number == 2:
                process = ray.get(made[0].worker.process.remote())
                os.kill(process, signal.SIGKILL)
            metrics, _ = running.step()
    assert metrics["system/crashed"] >= 1
    assert difference(system.state.trained, host().trained) < 1e-5


def test_a_silent_worker_is_given_up(cluster):
    rollouts = RayRollouts(CONFIG, MODEL, timeout=0.01)
    rollouts.update_weights(state().trained.policy, 0)
    first = rollouts.worker
    with pytest.raises(TimeoutError, match="silent"):
        rollouts.begin(loop().batch(state()), 0, 0)
    assert rollouts.worker is not first
