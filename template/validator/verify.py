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
import hashlib
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from hivetrain.contribution import codec_seed, encode_payload
from hivetrain.data.assignment import NoSlot
from hivetrain.data.reader import RoundData
from hivetrain.errors import Fault, PeerFault, ServiceError
from hivetrain.manifest import Ref
from hivetrain.run import Scoring
from hivetrain.scoring import CheckResult
from hivetrain.training.state import Snapshot, State
from hivetrain.verification.merkle import MerkleTree
from hivetrain.verification.receipt import (
    MAX_RECEIPT_BYTES,
    NO_REMAINDER,
    Receipt,
    check_opening,
    decode_snapshot,
    snapshot_size_bytes,
    snapshot_steps,
)
from hivetrain.verification.remainder import RemainderBytes, check_remainder, remainder_bytes_limit
from hivetrain.verification.replay import replay_window
from hivetrain.workbench import Parts
from template.dendrite import Dendrite, Failure, PeerAddress, Reply
from template.network import NetworkThread
from template.protocol import Opening, Train, TrainReply

logger = logging.getLogger(__name__)

OPEN_TIMEOUT_S = 60.0
OPEN_PATIENCE_S = 2.0
"""Who was asked less than this before VERIFY ended had no fair chance to answer."""
MAX_OPENING = 16
"""Miners that open at once: their answers, some snapshots each, are held in memory."""
POLL_S = 0.25


@dataclass(frozen=True, slots=True, kw_only=True)
class Draw:
    """Which windows of one miner's round are replayed. Window j ends at snapshot j. Empty: not drawn."""

    hotkey: str
    windows: tuple[int, ...]

    def snapshots(self, num_snapshots: int) -> tuple[int, ...]:
        """The snapshots that must be opened: both ends of each window, and the last for the link check."""
        wanted = {num_snapshots - 1}
        for window in self.windows:
            wanted.add(window)
            if window > 0:
                wanted.add(window - 1)
        return tuple(sorted(wanted))


def draw(*, block_hash: str, validator: str, miner: str, coins: bytes, num_snapshots: int, scoring: Scoring) -> Draw:
    """What the coins say for one miner; recomputable by anyone once they are revealed."""
    seed = hashlib.sha256(f"hivetrain-challenge/1\n{block_hash}\n{validator}\n{miner}\n".encode() + coins).digest()
    checked, whole = (int.from_bytes(seed[i : i + 8], "big") / 2**64 for i in (0, 8))
    window = int.from_bytes(seed[16:24], "big") * num_snapshots >> 64  # in integers: a float can round up to 1
    if checked >= scoring.check_share:
        return Draw(hotkey=miner, windows=())
    if whole < scoring.whole_round_share:
        return Draw(hotkey=miner, windows=tuple(range(num_snapshots)))
    return Draw(hotkey=miner, windows=(window,))


