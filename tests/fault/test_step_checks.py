"""What step records, sketches and second receipts prove: real training, judged without a network."""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Callable

import numpy as np
import pytest
import torch

from hivetrain.contribution import Contribution
from hivetrain.errors import Fault
from hivetrain.scoring import CheckResult
from hivetrain.training.inner import RoundWork
from hivetrain.verification.audit import AuditVerdict, audit
from hivetrain.verification.challenge import Draw
from hivetrain.verification.judge import Answer, Judge
from hivetrain.verification.merkle import MerkleTree, leaf_digest
from hivetrain.verification.receipt import sign_receipt, step_record
from hivetrain.verification.sketch import count_sketch, from_hex, sketch_distance, sketch_seed, to_hex
from template.validator.verify import second_receipt
from tests.round_kit import ROUND, WHOLE, World, identity, shared_world

MINER, OTHER = identity("miner"), identity("miner-2")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return shared_world(tmp_path_factory)


@pytest.fixture(scope="module")
def honest(world: World) -> Contribution:
    return world.contribution(MINER)


def answer_of(contribution: Contribution, windows: tuple[int, ...] = WHOLE) -> Answer:
    wanted = Draw(hotkey="x", windows=windows).snapshots(contribution.receipt.num_snapshots)
    opened = {index: contribution.snapshots.open(index) for index in wanted}
    return Answer(
        openings={index: (snapshot.payload, proof) for index, (snapshot, proof) in opened.items()},
        steps=contribution.steps,
    )


def judged(
    world: World, contribution: Contribution, answer: Answer | None = None, windows: tuple[int, ...] = WHOLE
) -> CheckResult:
    judge = Judge(
        parts=world.parts,
        base=world.base,
        state=world.state,
        load_data=lambda rank: world.bench.round_data(world.parts, ROUND, rank),
    )
    drawn = Draw(hotkey=contribution.receipt.hotkey, windows=windows)
    return judge.judge(contribution.receipt, drawn, answer or answer_of(contribution, windows))


def audited(world: World, contribution: Contribution, *, steps: bool = True) -> AuditVerdict:
    data = world.bench.round_data(world.parts, ROUND, contribution.receipt.rank)
    return audit(world.parts, world.state, data, contribution.receipt, contribution.steps if steps else None)


def other_data_from(world: World, step: int) -> RoundWork:
    """An honest prefix, then another miner's tokens."""
    mine, theirs = (world.bench.round_data(world.parts, ROUND, rank).batch for rank in (0, 1))
    return world.work(batches=lambda index: mine(index) if index < step else theirs(index))


def resealed(contribution: Contribution, records: list[bytes], **changes: object) -> Contribution:
    """The miner commits to other step records, and signs."""
    root = MerkleTree([leaf_digest(record) for record in records]).root.hex()
    receipt = contribution.receipt.model_copy(update={"steps_root": root, **changes})
    return dataclasses.replace(contribution, receipt=sign_receipt(receipt, MINER), steps=b"".join(records))


def pieces(contribution: Contribution) -> list[bytes]:
    size = len(contribution.steps) // contribution.receipt.num_steps
    return [contribution.steps[at : at + size] for at in range(0, len(contribution.steps), size)]


def test_the_honest_pass_and_what_they_opened_is_kept(world: World, honest: Contribution) -> None:
    result = judged(world, honest)
    assert (result.fault, result.first_wrong_step) == (None, None)
    assert result.windows == WHOLE
    assert len(result.distances) == len(WHOLE)
    assert dict(result.evidence) == {"steps": honest.steps}


