"""Many sessions at once lose nothing, and the measure of overhead measures what it says."""

import anyio
import pytest

from benchmarks import agent_overhead as module
from benchmarks.agent_overhead import load


@pytest.mark.parametrize("sessions", [200])
def test_two_hundred_sessions_lose_no_event_and_count_every_turn(sessions, tmp_path):
    made = anyio.run(load, sessions, 3, 0.2, tmp_path / "j")
    assert made.events == made.expected == sessions * (2 + 3 + 4)
    assert made.turns == sessions * 2 and 0 < made.p50 <= made.p99 <= made.longest


def test_a_slow_framework_would_be_seen(tmp_path, monkeypatch):
    """The control: what the loop does between two thoughts counts as overhead."""

    @module.tool(effects="pure", name="double")
    async def slow(n: int) -> int:
        """Doubles, late."""
        await anyio.sleep(0.1)
        return 2 * n

    monkeypatch.setattr(module, "double", slow)
    assert anyio.run(load, 3, 3, 0.01, tmp_path / "j").p50 >= 100
