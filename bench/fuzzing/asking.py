"""What a member is asked: a validator's challenge, and a leader's call to average, by callers that lie."""

from __future__ import annotations

import asyncio
import hashlib
from functools import lru_cache
from typing import Any

import msgpack
from pydantic import ValidationError

from bench.fuzzing.choices import Choices, altered
from bench.fuzzing.guard import require
from bench.fuzzing.samples import CHEAT, MINERS, ROUND, honest_group, honest_receipt
from hivetrain.averaging.group import plan_to_dict
from hivetrain.contribution import Contribution
from hivetrain.run import Averaging
from hivetrain.verification.receipt import SnapshotBytes, SnapshotTree, check_opening, sign_receipt
from template.axon import Caller
from template.board import Board
from template.handlers import MAX_DEADLINE_S, Handlers
from template.protocol import AllReduce, AllReduceReply, Train, TrainReply

ME = 1
COINS = (bytes(32), b"\1" * 32, b"")
NUM_SNAPSHOTS = 5
CALLERS = tuple(
    Caller(hotkey=who.hotkey, host="127.0.0.1", uid=uid, stake=1e3, validator_permit=True)
    for uid, who in enumerate((CHEAT, MINERS[2]))
)


@lru_cache(maxsize=1)
def _contribution() -> Contribution:
    group, me = honest_group(), MINERS[ME]
    payloads = [bytes([index]) * 56 for index in range(NUM_SNAPSHOTS)]
    snapshots = SnapshotTree([SnapshotBytes(step=10 * (at + 1), payload=one) for at, one in enumerate(payloads)])
    roots = {"snapshots_root": snapshots.root, "payload_root": group.trees[ME].root.hex()}
    receipt = honest_receipt(me).model_copy(update=roots)
    return Contribution(
        receipt=sign_receipt(receipt, me),
        payload=group.payloads[ME],
        tree=group.trees[ME],
        snapshots=snapshots,
        steps=bytes(28),
    )


def _member() -> tuple[Board, Handlers]:
    """The real handlers of an honest member that has committed."""
    receipt, board = _contribution().receipt, Board()
    board.begin_round(ROUND, 0, receipt.base_manifest)
    board.commit(_contribution())
    handlers = Handlers(
        role="miner",
        run_id=receipt.run_id,
        identity=MINERS[ME],
        board=board,
        layout=honest_group().plan.layout,
        averaging=Averaging(),
        why_not_leader=lambda *_: None,
    )
    return board, handlers


def challenge(data: bytes) -> None:
    """Challenges in any order: snapshots are shown for the coins alone to which that very caller committed before."""
    choices, (_, handlers) = Choices(data), _member()
    receipt = _contribution().receipt
    committed: dict[str, bytes] = {}
    for _ in range(1 + choices.below(4)):
        caller, coins = choices.pick(CALLERS), choices.pick(COINS)
        digest = hashlib.sha256(coins).digest()
        want = choices.pick(("receipt", "open", "report"))
        fields: Any = {
            "run_id": receipt.run_id,
            "round": ROUND,
            "want": want,
            "snapshots": (0, 4) if want == "open" else (),
            "coins": digest if want == "receipt" else coins,
        }
        try:
            asked = Train.model_validate(_tuples(altered(fields, choices)))
        except ValidationError:
            continue
        reply = asyncio.run(handlers.train(asked, caller))
        require(TrainReply.from_bytes(reply.to_bytes(), 1 << 20) == reply, "a reply changes on the wire")
        if asked.want == "receipt" and reply.receipt is not None:
            committed.setdefault(caller.hotkey, asked.coins)
        if reply.openings or reply.steps:
            revealed = hashlib.sha256(asked.coins).digest()
            require(committed.get(caller.hotkey) == revealed, "snapshots are shown for other coins")
            require([one.index for one in reply.openings] == list(asked.snapshots), "other snapshots are shown")
        for one in reply.openings:
            check_opening(receipt, one.index, one.payload, one.proof)


def joining(data: bytes) -> None:
    """A leader's call: a member joins no group but one of its own layout, payload, settings and time."""
    asyncio.run(_joining(Choices(data)))


async def _joining(choices: Choices) -> None:
    board, handlers = _member()
    plan = plan_to_dict(honest_group().plan)
    sections: Any = plan["sections"]
    try:
        packed = msgpack.packb(altered(plan, choices, [sections, MINERS[ME].hotkey]))
    except (OverflowError, ValueError):
        return
    receipt = _contribution().receipt
    fields: Any = {
        "run_id": receipt.run_id,
        "round": ROUND,
        "attempt": 0,
        "plan": packed,
        "base_manifest": receipt.base_manifest,
        "want": choices.pick(("mean", "state")),
        "state_hash": choices.pick(("", "07" * 32)),
    }
    try:
        asked = AllReduce.model_validate(altered(fields, choices))
    except ValidationError:
        return
    call = asyncio.create_task(handlers.all_reduce(asked, choices.pick(CALLERS)))
    for _ in range(3):
        await asyncio.sleep(0)
    if not call.done():
        task = board.mailbox.get_nowait()
        mine = task.plan.member(MINERS[ME].hotkey)
        require(task.plan.layout == honest_group().plan.layout, "it joins a group of another layout")
        require(task.plan.deadline_s <= MAX_DEADLINE_S, "it joins for longer than the protocol allows")
        require(mine is not None, "it joins a group without it")
        require(mine is None or not mine.sends or mine.root == _contribution().payload_root, "it sends another payload")
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)
        return
    reply = call.result()
    require(not reply.accepted and not reply.state_signature, "it signs a state that it does not hold")
    require(AllReduceReply.from_bytes(reply.to_bytes(), 1 << 20) == reply, "a reply changes on the wire")


def _tuples(fields: Any) -> Any:
    """Lists as the wire has them."""
    if not isinstance(fields, dict):
        return fields
    return {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}


__all__ = ["challenge", "joining"]
