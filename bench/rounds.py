"""What a round's traffic takes on links of 100 Mbit/s and 100 ms, and what share of a round is left for training.

    python -m bench.rounds [--quick] [--json FILE]

The payload has distilgpt2's shape: DoRA of rank 16 on its attention and MLP layers, 1.22 M values and their moments.
Four miners, the validator and the hub have a line of 100 Mbit/s each (`bench.links`, 100 ms one way); what moves is
moved by the real code: receipts and openings by axon and dendrite, the all-reduce by four processes over `Swarm`, state
and manifest by the hub's client and server. A phase must last 1.5 times what its traffic took, in whole blocks of 12 s,
and a block more where the chain has to hear of it.

Replay is no traffic, but VERIFY must have room for it: a validator with a miner's hardware takes K/H of TRAIN for a
window of K of H steps.
"""

from __future__ import annotations

import asyncio
import math
import os
import statistics
import tempfile
import time
from collections.abc import Awaitable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

from bittensor.wallets import Keypair

from bench.averaging_peer import Spec
from bench.averaging_speed import Group
from bench.harness import Claim, arguments, at_least, report, table
from bench.links import LinkProxy, PeerLink
from hivetrain.averaging.codecs import CODEC_NAMES
from hivetrain.hub.client import HubStore
from hivetrain.ports import free_port
from hivetrain.run import Inner, Recipe, Schedule
from hivetrain.verification.receipt import MAX_RECEIPT_BYTES, snapshot_size_bytes
from template.access import AccessPolicy, NeuronFacts
from template.axon import Axon, Caller
from template.dendrite import Dendrite, PeerAddress
from template.protocol import Opening, Train, TrainReply
from tests.hub_fixture import make_manifest, running_hub

SECTIONS = ("delta", "exp_avg", "exp_avg_sq")
NUM_MINERS = 4
NUM_CHECKED = 2  # of them, in one round, by one validator: `scoring.check_share` of 0.5
OPENED_SNAPSHOTS = 3  # both ends of a window, and the last
NUM_VALUES = 1_221_120
MBIT_PER_S, DELAY_MS = 100.0, 100.0
MARGIN = 1.5
GOAL = 0.99
MAX_STEPS, SNAPSHOT_EVERY = 500, 2
PRODUCTION = Schedule(train=1188, commit=1, verify=7, all_reduce=2, publish=2)
RECIPE = Recipe(inner=Inner(max_steps=MAX_STEPS, snapshot_every=SNAPSHOT_EVERY), schedule=PRODUCTION)
TIMEOUT_S = 120.0
Codecs = tuple[str, str, str]
"""Of the update, and of its first and second moments."""

CODECS: list[Codecs] = [("fp32", "fp32", "fp32"), ("fp16", "fp32", "fp32"), ("int4", "int8", "log8")]
LOSSY_ERROR = 0.25  # int4 twice, of values and of their mean: 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """Seconds that one round's traffic took, by phase."""

    commit: float
    verify: float
    all_reduce: float
    publish: float
    download: float  # by whoever is out of step; in step, nobody downloads


class Wan:
    """Lines of miners, validator and hub, and the doors that lead to them."""

    def __init__(self) -> None:
        self.miners = [PeerLink.of(MBIT_PER_S) for _ in range(NUM_MINERS)]
        self.validator = PeerLink.of(MBIT_PER_S)
        self.hub = PeerLink.of(MBIT_PER_S)
        self._addresses = {f"127.0.0.{2 + i}": line for i, line in enumerate(self.miners)}
        self._proxies: list[LinkProxy] = []

    def address_of(self, miner: int) -> str:
        """Where that miner listens, and from where it dials."""
        return f"127.0.0.{2 + miner}"

    async def door(self, host: str, port: int, line: PeerLink) -> int:
        """A port that leads to ``host:port`` over its line and, for whoever is no miner, the validator's."""
        proxy = LinkProxy(
            host, port, None, DELAY_MS, link=line, line_of=lambda address: self._addresses.get(address, self.validator)
        )
        await proxy.start()
        self._proxies.append(proxy)
        return proxy.port

    async def close(self) -> None:
        """Close every door."""
        for proxy in self._proxies:
            await proxy.close()


