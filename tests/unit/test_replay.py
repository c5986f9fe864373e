"""Replay: honest work in another guise is within 1e-4, every cheap cheat is past 0.05."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from hivetrain.errors import DataError
from hivetrain.model import assemble
from hivetrain.run import Data, Inner, Model, Recipe
from hivetrain.training import InnerLoop, RoundWork, Snapshot, State, genesis_state, learning_rate
from hivetrain.verification.replay import relative_l2, replay_window

RECIPE = Recipe(
    model=Model(hidden_size=32, num_layers=2, num_heads=2, intermediate_size=64, vocab_size=128),
    data=Data(seq_len=16, batch_size=8),
    inner=Inner(max_steps=20, lr=4e-3, warmup_steps=4, total_steps=60, snapshot_every=10),
)
STEPS = 20
HONEST = 1e-4
BOUND = RECIPE.scoring.distance_full


def tokens(step: int, *, miner: int = 0) -> Tensor:
    """A text with structure, so that training moves: runs of neighbouring ids."""
    generator = torch.Generator().manual_seed(1000 * miner + step)
    starts = torch.randint(0, 128, (1, 8, 1), generator=generator)
    strides = torch.randint(1, 4, (1, 8, 1), generator=generator)
    return (starts + strides * torch.arange(16)) % 128


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A loop, the state of its second round, the one before it, and an honest miner's work in that round."""

    loop: InnerLoop
    parent: State
    state: State
    honest: RoundWork


def advance(state: State, work: RoundWork) -> State:
    return dataclasses.replace(
        state,
        epoch=state.epoch + 1,
        step=state.step + work.num_steps,
        vector=work.vector,
        exp_avg=work.exp_avg,
        exp_avg_sq=work.exp_avg_sq,
    )


@pytest.fixture(scope="module")
def run(one_thread: None) -> Run:
    model = assemble(RECIPE, None, 128, "cpu")
    loop = InnerLoop(model.module, model.flat, RECIPE, "cpu")
    parent = genesis_state(model.flat, model.base_sha256)
    state = advance(parent, loop.run(parent, lambda step: tokens(step, miner=9), num_steps=STEPS))
    return Run(loop=loop, parent=parent, state=state, honest=loop.run(state, tokens, num_steps=STEPS))


def judge(run: Run, claimed: Snapshot, opened: Snapshot | None = None) -> float:
    return replay_window(run.loop, run.state, tokens, claimed=claimed, opened=opened).worst


def end(work: RoundWork, step: int = STEPS) -> Snapshot:
    return Snapshot(step=step, vector=work.vector, exp_avg=work.exp_avg, exp_avg_sq=work.exp_avg_sq)


# Honest work


def test_the_same_machine_replays_to_the_same_bits(run: Run) -> None:
    first, last = run.honest.snapshots
    assert judge(run, first) == 0
    assert judge(run, last, opened=first) == 0
    assert judge(run, last) == 0


def test_another_number_of_threads_is_honest(run: Run) -> None:
    torch.set_num_threads(2)
    try:
        assert judge(run, end(run.honest)) <= HONEST
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize(
    "guise",
    [
        lambda ids: ids.view(2, 4, 16),  # two micro-batches
        lambda ids: ids[:, torch.randperm(8, generator=torch.Generator().manual_seed(0))],  # rows in another order
    ],
    ids=["micro-batches", "row-order"],
)
def test_the_same_samples_in_another_split_or_order_are_honest(run: Run, guise: Callable[[Tensor], Tensor]) -> None:
    work = run.loop.run(run.state, lambda step: guise(tokens(step)), num_steps=STEPS)
    assert 0 < judge(run, end(work)) <= HONEST


def test_another_attention_kernel_is_honest(run: Run) -> None:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.MATH):
        work = run.loop.run(run.state, tokens, num_steps=STEPS)
    assert judge(run, end(work)) <= HONEST


def test_a_window_is_judged_from_its_own_opening(run: Run) -> None:
    first, last = run.honest.snapshots
    noisy = dataclasses.replace(first, vector=first.vector + 0.3 * noise_like(first.vector - run.state.vector))
    continued = run.loop.run(
        dataclasses.replace(run.state, vector=noisy.vector, exp_avg=first.exp_avg, exp_avg_sq=first.exp_avg_sq),
        tokens,
        first_step=10,
        num_steps=10,
    )
    assert judge(run, end(continued), opened=noisy) == 0
    assert judge(run, noisy) > BOUND
    assert judge(run, last, opened=noisy) > BOUND


# Cheats: the rows of the table in docs/protocol.md


def noise_like(tensor: Tensor) -> Tensor:
    """Noise of the same norm."""
    noise = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(5))
    return noise * torch.linalg.vector_norm(tensor) / torch.linalg.vector_norm(noise)


def test_one_step_in_ten_skipped_is_past_the_bound(run: Run) -> None:
    """Two of twenty: the miner takes 18 steps and says that they were 20."""
    kept = [step for step in range(STEPS) if step % 10 != 9]
    work = run.loop.run(run.state, lambda place: tokens(kept[place]), num_steps=len(kept))
    assert judge(run, end(work)) > BOUND


