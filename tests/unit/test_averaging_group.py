from __future__ import annotations

import copy
import dataclasses
from typing import Any

import msgpack
import pytest

from hivetrain.averaging.group import GroupPlan, Member, plan_from_dict, plan_to_dict
from hivetrain.averaging.layout import PayloadLayout, Section
from hivetrain.errors import Fault, PeerFault


def member(index: int, **changes: Any) -> Member:
    base: dict[str, Any] = {
        "hotkey": f"hotkey-{index}",
        "peer_id": f"peer-{index}",
        "maddrs": (f"/ip4/127.0.0.1/tcp/{4000 + index}",),
        "weight": 2.0,
        "reduces": True,
        "root": bytes([index % 256]) * 32,
    }
    return Member(**{**base, **changes})


def make_plan(**changes: Any) -> GroupPlan:
    base: dict[str, Any] = {
        "run_id": "ab" * 32,
        "round": 7,
        "attempt": 1,
        "members": (member(0), member(1), member(2, weight=0.0, root=None)),
        "layout": PayloadLayout([Section(name="delta", num_elements=9000, codec="fp32")]),
        "send_deadline_s": 10.0,
        "deadline_s": 20.0,
        "max_abs": 100.0,
    }
    return GroupPlan(**{**base, **changes})


def test_plan_survives_the_wire() -> None:
    plan = make_plan()
    again = plan_from_dict(msgpack.unpackb(msgpack.packb(plan_to_dict(plan))))
    assert again == plan
    assert again.group_id() == plan.group_id()


def test_group_id_covers_every_field() -> None:
    plan = make_plan()
    ids = {
        variant.group_id()
        for variant in (
            plan,
            make_plan(run_id="cd" * 32),
            make_plan(round=8),
            make_plan(attempt=2),
            make_plan(members=plan.members[::-1]),
            make_plan(layout=PayloadLayout([Section(name="delta", num_elements=9000, codec="fp16")])),
            make_plan(send_deadline_s=9.0),
            make_plan(deadline_s=21.0),
            make_plan(max_abs=99.0),
            make_plan(stall_s=3.0),
            make_plan(min_rate=1000.0),
            make_plan(audit_blocks=3),
            *(
                make_plan(members=(dataclasses.replace(plan.members[0], **{name: value}), *plan.members[1:]))
                for name, value in {
                    "hotkey": "x",
                    "peer_id": "x",
                    "maddrs": (),
                    "weight": 3.0,
                    "reduces": False,
                    "root": bytes([9]) * 32,
                    "share": 2.0,
                }.items()
            ),
        )
    }
    assert len(ids) == 12 + 7