@dataclass(frozen=True, slots=True, kw_only=True)
class Verifier:
    """One round's checks. Owned by the model's thread.

    Args:
        base: the epoch that the round starts from, and its state.
        load_data: a miner's tokens by its rank.
        address: where a miner serves.
        in_time: False once there is no time for another check.
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

    def check(self, receipts: Mapping[str, Receipt], draws: Mapping[str, Draw]) -> dict[str, CheckResult | None]:
        """Check who was drawn; None where our own side failed or ran out of time."""
        drawn = [hotkey for hotkey, one in draws.items() if one.windows]
        results: dict[str, CheckResult | None] = dict.fromkeys(drawn)
        asked: dict[str, float] = {}
        silent: set[str] = set()
        pending = self._ask_all([(receipts[hotkey], draws[hotkey]) for hotkey in drawn], asked)
        try:
            while pending and self.in_time():
                done, _ = concurrent.futures.wait(
                    pending, timeout=POLL_S, return_when=concurrent.futures.FIRST_COMPLETED
                )
                for call in list(done)[:1]:  # one by one: a replay takes its time
                    hotkey = pending.pop(call)
                    reply = call.result()
                    if reply.reply is None:
                        silent.add(hotkey)
                    results[hotkey] = self._judge(receipts[hotkey], draws[hotkey], reply)
            for call, hotkey in pending.items():
                if not call.done() and time.monotonic() - asked.get(hotkey, time.monotonic()) >= OPEN_PATIENCE_S:
                    silent.add(hotkey)
                    results[hotkey] = CheckResult(fault=Fault.REFUSED, detail="did not open its snapshots in time")
        finally:
            for call in pending:
                call.cancel()
        if len(silent) > 1 and silent == set(drawn):
            # Not one of several answered: more likely it is our own line.
            results = dict.fromkeys(drawn)
        for hotkey, result in results.items():
            logger.info("check of %s: %s", hotkey[:8], result.in_words() if result else "not done here")
        return results

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
        return await self.dendrite.call(
            self.address(receipt.hotkey), synapse, timeout_s=OPEN_TIMEOUT_S, max_reply_bytes=limit
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
        """Take the opened snapshots, replay, compare.

        Raises:
            PeerFault: REFUSED, NOT_COMMITTED or WRONG_REPLAY.
            ServiceError: our data or our line failed.
        """
        opened, remainder = self._opened(receipt, drawn, reply), self._remainder(receipt, reply.reply)
        try:
            data = self.load_data(receipt.rank)
        except NoSlot as exc:
            raise PeerFault(Fault.WRONG_REPLAY, f"a receipt without an assignment: {exc}") from exc
        if receipt.data_digests != data.digests:
            raise PeerFault(Fault.WRONG_REPLAY, "the receipt's tokens are not those of its assignment")
        if receipt.num_steps > data.num_steps(receipt.num_steps):
            raise PeerFault(Fault.WRONG_REPLAY, f"{receipt.num_steps} steps, its assignment holds fewer")
        self._check_link(receipt, opened[receipt.num_snapshots - 1], remainder)
        worst = 0.0
        for window in drawn.windows:
            verdict = replay_window(
                self.parts.loop,
                self.state,
                data.batch,
                claimed=opened[window],
                opened=opened[window - 1] if window > 0 else None,
            )
            worst = max(worst, verdict.worst)
        detail = f"window {drawn.windows[0]}" if len(drawn.windows) == 1 else "the whole round"
        if worst >= self.parts.recipe.scoring.distance_zero:
            return CheckResult(
                distance=worst, fault=Fault.WRONG_REPLAY, detail=f"{detail}: replay distance {worst:.3g}"
            )
        return CheckResult(distance=worst, detail=detail)

    def _opened(self, receipt: Receipt, drawn: Draw, reply: Reply[TrainReply]) -> dict[int, Snapshot]:
        if reply.failure is Failure.OURS:
            raise ServiceError(reply.detail)
        if reply.reply is None:
            raise PeerFault(Fault.REFUSED, f"did not open its snapshots: {reply.detail}")
        wanted = drawn.snapshots(receipt.num_snapshots)
        by_index = {opening.index: opening for opening in reply.reply.openings}
        if set(by_index) != set(wanted):
            raise PeerFault(
                Fault.REFUSED, f"opened snapshots {sorted(by_index)} of {list(wanted)}: {reply.reply.status}"
            )
        return {index: self._decode(receipt, opening) for index, opening in by_index.items()}

    def _decode(self, receipt: Receipt, opening: Opening) -> Snapshot:
        check_opening(receipt, opening.index, opening.payload, opening.proof)
        # From here on it signed these bytes: what is wrong with them is a lie, not an accident of the wire.
        try:
            snapshot = decode_snapshot(opening.payload, self.parts.flat.size)
        except PeerFault as exc:
            raise PeerFault(Fault.WRONG_REPLAY, f"committed to something that is no snapshot: {exc.detail}") from exc
        want = snapshot_steps(receipt.num_steps, self.parts.recipe.inner.snapshot_every)[opening.index]
        if snapshot.step != want:
            raise PeerFault(
                Fault.WRONG_REPLAY, f"committed snapshot {opening.index} is of step {snapshot.step}, expected {want}"
            )
        return snapshot

    def _remainder(self, receipt: Receipt, reply: TrainReply | None) -> Tensor | None:
        """The remainder that it used, once it is shown to be the one that follows from the base."""
        opened = None
        if reply is not None and reply.remainder is not None:
            opened = RemainderBytes(**reply.remainder.model_dump())
        return check_remainder(receipt, self.base.manifest, opened, self.parts.flat.size)

    def _check_link(self, receipt: Receipt, final: Snapshot, remainder: Tensor | None) -> None:
        """What it averages, and what it carries on, is what it committed to: byte for byte."""
        seed = codec_seed(receipt.run_id, receipt.round, receipt.hotkey)
        try:
            encoded = encode_payload(self.parts, self.state, final, seed, remainder)
        except ValueError as exc:
            raise PeerFault(Fault.WRONG_REPLAY, f"committed to a final snapshot that cannot be encoded: {exc}") from exc
        root = MerkleTree(self.parts.layout.chunk_digests(encoded.payload)).root.hex()
        if root != receipt.payload_root:
            raise PeerFault(Fault.NOT_COMMITTED, "the committed chunks do not encode the committed final snapshot")
        if (encoded.rest_root, encoded.carried_root) != (receipt.rest_root, receipt.carried_root):
            raise PeerFault(Fault.NOT_COMMITTED, "the committed remainder is not what its payload leaves")