def test_half_of_the_steps_skipped_is_past_the_bound(run: Run) -> None:
    work = run.loop.run(run.state, lambda step: tokens(2 * step), num_steps=STEPS // 2)
    assert judge(run, end(work)) > BOUND


def test_a_fifth_of_the_steps_on_other_data_is_past_the_bound(run: Run) -> None:
    work = run.loop.run(run.state, lambda step: tokens(step, miner=1 if step % 5 == 0 else 0), num_steps=STEPS)
    assert judge(run, end(work)) > BOUND


def test_work_copied_from_a_miner_with_other_data_is_past_the_bound(run: Run) -> None:
    work = run.loop.run(run.state, lambda step: tokens(step, miner=1), num_steps=STEPS)
    assert judge(run, end(work)) > BOUND


@pytest.mark.parametrize("num_rows", [4, 7])
def test_a_part_of_the_batch_is_past_the_bound(run: Run, num_rows: int) -> None:
    work = run.loop.run(run.state, lambda step: tokens(step)[:, :num_rows], num_steps=STEPS)
    assert judge(run, end(work)) > BOUND


def test_work_on_the_state_of_the_epoch_before_is_past_the_bound(run: Run) -> None:
    work = run.loop.run(run.parent, tokens, num_steps=STEPS)
    assert judge(run, end(work)) > BOUND
    moved = run.state.vector + (work.vector - run.parent.vector)
    assert judge(run, dataclasses.replace(end(work), vector=moved)) > BOUND


@pytest.mark.parametrize("share", [0.1, 0.3])
def test_added_noise_is_past_the_bound(run: Run, share: float) -> None:
    claimed = end(run.honest)
    noisy = claimed.vector + share * noise_like(claimed.vector - run.state.vector)
    distance = judge(run, dataclasses.replace(claimed, vector=noisy))
    assert distance > BOUND
    assert distance == pytest.approx(share, rel=0.1)


@pytest.mark.parametrize("scale", [-1.0, 0.0, 1.1, 2.0, 10.0])
def test_a_scaled_displacement_is_past_the_bound(run: Run, scale: float) -> None:
    claimed = end(run.honest)
    scaled = run.state.vector + scale * (claimed.vector - run.state.vector)
    assert judge(run, dataclasses.replace(claimed, vector=scaled)) > BOUND


@pytest.mark.parametrize("name", ["exp_avg", "exp_avg_sq"])
def test_poisoned_moments_are_past_the_bound_though_the_vector_is_honest(run: Run, name: str) -> None:
    claimed = end(run.honest)
    verdict = replay_window(
        run.loop, run.state, tokens, claimed=dataclasses.replace(claimed, **{name: 1.2 * getattr(claimed, name)})
    )
    assert verdict.distance_vector == 0
    assert verdict.worst > BOUND


def test_the_learning_rate_of_another_round_is_past_the_bound(run: Run) -> None:
    shifted = dataclasses.replace(run.state, step=run.state.step + STEPS)
    assert learning_rate(shifted.step, RECIPE.inner) != learning_rate(run.state.step, RECIPE.inner)
    work = run.loop.run(shifted, tokens, num_steps=STEPS)
    assert judge(run, end(work)) > BOUND


def test_doing_nothing_is_past_every_bound(run: Run) -> None:
    state = run.state
    idle = Snapshot(step=STEPS, vector=state.vector, exp_avg=state.exp_avg, exp_avg_sq=state.exp_avg_sq)
    assert judge(run, idle) == math.inf


# Claims that cannot be replayed


@pytest.mark.parametrize("name", ["vector", "exp_avg", "exp_avg_sq"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_claim_that_is_not_finite_is_infinitely_far(run: Run, name: str, value: float) -> None:
    claimed = end(run.honest)
    poisoned = getattr(claimed, name).clone()
    poisoned[7] = value
    broken = dataclasses.replace(claimed, **{name: poisoned})
    assert judge(run, broken) == math.inf
    assert judge(run, end(run.honest), opened=dataclasses.replace(broken, step=10)) == math.inf


def test_a_snapshot_from_which_training_diverges_is_infinitely_far(run: Run) -> None:
    first, last = run.honest.snapshots
    negative = dataclasses.replace(first, exp_avg_sq=-torch.ones_like(first.exp_avg_sq))
    assert judge(run, last, opened=negative) == math.inf


def test_a_window_without_steps_is_a_bug_of_ours(run: Run) -> None:
    first, last = run.honest.snapshots
    with pytest.raises(ValueError, match="end after it starts"):
        judge(run, first, opened=last)


def test_a_snapshot_of_another_size_is_a_bug_of_ours(run: Run) -> None:
    claimed = end(run.honest)
    with pytest.raises(ValueError, match="three vectors"):
        judge(run, dataclasses.replace(claimed, exp_avg=claimed.exp_avg[:-1]))


def test_data_that_cannot_be_read_is_our_outage_and_no_verdict(run: Run) -> None:
    def unreadable(step: int) -> Tensor:
        raise DataError("the hub is away")

    with pytest.raises(DataError):
        replay_window(run.loop, run.state, unreadable, claimed=end(run.honest))


# Arithmetic


def test_relative_l2_is_the_error_over_the_claimed_displacement() -> None:
    start, claimed, replayed = torch.zeros(2), torch.tensor([3.0, 4.0]), torch.tensor([3.0, 3.0])
    assert relative_l2(replayed, claimed, start) == pytest.approx(0.2)


def test_no_displacement_on_either_side_is_no_distance() -> None:
    same = torch.ones(3)
    assert relative_l2(same, same, same) == 0
    assert relative_l2(torch.zeros(3), same, same) == math.inf


def test_huge_but_finite_values_do_not_overflow_into_a_pass() -> None:
    huge = torch.full((4,), 3e38)
    assert relative_l2(torch.zeros(4), huge, torch.zeros(4)) == pytest.approx(1.0)
    assert relative_l2(-huge, huge, torch.zeros(4)) == math.inf
