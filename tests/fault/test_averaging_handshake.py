"""Who can pass for whom on a stream, and who is blamed for trying."""

from __future__ import annotations

import asyncio
import dataclasses

import pytest
from averaging_world import Key, World, assert_mean, blamed, verify

from hivetrain.averaging.butterfly import AllReduceOutcome
from hivetrain.averaging.handshake import Ends, NonceLedger, check_hello, check_signature, open_handshake
from hivetrain.averaging.messages import Hello, HelloConfirm, HelloReply, receive
from hivetrain.averaging.transport import LinkLost, Stream
from hivetrain.errors import Fault, PeerFault

Tasks = dict[int, "asyncio.Task[AllReduceOutcome]"]


def ends(world: World) -> Ends:
    return Ends(
        group_id=world.plan.group_id(),
        opener_hotkey=world.hotkey(0),
        opener_peer_id=world.peer(0),
        opener_nonce=bytes(32),
        acceptor_hotkey=world.hotkey(1),
        acceptor_peer_id=world.peer(1),
        acceptor_nonce=bytes([1]) * 32,
    )


def test_signature_is_bound_to_group_ends_nonces_and_role() -> None:
    world = World()
    good = ends(world)
    signature = world.keys[0].sign(good.message("opener"))
    check_signature(good, "opener", signature, verify)
    others = [
        dataclasses.replace(good, **{name: bytes([9]) * 32 if "nonce" in name else "other"})
        for name in (
            "group_id",
            "opener_peer_id",
            "opener_nonce",
            "acceptor_hotkey",
            "acceptor_peer_id",
            "acceptor_nonce",
        )
    ]
    for other in others:
        with pytest.raises(PeerFault) as refused:
            check_signature(other, "opener", signature, verify)
        assert refused.value.fault is Fault.BAD_SIGNATURE
    reflected = world.keys[1].sign(good.message("opener"))
    with pytest.raises(PeerFault):
        check_signature(good, "acceptor", reflected, verify)


def hello(world: World, index: int = 0, **changes: object) -> Hello:
    base = Hello(group_id=world.plan.group_id(), hotkey=world.hotkey(index), nonce=bytes(32))
    return base.model_copy(update=changes)


def test_hello_of_a_member_at_its_peer_is_taken() -> None:
    world = World()
    member = check_hello(hello(world), world.plan, world.plan.group_id(), world.peer(0), NonceLedger())
    assert member == world.plan.members[0]


@pytest.mark.parametrize(
    ("changes", "peer", "fault"),
    [
        ({"group_id": "0" * 64}, "peer-0", Fault.WRONG_SCHEMA),
        ({"hotkey": "outsider"}, "peer-0", Fault.IMPOSTOR),
        ({}, "peer-1", Fault.IMPOSTOR),
        ({}, "peer-of-nobody", Fault.IMPOSTOR),
    ],
)
def test_hello_of_anybody_else_is_refused(changes: dict[str, object], peer: str, fault: Fault) -> None:
    world = World()
    with pytest.raises(PeerFault) as refused:
        check_hello(hello(world, **changes), world.plan, world.plan.group_id(), peer, NonceLedger())
    assert refused.value.fault is fault


def test_nonce_is_good_for_one_stream() -> None:
    world, nonces = World(), NonceLedger()
    check_hello(hello(world), world.plan, world.plan.group_id(), world.peer(0), nonces)
    with pytest.raises(PeerFault) as refused:
        check_hello(hello(world), world.plan, world.plan.group_id(), world.peer(0), nonces)
    assert refused.value.fault is Fault.BAD_SIGNATURE


