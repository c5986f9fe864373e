"""The inputs from which fuzzing starts: `python -m bench.fuzzing.seeds` writes them to tests/golden/fuzz/TARGET/NAME.

Real messages for the targets that parse raw bytes; for those that read choices, a few lists of choices: none (the
honest message), the other first choice, and some drawn ones.
"""

from __future__ import annotations

import random
from collections.abc import Mapping

import msgpack

from bench.fuzzing.campaign import CORPUS
from bench.fuzzing.parsing import FRAMES, SYNAPSES
from bench.fuzzing.samples import CHEAT, MINERS, ROUND, chunk_bytes, honest_group, honest_receipt, signed_mean
from bench.fuzzing.targets import TARGETS
from hivetrain.averaging import messages, upgrade
from hivetrain.averaging.group import plan_to_dict
from hivetrain.averaging.proofs import pack_two_averages, pack_wrong_average
from hivetrain.scoring.record import sign_record
from template import protocol
from tests.hub_fixture import make_manifest
from tests.records_kit import VALIDATOR, Ledger

RAW = ("receipt", "synapse", "plan", "message", "record", "manifest", "evidence")
NUM_DRAWN = 8
LIES = {
    "not-a-number": bytes([1, 1, 1, 2, 11]),
    "infinite-start": bytes([1, 1, 0, 2, 12, 0, 0, 0, 0, 0, 0, 0, 0]),
    "zeros": bytes([1, 1, 1, 2, 0, 0, 0, 1]),
    "one-value": bytes([1, 1, 1, 1, 7, 5, 0, 0, 0, 1]),
    "large-values": bytes([1, 1, 1, 2, 9, 0, 0, 1]),
    "another-step": bytes([1, 1, 1, 3, 4]),
    "fewer-steps": bytes([1, 0, 0, 1, 1, 1]),
    "many-openings": bytes([0, 0, 1, 2]),
}
"""Choices of the target `answer`: what a liar commits to, or opens."""


def make_seeds() -> dict[str, dict[str, bytes]]:
    """Bytes by file name, by target; the same in every run."""
    made = {"receipt": {"honest": honest_receipt().to_bytes()}, "record": _records(), "evidence": _evidence()}
    made["manifest"] = {"epoch": make_manifest(1, {}, nonce="0" * 16).to_bytes()}
    made["plan"] = {"group": msgpack.packb(plan_to_dict(honest_group().plan))}
    made["synapse"] = {one.__class__.__name__: _numbered(SYNAPSES, one, one.to_bytes()) for one in _synapses()}
    made["message"] = {
        f"{one.__class__.__module__.rpartition('.')[2]}-{one.__class__.__name__}": _numbered(
            FRAMES, one, one.to_bytes()
        )
        for one in _frames()
    }
    drawn = random.Random(20)
    for name in TARGETS:
        if name not in RAW:
            some = {f"drawn-{i}": drawn.randbytes(24) for i in range(NUM_DRAWN)}
            made[name] = {"honest": bytes(48), "other": b"\1" + bytes(47), **some, **(LIES if name == "answer" else {})}
    return made


def _numbered(kinds: tuple[type, ...], one: object, raw: bytes) -> bytes:
    return bytes([kinds.index(type(one))]) + raw


def _records() -> dict[str, bytes]:
    """One miner's round, with and without its receipt."""
    ledger = Ledger(VALIDATOR)
    ledger.round(0, miners=MINERS[:1])
    whole = ledger.round(ROUND, miners=MINERS[:1])
    (hotkey, miner), *_ = whole.miners.items()
    bare = whole.model_copy(update={"miners": {hotkey: miner.model_copy(update={"receipt": None, "drawn": ()})}})
    return {"whole": whole.to_bytes(), "bare": sign_record(bare, VALIDATOR).to_bytes()}


