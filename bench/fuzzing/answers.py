"""A whole check of a tiny run: what a liar commits to and opens, judged by real replay, and what is published of it."""

from __future__ import annotations

import dataclasses
import json
import struct
import tempfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from bench.attacks.checking import COINS, check, honest_answer
from bench.attacks.world import TINY, World, make_world
from bench.fuzzing.choices import FLOATS, Choices, altered, flipped
from bench.fuzzing.guard import declared, require
from bench.fuzzing.samples import CHEAT
from hivetrain.contribution import (
    Contribution,
    build_contribution,
    codec_seed,
    displacement_sketch,
    encode_payload,
)
from hivetrain.errors import Fault, PeerFault
from hivetrain.scoring import CheckResult, RoundFacts, Score, score_round
from hivetrain.scoring.record import check_record_of
from hivetrain.scoring.score import LIES, Bandwidth
from hivetrain.verification.challenge import Draw
from hivetrain.verification.merkle import MerkleTree, leaf_digest
from hivetrain.verification.receipt import (
    Receipt,
    SnapshotTree,
    check_receipt,
    decode_snapshot,
    parse_receipt,
    sign_receipt,
)
from template.dendrite import Failure, Reply
from template.protocol import Train, TrainReply
from tests.keys import verify

ROUND = 1
RECIPE = dataclasses.replace(TINY, inner=dataclasses.replace(TINY.inner, max_steps=4, snapshot_every=2))
MAX_REPLY_BYTES = 8 << 20
FAULTS = LIES | {Fault.REFUSED, Fault.TRUNCATED, Fault.OVERSIZED}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Bench:
    world: World
    honest: Contribution


@lru_cache(maxsize=1)
def _bench() -> _Bench:
    with tempfile.TemporaryDirectory() as folder:
        world = make_world(Path(folder), RECIPE)
        data = world.load_data(ROUND, 0)
        work = world.parts.loop.run(world.state, data.batch, num_steps=RECIPE.inner.max_steps)
        honest = build_contribution(
            parts=world.parts,
            base=world.genesis,
            start=world.state,
            work=work,
            data=data,
            round_number=ROUND,
            rank=0,
            identity=CHEAT,
        )
    return _Bench(world=world, honest=honest)


def answer(data: bytes) -> None:
    """Commit, answer, be judged, be published."""
    choices, bench = Choices(data), _bench()
    lying = choices.flag()
    committed = _committed(bench, choices) if lying else bench.honest
    receipt = _receipt(bench.world, committed.receipt.to_bytes())
    if receipt is None:
        return
    drawn = Draw(hotkey=CHEAT.hotkey, windows=choices.pick(((1,), (0,), (0, 1))))
    drawn = dataclasses.replace(drawn, windows=tuple(w for w in drawn.windows if w < receipt.num_snapshots) or (0,))
    reply = _reply(bench.world, committed, drawn, choices)
    result = check(bench.world, bench.world.genesis, bench.world.state, ROUND, receipt, drawn, reply)
    untouched = reply.reply == _honest_reply(bench, drawn) and receipt == bench.honest.receipt
    require(not untouched or result.fault is None, f"an honest miner is at fault: {result.fault}: {result.detail}")
    _published(result)


def _receipt(world: World, raw: bytes) -> Receipt | None:
    """What COMMIT lets in."""
    try:
        found = parse_receipt(raw, hotkey=CHEAT.hotkey, verify=verify)
        check_receipt(found, world.expected(world.genesis, ROUND, 0, CHEAT.hotkey))
    except PeerFault as exc:
        declared(exc, {Fault.OVERSIZED, Fault.MALFORMED, Fault.BAD_SIGNATURE, Fault.WRONG_SCHEMA})
        return None
    return found


def _committed(bench: _Bench, choices: Choices) -> Contribution:
    """A contribution whose trees and signature are a liar's own."""
    honest = bench.honest
    snapshots, fields = list(honest.snapshots.snapshots), json.loads(honest.receipt.to_bytes())
    size = len(honest.steps) // honest.receipt.num_steps
    steps = honest.steps
    for _ in range(choices.below(3)):
        at = choices.below(len(snapshots))
        snapshots[at] = dataclasses.replace(snapshots[at], payload=_values(snapshots[at].payload, choices, 8))
    if choices.flag():
        steps = _values(steps, choices, 8)
    if choices.flag():  # of fewer steps than were taken
        count = 1 + choices.below(3)
        fields |= {"num_steps": count, "num_samples": 2 * count, "num_tokens": 32 * count}
        fields["num_snapshots"] = (count + 1) // 2
        snapshots, steps = snapshots[: fields["num_snapshots"]], steps[: count * size]
    tree = SnapshotTree(snapshots)
    pieces = [steps[at : at + size] for at in range(0, len(steps), size)] or [b""]
    fields["snapshots_root"] = tree.root
    fields["steps_root"] = MerkleTree([leaf_digest(piece) for piece in pieces]).root.hex()
    if choices.flag():
        fields |= _linked(bench.world, honest.receipt, snapshots[-1].payload)
    if choices.flag():
        for name in (
            "num_steps",
            "num_samples",
            "num_tokens",
            "num_snapshots",
            "loss",
            "data_digests",
            "sketch",
            "rank",
        ):
            fields[name] = altered(fields[name], choices)
    try:
        receipt = sign_receipt(Receipt.model_validate_json(json.dumps(fields)), CHEAT)
    except ValueError:
        receipt = honest.receipt
    return dataclasses.replace(honest, receipt=receipt, snapshots=tree, steps=steps)


