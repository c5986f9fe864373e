"""Who fails in an all-reduce, how and when; what the others hold then, and who gets the blame."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import Callable

import msgpack
import pytest
from averaging_world import World, assert_each_chunk_is_a_mean, assert_mean, assert_same_bits, blamed, verify

from hivetrain.averaging.butterfly import AllReduceOutcome, all_reduce
from hivetrain.averaging.handshake import open_handshake
from hivetrain.averaging.memory import MemoryHub, VirtualTimeLoop, run_in_virtual_time
from hivetrain.averaging.messages import Fetch, FetchReply, receive
from hivetrain.averaging.transport import LinkLost, Stream
from hivetrain.errors import ServiceError

BAD = 2  # the member that misbehaves, of senders 0, 1, 2 and validator 3
HONEST = (0, 1, 3)
DATA_FRAME = 4  # opener to acceptor: hello, hello_confirm, contribution, block, data, ...

Tasks = dict[int, "asyncio.Task[AllReduceOutcome]"]


def make_world(**changes: object) -> World:
    return World(num_senders=3, num_validators=1, **changes)  # type: ignore[arg-type]


def rewrite_all(world: World, rewrite: Callable[[int, bytes], bytes]) -> None:
    """Everything that the bad member sends to anyone passes through ``rewrite``."""
    for i in HONEST:
        world.hub.script(world.peer(BAD), world.peer(i)).rewrite = rewrite


def honest(outcomes: dict[int, AllReduceOutcome]) -> dict[int, AllReduceOutcome]:
    return {i: outcomes[i] for i in HONEST}


def assert_only_bad_is_blamed(world: World, outcomes: dict[int, AllReduceOutcome], *faults: str) -> None:
    for i in HONEST:
        assert {hotkey for hotkey, _ in blamed(outcomes[i])} <= {world.hotkey(BAD)}
    assert {fault for i in HONEST for _, fault in blamed(outcomes[i])} == set(faults)


def assert_left_out(world: World, outcomes: dict[int, AllReduceOutcome], *faults: str) -> None:
    """The honest hold the mean of 0 and 1, in the bad member's own part too."""
    assert_mean(world, honest(outcomes), [0, 1])
    assert_same_bits(honest(outcomes))
    assert_only_bad_is_blamed(world, outcomes, *faults)


def test_absent_sender_is_left_out_of_the_mean_and_its_part_is_reduced_by_the_next() -> None:
    world = make_world()
    outcomes = world.run(only=HONEST)
    assert_left_out(world, outcomes, "absent")
    for i in HONEST:
        assert outcomes[i].reduced_again == (BAD,)
        assert outcomes[i].included == {world.hotkey(0): 1.0, world.hotkey(1): 1.0, world.hotkey(2): 0.0}
        assert outcomes[i].seconds < world.send_deadline_s / 2, "it costs its patience, not the deadline"


def test_part_is_missing_and_zero_where_nobody_can_reduce_it() -> None:
    world = make_world(reducers=[0, BAD], deadline_s=25.0)

    async def kill(_: World, tasks: Tasks) -> None:
        await asyncio.sleep(0.0)
        tasks[0].cancel()

    outcomes = world.run(only=HONEST, script=kill)
    for i in (1, 3):
        assert outcomes[i].missing_parts == (0, 1)
        assert not outcomes[i].complete
        assert not any(outcomes[i].included.values())
        assert not any(vector.any() for vector in outcomes[i].vectors.values())
    assert outcomes[1].mean_sha256 == outcomes[3].mean_sha256


def test_absent_sender_that_reduces_nothing_leaves_the_mean_complete() -> None:
    world = make_world(reducers=[0, 3])
    outcomes = world.run(only=HONEST)
    assert_mean(world, outcomes, [0, 1])
    assert_same_bits(outcomes)
    assert blamed(outcomes[0]) == blamed(outcomes[3]) == {(world.hotkey(BAD), "absent")}
    assert blamed(outcomes[1]) == set()
    assert all(outcome.seconds <= 1 + world.send_deadline_s for outcome in outcomes.values())


