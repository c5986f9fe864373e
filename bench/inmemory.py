"""The real all-reduce between members of one process, over memory and in virtual time: exact bytes, no network.

Members weigh the same and all of them reduce.
"""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import Iterable, Sequence

from hivetrain.averaging.butterfly import AllReduceOutcome, all_reduce
from hivetrain.averaging.group import GroupPlan, Member
from hivetrain.averaging.layout import PayloadLayout
from hivetrain.averaging.memory import MemoryHub, MemoryTransport, run_in_virtual_time
from hivetrain.run import Recipe
from hivetrain.verification.merkle import MerkleTree
from tests.keys import TestIdentity as Key
from tests.keys import verify

ROUND_S = 60.0  # of virtual time


def butterfly(layout: PayloadLayout, payloads: Sequence[bytes], number: int) -> list[AllReduceOutcome]:
    """A real all-reduce of ``payloads`` between members of equal weight, over memory and in virtual time."""
    keys = [Key(place + 1) for place in range(len(payloads))]
    members = tuple(
        Member(
            hotkey=key.hotkey,
            peer_id=f"peer-{place}",
            maddrs=(),
            weight=1.0,
            reduces=True,
            root=MerkleTree(layout.chunk_digests(payload)).root,
        )
        for place, (key, payload) in enumerate(zip(keys, payloads, strict=True))
    )
    plan = GroupPlan(
        run_id="bench",
        round=number,
        attempt=0,
        members=members,
        layout=layout,
        send_deadline_s=ROUND_S / 2,
        deadline_s=ROUND_S,
        max_abs=Recipe().averaging.max_abs,
        audit_blocks=0,  # a few blocks of each part whatever the vector: of one this small, all of it
    )

    async def exchange() -> list[AllReduceOutcome]:
        hub = MemoryHub()
        transports: list[MemoryTransport] = [hub.transport(member.peer_id) for member in members]
        for transport in transports:
            await transport.start()
        try:
            rounds = zip(keys, payloads, transports, strict=True)
            return await asyncio.gather(*(all_reduce(plan, k, p, t, verify) for k, p, t in rounds))
        finally:
            for transport in transports:
                await transport.close()

    return run_in_virtual_time(exchange())


def mean_traffic(outcomes: Iterable[AllReduceOutcome]) -> float:
    """Bytes that a member sent and received, the mean over the group."""
    return statistics.fmean(outcome.bytes_sent + outcome.bytes_received for outcome in outcomes)


__all__ = ["Key", "butterfly", "mean_traffic", "verify"]
