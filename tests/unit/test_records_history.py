"""A validator's chain of records: back to a first one that begins at zero, with no other record beside it."""

from __future__ import annotations

import pytest

from hivetrain.errors import IntegrityError
from hivetrain.hub.memory import MemoryStore
from hivetrain.scoring import AverageState, MovingAverage, Unscored
from hivetrain.scoring import history as history_module
from hivetrain.scoring.history import MAX_AHEAD, Chain, against_next, follow_back, last_record
from hivetrain.scoring.published import BoundedReader, ReadLimit
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


def test_a_record_that_its_validator_replaced_is_its_own_fault(store: MemoryStore) -> None:
    records = history(store, Ledger(), range(4))
    put(store, signed(records[1], coins="ee" * 32))
    assert "the record before is" in problem(store, records[3])
    put(store, records[1])
    assert chain(store, records[3]) == Chain(length=3, first=0, problems=())


def test_a_record_that_anybody_may_have_taken_away_or_written_over_is_nobodys_fault(store: MemoryStore) -> None:
    records = history(store, Ledger(), range(4))
    where = "its record of round 1, which that of round 2 follows, is"
    put(store, records[1].model_copy(update={"coins": "ee" * 32}))
    assert untold(store, records[3]).startswith(f"{where} not at the hub, something else is (")
    store.publish_artefacts(REPO, CHECKS_BRANCH, {record_path(1, VALIDATOR.hotkey): b"junk"})
    assert untold(store, records[3]).startswith(f"{where} not at the hub, something else is (")
    hidden = MemoryStore()
    put(hidden, records[0], *records[2:])
    assert untold(hidden, records[3]) == f"{where} missing at the hub: the chain cannot be followed past it"
    assert chain(hidden, records[3]).first == 2


def test_its_record_of_another_run_in_place_of_one_is_nobodys_fault(store: MemoryStore) -> None:
    records = history(store, Ledger(), range(4))
    put(store, signed(records[1], run_id="cc" * 32))
    where = "its record of round 1, which that of round 2 follows, is"
    assert untold(store, records[3]) == f"{where} not at the hub, one of another run is: it cannot be followed past it"


def test_a_record_that_was_replaced_after_another_followed_it_is_found(store: MemoryStore) -> None:
    ledger = Ledger()
    records = history(store, ledger, range(3))
    replaced = signed(records[1], coins="ee" * 32)
    said = f"its record of round 2 follows {records[1].sha256()[:12]} of round 1, not this one"
    assert against_next(store, REPO, replaced, verify) == [said]
    assert against_next(store, REPO, records[1], verify) == []
    assert against_next(store, REPO, records[2], verify) == []  # none follows yet
    put(store, signed(records[2], run_id="cc" * 32))
    assert against_next(store, REPO, replaced, verify) == []
    store.publish_artefacts(REPO, CHECKS_BRANCH, {record_path(2, VALIDATOR.hotkey): b"junk"})
    assert against_next(store, REPO, replaced, verify) == []


class Counting(MemoryStore):
    """Counts what is read."""

    def __init__(self) -> None:
        super().__init__()
        self.num_read = 0

    def read_artefact(self, repo: str, branch: str, path: str, max_bytes: int = 1 << 26) -> bytes:
        self.num_read += 1
        return super().read_artefact(repo, branch, path, max_bytes)


def test_a_chain_is_followed_as_far_as_its_beginning_is_felt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history_module, "EPSILON", 0.05)  # 0.7 ** 9 is below it
    counting, ledger = Counting(), Ledger()
    last = history(counting, ledger, range(30))[-1]
    assert chain(counting, last) == Chain(length=8, first=21, problems=())
    assert counting.num_read == 8
    hidden = {record_path(20, VALIDATOR.hotkey): b"junk"}
    counting.publish_artefacts(REPO, CHECKS_BRANCH, hidden)
    assert chain(counting, last).unsure == ()
    for _ in range(12):  # rounds in which it was not scored leave what came before
        ledger.round(len(ledger.records), missing={ONE: Unscored(why="our line was down")})
    put(counting, *ledger.records[30:])
    assert chain(counting, ledger.records[-1]).first == 21


def test_for_a_miner_that_came_new_a_chain_is_followed_a_cooldown_back(store: MemoryStore) -> None:
    ledger = Ledger()
    put(store, *[ledger.round(number, miners=MINERS[1:]) for number in range(30)])
    put(store, *[ledger.round(number) for number in (30, 31)])
    assert ONE not in ledger.records[29].after.entries
    assert chain(store, ledger.records[-1]) == Chain(
        length=SCORING.cooldown_rounds + 1, first=30 - SCORING.cooldown_rounds, problems=()
    )
    hidden = {record_path(29, VALIDATOR.hotkey): b"junk"}
    store.publish_artefacts(REPO, CHECKS_BRANCH, hidden)
    assert "its record of round 29" in untold(store, ledger.records[-1])