@pytest.mark.parametrize("step", [0, 1, 3, 4, 6])
def test_the_first_step_on_other_data_is_named(world: World, step: int) -> None:
    cheat = world.contribution(MINER, work=other_data_from(world, step))
    result = judged(world, cheat)
    assert result.fault is Fault.WRONG_REPLAY
    assert result.first_wrong_step == step
    assert f"step {step}: its record says loss" in result.detail
    assert result.windows == WHOLE[: step // 4 + 1]  # the first window that misses ends the check


def test_a_window_whose_records_agree_is_named_as_a_whole(world: World, honest: Contribution) -> None:
    """Noise after the last step of a window: every loss before it is right."""
    work = world.work()
    last = work.snapshots[-1]
    noise = (
        0.3
        * (last.vector - world.state.vector).norm()
        * torch.nn.functional.normalize(
            torch.randn(len(last.vector), generator=torch.Generator().manual_seed(1)), dim=0
        )
    )
    noised = dataclasses.replace(last, vector=last.vector + noise)
    cheat = world.contribution(MINER, work=dataclasses.replace(work, snapshots=(work.snapshots[0], noised)))
    result = judged(world, cheat, windows=(1,))
    assert (result.fault, result.first_wrong_step) == (Fault.WRONG_REPLAY, None)
    assert "wrong between step 4 and 8" in result.detail


def test_samples_that_were_not_assigned_are_a_lie_at_their_step(world: World, honest: Contribution) -> None:
    records = pieces(honest)
    step, loss = struct.unpack_from("<Qf", records[5])
    records[5] = step_record(step, [(0, 0), (0, 1)], loss)
    result = judged(world, resealed(honest, records))
    assert (result.fault, result.first_wrong_step) == (Fault.WRONG_REPLAY, 5)
    assert "other samples" in result.detail


def test_a_record_of_another_step_is_a_lie(world: World, honest: Contribution) -> None:
    records = pieces(honest)
    records[2], records[3] = records[3], records[2]
    result = judged(world, resealed(honest, records))
    assert (result.fault, result.first_wrong_step) == (Fault.WRONG_REPLAY, 2)


def test_a_loss_that_is_not_the_mean_of_the_records_is_a_lie(world: World, honest: Contribution) -> None:
    result = judged(world, resealed(honest, pieces(honest), loss=honest.receipt.loss - 0.01))
    assert result.fault is Fault.WRONG_REPLAY
    assert "mean of its step records" in result.detail


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), -float("inf")])
def test_a_recorded_loss_that_is_no_number_is_a_lie(world: World, honest: Contribution, loss: float) -> None:
    records = pieces(honest)
    records[1] = records[1][:8] + struct.pack("<f", loss) + records[1][12:]
    assert judged(world, resealed(honest, records)).fault is Fault.NOT_FINITE


def test_records_that_do_not_open_the_root_were_not_committed_to(world: World, honest: Contribution) -> None:
    answer = answer_of(honest)
    tampered = answer.steps[:-1] + bytes([answer.steps[-1] ^ 1])
    assert judged(world, honest, dataclasses.replace(answer, steps=tampered)).fault is Fault.NOT_COMMITTED


@pytest.mark.parametrize("cut", [0, 1, -1, 28])
def test_too_few_or_too_many_records_are_a_refusal(world: World, honest: Contribution, cut: int) -> None:
    answer = answer_of(honest)
    steps = b"" if cut == 0 else answer.steps[:-cut] if cut > 0 else answer.steps + b"\0"
    result = judged(world, honest, dataclasses.replace(answer, steps=steps))
    assert result.fault is Fault.REFUSED
    assert not result.evidence


def test_a_sketch_of_something_else_was_not_committed_to(world: World, honest: Contribution) -> None:
    other = to_hex(from_hex(honest.receipt.sketch) * np.float32(1.01))
    receipt = sign_receipt(honest.receipt.model_copy(update={"sketch": other}), MINER)
    result = judged(world, dataclasses.replace(honest, receipt=receipt))
    assert result.fault is Fault.NOT_COMMITTED
    assert "sketch" in result.detail


# -- audits ----------------------------------------------------------------------------------------------------


def test_an_audit_passes_the_honest_with_and_without_step_records(world: World, honest: Contribution) -> None:
    for steps in (True, False):
        verdict = audited(world, honest, steps=steps)
        assert verdict.honest, verdict
        assert verdict.distance is not None
        assert verdict.distance < 1e-3
        assert verdict.num_steps == 8


@pytest.mark.parametrize("step", [0, 3, 5, 7])
def test_an_audit_names_the_first_wrong_step_of_a_cheat(world: World, step: int) -> None:
    verdict = audited(world, world.contribution(MINER, work=other_data_from(world, step)))
    assert not verdict.honest
    assert verdict.first_wrong_step == step
    assert f"first wrong step: {step}" in verdict.lines


@pytest.mark.parametrize(("off", "is_honest", "step"), [(0.005, True, None), (0.02, False, 0)])
def test_losses_off_by_what_other_hardware_makes_convict_nobody(
    world: World, honest: Contribution, off: float, is_honest: bool, step: int | None
) -> None:
    records = [
        step_record(step, world.bench.round_data(world.parts, ROUND, 0).samples(step), loss + off)
        for step, loss in enumerate(world.work().losses)
    ]
    losses = [struct.unpack_from("<Qf", record)[1] for record in records]
    verdict = audited(world, resealed(honest, records, loss=sum(losses) / len(losses)))
    assert (verdict.honest, verdict.first_wrong_step) == (is_honest, step)