@pytest.mark.parametrize("frame", [0, 1, 2, 3, 4, 5, 6])
def test_member_whose_links_break_is_in_as_far_as_it_has_sent(frame: int) -> None:
    # hello, confirm, contribution, then (header, data) of each batch; reading on its streams breaks later.
    world = make_world(scale=40)
    for i in HONEST:
        world.hub.script(world.peer(BAD), world.peer(i)).drop_after = frame
        world.hub.script(world.peer(i), world.peer(BAD)).drop_after = 1
    outcomes = world.run(may_fail=[BAD])
    found = assert_each_chunk_is_a_mean(world, honest(outcomes), [0, 1, 2], [0, 1])
    # A batch that came counts even where its header was the last to get through: only then the link broke.
    assert bool(found[0]) == (frame >= 5)
    blame = {record for i in HONEST for record in blamed(outcomes[i])}
    assert blame
    assert blame <= {(world.hotkey(BAD), "absent"), (world.hotkey(BAD), "late")}, "it kept coming back"


@pytest.mark.parametrize("seconds", [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 4.5, 5.0, 6.0, 8.0])
def test_member_killed_at_any_moment_leaves_the_others_with_equal_bits(seconds: float) -> None:
    world = make_world()
    for i in range(4):
        for j in range(4):
            if i != j:
                world.hub.script(world.peer(i), world.peer(j)).delay_s = 0.5

    async def kill(_: World, tasks: Tasks) -> None:
        await asyncio.sleep(seconds)
        tasks[BAD].cancel()

    outcomes = world.run(script=kill)
    survivors = honest(outcomes)
    assert_each_chunk_is_a_mean(world, survivors, [0, 1, 2], [0, 1])
    for outcome in survivors.values():
        assert {hotkey for hotkey, _ in blamed(outcome)} <= {world.hotkey(BAD)}


def test_member_killed_after_sending_stays_in_the_mean() -> None:
    world = make_world(reducers=[0, 1, 3])
    killed = asyncio.Event()

    def kill_at_its_notes(index: int, frame: bytes) -> bytes:
        if b"\xa7confirm" in frame[:16]:
            killed.set()
        return frame

    rewrite_all(world, kill_at_its_notes)

    async def kill(_: World, tasks: Tasks) -> None:
        await killed.wait()
        tasks[BAD].cancel()

    outcomes = world.run(script=kill)
    assert_mean(world, honest(outcomes), [0, 1, 2])
    assert_only_bad_is_blamed(world, outcomes)


@pytest.mark.parametrize("frame", [0, 1, 2, 3, 4, 5])
def test_stalled_member_costs_at_most_the_deadline(frame: int) -> None:
    world = make_world()
    for i in HONEST:
        world.hub.script(world.peer(BAD), world.peer(i)).stall_after = frame
        world.hub.script(world.peer(i), world.peer(BAD)).stall_after = 2
    outcomes = world.run(may_fail=[BAD])
    assert_each_chunk_is_a_mean(world, honest(outcomes), *([[0, 1]] if frame < 5 else [[0, 1, 2], [0, 1]]))
    faults = {fault for i in HONEST for hotkey, fault in blamed(outcomes[i]) if hotkey == world.hotkey(BAD)}
    assert faults
    assert faults <= {"absent", "late"}


def test_late_sender_is_left_out_but_gets_the_mean() -> None:
    world = make_world(reducers=[0, 3], scale=40, stall_s=2.0)
    for i in (0, 3):
        world.hub.script(world.peer(BAD), world.peer(i)).delay_s = 0.6
    outcomes = world.run()
    assert_mean(world, outcomes, [0, 1])
    assert_same_bits(outcomes)
    assert blamed(outcomes[0]) == blamed(outcomes[3]) == {(world.hotkey(BAD), "late")}
    assert outcomes[BAD].faults == (), "a slow member does not blame its reducers"
    assert all(outcome.reduced_again == () for outcome in outcomes.values())


def test_sender_whose_link_breaks_once_comes_back() -> None:
    world = make_world()
    script = world.hub.script(world.peer(BAD), world.peer(0))
    script.drop_after = 4

    async def heal(_: World, tasks: Tasks) -> None:
        await asyncio.sleep(0.04)
        script.drop_after = None

    outcomes = world.run(script=heal)
    assert_mean(world, outcomes, [0, 1, 2])
    assert all(outcome.faults == () for outcome in outcomes.values())


