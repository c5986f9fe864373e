"""What a miner's answer to a challenge proves: openings in, a verdict out. No network, no clock.

In order: every byte opens the receipt; the samples and the loss are those of the step records; the tokens are those of
the assignment; the payload and the sketch are those of the opened final snapshot (link check); each drawn window
replays (window check). On a miss the step records say at which step the miner left the path.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from hivetrain.contribution import codec_seed, displacement_sketch, encode_payload
from hivetrain.data.assignment import NoSlot
from hivetrain.data.reader import RoundData
from hivetrain.errors import Fault, PeerFault
from hivetrain.manifest import Ref
from hivetrain.scoring.score import CheckResult
from hivetrain.training.state import Snapshot, State
from hivetrain.verification.challenge import Draw
from hivetrain.verification.merkle import MerkleTree
from hivetrain.verification.receipt import Receipt, check_opening, decode_snapshot, snapshot_steps
from hivetrain.verification.remainder import RemainderBytes, check_remainder
from hivetrain.verification.replay import WindowVerdict, replay_window
from hivetrain.verification.steps import (
    StepRecord,
    WrongStep,
    check_samples,
    first_wrong_step,
    loss_bound,
    open_steps,
    opens,
)
from hivetrain.workbench import Parts

MAX_DISTANCE = 1e9
"""What a published distance says where it is larger, or infinite."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a miner showed, as plain bytes: it may be judged in another process.

    Attributes:
        openings: snapshot and Merkle proof, by index.
        remainder: as it was opened; None where none was.
        steps: the step records in a row.
        status: what the miner said of it, in a word.
    """

    openings: Mapping[int, tuple[bytes, Sequence[bytes]]] = field(default_factory=dict)
    remainder: RemainderBytes | None = None
    steps: bytes = b""
    status: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Judge:
    """Judges the answers of one round. Owned by the thread that owns the model.

    Args:
        base: the epoch that the round starts from, and its state.
        load_data: a miner's tokens by its rank.
    """

    parts: Parts
    base: Ref
    state: State
    load_data: Callable[[int], RoundData]

    def judge(self, receipt: Receipt, drawn: Draw, answer: Answer) -> CheckResult:
        """The verdict on one answer.

        Raises:
            ServiceError: our data failed.
        """
        try:
            return self._judge(receipt, drawn, answer)
        except PeerFault as exc:
            step = exc.step if isinstance(exc, WrongStep) else None
            shown = exc.fault is not Fault.REFUSED and opens(receipt, answer.steps, self._samples_per_step)
            evidence = {"steps": answer.steps} if shown else {}
            return CheckResult(fault=exc.fault, detail=exc.detail, first_wrong_step=step, evidence=evidence)

    def _judge(self, receipt: Receipt, drawn: Draw, answer: Answer) -> CheckResult:
        opened = self._snapshots(receipt, drawn, answer)
        remainder = check_remainder(receipt, self.base.manifest, answer.remainder, self.parts.flat.size)
        records = open_steps(receipt, answer.steps, self._samples_per_step)
        data = self._data(receipt)
        check_samples(records, data.samples)
        self._check_link(receipt, opened[receipt.num_snapshots - 1], remainder)
        result = self._replay(drawn, data, opened, records)
        return dataclasses.replace(result, evidence={"steps": answer.steps})

    @property
    def _samples_per_step(self) -> int:
        return self.parts.recipe.data.accumulation * self.parts.recipe.data.batch_size

    def _snapshots(self, receipt: Receipt, drawn: Draw, answer: Answer) -> dict[int, Snapshot]:
        wanted = drawn.snapshots(receipt.num_snapshots)
        if set(answer.openings) != set(wanted):
            raise PeerFault(
                Fault.REFUSED, f"opened snapshots {sorted(answer.openings)} of {list(wanted)}: {answer.status}"
            )
        return {index: self._decode(receipt, index, *opening) for index, opening in answer.openings.items()}

    def _decode(self, receipt: Receipt, index: int, payload: bytes, proof: Sequence[bytes]) -> Snapshot:
        check_opening(receipt, index, payload, proof)
        # From here on it signed these bytes: what is wrong with them is a lie, not an accident of the wire.
        try:
            snapshot = decode_snapshot(payload, self.parts.flat.size)
        except PeerFault as exc:
            raise PeerFault(Fault.WRONG_REPLAY, f"committed to something that is no snapshot: {exc.detail}") from exc
        want = snapshot_steps(receipt.num_steps, self.parts.recipe.inner.snapshot_every)[index]
        if snapshot.step != want:
            raise PeerFault(
                Fault.WRONG_REPLAY, f"committed snapshot {index} is of step {snapshot.step}, expected {want}"
            )
        return snapshot

    def _data(self, receipt: Receipt) -> RoundData:
        try:
            data = self.load_data(receipt.rank)
        except NoSlot as exc:
            raise PeerFault(Fault.WRONG_REPLAY, f"a receipt without an assignment: {exc}") from exc
        if receipt.data_digests != data.digests:
            raise PeerFault(Fault.WRONG_REPLAY, "the receipt's tokens are not those of its assignment")
        if receipt.num_steps > data.num_steps(receipt.num_steps):
            raise PeerFault(Fault.WRONG_REPLAY, f"{receipt.num_steps} steps, its assignment holds fewer")
        return data

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
        if displacement_sketch(receipt.run_id, receipt.round, self.state, final) != receipt.sketch:
            raise PeerFault(Fault.NOT_COMMITTED, "the receipt's sketch is not of the committed final snapshot")

    def _replay(
        self, drawn: Draw, data: RoundData, opened: Mapping[int, Snapshot], records: Sequence[StepRecord]
    ) -> CheckResult:
        """Replay window after window, up to the first that misses."""
        distances: list[float] = []
        for window in drawn.windows:
            start = opened[window - 1] if window > 0 else None
            verdict = replay_window(self.parts.loop, self.state, data.batch, claimed=opened[window], opened=start)
            distances.append(min(verdict.worst, MAX_DISTANCE))
            if verdict.worst >= self.parts.recipe.scoring.distance_zero:
                first = start.step if start is not None else 0
                step, where = self._where(verdict, first, opened[window].step, records)
                return CheckResult(
                    distance=distances[-1],
                    fault=Fault.WRONG_REPLAY,
                    detail=f"window {window}: replay distance {verdict.worst:.3g}; {where}",
                    windows=drawn.windows[: len(distances)],
                    distances=tuple(distances),
                    first_wrong_step=step,
                )
        detail = f"window {drawn.windows[0]}" if len(drawn.windows) == 1 else "the whole round"
        return CheckResult(
            distance=max(distances, default=0.0), detail=detail, windows=drawn.windows, distances=tuple(distances)
        )

    def _where(
        self, verdict: WindowVerdict, first: int, stop: int, records: Sequence[StepRecord]
    ) -> tuple[int | None, str]:
        found = first_wrong_step(records, first, verdict.losses, loss_bound(self.parts.recipe.inner))
        return found if found is not None else (None, f"wrong between step {first} and {stop}")


def double_commit(first: Receipt, second: Receipt) -> CheckResult:
    """The verdict on two receipts that one hotkey signed for one round."""
    detail = f"signed two receipts for round {first.round}: {first.sha256()[:12]} and {second.sha256()[:12]}"
    evidence = {"first_receipt": first.to_bytes(), "second_receipt": second.to_bytes()}
    return CheckResult(fault=Fault.DOUBLE_COMMIT, detail=detail, evidence=evidence)


__all__ = ["MAX_DISTANCE", "Answer", "Judge", "double_commit"]
