"""One peer of one way to all-reduce, as a process that `bench.averaging_speed` drives by JSON lines.

    python -m bench.averaging_peer ours|hivemind|gloo INDEX NUM_PEERS

Commands come on stdin, one answer each goes to stdout: ``join`` (find the others), ``prepare`` (vectors of so many
elements and that codec), ``meet`` (everything up to the vectors' first byte: the group's plan, hivemind's matchmaking),
``go`` (the all-reduce, timed), ``leave``. Peer i brings ``base * (i + 1)``, so everyone can tell if a mean is right.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, Protocol

import psutil
import torch
import uvloop

from hivetrain.ports import free_port

SEND_DEADLINE_S, DEADLINE_S = 60.0, 120.0
MATCHMAKING_TIMEOUT_S = 30.0
RSS_TICK_S = 0.005
BASE_PERIOD = 1 << 16
Reply = dict[str, Any]
Vectors = dict[str, torch.Tensor]
Spec = tuple[str, int, str]
"""A vector's name, its number of elements, and its codec."""


def base_vector(num_elements: int, name: str = "") -> torch.Tensor:
    """The same on every peer: float32, shape [num_elements]; second moments are not negative."""
    period = torch.randn(BASE_PERIOD, generator=torch.Generator().manual_seed(0))
    if name == "exp_avg_sq":
        period = period.abs()
    return period.repeat(-(-num_elements // BASE_PERIOD))[:num_elements].contiguous()


def relative_error(means: Vectors, num_peers: int) -> float:
    """Largest deviation from the mean of 1, 2, ... times the base vector, checked on every 7th value."""
    worst = 0.0
    for name, mean in means.items():
        expected = base_vector(mean.numel(), name)[::7].double() * ((num_peers + 1) / 2)
        worst = max(worst, float(((mean[::7].double() - expected).abs().max() / expected.abs().max()).item()))
    return worst


class Peer(Protocol):
    """One way to all-reduce. Each method answers with what its peers need to know."""

    async def join(self, first: Reply | None, swarm: Reply) -> Reply: ...
    async def prepare(self, specs: list[Spec]) -> Reply: ...
    async def meet(self, group: list[Reply]) -> Reply: ...
    async def go(self) -> Vectors: ...
    async def leave(self) -> Reply: ...


class OurPeer:
    """`hivetrain.averaging` over a real `Swarm`."""

    def __init__(self, index: int, bulk: bool = True, keep: bool = True) -> None:
        """``keep``: the memory that the mean lands in is kept from round to round, as hivemind and gloo keep theirs."""
        from tests.keys import TestIdentity

        self._index, self._bulk, self._keep = index, bulk, keep
        self._key = TestIdentity(index + 1)

    async def join(self, first: Reply | None, swarm: Reply) -> Reply:
        from hivetrain.averaging.swarm import Swarm

        options: Reply = {"host_maddrs": ["/ip4/127.0.0.1/tcp/0"], "bulk": self._bulk} | swarm
        self._swarm = Swarm(first["maddrs"] if first else [], **options)
        await self._swarm.start()
        return {"maddrs": self._swarm.visible_maddrs()}

    async def prepare(self, specs: list[Spec]) -> Reply:
        from hivetrain.averaging.layout import PayloadLayout, Section
        from hivetrain.verification.merkle import MerkleTree

        self._layout = PayloadLayout([Section(name=name, num_elements=n, codec=codec) for name, n, codec in specs])
        self._payload: bytes | None = None
        vectors = {name: base_vector(n, name) * (self._index + 1) for name, n, _ in specs}
        self._payload = self._layout.encode(vectors, seed=0)
        self._memory = bytearray(self._layout.size_bytes) if self._keep else None
        self._tree = MerkleTree(self._layout.chunk_digests(self._payload))  # a miner has it since it committed
        root = self._tree.root.hex()
        peer_id, maddrs = self._swarm.peer_id, self._swarm.visible_maddrs()
        return {"hotkey": self._key.hotkey, "peer_id": peer_id, "maddrs": maddrs, "root": root}

    async def meet(self, group: list[Reply]) -> Reply:
        from hivetrain.averaging.group import GroupPlan, Member

        members = [
            Member(
                hotkey=one["hotkey"],
                peer_id=one["peer_id"],
                maddrs=tuple(one["maddrs"]),
                weight=1.0,
                reduces=True,
                root=bytes.fromhex(one["root"]),
            )
            for one in group
        ]
        self._plan = GroupPlan(
            run_id="bench",
            round=1,
            attempt=0,
            members=tuple(members),
            layout=self._layout,
            send_deadline_s=SEND_DEADLINE_S,
            deadline_s=DEADLINE_S,
            max_abs=1e4,
        )
        return {"met": True}

    async def go(self) -> Vectors:
        from hivetrain.averaging.butterfly import all_reduce
        from tests.keys import verify

        outcome = await all_reduce(self._plan, self._key, self._payload, self._swarm, verify, self._tree, self._memory)
        if not outcome.complete or outcome.faults:
            raise RuntimeError(f"missing {outcome.missing_parts}, faults {outcome.faults}")
        return outcome.vectors

    async def leave(self) -> Reply:
        await self._swarm.close()
        return {}


class HivemindPeer:
    """hivemind's own `DecentralizedAverager`, with its defaults and no compression."""

    def __init__(self, index: int, num_peers: int) -> None:
        self._index, self._num_peers, self._rounds = index, num_peers, 0
        self._averager: Any = None
        self._control: Any = None

    async def join(self, first: Reply | None, swarm: Reply) -> Reply:
        import hivemind

        self._dht = hivemind.DHT(first["maddrs"] if first else [], start=True, host_maddrs=["/ip4/127.0.0.1/tcp/0"])
        return {"maddrs": [str(maddr) for maddr in self._dht.get_visible_maddrs()]}

    async def prepare(self, specs: list[Spec]) -> Reply:
        from hivemind.averaging import DecentralizedAverager
        from hivemind.compression import NoCompression

        self._stop()
        self._rounds += 1
        self._averager = DecentralizedAverager(
            [base_vector(num_elements) * (self._index + 1) for _, num_elements, _ in specs],
            self._dht,
            start=True,
            prefix=f"bench-{self._rounds}",
            target_group_size=self._num_peers,
            min_group_size=self._num_peers,
            compression=NoCompression(),
        )
        return {}

    async def meet(self, group: list[Reply]) -> Reply:
        from hivemind.averaging.control import AveragingStage

        if self._control is not None and not self._control.done():  # of a group that not everyone found
            self._control.cancel()
        with self._averager.get_tensors() as tensors:
            for tensor in tensors:
                tensor[:] = base_vector(tensor.numel()) * (self._index + 1)
        self._control = self._averager.step(wait=False, require_trigger=True, timeout=MATCHMAKING_TIMEOUT_S + 100.0)
        deadline = time.monotonic() + MATCHMAKING_TIMEOUT_S
        while self._control.stage != AveragingStage.AWAITING_TRIGGER:
            if time.monotonic() > deadline:
                return {"met": False}
            await asyncio.sleep(0.01)
        return {"met": True}

    async def go(self) -> Vectors:
        self._control.allow_allreduce()
        await asyncio.to_thread(self._control.result, 110.0)
        with self._averager.get_tensors() as tensors:
            return {str(place): tensor for place, tensor in enumerate(tensors)}

    async def leave(self) -> Reply:
        self._stop()
        self._dht.shutdown()
        return {}

    def _stop(self) -> None:
        if self._averager is not None:
            self._averager.shutdown()
            self._averager = None


class GlooPeer:
    """torch's own collective, between machines that trust each other."""

    def __init__(self, index: int, num_peers: int) -> None:
        self._index, self._num_peers = index, num_peers

    async def join(self, first: Reply | None, swarm: Reply) -> Reply:
        from torch import distributed

        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        self._port = first["port"] if first else free_port()
        if first is not None:
            await asyncio.to_thread(self._init)
            return {}
        self._starting = asyncio.create_task(asyncio.to_thread(self._init))
        self._distributed = distributed
        return {"port": self._port}

    def _init(self) -> None:
        from torch import distributed

        address = f"tcp://127.0.0.1:{self._port}"
        distributed.init_process_group("gloo", init_method=address, rank=self._index, world_size=self._num_peers)

    async def prepare(self, specs: list[Spec]) -> Reply:
        if self._index == 0:
            await self._starting
        self._num_elements = sum(num_elements for _, num_elements, _ in specs)
        return {}

    async def meet(self, group: list[Reply]) -> Reply:
        self._vector = base_vector(self._num_elements) * (self._index + 1)
        return {"met": True}

    async def go(self) -> Vectors:
        from torch import distributed

        distributed.all_reduce(self._vector)
        self._vector /= self._num_peers
        return {"": self._vector}

    async def leave(self) -> Reply:
        from torch import distributed

        distributed.destroy_process_group()
        return {}


class Meter:
    """CPU seconds, and peak resident memory above the level at its start, of this process and all below it."""

    def __init__(self) -> None:
        me = psutil.Process()
        self._processes = [me, *me.children(recursive=True)]
        self._level = self._rss()
        self._cpu = self._cpu_seconds()
        self._peak = self._level
        self._exact = all(_clear_peak(process.pid) for process in self._processes)
        self._done = threading.Event()
        self._sampler = threading.Thread(target=self._sample, daemon=True)
        if not self._exact:
            self._sampler.start()

    def stop(self) -> tuple[float, float]:
        """CPU seconds, and megabytes."""
        cpu = self._cpu_seconds() - self._cpu
        if self._exact:
            self._peak = sum(_peak_rss(process.pid) for process in self._processes)
        else:
            self._done.set()
            self._sampler.join()
        return cpu, (self._peak - self._level) / 1e6

    def _sample(self) -> None:
        while not self._done.wait(RSS_TICK_S):
            self._peak = max(self._peak, self._rss())

    def _rss(self) -> int:
        return sum(process.memory_info().rss for process in self._processes)

    def _cpu_seconds(self) -> float:
        times = [process.cpu_times() for process in self._processes]
        return sum(float(one.user + one.system) for one in times)


def _clear_peak(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        return False
    return True


def _peak_rss(pid: int) -> int:
    with open(f"/proc/{pid}/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) * 1024


KINDS: dict[str, Callable[[int, int], Peer]] = {
    "ours": lambda index, num_peers: OurPeer(index),
    "ours, fresh memory": lambda index, num_peers: OurPeer(index, keep=False),
    "ours, libp2p only": lambda index, num_peers: OurPeer(index, bulk=False),
    "hivemind": HivemindPeer,
    "gloo": GlooPeer,
}


async def obey(peer: Peer, num_peers: int, command: Reply) -> Reply:
    """One command's answer."""
    match command["do"]:
        case "join":
            return await peer.join(command["first"], command["swarm"])
        case "prepare":
            return await peer.prepare(command["specs"])
        case "meet":
            return await peer.meet(command["group"])
        case "go":
            meter = Meter()
            began = time.monotonic()
            means = await peer.go()
            ended = time.monotonic()
            cpu_s, peak_mb = meter.stop()
            error = relative_error(means, num_peers)
            digest = hashlib.sha256()
            for mean in means.values():
                digest.update(mean.numpy().data)
            answer = {"began": began, "ended": ended, "cpu_s": cpu_s, "peak_mb": peak_mb}
            return answer | {"error": error, "sha256": digest.hexdigest()}
        case "leave":
            return await peer.leave()
    raise ValueError(f"unknown command {command}")


async def main(kind: str, index: int, num_peers: int) -> None:
    """Obey until stdin ends or ``leave``."""
    peer = KINDS[kind](index, num_peers)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else is printed goes to the log
    loop = asyncio.get_running_loop()
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        command = json.loads(line)
        answers.write(json.dumps(await obey(peer, num_peers, command)) + "\n")
        answers.flush()
        if command["do"] == "leave":
            break
    os._exit(0)  # hivemind's threads may outlive their shutdown


if __name__ == "__main__":
    # hivemind and gloo have loops of their own; ours runs on the loop that neurons use.
    loop_factory = uvloop.new_event_loop if sys.argv[1].startswith("ours") else None
    with asyncio.Runner(loop_factory=loop_factory) as runner:
        runner.run(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
