"""What the byte and loss figures of the benchmarks rest on: counted bytes, exact feedback, and the choice of a rate."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from bench.adapting import Means
from bench.inmemory import butterfly, mean_traffic
from bench.robust import ATTACKS, BLOCK, GROUPS, joined, with_bad
from bench.tradeoff import (
    FOR_150,
    FOR_600,
    NUM_MINERS,
    Arm,
    Job,
    LossyExchange,
    Setting,
    at_best_rate,
    butterfly_traffic,
    gradient_traffic,
    line,
    share_of_bytes,
)
from hivetrain.averaging.robust import get_mean
from hivetrain.training import RoundWork, State

torch.set_num_threads(1)

SIZE = 3 * 4096 * 2 + 100  # not the same number of chunks for every reducer
FP32 = Setting(inner_steps=5, delta="fp32", exp_avg="fp32", exp_avg_sq="fp32")
SIGNS = Setting(inner_steps=5, delta="sign", exp_avg="sign", exp_avg_sq="log4")


def start() -> State:
    zeros = torch.zeros(SIZE)
    return State(
        epoch=0, step=0, vector=zeros, exp_avg=zeros, exp_avg_sq=zeros, outer_momentum=None, base_sha256="b" * 64
    )


def work(seed: int) -> RoundWork:
    generator = torch.Generator().manual_seed(seed)
    vector, exp_avg, exp_avg_sq = (torch.randn(SIZE, generator=generator) for _ in range(3))
    return RoundWork(
        vector=vector,
        exp_avg=exp_avg,
        exp_avg_sq=exp_avg_sq.square(),
        losses=(1.0,),
        num_steps=1,
        num_samples=1,
        num_tokens=1,
        snapshots=(),
        seconds=0.0,
        compute_seconds=0.0,
    )


WORKS = [work(seed) for seed in range(NUM_MINERS)]


def mean(vectors: list[Tensor]) -> Tensor:
    return torch.stack(vectors).mean(dim=0)


@pytest.mark.parametrize("setting", [FP32, SIGNS])
@pytest.mark.parametrize("num_members", [2, 3, 5])
def test_the_formula_for_a_butterflys_bytes_is_what_a_real_one_accounts_for(setting: Setting, num_members: int) -> None:
    layout = setting.layout(SIZE)
    zeros = dict.fromkeys(("delta", "exp_avg", "exp_avg_sq"), torch.zeros(SIZE))
    outcomes = butterfly(layout, [layout.encode(zeros, seed=0)] * num_members, 0)
    assert all(outcome.complete and not outcome.faults for outcome in outcomes)
    assert mean_traffic(outcomes) == pytest.approx(butterfly_traffic(layout.size_bytes, num_members), rel=1e-12)


def test_the_reference_is_charged_four_bytes_a_value_both_ways() -> None:
    assert gradient_traffic(SIZE) == pytest.approx(butterfly_traffic(4 * SIZE, NUM_MINERS), rel=1e-12)


def test_an_exchange_in_fp32_is_the_plain_mean() -> None:
    exchange = LossyExchange(FP32, SIZE)
    means = exchange(0, start(), WORKS)
    assert torch.allclose(means.delta, -mean([one.vector for one in WORKS]), atol=1e-6)
    assert torch.allclose(means.exp_avg, mean([one.exp_avg for one in WORKS]), atol=1e-6)
    assert torch.allclose(means.exp_avg_sq, mean([one.exp_avg_sq for one in WORKS]), atol=1e-6)
    assert exchange.traffic == pytest.approx(butterfly_traffic(12 * SIZE, NUM_MINERS))


def test_first_moments_without_a_codec_cost_nothing_and_come_back_as_zero() -> None:
    setting = Setting(inner_steps=5, delta="fp32", exp_avg="none", exp_avg_sq="fp32")
    exchange = LossyExchange(setting, SIZE)
    means = exchange(0, start(), WORKS)
    assert not means.exp_avg.any()
    assert torch.allclose(means.exp_avg_sq, mean([one.exp_avg_sq for one in WORKS]), atol=1e-6)
    assert exchange.traffic == pytest.approx(butterfly_traffic(8 * SIZE, NUM_MINERS))
    assert share_of_bytes(setting, SIZE) == pytest.approx(8 / 20)


def test_what_a_codec_lost_of_the_pseudo_gradient_is_sent_later() -> None:
    exchange, wanted = LossyExchange(SIGNS, SIZE), -mean([one.vector for one in WORKS])
    found = [exchange(number, start(), WORKS).delta for number in range(20)]

    def error(vector: Tensor) -> float:
        return float((vector - wanted).norm() / wanted.norm())

    # The mean of a mean's codes keeps the reducer's own rounding, which has no feedback.
    assert error(mean(found)) < 0.6 * error(found[0])


def arm(setting: Setting | None, lr: float, seed: int, loss: float, traffic: float = 1.0) -> Arm:
    job = Job(folder=Path("nowhere"), seed=seed, lr=lr, setting=setting, num_steps=10)
    return Arm(job=job, loss=loss, untrained=5.0, traffic=traffic, num_tokens=100)


def test_the_best_rate_is_one_that_every_seed_was_run_at() -> None:
    arms = [arm(FP32, 1e-3, 0, 4.5), arm(FP32, 1e-3, 1, 4.3), arm(FP32, 2e-3, 0, 4.0), arm(SIGNS, 1e-3, 0, 1.0)]
    assert [found.loss for found in at_best_rate(arms, FP32, [0, 1])] == [4.5, 4.3]
    assert [found.loss for found in at_best_rate(arms, FP32, [0])] == [4.0]


def test_a_setting_is_held_against_the_references_best_rate_over_its_own_seeds() -> None:
    arms = [
        arm(None, 1e-3, 0, 4.1, traffic=1000.0),
        arm(None, 2e-3, 0, 4.0, traffic=1000.0),
        arm(None, 2e-3, 1, 3.0, traffic=1000.0),
        arm(SIGNS, 1e-3, 0, 4.2, traffic=5.0),
    ]
    found = line(arms, SIGNS)
    assert (found.share, found.bytes_per_token) == (0.005, 0.05)
    assert found.gap == pytest.approx(0.05)
    assert found.kept == pytest.approx(0.8)


@pytest.mark.parametrize(("setting", "fewer"), [(FOR_150, 150), (FOR_600, 600)])
def test_the_settings_of_the_claims_send_as_little_as_they_claim(setting: Setting, fewer: int) -> None:
    assert setting.inner_steps >= 25
    assert setting.inner_steps * 4 * SIZE / setting.layout(SIZE).size_bytes >= fewer


def test_a_flipped_contribution_is_the_honest_mean_turned_round() -> None:
    honest = [Means(delta=one.vector, exp_avg=one.exp_avg, exp_avg_sq=one.exp_avg_sq) for one in WORKS]
    flipped = with_bad(honest, ATTACKS["sign flipped"], 1, 0)[-1]
    assert torch.allclose(flipped.delta, -mean([one.delta for one in honest]), atol=1e-6)
    assert torch.allclose(flipped.exp_avg_sq, mean([one.exp_avg_sq for one in honest]), atol=1e-6)


@pytest.mark.parametrize("attack", sorted(ATTACKS))
def test_no_attack_is_refused_before_it_reaches_the_mean(attack: str) -> None:
    honest = [Means(delta=one.vector, exp_avg=one.exp_avg, exp_avg_sq=one.exp_avg_sq) for one in WORKS]
    for group in GROUPS:
        sent = with_bad(honest, ATTACKS[attack], group.num_bad, 0)
        assert len(sent) == len(honest) + group.num_bad
        assert all(float(one.exp_avg_sq.min()) >= 0 and bool(torch.isfinite(one.delta).all()) for one in sent)


def test_a_mean_is_taken_block_by_block() -> None:
    size, bound = BLOCK + 10, get_mean("norm_bound")
    vectors = [torch.cat([one.vector, one.vector])[:size] for one in WORKS]
    sent = [Means(delta=vector, exp_avg=vector, exp_avg_sq=vector.square()) for vector in vectors]
    first, rest = (
        bound([vector[part] for vector in vectors], [1.0] * 3) for part in (slice(BLOCK), slice(BLOCK, None))
    )
    assert torch.equal(joined(bound, sent).delta, torch.cat([first, rest]))