def scaled(work: RoundWork, world: World) -> RoundWork:
    last = work.snapshots[-1]
    vector = world.state.vector + 1.5 * (last.vector - world.state.vector)
    return dataclasses.replace(work, snapshots=(work.snapshots[0], dataclasses.replace(last, vector=vector)))


def fewer_steps(work: RoundWork, world: World) -> RoundWork:
    half = world.work(num_steps=4)
    end = dataclasses.replace(half.snapshots[-1], step=8)
    return dataclasses.replace(work, snapshots=(half.snapshots[0], end))


@pytest.mark.parametrize("cheat", [scaled, fewer_steps])
def test_an_audit_sees_by_the_sketch_what_no_step_record_shows(
    world: World, cheat: Callable[[RoundWork, World], RoundWork]
) -> None:
    verdict = audited(world, world.contribution(MINER, work=cheat(world.work(), world)))
    assert not verdict.honest
    assert verdict.first_wrong_step is None
    assert "wrong between step 0 and 8" in verdict.lines


def test_an_audit_refuses_data_that_was_not_assigned(world: World, honest: Contribution) -> None:
    digests = world.bench.round_data(world.parts, ROUND, 1).digests
    receipt = sign_receipt(honest.receipt.model_copy(update={"data_digests": digests}), MINER)
    verdict = audited(world, dataclasses.replace(honest, receipt=receipt))
    assert not verdict.honest
    assert "assignment" in verdict.lines[0]


# -- sketches --------------------------------------------------------------------------------------------------


def test_a_sketch_estimates_relative_distance() -> None:
    generator = torch.Generator().manual_seed(2)
    vector = torch.randn(50_000, generator=generator)
    noise = torch.randn(50_000, generator=generator)
    seed = sketch_seed("01" * 32, 3)
    for share in (0.03, 0.1, 0.3):
        moved = vector + share * noise * (vector.norm() / noise.norm())
        found = sketch_distance(count_sketch(vector, seed), count_sketch(moved, seed))
        true = float((vector - moved).norm() / moved.norm())
        assert found == pytest.approx(true, rel=0.3)


def test_rounds_and_runs_draw_their_own_sketches() -> None:
    vector = torch.ones(1000)
    seeds = {sketch_seed(run, number) for run in ("01" * 32, "02" * 32) for number in (1, 2)}
    assert len(seeds) == 4
    assert len({to_hex(count_sketch(vector, seed)) for seed in seeds}) == 4


def test_values_that_are_no_numbers_leave_a_sketch_that_a_receipt_can_hold() -> None:
    vector = torch.tensor([float("nan"), float("inf"), 3e38, 3e38, 1.0])
    assert np.isfinite(from_hex(to_hex(count_sketch(vector, 1)))).all()
    with pytest.raises(ValueError, match="not finite"):
        from_hex("0000c07f" * 256)
    with pytest.raises(ValueError, match="1024 bytes"):
        from_hex("00")


def test_a_displacement_of_nothing_has_distance_zero_to_itself() -> None:
    zero = count_sketch(torch.zeros(10), 1)
    assert sketch_distance(zero, zero) == 0
    assert sketch_distance(count_sketch(torch.ones(10), 1), zero) == float("inf")


# -- two receipts ----------------------------------------------------------------------------------------------


def test_only_another_receipt_of_the_same_hotkey_and_round_proves_anything(honest: Contribution) -> None:
    receipt = honest.receipt
    again = sign_receipt(receipt, MINER)  # the same bytes, signed once more
    second = sign_receipt(receipt.model_copy(update={"loss": 1.0}), MINER)
    assert second_receipt(receipt, second.to_bytes()) == second
    unproved = [
        None,
        receipt.to_bytes(),
        again.to_bytes(),
        b"{}",
        receipt.model_copy(update={"loss": 1.0}).to_bytes(),
        sign_receipt(receipt.model_copy(update={"round": ROUND + 1}), MINER).to_bytes(),
        sign_receipt(receipt.model_copy(update={"run_id": "ab" * 32}), MINER).to_bytes(),
        sign_receipt(receipt.model_copy(update={"hotkey": OTHER.hotkey}), OTHER).to_bytes(),
    ]
    assert [second_receipt(receipt, raw) for raw in unproved] == [None] * len(unproved)
