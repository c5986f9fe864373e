"""The outcome of a round, from what a node knows at its end."""

from __future__ import annotations

import hashlib

import msgpack

from hivetrain.averaging.outcome import AllReduceOutcome
from hivetrain.averaging.results import unpack_mask
from hivetrain.averaging.state import Holding, RoundState
from hivetrain.errors import ServiceError


def make_outcome(state: RoundState) -> AllReduceOutcome:
    """Everything, at the end. What is missing is zero.

    Raises:
        ServiceError: our own side does not work: our transport died, or we reached none of several members.
    """
    plan, others = state.plan, state.others
    if not state.transport.alive:
        raise ServiceError("our own transport stopped during the all-reduce")
    if len(others) >= 2 and not state.met:
        raise ServiceError(f"reached none of the {len(others)} other members: our own link is the likelier cause")
    digest = hashlib.sha256(f"hivetrain-mean/2\n{state.group_id}\n".encode())
    chunks = {m.hotkey: 0 for m in plan.members if m.sends}
    out: dict[str, list[tuple[int, int]]] = {}
    for index, holding in state.holdings.items():
        _blame_those_given_up(state, holding)
        mean = holding.mean
        if mean is None or mean.result is None:
            state.store.clear(holding.part.start, holding.part.stop)
            digest.update(msgpack.packb([index, None]))
            continue
        start = holding.part.start
        runs = [[run.stop, run.included] for run in mean.result.masks]
        digest.update(msgpack.packb([index, mean.result.root, runs]))
        for run in mean.result.masks:
            for is_in, member in zip(unpack_mask(run.included, len(plan.members)), plan.members, strict=True):
                if is_in:
                    chunks[member.hotkey] += run.stop - start
                elif member.sends:
                    out.setdefault(member.hotkey, []).append((start, run.stop))
            start = run.stop
    missing = tuple(index for index, holding in state.holdings.items() if holding.mean is None)
    held = [holding for holding in state.holdings.values() if holding.mean is not None]
    present = sum(holding.part.stop - holding.part.start for holding in held)
    links = state.ledger.stats()
    return AllReduceOutcome(
        vectors=state.store.vectors,
        mean_sha256=digest.hexdigest(),
        complete=not missing,
        missing_parts=missing,
        included={hotkey: count / max(present, 1) for hotkey, count in chunks.items()},
        faults=state.ledger.faults(),
        links=links,
        bytes_sent=sum(link.bytes_sent for link in links),
        bytes_received=sum(link.bytes_received for link in links),
        seconds=state.clock.elapsed,
        left_out={hotkey: _joined(runs) for hotkey, runs in out.items() if chunks[hotkey]},
        reduced_again=tuple(h.part.index for h in held if h.mean is not None and h.mean.rank),
    )


def _blame_those_given_up(state: RoundState, holding: Holding) -> None:
    """A reducer failed only where its mean is nowhere: a bad link of ours is not its fault."""
    rank = holding.mean.rank if holding.mean is not None else None
    part = holding.part.index
    for given_up, why in holding.given_up.items():
        if why.fault is not None and (rank is None or given_up < rank):
            reducer = state.plan.reducer(part, given_up)
            state.blame(reducer.hotkey, why.fault, f"nobody holds its mean of part {part}: {why}", part)


def _joined(ranges: list[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    joined: list[tuple[int, int]] = []
    for start, stop in sorted(ranges):
        if joined and joined[-1][1] == start:
            joined[-1] = (joined[-1][0], stop)
        else:
            joined.append((start, stop))
    return tuple(joined)
