"""A transport over a libp2p daemon that somebody else runs, under a protocol of its own.

hivemind's averagers live in processes that share their DHT's daemon. What they average goes by streams of that daemon,
or, where one peer can dial the other, by TCP connections beside it, as in `Swarm`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hivetrain.averaging.swarm import Swarm


class Guest(Swarm):
    """A `Transport` for peers that libp2p can find by their id: they are in one DHT.

    Args:
        p2p: hivemind's client of the daemon. It stays its owner's, who ends it after `close`.
        protocol: which streams are ours, among all that share the daemon.
        host_maddrs, announce_maddrs, client_mode: as the daemon was started.
        bulk, bulk_port: whether and where TCP connections arrive, as in `Swarm`.
    """

    def __init__(
        self,
        p2p: Any,
        protocol: str,
        host_maddrs: Sequence[str],
        announce_maddrs: Sequence[str] | None = None,
        client_mode: bool = False,
        bulk: bool = True,
        bulk_port: int | None = None,
    ) -> None:
        super().__init__([], host_maddrs, announce_maddrs, client_mode=client_mode, bulk=bulk, bulk_port=bulk_port)
        self._host, self._protocol = p2p, protocol

    @property
    def alive(self) -> bool:
        """Whether we have started; that the daemon has ended is seen by its owner."""
        return self._p2p is not None

    async def start(self) -> None:
        self._p2p = self._host
        self._maddrs = [str(maddr) for maddr in await self._host.get_visible_maddrs()]
        self._reach = self._start_bulk()
        await self._host.add_binary_stream_handler(self._protocol, self._on_stream)

    async def close(self) -> None:
        if self._p2p is None:
            return
        await self._host.remove_binary_stream_handler(self._protocol)
        await self._end_streams()
        self._p2p = None

    async def _connect(self, peer: Any, maddrs: Sequence[str]) -> None:
        """Nothing: the daemon has met it, or looks it up, relays included."""
