"""The seam between the all-reduce and whatever carries its bytes.

A transport gives authenticated streams of frames: ``remote_peer_id`` is proved by the transport (libp2p does it with
the peer's key), and binding that to a hotkey is the handshake's work. A frame is at most `MAX_FRAME_BYTES`; its
length is checked before anything is allocated for it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

from hivetrain.averaging.codecs import Bytes
from hivetrain.errors import Fault, PeerFault

MAX_FRAME_BYTES = 8 << 20
FRAME_LENGTH_BYTES = 4  # big-endian, before every frame


@dataclass(slots=True)
class Traffic:
    """What one kind of path has carried so far: frames' bytes, and streams."""

    bytes_sent: int = 0
    bytes_received: int = 0
    streams: int = 0


class LinkLost(PeerFault):
    """The peer cannot be reached, or the stream to it ended. The one fault worth another try."""

    def __init__(self, detail: str) -> None:
        super().__init__(Fault.ABSENT, detail)


class Stream(Protocol):
    """One conversation with one peer. Frames arrive whole, in order, or not at all."""

    @property
    def remote_peer_id(self) -> str:
        """The peer at the other end, as the transport proved it."""
        ...

    async def send(self, frame: Bytes, more: bool = False) -> None:
        """Send one frame; waits while the peer reads too slowly.

        Args:
            more: another one follows at once; a short frame may then wait to travel with it.

        Raises:
            LinkLost: the stream ended.
        """
        ...

    async def receive(self, max_bytes: int) -> bytes:
        """The next frame.

        Raises:
            LinkLost: the stream ended.
            PeerFault: OVERSIZED: a frame of more than ``max_bytes`` was announced.
        """
        ...

    async def receive_into(self, buffer: memoryview) -> None:
        """The next frame, which has as many bytes as ``buffer``. After an error the buffer holds anything.

        Raises:
            LinkLost: the stream ended.
            PeerFault: TRUNCATED or OVERSIZED: a frame of another length was announced.
        """
        ...

    async def close(self) -> None:
        """End the stream; what was sent before still arrives. Never raises, may be called twice."""
        ...


Acceptor = Callable[[Stream], Awaitable[None]]
"""Called for every stream that a peer opens. The stream is closed when it returns."""


class Transport(Protocol):
    """Opens and accepts streams."""

    @property
    def peer_id(self) -> str:
        """Our own id in this transport."""
        ...

    @property
    def alive(self) -> bool:
        """Whether our own side works. False: what goes wrong is no peer's fault."""
        ...

    async def open(self, peer_id: str, maddrs: Sequence[str], timeout_s: float) -> Stream:
        """Open a stream to that peer.

        Raises:
            LinkLost: it cannot be reached within ``timeout_s``.
            ServiceError: our own side does not work.
        """
        ...

    def set_acceptor(self, acceptor: Acceptor | None, peer_ids: Collection[str] | None = None) -> None:
        """Who answers streams that peers open; None refuses them.

        Args:
            peer_ids: whose streams are wanted; a transport may refuse all others unread. None: everybody's.

        Raises:
            ValueError: there is one already.
        """
        ...

    async def start(self) -> None:
        """Begin to open and accept."""
        ...

    async def close(self) -> None:
        """End every stream and stop. May be called twice."""
        ...
