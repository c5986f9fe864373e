"""Both ends of a stream prove that the hotkey the group names owns this libp2p peer.

The transport proves peer ids; the plan says which hotkey each peer id belongs to; here each hotkey signs both hotkeys,
both peer ids, the group and both nonces under its own role. A signature is of use on no other stream: the other side's
nonce is fresh, and an opener's nonce is accepted once.

Whoever fails here is not proved to be anybody: the fault is the stream's, not the claimed hotkey's, except where the
peer at the address that the plan names cannot sign as its hotkey.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass

import msgpack

from hivetrain.averaging.group import GroupPlan, Member
from hivetrain.averaging.messages import Hello, HelloConfirm, HelloReply, receive
from hivetrain.averaging.transport import Stream
from hivetrain.errors import Fault, PeerFault
from hivetrain.identity import Identity, Verify

NONCE_BYTES = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Ends:
    """The two ends of one stream, as both must see them."""

    group_id: str
    opener_hotkey: str
    opener_peer_id: str
    opener_nonce: bytes
    acceptor_hotkey: str
    acceptor_peer_id: str
    acceptor_nonce: bytes

    def message(self, role: str) -> bytes:
        """What the end of that role ("opener" or "acceptor") signs."""
        packed: bytes = msgpack.packb(
            [
                "hivetrain-handshake/1",
                role,
                self.group_id,
                [self.opener_hotkey, self.opener_peer_id, self.opener_nonce],
                [self.acceptor_hotkey, self.acceptor_peer_id, self.acceptor_nonce],
            ]
        )
        return packed


class NonceLedger:
    """Nonces that were used already. Kept for one group, so it is bounded by that group's streams."""

    def __init__(self) -> None:
        self._seen: set[bytes] = set()

    def use(self, nonce: bytes) -> None:
        """Take ``nonce``.

        Raises:
            PeerFault: BAD_SIGNATURE: it was used before.
        """
        if nonce in self._seen:
            raise PeerFault(Fault.BAD_SIGNATURE, "this nonce was used before: a replayed handshake")
        self._seen.add(nonce)


def check_hello(hello: Hello, plan: GroupPlan, group_id: str, remote_peer_id: str, nonces: NonceLedger) -> Member:
    """The member that the opener claims to be.

    Raises:
        PeerFault: WRONG_SCHEMA (another group), IMPOSTOR (an outsider, or a peer that the plan does not name for that
            hotkey), BAD_SIGNATURE (a replay).
    """
    if hello.group_id != group_id:
        raise PeerFault(Fault.WRONG_SCHEMA, f"expected group {group_id[:12]}, got {hello.group_id[:12]}")
    member = plan.member(hello.hotkey)
    if member is None:
        raise PeerFault(Fault.IMPOSTOR, f"{hello.hotkey} is not a member of this group")
    if member.peer_id != remote_peer_id:
        raise PeerFault(
            Fault.IMPOSTOR, f"{hello.hotkey} is at peer {member.peer_id}, but peer {remote_peer_id} claims to be it"
        )
    nonces.use(hello.nonce)
    return member


def check_signature(ends: Ends, role: str, signature: bytes, verify: Verify) -> None:
    """Check the other end's signature.

    Raises:
        PeerFault: BAD_SIGNATURE.
    """
    hotkey = ends.opener_hotkey if role == "opener" else ends.acceptor_hotkey
    if not verify(hotkey, ends.message(role), signature):
        raise PeerFault(Fault.BAD_SIGNATURE, f"the {role}'s signature is not one of {hotkey} over this stream")


async def open_handshake(
    stream: Stream, plan: GroupPlan, group_id: str, me: Identity, my_peer_id: str, peer: Member, verify: Verify
) -> None:
    """The opener's half, towards ``peer``. Its last word travels with the first request, which must follow at once.

    Raises:
        LinkLost: the stream ended: it may not have begun this round yet.
        PeerFault: IMPOSTOR, BAD_SIGNATURE or MALFORMED.
    """
    if stream.remote_peer_id != peer.peer_id:
        raise PeerFault(Fault.IMPOSTOR, f"expected peer {peer.peer_id}, reached {stream.remote_peer_id}")
    nonce = secrets.token_bytes(NONCE_BYTES)
    await stream.send(Hello(group_id=group_id, hotkey=me.hotkey, nonce=nonce).to_bytes())
    reply = await receive(stream, HelloReply)
    if reply.hotkey != peer.hotkey:
        raise PeerFault(Fault.IMPOSTOR, f"expected {peer.hotkey}, the peer says it is {reply.hotkey}")
    ends = Ends(
        group_id=group_id,
        opener_hotkey=me.hotkey,
        opener_peer_id=my_peer_id,
        opener_nonce=nonce,
        acceptor_hotkey=peer.hotkey,
        acceptor_peer_id=peer.peer_id,
        acceptor_nonce=reply.nonce,
    )
    check_signature(ends, "acceptor", reply.signature, verify)
    await stream.send(HelloConfirm(signature=me.sign(ends.message("opener"))).to_bytes(), more=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Greeting:
    """The acceptor's half, begun: the hotkey is claimed but not proved."""

    member: Member
    ends: Ends


async def greet(
    stream: Stream, plan: GroupPlan, group_id: str, me: Identity, my_peer_id: str, nonces: NonceLedger
) -> Greeting:
    """Answer an opener. Nothing that fails up to here can be laid at any member's door.

    Raises:
        LinkLost: the stream ended.
        PeerFault: see `check_hello`; MALFORMED.
    """
    hello = await receive(stream, Hello)
    member = check_hello(hello, plan, group_id, stream.remote_peer_id, nonces)
    ends = Ends(
        group_id=group_id,
        opener_hotkey=member.hotkey,
        opener_peer_id=stream.remote_peer_id,
        opener_nonce=hello.nonce,
        acceptor_hotkey=me.hotkey,
        acceptor_peer_id=my_peer_id,
        acceptor_nonce=secrets.token_bytes(NONCE_BYTES),
    )
    signature = me.sign(ends.message("acceptor"))
    reply = HelloReply(hotkey=me.hotkey, nonce=ends.acceptor_nonce, signature=signature)
    await stream.send(reply.to_bytes())
    return Greeting(member=member, ends=ends)


async def finish_greeting(stream: Stream, greeting: Greeting, verify: Verify) -> None:
    """Wait for the opener's signature. From here on the stream is its hotkey's.

    Raises:
        LinkLost: the stream ended.
        PeerFault: BAD_SIGNATURE or MALFORMED, by the peer that the plan names for that hotkey.
    """
    confirm = await receive(stream, HelloConfirm)
    check_signature(greeting.ends, "opener", confirm.signature, verify)
