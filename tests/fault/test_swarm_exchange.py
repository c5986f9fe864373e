"""What a group of friends averages: its members meet, agree on a plan, and end with the same bits, whoever is lost."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from hivetrain.averaging.memory import MemoryHub, MemoryTransport, run_in_virtual_time
from hivetrain.errors import ServiceError
from hivetrain.trainer.exchange import Averaged, Vector, average, cut_from_one
from hivetrain.trainer.keys import SessionKey, verify
from hivetrain.trainer.lobby import Lobby
from hivetrain.trainer.meeting import Arrival, Call, Meeting, Times

GROUP = b"a group of hivemind's"
SHAPES = [(3, 5), (4096,), (100, 50)]
TIMES = Times(absent_s=2.0, ready_s=8.0, total_s=24.0)


class Friend:
    """A member: its transport, its lobby, and the tensors that it brings."""

    def __init__(self, world: World, index: int) -> None:
        self.world, self.index, self.key = world, index, SessionKey()
        generator = torch.Generator().manual_seed(index)
        self.tensors = [torch.randn(shape, generator=generator) for shape in SHAPES]
        if index == 0:  # as gradients are kept
            cut = cut_from_one([tensor.shape for tensor in self.tensors])
            self.tensors = [piece.copy_(tensor) for piece, tensor in zip(cut, self.tensors, strict=True)]
        self.weight = float(index + 1)
        self.vector = Vector(self.tensors, world.codec)
        self.called: list[float] = []

    async def arrive(self) -> Meeting:
        """Meet, as soon as hivemind has formed the group."""
        self.transport: MemoryTransport = self.world.hub.transport(peer(self.index))
        self.lobby = Lobby(self.transport)
        await self.lobby.start()
        arrival = Arrival(
            hotkey=self.key.hotkey, maddrs=[], reduces=True, layout=self.vector.layout.layout_hash
        )  # fmt: skip
        peers = [peer(index) for index in range(self.world.size)]
        self.meeting = Meeting(
            GROUP, peers, peer(0), self.lobby, arrival, self.vector.layout, self.world.times, self.on_called
        )
        self.meeting.start()
        return self.meeting

    def on_called(self, in_s: float) -> None:
        self.called.append(in_s)

    async def average(self) -> Averaged:
        payload, tree = self.vector.encode(self.tensors, GROUP + bytes([self.index]))
        averaged = await average(self.meeting, self.key, self.weight, payload, tree, self.vector.memory)
        if averaged.mean is not None:
            self.vector.copy_into(averaged.mean, self.tensors)
        return averaged

    async def whole(self) -> Averaged:
        await self.arrive()
        try:
            return await self.average()
        finally:
            await self.meeting.close()

    async def die(self) -> None:
        """A killed process takes its streams with it."""
        await self.transport.close()


@dataclass
class World:
    """A group whose first member leads."""

    size: int = 3
    codec: str = "fp32"
    times: Times = TIMES
    hub: MemoryHub = field(default_factory=MemoryHub)

    def __post_init__(self) -> None:
        self.friends = [Friend(self, index) for index in range(self.size)]
        self.before = [[tensor.clone() for tensor in friend.tensors] for friend in self.friends]

    def mean(self, *members: int) -> list[Tensor]:
        total = sum(self.friends[i].weight for i in members)
        return [
            sum((self.before[i][place] * self.friends[i].weight for i in members), torch.zeros(shape)) / total
            for place, shape in enumerate(SHAPES)
        ]

    def assert_same_bits(self, *members: int) -> None:
        first = self.friends[members[0]].tensors
        for index in members[1:]:
            assert all(torch.equal(a, b) for a, b in zip(first, self.friends[index].tensors, strict=True))

    def assert_close(self, index: int, expected: list[Tensor], atol: float = 1e-6) -> None:
        for found, tensor in zip(self.friends[index].tensors, expected, strict=True):
            torch.testing.assert_close(found, tensor, rtol=0, atol=atol)


def peer(index: int) -> str:
    return f"peer-{index}"


def play(world: World, script: Callable[[], Coroutine[None, None, None]]) -> None:
    """Run ``script`` in virtual time, and take everyone's transport down."""

    async def main() -> None:
        try:
            await script()
        finally:
            for friend in world.friends:
                if hasattr(friend, "transport"):
                    await friend.transport.close()

    run_in_virtual_time(main())


