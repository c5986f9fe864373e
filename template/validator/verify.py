"""VERIFY: draw who is checked and where, have committed bytes opened, and recompute.

The draw derives from a block hash that nobody knew when receipts were signed, both hotkeys, and coins to which
this validator committed before. Two checks: the window check replays inner steps from an opened snapshot; the
link check recomputes the encoded chunks byte for byte from the opened final snapshot.

All who are drawn are asked at once and judged as their answers come, so that a miner which keeps us waiting
delays nobody's check but its own, and nothing waits past VERIFY.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from hivetrain.data.reader import RoundData
from hivetrain.errors import Fault, PeerFault, ServiceError
from hivetrain.manifest import Ref
from hivetrain.scoring import CheckResult
from hivetrain.training.state import State
from hivetrain.verification.challenge import Draw, draw
from hivetrain.verification.judge import Answer, Judge, double_commit
from hivetrain.verification.receipt import (
    MAX_RECEIPT_BYTES,
    NO_REMAINDER,
    Receipt,
    parse_receipt,
    snapshot_size_bytes,
)
from hivetrain.verification.remainder import RemainderBytes, remainder_bytes_limit
from hivetrain.verification.steps import record_size_bytes
from hivetrain.workbench import Parts
from template.chain.keys import verify
from template.dendrite import Dendrite, Failure, PeerAddress, Reply
from template.network import NetworkThread
from template.protocol import IsAlive, Train, TrainReply

logger = logging.getLogger(__name__)

OPEN_TIMEOUT_S = 60.0
OPEN_PATIENCE_S = 2.0
"""Who was asked less than this before VERIFY ended had no fair chance to answer."""
MAX_OPENING = 16
"""Miners that open at once: their answers, some snapshots each, are held in memory."""
POLL_S = 0.25
PROBE_TIMEOUT_S = 3.0
UNHEARD = frozenset({Failure.OURS, Failure.UNREACHABLE, Failure.TIMEOUT})
"""What a call comes to where nothing at all was heard, be it the peer's fault or our line's."""


class Judging(Protocol):
    """What turns an answer into a verdict: `Judge` here, or a process of its own (`hivetrain.verification.worker`)."""

    def judge(self, receipt: Receipt, drawn: Draw, answer: Answer) -> CheckResult:
        """The verdict. Raises `ServiceError` where our own side failed."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Verifier:
    """One round's checks. Owned by the model's thread.

    Args:
        base: the epoch that the round starts from, and its state.
        load_data: a miner's tokens by its rank.
        address: where a miner serves.
        in_time: False once there is no time for another check.
        answer_s: for opening what is asked; a later answer is a refusal, or coming too late to be judged would pay.
        judging: who replays; None: this thread, with ``parts``.
        on_wait: called while answers are awaited.
    """

    parts: Parts
    base: Ref
    state: State
    round_number: int
    coins: bytes
    dendrite: Dendrite
    network: NetworkThread
    load_data: Callable[[int], RoundData]
    address: Callable[[str], PeerAddress]
    in_time: Callable[[], bool]
    answer_s: float = OPEN_TIMEOUT_S
    judging: Judging | None = None
    on_wait: Callable[[], None] = lambda: None

    def check(self, receipts: Mapping[str, Receipt], draws: Mapping[str, Draw]) -> dict[str, CheckResult | None]:
        """Check who was drawn; None where our own side failed or ran out of time."""
        drawn = [hotkey for hotkey, one in draws.items() if one.windows]
        results: dict[str, CheckResult | None] = dict.fromkeys(drawn)
        asked: dict[str, float] = {}
        silent: set[str] = set()
        pending = self._ask_all([(receipts[hotkey], draws[hotkey]) for hotkey in drawn], asked)
        try:
            while pending and self.in_time():
                self.on_wait()
                done, _ = concurrent.futures.wait(
                    pending, timeout=POLL_S, return_when=concurrent.futures.FIRST_COMPLETED
                )
                for call in list(done)[:1]:  # one by one: a replay takes its time
                    hotkey = pending.pop(call)
                    reply = call.result()
                    if reply.failure in UNHEARD:
                        silent.add(hotkey)
                    results[hotkey] = self._judge(receipts[hotkey], draws[hotkey], reply)
            for call, hotkey in pending.items():
                if not call.done() and time.monotonic() - asked.get(hotkey, time.monotonic()) >= OPEN_PATIENCE_S:
                    silent.add(hotkey)
                    results[hotkey] = CheckResult(fault=Fault.REFUSED, detail="did not open its snapshots in time")
        finally:
            for call in pending:
                call.cancel()
        if silent and silent == set(drawn) and not self._is_heard(set(receipts) - silent):
            results = dict.fromkeys(drawn)  # nobody answers: more likely it is our own line
        for hotkey, result in results.items():
            logger.info("check of %s: %s", hotkey[:8], result.in_words() if result else "not done here")
        return results

    def _is_heard(self, others: Collection[str]) -> bool:
        """Whether any of the other miners answers us now."""
        if not others:
            return False
        peers = [self.address(hotkey) for hotkey in sorted(others)]
        calls = self.dendrite.call_many(peers, IsAlive(), timeout_s=PROBE_TIMEOUT_S, concurrency=len(peers))
        try:
            replies = self.network.run(calls, 2 * PROBE_TIMEOUT_S)
        except ServiceError:
            return False
        return any(reply.failure not in UNHEARD for reply in replies)

    def _ask_all(
        self, drawn: Sequence[tuple[Receipt, Draw]], asked: dict[str, float]
    ) -> dict[concurrent.futures.Future[Reply[TrainReply]], str]:
        """A call under way for each; when it really began goes into ``asked``."""
        if not self.in_time():
            return {}
        places = asyncio.Semaphore(MAX_OPENING)

        async def ask(receipt: Receipt, one: Draw) -> Reply[TrainReply]:
            async with places:
                asked[receipt.hotkey] = time.monotonic()
                return await self._call(receipt, one)

        try:
            return {self.network.submit(ask(receipt, one)): receipt.hotkey for receipt, one in drawn}
        except ServiceError as exc:
            logger.warning("cannot check anybody: %s", exc)
            return {}

    async def _call(self, receipt: Receipt, one: Draw) -> Reply[TrainReply]:
        wanted = one.snapshots(receipt.num_snapshots)
        synapse = Train(run_id=receipt.run_id, round=receipt.round, want="open", snapshots=wanted, coins=self.coins)
        limit = len(wanted) * (snapshot_size_bytes(self.parts.flat.size) + 4096) + 65536
        if receipt.remainder_root != NO_REMAINDER:
            limit += remainder_bytes_limit(self.parts.flat.size) + MAX_RECEIPT_BYTES
        data = self.parts.recipe.data
        limit += receipt.num_steps * record_size_bytes(data.accumulation * data.batch_size) + MAX_RECEIPT_BYTES
        return await self.dendrite.call(
            self.address(receipt.hotkey),
            synapse,
            timeout_s=min(OPEN_TIMEOUT_S, self.answer_s),
            max_reply_bytes=limit,
        )

    def _judge(self, receipt: Receipt, drawn: Draw, reply: Reply[TrainReply]) -> CheckResult | None:
        try:
            return self.check_one(receipt, drawn, reply)
        except PeerFault as exc:
            return CheckResult(fault=exc.fault, detail=exc.detail)
        except ServiceError as exc:
            logger.warning("cannot check %s: %s", receipt.hotkey[:8], exc)
            return None

    def check_one(self, receipt: Receipt, drawn: Draw, reply: Reply[TrainReply]) -> CheckResult:
        """Take what was opened, replay, compare.

        Raises:
            PeerFault: REFUSED or DOUBLE_COMMIT.
            ServiceError: our data or our line failed.
        """
        if reply.failure is Failure.OURS:
            raise ServiceError(reply.detail)
        if reply.reply is None:
            raise PeerFault(Fault.REFUSED, f"did not open its snapshots: {reply.detail}")
        second = second_receipt(receipt, reply.reply.receipt)
        if second is not None:
            return double_commit(receipt, second)
        judging = self.judging or Judge(parts=self.parts, base=self.base, state=self.state, load_data=self.load_data)
        return judging.judge(receipt, drawn, _answer(reply.reply))


def second_receipt(first: Receipt, raw: bytes | None) -> Receipt | None:
    """``raw`` as a receipt, if its hotkey signed it for the same round of the same run and it is another; else None."""
    if raw is None or raw == first.to_bytes():
        return None
    try:
        found = parse_receipt(raw, hotkey=first.hotkey, verify=verify)
    except PeerFault:
        return None
    same_round = (found.run_id, found.round) == (first.run_id, first.round)
    return found if same_round and found.signed_bytes() != first.signed_bytes() else None


def _answer(reply: TrainReply) -> Answer:
    remainder = RemainderBytes(**reply.remainder.model_dump()) if reply.remainder is not None else None
    openings = {opening.index: (opening.payload, opening.proof) for opening in reply.openings}
    return Answer(openings=openings, remainder=remainder, steps=reply.steps, status=reply.status)


__all__ = ["Draw", "Judging", "Verifier", "draw", "second_receipt"]
