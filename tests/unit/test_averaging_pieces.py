"""What is done piece by piece is what would be done with the whole batch at once."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from hivetrain.averaging.group import GroupPlan, Member
from hivetrain.averaging.layout import PayloadLayout, Section, require_sane
from hivetrain.averaging.means import Mean
from hivetrain.averaging.messages import Batch
from hivetrain.averaging.reducing import decode_committed, reduce_chunks
from hivetrain.averaging.robust import MEAN_NAMES
from hivetrain.averaging.store import MeanStore
from hivetrain.errors import Fault, PeerFault
from hivetrain.run import CHUNK_ELEMENTS
from hivetrain.verification.merkle import MerkleTree, leaf_digest

ELEMENTS = (70 * CHUNK_ELEMENTS + 17, 41 * CHUNK_ELEMENTS + 3)


def layout_of(codecs: Sequence[str]) -> PayloadLayout:
    names = ("delta", "exp_avg")
    return PayloadLayout(
        [Section(name=n, num_elements=e, codec=c) for n, e, c in zip(names, ELEMENTS, codecs, strict=True)]
    )


def vectors_of(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(n, generator=generator) for name, n in zip(("delta", "exp_avg"), ELEMENTS, strict=True)}


def plan_of(layout: PayloadLayout, payloads: Sequence[bytes], mean: str = "mean") -> GroupPlan:
    members = [
        Member(
            hotkey=f"key-{index}",
            peer_id=f"peer-{index}",
            maddrs=(),
            weight=1.0 + index,
            reduces=index == 0,
            root=MerkleTree(layout.chunk_digests(payload)).root,
        )
        for index, payload in enumerate(payloads)
    ]
    return GroupPlan(
        run_id="pieces",
        round=1,
        attempt=0,
        members=tuple(members),
        layout=layout,
        send_deadline_s=10.0,
        deadline_s=20.0,
        max_abs=100.0,
        mean=mean,
    )


def batch_of(layout: PayloadLayout, payload: bytes, start: int, stop: int) -> tuple[Batch, bytearray]:
    proof = MerkleTree(layout.chunk_digests(payload)).range_proof(start, stop)
    data = bytearray(payload[layout.byte_offset(start) : layout.byte_offset(stop)])
    return Batch(start=start, stop=stop, proof=proof), data


@pytest.mark.parametrize("num_members", [1, 4, 33, 256])
def test_pieces_are_whole_blocks_and_cover_a_batch(num_members: int) -> None:
    layout = layout_of(["fp32", "fp32"])
    payload = layout.encode(vectors_of(0), seed=0)
    plan = plan_of(layout, [payload])
    many = [dataclasses.replace(plan.members[0], hotkey=f"k{i}", peer_id=f"p{i}") for i in range(num_members)]
    plan = dataclasses.replace(plan, members=tuple(many))
    for start, stop in ((0, layout.num_chunks), (5, 5 + plan.block_chunks), (7, layout.num_chunks)):
        pieces = plan.pieces(start, stop)
        assert [piece[0] for piece in pieces] == [start, *(piece[1] for piece in pieces[:-1])]
        assert pieces[-1][1] == stop
        assert [block for piece in pieces for block in plan.blocks(*piece)] == plan.blocks(start, stop)


@pytest.mark.parametrize("codecs", [("fp32", "fp32"), ("int4", "fp16"), ("fp32", "log8")])
def test_a_batch_decodes_to_the_same_values_and_a_mean_to_the_same_tree(codecs: tuple[str, str]) -> None:
    layout = layout_of(codecs)
    vectors = {name: vector.abs() for name, vector in vectors_of(1).items()}
    payload = layout.encode(vectors, seed=3)
    plan = plan_of(layout, [payload])
    (part,) = plan.parts()
    mean = Mean(plan, MeanStore(layout), part, rank=0)
    for start, stop in mean.batches:
        header, data = batch_of(layout, payload, start, stop)
        values = decode_committed(plan, plan.members[0], header, data)
        assert len(values) == len(plan.pieces(start, stop))
        assert torch.equal(torch.cat(values), layout.decode_chunks(bytes(data), start, stop))
        base = layout.byte_offset(start)
        edges = [(layout.byte_offset(a) - base, layout.byte_offset(b) - base) for a, b in plan.pieces(start, stop)]
        mean.add(b"\x01", [bytes(data[low:high]) for low, high in edges])
    offsets = [(layout.byte_offset(start), layout.byte_offset(stop)) for start, stop in plan.blocks(0, part.stop)]
    assert mean.tree.root == MerkleTree([leaf_digest(payload[low:high]) for low, high in offsets]).root
    assert b"".join(bytes(mean.view(index)) for index in range(len(mean.batches))) == payload
    assert mean.unfit is None


@pytest.mark.parametrize("name", MEAN_NAMES)
@pytest.mark.parametrize("codecs", [("fp32", "fp32"), ("int8", "fp16")])
def test_pieces_have_the_mean_of_their_blocks(name: str, codecs: tuple[str, str]) -> None:
    layout = layout_of(codecs)
    payloads = [layout.encode(vectors_of(seed), seed=seed) for seed in range(4)]
    plan = plan_of(layout, payloads, name)
    weights = [member.weight for member in plan.members]

    def mean_of(start: int, stop: int) -> bytes:
        values = [
            layout.decode_chunks(one[layout.byte_offset(start) : layout.byte_offset(stop)], start, stop)
            for one in payloads
        ]
        return reduce_chunks(plan, start, stop, values, weights, seed=9)

    whole = mean_of(0, layout.num_chunks)
    assert whole == b"".join(mean_of(*piece) for piece in plan.pieces(0, layout.num_chunks))
    assert whole == b"".join(mean_of(*block) for block in plan.blocks(0, layout.num_chunks))


def test_what_is_insane_late_in_a_batch_is_refused_and_what_is_not_committed_first() -> None:
    layout = layout_of(["fp32", "fp32"])
    vectors = vectors_of(2)
    vectors["delta"][40 * CHUNK_ELEMENTS] = math.nan
    vectors["exp_avg"][CHUNK_ELEMENTS] = 101.0
    payload = layout.encode(vectors, seed=0)
    plan = plan_of(layout, [payload])
    header, data = batch_of(layout, payload, 0, layout.num_chunks)
    with pytest.raises(PeerFault) as refused:
        decode_committed(plan, plan.members[0], header, data)
    assert refused.value.fault is Fault.NOT_FINITE
    data[-1] ^= 1
    with pytest.raises(PeerFault) as refused:
        decode_committed(plan, plan.members[0], header, data)
    assert refused.value.fault is Fault.NOT_COMMITTED
    for wrong, fault in ((data[:-1], Fault.TRUNCATED), (data + b"\0", Fault.OVERSIZED)):
        with pytest.raises(PeerFault) as refused:
            decode_committed(plan, plan.members[0], header, wrong)
        assert refused.value.fault is fault


@pytest.mark.parametrize("num_values", [1, 7, 4096, 100_000])
def test_the_bound_holds_to_the_last_bit_beside_any_number_of_small_values(num_values: int) -> None:
    bound = 3.7
    at, past = np.float32(bound), np.nextafter(np.float32(bound), np.float32(9))
    for filler in (0.0, 1e-30, 1e-3):
        values = torch.full((num_values,), filler)
        for sign in (1, -1):
            values[num_values // 2] = sign * float(at)
            require_sane(values, float(at))
            values[num_values // 2] = sign * float(past)
            with pytest.raises(PeerFault) as refused:
                require_sane(values, float(at))
            assert refused.value.fault is Fault.OUT_OF_BOUND
    for wrong in (math.nan, math.inf, -math.inf):
        values[0] = wrong
        with pytest.raises(PeerFault) as refused:
            require_sane(values, float(at))
        assert refused.value.fault is Fault.NOT_FINITE


def test_values_whose_squares_overflow_or_vanish_are_judged_as_all_others() -> None:
    require_sane(torch.full((5000,), 1e30), 1e31)
    with pytest.raises(PeerFault):
        require_sane(torch.full((5000,), 1.5e-23), 1e-23)
