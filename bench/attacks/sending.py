"""Cheats in what a miner commits to and what it does in the all-reduce: bytes, weights, speed, means, accusations."""

from __future__ import annotations

import asyncio
import dataclasses
import pickle
import struct
from collections.abc import Callable, Collection, Sequence
from typing import Any

import msgpack
import torch

from bench.attacks.cheat import Cheat, Kind, Patch, Scene
from bench.attacks.training import Invented
from hivetrain.averaging import reduction
from hivetrain.averaging.codecs import Bytes
from hivetrain.averaging.group import GroupPlan
from hivetrain.averaging.handshake import open_handshake
from hivetrain.averaging.messages import Proof, ProofReply, receive
from hivetrain.averaging.transport import Acceptor, LinkLost, Stream, Transport
from hivetrain.contribution import Contribution
from hivetrain.errors import PeerFault
from hivetrain.identity import Identity, Verify
from hivetrain.training.inner import RoundWork
from hivetrain.verification.merkle import MerkleTree
from hivetrain.verification.receipt import Receipt, SnapshotBytes, SnapshotTree, sign_receipt

Rewrite = Callable[[bytes], bytes]
Delay = Callable[[str, int], float]
"""``delay(peer id, bytes)``: seconds before a frame leaves."""


def signed_again(scene: Scene, contribution: Contribution, **changes: object) -> Contribution:
    """The contribution under a receipt with other fields."""
    receipt: Receipt = contribution.receipt.model_copy(update=changes)
    return dataclasses.replace(contribution, receipt=sign_receipt(receipt, scene.identity))


def with_payload(scene: Scene, contribution: Contribution, payload: bytes) -> Contribution:
    """Another payload, and a receipt that commits to it."""
    tree = MerkleTree(scene.parts.layout.chunk_digests(payload))
    return dataclasses.replace(
        signed_again(scene, contribution, payload_root=tree.root.hex()), payload=payload, tree=tree
    )


class Poisoned(Cheat):
    """Honest work, but values that no mean may take in are in the payload that it commits to."""

    def __init__(self, name: str, what: str, value: float) -> None:
        super().__init__(name, what)
        self._value = value

    def commit(self, scene: Scene, work: RoundWork) -> Contribution:
        honest = scene.contribution(work)
        payload = bytearray(honest.payload)
        for chunk in range(scene.parts.layout.num_chunks):  # whoever reduces one sees it
            struct.pack_into("<f", payload, scene.parts.layout.byte_offset(chunk), self._value)
        return with_payload(scene, honest, bytes(payload))


