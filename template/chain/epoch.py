"""What happens at each tempo: consensus over the stored weights, then permits, scores and payouts.

Runs inside the block producer's transaction, so a killed producer leaves either the whole epoch or none of it.
"""

from __future__ import annotations

import numpy as np

from template.chain.consensus import Array, Mask, emission_shares, top_stakes, yuma
from template.chain.state import RAO_PER_TOKEN, NeuronRow, State, Subnet


def run_if_due(state: State, netuid: int, block: int) -> bool:
    """Run the subnet's epoch when ``tempo`` blocks have passed since the last one."""
    subnet = state.subnet(netuid)
    if subnet is None or block - subnet.last_epoch_block < subnet.rules.tempo:
        return False
    neurons = state.neurons(netuid)
    if neurons:
        _run(state, subnet, neurons, block)
    state.execute(
        "UPDATE subnets SET last_epoch_block = ?, epoch_index = epoch_index + 1 WHERE netuid = ?", (block, netuid)
    )
    return True


def _run(state: State, subnet: Subnet, neurons: list[NeuronRow], block: int) -> None:
    rules, netuid = subnet.rules, subnet.netuid
    stake = stake_vector(state, netuid, neurons)
    permit: Mask = np.array([bool(n.validator_permit) for n in neurons], dtype=np.bool_)
    active: Mask = np.array([n.active(block, rules) for n in neurons], dtype=np.bool_)
    outcome = yuma(
        stake=stake,
        weights=_weights(state, netuid, neurons),
        bonds=_dense(state.matrix("bonds", netuid), len(neurons)),
        permit=permit,
        active=active,
        kappa=rules.kappa,
        bonds_alpha=rules.bonds_alpha,
    )
    pot = rules.emission_per_block * (block - subnet.last_epoch_block) * (1 - rules.owner_cut) * RAO_PER_TOKEN
    emission = emission_shares(outcome, stake, permit, active) * pot
    permits = top_stakes(stake, rules.max_validators, rules.stake_threshold)
    for uid, neuron in enumerate(neurons):
        state.update_neuron(
            netuid,
            uid,
            rank=float(outcome.ranks[uid]),
            trust=float(outcome.trust[uid]),
            consensus=float(outcome.consensus[uid]),
            incentive=float(outcome.incentive[uid]),
            dividends=float(outcome.dividends[uid]),
            validator_trust=float(outcome.validator_trust[uid]),
            emission=int(emission[uid]),
            validator_permit=int(permits[uid]),
        )
        bonds = {int(target): float(outcome.bonds[uid, target]) for target in np.flatnonzero(outcome.bonds[uid])}
        state.set_row("bonds", netuid, uid, bonds)
        payout = (netuid, subnet.epoch_index + 1, block, neuron.hotkey)
        scores = (float(outcome.incentive[uid]), float(outcome.dividends[uid]), int(emission[uid]))
        state.execute("INSERT INTO payouts VALUES (?, ?, ?, ?, ?, ?, ?)", payout + scores)


def grant_genesis_permits(state: State, netuid: int) -> None:
    """Recompute permits while the chain stands at block 0; later they wait for the next epoch."""
    subnet = state.subnet(netuid)
    if subnet is None or state.head() > 0:
        return
    neurons = state.neurons(netuid)
    stake = stake_vector(state, netuid, neurons)
    for uid, permit in enumerate(top_stakes(stake, subnet.rules.max_validators, subnet.rules.stake_threshold)):
        state.update_neuron(netuid, uid, validator_permit=int(permit))


def stake_vector(state: State, netuid: int, neurons: list[NeuronRow]) -> Array:
    """(N,) stake in tokens, by uid."""
    stakes = state.stakes(netuid)
    return np.array([stakes.get(n.hotkey, 0) / RAO_PER_TOKEN for n in neurons], dtype=np.float64)


def _weights(state: State, netuid: int, neurons: list[NeuronRow]) -> Array:
    """(N, N) weights without those set before their target registered: they were meant for somebody else."""
    dense = _dense(state.matrix("weights", netuid), len(neurons))
    updated = np.array([n.last_update for n in neurons])
    registered = np.array([n.registered_at for n in neurons])
    return np.where(updated[:, None] <= registered[None, :], 0.0, dense)


def _dense(rows: dict[int, dict[int, float]], num_uids: int) -> Array:
    matrix = np.zeros((num_uids, num_uids))
    for uid, row in rows.items():
        for target, value in row.items():
            matrix[uid, target] = value
    return matrix