def change_data(change: Callable[[bytes], bytes]) -> Callable[[int, bytes], bytes]:
    return lambda index, frame: change(frame) if index == DATA_FRAME and len(frame) > 2000 else frame


def change_message(kind: str, changes: dict[str, object]) -> Callable[[int, bytes], bytes]:
    def rewrite(index: int, frame: bytes) -> bytes:
        if len(frame) > 2000 or b"\xa4kind" + msgpack.packb(kind) not in frame:
            return frame
        return msgpack.packb({**msgpack.unpackb(frame), **changes})

    return rewrite


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda data: data[:-1], "truncated"),
        (lambda data: b"", "truncated"),
        (lambda data: data + b"\0", "oversized"),
        (lambda data: bytes([data[0] ^ 1]) + data[1:], "not_committed"),
        (lambda data: data[:-1] + bytes([data[-1] ^ 0x80]), "not_committed"),
    ],
)
def test_bytes_that_are_not_the_committed_ones_count_as_not_sent(change: Callable[[bytes], bytes], fault: str) -> None:
    world = make_world(reducers=[0, 1, 3])
    rewrite_all(world, change_data(change))
    outcomes = world.run()
    assert_mean(world, outcomes, [0, 1])
    assert_same_bits(outcomes)
    assert_only_bad_is_blamed(world, outcomes, fault)
    assert all(o.seconds < 5 < world.send_deadline_s for o in outcomes.values()), "a faulty sender costs no deadline"


@pytest.mark.parametrize(
    ("field", "value", "fault"),
    [
        ("proof", [bytes(32)], "not_committed"),
        ("proof", [], "not_committed"),
        ("proof", [b"short"], "malformed"),
        ("stop", 10**6, "malformed"),
        ("start", -1, "malformed"),
        ("kind", "wat", "malformed"),
        ("weight", 1e6, "malformed"),
    ],
)
def test_wrong_block_headers_count_as_not_sent(field: str, value: object, fault: str) -> None:
    world = make_world(reducers=[0, 1, 3])
    rewrite_all(world, change_message("batch", {field: value}))
    outcomes = world.run()
    assert_mean(world, outcomes, [0, 1])
    assert_only_bad_is_blamed(world, outcomes, fault)


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"num_chunks": 10**6}, "wrong_schema"),
        ({"num_chunks": 0}, "wrong_schema"),
        ({"part": 77}, "malformed"),
        ({"weight": 1e6}, "malformed"),
    ],
)
def test_wrong_contribution_headers_count_as_not_sent(changes: dict[str, object], fault: str) -> None:
    world = make_world(reducers=[0, 3], send_deadline_s=5.0)
    rewrite_all(world, change_message("contribution", changes))
    outcomes = world.run()
    assert_mean(world, honest(outcomes), [0, 1])
    assert {hotkey for i in HONEST for hotkey, _ in blamed(outcomes[i])} == {world.hotkey(BAD)}
    assert (world.hotkey(BAD), fault) in blamed(outcomes[0])


def test_random_bytes_instead_of_any_frame_end_no_round() -> None:
    for index in range(7):
        world = make_world(reducers=[0, 3], send_deadline_s=5.0)
        rewrite_all(world, lambda i, frame, index=index: b"\xff\x00garbage" if i == index else frame)  # type: ignore[misc]
        outcomes = honest(world.run(may_fail=[BAD]))
        assert_mean(world, outcomes, [0, 1, 2] if index > 4 else [0, 1])
        assert {hotkey for o in outcomes.values() for hotkey, _ in blamed(o)} <= {world.hotkey(BAD), ""}


def test_values_at_the_bound_are_in() -> None:
    vectors = make_world().vectors
    vectors[BAD]["delta"][0] = 1000.0
    world = make_world(vectors=vectors)
    outcomes = world.run()
    assert_mean(world, outcomes, [0, 1, 2])
    assert outcomes[0].faults == ()


