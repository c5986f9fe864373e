"""What a member makes of what others say that they hold: whose word outvotes whose, and whose counts for nothing."""

from __future__ import annotations

from collections.abc import Callable, Collection
from types import SimpleNamespace

import pytest
from averaging_world import World, verify

from hivetrain.averaging.agreement import Agreement
from hivetrain.averaging.memory import run_in_virtual_time
from hivetrain.averaging.messages import Confirm, MaskRun, Result
from hivetrain.averaging.peers import Peers
from hivetrain.averaging.results import pack_mask, sign_result
from hivetrain.averaging.signed import Signed
from hivetrain.averaging.state import Holding, RoundState
from hivetrain.errors import Fault

PART, FIRST, SECOND = 1, 1, 2
"""Member 1 reduces part 1; where it fails, member 2 does."""


class Desk:
    """Member 0, which holds the first reducer's mean of part 1, and hears what the others say."""

    def __init__(self, size: int, included: Collection[int] | None = None) -> None:
        self.world = World(num_senders=size, num_validators=1)
        world = self.world
        transport = world.hub.transport(world.peer(0))
        self.state = RoundState(world.plan, world.keys[0], world.payloads[0], transport, verify)
        self.state.clock.begin()
        self.signed = Signed(self.state)
        self.agreement = Agreement(self.state, self.signed, Peers(self.state, self.signed))
        mine = self.result(0, included)
        assert self.signed.note(mine)
        self.holding.mean = SimpleNamespace(result=mine, rank=0, fail=lambda why: None)  # type: ignore[assignment]
        self.holding.settled = True

    @property
    def holding(self) -> Holding:
        return self.state.holdings[PART]

    def result(
        self,
        rank: int,
        included: Collection[int] | None = None,
        root: bytes | None = None,
        change: Callable[[list[MaskRun]], list[MaskRun]] = lambda runs: runs,
    ) -> Result:
        """A result of the part, signed by its reducer of that rank; of all senders where ``included`` is None."""
        world = self.world
        wanted = range(world.num_senders) if included is None else included
        mask = pack_mask([i in wanted for i in range(len(world.keys))])
        runs = change([MaskRun(stop=self.holding.part.stop, included=mask)])
        signer = {0: FIRST, 1: SECOND}[rank]
        return sign_result(world.keys[signer], world.plan.group_id(), PART, rank, runs, root or bytes([rank] * 32))

    def hear(self, index: int, *results: Result) -> None:
        words = Confirm(version=1, results=list(results), done=True)
        self.agreement.hear(self.world.plan.members[index], words)

    @property
    def keeps(self) -> bool:
        return self.holding.mean is not None and self.holding.settled

    def blames(self) -> set[tuple[str, Fault]]:
        return {(record.hotkey, record.fault) for record in self.state.ledger.faults()}


def at_desk(scene: Callable[[], None]) -> None:
    async def main() -> None:
        scene()

    run_in_virtual_time(main())


def test_a_reducer_and_one_other_that_lie_together_outvote_nobody() -> None:
    def scene() -> None:
        desk = Desk(4)
        second = desk.result(1)
        for liar in (SECOND, 3):  # two say so; but the reducer of that rank vouches for itself
            desk.hear(liar, second)
            assert desk.keeps
        desk.hear(FIRST, desk.result(0))
        desk.hear(4)
        assert desk.keeps, "one holder each besides the reducers, of the same weight: the lower rank stands"
        assert desk.blames() == set()

    at_desk(scene)


def test_two_who_are_not_its_reducer_outvote_one() -> None:
    def scene() -> None:
        desk = Desk(4)
        desk.hear(3, desk.result(1))
        assert desk.keeps
        desk.hear(4, desk.result(1))
        assert not desk.keeps, "at once: no more can hold ours than hold that, but for the reducer itself"
        assert desk.holding.rank == desk.state.plan.num_ranks, "it is taken from who holds it, and not made again"

    at_desk(scene)


def test_of_equally_many_the_weightier_mean_wins_once_everyone_has_spoken() -> None:
    def scene() -> None:
        desk = Desk(4, included=(0, 1, 2))
        desk.hear(3, desk.result(1))
        desk.hear(FIRST, desk.result(0, (0, 1, 2)))
        desk.hear(SECOND, desk.result(1))
        assert desk.keeps, "member 4 may still hold ours"
        desk.hear(4)
        assert not desk.keeps

    at_desk(scene)


def test_what_is_void_and_who_is_disregarded_does_not_count() -> None:
    def scene() -> None:
        desk = Desk(4)
        desk.hear(3, desk.result(1))
        desk.state.blame(desk.world.hotkey(3), Fault.MALFORMED, "it speaks in tongues")
        desk.hear(4, desk.result(1))
        assert desk.keeps, "one of two"
        desk = Desk(4)
        desk.signed.proofs[PART, 1] = b"evidence"
        for index in (3, 4):
            desk.agreement._peers.warn = lambda key, peers=None: warned.append(key)  # type: ignore[method-assign]
            desk.hear(index, desk.result(1))
        assert desk.keeps
        assert warned == [(PART, 1)] * 2, "and who holds it is shown the evidence"

    warned: list[tuple[int, int]] = []
    at_desk(scene)


def test_two_results_of_one_reducer_convict_it_whoever_passes_them_on() -> None:
    def scene() -> None:
        desk = Desk(4)
        desk.signed.on_proof = lambda key: None
        desk.hear(3, desk.result(0, root=b"\xff" * 32))
        assert desk.blames() == {(desk.world.hotkey(FIRST), Fault.WRONG_AVERAGE)}
        assert not desk.keeps

    at_desk(scene)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("nobody is in it", lambda runs: [run.model_copy(update={"included": b"\x00"}) for run in runs]),
        ("a member that sends nothing", lambda runs: [run.model_copy(update={"included": b"\x1f"}) for run in runs]),
        ("one past the last", lambda runs: [run.model_copy(update={"included": b"\x8f"}) for run in runs]),
        ("a longer mask", lambda runs: [run.model_copy(update={"included": b"\x0f\x00"}) for run in runs]),
        ("it ends too soon", lambda runs: [run.model_copy(update={"stop": run.stop - 1}) for run in runs]),
        ("it ends too late", lambda runs: [run.model_copy(update={"stop": run.stop + 1}) for run in runs]),
        ("it ends twice", lambda runs: [*runs, *runs]),
    ],
)
def test_a_signed_result_that_cannot_be_a_mean_is_its_reducers_fault_and_counts_for_nothing(
    name: str, change: Callable[[list[MaskRun]], list[MaskRun]]
) -> None:
    def scene() -> None:
        desk = Desk(4)
        for index in (3, 4):
            desk.hear(index, desk.result(1, change=change))
        assert desk.keeps, name
        assert desk.blames() == {(desk.world.hotkey(SECOND), Fault.WRONG_AVERAGE)}, name

    at_desk(scene)


def test_a_result_that_nobody_signed_is_the_fault_of_who_passes_it_on() -> None:
    def scene() -> None:
        desk = Desk(4)
        desk.hear(3, desk.result(1).model_copy(update={"root": b"\x07" * 32}))
        assert desk.keeps
        assert desk.blames() == {(desk.world.hotkey(3), Fault.BAD_SIGNATURE)}

    at_desk(scene)
