"""Evidence against a reducer: who can be convicted by it, and of what it proves nothing."""

from __future__ import annotations

import dataclasses
from typing import Any

import msgpack
import pytest
import torch
from averaging_attacks import ATTACKS, Scene, with_first_words
from averaging_world import RUNNING, World, assert_mean, blamed, verify

from hivetrain.averaging import auditing, peers, reduction
from hivetrain.averaging.butterfly import AllReduceOutcome, proves_two_averages, proves_wrong_average
from hivetrain.averaging.group import GroupPlan
from hivetrain.averaging.messages import Result
from hivetrain.averaging.proofs import MAX_EVIDENCE_BYTES, pack_wrong_average
from hivetrain.averaging.reducing import decode_sane, reduce_chunks, rounding_seed
from hivetrain.averaging.results import sign_result
from hivetrain.errors import Fault, PeerFault
from hivetrain.scoring.explain import proves
from hivetrain.verification.merkle import MerkleTree, leaf_digest
from template.validator.records import proven_averages

BAD = 2


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GroupPlan, "block_chunks", 1)
    monkeypatch.setattr(GroupPlan, "batch_chunks", 2)


def attacked(name: str, monkeypatch: pytest.MonkeyPatch) -> tuple[World, dict[int, AllReduceOutcome]]:
    world = World(num_senders=3, num_validators=1, audit_blocks=64)
    scene = Scene(world, BAD, monkeypatch)
    ATTACKS[name][0](scene)
    outcomes = world.run()
    return world, {i: outcomes[i] for i in scene.honest}


def evidence_of(outcome: AllReduceOutcome) -> bytes:
    return next(record.evidence for record in outcome.faults if record.evidence)


def honest_block(world: World, senders: tuple[int, ...] = (0, 1, 2)) -> dict[str, Any]:
    """What evidence would hold for the first block of member 2's part, had it averaged rightly."""
    layout, plan = world.layout, world.plan
    part = plan.parts()[BAD]

    def cut(payload: bytes, start: int, stop: int) -> bytes:
        return payload[layout.byte_offset(start) : layout.byte_offset(stop)]

    sent = [layout.encode(world.vectors[i], seed=0) for i in senders]
    vectors = [layout.decode_chunks(cut(one, part.start, part.stop), part.start, part.stop) for one in sent]
    weights = [plan.members[i].weight for i in senders]
    mean = reduce_chunks(plan, part.start, part.stop, vectors, weights, rounding_seed(plan.group_id()))
    offset = layout.byte_offset(part.start)
    edges = [[layout.byte_offset(chunk) - offset for chunk in block] for block in plan.blocks(part.start, part.stop)]
    tree = MerkleTree([leaf_digest(mean[low:high]) for low, high in edges])
    mask = bytes([sum(1 << i for i in senders)])
    runs = [{"stop": part.stop, "included": mask}]
    key, group = world.keys[BAD], plan.group_id()
    result = sign_result(
        key,
        group,
        part.index,
        0,
        Result.model_validate({"part": 0, "rank": 0, "masks": runs, "root": bytes(32), "signature": b""}).masks,
        tree.root,
    )
    start, stop = plan.blocks(part.start, part.stop)[0]

    data = mean[: layout.range_bytes(start, stop)]
    openings = {}
    for i in senders:
        payload = world.payloads[i]
        assert payload is not None
        openings[i] = (cut(payload, start, stop), MerkleTree(layout.chunk_digests(payload)).range_proof(start, stop))
    proof = tree.range_proof(0, 1)
    return {"result": result, "start": start, "stop": stop, "data": data, "proof": proof, "openings": openings}


def test_right_average_proves_nothing() -> None:
    world = World(num_senders=3, num_validators=1)
    assert proves_wrong_average(pack_wrong_average(**honest_block(world)), world.plan, verify) is None


def test_wrong_average_is_proved_to_a_third_party(monkeypatch: pytest.MonkeyPatch) -> None:
    world, outcomes = attacked("one wrong block", monkeypatch)
    for outcome in outcomes.values():
        evidence = evidence_of(outcome)
        assert len(evidence) < 5 * 16384 + 4096
        assert proves_wrong_average(evidence, world.plan, verify) == world.hotkey(BAD)
        assert proves_wrong_average(evidence, world.plan, verify, (BAD, 0)) == world.hotkey(BAD)
        assert proves_wrong_average(evidence, world.plan, verify, (BAD, 1)) is None
        assert proves_two_averages(evidence, world.plan, verify) is None
        assert outcome.reduced_again == (BAD,)


