"""One member of a group as a process: FOLDER INDEX NUM_SENDERS NUM_PEERS ELEMENTS [FRAMES].

Members meet in FOLDER: each writes who it is, waits for the others, and derives the plan from what all wrote. With
FRAMES the process kills itself with SIGKILL once it has sent that many.
"""

from __future__ import annotations

import asyncio
import json
import os
import resource
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from hivetrain.averaging.butterfly import all_reduce
from hivetrain.averaging.codecs import Bytes
from hivetrain.averaging.group import GroupPlan, Member
from hivetrain.averaging.layout import PayloadLayout, Section
from hivetrain.averaging.swarm import Swarm
from hivetrain.averaging.transport import Stream
from hivetrain.verification.merkle import MerkleTree
from tests.keys import TestIdentity as Key
from tests.keys import verify

SECTIONS = ("delta", "exp_avg", "exp_avg_sq")
SEND_DEADLINE_S, DEADLINE_S = 20.0, 40.0


class DoomedSwarm(Swarm):
    """Dies in the middle of what it sends."""

    frames_left = 0

    async def open(self, peer_id: str, maddrs: Sequence[str], timeout_s: float) -> Stream:
        stream = await super().open(peer_id, maddrs, timeout_s)
        send = stream.send

        async def send_and_die(frame: Bytes) -> None:
            await send(frame)
            self.frames_left -= 1
            if not self.frames_left:
                os.kill(os.getpid(), signal.SIGKILL)

        stream.send = send_and_die  # type: ignore[method-assign]
        return stream


def make_vectors(index: int, elements: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(index)
    return {name: torch.randn(elements, generator=generator) for name in SECTIONS}


def weight(index: int) -> float:
    return float(3 + 2 * index)


def write(path: Path, text: str) -> None:
    path.with_suffix(".tmp").write_text(text)
    path.with_suffix(".tmp").rename(path)


def exists(path: Path) -> bool:
    return path.exists()


async def read(path: Path, timeout_s: float = 60.0) -> dict[str, object]:
    async with asyncio.timeout(timeout_s):
        while not exists(path):  # noqa: ASYNC110 (another process writes it)
            await asyncio.sleep(0.02)
    return load(path)


def load(path: Path) -> dict[str, object]:
    loaded: dict[str, object] = json.loads(path.read_text())
    return loaded


async def main(folder: Path, index: int, num_senders: int, num_peers: int, elements: int, frames: int = 0) -> None:
    torch.set_num_threads(1)
    began = time.monotonic()
    if index == 0:
        initial: list[str] = []
    else:
        first = await read(folder / "member-0.json")
        initial = list(first["maddrs"])  # type: ignore[call-overload]
    swarm = DoomedSwarm(initial, ["/ip4/127.0.0.1/tcp/0"])
    swarm.frames_left = frames
    await swarm.start()
    startup_s = time.monotonic() - began
    key = Key(index + 1)
    layout = PayloadLayout([Section(name=name, num_elements=elements, codec="fp32") for name in SECTIONS])
    payload = layout.encode(make_vectors(index, elements), seed=0) if index < num_senders else None
    root = MerkleTree(layout.chunk_digests(payload)).root.hex() if payload else None
    me = {"peer_id": swarm.peer_id, "maddrs": swarm.visible_maddrs(), "root": root, "hotkey": key.hotkey}
    write(folder / f"member-{index}.json", json.dumps(me))
    members = []
    for i in range(num_peers):
        told = await read(folder / f"member-{i}.json")
        members.append(
            Member(
                hotkey=str(told["hotkey"]),
                peer_id=str(told["peer_id"]),
                maddrs=tuple(told["maddrs"]),  # type: ignore[arg-type]
                weight=weight(i) if i < num_senders else 0.0,
                reduces=True,
                root=bytes.fromhex(str(told["root"])) if told["root"] else None,
            )
        )
    plan = GroupPlan(
        run_id="integration",
        round=1,
        attempt=0,
        members=tuple(members),
        layout=layout,
        send_deadline_s=SEND_DEADLINE_S,
        deadline_s=DEADLINE_S,
        max_abs=100.0,
    )
    write(folder / f"ready-{index}.json", "{}")
    await read(folder / "go.json")
    outcome = await all_reduce(plan, key, payload, swarm, verify)
    daemon = swarm._p2p._child.pid
    await swarm.close()
    write(
        folder / f"outcome-{index}.json",
        json.dumps(
            {
                "complete": outcome.complete,
                "missing": outcome.missing_parts,
                "sha256": outcome.mean_sha256,
                "bits": [int(v.view(torch.int32).to(torch.int64).sum()) for v in outcome.vectors.values()],
                "included": outcome.included,
                "faults": [[f.hotkey, f.fault.value, f.detail] for f in outcome.faults],
                "seconds": outcome.seconds,
                "links": [[link.bytes_received, link.seconds, link.first_byte_s] for link in outcome.links],
                "startup_s": startup_s,
                "daemon": daemon,
                "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
                "cpu_s": time.process_time(),
            }
        ),
    )


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), *(int(argument) for argument in sys.argv[2:])))
