"""PostgreSQL conforms as the other stores do: on a real server, which these tests start."""

import anyio
import psycopg
import pytest

from agent.events import ToolStarted
from agent.journal import Conflict, fork
from agent.loop import resume, run
from agent.messages import user
from agent.postgres_store import PostgresStore
from agent.scripted import ScriptedModel, call
from agent.spec import Agent
from agent.sql_store import open_store
from agent.tools import tool
from jaxinfra.errors import UserError
from tests.agent import postgres_server
from tests.agent.test_crashes import check, some, trials
from tests.agent.test_stores import EVENTS, conformance

pytestmark = pytest.mark.skipif(
    postgres_server.binaries() is None, reason="no initdb and postgres on this machine"
)


@pytest.fixture(scope="module")
def server():
    with postgres_server.serving() as address:
        yield address


@pytest.fixture
def address(server):
    with psycopg.connect(server, autocommit=True) as db:
        db.execute("DROP TABLE IF EXISTS event")
    return server


def test_postgres_conforms(address):
    store = PostgresStore(address)
    anyio.run(conformance, store)
    store.close()


def test_a_store_without_its_lock_is_rejected(address):
    """What the lock is for: two stores, as of two processes, that both saw the same end."""

    async def both(make) -> int:
        stores = [make(address), make(address)]
        conflicts = 0
        for n in range(30):
            outcomes = []

            async def one(store, n=n, outcomes=outcomes):
                try:
                    await store.append("s", n, [ToolStarted(str(n), "t", "k")])
                except (Conflict, UserError) as error:
                    outcomes.append(type(error))

            async with anyio.create_task_group() as group:
                for store in stores:
                    group.start_soon(one, store)
            assert len(outcomes) == 1
            conflicts += outcomes == [Conflict]
        for store in stores:
            store.close()
        return conflicts

    class Unlocked(PostgresStore):
        def _hold(self, db, sessions):
            pass

    assert anyio.run(both, PostgresStore) == 30
    with psycopg.connect(address, autocommit=True) as db:
        db.execute("DELETE FROM event")
    assert anyio.run(both, Unlocked) < 30  # the key still holds, but nobody is told of a conflict


def test_two_batches_in_opposite_orders_do_not_wait_for_each_other(address):
    won = []

    async def main():
        stores = [PostgresStore(address), PostgresStore(address)]
        names = [f"s{i}" for i in range(40)]

        async def one(store, name):
            try:
                await store.append(name, 0, EVENTS[:1])
                won.append(name)
            except Conflict:
                pass

        async with anyio.create_task_group() as group:
            for a, b in zip(names, reversed(names), strict=True):
                group.start_soon(one, stores[0], a)
                group.start_soon(one, stores[1], b)
        for store in stores:
            store.close()

    anyio.run(main)
    assert len(won) == len(set(won)) == 40  # no deadlock was to be broken, each once


def test_a_lost_connection_fails_one_call_and_the_next_opens_another(address):
    async def main():
        store = PostgresStore(address)
        await store.append("s", 0, EVENTS[:2])
        with psycopg.connect(address, autocommit=True) as db:
            db.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE pid != pg_backend_pid() AND backend_type = 'client backend'"
            )
        with pytest.raises(UserError, match="is the server up"):
            await store.append("s", 2, EVENTS[2:3])
        assert [r.event for r in await store.read("s")] == EVENTS[:2]
        await store.append("s", 2, EVENTS[2:3])
        store.close()

    anyio.run(main)


def test_damage_is_named_and_what_precedes_survives(address):
    async def main():
        store = PostgresStore(address)
        await store.append("s", 0, EVENTS)
        with psycopg.connect(address, autocommit=True) as db:
            db.execute("UPDATE event SET line = replace(line, 'key', 'kex') WHERE seq = 3")
        with pytest.raises(UserError, match="event 3 of session s is damaged; fork it at 2"):
            await store.read("s")
        assert await fork(store, "s", "t", at=2) == 3
        store.close()

    anyio.run(main)


def test_a_run_begun_on_one_store_is_resumed_on_another(address):
    ran = []

    @tool
    def act(n: int) -> str:
        ran.append(n)
        if n == 2 and len(ran) == 2:
            raise KeyboardInterrupt
        return f"did {n}"

    def worker():
        model = ScriptedModel([call("act", n=1), call("act", n=2), "end"])
        return Agent("w", model, tools=(act,))

    async def begin():
        store = open_store(address)
        try:
            await run(worker(), (user("go"),), store=store, session="s")
        finally:
            store.close()

    async def go_on():
        store = open_store(address)
        result = await resume(worker(), "s", store=store)
        store.close()
        return result

    with pytest.raises((KeyboardInterrupt, BaseExceptionGroup)):
        anyio.run(begin)
    result = anyio.run(go_on)
    assert result.output == "end" and ran == [1, 2]  # the second is in doubt, and not run again


@pytest.mark.slow
def test_kills_at_random_points(address, tmp_path):
    plan = some(24, seed=2)
    told = trials(tmp_path, plan, JOURNAL=address)
    check(told, plan)
    assert sum(trial["killed"] for trial in told) >= 18


def test_a_server_that_does_not_answer_is_told_without_the_password(address):
    gone = address.replace("host=", "host=/nowhere")
    with pytest.raises(UserError, match="is the server up") as told:
        PostgresStore(gone)
    assert "hidden-word" not in str(told.value) and told.value.__cause__ is None
    with pytest.raises(UserError, match="no connection string") as told:
        PostgresStore("postgresql://a:hidden-word@[")
    assert "hidden-word" not in str(told.value)
