"""A validator's records as one chain: each names the one before, back to its first, and none lies beside it.

An average is worth what its history is. A validator that could begin anew in the middle of a run, or leave out a round
that it has published, could pay whom it likes. So the first record begins with nothing, every other one with what the
record before ends with, and every record of its that lies on the hub is in the chain. Who loses its own averages takes
them from its newest record (`last_record`), which is why nobody has a reason to begin twice.

Only what its validator signed can show it a liar. Whoever can write to the hub can take a record away, or put anything
in its place: then nobody can tell what was there, and the chain ends undetermined. It is followed as far back as its
beginning can still be felt in the average.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from hivetrain.errors import HubNotFound, IntegrityError
from hivetrain.hub.store import ArtefactReader
from hivetrain.identity import Verify
from hivetrain.run import Scoring
from hivetrain.scoring.average import AverageState
from hivetrain.scoring.explain import follows
from hivetrain.scoring.published import BoundedReader, ReadLimit, read_record
from hivetrain.scoring.record import CHECKS_BRANCH, RoundRecord, parse_record_path

EPSILON = 1e-6
"""A chain is followed until what an average began with counts less than this in it."""
MAX_CHAIN = 512
"""Records of a chain that are read at most, however slow the average."""
MAX_LOOKED_AT = 4096
"""Files under a validator's name that are looked at: whoever can write to the hub can put anything there."""
MAX_BYTES_LOOKED_AT = 1 << 30
"""Bytes of such files that are read to find the newest record."""
MAX_AHEAD = 64
"""Rounds by which a record may be ahead of the block that we see; what lies further ahead is no record."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chain:
    """What lies behind one record.

    Attributes:
        length: records before it that hold together with it.
        first: round of the oldest of them, or its own.
        problems: what does not hold, in words: the validator signed it.
        unsure: why nobody can tell whether the rest holds, in words; nobody's fault.
    """

    length: int
    first: int
    problems: tuple[str, ...]
    unsure: tuple[str, ...] = ()


def follow_back(
    store: ArtefactReader, repo: str, record: RoundRecord, hotkey: str, scoring: Scoring, verify: Verify
) -> Chain:
    """Walk from ``record`` towards its validator's first, as far as ``hotkey``'s average depends on it.

    Raises:
        HubError: the hub does not answer.
    """
    at, chained = record, {record.round}
    felt = _carried(record, hotkey, scoring)  # how much of the average before ``at`` is in the one after ``record``
    problems: list[str] = []
    unsure: list[str] = []
    while at.previous and not problems and not unsure:
        if felt < EPSILON and record.round - at.round > scoring.cooldown_rounds:
            break
        number = at.before.last_round
        where = f"its record of round {number}, which that of round {at.round} follows,"
        if not 0 <= number < at.round:
            problems.append(f"its record of round {at.round} follows one of round {number}")
            break
        if len(chained) > MAX_CHAIN:
            unsure.append(f"{where} is not read any more: {MAX_CHAIN} before this one are")
            break
        try:
            earlier = read_record(store, repo, number, record.validator, verify)
        except HubNotFound:
            unsure.append(f"{where} is missing at the hub: the chain cannot be followed past it")
        except IntegrityError as exc:
            unsure.append(f"{where} is not at the hub, something else is ({exc}): it cannot be followed past it")
        except ReadLimit as exc:
            unsure.append(f"{where} is not read any more: {exc}")
        else:
            if earlier.run_id != record.run_id and earlier.sha256() != at.previous:
                unsure.append(f"{where} is not at the hub, one of another run is: it cannot be followed past it")
                break
            problems += follows(at, earlier)
            if not problems:
                at = earlier
                chained.add(number)
                felt *= _carried(at, hotkey, scoring)
    if not at.previous and at.before != AverageState():
        problems.append(f"its record of round {at.round} names none before, and does not begin at zero")
    if not problems and not unsure:  # of a broken chain nobody can tell what else belongs to it
        oldest = at.round if at.previous else 0
        try:
            mine = _own_records(store, repo, record.validator, range(oldest, record.round), verify, skip=chained)
            beside = next((one for one in mine if one.run_id == record.run_id), None)
            if beside is not None:
                problems.append(f"its record of round {beside.round} is on the hub, and not in its chain")
        except ReadLimit as exc:
            unsure.append(f"whether records of its lie beside its chain: {exc}")
    return Chain(length=len(chained) - 1, first=min(chained), problems=tuple(problems), unsure=tuple(unsure))


def against_next(store: ArtefactReader, repo: str, record: RoundRecord, verify: Verify) -> list[str]:
    """Whether its validator's record of the next round follows another record than this one, in words.

    Raises:
        HubError: the hub does not answer.
    """
    try:
        later = read_record(store, repo, record.round + 1, record.validator, verify)
    except (HubNotFound, IntegrityError):
        return []
    if later.run_id != record.run_id or later.before.last_round != record.round or later.previous == record.sha256():
        return []
    return [f"its record of round {later.round} follows {later.previous[:12]} of round {record.round}, not this one"]


def _carried(record: RoundRecord, hotkey: str, scoring: Scoring) -> float:
    """Which share of ``hotkey``'s average before ``record`` is in its average after it: none where it has none then."""
    if hotkey not in record.after.entries:
        return 0.0
    miner = record.miners.get(hotkey)
    return 1.0 if miner is None or miner.score is None else 1.0 - scoring.ema_alpha


def last_record(
    store: ArtefactReader, repo: str, validator: str, run_id: str, verify: Verify, *, now: int, after: int = -1
) -> RoundRecord | None:
    """The newest record that ``validator`` has published of a run, None before its first.

    Args:
        now: the round under way. No junk under a later one hides a record.
        after: a round up to which none is looked for.

    Raises:
        HubError: the hub does not answer.
        ReadLimit: so much lies there that is not its own, or of other runs, that nobody can tell.
    """
    reader = BoundedReader(store, max_files=MAX_LOOKED_AT, max_bytes=MAX_BYTES_LOOKED_AT)
    mine = _own_records(reader, repo, validator, range(after + 1, now + MAX_AHEAD + 1), verify)
    return next((record for record in mine if record.run_id == run_id), None)


def _own_records(
    store: ArtefactReader,
    repo: str,
    validator: str,
    rounds: range,
    verify: Verify,
    skip: set[int] | frozenset[int] = frozenset(),
) -> Iterator[RoundRecord]:
    """Records under ``validator``'s name that it signed, of ``rounds``, newest first."""
    named = (parse_record_path(path) for path in store.list_artefacts(repo, CHECKS_BRANCH, "checks"))
    found = {one[0] for one in named if one is not None and one[1] == validator and one[0] in rounds} - skip
    for number in itertools.islice(sorted(found, reverse=True), MAX_LOOKED_AT + 1):  # the one past it meets the bound
        try:
            yield read_record(store, repo, number, validator, verify)
        except (HubNotFound, IntegrityError):
            continue


__all__ = ["Chain", "against_next", "follow_back", "last_record"]
