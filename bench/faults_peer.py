"""One member of a group as a process that `bench.faults` drives through files in a folder.

    python -m bench.faults_peer FOLDER INDEX FIRST_ROUND

`setup.json` names the rounds: in each, one member has one fault. Every member says in `ready-ROUND-INDEX.json` where
it is reached, derives the plan from `go-ROUND.json`, and writes what it saw to `outcome-ROUND-INDEX.json`. What a
member brings follows from its index alone, so everyone can tell if a mean is right.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from hivetrain.averaging import opening, reduction
from hivetrain.averaging.butterfly import AllReduceOutcome, all_reduce
from hivetrain.averaging.codecs import get_codec
from hivetrain.averaging.framing import FrameStream
from hivetrain.averaging.group import GroupPlan, Member
from hivetrain.averaging.handshake import open_handshake
from hivetrain.averaging.layout import PayloadLayout, Section
from hivetrain.averaging.messages import Contribution
from hivetrain.averaging.reducing import reduce_chunks, rounding_seed
from hivetrain.averaging.sealing import Sealer
from hivetrain.averaging.swarm import Swarm
from hivetrain.errors import Fault, HivetrainError, PeerFault, ServiceError
from hivetrain.run import CHUNK_ELEMENTS
from hivetrain.verification.merkle import MerkleTree
from tests.keys import TestIdentity as Key
from tests.keys import verify

SECTIONS = ("delta", "exp_avg", "exp_avg_sq")
LISTEN = ["/ip4/127.0.0.1/tcp/0"]
SEND_DEADLINE_S, DEADLINE_S, STALL_S = 12.0, 24.0, 2.0
MAX_ABS = 100.0
POISON = {"nan": float("nan"), "infinity": float("inf"), "1e30": 1e30}
OUTSIDER = 99


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What every member of the group knows.

    Attributes:
        rounds: of each the fault, the member that has it, and the codec of all sections.
    """

    num_senders: int
    num_peers: int
    elements: int
    rounds: list[tuple[str, int, str]]

    def layout(self, codec: str) -> PayloadLayout:
        """Of what a round with that codec carries."""
        return PayloadLayout([Section(name=name, num_elements=self.elements, codec=codec) for name in SECTIONS])

    def payload(self, index: int, number: int) -> bytes | None:
        """What a member brings to a round; None for who sends nothing."""
        fault, bad, codec = self.rounds[number]
        if index >= self.num_senders:
            return None
        generator = torch.Generator().manual_seed(index)
        vectors = {name: torch.randn(self.elements, generator=generator) for name in SECTIONS}
        value = POISON.get(fault) if index == bad else None
        if value is not None and codec == "fp32":
            for vector in vectors.values():
                vector[::1000] = value
        payload = self.layout(codec).encode(vectors, seed=0)
        return payload if value is None or codec == "fp32" else with_first_words(self.layout(codec), payload, value)

    def mean(self, group_id: str, number: int, senders: list[int]) -> list[torch.Tensor]:
        """Every chunk of the mean of these senders, by definition, in plain torch."""
        codec, seed, chunk, found = get_codec(self.rounds[number][2]), rounding_seed(group_id), 0, []
        sent = {i: self.layout(codec.name).decode(self.payload(i, number) or b"") for i in senders}
        weights = {i: 1.0 if len(senders) == 1 else weight(i) for i in senders}  # equal weights count as 1 (`robust`)
        total = torch.tensor(sum(weights.values()))
        for name in SECTIONS:
            acc = torch.zeros(self.elements)
            for i in senders:
                acc = acc + sent[i][name] * weights[i]
            mean = codec.decode(codec.encode(acc / total, seed + chunk), self.elements)
            found += list(torch.split(mean, CHUNK_ELEMENTS))
            chunk += -(-self.elements // CHUNK_ELEMENTS)
        return found


def weight(index: int) -> float:
    """Of that member's vector."""
    return float(3 + 2 * index)


def with_first_words(layout: PayloadLayout, encoded: bytes, value: float) -> bytes:
    """A payload whose chunks begin with ``value``: an fp16 value, or an int4 block's bfloat16 scale."""
    payload = bytearray(encoded)
    for span in layout.spans(0, layout.num_chunks):
        dtype = {"fp16": torch.float16, "int4": torch.bfloat16}.get(span.section.codec)
        if dtype is None:
            continue
        word = torch.tensor(value, dtype=dtype).view(torch.int16).numpy().astype("<i2").tobytes()
        for chunk in range(span.first_chunk, span.first_chunk + -(-span.num_elements // CHUNK_ELEMENTS)):
            offset = layout.byte_offset(chunk)
            payload[offset : offset + 2] = word
    return bytes(payload)


# What goes wrong inside the bad member

Patch = contextlib.AbstractContextManager[Any]


def signal_after(number: int, frames: int) -> Patch:
    """Send ``number`` to ourselves once we have sent so many frames, the choice of their path apart."""
    real, left = FrameStream.send, [frames]

    async def send(self: FrameStream, frame: Any, more: bool = False) -> None:
        await real(self, frame, more)
        if isinstance(self._outgoing, Sealer):
            left[0] -= 1
            if not left[0]:
                os.kill(os.getpid(), number)

    return patch.object(FrameStream, "send", send)


def dies_after_sending() -> Patch:
    real, left = opening.Opener._deliver, [-1]

    async def deliver(self: Any, *arguments: Any) -> None:
        left[0] = self._state.plan.num_ranks - 1 if left[0] < 0 else left[0]
        await real(self, *arguments)
        left[0] -= 1
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)

    return patch.object(opening.Opener, "_deliver", deliver)


def wrong_average() -> Patch:
    real = reduce_chunks

    def lie(plan: Any, start: int, stop: int, vectors: Any, weights: Any, seed: int) -> bytes:
        return real(plan, start, stop, [-vector for vector in vectors], weights, seed)

    return patch.object(reduction, "reduce_chunks", lie)


def refuses_everyone() -> Patch:
    def admit(*_: Any) -> None:
        raise PeerFault(Fault.MALFORMED, "go away")

    return patch.object(reduction.Reduction, "admit", admit)


def too_few_batches() -> Patch:
    async def deliver(self: Any, stream: Any, part: Any, rank: int, first: int, reducer: Any) -> None:
        num_chunks = part.stop - part.start
        await stream.send(Contribution(part=part.index, rank=rank, first=first, num_chunks=num_chunks).to_bytes())

    return patch.object(opening.Opener, "_deliver", deliver)


class _Twice:
    """A stream on which every batch, header and bytes, goes out twice."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._sent: list[bytes] = []

    async def send(self, frame: Any, more: bool = False) -> None:
        self._sent.append(bytes(frame))
        again = self._sent[-2:] if len(self._sent) > 2 and len(self._sent) % 2 else []
        for each in (frame, *again):
            await self._stream.send(each)


def too_many_batches() -> Patch:
    real = opening.Opener._deliver

    async def deliver(self: Any, stream: Any, *rest: Any) -> None:
        await real(self, _Twice(stream), *rest)  # type: ignore[arg-type]

    return patch.object(opening.Opener, "_deliver", deliver)


def wrong_shape() -> Patch:
    def header(**fields: Any) -> Contribution:
        return Contribution(**{**fields, "num_chunks": fields["num_chunks"] + 1})

    return patch.object(opening, "Contribution", header)


def changes_data(change: Callable[[bytes], bytes], pause_s: float = 0.0) -> Patch:
    """Of the frames with a vector's or mean's bytes, as opposed to messages."""
    real = FrameStream.send

    async def send(self: FrameStream, frame: Any, more: bool = False) -> None:
        data = bytes(frame)
        if len(data) >= 20_000:
            await asyncio.sleep(pause_s)
            data = change(data)
        await real(self, data, more)

    return patch.object(FrameStream, "send", send)


PATCHES: dict[str, Callable[[], Patch]] = {
    "killed in the exchange": lambda: signal_after(signal.SIGKILL, 14),
    "killed after sending": dies_after_sending,
    "stopped": lambda: signal_after(signal.SIGSTOP, 14),
    "slow": lambda: changes_data(bytes, pause_s=4.0),
    "too few batches": too_few_batches,
    "too many batches": too_many_batches,
    "too few bytes": lambda: changes_data(lambda data: data[:-1]),
    "other bytes": lambda: changes_data(lambda data: data[:-1] + bytes([data[-1] ^ 1])),
    "wrong shape": wrong_shape,
    "wrong average": wrong_average,
    "refuses everyone": refuses_everyone,
}


# What it does beside its own part in the round


async def knock(swarm: Swarm, plan: GroupPlan, claim: str, key: Key) -> None:
    """Come to every reducer as ``key``, and bring it nothing."""
    for part in plan.parts():
        if part.reducer.hotkey == claim:
            continue
        with contextlib.suppress(HivetrainError, TimeoutError):
            async with asyncio.timeout(5.0):
                stream = await swarm.open(part.reducer.peer_id, part.reducer.maddrs, 5.0)
                await open_handshake(stream, plan, plan.group_id(), key, swarm.peer_id, part.reducer, verify)
                header = Contribution(part=part.index, rank=0, first=0, num_chunks=part.stop - part.start)
                await stream.send(header.to_bytes())
                await stream.receive(1 << 20)


async def stranger(peer: Peer, plan: GroupPlan, key: Key) -> None:
    """A second node, with its own peer id."""
    swarm = Swarm(list(plan.members[0].maddrs), LISTEN)
    try:
        await swarm.start()
        await knock(swarm, plan, "", key)
    finally:
        await swarm.close()


async def twin(peer: Peer, plan: GroupPlan) -> None:
    """Its hotkey from another node, and a second set of its own streams."""
    await asyncio.gather(knock(peer.swarm, plan, peer.key.hotkey, peer.key), stranger(peer, plan, peer.key))


async def outsider(peer: Peer, plan: GroupPlan) -> None:
    await stranger(peer, plan, Key(OUTSIDER))


BESIDE: dict[str, Callable[[Peer, GroupPlan], Coroutine[None, None, None]]] = {
    "duplicate identity": twin,
    "outsider": outsider,
}
JOINS_NOTHING = "joins no round"
OTHER_PLAN = "another schema"
TWO_GROUPS = "two groups at once"


# Files in the folder


def write(path: Path, value: object) -> None:
    """Whole or not at all."""
    path.with_suffix(".tmp").write_text(json.dumps(value))
    path.with_suffix(".tmp").rename(path)


async def read(path: Path, timeout_s: float) -> Any:
    """What another process writes."""
    deadline = time.monotonic() + timeout_s
    while (found := load(path)) is None:
        if time.monotonic() > deadline:
            raise TimeoutError(f"no {path} after {timeout_s:g} s")
        await asyncio.sleep(0.02)
    return found


def load(path: Path) -> Any:
    """What a file holds; None where there is none."""
    return json.loads(path.read_text()) if path.exists() else None


class Peer:
    """This process."""

    def __init__(self, folder: Path, index: int) -> None:
        raw = json.loads((folder / "setup.json").read_text())
        self.setup = Setup(**{**raw, "rounds": [tuple(one) for one in raw["rounds"]]})
        self.folder = folder
        self.index = index
        self.key = Key(index + 1)

    async def main(self, first_round: int) -> None:
        """Every round from ``first_round`` on."""
        initial = [] if self.index == 0 else (await read(self.folder / "first.json", 60.0))["maddrs"]
        self.swarm = Swarm(initial, LISTEN)
        await self.swarm.start()
        me = {"peer_id": self.swarm.peer_id, "maddrs": self.swarm.visible_maddrs(), "hotkey": self.key.hotkey}
        if self.index == 0:
            write(self.folder / "first.json", me)
        for number in range(first_round, len(self.setup.rounds)):
            write(self.folder / f"outcome-{number}-{self.index}.json", await self._round(number, me))
        daemon = self.swarm._p2p._child.pid
        await self.swarm.close()
        write(self.folder / f"end-{self.index}.json", {"daemon": daemon})

    async def _round(self, number: int, me: Mapping[str, Any]) -> dict[str, Any]:
        fault, bad, _ = self.setup.rounds[number]
        payloads = [self.setup.payload(i, number) for i in range(self.setup.num_peers)]
        write(self.folder / f"ready-{number}-{self.index}.json", me)
        told = await read(self.folder / f"go-{number}.json", 120.0)
        plan = self._plan(number, told, payloads)
        if self.index != bad:
            return await self._take_part(number, plan, payloads[self.index])
        if fault == JOINS_NOTHING:
            return {}
        if fault == OTHER_PLAN:
            plan = self._plan(number, told, payloads, max_abs=MAX_ABS / 2)
        beside = asyncio.create_task(BESIDE[fault](self, plan)) if fault in BESIDE else None
        try:
            with PATCHES.get(fault, contextlib.nullcontext)():
                return await self._take_part(number, plan, payloads[self.index])
        finally:
            if beside is not None:
                await beside

    async def _take_part(self, number: int, plan: GroupPlan, payload: bytes | None) -> dict[str, Any]:
        try:
            outcome = await all_reduce(plan, self.key, payload, self.swarm, verify)
        except ServiceError as exc:
            return {"error": str(exc)}
        return {
            "complete": outcome.complete,
            "sha256": outcome.mean_sha256,
            "wrong_chunks": self._wrong_chunks(number, plan, outcome),
            "left_out": sorted(outcome.left_out.keys() | {h for h, share in outcome.included.items() if not share}),
            "faults": [[record.hotkey, record.fault.value, record.detail] for record in outcome.faults],
            "seconds": outcome.seconds,
        }

    def _wrong_chunks(self, number: int, plan: GroupPlan, outcome: AllReduceOutcome) -> int:
        """Chunks whose values are not the mean, by definition, of those who are said to be in them."""
        indices = {Key(i + 1).hotkey: i for i in range(self.setup.num_peers)}
        senders = {indices[member.hotkey] for member in plan.members if member.sends}
        away = {indices[hotkey] for hotkey, share in outcome.included.items() if not share}
        out = [set(away) for _ in range(plan.layout.num_chunks)]
        for hotkey, runs in outcome.left_out.items():
            for start, stop in runs:
                for chunk in range(start, stop):
                    out[chunk].add(indices[hotkey])
        missing = {frozenset(gone) for gone in out}
        means = {gone: self.setup.mean(plan.group_id(), number, sorted(senders - gone)) for gone in missing}
        held = [piece for name in SECTIONS for piece in torch.split(outcome.vectors[name], CHUNK_ELEMENTS)]
        return sum(not torch.equal(means[frozenset(gone)][i], held[i]) for i, gone in enumerate(out))

    def _plan(
        self, number: int, told: list[dict[str, Any]], payloads: list[bytes | None], max_abs: float = MAX_ABS
    ) -> GroupPlan:
        fault, _, codec = self.setup.rounds[number]
        layout, group = self.setup.layout(codec), range(self.setup.num_peers)
        if fault == TWO_GROUPS:  # members 0 and 1, and the others
            group = range(2) if self.index < 2 else range(2, self.setup.num_peers)
        return GroupPlan(
            run_id="faults" + str(group.start),
            round=number,
            attempt=0,
            members=tuple(self._member(i, told[i], layout, payloads[i]) for i in group),
            layout=layout,
            send_deadline_s=SEND_DEADLINE_S,
            deadline_s=DEADLINE_S,
            max_abs=max_abs,
            stall_s=STALL_S,
            audit_blocks=64,
        )

    def _member(self, index: int, told: dict[str, Any], layout: PayloadLayout, payload: bytes | None) -> Member:
        return Member(
            hotkey=told["hotkey"],
            peer_id=told["peer_id"],
            maddrs=tuple(told["maddrs"]),
            weight=weight(index) if payload is not None else 0.0,
            reduces=True,
            root=MerkleTree(layout.chunk_digests(payload)).root if payload is not None else None,
        )


if __name__ == "__main__":
    torch.set_num_threads(1)
    asyncio.run(Peer(Path(sys.argv[1]), int(sys.argv[2])).main(int(sys.argv[3])))
