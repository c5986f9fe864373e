"""A miner's whole contribution to one round: f(state, assignment, number of steps), ready to be committed.

Built once by the model's thread; what the network side needs of it later are plain bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from hivetrain.averaging.feedback import Remainder, codec_seed, rest_of
from hivetrain.averaging.layout import PayloadLayout
from hivetrain.data.reader import RoundData
from hivetrain.identity import Identity
from hivetrain.manifest import Ref
from hivetrain.run import Recipe
from hivetrain.training.inner import RoundWork
from hivetrain.training.outer import pseudo_gradient
from hivetrain.training.state import Snapshot, State
from hivetrain.verification.merkle import MerkleTree, leaf_digest
from hivetrain.verification.receipt import (
    NO_REMAINDER,
    Expected,
    Receipt,
    SnapshotTree,
    encode_snapshot,
    sign_receipt,
    step_record,
)
from hivetrain.verification.remainder import RemainderBytes, chunk_leaves, root_of, to_bytes
from hivetrain.verification.sketch import count_sketch, sketch_seed, to_hex
from hivetrain.workbench import DELTA, EXP_AVG, EXP_AVG_SQ, Parts


@dataclass(frozen=True, slots=True, kw_only=True)
class Contribution:
    """What a miner hands in for one round.

    Attributes:
        receipt: signed.
        payload: encoded chunks, as the all-reduce carries them.
        tree: over them.
        snapshots: what a challenge may open.
        remainder: what it opens beside the last of them; None where none was used.
        carried: what error feedback keeps for the next round, [P]; None without it.
        steps: the step records in a row, as a challenge opens them.
    """

    receipt: Receipt
    payload: bytes
    tree: MerkleTree
    snapshots: SnapshotTree
    remainder: RemainderBytes | None = None
    carried: Tensor | None = None
    steps: bytes = b""

    @property
    def payload_root(self) -> bytes:
        """Merkle root over the payload's chunks."""
        return bytes.fromhex(self.receipt.payload_root)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Encoded:
    """A payload, and what error feedback makes of it.

    Attributes:
        payload: the bytes that the all-reduce carries.
        carried: start - final + remainder, [P]; None without error feedback.
        rest_root, carried_root: as in the receipt.
    """

    payload: bytes
    carried: Tensor | None = None
    rest_root: str = NO_REMAINDER
    carried_root: str = NO_REMAINDER


def encode_payload(parts: Parts, start: State, final: Snapshot, seed: int, remainder: Tensor | None = None) -> Encoded:
    """encode(start - final + remainder), then the moments.

    Raises:
        ValueError: a value that a codec refuses, such as NaN.
    """
    carried = pseudo_gradient(start.vector, final.vector)
    if remainder is not None:
        carried = carried + remainder
    vectors = {DELTA: carried, EXP_AVG: final.exp_avg, EXP_AVG_SQ: final.exp_avg_sq}
    payload = parts.layout.encode({section.name: vectors[section.name] for section in parts.layout.sections}, seed)
    if not parts.recipe.averaging.feeds_back:
        return Encoded(payload=payload)
    return Encoded(
        payload=payload,
        carried=carried,
        rest_root=root_of(chunk_leaves(to_bytes(rest_of(parts.layout, carried, payload)))),
        carried_root=root_of(chunk_leaves(to_bytes(carried))),
    )


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
    remainder: Remainder | None = None,
) -> Contribution:
    """Encode, hash and sign what ``work`` made of ``start``, and ``remainder``, which is ``base``'s.

    Raises:
        ValueError: a value that a codec refuses, such as NaN.
    """
    seed = codec_seed(parts.run_id, round_number, identity.hotkey)
    encoded = encode_payload(parts, start, work.snapshots[-1], seed, remainder.values if remainder else None)
    tree = MerkleTree(parts.layout.chunk_digests(encoded.payload))
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
        payload_root=tree.root.hex(),
        num_chunks=parts.layout.num_chunks,
        remainder_root=remainder.root if remainder else NO_REMAINDER,
        rest_root=encoded.rest_root,
        carried_root=encoded.carried_root,
        sketch=displacement_sketch(parts.run_id, round_number, start, work.snapshots[-1]),
    )
    return Contribution(
        receipt=sign_receipt(receipt, identity),
        payload=encoded.payload,
        tree=tree,
        snapshots=snapshots,
        remainder=remainder.opening if remainder else None,
        carried=encoded.carried,
        steps=b"".join(steps),
    )


def displacement_sketch(run_id: str, round_number: int, start: State, final: Snapshot) -> str:
    """The sketch that a receipt shows, in hex."""
    moved = pseudo_gradient(start.vector, final.vector)
    return to_hex(count_sketch(moved, sketch_seed(run_id, round_number)))


class Terms(Protocol):
    """What a run's receipts are held against: `Parts` has it, and so has whoever read the run without a model."""

    @property
    def run_id(self) -> str: ...
    @property
    def schema_hash(self) -> str: ...
    @property
    def recipe(self) -> Recipe: ...
    @property
    def layout(self) -> PayloadLayout: ...


def expected_receipt(terms: Terms, base: Ref, round_number: int, hotkey: str, rank: int) -> Expected:
    """What the receipt of an honest ``hotkey`` says of a round that starts from ``base``."""
    return expected_from(
        terms,
        round_number,
        rank,
        epoch=base.epoch,
        base_manifest=base.manifest_sha256,
        base_state=base.manifest.state_hash,
        # A merge leaves no remainder: the vector it belonged to is gone.
        was_in=hotkey in base.manifest.receipts and base.manifest.base_epoch != base.manifest.epoch,
    )


def expected_from(
    terms: Terms, round_number: int, rank: int, *, epoch: int, base_manifest: str, base_state: str, was_in: bool
) -> Expected:
    """As `expected_receipt`, of a base of which only this is known."""
    data, inner = terms.recipe.data, terms.recipe.inner
    samples = data.batch_size * data.accumulation
    return Expected(
        run_id=terms.run_id,
        round=round_number,
        epoch=epoch,
        base_manifest=base_manifest,
        base_state=base_state,
        schema_hash=terms.schema_hash,
        layout_hash=terms.layout.layout_hash,
        num_chunks=terms.layout.num_chunks,
        rank=rank,
        max_steps=inner.max_steps,
        snapshot_every=inner.snapshot_every,
        samples_per_step=samples,
        tokens_per_step=samples * data.seq_len,
        feeds_back=terms.recipe.averaging.feeds_back,
        was_in=was_in,
    )


__all__ = [
    "Contribution",
    "Encoded",
    "Terms",
    "build_contribution",
    "codec_seed",
    "displacement_sketch",
    "encode_payload",
    "expected_from",
    "expected_receipt",
]