@pytest.mark.parametrize(("codec", "atol"), [("fp32", 1e-6), ("fp16", 2e-3), ("int8", 0.05), ("int4", 0.6)])
def test_everyone_ends_with_the_same_bits_under_every_codec(codec: str, atol: float) -> None:
    world = World(codec=codec)

    async def script() -> None:
        done = await asyncio.gather(*(friend.whole() for friend in world.friends))
        assert all(one.weights == {peer(0): 1.0, peer(1): 2.0, peer(2): 3.0} for one in done)
        assert all(one.sent_bytes > 0 for one in done)

    play(world, script)
    world.assert_same_bits(0, 1, 2)
    world.assert_close(1, world.mean(0, 1, 2), atol)


def test_members_that_bring_the_same_bits_send_none_and_keep_theirs() -> None:
    world = World()
    for friend in world.friends[1:]:
        friend.tensors = [tensor.clone() for tensor in world.friends[0].tensors]

    async def script() -> None:
        done = await asyncio.gather(*(friend.whole() for friend in world.friends))
        assert all(one.mean is None and one.sent_bytes == 0 and len(one.weights) == 3 for one in done)

    play(world, script)
    assert all(torch.equal(a, b) for a, b in zip(world.friends[2].tensors, world.before[0], strict=True))


def test_who_brings_nothing_receives_the_mean_of_the_others() -> None:
    world = World()
    world.friends[1].weight = 0.0

    async def script() -> None:
        await asyncio.gather(*(friend.whole() for friend in world.friends))

    play(world, script)
    world.assert_same_bits(0, 1, 2)
    world.assert_close(1, world.mean(0, 2))


def test_where_nobody_brings_anything_everyone_keeps_what_they_have() -> None:
    world = World()
    for friend in world.friends:
        friend.weight = 0.0

    async def script() -> None:
        done = await asyncio.gather(*(friend.whole() for friend in world.friends))
        assert all(one.mean is None and not one.weights for one in done)

    play(world, script)
    assert all(torch.equal(a, b) for a, b in zip(world.friends[2].tensors, world.before[2], strict=True))


@pytest.mark.parametrize("first", [0, 1])
def test_the_first_who_is_ready_calls_the_others_once(first: int) -> None:
    world = World()

    async def script() -> None:
        for friend in world.friends:
            await friend.arrive()
        await asyncio.sleep(1.0)
        assert [friend.called for friend in world.friends] == [[], [], []]
        running = asyncio.create_task(world.friends[first].average())
        await asyncio.sleep(0.5)
        assert all(friend.called == [0.0] for friend in world.friends if friend.index != first)
        others = (friend.average() for friend in world.friends if friend.index != first)
        await asyncio.gather(running, *others)

    play(world, script)
    world.assert_same_bits(0, 1, 2)


@pytest.mark.parametrize("caller", [0, 1])
def test_who_calls_the_group_for_a_time_is_heard_by_all_and_who_calls_later_is_not(caller: int) -> None:
    world = World()

    async def script() -> None:
        for friend in world.friends[:2]:
            await friend.arrive()
        await asyncio.sleep(0.5)
        await world.friends[caller].meeting.call(3.0)
        await asyncio.sleep(0.5)
        await world.friends[1 - caller].meeting.call(1.0)
        await world.friends[2].arrive()
        await asyncio.sleep(0.5)
        for friend, in_s in zip(world.friends, (3.0, 3.0, 2.5), strict=True):
            assert friend.called == [pytest.approx(in_s, abs=0.1)]
        await asyncio.gather(*(friend.average() for friend in world.friends))
        assert all(len(friend.called) == 1 for friend in world.friends)
        for friend in world.friends:
            await friend.meeting.call(1.0)  # after Ready nothing is said: it would end the stream
            await friend.meeting.close()

    play(world, script)
    world.assert_same_bits(0, 1, 2)


def test_a_group_is_called_for_no_later_than_it_waits_for_who_is_not_ready() -> None:
    world = World(size=2)

    async def script() -> None:
        for friend in world.friends:
            await friend.arrive()
        await asyncio.sleep(0.5)
        await world.friends[1].meeting.call(1e9)
        await asyncio.sleep(0.5)
        assert [friend.called for friend in world.friends] == [[TIMES.ready_s], [pytest.approx(TIMES.ready_s, abs=0.1)]]
        await asyncio.gather(*(friend.average() for friend in world.friends))

    play(world, script)
    world.assert_same_bits(0, 1)


