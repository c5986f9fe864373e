"""VERIFY: draw who is checked and where, have committed bytes opened, and recompute.

The draw derives from a block hash that nobody knew when receipts were signed, both hotkeys, and coins to which
this validator committed before. Two checks: the window check replays inner steps from an opened snapshot; the
link check recomputes the encoded chunks byte for byte from the opened final snapshot.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from hivetrain.contribution import codec_seed, encode_payload
from hivetrain.data.reader import RoundData
from hivetrain.errors import Fault, PeerFault, ServiceError
from hivetrain.run import Scoring
from hivetrain.scoring import CheckResult
from hivetrain.training.state import Snapshot, State
from hivetrain.verification.merkle import MerkleTree
from hivetrain.verification.receipt import Receipt, check_opening, decode_snapshot, snapshot_size_bytes, snapshot_steps
from hivetrain.verification.replay import replay_window
from hivetrain.workbench import Parts
from template.dendrite import Dendrite, Failure, PeerAddress
from template.network import NetworkThread
from template.protocol import Opening, Train

logger = logging.getLogger(__name__)

OPEN_TIMEOUT_S = 60.0


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
    checked, whole, window = (int.from_bytes(seed[i : i + 8], "big") / 2**64 for i in (0, 8, 16))
    if checked >= scoring.check_share:
        return Draw(hotkey=miner, windows=())
    if whole < scoring.whole_round_share:
        return Draw(hotkey=miner, windows=tuple(range(num_snapshots)))
    return Draw(hotkey=miner, windows=(math.floor(window * num_snapshots),))


@dataclass(frozen=True, slots=True, kw_only=True)
class Verifier:
    """One round's checks. Owned by the model's thread.

    Args:
        load_data: a miner's tokens by its rank.
        address: where a miner serves.
        in_time: False once there is no time for another check.
    """

    parts: Parts
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
        results: dict[str, CheckResult | None] = {}
        for hotkey, drawn in draws.items():
            if not drawn.windows:
                continue
            if not self.in_time():
                logger.info("no time left to check %s", hotkey[:8])
                results[hotkey] = None
                continue
            try:
                results[hotkey] = self.check_one(receipts[hotkey], drawn)
            except PeerFault as exc:
                results[hotkey] = CheckResult(fault=exc.fault, detail=exc.detail)
            except ServiceError as exc:
                logger.warning("cannot check %s: %s", hotkey[:8], exc)
                results[hotkey] = None
            logger.info("check of %s: %s", hotkey[:8], results[hotkey])
        return results

    def check_one(self, receipt: Receipt, drawn: Draw) -> CheckResult:
        """Open, replay, compare.

        Raises:
            PeerFault: REFUSED, NOT_COMMITTED, WRONG_REPLAY and what decoding may find.
            ServiceError: our data or our line failed.
        """
        opened = self._open(receipt, drawn)
        data = self.load_data(receipt.rank)
        if receipt.data_digests != data.digests:
            raise PeerFault(Fault.WRONG_REPLAY, "the receipt's tokens are not those of its assignment")
        if receipt.num_steps > data.num_steps(receipt.num_steps):
            raise PeerFault(Fault.WRONG_REPLAY, f"{receipt.num_steps} steps, its assignment holds fewer")
        self._check_link(receipt, opened[receipt.num_snapshots - 1])
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

    def _open(self, receipt: Receipt, drawn: Draw) -> dict[int, Snapshot]:
        wanted = drawn.snapshots(receipt.num_snapshots)
        synapse = Train(run_id=receipt.run_id, round=receipt.round, want="open", snapshots=wanted, coins=self.coins)
        num_params = self.parts.flat.size
        limit = len(wanted) * (snapshot_size_bytes(num_params) + 4096) + 65536
        call = self.dendrite.call(
            self.address(receipt.hotkey), synapse, timeout_s=OPEN_TIMEOUT_S, max_reply_bytes=limit
        )
        reply = self.network.run(call, OPEN_TIMEOUT_S + 5)
        if reply.failure is Failure.OURS:
            raise ServiceError(reply.detail)
        if reply.reply is None:
            raise PeerFault(Fault.REFUSED, f"did not open its snapshots: {reply.detail}")
        by_index = {opening.index: opening for opening in reply.reply.openings}
        if set(by_index) != set(wanted):
            raise PeerFault(
                Fault.REFUSED, f"opened snapshots {sorted(by_index)} of {list(wanted)}: {reply.reply.status}"
            )
        return {index: self._decode(receipt, opening) for index, opening in by_index.items()}

    def _decode(self, receipt: Receipt, opening: Opening) -> Snapshot:
        check_opening(receipt, opening.index, opening.payload, opening.proof)
        snapshot = decode_snapshot(opening.payload, self.parts.flat.size)
        want = snapshot_steps(receipt.num_steps, self.parts.recipe.inner.snapshot_every)[opening.index]
        if snapshot.step != want:
            raise PeerFault(Fault.MALFORMED, f"snapshot {opening.index} is of step {snapshot.step}, expected {want}")
        return snapshot

    def _check_link(self, receipt: Receipt, final: Snapshot) -> None:
        """What it averages is what it committed to: the encoded chunks, byte for byte."""
        seed = codec_seed(receipt.run_id, receipt.round, receipt.hotkey)
        payload = encode_payload(self.parts, self.state, final, seed)
        root = MerkleTree(self.parts.layout.chunk_digests(payload)).root.hex()
        if root != receipt.payload_root:
            raise PeerFault(Fault.NOT_COMMITTED, "the committed chunks do not encode the committed final snapshot")
