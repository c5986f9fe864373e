"""A validator's chain of records: back to a first one that begins at zero, with no other record beside it."""

from __future__ import annotations

import pytest

from hivetrain.hub.memory import MemoryStore
from hivetrain.scoring import AverageState, MovingAverage
from hivetrain.scoring.history import Chain, follow_back, last_record
from hivetrain.scoring.record import CHECKS_BRANCH, RoundRecord, record_path, sign_record
from tests.keys import verify
from tests.records_kit import MINERS, RUN_ID, SCORING, SECOND, VALIDATOR, Ledger

REPO = "a/b"
ONE = MINERS[0].hotkey


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore()


def put(store: MemoryStore, *records: RoundRecord) -> None:
    files = {record_path(one.round, one.validator): one.to_bytes() for one in records}
    store.publish_artefacts(REPO, CHECKS_BRANCH, files)


def chain(store: MemoryStore, record: RoundRecord) -> Chain:
    return follow_back(store, REPO, record, ONE, SCORING, verify)


def problem(store: MemoryStore, record: RoundRecord) -> str:
    found = chain(store, record)
    assert (len(found.problems), found.unsure) == (1, ())
    return found.problems[0]


def untold(store: MemoryStore, record: RoundRecord) -> str:
    found = chain(store, record)
    assert (found.problems, len(found.unsure)) == ((), 1)
    return found.unsure[0]


def signed(record: RoundRecord, **changes: object) -> RoundRecord:
    return sign_record(record.model_copy(update=changes), VALIDATOR)


def history(store: MemoryStore, ledger: Ledger, rounds: range) -> list[RoundRecord]:
    records = [ledger.round(number) for number in rounds]
    put(store, *records)
    return records


def test_a_chain_is_followed_to_its_first_record_over_rounds_that_were_not_scored(store: MemoryStore) -> None:
    ledger = Ledger()
    history(store, ledger, range(4, 7))
    history(store, Ledger(SECOND), range(3))
    last = history(store, ledger, range(9, 10))[0]
    assert chain(store, last) == Chain(length=3, first=4, problems=())
    assert chain(store, ledger.records[0]) == Chain(length=0, first=4, problems=())


def test_a_validator_cannot_begin_anew_in_the_middle(store: MemoryStore) -> None:
    ledger = Ledger()
    history(store, ledger, range(3))
    ledger.average = MovingAverage(None, SCORING)
    anew = signed(ledger.round(3), previous="")
    put(store, anew)
    ledger.records[-1] = anew
    later = history(store, ledger, range(4, 6))[-1]
    assert anew.before == AverageState()
    for record in (anew, later):
        assert problem(store, record) == "its record of round 2 is on the hub, and not in its chain"


def test_a_record_that_names_none_before_begins_at_zero(store: MemoryStore) -> None:
    ledger = Ledger()
    history(store, ledger, range(2))
    cut = signed(ledger.round(2), previous="")
    put(store, cut)
    assert problem(store, cut) == "its record of round 2 names none before, and does not begin at zero"
    ledger.records[-1] = cut
    assert "does not begin at zero" in problem(store, history(store, ledger, range(3, 4))[0])


def test_a_record_before_that_is_missing_forged_or_another_is_found(store: MemoryStore) -> None:
    ledger = Ledger()
    records = history(store, ledger, range(4))
    for other, words in (
        (signed(records[1], coins="ee" * 32), "the record before is"),
        (records[1].model_copy(update={"coins": "ee" * 32}), "forged"),
    ):
        put(store, other)
        assert words in problem(store, records[3])
    put(store, records[1])
    assert chain(store, records[3]).problems == ()
    hidden = MemoryStore()
    put(hidden, *records[2:])
    assert problem(hidden, records[3]) == "its record of round 1, which that of round 2 follows, is not there"


def test_averages_that_are_not_those_of_the_record_before_are_found(store: MemoryStore) -> None:
    ledger = Ledger()
    records = history(store, ledger, range(3))
    entries = {hotkey: one.model_copy(update={"value": 0.9}) for hotkey, one in records[1].after.entries.items()}
    raised = signed(records[2], before=records[1].after.model_copy(update={"entries": entries}))
    assert "the averages before round 2 are not those" in problem(store, raised)
    ahead = signed(records[2], before=records[1].after.model_copy(update={"last_round": 2}))
    assert problem(store, ahead) == "its record of round 2 follows one of round 2"


def test_a_published_round_cannot_be_left_out(store: MemoryStore) -> None:
    ledger = Ledger()
    history(store, ledger, range(2))
    state = ledger.average.state
    history(store, ledger, range(2, 3))
    del ledger.records[-1]
    ledger.average = MovingAverage(None, SCORING, state)
    assert problem(store, history(store, ledger, range(3, 4))[0]) == (
        "its record of round 2 is on the hub, and not in its chain"
    )


def test_what_strangers_put_under_its_name_and_other_runs_break_no_chain(store: MemoryStore) -> None:
    ledger = Ledger()
    records = history(store, ledger, range(5, 7))
    junk = {record_path(number, VALIDATOR.hotkey): b"junk" for number in (0, 3)}
    store.publish_artefacts(REPO, CHECKS_BRANCH, junk)
    put(store, signed(Ledger().round(1), run_id="cc" * 32))
    assert chain(store, records[-1]).problems == ()
    follower = signed(ledger.round(7), run_id="cc" * 32)
    assert problem(store, follower) == "the record of round 6 is of another run"


def test_the_newest_record_of_a_run_is_found(store: MemoryStore) -> None:
    assert last_record(store, REPO, VALIDATOR.hotkey, RUN_ID, verify, now=9) is None
    records = history(store, Ledger(), range(3))
    history(store, Ledger(SECOND), range(6))
    store.publish_artefacts(REPO, CHECKS_BRANCH, {record_path(9, VALIDATOR.hotkey): b"junk"})
    assert last_record(store, REPO, VALIDATOR.hotkey, RUN_ID, verify, now=9) == records[-1]
    assert last_record(store, REPO, VALIDATOR.hotkey, "cc" * 32, verify, now=9) is None