class Exploit:
    """What a pickle would run where it is loaded."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("a stranger's pickle was loaded",))


class Pickled(Invented):
    """No work: a pickle for every snapshot, and for a payload."""

    def commit(self, scene: Scene, work: RoundWork) -> Contribution:
        honest, raw = scene.contribution(work), pickle.dumps(Exploit())
        tree = SnapshotTree([SnapshotBytes(step=one.step, payload=raw) for one in work.snapshots])
        sealed = dataclasses.replace(signed_again(scene, honest, snapshots_root=tree.root), snapshots=tree)
        return with_payload(scene, sealed, raw + honest.payload[len(raw) :])


class OtherBytes(Cheat):
    """Commits to its honest work and brings something else to the all-reduce."""

    def bring(self, contribution: Contribution) -> bytes:
        values = torch.frombuffer(bytearray(contribution.payload), dtype=torch.int32)
        return bytes((values ^ -(2**31)).numpy().tobytes())  # the sign of every value


class Inflates(Cheat):
    """Claims ten times the samples, so that its vector would count ten times."""

    def commit(self, scene: Scene, work: RoundWork) -> Contribution:
        honest = scene.contribution(work)
        return signed_again(scene, honest, num_samples=10 * honest.receipt.num_samples)


class TwoReceipts(Invented):
    """No work: every time that it is asked it signs another receipt."""

    def __init__(self, name: str, what: str) -> None:
        super().__init__(name, what)
        self._made: list[bytes] = []

    def commit(self, scene: Scene, work: RoundWork) -> Contribution:
        first = scene.contribution(work)
        second = signed_again(scene, first, loss=first.receipt.loss / 2)
        self._made = [first.receipt.to_bytes(), second.receipt.to_bytes()]
        return first

    def receipt(self, asked: int, honest: bytes) -> bytes:
        return self._made[asked % 2] if self._made else honest


# -- links ----------------------------------------------------------------------------------------------------


class BentStream:
    """A stream whose frames are rewritten or held up on their way out."""

    def __init__(self, real: Stream, rewrite: Rewrite | None, delay: Delay | None) -> None:
        self._real = real
        self._rewrite = rewrite
        self._delay = delay

    @property
    def remote_peer_id(self) -> str:
        return self._real.remote_peer_id

    async def send(self, frame: Bytes, more: bool = False) -> None:
        if self._delay is not None and (seconds := self._delay(self.remote_peer_id, len(frame))) > 0:
            await asyncio.sleep(seconds)
        await self._real.send(self._rewrite(bytes(frame)) if self._rewrite is not None else frame, more)

    async def receive(self, max_bytes: int) -> bytes:
        return await self._real.receive(max_bytes)

    async def receive_into(self, buffer: memoryview) -> None:
        await self._real.receive_into(buffer)

    async def close(self) -> None:
        await self._real.close()


class BentTransport:
    """A transport that opens and accepts bent streams."""

    def __init__(self, real: Transport, rewrite: Rewrite | None = None, delay: Delay | None = None) -> None:
        self._real = real
        self._rewrite = rewrite
        self._delay = delay

    @property
    def peer_id(self) -> str:
        return self._real.peer_id

    @property
    def alive(self) -> bool:
        return self._real.alive

    async def open(self, peer_id: str, maddrs: Sequence[str], timeout_s: float) -> Stream:
        return BentStream(await self._real.open(peer_id, maddrs, timeout_s), self._rewrite, self._delay)

    def set_acceptor(self, acceptor: Acceptor | None, peer_ids: Collection[str] | None = None) -> None:
        if acceptor is None:
            self._real.set_acceptor(None)
            return

        async def accept(stream: Stream) -> None:
            await acceptor(BentStream(stream, self._rewrite, self._delay))

        self._real.set_acceptor(accept, peer_ids)

    async def start(self) -> None:
        await self._real.start()

    async def close(self) -> None:
        await self._real.close()


class WrongShape(Cheat):
    """Announces a vector of one chunk more than the layout has."""

    def transport(self, real: Transport, plan: GroupPlan) -> Transport:
        def rewrite(frame: bytes) -> bytes:
            if b"\xa4kind\xaccontribution" not in frame[:64]:
                return frame
            fields = msgpack.unpackb(frame)
            fields["num_chunks"] += 1
            packed: bytes = msgpack.packb(fields)
            return packed

        return BentTransport(real, rewrite=rewrite)


class TwoSpeeds(Cheat):
    """Sends fast to some, and slowly to the others.

    Args:
        slow_to_validators: who gets the slow line; else the peers do.
    """

    small_rates = True
    SLOW_BYTES_PER_S = 50_000

    def __init__(self, name: str, what: str, slow_to_validators: bool) -> None:
        super().__init__(name, what)
        self._slow_to_validators = slow_to_validators

    def transport(self, real: Transport, plan: GroupPlan) -> Transport:
        seats = {member.peer_id for member in plan.members if not member.sends}

        def delay(peer: str, size_bytes: int) -> float:
            return size_bytes / self.SLOW_BYTES_PER_S if (peer in seats) is self._slow_to_validators else 0.0

        return BentTransport(real, delay=delay)


# -- as a reducer, and among the others ------------------------------------------------------------------------


class WrongMean(Cheat):
    """Honest work; as a reducer it returns the mean with its sign flipped."""

    def patches(self) -> tuple[Patch, ...]:
        def lie(real: Any, plan: Any, start: int, stop: int, vectors: Any, weights: Any, seed: int) -> bytes:
            negated: bytes = real(plan, start, stop, [-vector for vector in vectors], weights, seed)
            return negated

        return (Patch(module=reduction, name="reduce_chunks", bad=lie),)


class FalseAccuser(Cheat):
    """Honest work; brings every reducer evidence against another one that proves nothing."""

    async def beside(self, plan: GroupPlan, me: Identity, transport: Transport, verify: Verify) -> None:
        parts = plan.parts()
        for part in parts:
            if part.reducer.hotkey == me.hotkey:
                continue
            accused = next(one.index for one in parts if one.reducer not in (part.reducer, plan.member(me.hotkey)))
            try:
                stream = await transport.open(part.reducer.peer_id, part.reducer.maddrs, 5.0)
                group = plan.group_id()
                await open_handshake(stream, plan, group, me, transport.peer_id, part.reducer, verify)
                await stream.send(Proof(part=accused, rank=0).to_bytes())
                if (await receive(stream, ProofReply)).wanted:
                    await stream.send(b"it lied, believe me")
                await stream.close()
            except (PeerFault, LinkLost):
                continue


class Hijacks(Cheat):
    """Honest work; announces an honest miner's libp2p peer as its own."""

    def peer_id(self, mine: str, others: Sequence[str]) -> str:
        return others[0] if others else mine


__all__ = [
    "BentTransport",
    "FalseAccuser",
    "Hijacks",
    "Inflates",
    "Kind",
    "OtherBytes",
    "Pickled",
    "Poisoned",
    "TwoReceipts",
    "TwoSpeeds",
    "WrongMean",
    "WrongShape",
]
