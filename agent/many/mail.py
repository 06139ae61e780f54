"""Mailboxes: agents that send one another mail, in one process or over ZMQ between several.

`Exchange` is the post office. It sees every wait, so it knows a deadlock at the moment it forms:
when all waiting agents wait for one another, each of them is told who waits for whom, instead of
hanging.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import anyio
from pydantic_core import to_json

from jaxinfra.errors import UserError


@dataclass(frozen=True)
class Mail:
    """A message between agents; `tainted_by` goes with its text."""

    sender: str
    to: str
    text: str
    tainted_by: tuple[str, ...] = ()


class Deadlock(Exception):
    """Everybody waits, and no mail is on its way."""


@dataclass
class _Wait:
    """Somebody who waits, for mail of `sender` alone where one is given."""

    sender: str | None
    over: anyio.Event = field(default_factory=anyio.Event)
    mail: Mail | None = None
    stuck: str = ""


class Exchange:
    """Who has mail and who waits, among the agents `names`."""

    def __init__(self, names: tuple[str, ...]):
        self.names, self.gone = names, set[str]()
        self._boxes: dict[str, list[Mail]] = {name: [] for name in names}
        self._waits: dict[str, _Wait] = {}

    async def send(self, name: str, to: str, text: str, tainted_by: tuple[str, ...] = ()) -> None:
        """Puts mail from `name` into a box. Raises UserError for an agent nobody knows."""
        self._known(name)
        self._known(to)
        self._boxes[to].append(Mail(name, to, text, tuple(tainted_by)))
        self._settle()

    async def receive(self, name: str, sender: str | None = None) -> Mail:
        """The oldest mail for `name`, from `sender` alone where one is given. Raises Deadlock where
        none can ever come, and UserError for an agent nobody knows."""
        self._known(name)
        wait = self._waits[name] = _Wait(sender)
        self._settle()
        try:
            await wait.over.wait()
        finally:
            self._waits = {n: one for n, one in self._waits.items() if one is not wait}
        if wait.mail is None:
            raise Deadlock(wait.stuck)
        return wait.mail

    async def leave(self, name: str) -> None:
        """`name` will send nothing more. Raises UserError for an agent nobody knows."""
        self._known(name)
        self.gone.add(name)
        self._settle()

    def _known(self, name: str) -> None:
        if name not in self.names:
            raise UserError(f"mail: no agent {name!r}; there are {', '.join(self.names)}")

    def _settle(self) -> None:
        """Gives mail to those who wait; tells those who can never be given any: they wait only for
        agents that are stuck themselves, or gone."""
        for name, wait in list(self._waits.items()):
            box = self._boxes[name]
            wait.mail = next((m for m in box if wait.sender in (None, m.sender)), None)
            if wait.mail is not None:
                box.remove(wait.mail)
                self._waits.pop(name).over.set()
        free = set(self.names) - set(self._waits) - self.gone
        while more := {
            name for name, wait in self._waits.items()
            if name not in free and (wait.sender in free if wait.sender else free)
        }:  # fmt: skip
            free |= more
        stuck = [(name, wait) for name, wait in self._waits.items() if name not in free]
        told = "; ".join(f"{name} waits for {wait.sender or 'anybody'}" for name, wait in stuck)
        for name, wait in stuck:
            wait.stuck = told
            self._waits.pop(name).over.set()


class Mailbox:
    """One agent's end of an exchange in this process."""

    def __init__(self, exchange: Exchange, name: str) -> None:
        self._exchange, self.name = exchange, name

    async def send(self, to: str, text: str, tainted_by: tuple[str, ...] = ()) -> None:
        """Returns when the exchange has it."""
        await self._ask("send", to=to, text=text, tainted_by=tainted_by)

    async def receive(self, sender: str | None = None) -> Mail:
        """The oldest mail, from `sender` alone where one is given. Raises Deadlock where none can
        ever come."""
        return await self._ask("receive", sender=sender)

    async def leave(self) -> None:
        """Nothing more is sent from here."""
        await self._ask("leave")

    async def _ask(self, do: str, **given: Any) -> Any:
        return await getattr(self._exchange, do)(self.name, **given)


def mailboxes(*names: str) -> dict[str, Mailbox]:
    """Mailboxes of one exchange in this process, by name."""
    exchange = Exchange(names)
    return {name: Mailbox(exchange, name) for name in names}


class PostOffice:
    """An exchange that other processes reach over ZMQ, at an address such as
    tcp://127.0.0.1:5555 (port 0 picks one; see `address`) or ipc:///tmp/post."""

    def __init__(self, address: str, names: tuple[str, ...]):
        import zmq
        import zmq.asyncio

        self._socket = zmq.asyncio.Context.instance().socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.bind(address)
        self.address = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)
        self._exchange = Exchange(names)

    async def serve(self) -> None:
        """Serves until cancelled, or until every agent has left."""

        async def answer(peer: bytes, raw: bytes) -> None:
            try:
                name, do, given = json.loads(raw)
                if do not in ("send", "receive", "leave"):
                    raise UserError(f"mail: nobody can {do!r}")
                told = {"mail": await getattr(self._exchange, do)(name, **given)}
            except Deadlock as error:
                told = {"deadlock": str(error)}
            except (ValueError, TypeError, KeyError, UserError) as error:
                told = {"refused": str(error)}
            await self._socket.send_multipart([peer, to_json(told)])
            if self._exchange.gone == set(self._exchange.names):
                group.cancel_scope.cancel()

        try:
            async with anyio.create_task_group() as group:
                while True:
                    peer, raw, *_ = await self._socket.recv_multipart()
                    group.start_soon(answer, peer, raw)
        finally:
            self._socket.close()


class RemoteMailbox(Mailbox):
    """One agent's end of a post office in another process."""

    def __init__(self, address: str, name: str) -> None:
        import zmq
        import zmq.asyncio

        self.name = name
        self._socket = zmq.asyncio.Context.instance().socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 1000)
        self._socket.connect(address)

    async def _ask(self, do: str, **given: Any) -> Any:
        await self._socket.send(json.dumps([self.name, do, given]).encode())
        answer = json.loads(await self._socket.recv())
        if do == "leave":
            self._socket.close()
        if "deadlock" in answer:
            raise Deadlock(answer["deadlock"])
        if "refused" in answer:
            raise UserError(answer["refused"])
        mail = answer["mail"]
        return mail and Mail(**{**mail, "tainted_by": tuple(mail["tainted_by"])})
