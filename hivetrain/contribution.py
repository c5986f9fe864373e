"""A miner's whole contribution to one round: f(state, assignment, number of steps), ready to be committed.

Built once by the model's thread; what the network side needs of it later are plain bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

from hivetrain.data.reader import RoundData
from hivetrain.identity import Identity
from hivetrain.manifest import Ref
from hivetrain.training.inner import RoundWork
from hivetrain.training.outer import pseudo_gradient
from hivetrain.training.state import Snapshot, State
from hivetrain.verification.merkle import MerkleTree, leaf_digest
from hivetrain.verification.receipt import (
    Receipt,
    SnapshotTree,
    encode_snapshot,
    sign_receipt,
    step_record,
)
from hivetrain.workbench import DELTA, EXP_AVG, EXP_AVG_SQ, Parts


@dataclass(frozen=True, slots=True, kw_only=True)
class Contribution:
    """What a miner hands in for one round.

    Attributes:
        receipt: signed.
        payload: encoded chunks, as the all-reduce carries them.
        snapshots: what a challenge may open.
    """

    receipt: Receipt
    payload: bytes
    snapshots: SnapshotTree

    @property
    def payload_root(self) -> bytes:
        """Merkle root over the payload's chunks."""
        return bytes.fromhex(self.receipt.payload_root)


def codec_seed(run_id: str, round_number: int, hotkey: str) -> int:
    """The seed of a codec's rounding, so that its bytes can be recomputed by anyone."""
    digest = leaf_digest(f"hivetrain-codec/1\n{run_id}\n{round_number}\n{hotkey}".encode())
    return int.from_bytes(digest[:7], "big")


def encode_payload(parts: Parts, start: State, final: Snapshot, seed: int) -> bytes:
    """The bytes that the all-reduce carries: encode(start - final), then the moments."""
    vectors = {
        DELTA: pseudo_gradient(start.vector, final.vector),
        EXP_AVG: final.exp_avg,
        EXP_AVG_SQ: final.exp_avg_sq,
    }
    return bytes(parts.layout.encode(vectors, seed))


def build_contribution(
    *,
    parts: Parts,
    base: Ref,
    start: State,
    work: RoundWork,
    data: RoundData,
    round_number: int,
    rank: int,
    identity: Identity,
) -> Contribution:
    """Encode, hash and sign what ``work`` made of ``start``."""
    payload = encode_payload(parts, start, work.snapshots[-1], codec_seed(parts.run_id, round_number, identity.hotkey))
    snapshots = SnapshotTree([encode_snapshot(snapshot) for snapshot in work.snapshots])
    steps = [step_record(step, data.samples(step), loss) for step, loss in enumerate(work.losses)]
    receipt = Receipt(
        run_id=parts.run_id,
        round=round_number,
        epoch=base.epoch,
        base_manifest=base.manifest_sha256,
        base_state=base.manifest.state_hash,
        schema_hash=parts.schema_hash,
        layout_hash=parts.layout.layout_hash,
        hotkey=identity.hotkey,
        rank=rank,
        num_steps=work.num_steps,
        num_samples=work.num_samples,
        num_tokens=work.num_tokens,
        loss=sum(work.losses) / len(work.losses),
        data_digests=data.digests,
        steps_root=MerkleTree([leaf_digest(record) for record in steps]).root.hex(),
        snapshots_root=snapshots.root,
        num_snapshots=len(snapshots.snapshots),
        payload_root=MerkleTree(parts.layout.chunk_digests(payload)).root.hex(),
        num_chunks=parts.layout.num_chunks,
    )
    return Contribution(receipt=sign_receipt(receipt, identity), payload=payload, snapshots=snapshots)