async def timed(action: Awaitable[object]) -> float:
    """Seconds that it took."""
    began = time.perf_counter()
    await action
    return time.perf_counter() - began


async def receipts_and_openings(wan: Wan) -> tuple[float, float]:
    """Seconds in which a validator has all receipts, and the openings of those whom it checks."""
    validator = Keypair.create_from_uri("//Validator")
    facts = {validator.ss58_address: NeuronFacts(uid=0, stake=1e6, validator_permit=True)}
    snapshot = os.urandom(snapshot_size_bytes(NUM_VALUES))
    receipt = os.urandom(MAX_RECEIPT_BYTES // 4)  # of a round of 64 row groups

    async def answer(ask: Train, _: Caller) -> TrainReply:
        openings = tuple(Opening(index=index, step=index, payload=snapshot) for index in ask.snapshots)
        return TrainReply(
            run_id=ask.run_id,
            round=ask.round,
            status="committed",
            epoch=0,
            step=MAX_STEPS,
            num_steps=MAX_STEPS,
            receipt=receipt,
            openings=openings,
        )

    async with AsyncExitStack() as stack:
        peers = []
        for miner, line in enumerate(wan.miners):
            key = Keypair.create_from_uri(f"//Miner{miner}")
            axon = Axon(key, AccessPolicy(registry=facts.get), host=wan.address_of(miner), port=0)
            axon.attach(Train, answer)
            await axon.start()
            stack.push_async_callback(axon.close)
            port = await wan.door(wan.address_of(miner), axon.port, line)
            peers.append(PeerAddress(hotkey=axon.hotkey, ip="127.0.0.1", port=port))
        dendrite = await stack.enter_async_context(Dendrite(validator))

        async def ask(who: Sequence[PeerAddress], synapse: Train) -> None:
            limit = len(synapse.snapshots) * len(snapshot) + (1 << 20)
            for reply in await dendrite.call_many(who, synapse, timeout_s=TIMEOUT_S, max_reply_bytes=limit):
                if not reply.ok:
                    raise RuntimeError(f"{synapse.want}: {reply.failure}: {reply.detail}")

        run_id, snapshots = "ab" * 32, tuple(range(OPENED_SNAPSHOTS))
        commit = await timed(ask(peers, Train(run_id=run_id, round=1, want="receipt")))
        opened = Train(run_id=run_id, round=1, want="open", snapshots=snapshots)
        return commit, await timed(ask(peers[:NUM_CHECKED], opened))


async def publish_and_download(wan: Wan, folder: Path) -> tuple[float, float]:
    """Seconds in which the leader publishes a state, and a member that is out of step has it."""
    with running_hub(folder / "hub") as hub:
        port = await wan.door("127.0.0.1", hub.port, wan.hub)
        store = HubStore(endpoint=f"http://127.0.0.1:{port}", repo="bench/run")
        near = HubStore(endpoint=hub.url, repo="bench/run")
        await asyncio.to_thread(
            near.publish, make_manifest(0, {"adapter.safetensors": b"0"}), {"adapter.safetensors": b"0"}
        )
        files: dict[str, bytes | Path] = {
            "adapter.safetensors": os.urandom(4 * NUM_VALUES),
            "moments.safetensors": os.urandom(8 * NUM_VALUES),
        }
        manifest = make_manifest(1, {name: bytes(data) for name, data in files.items() if isinstance(data, bytes)})
        publish = await timed(asyncio.to_thread(store.publish, manifest, files))

        def download() -> None:
            ref = store.latest()
            if ref is None:
                raise RuntimeError("the epoch that was published is not there")
            store.fetch(ref, files, folder / "state")

        return publish, await timed(asyncio.to_thread(download))


async def all_reduces(wan: Wan, folder: Path, codecs: Sequence[Codecs], repeats: int) -> list[float]:
    """Median seconds of an all-reduce under each choice of codecs."""
    swarms = []
    for miner, line in enumerate(wan.miners):
        host, port, bulk_port = wan.address_of(miner), free_port(), free_port()
        door, bulk_door = await wan.door(host, port, line), await wan.door(host, bulk_port, line)
        swarms.append(
            {
                "host_maddrs": [f"/ip4/{host}/tcp/{port}"],
                "announce_maddrs": [f"/ip4/127.0.0.1/tcp/{door}"],
                "bulk_port": bulk_port,
                "announce_bulk": [f"127.0.0.1:{bulk_door}"],
            }
        )

    def measure() -> list[float]:
        medians = []
        with Group("ours", NUM_MINERS, folder, swarms, LOSSY_ERROR) as group:
            for choice in codecs:
                specs: list[Spec] = [(name, NUM_VALUES, codec) for name, codec in zip(SECTIONS, choice, strict=True)]
                group.prepare(specs)
                medians.append(statistics.median(group.round().seconds for _ in range(repeats)))
        return medians

    return await asyncio.to_thread(measure)


async def measure(choices: Sequence[Codecs], repeats: int) -> dict[Codecs, Traffic]:
    """One round's traffic under each choice of codecs."""
    codecs = [choice for choice in choices if set(choice) <= set(CODEC_NAMES)]
    wan = Wan()
    with tempfile.TemporaryDirectory(prefix="rounds-") as folder:
        try:
            commit, verify = await receipts_and_openings(wan)
            publish, download = await publish_and_download(wan, Path(folder))
            seconds = await all_reduces(wan, Path(folder), codecs, repeats)
        finally:
            await wan.close()
    return {
        choice: Traffic(commit=commit, verify=verify, all_reduce=one, publish=publish, download=download)
        for choice, one in zip(codecs, seconds, strict=True)
    }


def blocks(seconds: float, schedule: Schedule, on_chain: bool = False) -> int:
    """Length of a phase whose traffic takes so long."""
    return math.ceil(MARGIN * seconds / schedule.block_time_s) + on_chain


def needed(traffic: Traffic, schedule: Schedule) -> dict[str, int]:
    """Blocks that each phase after TRAIN needs."""
    replay_s = schedule.train * schedule.block_time_s * SNAPSHOT_EVERY / MAX_STEPS
    return {
        "commit": blocks(traffic.commit, schedule),
        "verify": blocks(traffic.verify + replay_s / MARGIN, schedule),
        "all_reduce": blocks(traffic.all_reduce, schedule),
        "publish": blocks(traffic.publish, schedule, on_chain=True),
    }


def run(quick: bool) -> list[Claim]:
    """Measure, print the table, and return the claims."""
    results = asyncio.run(measure(CODECS[:1], 1) if quick else measure(CODECS, 3))
    has = dict(zip(("train", "commit", "verify", "all_reduce", "publish"), PRODUCTION.phase_blocks, strict=True))
    rows, claims = [], []
    for choice, traffic in results.items():
        name = "/".join(choice)
        phases = needed(traffic, PRODUCTION)
        cells = [f"{getattr(traffic, phase):.1f} s: {count}" for phase, count in phases.items()]
        share = PRODUCTION.train / (PRODUCTION.train + sum(phases.values()))
        rows.append([name, *cells, f"{traffic.download:.1f} s", f"{100 * share:.2f}%"])
        short = [phase for phase, count in phases.items() if count > has[phase]]
        if short:
            print(f"{name}: the production default is too short in {', '.join(short)}: {phases} of {has}")
        share = 0.0 if short else PRODUCTION.train / PRODUCTION.round_blocks
        hours = PRODUCTION.round_blocks * PRODUCTION.block_time_s / 3600
        claims.append(at_least(f"share of a round of {hours:.2f} h spent training, {name}", share, GOAL))
    columns = ("codecs", "receipts", "openings", "all-reduce", "publish", "download", "training, if cut to fit")
    title = f"Traffic at {MBIT_PER_S:g} Mbit/s and {DELAY_MS:g} ms each way: seconds, and blocks that its phase needs"
    table(title, columns, rows)
    return claims


def main() -> int:
    """Entry point."""
    options = arguments(__doc__ or "")
    return report(run(options.quick), options.json)


if __name__ == "__main__":
    raise SystemExit(main())
