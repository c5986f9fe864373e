"""A validator's records as one chain: each names the one before, back to its first, and none lies beside it.

An average is worth what its history is. A validator that could begin anew in the middle of a run, or leave out a round
that it has published, could pay whom it likes. So the first record begins with nothing, every other one with what the
record before ends with, and every record of its that lies on the hub is in the chain. Who loses its own averages takes
them from its newest record (`last_record`), which is why nobody has a reason to begin twice.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from hivetrain.errors import HubNotFound, IntegrityError
from hivetrain.hub.store import ArtefactReader
from hivetrain.identity import Verify
from hivetrain.scoring.average import AverageState
from hivetrain.scoring.explain import follows
from hivetrain.scoring.published import read_record
from hivetrain.scoring.record import CHECKS_BRANCH, RoundRecord, parse_record_path

MAX_UNREADABLE = 64
"""Files under a validator's name that are not its own: so many are passed over, and then no more are read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chain:
    """What lies behind one record.

    Attributes:
        length: records before it that hold together with it.
        first: round of the oldest of them, or its own.
        problems: what does not hold, in words.
    """

    length: int
    first: int
    problems: tuple[str, ...]


def follow_back(store: ArtefactReader, repo: str, record: RoundRecord, verify: Verify) -> Chain:
    """Walk from ``record`` to its validator's first.

    Raises:
        HubError: the hub does not answer.
    """
    at, chained = record, {record.round}
    problems: list[str] = []
    while at.previous and not problems:
        number = at.before.last_round
        if not 0 <= number < at.round:
            problems.append(f"its record of round {at.round} follows one of round {number}")
            break
        try:
            earlier = read_record(store, repo, number, record.validator, verify)
        except HubNotFound:
            problems.append(f"its record of round {number}, which that of round {at.round} follows, is not there")
            break
        except IntegrityError as exc:
            problems.append(str(exc))
            break
        problems += follows(at, earlier)
        if not problems:
            at = earlier
            chained.add(number)
    if not at.previous and at.before != AverageState():
        problems.append(f"its record of round {at.round} names none before, and does not begin at zero")
    if not problems:  # of a broken chain nobody can tell what else belongs to it
        mine = _own_records(store, repo, record.validator, record.round, verify, skip=chained)
        beside = next((one for one in mine if one.run_id == record.run_id), None)
        if beside is not None:
            problems.append(f"its record of round {beside.round} is on the hub, and not in its chain")
    return Chain(length=len(chained) - 1, first=min(chained), problems=tuple(problems))


def last_record(store: ArtefactReader, repo: str, validator: str, run_id: str, verify: Verify) -> RoundRecord | None:
    """The newest record that ``validator`` has published of a run, None before its first.

    Raises:
        HubError: the hub does not answer.
    """
    mine = _own_records(store, repo, validator, None, verify)
    return next((record for record in mine if record.run_id == run_id), None)


def _own_records(
    store: ArtefactReader,
    repo: str,
    validator: str,
    before: int | None,
    verify: Verify,
    skip: set[int] | frozenset[int] = frozenset(),
) -> Iterator[RoundRecord]:
    """Records under ``validator``'s name that it signed, newest first, older than round ``before``."""
    named = (parse_record_path(path) for path in store.list_artefacts(repo, CHECKS_BRANCH, "checks"))
    rounds = {one[0] for one in named if one is not None and one[1] == validator} - skip
    unreadable = 0
    for number in sorted(rounds, reverse=True):
        if before is not None and number >= before:
            continue
        try:
            yield read_record(store, repo, number, validator, verify)
        except (HubNotFound, IntegrityError):  # whoever can write to the hub can put anything there
            unreadable += 1
            if unreadable >= MAX_UNREADABLE:
                return


__all__ = ["Chain", "follow_back", "last_record"]
