"""Which endpoints of a peer are dialled for a direct connection, and which are left in peace because none answered.

A filtered port costs seconds before it is given up, and a round opens a stream for every part: what did not answer is
not tried again for a while, twice as long each time. Remembered by peer and endpoint, so that a peer that offers
another one's port speaks for itself alone.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections.abc import Callable, Iterable, Sequence

from hivetrain.averaging.bulk_listener import Endpoint, dial
from hivetrain.averaging.sealing import SessionKeys

logger = logging.getLogger(__name__)

MAX_ENDPOINTS = 8
DIAL_TIMEOUT_S = 4.0  # over all of a peer's endpoints
FIRST_REST_S = 60.0
LONGEST_REST_S = 960.0
MAX_REMEMBERED = 1024  # who mints peer ids must not fill our memory with them

_Key = tuple[str, Endpoint]


class DialMemory:
    """Endpoints that did not answer.

    Args:
        now: a clock in seconds.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._resting: dict[_Key, tuple[float, float]] = {}  # until when, and for how long

    def worth_dialling(self, peer_id: str, places: Iterable[Endpoint]) -> list[Endpoint]:
        """Those of ``places`` that do not rest."""
        now = self._now()
        return [place for place in places if self._resting.get((peer_id, place), (now, 0.0))[0] <= now]

    def failed(self, peer_id: str, place: Endpoint) -> None:
        """It did not answer: let it rest, twice as long as the last time."""
        now, key = self._now(), (peer_id, place)
        until, last = self._resting.pop(key, (now, 0.0))
        # Of streams that found out at once the first one counts.
        rest = last if until > now else min(max(FIRST_REST_S, 2 * last), LONGEST_REST_S)
        self._resting[key] = (max(until, now + rest), rest)
        while len(self._resting) > MAX_REMEMBERED:
            del self._resting[next(iter(self._resting))]

    def answered(self, peer_id: str, place: Endpoint) -> None:
        """It did."""
        self._resting.pop((peer_id, place), None)


def candidates(offered: Iterable[Endpoint], hosts: Sequence[str]) -> list[Endpoint]:
    """Where to dial: offered ports at known addresses, an offered pair before any other of its address."""
    offered = list(offered)
    exact = [(host, port) for known in hosts for host, port in offered if host == known]
    # Behind a NAT, or under a name, a peer may not know the address at which it was reached.
    reached = [(host, port) for host in hosts[:1] for _, port in offered]
    return list(dict.fromkeys((*exact, *reached)))[:MAX_ENDPOINTS]


async def dial_any(
    peer_id: str, places: Sequence[Endpoint], keys: SessionKeys, source: str | None, memory: DialMemory
) -> socket.socket | None:
    """A connection to the first of ``places`` that answers; None where none does, or all rest."""
    loop = asyncio.get_running_loop()
    until = loop.time() + DIAL_TIMEOUT_S
    for place in memory.worth_dialling(peer_id, places):
        try:
            async with asyncio.timeout_at(until):
                sock = await dial(place, keys, source)
        except (OSError, TimeoutError) as exc:
            logger.debug("bulk: %s:%d cannot be dialled: %r", *place, exc)
            memory.failed(peer_id, place)
        else:
            memory.answered(peer_id, place)
            return sock
        if loop.time() >= until:
            break
    return None
