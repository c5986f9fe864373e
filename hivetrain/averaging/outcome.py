"""What one node knows after an all-reduce: the mean, who was in it, and what each link did."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from hivetrain.errors import Fault

logger = logging.getLogger(__name__)

MAX_OUTSIDERS = 16
Runs = tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class FaultRecord:
    """What this node saw a peer do wrong. It is one node's word.

    Attributes:
        hotkey: who; "" where no hotkey was proved (``detail`` then names the libp2p peer).
        fault: what kind.
        detail: expected and actual, in words, at most 300 characters.
        part: the part that it concerns; -1: none.
        evidence: for WRONG_AVERAGE that anybody can check, what `proofs.proves_two_averages` or
            `proofs.proves_wrong_average` takes; else empty.
    """

    hotkey: str
    fault: Fault
    detail: str
    part: int
    evidence: bytes = b""


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkStats:
    """One peer as this node measured it.

    Attributes:
        bytes_sent, bytes_received: payload, means and openings, on all streams with it.
        seconds: time in which we waited for its bytes; ``bytes_received / seconds`` is its rate.
        first_byte_s: shortest time from our handshake message to its answer; None: it never answered.
    """

    hotkey: str
    bytes_sent: int
    bytes_received: int
    seconds: float
    first_byte_s: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class AllReduceOutcome:
    """The mean as this node holds it.

    Attributes:
        vectors: per section, float32 of shape [num_elements]; zero where a part is missing.
        mean_sha256: hex, over every part's signed bytes and mask; equal wherever all of them are.
        complete: no part is missing.
        missing_parts: parts that nobody holds.
        included: per sender, the share of chunks whose mean it is in, over the parts that are not missing.
        left_out: per sender that is in and not everywhere, the runs of chunks ``[start, stop)`` whose mean lacks it.
        reduced_again: parts whose first reducer failed, and whose mean the next one made.
        faults: what this node saw.
        links: per other member.
        bytes_sent, bytes_received, seconds: of the whole all-reduce.
    """

    vectors: dict[str, Tensor]
    mean_sha256: str
    complete: bool
    missing_parts: tuple[int, ...]
    included: dict[str, float]
    faults: tuple[FaultRecord, ...]
    links: tuple[LinkStats, ...]
    bytes_sent: int
    bytes_received: int
    seconds: float
    left_out: Mapping[str, Runs] = field(default_factory=dict)
    reduced_again: tuple[int, ...] = ()


@dataclass(slots=True)
class Link:
    """A `LinkStats` in the making."""

    bytes_sent: int = 0
    bytes_received: int = 0
    seconds: float = 0.0
    first_byte_s: float | None = None

    def answered_in(self, seconds: float) -> None:
        """The peer answered our handshake message."""
        self.first_byte_s = seconds if self.first_byte_s is None else min(seconds, self.first_byte_s)


@dataclass(slots=True)
class Ledger:
    """Faults and links of one round, as they come in. The first record of a kind stands."""

    links: dict[str, Link]
    _faults: dict[tuple[str, Fault, int], FaultRecord] = field(default_factory=dict)
    _outsiders: dict[tuple[str, Fault], FaultRecord] = field(default_factory=dict)

    def record(self, hotkey: str, fault: Fault, detail: str, part: int = -1, evidence: bytes = b"") -> None:
        """Blame a member."""
        entry = FaultRecord(hotkey=hotkey, fault=fault, detail=detail[:300], part=part, evidence=evidence)
        if self._faults.setdefault((hotkey, fault, part), entry) is entry:
            logger.info("all-reduce fault: hotkey=%s fault=%s part=%d %s", hotkey, fault.value, part, entry.detail)

    def record_outsider(self, peer_id: str, fault: Fault, detail: str) -> None:
        """Note a stream on which no hotkey was proved; of so many strangers at most."""
        if len(self._outsiders) < MAX_OUTSIDERS:
            entry = FaultRecord(hotkey="", fault=fault, detail=f"peer {peer_id}: {detail}"[:300], part=-1)
            self._outsiders.setdefault((peer_id, fault), entry)

    def faults(self) -> tuple[FaultRecord, ...]:
        """Everything recorded."""
        return (*self._faults.values(), *self._outsiders.values())

    def stats(self) -> tuple[LinkStats, ...]:
        """Every link."""
        return tuple(
            LinkStats(
                hotkey=hotkey,
                bytes_sent=link.bytes_sent,
                bytes_received=link.bytes_received,
                seconds=link.seconds,
                first_byte_s=link.first_byte_s,
            )
            for hotkey, link in self.links.items()
        )