def test_a_call_from_before_the_leader_is_there_reaches_it() -> None:
    world = World(size=2)

    async def script() -> None:
        await world.friends[1].arrive()
        await world.friends[1].meeting.call(3.0)
        await asyncio.sleep(1.0)
        await world.friends[0].arrive()
        await asyncio.sleep(1.0)
        assert [1.5 < in_s <= 3.0 for friend in world.friends for in_s in friend.called] == [True, True]
        await asyncio.gather(*(friend.average() for friend in world.friends))

    play(world, script)
    world.assert_same_bits(0, 1)


@pytest.mark.parametrize("frames", [[-1.0], [math.inf], [math.nan], [1.0, 1.0]], ids=["past", "inf", "nan", "twice"])
def test_who_calls_as_nobody_may_has_left_the_group(frames: list[float]) -> None:
    world, odd = World(), SessionKey()

    async def script() -> None:
        for friend in world.friends[:2]:
            await friend.arrive()
        lobby = Lobby(world.hub.transport(peer(2)))
        await lobby.start()
        stream = await lobby.room(GROUP, "meet").open(peer(0), (), 1.0)
        layout = world.friends[0].vector.layout.layout_hash
        await stream.send(Arrival(hotkey=odd.hotkey, maddrs=[], reduces=True, layout=layout).to_bytes())
        for in_s in frames:
            await stream.send(Call.model_construct(kind="call", in_s=in_s).to_bytes())
        await asyncio.sleep(0.5)
        began = asyncio.get_running_loop().time()
        done = await asyncio.gather(*(friend.average() for friend in world.friends[:2]))
        assert asyncio.get_running_loop().time() - began < 1.0
        assert all(set(one.weights) == {peer(0), peer(1)} for one in done)
        await lobby.close()

    play(world, script)
    world.assert_same_bits(0, 1)


def test_a_member_that_dies_before_it_is_ready_costs_no_waiting() -> None:
    world = World()

    async def script() -> None:
        for friend in world.friends:
            await friend.arrive()
        await asyncio.sleep(1.0)
        await world.friends[2].die()
        began = asyncio.get_running_loop().time()
        done = await asyncio.gather(*(friend.average() for friend in world.friends[:2]))
        assert asyncio.get_running_loop().time() - began < 1.0
        assert all(set(one.weights) == {peer(0), peer(1)} for one in done)

    play(world, script)
    world.assert_same_bits(0, 1)
    world.assert_close(0, world.mean(0, 1))


def test_a_member_that_never_comes_is_left_out_in_time() -> None:
    world = World()

    async def script() -> None:
        began = asyncio.get_running_loop().time()
        await asyncio.gather(*(friend.whole() for friend in world.friends[:2]))
        assert asyncio.get_running_loop().time() - began < TIMES.absent_s + 1.0

    play(world, script)
    world.assert_same_bits(0, 1)
    world.assert_close(0, world.mean(0, 1))


def test_a_member_that_dies_in_the_exchange_leaves_the_others_with_one_mean() -> None:
    world = World()
    # What it sends to one of the others gets stuck in the middle of its vector.
    world.hub.script(peer(2), peer(1)).stall_after = 5

    async def script() -> None:
        tasks = [asyncio.create_task(friend.whole()) for friend in world.friends]
        await asyncio.sleep(0.5)
        assert not any(task.done() for task in tasks)
        tasks[2].cancel()
        await world.friends[2].die()
        done = await asyncio.gather(*tasks[:2])
        assert {peer(0), peer(1)} <= {peer_id for one in done for peer_id, weight in one.weights.items() if weight}
        assert asyncio.get_running_loop().time() < TIMES.total_s

    play(world, script)
    world.assert_same_bits(0, 1)


def test_where_the_leader_dies_the_group_is_broken_and_nobody_waits() -> None:
    world = World()

    async def script() -> None:
        for friend in world.friends:
            await friend.arrive()
        await asyncio.sleep(1.0)
        await world.friends[0].die()
        for friend in world.friends[1:]:
            async with asyncio.timeout(1.0):
                await friend.meeting.broken.wait()
            with pytest.raises(ServiceError, match="who leads the group"):
                await friend.average()

    play(world, script)


