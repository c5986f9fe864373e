"""One transport for many groups: every stream begins with the group that it is for, and what for.

Members of a group do not begin at the same moment. A stream that comes early waits, for a while, until its group is
here too; one that nobody expects is ended.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Sequence
from typing import Annotated, Literal

from pydantic import Field

from hivetrain.averaging.messages import Message, receive
from hivetrain.averaging.transport import Acceptor, LinkLost, Stream, Transport
from hivetrain.errors import PeerFault

logger = logging.getLogger(__name__)

KNOCK_TIMEOUT_S = 5.0
EARLY_S = 10.0
MAX_EARLY = 256

GroupId = Annotated[bytes, Field(min_length=1, max_length=64)]
Purpose = Literal["meet", "reduce"]
_Key = tuple[bytes, Purpose]


class Knock(Message):
    """The first frame of every stream."""

    kind: Literal["knock/1"] = "knock/1"
    group: GroupId
    purpose: Purpose


class Lobby:
    """Where a transport's streams are told apart.

    Args:
        transport: not started; it is ours from `start` to `close`.
    """

    def __init__(self, transport: Transport) -> None:
        self.transport = transport
        self._rooms: dict[_Key, tuple[Acceptor, Collection[str] | None]] = {}
        self._changed = asyncio.Event()
        self._early = 0

    async def start(self) -> None:
        """Start the transport, and answer."""
        await self.transport.start()
        self.transport.set_acceptor(self._answer)

    async def close(self) -> None:
        """End every stream."""
        self.transport.set_acceptor(None)
        await self.transport.close()

    def room(self, group: bytes, purpose: Purpose) -> Room:
        """The transport of one group."""
        return Room(self, group, purpose)

    def expect(self, key: _Key, acceptor: Acceptor | None, peer_ids: Collection[str] | None) -> None:
        """Who answers that group's streams; None: nobody any more."""
        if acceptor is None:
            self._rooms.pop(key, None)
            return
        if key in self._rooms:
            raise ValueError("this group already has an acceptor")
        self._rooms[key] = acceptor, peer_ids
        self._changed.set()
        self._changed = asyncio.Event()

    async def _answer(self, stream: Stream) -> None:
        peer_id = stream.remote_peer_id
        try:
            async with asyncio.timeout(KNOCK_TIMEOUT_S):
                knock = await receive(stream, Knock)
            acceptor, peer_ids = await self._acceptor((knock.group, knock.purpose))
        except (PeerFault, TimeoutError) as exc:
            logger.debug("averaging: a stream of %s is not expected: %r", peer_id, exc)
            return
        if peer_ids is None or peer_id in peer_ids:
            await acceptor(stream)

    async def _acceptor(self, key: _Key) -> tuple[Acceptor, Collection[str] | None]:
        if key not in self._rooms and self._early >= MAX_EARLY:
            raise LinkLost("too many streams wait for their group")
        self._early += 1
        try:
            async with asyncio.timeout(EARLY_S):
                while key not in self._rooms:
                    await self._changed.wait()
            return self._rooms[key]
        finally:
            self._early -= 1


class Room:
    """A `Transport` for one group, on its `Lobby`'s."""

    def __init__(self, lobby: Lobby, group: bytes, purpose: Purpose) -> None:
        self._lobby, self._group, self._purpose = lobby, group, purpose

    @property
    def peer_id(self) -> str:
        return self._lobby.transport.peer_id

    @property
    def alive(self) -> bool:
        return self._lobby.transport.alive

    async def open(self, peer_id: str, maddrs: Sequence[str], timeout_s: float) -> Stream:
        stream = await self._lobby.transport.open(peer_id, maddrs, timeout_s)
        try:
            await stream.send(Knock(group=self._group, purpose=self._purpose).to_bytes())
        except BaseException:
            await stream.close()
            raise
        return stream

    def set_acceptor(self, acceptor: Acceptor | None, peer_ids: Collection[str] | None = None) -> None:
        self._lobby.expect((self._group, self._purpose), acceptor, peer_ids)

    async def start(self) -> None:
        """Nothing: the lobby has started."""

    async def close(self) -> None:
        """Expect nobody any more."""
        self.set_acceptor(None)
