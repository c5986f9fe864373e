"""Evidence against a reducer: whatever a liar puts together, it convicts nobody but itself."""

from __future__ import annotations

from typing import Any

import msgpack

from bench.fuzzing.choices import Choices, altered
from bench.fuzzing.guard import require
from bench.fuzzing.samples import CHEAT, MINERS, chunk_bytes, honest_group
from hivetrain.averaging.group import GroupPlan, plan_from_dict, plan_to_dict
from hivetrain.averaging.messages import MaskRun, Result
from hivetrain.averaging.proofs import proves_two_averages, proves_wrong_average
from hivetrain.averaging.results import sign_result
from hivetrain.errors import Fault, PeerFault
from hivetrain.scoring.explain import proves
from hivetrain.verification.merkle import MerkleTree, leaf_digest
from tests.keys import verify

GUILTY = (None, CHEAT.hotkey)


def evidence(data: bytes) -> None:
    """Evidence as raw bytes."""
    _judge(data, honest_group().plan)


def accusation(data: bytes) -> None:
    """Evidence put together from honest members' own bytes and from what `CHEAT` signs."""
    choices = Choices(data)
    group = honest_group()
    plan, made_up = group.plan, plan_to_dict(group.plan)
    if choices.flag():  # a plan of the cheat's own making, under which it signs as it likes
        made_up = altered(made_up, choices, [plan_to_dict(group.plan)["sections"]])
        try:
            plan = plan_from_dict(made_up)
        except PeerFault:
            return
    try:
        if choices.flag():
            pair = [_result(choices, plan).model_dump(), _result(choices, plan).model_dump()]
            raw = msgpack.packb([msgpack.packb(altered(one, choices)) for one in pair])
        else:
            raw = msgpack.packb(altered(_wrong_block(choices, plan), choices))
        packed = msgpack.packb(made_up)
    except (OverflowError, ValueError):  # a number or a text that no message can carry
        return
    _judge(raw, plan, packed)


def _judge(raw: bytes, plan: GroupPlan, packed: bytes | None = None) -> None:
    """The evidence on its own, for the all-reduce, and beside its plan, as a validator publishes it."""
    about = (0, 0)
    for found in (
        proves_two_averages(raw, plan, verify),
        proves_wrong_average(raw, plan, verify),
        proves_two_averages(raw, plan, verify, about),
        proves_wrong_average(raw, plan, verify, about),
    ):
        require(found in GUILTY, f"{found} is convicted, and did nothing wrong")
    files = {"wrong_average": raw, "group_plan": packed or msgpack.packb(plan_to_dict(plan))}
    for one in MINERS[1:]:
        require(not proves(Fault.WRONG_AVERAGE, one.hotkey, files, verify), f"{one.hotkey} is convicted")
    proves(Fault.WRONG_AVERAGE, CHEAT.hotkey, files, verify)


def _result(choices: Choices, plan: GroupPlan) -> Result:
    """One that an honest reducer signed, or whatever the cheat signs."""
    group = honest_group()
    if choices.flag():
        return group.results[choices.below(3)]
    part, rank = choices.below(3), choices.below(3)
    zeros = MerkleTree([leaf_digest(bytes(len(group.means[part])))]).root
    root = choices.pick((group.results[part].root, zeros, choices.take(32).ljust(32, b"\0")))
    stops = sorted({choices.below(8) for _ in range(1 + choices.below(3))}) if choices.flag() else [part + 1]
    if choices.flag():
        stops = [plan.layout.num_chunks]
    masks = [MaskRun(stop=stop, included=choices.pick((b"\x07", b"\x03", b"", b"\x0f", b"\x00"))) for stop in stops]
    return sign_result(CHEAT, plan.group_id(), part, rank, masks, root)


def _wrong_block(choices: Choices, plan: GroupPlan) -> dict[str, Any]:
    """A block of a part with everybody's openings, as `pack_wrong_average` lays it out."""
    group = honest_group()
    part = choices.below(3)
    result = group.results[part] if choices.flag() else _result(choices, plan)
    mean = choices.pick((group.means[part], bytes(len(group.means[part]))))
    return {
        "result": result.model_dump(),
        "start": part,
        "stop": part + 1,
        "data": mean,
        "proof": [],
        "openings": [
            {
                "member": member,
                "data": chunk_bytes(group.plan, group.payloads[member], part),
                "proof": group.trees[member].range_proof(part, part + 1),
            }
            for member in range(len(MINERS))
        ],
    }


__all__ = ["accusation", "evidence"]
