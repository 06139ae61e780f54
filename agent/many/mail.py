"""Mailboxes: agents that send one another mail, in one process or over ZMQ between several.

`Exchange` is the post office, a plain state machine: who has mail, who waits for whom. It sees
every wait, so it knows a deadlock at the moment it forms: when all waiting agents wait for one
another, each of them is told who waits for whom, instead of hanging.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

import anyio

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
class Exchange:
    """Who has mail and who waits, among the agents `names`."""

    names: tuple[str, ...]
    _boxes: dict[str, deque[Mail]] = field(default_factory=dict)
    _waiting: dict[str, str | None] = field(default_factory=dict)
    _gone: set[str] = field(default_factory=set)

    def send(self, mail: Mail) -> None:
        """Puts mail into a box; raises UserError for a receiver nobody knows."""
        if mail.to not in self.names:
            raise UserError(f"mail: no agent {mail.to!r}; there are {', '.join(self.names)}")
        self._boxes.setdefault(mail.to, deque()).append(mail)

    def wait(self, name: str, sender: str | None = None) -> None:
        """`name` waits for mail, from `sender` alone where one is given."""
        self._waiting[name] = sender

    def leave(self, name: str) -> None:
        """`name` will send nothing more."""
        self._gone.add(name)
        self._waiting.pop(name, None)

    def deliver(self) -> dict[str, Mail]:
        """The mail that those who wait can have now; they wait no more."""
        given: dict[str, Mail] = {}
        for name, sender in list(self._waiting.items()):
            box = self._boxes.get(name, deque())
            mail = next((m for m in box if sender in (None, m.sender)), None)
            if mail is not None:
                box.remove(mail)
                del self._waiting[name]
                given[name] = mail
        return given

    def stuck(self) -> dict[str, str | None]:
        """Who can never be given mail (call after `deliver`): those who wait only for agents that
        are stuck themselves, or gone. They wait no more."""
        free = set(self.names) - set(self._waiting) - self._gone
        while True:
            more = {
                name for name, sender in self._waiting.items()
                if name not in free and (sender in free if sender else free)
            }  # fmt: skip
            if not more:
                break
            free |= more
        stuck = {name: sender for name, sender in self._waiting.items() if name not in free}
        for name in stuck:
            del self._waiting[name]
        return stuck


def told(stuck: Mapping[str, str | None]) -> str:
    """Who waits for whom, in words."""
    return "; ".join(f"{name} waits for {sender or 'anybody'}" for name, sender in stuck.items())


class Mailbox:
    """One agent's end of an exchange in this process."""

    def __init__(self, exchange: Exchange, name: str, ends: dict[str, Mailbox]):
        """`ends` is shared by all mailboxes of the exchange; see `mailboxes`."""
        self.name = name
        self._exchange, self._ends = exchange, ends
        self._event = anyio.Event()
        self._given: Mail | str | None = None

    async def send(self, to: str, text: str, tainted_by: tuple[str, ...] = ()) -> None:
        """Sends and goes on."""
        self._exchange.send(Mail(self.name, to, text, tainted_by))
        self._settle()

    async def receive(self, sender: str | None = None) -> Mail:
        """The next mail, the oldest first. Raises Deadlock where none can ever come."""
        self._given, self._event = None, anyio.Event()
        self._exchange.wait(self.name, sender)
        self._settle()
        await self._event.wait()
        if isinstance(self._given, Mail):
            return self._given
        raise Deadlock(self._given)

    async def leave(self) -> None:
        """Ends this agent's part."""
        self._exchange.leave(self.name)
        self._settle()

    def _settle(self) -> None:
        outcomes: dict[str, Mail | str] = dict(self._exchange.deliver())
        stuck = self._exchange.stuck()
        outcomes.update(dict.fromkeys(stuck, told(stuck)))
        for name, outcome in outcomes.items():
            self._ends[name]._given = outcome
            self._ends[name]._event.set()


def mailboxes(*names: str) -> dict[str, Mailbox]:
    """Mailboxes of one exchange in this process, by name."""
    exchange, ends = Exchange(names), {}
    ends.update({name: Mailbox(exchange, name, ends) for name in names})
    return ends


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
        """Serves until cancelled, or until every agent has left. What is no request of a known
        agent is dropped."""
        asked: dict[str, bytes] = {}
        left: set[str] = set()
        try:
            while left < set(self._exchange.names):
                peer, raw = (await self._socket.recv_multipart())[:2]
                try:
                    request = json.loads(raw)
                    name = request["name"]
                    if name not in self._exchange.names:
                        raise UserError(f"mail: no agent {name!r}")
                    if request["do"] == "send":
                        self._exchange.send(Mail(name, request["to"], request["text"],
                                                 tuple(request["tainted_by"])))  # fmt: skip
                        await self._socket.send_multipart([peer, b'{"ok": true}'])
                    elif request["do"] == "wait":
                        asked[name] = peer
                        self._exchange.wait(name, request["sender"])
                    else:
                        self._exchange.leave(name)
                        left.add(name)
                        await self._socket.send_multipart([peer, b'{"ok": true}'])
                except (ValueError, KeyError, TypeError, UserError) as error:
                    refused = json.dumps({"refused": str(error)}).encode()
                    await self._socket.send_multipart([peer, refused])
                    continue
                for name, mail in self._exchange.deliver().items():
                    answer = json.dumps({"mail": asdict(mail)}).encode()
                    await self._socket.send_multipart([asked[name], answer])
                stuck = self._exchange.stuck()
                for name in stuck:
                    answer = json.dumps({"deadlock": told(stuck)}).encode()
                    await self._socket.send_multipart([asked[name], answer])
        finally:
            self._socket.close()


class RemoteMailbox:
    """One agent's end of a post office in another process."""

    def __init__(self, address: str, name: str):
        import zmq
        import zmq.asyncio

        self.name = name
        self._socket = zmq.asyncio.Context.instance().socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 1000)
        self._socket.connect(address)

    async def send(self, to: str, text: str, tainted_by: tuple[str, ...] = ()) -> None:
        """See Mailbox; returns when the post office has it."""
        await self._ask(do="send", to=to, text=text, tainted_by=tainted_by)

    async def receive(self, sender: str | None = None) -> Mail:
        """See Mailbox."""
        answer = await self._ask(do="wait", sender=sender)
        if "deadlock" in answer:
            raise Deadlock(answer["deadlock"])
        mail = answer["mail"]
        return Mail(**{**mail, "tainted_by": tuple(mail["tainted_by"])})

    async def leave(self) -> None:
        """See Mailbox."""
        await self._ask(do="leave")
        self._socket.close()

    async def _ask(self, **request: object) -> dict:
        await self._socket.send(json.dumps({"name": self.name, **request}).encode())
        answer = json.loads(await self._socket.recv())
        if "refused" in answer:
            raise UserError(answer["refused"])
        return answer
