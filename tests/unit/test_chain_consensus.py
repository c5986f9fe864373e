"""Yuma consensus against arithmetic done by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from template.chain.consensus import Consensus, emission_shares, top_stakes, weighted_median, yuma


def run(
    stake: list[float],
    rows: dict[int, dict[int, float]],
    *,
    permit: list[bool] | None = None,
    active: list[bool] | None = None,
    bonds: np.ndarray | None = None,
    kappa: float = 0.5,
) -> Consensus:
    """Validators are those with stake, unless said."""
    num_uids = len(stake)
    weights = np.zeros((num_uids, num_uids))
    for uid, row in rows.items():
        for target, value in row.items():
            weights[uid, target] = value
    return yuma(
        stake=np.array(stake, dtype=np.float64),
        weights=weights,
        bonds=np.zeros((num_uids, num_uids)) if bonds is None else bonds,
        permit=np.array([value > 0 for value in stake] if permit is None else permit),
        active=np.ones(num_uids, dtype=bool) if active is None else np.array(active),
        kappa=kappa,
    )


def test_one_validator_pays_three_miners_by_its_weights() -> None:
    # Row (6, 3, 1) normalises to .6 .3 .1; the only voter is the median, so nothing is clipped.
    outcome = run([10, 0, 0, 0], {0: {1: 6, 2: 3, 3: 1}})
    np.testing.assert_allclose(outcome.consensus, [0, 0.6, 0.3, 0.1])
    np.testing.assert_allclose(outcome.incentive, [0, 0.6, 0.3, 0.1])
    np.testing.assert_allclose(outcome.trust, [0, 1, 1, 1])
    # It holds every bond, so all dividends are its own.
    np.testing.assert_allclose(outcome.dividends, [1, 0, 0, 0])
    np.testing.assert_allclose(outcome.validator_trust, [1, 0, 0, 0])


def test_two_validators_that_agree_share_dividends_by_stake() -> None:
    # Stakes 3 and 1 are shares .75 and .25. Both rows are (.5, .5): ranks .75 * .5 + .25 * .5 = .5 each.
    outcome = run([3, 1, 0, 0], {0: {2: 1, 3: 1}, 1: {2: 9, 3: 9}})
    np.testing.assert_allclose(outcome.incentive, [0, 0, 0.5, 0.5])
    # Bonds on each miner: .75 * .5 against .25 * .5, so .75 and .25; times incentive: .75 and .25.
    np.testing.assert_allclose(outcome.bonds[:, 2], [0.75, 0.25, 0, 0])
    np.testing.assert_allclose(outcome.dividends, [0.75, 0.25, 0, 0])


def test_a_minority_that_pays_its_friend_is_clipped() -> None:
    # Shares .6 and .4. Validator 0: miner 2 gets .9, miner 3 gets .1. Validator 1: all to miner 3.
    # Column 2: votes 0 (.4 of the stake) and .9 (.6); the stake at or above .9 is .6 >= .5, so .9.
    # Column 3: votes .1 (.6) and 1 (.4); only .4 < .5 stands behind 1, so .1.
    outcome = run([6, 4, 0, 0], {0: {2: 0.9, 3: 0.1}, 1: {3: 1.0}})
    np.testing.assert_allclose(outcome.consensus, [0, 0, 0.9, 0.1])
    # Ranks: .6 * .9 = .54 and .6 * .1 + .4 * .1 = .1; incentive .54 / .64 and .1 / .64.
    np.testing.assert_allclose(outcome.ranks, [0, 0, 0.54, 0.1])
    np.testing.assert_allclose(outcome.incentive, [0, 0, 0.84375, 0.15625])
    # Trust: miner 3 asked for .6 * .1 + .4 = .46 and kept .1.
    np.testing.assert_allclose(outcome.trust, [0, 0, 1, 0.1 / 0.46])
    # The deviator kept .1 of its row, and its dividends are .4 of miner 3's share alone: .4 * .15625.
    np.testing.assert_allclose(outcome.validator_trust, [1, 0.1, 0, 0])
    np.testing.assert_allclose(outcome.dividends, [0.9375, 0.0625, 0, 0])


def test_exactly_half_of_the_stake_stands_behind_a_weight() -> None:
    # Two equal validators: .5 >= kappa stands behind the larger value of each column.
    outcome = run([1, 1, 0, 0], {0: {2: 1.0}, 1: {3: 1.0}})
    np.testing.assert_allclose(outcome.consensus, [0, 0, 1, 1])
    np.testing.assert_allclose(outcome.incentive, [0, 0, 0.5, 0.5])


def test_three_tenths_shares_do_not_miss_the_half_by_rounding() -> None:
    # .1 + .4 of ten validators' stake is exactly one half in decimals, and 0.5000000000000001 in float64.
    shares = np.array([0.3, 0.2, 0.1, 0.1, 0.1, 0.2])
    rows = np.zeros((6, 6))
    rows[:2, 0] = 1.0  # .5 of the stake says 1, the other .5 says 0
    assert weighted_median(shares, rows, 0.5)[0] == 1.0


def test_a_weight_to_itself_is_ignored() -> None:
    outcome = run([10, 0], {0: {0: 0.99, 1: 0.01}})
    np.testing.assert_allclose(outcome.incentive, [0, 1])


def test_a_row_of_self_weight_alone_pays_nobody() -> None:
    outcome = run([10, 0], {0: {0: 1.0}})
    assert not outcome.incentive.any()
    assert not outcome.dividends.any()


def test_an_inactive_validator_counts_nothing() -> None:
    rows = {0: {2: 1.0}, 1: {3: 1.0}}
    outcome = run([1, 9, 0, 0], rows, active=[True, False, True, True])
    np.testing.assert_allclose(outcome.incentive, [0, 0, 1, 0])
    np.testing.assert_allclose(outcome.dividends, [1, 0, 0, 0])


def test_a_row_without_a_permit_counts_nothing() -> None:
    outcome = run([1, 9, 0, 0], {0: {2: 1.0}, 1: {3: 1.0}}, permit=[True, False, False, False])
    np.testing.assert_allclose(outcome.incentive, [0, 0, 1, 0])


def test_bonds_move_by_a_tenth_an_epoch() -> None:
    # Before, validator 1 held all of miner 2; now validator 0 alone votes for it (.6 of the stake, so no clip).
    bonds = np.zeros((3, 3))
    bonds[1, 2] = 1.0
    outcome = run([6, 4, 0], {0: {2: 1.0}, 1: {}}, bonds=bonds)
    # .1 * (1, 0) + .9 * (0, 1)
    np.testing.assert_allclose(outcome.bonds[:, 2], [0.1, 0.9, 0])
    np.testing.assert_allclose(outcome.dividends, [0.1, 0.9, 0])


def test_emission_is_half_incentive_and_half_dividends() -> None:
    outcome = run([10, 0, 0], {0: {1: 3, 2: 1}})
    shares = emission_shares(outcome, np.array([10.0, 0, 0]), np.array([True, False, False]), np.ones(3, dtype=bool))
    np.testing.assert_allclose(shares, [0.5, 0.375, 0.125])


def test_without_weights_emission_follows_active_stake() -> None:
    stake, permit = np.array([3.0, 1.0, 0.0]), np.array([True, True, False])
    shares = emission_shares(run([3, 1, 0], {}), stake, permit, np.ones(3, dtype=bool))
    np.testing.assert_allclose(shares, [0.75, 0.25, 0])


def test_permits_go_to_the_largest_stakes_above_the_threshold() -> None:
    stake = np.array([5.0, 9.0, 9.0, 0.0, 7.0])
    assert top_stakes(stake, 3, 6.0).tolist() == [False, True, True, False, True]
    assert top_stakes(stake, 1, 6.0).tolist() == [False, True, False, False, False]
    assert top_stakes(np.zeros(2), 2, 0.0).tolist() == [False, False]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("weights", np.zeros((2, 3)), "weights must be"),
        ("bonds", np.full((2, 2), np.nan), "bonds must be finite"),
        ("stake", np.array([1.0, -1.0]), "stake must be finite and >= 0"),
    ],
)
def test_impossible_input_is_refused(field: str, value: np.ndarray, message: str) -> None:
    arguments = {
        "stake": np.ones(2),
        "weights": np.ones((2, 2)),
        "bonds": np.zeros((2, 2)),
        "permit": np.ones(2, dtype=bool),
        "active": np.ones(2, dtype=bool),
    }
    with pytest.raises(ValueError, match=message):
        yuma(**{**arguments, field: value})


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(2, 8))
def test_the_median_is_the_largest_value_that_half_the_stake_reaches(seed: int, num_uids: int) -> None:
    generator = np.random.default_rng(seed)
    power = generator.integers(0, 5, num_uids).astype(np.float64)
    if power.sum() == 0:
        power[0] = 1.0
    power /= power.sum()
    rows = generator.integers(0, 4, (num_uids, num_uids)) / 4
    median = weighted_median(power, rows, 0.5)
    for column in range(num_uids):
        reached = [v for v in rows[power > 0, column] if power[rows[:, column] >= v].sum() >= 0.5 - 1e-9]
        assert median[column] == max(reached)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_shares_sum_to_one_and_stay_within_bounds(seed: int) -> None:
    generator = np.random.default_rng(seed)
    outcome = yuma(
        stake=generator.random(6) * 100,
        weights=generator.random((6, 6)),
        bonds=generator.random((6, 6)),
        permit=np.array([True, True, True, False, False, False]),
        active=np.ones(6, dtype=bool),
    )
    assert outcome.incentive.sum() == pytest.approx(1)
    assert outcome.dividends.sum() == pytest.approx(1)
    for values in (outcome.trust, outcome.consensus, outcome.validator_trust, outcome.bonds):
        assert values.min() >= 0
        assert values.max() <= 1 + 1e-12
