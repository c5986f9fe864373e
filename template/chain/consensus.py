"""Yuma consensus: validators' weights in, miners' incentive and validators' dividends out.

Pure numpy in float64: no chain, no clock. It follows the chain's own epoch: a weight counts up to the largest
value that validators with at least ``kappa`` of the stake stand behind, so a minority cannot pay its friends.

Source: Yuma Consensus, https://docs.learnbittensor.org/yuma-consensus and the pallet's epoch (spec 461).
Shapes: N = uids; weights and bonds are (N, N), row = validator, column = miner.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]

# Sums of float64 shares miss exact halves by a few ulps; the chain's fixed point does not.
_TIE = 1e-12


@dataclass(frozen=True, slots=True, kw_only=True)
class Consensus:
    """The outcome of one epoch. Vectors are (N,), in [0, 1]; matrices (N, N)."""

    consensus: Array  # the stake-weighted median of each column
    ranks: Array  # stake-weighted sum of clipped weights
    trust: Array  # what clipping left of each miner's rank
    incentive: Array  # ranks, normalised: the miners' share
    validator_trust: Array  # what clipping left of each validator's row
    bonds: Array  # columns sum to 1
    dividends: Array  # bonds against incentive, normalised: the validators' share


def yuma(
    *,
    stake: Array,
    weights: Array,
    bonds: Array,
    permit: Mask,
    active: Mask,
    kappa: float = 0.5,
    bonds_alpha: float = 0.1,
) -> Consensus:
    """One epoch of consensus.

    Args:
        stake: (N,) >= 0, any scale.
        weights: (N, N) >= 0, any scale; rows are normalised here.
        bonds: (N, N) >= 0 of the epoch before.
        permit: (N,) who may validate; other rows count nothing.
        active: (N,) who set weights lately; inactive stake counts nothing.
        kappa: share of the active stake that must stand behind a weight.
        bonds_alpha: how much of this epoch enters the bonds' moving average.

    Raises:
        ValueError: a shape, a negative or a non-finite value.
    """
    num_uids = len(stake)
    for name, matrix in (("weights", weights), ("bonds", bonds)):
        if matrix.shape != (num_uids, num_uids):
            raise ValueError(f"{name} must be ({num_uids}, {num_uids}), got {matrix.shape}")
    for name, values in (("stake", stake), ("weights", weights), ("bonds", bonds)):
        if not np.all(np.isfinite(values)) or np.any(values < 0):
            raise ValueError(f"{name} must be finite and >= 0")

    power = _normalised(np.where(permit & active, stake, 0.0))
    rows = np.where(permit[:, None], weights, 0.0)
    np.fill_diagonal(rows, 0.0)  # nobody pays itself
    rows = _row_normalised(rows)

    consensus = weighted_median(power, rows, kappa)
    clipped = np.minimum(rows, consensus[None, :])
    pre_ranks = power @ rows
    ranks = power @ clipped
    trust = _divided(ranks, pre_ranks)
    incentive = _normalised(ranks)

    fresh = _column_normalised(clipped * power[:, None])
    averaged = bonds_alpha * fresh + (1 - bonds_alpha) * _column_normalised(bonds)
    new_bonds = _column_normalised(averaged)
    return Consensus(
        consensus=consensus,
        ranks=ranks,
        trust=trust,
        incentive=incentive,
        validator_trust=clipped.sum(axis=1),
        bonds=new_bonds,
        dividends=_normalised(new_bonds @ incentive),
    )


def weighted_median(power: Array, rows: Array, kappa: float) -> Array:
    """(N,) per column: the largest value that validators with at least ``kappa`` of the stake reach.

    Args:
        power: (N,) stake shares, summing to 1 or all 0.
        rows: (N, N) row-normalised weights.
        kappa: in (0, 1].
    """
    if power.sum() <= 0:
        return np.zeros(rows.shape[1])
    voters = power > 0
    votes, shares = rows[voters], power[voters]
    order = np.argsort(votes, axis=0, kind="stable")
    below_or_equal = np.cumsum(shares[order], axis=0)
    # First value whose stake from below passes 1 - kappa: the stake from it upwards is then at least kappa.
    index = np.argmax(below_or_equal > 1 - kappa + _TIE, axis=0)
    sorted_votes = np.take_along_axis(votes, order, axis=0)
    return np.asarray(np.take_along_axis(sorted_votes, index[None, :], axis=0)[0], dtype=np.float64)


def emission_shares(outcome: Consensus, stake: Array, permit: Mask, active: Mask) -> Array:
    """(N,) shares of an epoch's emission, summing to 1 (or to 0 without stake).

    Half goes by incentive, half by dividends; while nobody earned either, all of it goes by active stake.
    """
    combined = _normalised(outcome.incentive) + _normalised(outcome.dividends)
    if combined.sum() > 0:
        return _normalised(combined)
    return _normalised(np.where(permit & active, stake, 0.0))


def top_stakes(stake: Array, num_validators: int, threshold: float) -> Mask:
    """(N,) permits: the ``num_validators`` largest stakes of at least ``threshold`` > 0; ties go to the lower uid."""
    order = np.argsort(-stake, kind="stable")[:num_validators]
    permits = np.zeros(len(stake), dtype=np.bool_)
    permits[order] = (stake[order] >= threshold) & (stake[order] > 0)
    return permits


def _normalised(values: Array) -> Array:
    total = values.sum()
    return np.asarray(values / total if total > 0 else np.zeros_like(values), dtype=np.float64)


def _row_normalised(matrix: Array) -> Array:
    return _divided(matrix, matrix.sum(axis=1, keepdims=True))


def _column_normalised(matrix: Array) -> Array:
    return _divided(matrix, matrix.sum(axis=0, keepdims=True))


def _divided(values: Array, totals: Array) -> Array:
    """``values / totals``, 0 where the total is 0."""
    return np.asarray(np.divide(values, totals, out=np.zeros_like(values), where=totals > 0), dtype=np.float64)
