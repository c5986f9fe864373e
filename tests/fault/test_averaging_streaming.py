"""Batches flow: bounded memory, back pressure, links that come back, and speed that each sender must have."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from averaging_attacks import Tasks
from averaging_world import RUNNING, World, assert_each_chunk_is_a_mean, assert_mean, assert_same_bits, blamed
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hivetrain.averaging import opening, reduction
from hivetrain.averaging.codecs import CODEC_NAMES
from hivetrain.averaging.group import GroupPlan
from hivetrain.averaging.means import Mean
from hivetrain.averaging.state import RoundState
from hivetrain.averaging.transport import LinkLost


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GroupPlan, "block_chunks", 1)
    monkeypatch.setattr(GroupPlan, "batch_chunks", 2)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_bits_are_equal_whatever_the_codec_the_group_and_the_order_of_arrival(data: st.DataObject) -> None:
    size = data.draw(st.integers(1, 6))
    world = World(
        num_senders=size,
        num_validators=data.draw(st.integers(0, 2)),
        codec=data.draw(st.sampled_from([name for name in CODEC_NAMES if not name.startswith("log")])),  # signed values
        scale=data.draw(st.integers(1, 3)),
        stall_s=15.0,
    )
    for i in range(len(world.keys)):
        for j in range(len(world.keys)):
            delay_s = data.draw(st.sampled_from([0.0, 0.0, 0.001, 0.01, 0.1]))
            world.hub.script(world.peer(i), world.peer(j)).delay_s = delay_s
    outcomes = world.run()
    assert_mean(world, outcomes, range(size))
    assert_same_bits(outcomes)
    assert all(outcome.faults == () for outcome in outcomes.values())


def test_reducer_holds_a_window_of_each_sender_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[int] = []
    real = reduction.Reduction._read_batch

    async def watch(self: reduction.Reduction, *arguments: object) -> None:
        await real(self, *arguments)  # type: ignore[arg-type]
        held.extend(len(sender.inbox) for sender in self._senders.values())

    monkeypatch.setattr(reduction.Reduction, "_read_batch", watch)
    world = World(num_senders=3, scale=20)
    for i in (1, 2):  # member 0 is far ahead of the others
        for j in range(3):
            world.hub.script(world.peer(i), world.peer(j)).delay_s = 0.01
    outcomes = world.run()
    assert_mean(world, outcomes, range(3))
    assert max(held) == reduction.WINDOW


def test_means_come_home_while_vectors_still_go_out(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int]] = []  # at each arriving batch of a mean: it, and the vector batches delivered by then
    sent: dict[int, int] = {}
    real_add, real_read = Mean.add, reduction.Reduction._read_batch

    def add(self: Mean, mask: bytes, data: bytes | None = None) -> None:
        seen.append((len(self.masks), max(sent.values(), default=0)))
        real_add(self, mask, data)

    async def read(self: reduction.Reduction, stream: object, sender: object, index: int) -> None:
        await real_read(self, stream, sender, index)  # type: ignore[arg-type]
        sent[id(sender)] = index + 1

    monkeypatch.setattr(Mean, "add", add)
    monkeypatch.setattr(reduction.Reduction, "_read_batch", read)
    world = World(num_senders=2, scale=20)
    assert_mean(world, world.run(), range(2))
    total = len(world.plan.batches(world.plan.parts()[0]))
    first_at = next(delivered for index, delivered in seen if index == 0)
    assert first_at <= reduction.WINDOW + 1 < total


def test_link_that_breaks_in_mid_part_goes_on_where_it_was() -> None:
    world = World(num_senders=3, num_validators=1, scale=6)
    script = world.hub.script(world.peer(2), world.peer(0))
    script.drop_after = 9

    async def heal(_: World, tasks: Tasks) -> None:
        await asyncio.sleep(0.04)
        script.drop_after = None

    outcomes = world.run(script=heal)
    assert_mean(world, outcomes, range(3))
    assert all(outcome.faults == () for outcome in outcomes.values())
    again = outcomes[2].bytes_sent / outcomes[1].bytes_sent
    assert again < 1.3, "it did not start over"


def test_sender_that_is_back_before_its_reducer_noticed_the_break_is_let_in(monkeypatch: pytest.MonkeyPatch) -> None:
    real, lost = opening.receive_mean, asyncio.Event()
    kept_open: list[float] = []

    async def lose_once(stream: Any, mean: Mean, *rest: Any) -> Any:
        if RUNNING.get() == 2 and not lost.is_set():
            lost.set()
            await asyncio.sleep(0.5)  # some batches are over there
            raise LinkLost("reset on our side of a NAT")
        return await real(stream, mean, *rest)

    async def disconnect(self: RoundState, stream: Any) -> None:
        if RUNNING.get() == 2 and lost.is_set() and not kept_open:
            kept_open.append(asyncio.get_running_loop().time())
            asyncio.get_running_loop().call_later(1.5, stream.break_off)  # when the reducer gets to know
            return
        await hang_up(self, stream)

    hang_up = RoundState.disconnect
    monkeypatch.setattr(opening, "receive_mean", lose_once)
    monkeypatch.setattr(RoundState, "disconnect", disconnect)
    world = World(num_senders=3, scale=6, reducers=[0])
    for i in range(2):
        world.hub.script(world.peer(2), world.peer(i)).delay_s = 0.1
    outcomes = world.run()
    assert kept_open
    assert_mean(world, outcomes, range(3))
    assert all(outcome.faults == () for outcome in outcomes.values())


def test_sender_below_the_minimum_rate_is_late(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(min_rate: float) -> set[tuple[str, str]]:
        world = World(num_senders=3, num_validators=1, scale=10, stall_s=2.0, reducers=[0, 3])
        world.plan = GroupPlan(
            **{name: getattr(world.plan, name) for name in world.plan.__dataclass_fields__ if name != "min_rate"},
            min_rate=min_rate,
        )
        for i in (0, 3):
            world.hub.script(world.peer(2), world.peer(i)).delay_s = 0.2
        outcomes = world.run()
        assert_each_chunk_is_a_mean(world, outcomes, [0, 1, 2], [0, 1])
        return blamed(outcomes[0]) | blamed(outcomes[3])

    late = (World(num_senders=3).hotkey(2), "late")
    assert run(0.0) == set(), "80 kB/s is enough for so small a part"
    assert run(200_000.0) == {late}