def test_a_chain_without_end_is_followed_so_many_records_and_no_more(
    store: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(history_module, "MAX_CHAIN", 3)
    last = history(store, Ledger(), range(6))[-1]
    assert untold(store, last) == (
        "its record of round 1, which that of round 2 follows, is not read any more: 3 before this one are"
    )


def test_a_reader_that_has_read_enough_tells_nothing_of_the_rest() -> None:
    counting = Counting()
    records = history(counting, Ledger(), range(6))
    size = len(records[0].to_bytes())
    for max_files, max_bytes in ((3, 1 << 30), (100, 7 * size // 2)):
        reader = BoundedReader(counting, max_files=max_files, max_bytes=max_bytes)
        counting.num_read = 0
        found = follow_back(reader, REPO, records[-1], ONE, SCORING, verify)
        assert (found.problems, len(found.unsure)) == ((), 1)
        assert "and no more" in found.unsure[0]
        assert (found.length, counting.num_read <= 4) == (3, True)
    reader = BoundedReader(counting, max_files=5, max_bytes=1 << 30)
    junk = {record_path(3, VALIDATOR.hotkey): b"junk"}
    counting.publish_artefacts(REPO, CHECKS_BRANCH, junk)
    late = history(MemoryStore(), Ledger(SECOND), range(1))[0]
    assert follow_back(reader, REPO, late, ONE, SCORING, verify) == Chain(length=0, first=0, problems=())
    with pytest.raises(IntegrityError, match="limit"):
        reader.read_artefact(REPO, CHECKS_BRANCH, record_path(0, VALIDATOR.hotkey), size // 2)


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


def test_no_junk_ahead_hides_the_newest_record(store: MemoryStore) -> None:
    records = history(store, Ledger(), range(3))
    rounds = [*range(3, 120), *range(10_000, 10_100)]
    junk = {record_path(number, VALIDATOR.hotkey): b"junk" for number in rounds}
    store.publish_artefacts(REPO, CHECKS_BRANCH, junk)
    counting = Counting()
    counting.publish_artefacts(REPO, CHECKS_BRANCH, junk | {record_path(2, VALIDATOR.hotkey): records[2].to_bytes()})
    assert last_record(counting, REPO, VALIDATOR.hotkey, RUN_ID, verify, now=4) == records[-1]
    assert counting.num_read == 4 + MAX_AHEAD - 1  # none of those that are far ahead
    assert last_record(store, REPO, VALIDATOR.hotkey, RUN_ID, verify, now=200) == records[-1]
    late = signed(records[2], round=150)  # a block that lags behind hides none of our own
    put(store, late)
    assert last_record(store, REPO, VALIDATOR.hotkey, RUN_ID, verify, now=100) == late
    beside = history(store, Ledger(), range(3))
    assert chain(store, beside[-1]).problems == ()


def test_the_newest_record_of_a_run_is_found(store: MemoryStore) -> None:
    assert last_record(store, REPO, VALIDATOR.hotkey, RUN_ID, verify, now=9) is None
    records = history(store, Ledger(), range(3))
    history(store, Ledger(SECOND), range(6))
    store.publish_artefacts(REPO, CHECKS_BRANCH, {record_path(9, VALIDATOR.hotkey): b"junk"})
    assert last_record(store, REPO, VALIDATOR.hotkey, RUN_ID, verify, now=9) == records[-1]
    assert last_record(store, REPO, VALIDATOR.hotkey, "cc" * 32, verify, now=9) is None


def test_more_files_than_are_looked_at_are_not_taken_for_none_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    counting = Counting()
    records = history(counting, Ledger(), range(2))
    monkeypatch.setattr(history_module, "MAX_LOOKED_AT", 10)
    for last, found in ((10, records[-1]), (11, None)):  # nine tiny files newer than ours, then ten
        junk = {record_path(number, VALIDATOR.hotkey): b"junk" for number in range(2, last + 1)}
        counting.publish_artefacts(REPO, CHECKS_BRANCH, junk)
        counting.num_read = 0
        if found is not None:
            assert last_record(counting, REPO, VALIDATOR.hotkey, RUN_ID, verify, now=60) == found
        else:
            with pytest.raises(ReadLimit, match="10 files"):
                last_record(counting, REPO, VALIDATOR.hotkey, RUN_ID, verify, now=60)
        assert counting.num_read == 10
    assert last_record(counting, REPO, VALIDATOR.hotkey, RUN_ID, verify, now=60, after=1) is None  # ten, and no more


def test_the_search_for_the_newest_record_is_bounded_in_rounds_and_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    counting = Counting()
    records = history(counting, Ledger(), range(3))
    counting.publish_artefacts(
        REPO, CHECKS_BRANCH, {record_path(number, VALIDATOR.hotkey): bytes(1000) for number in range(3, 60)}
    )
    assert last_record(counting, REPO, VALIDATOR.hotkey, RUN_ID, verify, now=60, after=2) is None
    assert counting.num_read == 57
    assert last_record(counting, REPO, VALIDATOR.hotkey, RUN_ID, verify, now=60, after=1) == records[-1]
    counting.num_read = 0
    monkeypatch.setattr(history_module, "MAX_BYTES_LOOKED_AT", 10_500)
    with pytest.raises(ReadLimit):
        last_record(counting, REPO, VALIDATOR.hotkey, RUN_ID, verify, now=60)
    assert counting.num_read == 11