def test_a_proved_wrong_average_is_a_failed_check_whose_files_prove_it_to_anybody(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world, outcomes = attacked("one wrong block", monkeypatch)
    outcome = next(iter(outcomes.values()))
    found = proven_averages([(world.plan, outcome)], verify)
    assert list(found) == [world.hotkey(BAD)]
    check = found[world.hotkey(BAD)]
    assert check.fault is Fault.WRONG_AVERAGE
    assert proves(Fault.WRONG_AVERAGE, world.hotkey(BAD), check.evidence, verify)
    assert not proves(Fault.WRONG_AVERAGE, world.hotkey(0), check.evidence, verify)
    assert not proves(Fault.DOUBLE_COMMIT, world.hotkey(BAD), check.evidence, verify)
    for broken in ({}, {**check.evidence, "group_plan": b"\xc1"}, {**check.evidence, "wrong_average": b""}):
        assert not proves(Fault.WRONG_AVERAGE, world.hotkey(BAD), broken, verify)
    word = dataclasses.replace(outcome, faults=tuple(dataclasses.replace(f, evidence=b"") for f in outcome.faults))
    assert proven_averages([(world.plan, word)], verify) == {}  # a peer's word alone


@pytest.mark.parametrize(
    "change",
    [
        lambda raw: raw.update(start=raw["start"] + 1),
        lambda raw: raw.update(stop=raw["stop"] + 1),
        lambda raw: raw.update(data=raw["data"][:-1]),
        lambda raw: raw.update(data=b"\1" * len(raw["data"])),
        lambda raw: raw.update(proof=[]),
        lambda raw: raw["openings"].pop(),
        lambda raw: raw["openings"].append(raw["openings"][0]),
        lambda raw: raw["openings"][0].update(member=1),
        lambda raw: raw["openings"][0].update(member=77),
        lambda raw: raw["openings"][0].update(data=bytes(16384)),
        lambda raw: raw["openings"][0].update(proof=[]),
        lambda raw: raw["result"].update(root=bytes(32)),
        lambda raw: raw["result"].update(rank=1),
        lambda raw: raw["result"].update(part=0),
        lambda raw: raw["result"]["masks"][0].update(included=b"\x03"),
        lambda raw: raw.update(surprise=1),
        lambda raw: raw.clear(),
    ],
)
def test_evidence_that_was_tampered_with_proves_nothing(change: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    world, outcomes = attacked("one wrong block", monkeypatch)
    raw = msgpack.unpackb(evidence_of(outcomes[0]))
    change(raw)
    assert proves_wrong_average(msgpack.packb(raw), world.plan, verify) is None


@pytest.mark.parametrize("evidence", [b"", b"\xff", b"\x90", b"\x80", bytes(MAX_EVIDENCE_BYTES + 1)])
def test_garbage_proves_nothing(evidence: bytes) -> None:
    world = World(num_senders=3, num_validators=1)
    assert proves_wrong_average(evidence, world.plan, verify) is None
    assert proves_two_averages(evidence, world.plan, verify) is None


def test_evidence_of_another_attempt_proves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    world, outcomes = attacked("wrong average", monkeypatch)
    other = dataclasses.replace(world.plan, attempt=1)
    assert proves_wrong_average(evidence_of(outcomes[0]), other, verify) is None


def test_mean_that_took_in_what_no_reducer_may_is_proved_wrong() -> None:
    vectors = World(num_senders=3, num_validators=1).vectors
    for vector in vectors[1].values():
        vector[::100] = 1e30
    world = World(num_senders=3, num_validators=1, vectors=vectors)
    assert proves_wrong_average(pack_wrong_average(**honest_block(world)), world.plan, verify) == world.hotkey(BAD)


@pytest.mark.parametrize("word", [float("nan"), float("inf")])
def test_mean_that_took_in_a_chunk_which_no_encoder_writes_is_proved_wrong(word: float) -> None:
    world = World(num_senders=3, num_validators=1, codec="int4")
    assert proves_wrong_average(pack_wrong_average(**honest_block(world)), world.plan, verify) is None
    world.crafted[1] = with_first_words(world, 1, word)
    world.prepare()
    assert proves_wrong_average(pack_wrong_average(**honest_block(world)), world.plan, verify) == world.hotkey(BAD)


@pytest.mark.parametrize("name", ["places that do not increase", "a place past the end"])
def test_mean_that_took_in_places_that_there_are_not_is_proved_wrong(name: str) -> None:
    world = World(num_senders=3, num_validators=1, codec="topk-1%")
    assert proves_wrong_average(pack_wrong_average(**honest_block(world)), world.plan, verify) is None
    payload = bytearray(world.payloads[1] or b"")
    for span in world.layout.spans(0, world.layout.num_chunks):
        for chunk in range(span.first_chunk, span.first_chunk + -(-span.num_elements // 4096)):
            start = world.layout.byte_offset(chunk)
            payload[start : start + 2] = payload[start + 2 : start + 4] if "increase" in name else b"\xff\xff"
    world.crafted[1] = bytes(payload)
    world.prepare()
    evidence = pack_wrong_average(**honest_block(world))
    assert proves_wrong_average(evidence, world.plan, verify) == world.hotkey(BAD)


def test_malformed_chunk_that_its_sender_did_not_commit_to_proves_nothing() -> None:
    world = World(num_senders=3, num_validators=1, codec="int4")
    block = honest_block(world)
    _, proof = block["openings"][1]
    start, stop = (world.layout.byte_offset(chunk) for chunk in (block["start"], block["stop"]))
    block["openings"][1] = (with_first_words(world, 1, float("nan"))[start:stop], proof)
    assert proves_wrong_average(pack_wrong_average(**block), world.plan, verify) is None


def test_reducer_that_takes_its_own_malformed_chunks_in_is_convicted(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(num_senders=3, num_validators=1, codec="int4", audit_blocks=64)
    world.crafted[BAD] = with_first_words(world, BAD, float("nan"))
    world.prepare()
    scene = Scene(world, BAD, monkeypatch)

    def swallow(_: Any, plan: GroupPlan, start: int, stop: int, data: Any) -> Any:
        try:
            return decode_sane(plan, start, stop, data)
        except PeerFault:
            return torch.zeros(sum(span.num_elements for span in plan.layout.spans(start, stop)))

    scene.patch(reduction, "decode_sane", swallow)
    outcomes = world.run()
    honest = {i: outcomes[i] for i in scene.honest}
    assert_mean(world, honest, [0, 1])
    for outcome in honest.values():
        assert (world.hotkey(BAD), "wrong_average") in blamed(outcome)
        assert {hotkey for hotkey, _ in blamed(outcome)} == {world.hotkey(BAD)}


def test_two_averages_are_proved_to_a_third_party(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auditing, "_agrees", lambda *_: True)  # or the audit is quicker
    world, outcomes = attacked("two averages", monkeypatch)
    evidence = evidence_of(outcomes[0])
    assert proves_two_averages(evidence, world.plan, verify) == world.hotkey(BAD)
    assert proves_two_averages(evidence, world.plan, verify, (0, 0)) is None
    first, second = msgpack.unpackb(evidence)
    for pair in ([first, first], [first, second[:-1]], [first]):
        assert proves_two_averages(msgpack.packb(pair), world.plan, verify) is None
    forged = msgpack.packb({**msgpack.unpackb(second), "root": bytes(32)})
    assert proves_two_averages(msgpack.packb([first, forged]), world.plan, verify) is None
    assert proves_two_averages(evidence, dataclasses.replace(world.plan, attempt=1), verify) is None


def test_one_auditor_convinces_everyone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only member 0 looks; the others void the mean on its evidence alone."""
    real = auditing.audit

    async def audit(*arguments: Any, **options: Any) -> None:
        if RUNNING.get(-1) == 0:
            await real(*arguments, **options)

    for module in ("opening", "fetching"):
        monkeypatch.setattr(f"hivetrain.averaging.{module}.audit", audit)
    world, outcomes = attacked("wrong average", monkeypatch)
    for outcome in outcomes.values():
        assert outcome.reduced_again == (BAD,)
        assert blamed(outcome) == {(world.hotkey(BAD), "wrong_average")}
        assert proves_wrong_average(evidence_of(outcome), world.plan, verify) == world.hotkey(BAD)


def test_false_evidence_convicts_nobody_but_its_bearer(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(num_senders=3, num_validators=1)
    scene = Scene(world, BAD, monkeypatch)

    def settle(real: Any, self: Any, holding: Any) -> None:
        real(self, holding)
        accuser = real_peers[0]
        accuser._signed.proofs[1, 0] = b"believe me"
        accuser.warn((1, 0))

    real_peers: list[Any] = []
    real_init = peers.Peers.__init__

    def remember(self: Any, *arguments: Any) -> None:
        real_init(self, *arguments)
        if self._state.me.hotkey == world.hotkey(BAD):
            real_peers.append(self)

    monkeypatch.setattr(peers.Peers, "__init__", remember)
    scene.patch(reduction.RoundState, "settle", settle)
    outcomes = world.run()
    honest = {i: outcomes[i] for i in scene.honest}
    assert_mean(world, honest, [0, 1, 2])
    assert {record for outcome in honest.values() for record in blamed(outcome)} == {
        (world.hotkey(BAD), Fault.MALFORMED.value)
    }
