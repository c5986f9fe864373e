"""Honest messages from which targets start: three miners and a validator of a run, and a group of three that averages.

Everything is made from fixed keys and seeds, so that an input means the same in every process.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from bench.fuzzing.guard import require
from hivetrain.averaging.group import GroupPlan, Member
from hivetrain.averaging.layout import PayloadLayout, Section
from hivetrain.averaging.messages import MaskRun, Result
from hivetrain.averaging.reducing import reduce_chunks, rounding_seed
from hivetrain.averaging.results import pack_mask, sign_result
from hivetrain.scoring.explain import against_manifest, compare, follows, recompute, tell, two_receipts
from hivetrain.scoring.record import RoundRecord
from hivetrain.verification.merkle import MerkleTree, leaf_digest
from hivetrain.verification.receipt import Expected, Receipt
from tests.hub_fixture import make_manifest
from tests.keys import TestIdentity as Key
from tests.keys import verify
from tests.records_kit import MINERS, RUN_ID, SCORING, VALIDATOR, Ledger, base_ref, signed_receipt

torch.set_num_threads(1)

ROUND = 1
CHEAT = MINERS[0]
"""Signs whatever the fuzzer likes; the others sign honest messages only."""

EXPECTED = Expected(
    run_id=RUN_ID,
    round=ROUND,
    epoch=0,
    base_manifest=base_ref().manifest_sha256,
    base_state="03" * 32,
    schema_hash="04" * 32,
    layout_hash="05" * 32,
    num_chunks=660,
    rank=0,
    max_steps=50,
    snapshot_every=10,
    samples_per_step=4,
    tokens_per_step=256,
)


@lru_cache(maxsize=1)
def honest_records() -> tuple[RoundRecord, RoundRecord]:
    """Rounds 0 and 1 of one validator."""
    ledger = Ledger(VALIDATOR)
    return ledger.round(0), ledger.round(ROUND)


def honest_record() -> RoundRecord:
    """Round `ROUND`."""
    return honest_records()[1]


def honest_receipt(who: Key = CHEAT) -> Receipt:
    """As every miner hands it in."""
    return signed_receipt(who, ROUND, base_ref())


def examine(record: RoundRecord) -> None:
    """Everything that a reader does with published checks.

    Raises:
        Violation: they convict a miner that signed one receipt a round of having signed two.
    """
    honest, first = honest_record(), honest_records()[0]
    found = recompute(record, SCORING, verify)
    require(set(found.scores) == set(record.miners), "a miner without a score")
    for hotkey in record.miners:
        require(all(isinstance(line, str) for line in tell(record, hotkey, found)), "a line that is no text")
        compare(honest, record, hotkey)
    follows(record, first)
    receipts = {one.hotkey: honest_receipt(one).sha256() for one in MINERS}
    against_manifest(record, make_manifest(1, {}, nonce="0" * 16).model_copy(update={"receipts": receipts}), verify)
    for records in ([honest, record], [record, honest], [first, record]):
        require(not two_receipts(records, verify), "convicts a miner of a second receipt that it never signed")


def layout(num_elements: int = 2 * 4096 + 100) -> PayloadLayout:
    """Three chunks, one for each reducer."""
    return PayloadLayout([Section(name="delta", num_elements=num_elements, codec="int8")])


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Three members that each send and reduce, and what the honest ones signed.

    Attributes:
        payloads, trees: by member.
        means: encoded, by part; ``results`` are signed by each part's own reducer.
    """

    plan: GroupPlan
    payloads: tuple[bytes, ...]
    trees: tuple[MerkleTree, ...]
    means: tuple[bytes, ...]
    results: tuple[Result, ...]


@lru_cache(maxsize=1)
def honest_group() -> Group:
    """The group; `CHEAT` is member 0."""
    shape, values = layout(), []
    for place in range(len(MINERS)):
        generator = torch.Generator().manual_seed(place)
        values.append(torch.randn(shape.sections[0].num_elements, generator=generator))
    payloads = tuple(shape.encode({"delta": vector}, seed=place) for place, vector in enumerate(values))
    trees = tuple(MerkleTree(shape.chunk_digests(payload)) for payload in payloads)
    plan = group_plan(shape, [tree.root for tree in trees])
    means = tuple(mean_of(plan, payloads, part) for part in range(3))
    results = tuple(signed_mean(plan, part, means[part], MINERS[part]) for part in range(3))
    return Group(plan=plan, payloads=payloads, trees=trees, means=means, results=results)


def group_plan(shape: PayloadLayout, roots: list[bytes]) -> GroupPlan:
    """Everyone sends and reduces."""
    members = tuple(
        Member(
            hotkey=who.hotkey,
            peer_id=f"peer-{place}",
            maddrs=(f"/memory/{place}",),
            weight=200.0 + place,
            reduces=True,
            root=roots[place],
        )
        for place, who in enumerate(MINERS)
    )
    return GroupPlan(
        run_id=RUN_ID,
        round=ROUND,
        attempt=0,
        members=members,
        layout=shape,
        send_deadline_s=30.0,
        deadline_s=60.0,
        max_abs=1e3,
    )


def chunk_bytes(plan: GroupPlan, payload: bytes, chunk: int) -> bytes:
    """One chunk of a payload."""
    return payload[plan.layout.byte_offset(chunk) : plan.layout.byte_offset(chunk + 1)]


def mean_of(plan: GroupPlan, payloads: tuple[bytes, ...], part: int) -> bytes:
    """The encoded mean of a part, which is one chunk here."""
    vectors: list[Tensor] = [
        plan.layout.decode_chunks(chunk_bytes(plan, payload, part), part, part + 1) for payload in payloads
    ]
    weights = [member.weight for member in plan.members]
    return reduce_chunks(plan, part, part + 1, vectors, weights, rounding_seed(plan.group_id()))


def signed_mean(plan: GroupPlan, part: int, mean: bytes, who: Key, rank: int = 0) -> Result:
    """Everyone is in it."""
    root = MerkleTree([leaf_digest(mean)]).root  # a part has one chunk here, and one block
    masks = [MaskRun(stop=part + 1, included=pack_mask([True] * len(plan.members)))]
    return sign_result(who, plan.group_id(), part, rank, masks, root)


__all__ = [
    "CHEAT",
    "EXPECTED",
    "MINERS",
    "ROUND",
    "SCORING",
    "VALIDATOR",
    "Group",
    "chunk_bytes",
    "examine",
    "honest_group",
    "honest_receipt",
    "honest_record",
    "honest_records",
    "layout",
    "signed_mean",
]
