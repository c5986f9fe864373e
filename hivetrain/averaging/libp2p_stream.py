"""Frames on a libp2p stream, as the daemon hands it over: slower than `bulk`, but there wherever libp2p reaches."""

from __future__ import annotations

import asyncio
import contextlib

from hivetrain.averaging.codecs import Bytes
from hivetrain.averaging.transport import FRAME_LENGTH_BYTES, MAX_FRAME_BYTES, LinkLost, Traffic
from hivetrain.errors import Fault, PeerFault

CLOSE_TIMEOUT_S = 5.0


class LibP2PStream:
    """A libp2p stream: frames of a 4-byte big-endian length and that many bytes."""

    def __init__(
        self,
        remote_peer_id: str,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        traffic: Traffic | None = None,
    ) -> None:
        self._remote_peer_id = remote_peer_id
        self._reader = reader
        self._writer = writer
        self._traffic = traffic or Traffic()
        self._traffic.streams += 1

    @property
    def remote_peer_id(self) -> str:
        return self._remote_peer_id

    async def send(self, frame: Bytes) -> None:
        if len(frame) > MAX_FRAME_BYTES:
            raise ValueError(f"a frame has at most {MAX_FRAME_BYTES} bytes, got {len(frame)}")
        try:
            self._writer.write(len(frame).to_bytes(FRAME_LENGTH_BYTES, "big"))
            self._writer.write(frame)
            await self._writer.drain()
            self._traffic.bytes_sent += len(frame)
        except (ConnectionError, OSError, RuntimeError) as exc:  # RuntimeError: the transport is closing
            raise LinkLost(f"the stream to {self._remote_peer_id} ended while we sent: {exc}") from exc

    async def receive(self, max_bytes: int) -> bytes:
        try:
            size = int.from_bytes(await self._reader.readexactly(FRAME_LENGTH_BYTES), "big")
            if size > min(max_bytes, MAX_FRAME_BYTES):
                raise PeerFault(Fault.OVERSIZED, f"a frame may have {max_bytes} bytes here, {size} were announced")
            frame = await self._reader.readexactly(size)
            self._traffic.bytes_received += size
            return frame
        except (asyncio.IncompleteReadError, ConnectionError, OSError) as exc:
            raise LinkLost(f"the stream to {self._remote_peer_id} ended: {exc}") from exc

    async def close(self) -> None:
        with contextlib.suppress(Exception):  # it is over, however it ends
            self._writer.close()
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                await self._writer.wait_closed()