def test_one_poisoned_chunk_puts_its_sender_out_from_there_on() -> None:
    vectors = make_world().vectors
    vectors[BAD]["delta"][0] = float("nan")  # chunk 0, in the part of member 0
    world = make_world(vectors=vectors)
    outcomes = world.run()
    part = world.plan.parts()[0]
    found = assert_each_chunk_is_a_mean(world, outcomes, [0, 1, 2], [0, 1])
    assert found[1] == set(range(part.start, part.stop))
    for outcome in outcomes.values():
        assert outcome.complete
        assert outcome.left_out == {world.hotkey(BAD): ((0, part.stop),)}
    assert blamed(outcomes[0]) == {(world.hotkey(BAD), "not_finite")}
    assert blamed(outcomes[1]) == blamed(outcomes[3]) == set()


def test_payload_of_another_root_is_refused_before_anything_is_sent() -> None:
    world = make_world(roots={BAD: bytes(32)})
    transport = MemoryHub().transport(world.peer(BAD))
    with pytest.raises(ValueError, match="root"):
        asyncio.run(all_reduce(world.plan, world.keys[BAD], world.payloads[BAD], transport, verify))


def test_a_sender_that_gives_itself_weight_is_in_another_group() -> None:
    world = make_world(reducers=[0, 3], send_deadline_s=5.0)
    members = [dataclasses.replace(m, weight=1e6) if i == BAD else m for i, m in enumerate(world.plan.members)]
    lie = dataclasses.replace(world.plan, members=tuple(members))

    async def main() -> dict[int, AllReduceOutcome]:
        transports = {i: world.hub.transport(world.peer(i)) for i in range(4)}
        for transport in transports.values():
            await transport.start()
        rounds = [
            all_reduce(lie if i == BAD else world.plan, world.keys[i], world.payloads[i], transports[i], verify)
            for i in range(4)
        ]
        done = await asyncio.gather(*rounds, return_exceptions=True)
        assert isinstance(done[BAD], ServiceError), "nobody talks to it, which it blames on nobody"
        return {i: done[i] for i in HONEST}  # type: ignore[misc]

    outcomes = run_in_virtual_time(main())
    assert_mean(world, outcomes, [0, 1])
    for i in (0, 3):
        assert (world.hotkey(BAD), "absent") in blamed(outcomes[i])
        assert {hotkey for hotkey, _ in blamed(outcomes[i])} == {world.hotkey(BAD), ""}


def test_mean_whose_bytes_are_not_the_signed_ones_is_fetched_from_others() -> None:
    world = make_world()

    def flip(index: int, frame: bytes) -> bytes:
        return frame[:-1] + bytes([frame[-1] ^ 1]) if len(frame) > 2000 and index == 2 else frame

    world.hub.script(world.peer(BAD), world.peer(1)).rewrite = flip
    outcomes = world.run()
    assert_mean(world, honest(outcomes), [0, 1, 2])
    assert blamed(outcomes[1]) == {(world.hotkey(BAD), "not_committed")}
    assert blamed(outcomes[0]) == blamed(outcomes[3]) == set()
    assert outcomes[0].reduced_again == ()


def test_part_of_a_reducer_that_breaks_off_comes_from_those_who_have_it() -> None:
    world = make_world()
    for i in (0, 1):
        script = world.hub.script(world.peer(BAD), world.peer(i))
        script.rewrite = lambda index, frame: b"" if b"\xa6result" in frame[:16] else frame
    outcomes = world.run()
    assert_mean(world, honest(outcomes), [0, 1, 2])
    assert_same_bits(honest(outcomes))
    assert_only_bad_is_blamed(world, outcomes, "malformed")
    assert outcomes[0].reduced_again == (), "member 3 has it"


def test_node_that_reaches_nobody_blames_nobody() -> None:
    world = make_world(send_deadline_s=2.0, deadline_s=4.0)
    with pytest.raises(ServiceError, match="our own link"):
        world.run(only=[0])


