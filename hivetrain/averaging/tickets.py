"""Tickets: direct connections to a peer with which a path was agreed before, without asking libp2p again.

When two peers agree on a path (`upgrade`) both derive some more keys than the one stream needs. The listener waits for
each of them as for the first; who dialled may open as many streams later by presenting their tokens, one each. A ticket
is as good a proof as the stream that it comes from: its keys have never travelled, and only the two ends can derive
them. A stream of its own costs libp2p's daemons and both peers five messages more, on slow links a second.
"""

from __future__ import annotations

from collections import deque

from hivetrain.averaging.bulk_listener import Endpoint
from hivetrain.averaging.sealing import SessionKeys

MAX_PEERS = 1024
MAX_PER_PEER = 64


class TicketBook:
    """What we may present, by peer. The oldest go first, and are forgotten first."""

    def __init__(self) -> None:
        self._tickets: dict[str, deque[tuple[Endpoint, SessionKeys]]] = {}

    def put(self, peer_id: str, endpoint: Endpoint, tickets: tuple[SessionKeys, ...]) -> None:
        """Keep tickets of that peer, which answers at ``endpoint``."""
        kept = self._tickets.pop(peer_id, deque(maxlen=MAX_PER_PEER))
        kept.extend((endpoint, keys) for keys in tickets)
        self._tickets[peer_id] = kept
        while len(self._tickets) > MAX_PEERS:
            del self._tickets[next(iter(self._tickets))]

    def take(self, peer_id: str) -> tuple[Endpoint, SessionKeys] | None:
        """Where to present which keys, once; None: agree on a path first."""
        kept = self._tickets.get(peer_id)
        return kept.popleft() if kept else None

    def drop(self, peer_id: str) -> None:
        """The peer did not answer to one: it has forgotten them, or is gone."""
        self._tickets.pop(peer_id, None)
