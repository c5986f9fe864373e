"""VERIFY in memory: what a miner answers to a challenge, through its real handlers, and what the check makes of it."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable
from typing import cast

from bench.attacks.world import VALIDATOR, World
from hivetrain.contribution import Contribution
from hivetrain.errors import PeerFault
from hivetrain.manifest import Ref
from hivetrain.scoring import CheckResult
from hivetrain.training.state import State
from hivetrain.verification.receipt import Receipt
from template.axon import Caller
from template.board import Board
from template.dendrite import Dendrite, Failure, PeerAddress, Reply
from template.handlers import Handlers
from template.network import NetworkThread
from template.protocol import Train, TrainReply
from template.validator.verify import Draw, Verifier

COINS = b"\x07" * 32
MAX_REPLY_BYTES = 64 << 20

Checks = tuple[CheckResult, ...]
"""What a check finds where window 0, 1, ... of a round is drawn."""


Answer = Callable[[Train, TrainReply], "TrainReply | None"]


def every_check(
    world: World, base: Ref, state: State, number: int, contribution: Contribution, answer: Answer
) -> Checks:
    """What the check of each window finds, if that one is drawn."""
    receipt = contribution.receipt
    draws = [Draw(hotkey=receipt.hotkey, windows=(window,)) for window in range(receipt.num_snapshots)]
    return tuple(judge(world, base, state, number, contribution, draw, answer) for draw in draws)


def judge(
    world: World, base: Ref, state: State, number: int, contribution: Contribution, drawn: Draw, answer: Answer
) -> CheckResult:
    """Challenge a miner through its real handlers, and check what it answers."""
    reply = challenge(world, base, contribution, drawn, answer)
    return check(world, base, state, number, contribution.receipt, drawn, reply)


def challenge(world: World, base: Ref, contribution: Contribution, drawn: Draw, answer: Answer) -> Reply[TrainReply]:
    """What comes over the wire when a miner is asked to open what is drawn."""
    receipt = contribution.receipt
    request = Train(
        run_id=receipt.run_id,
        round=receipt.round,
        want="open",
        snapshots=drawn.snapshots(receipt.num_snapshots),
        coins=COINS,
    )
    answered = answer(request, honest_answer(world, base, contribution, request))
    if answered is None:
        return Reply(hotkey=receipt.hotkey, failure=Failure.TIMEOUT, detail="no whole reply in time")
    return Reply(hotkey=receipt.hotkey, reply=TrainReply.from_bytes(answered.to_bytes(), MAX_REPLY_BYTES))


def check(
    world: World, base: Ref, state: State, number: int, receipt: Receipt, drawn: Draw, reply: Reply[TrainReply]
) -> CheckResult:
    """The validator's check of one answer, as `Verifier.check` does it."""
    verifier = Verifier(
        parts=world.parts,
        base=base,
        state=state,
        round_number=number,
        coins=COINS,
        dendrite=cast("Dendrite", None),  # no sockets: the answer is at hand
        network=cast("NetworkThread", None),
        load_data=lambda rank: world.load_data(number, rank),
        address=lambda hotkey: PeerAddress(hotkey=hotkey, ip="127.0.0.1", port=1),
        in_time=lambda: True,
    )
    try:
        return verifier.check_one(receipt, drawn, reply)
    except PeerFault as fault:
        return CheckResult(fault=fault.fault, detail=fault.detail)


def honest_answer(world: World, base: Ref, contribution: Contribution, request: Train) -> TrainReply:
    """What the real handlers answer."""
    board = Board()
    board.begin_round(request.round, base.epoch, base.manifest_sha256)
    board.commit(contribution)
    handlers = Handlers(
        role="miner",
        run_id=world.parts.run_id,
        identity=VALIDATOR,
        board=board,
        layout=world.parts.layout,
        averaging=world.parts.recipe.averaging,
        why_not_leader=lambda *_: None,
    )
    caller = Caller(hotkey=VALIDATOR.hotkey, host="127.0.0.1", uid=0, stake=1.0, validator_permit=True)

    async def converse() -> TrainReply:
        digest = hashlib.sha256(request.coins).digest()
        await handlers.train(request.model_copy(update={"want": "receipt", "coins": digest, "snapshots": ()}), caller)
        return await handlers.train(request, caller)

    return asyncio.run(converse())
