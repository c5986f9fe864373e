"""Who may join, and how peers end with one state: over records in memory, with time that is turned by hand."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable

import pytest

from hivetrain.errors import ConfigError
from hivetrain.trainer.board import Board
from hivetrain.trainer.membership import Ending, Presence, agreed, canonical, elders


class Records:
    """What the DHT holds, for everyone."""

    def __init__(self) -> None:
        self.values: dict[str, dict[str, object]] = {}

    def of(self, peer_id: str) -> Directory:
        return Directory(self, peer_id)


class Directory:
    def __init__(self, records: Records, peer_id: str) -> None:
        self._records, self._peer_id = records, peer_id

    def publish(self, key: str, value: object | None, expires_in_s: float) -> None:
        mine = self._records.values.setdefault(key, {})
        mine.pop(self._peer_id, None)
        if value is not None:
            mine[self._peer_id] = value

    def read(self, key: str) -> dict[Hashable, object]:
        return dict(self._records.values.get(key, {}))


def presence(peer_id: str, since: float = 0.0, epochs: int = 10, model: str = "gpt2") -> Presence:
    return Presence(peer_id=peer_id, since=float(since), swarm_epochs=epochs, fingerprint={"model": model})


@pytest.fixture
def records() -> Records:
    return Records()


def board(records: Records, me: Presence, asked: int = 0) -> Board:
    return Board(records.of(me.peer_id), "run", me, asked)


def test_the_first_peer_begins_the_run_and_the_second_follows_it(records: Records) -> None:
    first, second = board(records, presence("a", 1.0)), board(records, presence("b", 2.0))
    assert first.join() == []
    assert [elder.peer_id for elder in second.join()] == ["a"]
    first.close()
    second.close()


def test_another_model_under_the_same_run_id_is_refused_and_leaves_no_record(records: Records) -> None:
    first, second = board(records, presence("a", 1.0)), board(records, presence("b", 2.0, model="llama"))
    first.join()
    with pytest.raises(ConfigError, match=r"run_id 'run' is in use.*\n.*the swarm has \[gpt2\], we have \[llama\]"):
        second.join()
    assert [other.peer_id for other in first.others()] == []
    first.close()


def test_of_two_that_come_at_once_only_the_younger_is_refused(records: Records) -> None:
    younger = presence("b", 1.0, model="llama")
    records.of("b").publish("run_hivetrain_peers", younger.to_wire(), 60)
    elder = board(records, presence("a", 1.0))
    assert elder.join() == []
    elder.close()


def test_a_newcomer_takes_the_number_of_epochs_from_the_swarm(records: Records) -> None:
    first, second = board(records, presence("a", 1.0, epochs=40)), board(records, presence("b", 2.0, epochs=3))
    first.join()
    second.join()
    assert second.me.swarm_epochs == 40
    first.close()
    second.close()


def test_a_newcomer_who_asks_for_another_number_is_refused(records: Records) -> None:
    first = board(records, presence("a", 1.0, epochs=40))
    first.join()
    with pytest.raises(ConfigError, match="ends after 40 swarm epochs, we ask for 3"):
        board(records, presence("b", 2.0, epochs=3), asked=3).join()
    first.close()


@pytest.mark.parametrize(
    "wrong",
    [
        None, 7, [], ["a", 1.0, 5], ["a", "now", 5, {}], ["a", 1.0, 0, {}], ["a", 1.0, -1, {}],
        ["a", 1.0, 5, {"model": 3}], ["a", 1.0, 5, {"model": "x" * 2000}], ["a" * 2000, 1.0, 5, {}],
        ["a", float("nan"), 5, {}], ["a", 1.0, 1 << 60, {}], ["a", 1.0, 5, {str(i): "" for i in range(99)}],
    ],
)  # fmt: skip
def test_a_strangers_record_that_is_none_is_ignored(records: Records, wrong: object) -> None:
    records.of("x").publish("run_hivetrain_peers", wrong, 60)
    assert board(records, presence("b", 9.0)).others() == []
    assert Ending.from_wire(wrong) is None


def test_records_survive_the_wire() -> None:
    assert Presence.from_wire(presence("a", 1.5).to_wire()) == presence("a", 1.5)
    for shares in (True, False):
        ending = Ending(peer_id="a", epoch=4, digest="00", samples=96, shares=shares)
        assert Ending.from_wire(ending.to_wire()) == ending
    for samples in (-1, 1 << 60, 1.5, "96", None):
        assert Ending.from_wire(["a", 4, "00", samples, True]) is None
    for wrong in (["a", 4, "00"], ["a", 4, "00", 96], ["a", 4, "00", 96, 1]):
        assert Ending.from_wire(wrong) is None


def test_elders_are_ordered_by_age_then_id() -> None:
    here = [presence("c", 2.0), presence("b", 1.0), presence("a", 1.0), presence("d", 9.0)]
    assert [elder.peer_id for elder in elders(presence("m", 2.5), here)] == ["a", "b", "c"]


def ending(peer_id: str, digest: str, epoch: int = 10, samples: int = 96, shares: bool = True) -> Ending:
    return Ending(peer_id=peer_id, epoch=epoch, digest=digest, samples=samples, shares=shares)


def test_the_state_that_most_hold_at_the_newest_epoch_is_the_runs() -> None:
    assert canonical([]) is None
    found = canonical([ending("a", "y"), ending("b", "x"), ending("c", "x"), ending("d", "z", 9), ending("e", "z", 9)])
    assert found == ending("b", "x")
    assert canonical([ending("b", "x"), ending("a", "y")]) == ending("a", "y")
    assert canonical([ending("a", "x", 9), ending("b", "x", 9), ending("c", "y", 10)]) == ending("c", "y", 10)


def test_who_has_only_the_number_of_the_last_epoch_does_not_outvote_its_work() -> None:
    # "b" made the last step; the others came in it and downloaded what was there before.
    late = [ending("a", "old", samples=0), ending("c", "old", samples=0)]
    assert canonical([*late, ending("b", "new")]) == ending("b", "new")
    # One of them stepped alone, with the few samples that it had.
    assert canonical([ending("a", "own", samples=8), ending("b", "new")]) == ending("b", "new")
    # Whoever downloads the run's state holds it, too.
    assert canonical([ending("a", "new", samples=0), ending("b", "new"), late[1]]) == ending("a", "new", samples=0)


def test_a_state_that_nobody_can_download_is_the_runs_only_where_there_is_no_other() -> None:
    behind_nat, public = ending("a", "x", samples=100, shares=False), ending("b", "y", samples=60)
    assert canonical([behind_nat, public]) == public
    assert canonical([behind_nat, ending("b", "y", samples=60, shares=False)]) == behind_nat
    assert canonical([behind_nat, public, ending("c", "x", samples=0)]) == behind_nat, "who loaded it shares it"


def test_more_samples_than_a_step_can_have_are_not_believed() -> None:
    liar, honest = ending("a", "x", samples=(1 << 60) - 1), [ending("b", "y"), ending("c", "y")]
    assert canonical([liar, *honest]) == liar
    assert canonical([liar, *honest], most_samples=128_000) == honest[0]
    assert canonical([liar, ending("b", "y", samples=0)], most_samples=128_000) == liar, "as one that made no step"


def test_peers_agree_only_once_all_who_are_expected_hold_one_state() -> None:
    both = {"a": ending("a", "x"), "b": ending("b", "x")}
    assert agreed(both, ["a", "b"])
    assert not agreed(both, ["a", "b", "c"])
    assert not agreed({**both, "b": ending("b", "y")}, ["a", "b"])


class End:
    """One peer at the end of a run, whose waiting is turned by hand."""

    def __init__(
        self, records: Records, peer_id: str, since: float, digest: str, samples: int = 96, dialled: bool = True
    ) -> None:
        self.board = board(records, presence(peer_id, since))
        self.board.join()
        self.digest, self.shares, self.downloads, self.now = digest, True, 0, 0.0
        self.samples, self.dialled = samples, dialled

    def settle(self, source: str | None = None, on_wait: list[object] | None = None) -> bool:
        def download() -> bool:
            self.downloads += 1
            if source is not None:
                self.digest, self.samples = source, 0
            return source is not None

        def wait(seconds: float) -> None:
            self.now += seconds
            if on_wait:
                on_wait.pop(0)()  # type: ignore[operator]

        return self.board.settle(
            state=lambda: (10, self.digest, self.samples), shares=self.dialled, download=download,
            keep_sharing=lambda on: setattr(self, "shares", on),
            deadline_s=5.0, download_s=7.0, wait=wait, clock=lambda: self.now,
        )  # fmt: skip


def test_a_peer_that_differs_in_a_bit_downloads_the_majoritys_state(records: Records) -> None:
    a, b, c = (End(records, name, i, digest) for i, (name, digest) in enumerate([("a", "y"), ("b", "x"), ("c", "x")]))
    for end in (b, c):
        end.board._publish_ending(10, end.digest, 96, True)
    assert a.settle(source="x")
    assert (a.downloads, a.shares, a.digest) == (1, False, "x")
    assert b.settle()
    assert (b.downloads, b.shares) == (0, True)
    for end in (a, b, c):
        end.board.close()


def test_a_newcomer_of_the_last_epoch_takes_the_state_of_who_finished_it(records: Records) -> None:
    newcomer, elder = End(records, "a", 2.0, "old", samples=0), End(records, "b", 1.0, "new")
    newcomer.board._publish_ending(10, "old", 0, True)
    assert elder.settle(on_wait=[lambda: newcomer.settle(source="new")])
    assert (elder.digest, elder.downloads, elder.shares) == ("new", 0, True)
    assert (newcomer.digest, newcomer.downloads, newcomer.shares) == ("new", 1, False)
    for end in (newcomer, elder):
        end.board.close()


@pytest.mark.parametrize("comes", [False, True], ids=["a stranger", "a peer"])
def test_nobody_can_say_how_another_peer_ended(records: Records, comes: bool) -> None:
    a, b = End(records, "a", 0, "x"), End(records, "b", 1, "x")
    b.board._publish_ending(10, "x", 96, True)
    if comes:
        records.of("liar").publish("run_hivetrain_peers", presence("liar", 2.0).to_wire(), 60)
    records.of("liar").publish("run_hivetrain_end", ending("b", "z", epoch=11, samples=1000).to_wire(), 60)
    assert a.settle(source="z")
    assert (a.digest, a.downloads) == ("x", 0)
    for end in (a, b):
        end.board.close()


def test_who_was_killed_and_came_back_is_waited_for_once(records: Records) -> None:
    a, b = End(records, "a", 0, "x"), End(records, "b", 5, "x")
    records.of("b before").publish("run_hivetrain_peers", presence("b", 1.0).to_wire(), 60)
    b.board._publish_ending(10, "x", 96, True)
    assert a.settle()
    assert a.now == 0.0
    for end in (a, b):
        end.board.close()


def test_nobody_downloads_before_everyone_has_ended(records: Records) -> None:
    a, b, c = (End(records, name, i, digest) for i, (name, digest) in enumerate([("a", "x"), ("b", "y"), ("c", "y")]))
    a.board._publish_ending(10, "x", 96, True)
    later = [lambda: c.board._publish_ending(10, "y", 96, True), lambda: a.board._publish_ending(10, "y", 96, True)]
    assert b.settle(on_wait=list(later))
    assert b.downloads == 0
    for end in (a, b, c):
        end.board.close()


def test_a_peer_that_never_ends_costs_the_deadline_and_no_more(records: Records) -> None:
    a, b = End(records, "a", 0, "x"), End(records, "b", 1, "x")
    assert a.settle()
    assert 5.0 <= a.now < 6.0
    for end in (a, b):
        end.board.close()


def test_past_the_deadline_those_who_ended_agree_without_the_silent_one(records: Records) -> None:
    a, b, c = (End(records, name, i, digest) for i, (name, digest) in enumerate([("a", "x"), ("b", "y"), ("c", "z")]))
    a.board._publish_ending(10, "x", 96, True)
    assert b.settle(source="x")
    assert (b.digest, b.downloads) == ("x", 1)
    assert 5.0 <= b.now < 6.0
    for end in (a, b, c):
        end.board.close()


def test_a_state_that_nobody_gives_is_not_waited_for_without_end(records: Records) -> None:
    a, b = End(records, "a", 0, "x"), End(records, "b", 1, "y")
    a.board._publish_ending(10, "x", 96, True)
    assert not b.settle()
    assert 12.0 <= b.now < 13.0
    for end in (a, b):
        end.board.close()


def test_of_two_that_stepped_alone_the_one_whom_nobody_can_dial_downloads(records: Records) -> None:
    behind_nat, public = End(records, "a", 0, "x", samples=100, dialled=False), End(records, "b", 1, "y", samples=60)
    public.board._publish_ending(10, "y", 60, True)
    assert behind_nat.settle(source="y")
    assert public.settle()
    assert (behind_nat.digest, public.digest, public.shares, public.now) == ("y", "y", True, 0.0)
    for end in (behind_nat, public):
        end.board.close()


def test_states_of_which_nobody_can_download_one_are_not_waited_for(records: Records) -> None:
    a, b = (End(records, name, i, digest, dialled=False) for i, (name, digest) in enumerate([("a", "x"), ("b", "y")]))
    a.board._publish_ending(10, "x", 96, False)
    assert not b.settle()
    assert (b.downloads, b.now) == (0, 0.0)
    for end in (a, b):
        end.board.close()


def test_a_peer_that_leaves_is_waited_for_no_longer(records: Records) -> None:
    a, b = End(records, "a", 0, "x"), End(records, "b", 1, "y")
    assert a.settle(on_wait=[b.board.close])
    assert a.now < 1.0
    a.board.close()


def test_ones_own_epochs_are_not_changed_by_younger_peers(records: Records) -> None:
    younger = dataclasses.replace(presence("b", 5.0), swarm_epochs=99)
    records.of("b").publish("run_hivetrain_peers", younger.to_wire(), 60)
    first = board(records, presence("a", 1.0))
    first.join()
    assert first.me.swarm_epochs == 10
    first.close()