def test_the_leader_of_a_group_that_everyone_left_looks_for_another() -> None:
    world = World()

    async def script() -> None:
        for friend in world.friends:
            await friend.arrive()
        await asyncio.sleep(1.0)
        for friend in world.friends[1:]:
            assert not world.friends[0].meeting.broken.is_set()
            await friend.die()
            await asyncio.sleep(0.1)
        assert world.friends[0].meeting.broken.is_set()
        with pytest.raises(ServiceError, match="nobody else in the group is ready"):
            await world.friends[0].average()

    play(world, script)


def test_who_is_ready_too_late_is_told_and_changes_nothing() -> None:
    world = World()

    async def script() -> None:
        for friend in world.friends:
            await friend.arrive()
        done = [asyncio.create_task(friend.average()) for friend in world.friends[:2]]
        await asyncio.gather(*done)
        assert asyncio.get_running_loop().time() >= TIMES.ready_s
        for friend in world.friends[:2]:
            await friend.meeting.close()
        with pytest.raises(ServiceError):
            await world.friends[2].average()

    play(world, script)
    world.assert_same_bits(0, 1)
    assert all(torch.equal(a, b) for a, b in zip(world.friends[2].tensors, world.before[2], strict=True))


def test_a_stranger_to_the_group_is_not_heard() -> None:
    world, stranger = World(size=2), SessionKey()

    async def script() -> None:
        lobby = Lobby(world.hub.transport("stranger"))
        await lobby.start()
        for friend in world.friends:
            await friend.arrive()
        stream = await lobby.room(GROUP, "meet").open(peer(0), (), 1.0)
        layout = world.friends[0].vector.layout.layout_hash
        await stream.send(Arrival(hotkey=stranger.hotkey, maddrs=[], reduces=True, layout=layout).to_bytes())
        done = await asyncio.gather(*(friend.average() for friend in world.friends))
        assert all(set(one.weights) == {peer(0), peer(1)} for one in done)
        await lobby.close()

    play(world, script)
    world.assert_same_bits(0, 1)


def test_a_stream_that_comes_before_its_group_waits_for_it() -> None:
    world = World(size=2)

    async def script() -> None:
        await world.friends[1].arrive()
        await asyncio.sleep(1.0)
        await world.friends[0].arrive()
        await asyncio.gather(*(friend.average() for friend in world.friends))

    play(world, script)
    world.assert_same_bits(0, 1)


def test_tensors_of_any_float_type_come_back_in_theirs() -> None:
    tensors = [torch.ones(3, dtype=torch.bfloat16), torch.ones(2, 2, dtype=torch.float64)]
    vector = Vector(tensors, "fp32")
    vector.copy_into(torch.full((7,), 0.5), tensors)
    assert [tensor.dtype for tensor in tensors] == [torch.bfloat16, torch.float64]
    assert all(bool((tensor == 0.5).all()) for tensor in tensors)
    payload, tree = vector.encode(tensors, b"seed")
    assert bytes(payload) == torch.full((7,), 0.5).numpy().tobytes()
    assert tree.num_leaves == 1


def test_tensors_cut_from_one_travel_from_where_they_are() -> None:
    tensors = cut_from_one([torch.Size((2, 3)), torch.Size((4,)), torch.Size(())])
    assert [tuple(tensor.shape) for tensor in tensors] == [(2, 3), (4,), ()]
    vector = Vector(tensors, "fp32")
    payload, _ = vector.encode(tensors, b"seed")
    tensors[1][0] = 1.0
    assert bytes(payload) == torch.tensor([0.0] * 6 + [1.0] + [0.0] * 4).numpy().tobytes()
    vector.copy_into(torch.arange(11.0), tensors)
    assert torch.cat([tensor.reshape(-1) for tensor in tensors]).tolist() == list(range(11))
    # In another order, or with a gap, they are no vector.
    for others in (tensors[::-1], [tensors[0], tensors[2]]):
        payload, _ = Vector(others, "fp32").encode(others, b"seed")
        assert bytes(payload) == torch.cat([tensor.reshape(-1) for tensor in others]).numpy().tobytes()


def test_a_key_signs_for_itself_alone() -> None:
    one, other = SessionKey(), SessionKey()
    signature = one.sign(b"mean")
    assert verify(one.hotkey, b"mean", signature)
    assert not verify(one.hotkey, b"man", signature)
    assert not verify(other.hotkey, b"mean", signature)
    assert not verify("no key", b"mean", signature)