def _linked(world: World, receipt: Receipt, final: bytes) -> dict[str, str]:
    """The payload and the sketch of what the liar says that it came to: replay alone can tell."""
    try:
        snapshot = decode_snapshot(final, world.parts.flat.size)
        seed = codec_seed(receipt.run_id, receipt.round, receipt.hotkey)
        payload = encode_payload(world.parts, world.state, snapshot, seed, None).payload
    except (PeerFault, ValueError):
        return {}
    root = MerkleTree(world.parts.layout.chunk_digests(payload)).root.hex()
    return {
        "payload_root": root,
        "sketch": displacement_sketch(receipt.run_id, receipt.round, world.state, snapshot),
    }


def _values(raw: bytes, choices: Choices, skip: int) -> bytes:
    """Committed bytes with other numbers in them, or of another length."""
    what = choices.below(4)
    if what == 0:
        return flipped(raw, choices)
    with np.errstate(over="ignore"):
        number = struct.pack("<f", np.float32(choices.pick(FLOATS)))
    if what == 1:
        at = skip + 4 * choices.below((len(raw) - skip) // 4)
        return raw[:at] + number + raw[at + 4 :]
    if what == 2:
        return raw[:skip] + number * ((len(raw) - skip) // 4)
    return choices.number().to_bytes(2000, "little", signed=True)[:8] + raw[8:]


@lru_cache(maxsize=16)
def _request(windows: tuple[int, ...], receipt: Receipt) -> Train:
    drawn = Draw(hotkey=CHEAT.hotkey, windows=windows)
    return Train(
        run_id=receipt.run_id,
        round=receipt.round,
        want="open",
        snapshots=drawn.snapshots(receipt.num_snapshots),
        coins=COINS,
    )


def _honest_reply(bench: _Bench, drawn: Draw) -> TrainReply:
    request = _request(drawn.windows, bench.honest.receipt)
    raw = honest_answer(bench.world, bench.world.genesis, bench.honest, request).to_bytes()
    return TrainReply.from_bytes(raw, MAX_REPLY_BYTES)


def _reply(world: World, committed: Contribution, drawn: Draw, choices: Choices) -> Reply[TrainReply]:
    """What comes over the wire, as the miner's own handlers answer it or as it alters that."""
    shown = honest_answer(world, world.genesis, committed, _request(drawn.windows, committed.receipt))
    fields = shown.model_dump()
    if choices.flag():
        first = fields["openings"][0] if fields["openings"] else {"index": 0, "step": 0, "payload": b"", "proof": ()}
        many = [first | {"payload": b"", "index": 2**53 - place} for place in range(64)]
        fields["openings"] = choices.pick(([*fields["openings"], first], [], many))
    if choices.flag():
        fields["steps"] = flipped(fields["steps"], choices)
    if choices.flag():
        for one in fields["openings"]:
            one["proof"] = [flipped(node, choices) for node in one["proof"]]
            one["payload"] = flipped(one["payload"], choices)
    if choices.flag():
        zeros = bytes(4 * world.parts.flat.size)
        fields["remainder"] = {"values": zeros, "previous": choices.take(64), "others": choices.take(64)}
    fields["openings"] = tuple({**one, "proof": tuple(one["proof"])} for one in fields["openings"])
    try:
        raw = TrainReply.model_validate(fields).to_bytes()
        return Reply(hotkey=CHEAT.hotkey, reply=TrainReply.from_bytes(raw, MAX_REPLY_BYTES))
    except (ValueError, PeerFault) as exc:
        return Reply(hotkey=CHEAT.hotkey, failure=Failure.MALFORMED, detail=str(exc)[:300])


def _published(result: CheckResult) -> None:
    """The verdict is one of the declared ones, fits into a record, and costs the miner that it is about."""
    require(result.fault is None or result.fault in FAULTS, f"undeclared fault {result.fault}: {result.detail[:200]}")
    result = dataclasses.replace(result, detail=result.detail[:500])  # as `gather_facts` does it
    require(check_record_of(result).result() == dataclasses.replace(result, evidence={}), "a check changes in a record")
    facts = RoundFacts(tokens=64, checks=(result,), bandwidth=Bandwidth(size_bytes=1, seconds=1.0, in_time=True))
    others = RoundFacts(tokens=64, bandwidth=facts.bandwidth)
    scores = score_round({CHEAT.hotkey: facts, "other": others}, RECIPE.scoring)
    mine, theirs = scores[CHEAT.hotkey], scores["other"]
    require(isinstance(mine, Score) and isinstance(theirs, Score), "a miner without a score")
    if isinstance(mine, Score) and isinstance(theirs, Score):
        require(theirs.score == 1.0 and not theirs.lied, "the other miner pays for it")
        require(mine.score == 0.0 or result.fault is None, "a fault is paid")


__all__ = ["answer"]