def test_node_whose_own_transport_dies_blames_nobody() -> None:
    world = make_world(send_deadline_s=20.0, deadline_s=40.0)

    async def main() -> None:
        transport = world.hub.transport(world.peer(0))
        others = [world.hub.transport(world.peer(i)) for i in (1, 2)]
        for each in (transport, *others):
            await each.start()
        rounds = [
            asyncio.create_task(all_reduce(world.plan, world.keys[i], world.payloads[i], t, verify))
            for i, t in ((0, transport), (1, others[0]), (2, others[1]))
        ]
        await asyncio.sleep(1.0)
        await transport.close()
        with pytest.raises(ServiceError, match="our own transport"):
            await rounds[0]
        await asyncio.gather(*rounds[1:])

    run_in_virtual_time(main())


def test_node_that_stood_still_blames_nobody_for_silence() -> None:
    world = make_world(reducers=[0, 3])

    async def stop(_: World, tasks: Tasks) -> None:
        await asyncio.sleep(1.0)
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualTimeLoop)
        loop.advance(30.0)

    outcomes = world.run(only=HONEST, script=stop)
    assert all(outcome.faults == () for outcome in outcomes.values())
    assert_mean(world, outcomes, [0, 1])


def test_two_groups_at_once_do_not_mix() -> None:
    world = make_world()
    other = dataclasses.replace(world.plan, attempt=1)

    async def main() -> dict[int, AllReduceOutcome]:
        transports = {i: world.hub.transport(world.peer(i)) for i in range(4)}
        for transport in transports.values():
            await transport.start()
        plans = [world.plan, world.plan, other, other]
        rounds = [all_reduce(plans[i], world.keys[i], world.payloads[i], transports[i], verify) for i in range(4)]
        return dict(enumerate(await asyncio.gather(*rounds)))

    outcomes = run_in_virtual_time(main())
    one, two = {i: outcomes[i] for i in (0, 1)}, {i: outcomes[i] for i in (2, 3)}
    assert_mean(world, one, [0, 1])
    assert_mean(world, two, [2])
    assert_same_bits(one)
    assert_same_bits(two)
    assert outcomes[0].mean_sha256 != outcomes[2].mean_sha256
    for group, strangers in ((one, (2, 3)), (two, (0, 1))):
        allowed = {(world.hotkey(i), "absent") for i in strangers} | {("", "wrong_schema")}
        assert all(blamed(outcome) <= allowed for outcome in group.values())


def test_member_that_starts_later_is_waited_for() -> None:
    world = make_world()

    async def main() -> list[AllReduceOutcome]:
        async def late(index: int) -> AllReduceOutcome:
            await asyncio.sleep(4.0 if index == BAD else 0.0)
            transport = world.hub.transport(world.peer(index))
            await transport.start()
            return await all_reduce(world.plan, world.keys[index], world.payloads[index], transport, verify)

        return await asyncio.gather(*(late(i) for i in range(4)))

    outcomes = dict(enumerate(run_in_virtual_time(main())))
    assert_mean(world, outcomes, [0, 1, 2])
    assert all(outcome.faults == () for outcome in outcomes.values())


def test_bug_of_ours_ends_the_round_with_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("hivetrain.averaging.reduction.decode_committed", broken)
    with pytest.raises(ZeroDivisionError):
        make_world().run()


def test_member_that_opens_streams_without_end_is_served_a_few() -> None:
    world = make_world()
    opened: list[Stream] = []
    answered = []

    async def flood(_: World, tasks: Tasks) -> None:
        transport = world.hub.transport(world.peer(BAD))
        await transport.start()
        me, plan = world.keys[BAD], world.plan
        for _i in range(20):
            stream = await transport.open(world.peer(0), (), 1.0)
            await open_handshake(stream, plan, plan.group_id(), me, world.peer(BAD), plan.members[0], verify)
            opened.append(stream)
        for stream in opened:
            with contextlib.suppress(LinkLost):
                await stream.send(Fetch(part=1, rank=1, take=False).to_bytes())
                answered.append((await receive(stream, FetchReply)).status)
        await transport.close()

    outcomes = world.run(only=HONEST, script=flood)
    assert len(opened) == 20
    assert len(answered) == 4 + 4
    assert_left_out(world, outcomes, "absent")