def _evidence() -> dict[str, bytes]:
    group, part = honest_group(), 2  # the shortest chunk, which the cheat reduces as the second in line
    wrong = signed_mean(group.plan, part, bytes(len(group.means[part])), CHEAT, rank=1)
    right = signed_mean(group.plan, part, group.means[part], CHEAT, rank=1)
    openings = {
        member: (chunk_bytes(group.plan, group.payloads[member], part), group.trees[member].range_proof(part, part + 1))
        for member in range(len(MINERS))
    }
    block = pack_wrong_average(wrong, part, part + 1, bytes(len(group.means[part])), [], openings)
    return {"two-averages": pack_two_averages(right, wrong), "wrong-average": block}


def _synapses() -> list[protocol.Message]:
    run_id, hotkey = "01" * 32, MINERS[0].hotkey
    opening = protocol.Opening(index=4, step=50, payload=bytes(20), proof=(bytes(32),))
    remainder = protocol.RemainderOpening(values=bytes(8), previous=b"{}", others=bytes(32))
    plan: bytes = msgpack.packb(plan_to_dict(honest_group().plan))
    return [
        protocol.Train(run_id=run_id, round=ROUND, want="open", snapshots=(0, 4), coins=bytes(32)),
        protocol.TrainReply(
            run_id=run_id,
            round=ROUND,
            status="opened",
            epoch=0,
            step=50,
            num_steps=50,
            loss=4.5,
            tokens_per_second=1e4,
            receipt=b"{}",
            openings=(opening,),
            remainder=remainder,
            steps=bytes(28),
        ),
        protocol.AllReduce(run_id=run_id, round=ROUND, attempt=0, plan=plan, base_manifest="02" * 32),
        protocol.AllReduceReply(
            run_id=run_id,
            round=ROUND,
            attempt=0,
            accepted=True,
            completed=True,
            state_hash="03" * 32,
            state_signature="00" * 64,
            included={hotkey: 1.0},
            faults=(protocol.MemberFault(hotkey=hotkey, fault="late", detail="slow"),),
            links=(protocol.Link(hotkey=hotkey, bytes_received=9, seconds=0.5, first_byte_s=0.1),),
        ),
        protocol.IsAlive(),
        protocol.IsAliveReply(version=1, role="miner", run_id=run_id, epoch=0, round=ROUND, state="training"),
    ]


def _frames() -> list[messages.Message]:
    result = honest_group().results[0]
    group_id, hotkey, digest = "01" * 32, MINERS[0].hotkey, bytes(32)
    return [
        result,
        messages.Confirm(version=1, results=[result], done=False),
        messages.Batch(start=0, stop=2, proof=[digest]),
        messages.MeanBatch(rank=0, included=b"\7"),
        messages.Contribution(part=0, rank=0, first=0, num_chunks=1),
        messages.Hello(group_id=group_id, hotkey=hotkey, nonce=digest),
        messages.HelloReply(hotkey=hotkey, nonce=digest, signature=bytes(64)),
        messages.HelloConfirm(signature=bytes(64)),
        messages.Refusal(fault="late", detail="no"),
        messages.Fetch(part=0, rank=0, take=True),
        messages.FetchReply(status="have", rank=0),
        messages.Open(starts=[0], stops=[1]),
        messages.Proof(part=0, rank=0),
        messages.ProofReply(wanted=True),
        upgrade.Hello(secret=digest, endpoints=[("127.0.0.1", 80)]),
        upgrade.Offer(secret=digest, endpoints=[("::1", 80)]),
        upgrade.DialBack(),
        upgrade.Dialled(reached=True),
        upgrade.Choice(bulk=True),
    ]


def main() -> None:
    """Write them all, and remove what is no seed any more."""
    made: Mapping[str, Mapping[str, bytes]] = make_seeds()
    for target, files in made.items():
        folder = CORPUS / target
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.iterdir():
            if old.name not in files:
                old.unlink()
        for name, raw in files.items():
            (folder / name).write_bytes(raw)


if __name__ == "__main__":
    main()