def test_parts_are_the_reducers_in_order() -> None:
    plan = make_plan(members=(member(0), member(1, reduces=False), member(2, weight=0.0, root=None, share=2.0)))
    parts = plan.parts()  # 3 chunks
    assert [(p.index, p.reducer.hotkey, p.start, p.stop) for p in parts] == [
        (0, "hotkey-0", 0, 1),
        (1, "hotkey-2", 1, 3),
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"members": (member(0), member(1, hotkey="hotkey-0"))}, "every hotkey once, got hotkey-0 2 times"),
        ({"members": (member(0), member(1, peer_id="peer-0"))}, "every peer id once"),
        ({"members": (member(0, weight=0.0),)}, "weight > 0"),
        ({"members": (member(0, reduces=False),)}, "reduces"),
        ({"members": ()}, "weight > 0"),
        ({"send_deadline_s": 20.0}, "send_deadline_s"),
        ({"send_deadline_s": 0.0}, "send_deadline_s"),
        ({"deadline_s": float("inf")}, "deadline_s"),
        ({"deadline_s": float("nan")}, "deadline_s"),
        ({"max_abs": 0.0}, "max_abs"),
        ({"stall_s": 0.0}, "stall_s"),
        ({"stall_s": float("nan")}, "stall_s"),
        ({"min_rate": -1.0}, "min_rate"),
        ({"min_rate": float("inf")}, "min_rate"),
        ({"audit_blocks": -1}, "audit_blocks"),
        ({"audit_blocks": 65}, "audit_blocks"),
        ({"mean": "mode"}, "mean must be one of"),
        ({"max_abs": float("inf")}, "max_abs"),
        ({"members": (member(0, weight=1e36),)}, "weights must be <="),
        (
            {"members": tuple(member(i, hotkey=f"h{i}", peer_id=f"p{i}", root=bytes(32)) for i in range(257))},
            "at most 256",
        ),
    ],
)
def test_plan_that_cannot_work_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_plan(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight": -1.0}, "weight"),
        ({"weight": float("nan")}, "weight"),
        ({"weight": float("inf")}, "weight"),
        ({"root": None}, "root must be 32 bytes"),
        ({"root": b"short"}, "root must be 32 bytes"),
        ({"share": 0.0}, "share"),
    ],
)
def test_member_that_cannot_work_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        member(0, **changes)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("members", 0, "weight"), float("nan")),
        (("members", 0, "weight"), "1e6"),
        (("members", 0, "hotkey"), "x" * 65),
        (("members", 0, "hotkey"), "hotkey-1"),
        (("members", 0, "root"), b"short"),
        (("members", 0, "maddrs"), ["x"] * 17),
        (("members", 0, "maddrs"), ["x" * 300]),
        (("members", 0, "extra"), 1),
        (("members",), [{}]),
        (("members",), 5),
        (("sections", 0, "codec"), "zip"),
        (("sections", 0, "num_elements"), 1 << 50),
        (("sections",), []),
        (("round",), -1),
        (("round",), 1.5),
        (("deadline_s",), 1e9),
        (("deadline_s",), float("inf")),
        (("max_abs",), float("nan")),
        (("stall_s",), -1.0),
        (("min_rate",), float("nan")),
        (("audit_blocks",), 1000),
        (("audit_blocks",), 1.5),
        (("mean",), "mode"),
        (("surprise",), 1),
    ],
)
def test_hostile_plan_is_refused(path: tuple[str | int, ...], value: object) -> None:
    raw: Any = copy.deepcopy(plan_to_dict(make_plan()))
    target = raw
    for step in path[:-1]:
        target = target[step]
    target[path[-1]] = value
    with pytest.raises(PeerFault) as refused:
        plan_from_dict(raw)
    assert refused.value.fault is Fault.MALFORMED


@pytest.mark.parametrize("raw", [None, [], b"", {}, "plan", 3])
def test_anything_but_a_plan_is_refused(raw: object) -> None:
    with pytest.raises(PeerFault):
        plan_from_dict(raw)


def test_plan_without_the_newer_fields_has_their_defaults() -> None:
    raw = plan_to_dict(make_plan())
    for name in ("stall_s", "min_rate", "audit_blocks", "mean"):
        del raw[name]
    assert plan_from_dict(raw) == make_plan()


def test_reducers_take_turns_at_a_part() -> None:
    members = tuple(member(i, reduces=i != 1) for i in range(4))
    plan = make_plan(members=members)
    assert plan.num_ranks == 3
    assert [plan.reducer(1, rank).hotkey for rank in range(3)] == ["hotkey-2", "hotkey-3", "hotkey-0"]
    assert all(plan.reducer(part.index, 0) == part.reducer for part in plan.parts())


@pytest.mark.parametrize(
    ("size", "block", "batch"), [(2, 8, 256), (4, 8, 256), (8, 8, 128), (16, 8, 64), (64, 4, 8), (256, 1, 1)]
)
def test_batches_are_whole_blocks_and_shrink_with_the_group(size: int, block: int, batch: int) -> None:
    members = tuple(member(i, root=bytes(32)) for i in range(size))
    plan = make_plan(members=members, layout=PayloadLayout([Section(name="v", num_elements=4096 * 999, codec="fp32")]))
    assert (plan.block_chunks, plan.batch_chunks) == (block, batch)
    for part in plan.parts():
        batches = plan.batches(part)
        assert [start for start, _ in batches] == [part.start, *[stop for _, stop in batches[:-1]]]
        assert batches[-1][1] == part.stop
        blocks = [b for start, stop in batches for b in plan.blocks(start, stop)]
        assert blocks == plan.blocks(part.start, part.stop)