async def knock(world: World, as_peer: str, target: int, claim: Key, signer: Key) -> None:
    """Open a stream as ``as_peer``, claim to be ``claim``, sign with ``signer``, and wait for the door to close."""
    transport = world.hub.transport(as_peer)
    await transport.start()
    stream = await transport.open(world.peer(target), (), 5.0)
    nonce = bytes([7]) * 32

    async def talk() -> None:
        await stream.send(Hello(group_id=world.plan.group_id(), hotkey=claim.hotkey, nonce=nonce).to_bytes())
        reply = await receive(stream, HelloReply)
        both = Ends(
            group_id=world.plan.group_id(),
            opener_hotkey=claim.hotkey,
            opener_peer_id=as_peer,
            opener_nonce=nonce,
            acceptor_hotkey=world.hotkey(target),
            acceptor_peer_id=world.peer(target),
            acceptor_nonce=reply.nonce,
        )
        await stream.send(HelloConfirm(signature=signer.sign(both.message("opener"))).to_bytes())
        await stream.receive(1000)

    with pytest.raises(LinkLost):
        await talk()


def slow(world: World) -> None:
    """Keep the round open for long enough to knock at it."""
    for i in range(3):
        for j in range(4):
            world.hub.script(world.peer(i), world.peer(j)).delay_s = 0.5


def test_outsider_is_turned_away_and_no_member_is_blamed() -> None:
    world = World(num_validators=1)
    slow(world)
    outsider = Key(99)

    async def script(_: World, tasks: Tasks) -> None:
        await asyncio.sleep(0.1)
        await knock(world, "peer-99", 0, outsider, outsider)

    outcomes = world.run(script=script)
    assert_mean(world, outcomes, [0, 1, 2])
    assert blamed(outcomes[0]) == {("", "impostor")}
    assert "peer-99" in outcomes[0].faults[0].detail
    assert all(blamed(outcomes[i]) == set() for i in (1, 2, 3))


def test_impostor_is_turned_away_and_its_victim_is_not_blamed() -> None:
    world = World(num_validators=1)
    slow(world)

    async def script(_: World, tasks: Tasks) -> None:
        await asyncio.sleep(0.1)
        await knock(world, "peer-99", 0, world.keys[1], Key(99))

    outcomes = world.run(script=script)
    assert_mean(world, outcomes, [0, 1, 2])
    assert blamed(outcomes[0]) == {("", "impostor")}


def test_peer_that_cannot_sign_as_the_hotkey_the_plan_gives_it_is_blamed() -> None:
    world = World(num_validators=1, send_deadline_s=5.0, deadline_s=15.0, reducers=[0, 3])

    async def script(_: World, tasks: Tasks) -> None:
        await asyncio.sleep(0.1)
        await knock(world, world.peer(2), 0, world.keys[2], Key(99))

    outcomes = world.run(only=[0, 1, 3], script=script)
    assert_mean(world, outcomes, [0, 1])
    assert blamed(outcomes[0]) == {(world.hotkey(2), "bad_signature")}
    assert blamed(outcomes[1]) == set()


def test_reducer_that_is_somebody_else_is_not_given_the_vector() -> None:
    world = World(num_validators=1, send_deadline_s=5.0, deadline_s=15.0)
    heard: list[str] = []

    async def script(_: World, tasks: Tasks) -> None:
        transport = world.hub.transport(world.peer(2))
        await transport.start()

        async def pretend(stream: Stream) -> None:
            await receive(stream, Hello)
            await stream.send(HelloReply(hotkey=world.hotkey(2), nonce=bytes(32), signature=bytes(64)).to_bytes())
            try:
                await stream.receive(1 << 20)
                heard.append("a frame")
            except LinkLost:
                heard.append("the door")

        transport.set_acceptor(pretend)

    outcomes = world.run(only=[0, 1, 3], script=script)
    assert set(heard) == {"the door"}
    for outcome in outcomes.values():
        assert outcome.reduced_again == (2,)
        assert (world.hotkey(2), "bad_signature") in blamed(outcome)
        assert {hotkey for hotkey, _ in blamed(outcome)} == {world.hotkey(2)}


def test_opener_refuses_a_stream_that_reached_another_peer() -> None:
    class Elsewhere:
        remote_peer_id = "peer-of-nobody"

    world = World()
    with pytest.raises(PeerFault) as refused:
        asyncio.run(
            open_handshake(
                Elsewhere(),  # type: ignore[arg-type]
                world.plan,
                world.plan.group_id(),
                world.keys[0],
                world.peer(0),
                world.plan.members[1],
                verify,
            )
        )
    assert refused.value.fault is Fault.IMPOSTOR
