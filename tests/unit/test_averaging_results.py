from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hivetrain.averaging.group import GroupPlan, Member
from hivetrain.averaging.layout import PayloadLayout, Section
from hivetrain.averaging.messages import MaskRun, Result
from hivetrain.averaging.results import (
    is_signed,
    mask_at,
    mask_runs,
    pack_mask,
    require_sound,
    sign_result,
    unpack_mask,
    weight_in,
)
from hivetrain.errors import Fault, PeerFault
from tests.keys import TestIdentity as Key
from tests.keys import verify

KEYS = [Key(i + 1) for i in range(3)]
PLAN = GroupPlan(
    run_id="r",
    round=1,
    attempt=0,
    members=tuple(
        Member(hotkey=key.hotkey, peer_id=f"p{i}", maddrs=(), weight=weight, reduces=True, root=bytes(32))
        for i, (key, weight) in enumerate(zip(KEYS, (2.0, 3.0, 0.0), strict=True))
    ),
    layout=PayloadLayout([Section(name="v", num_elements=1200 * 4096, codec="fp32")]),
    send_deadline_s=5.0,
    deadline_s=10.0,
    max_abs=10.0,
)
PART = PLAN.parts()[1]  # chunks 400 to 800: batches end at 528, 656, 784 and 800


def signed(runs: Sequence[tuple[int, bytes]], rank: int = 0, signer: int = 1) -> Result:
    masks = [MaskRun(stop=stop, included=mask) for stop, mask in runs]
    return sign_result(KEYS[signer], PLAN.group_id(), 1, rank, masks, bytes(32))


@given(st.lists(st.booleans(), max_size=40))
def test_mask_survives(included: list[bool]) -> None:
    assert unpack_mask(pack_mask(included), len(included)) == tuple(included)


def test_mask_by_hand() -> None:
    assert pack_mask([True, False, True, False, False, False, False, False, True]) == b"\x05\x01"


@pytest.mark.parametrize(("packed", "count"), [(b"", 1), (b"\x01\x00", 8), (b"\x02", 1), (b"\x01", 9)])
def test_mask_of_another_length_is_refused(packed: bytes, count: int) -> None:
    with pytest.raises(PeerFault):
        unpack_mask(packed, count)


def test_equal_masks_are_joined_into_runs() -> None:
    joined = mask_runs(PLAN.batches(PART), [b"\x03", b"\x03"])
    assert [(run.stop, run.included) for run in joined] == [(800, b"\x03")]
    runs = mask_runs(PLAN.batches(PART), [b"\x03", b"\x01"])
    assert [(run.stop, run.included) for run in runs] == [(656, b"\x03"), (800, b"\x01")]
    result = Result(part=1, rank=0, masks=runs, root=bytes(32), signature=b"")
    assert mask_at(result, 655, 3) == (True, True, False)
    assert mask_at(result, 656, 3) == (True, False, False)
    assert weight_in(result, PLAN, PART) == pytest.approx((256 * 5 + 144 * 2) / 400)


def test_only_the_reducer_of_the_rank_can_sign() -> None:
    good = signed([(800, b"\x03")])
    assert is_signed(good, PLAN, PLAN.group_id(), verify)
    assert is_signed(signed([(800, b"\x03")], rank=1, signer=2), PLAN, PLAN.group_id(), verify)
    assert not is_signed(signed([(800, b"\x03")], rank=1), PLAN, PLAN.group_id(), verify)
    assert not is_signed(signed([(800, b"\x03")], rank=3), PLAN, PLAN.group_id(), verify)
    other = dataclasses.replace(PLAN, attempt=1)
    assert not is_signed(good, other, other.group_id(), verify)
    for change in ({"part": 0}, {"part": 9}, {"root": bytes([1]) * 32}, {"masks": signed([(800, b"\x01")]).masks}):
        assert not is_signed(good.model_copy(update=change), PLAN, PLAN.group_id(), verify)


@pytest.mark.parametrize(
    "runs",
    [
        [(800, b"\x00")],  # nobody
        [(800, b"\x07")],  # a member that sends nothing
        [(800, b"\x03\x00")],
        [(800, b"\x08")],
        [(528, b"\x03")],  # not all of it
        [(528, b"\x03"), (928, b"\x03")],
        [(528, b"\x03"), (528, b"\x01"), (800, b"\x03")],
        [(656, b"\x03"), (528, b"\x01"), (800, b"\x03")],
        [(529, b"\x03"), (800, b"\x01")],  # between batches
    ],
)
def test_masks_that_no_mean_has_are_the_reducers_fault(runs: list[tuple[int, bytes]]) -> None:
    with pytest.raises(PeerFault) as refused:
        require_sound(signed(runs), PLAN, PART)
    assert refused.value.fault is Fault.WRONG_AVERAGE


def test_masks_of_a_mean_pass() -> None:
    require_sound(signed([(656, b"\x03"), (800, b"\x01")]), PLAN, PART)
