"""One member of a group as a process: FOLDER INDEX NUM_SENDERS NUM_PEERS ELEMENTS FAULT[,FAULT...].

Members meet in FOLDER: each writes who it is, waits for the others, and derives a plan for each round from what all
wrote. In round r member `BAD` has the r-th fault.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from hivetrain.averaging import opening, reduction
from hivetrain.averaging.butterfly import all_reduce
from hivetrain.averaging.framing import FrameStream
from hivetrain.averaging.group import GroupPlan, Member
from hivetrain.averaging.layout import PayloadLayout, Section
from hivetrain.averaging.messages import Contribution
from hivetrain.averaging.sealing import Sealer
from hivetrain.averaging.swarm import Swarm
from hivetrain.errors import Fault, PeerFault, ServiceError
from hivetrain.verification.merkle import MerkleTree
from tests.keys import TestIdentity as Key
from tests.keys import verify

SECTIONS = ("delta", "exp_avg", "exp_avg_sq")
SEND_DEADLINE_S, DEADLINE_S, STALL_S = 12.0, 24.0, 2.0
BAD = 1


def make_vectors(index: int, elements: int, fault: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(index)
    vectors = {name: torch.randn(elements, generator=generator) for name in SECTIONS}
    poison = {"nan": float("nan"), "1e30": 1e30}.get(fault) if index == BAD else None
    if poison is not None:
        for vector in vectors.values():
            vector[::1000] = poison
    return vectors


def weight(index: int) -> float:
    return float(3 + 2 * index)


# What goes wrong inside the bad member


def signal_after(number: int, frames: int) -> Any:
    """Send ``number`` to ourselves once we have sent so many frames, the choice of their path apart."""
    real, left = FrameStream.send, [frames]

    async def send(self: FrameStream, frame: Any) -> None:
        await real(self, frame)
        if isinstance(self._outgoing, Sealer):
            left[0] -= 1
            if not left[0]:
                os.kill(os.getpid(), number)

    return patch.object(FrameStream, "send", send)


def wrong_average() -> Any:
    real = reduction.reduce_chunks

    def lie(plan: Any, start: int, stop: int, vectors: Any, weights: Any, seed: int) -> bytes:
        return real(plan, start, stop, [-vector for vector in vectors], weights, seed)

    return patch.object(reduction, "reduce_chunks", lie)


def refuses_everyone() -> Any:
    def admit(*_: Any) -> None:
        raise PeerFault(Fault.MALFORMED, "go away")

    return patch.object(reduction.Reduction, "admit", admit)


def too_few_batches() -> Any:
    async def deliver(self: Any, stream: Any, part: Any, rank: int, first: int, reducer: Any) -> None:
        num_chunks = part.stop - part.start
        await stream.send(Contribution(part=part.index, rank=rank, first=first, num_chunks=num_chunks).to_bytes())

    return patch.object(opening.Opener, "_deliver", deliver)


def other_bytes() -> Any:
    real = FrameStream.send

    async def send(self: FrameStream, frame: Any) -> None:
        data = bytes(frame)
        await real(self, data if len(data) < 100_000 else data[:-1] + bytes([data[-1] ^ 1]))

    return patch.object(FrameStream, "send", send)


FAULTS: dict[str, Callable[[], contextlib.AbstractContextManager[Any]]] = {
    "none": contextlib.nullcontext,
    "absent": contextlib.nullcontext,
    "nan": contextlib.nullcontext,
    "1e30": contextlib.nullcontext,
    "wrong average": wrong_average,
    "refuses everyone": refuses_everyone,
    "too few batches": too_few_batches,
    "other bytes": other_bytes,
    "stopped": lambda: signal_after(signal.SIGSTOP, 14),
    "killed": lambda: signal_after(signal.SIGKILL, 14),
}


# Files in the folder


def write(path: Path, value: object) -> None:
    path.with_suffix(".tmp").write_text(json.dumps(value))
    path.with_suffix(".tmp").rename(path)


def exists(path: Path) -> bool:
    return path.exists()


async def read(path: Path, timeout_s: float = 60.0) -> dict[str, Any]:
    async with asyncio.timeout(timeout_s):
        while not exists(path):  # noqa: ASYNC110 (another process writes it)
            await asyncio.sleep(0.02)
    return load(path)


def load(path: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(path.read_text())
    return loaded


class Peer:
    """This process."""

    def __init__(self, folder: Path, index: int, num_senders: int, num_peers: int, elements: int) -> None:
        self.folder = folder
        self.index = index
        self.num_senders = num_senders
        self.num_peers = num_peers
        self.elements = elements
        self.key = Key(index + 1)
        self.layout = PayloadLayout([Section(name=name, num_elements=elements, codec="fp32") for name in SECTIONS])

    async def main(self, faults: list[str]) -> None:
        initial = [] if self.index == 0 else list((await read(self.folder / "member-0.json"))["maddrs"])
        swarm = Swarm(initial, ["/ip4/127.0.0.1/tcp/0"])
        await swarm.start()
        me = {"peer_id": swarm.peer_id, "maddrs": swarm.visible_maddrs(), "hotkey": self.key.hotkey}
        write(self.folder / f"member-{self.index}.json", me)
        told = [await read(self.folder / f"member-{i}.json") for i in range(self.num_peers)]
        for number, fault in enumerate(faults):
            await self.round(swarm, number, fault, told)
        daemon = swarm._p2p._child.pid
        await swarm.close()
        write(self.folder / f"end-{self.index}.json", {"daemon": daemon})

    async def round(self, swarm: Swarm, number: int, fault: str, told: list[dict[str, Any]]) -> None:
        payloads = [self.payload(i, fault) for i in range(self.num_peers)]
        plan = GroupPlan(
            run_id="integration",
            round=number,
            attempt=0,
            members=tuple(self.member(i, told[i], payloads[i]) for i in range(self.num_peers)),
            layout=self.layout,
            send_deadline_s=SEND_DEADLINE_S,
            deadline_s=DEADLINE_S,
            max_abs=100.0,
            stall_s=STALL_S,
            audit_blocks=64,
        )
        write(self.folder / f"ready-{number}-{self.index}.json", {})
        await read(self.folder / f"go-{number}.json", 120.0)
        if self.index == BAD and fault == "absent":
            write(self.folder / f"outcome-{number}-{self.index}.json", {})
            return
        with FAULTS[fault]() if self.index == BAD else contextlib.nullcontext():
            try:
                outcome = await all_reduce(plan, self.key, payloads[self.index], swarm, verify)
            except ServiceError as exc:
                write(self.folder / f"outcome-{number}-{self.index}.json", {"error": str(exc)})
                return
        write(
            self.folder / f"outcome-{number}-{self.index}.json",
            {
                "complete": outcome.complete,
                "reduced_again": outcome.reduced_again,
                "sha256": outcome.mean_sha256,
                "bits": [int(v.view(torch.int32).to(torch.int64).sum()) for v in outcome.vectors.values()],
                "included": outcome.included,
                "faults": [[f.hotkey, f.fault.value, f.detail] for f in outcome.faults],
                "seconds": outcome.seconds,
                "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
                "cpu_s": time.process_time(),
            },
        )

    def payload(self, index: int, fault: str) -> bytes | None:
        if index >= self.num_senders:
            return None
        return self.layout.encode(make_vectors(index, self.elements, fault), seed=0)

    def member(self, index: int, told: dict[str, Any], payload: bytes | None) -> Member:
        return Member(
            hotkey=told["hotkey"],
            peer_id=told["peer_id"],
            maddrs=tuple(told["maddrs"]),
            weight=weight(index) if payload is not None else 0.0,
            reduces=True,
            root=MerkleTree(self.layout.chunk_digests(payload)).root if payload is not None else None,
        )


def arguments() -> Iterator[int]:
    yield from (int(argument) for argument in sys.argv[2:6])


if __name__ == "__main__":
    torch.set_num_threads(1)
    asyncio.run(Peer(Path(sys.argv[1]), *arguments()).main(sys.argv[6].split(",")))
