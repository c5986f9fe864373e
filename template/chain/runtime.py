"""What the embedded chain answers to reads: storage items, storage maps and runtime APIs.

Values have the shapes that the SDK's codec gives for the real runtime (spec 461), odd ones included: fixed
``Raw<N>`` bytes come as hex, ``BigRaw`` bytes as text where they are UTF-8.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from template.chain.calls import U16_MAX
from template.chain.state import RAO_PER_TOKEN, NeuronRow, State, Subnet


def query(state: State, module: str, item: str, params: Sequence[Any], block: int) -> Any:
    """One storage value; ``block`` is the block that the caller reads at.

    Raises:
        LookupError: the embedded chain does not hold this item.
    """
    if (module, item) in _CHAIN_ITEMS:
        return _CHAIN_ITEMS[module, item](state, params, block)
    if (module, item) in _SUBNET_ITEMS:
        subnet = state.subnet(int(params[0]))
        return None if subnet is None else _SUBNET_ITEMS[module, item](subnet, block)
    if (module, item) in _COLUMNS:
        return [_COLUMNS[module, item](neuron) for neuron in state.neurons(int(params[0]))]
    raise LookupError(f"the embedded chain holds no storage {module}.{item}")


def query_map(state: State, module: str, item: str, params: Sequence[Any], block: int) -> list[tuple[Any, Any]]:
    """A storage map's pairs below the fixed keys ``params``.

    Raises:
        LookupError: the embedded chain does not hold this map.
    """
    if (module, item) in _MAPS:
        return _MAPS[module, item](state, params)
    if (module, item) in _SUBNET_ITEMS and not params:
        return [(netuid, query(state, module, item, [netuid], block)) for netuid in state.netuids()]
    raise LookupError(f"the embedded chain holds no storage map {module}.{item}")


def runtime_call(state: State, api: str, method: str, params: Sequence[Any]) -> Any:
    """A runtime API's answer.

    Raises:
        LookupError: the embedded chain does not know this API.
    """
    known = _APIS.get((api, method))
    if known is None:
        raise LookupError(f"the embedded chain has no runtime API {api}.{method}")
    subnet = state.subnet(int(params[0]))
    return None if subnet is None else known(state, subnet)


# Storage.


def _commitment(fields: str, block: int) -> dict[str, Any]:
    return {"deposit": 0, "block": block, "info": {"fields": [_shown(field) for field in json.loads(fields)]}}


def _shown(field: dict[str, str]) -> dict[str, Any]:
    """A field as the codec decodes it."""
    ((variant, value),) = field.items()
    data = bytes.fromhex(value[2:])
    if variant == "BigRaw":
        try:
            return {variant: data.decode()}
        except UnicodeDecodeError:
            return {variant: value}
    return {variant: value if data else []}


def _commitment_of(state: State, params: Sequence[Any], _block: int) -> Any:
    row = state.execute(
        "SELECT fields, block FROM commitments WHERE netuid = ? AND hotkey = ?", (int(params[0]), params[1])
    ).fetchone()
    return None if row is None else _commitment(*row)


def _uid(state: State, params: Sequence[Any], _block: int) -> int | None:
    neuron = state.neuron(int(params[0]), str(params[1]))
    return None if neuron is None else neuron.uid


def _key(state: State, params: Sequence[Any], _block: int) -> str | None:
    found = state.scalar("SELECT hotkey FROM neurons WHERE netuid = ? AND uid = ?", (int(params[0]), int(params[1])))
    return None if found is None else str(found)


def _axon(neuron: NeuronRow) -> dict[str, Any]:
    return {
        "block": neuron.served_at,
        "version": neuron.version,
        "ip": int(neuron.ip),
        "port": neuron.port,
        "ip_type": neuron.ip_type,
        "protocol": neuron.protocol,
        "placeholder1": 0,
        "placeholder2": 0,
    }


def _axon_of(state: State, params: Sequence[Any], _block: int) -> Any:
    neuron = state.neuron(int(params[0]), str(params[1]))
    return None if neuron is None or not neuron.port else _axon(neuron)


def _row(table: str) -> Callable[[State, Sequence[Any], int], Any]:
    scale = U16_MAX if table == "bonds" else 1

    def read(state: State, params: Sequence[Any], _block: int) -> list[tuple[int, int]]:
        row = state.matrix(table, int(params[0])).get(int(params[1]), {})
        return [(uid, round(value * scale)) for uid, value in sorted(row.items())]

    return read


def _rows(table: str) -> Callable[[State, Sequence[Any]], list[tuple[Any, Any]]]:
    scale = U16_MAX if table == "bonds" else 1

    def read(state: State, params: Sequence[Any]) -> list[tuple[Any, Any]]:
        rows = state.matrix(table, int(params[0]))
        return [
            (uid, [(target, round(value * scale)) for target, value in sorted(row.items())])
            for uid, row in rows.items()
        ]

    return read


def _owner(state: State, params: Sequence[Any], _block: int) -> str | None:
    found = state.scalar("SELECT coldkey FROM owners WHERE hotkey = ?", (params[0],))
    return None if found is None else str(found)


def _timestamp(state: State, _params: Sequence[Any], block: int) -> int:
    return int(state.scalar("SELECT time_ms FROM blocks WHERE number = ?", (block,)))


def _hash_of(state: State, params: Sequence[Any], _block: int) -> str | None:
    return state.scalar("SELECT hash FROM blocks WHERE number = ?", (int(params[0]),))  # type: ignore[no-any-return]


def _pairs(sql: str) -> Callable[[State, Sequence[Any]], list[tuple[Any, Any]]]:
    def read(state: State, params: Sequence[Any]) -> list[tuple[Any, Any]]:
        return [(row[0], row[1]) for row in state.execute(sql, params)]

    return read


def _all_commitments(state: State, params: Sequence[Any]) -> list[tuple[Any, Any]]:
    rows = state.execute("SELECT hotkey, fields, block FROM commitments WHERE netuid = ?", (int(params[0]),))
    return [(hotkey, _commitment(fields, block)) for hotkey, fields, block in rows]


def _all_axons(state: State, params: Sequence[Any]) -> list[tuple[Any, Any]]:
    return [(neuron.hotkey, _axon(neuron)) for neuron in state.neurons(int(params[0])) if neuron.port]


def _weight_commits(state: State, params: Sequence[Any]) -> list[tuple[Any, Any]]:
    grouped: dict[int, list[tuple[str, int, str, int]]] = {}
    rows = state.execute(
        "SELECT epoch, hotkey, block, ciphertext, reveal_round FROM weight_commits WHERE netuid = ? ORDER BY id",
        (int(params[0]),),
    )
    for epoch, hotkey, block, ciphertext, reveal_round in rows:
        grouped.setdefault(epoch, []).append((hotkey, block, "0x" + ciphertext.hex(), reveal_round))
    return list(grouped.items())


_M = "SubtensorModule"

_CHAIN_ITEMS: dict[tuple[str, str], Callable[[State, Sequence[Any], int], Any]] = {
    ("System", "Number"): lambda state, params, block: block,
    ("System", "BlockHash"): _hash_of,
    ("Timestamp", "Now"): _timestamp,
    ("MevShield", "NextKey"): lambda state, params, block: None,
    (_M, "Uids"): _uid,
    (_M, "Keys"): _key,
    (_M, "Owner"): _owner,
    (_M, "Axons"): _axon_of,
    (_M, "Weights"): _row("weights"),
    (_M, "Bonds"): _row("bonds"),
    (_M, "IsNetworkMember"): lambda state, params, block: state.neuron(int(params[1]), str(params[0])) is not None,
    (_M, "SubnetworkN"): lambda state, params, block: len(state.neurons(int(params[0]))),
    ("Commitments", "CommitmentOf"): _commitment_of,
    ("Commitments", "RevealedCommitments"): lambda state, params, block: None,
}

_SUBNET_ITEMS: dict[tuple[str, str], Callable[[Subnet, int], Any]] = {
    (_M, "NetworksAdded"): lambda subnet, block: True,
    (_M, "SubnetOwner"): lambda subnet, block: subnet.owner_coldkey,
    (_M, "SubnetOwnerHotkey"): lambda subnet, block: subnet.owner_hotkey,
    (_M, "SubnetEpochConsensus"): lambda subnet, block: "Yuma",
    (_M, "Tempo"): lambda subnet, block: subnet.rules.tempo,
    (_M, "LastEpochBlock"): lambda subnet, block: subnet.last_epoch_block,
    (_M, "PendingEpochAt"): lambda subnet, block: 0,
    (_M, "SubnetEpochIndex"): lambda subnet, block: subnet.epoch_index,
    (_M, "BlocksSinceLastStep"): lambda subnet, block: block - subnet.last_epoch_block,
    (_M, "WeightsSetRateLimit"): lambda subnet, block: subnet.rules.weights_rate_limit,
    (_M, "ServingRateLimit"): lambda subnet, block: subnet.rules.serving_rate_limit,
    (_M, "CommitRevealWeightsEnabled"): lambda subnet, block: subnet.rules.commit_reveal,
    (_M, "RevealPeriodEpochs"): lambda subnet, block: subnet.rules.reveal_period_epochs,
    (_M, "MinAllowedWeights"): lambda subnet, block: subnet.rules.min_allowed_weights,
    (_M, "MaxWeightsLimit"): lambda subnet, block: subnet.rules.max_weight_limit,
    (_M, "WeightsVersionKey"): lambda subnet, block: subnet.rules.weights_version,
    (_M, "ImmunityPeriod"): lambda subnet, block: subnet.rules.immunity_period,
    (_M, "ActivityCutoff"): lambda subnet, block: subnet.rules.activity_cutoff,
    (_M, "MaxAllowedUids"): lambda subnet, block: subnet.rules.max_uids,
    (_M, "MaxAllowedValidators"): lambda subnet, block: subnet.rules.max_validators,
    (_M, "Burn"): lambda subnet, block: 0,
    (_M, "NetworkRegistrationAllowed"): lambda subnet, block: True,
    (_M, "CollateralLockShare"): lambda subnet, block: 0,
}

_COLUMNS: dict[tuple[str, str], Callable[[NeuronRow], Any]] = {
    (_M, "LastUpdate"): lambda neuron: neuron.last_update,
    (_M, "ValidatorPermit"): lambda neuron: bool(neuron.validator_permit),
    (_M, "Incentive"): lambda neuron: _u16(neuron.incentive),
    (_M, "Dividends"): lambda neuron: _u16(neuron.dividends),
    (_M, "Consensus"): lambda neuron: _u16(neuron.consensus),
    (_M, "ValidatorTrust"): lambda neuron: _u16(neuron.validator_trust),
    (_M, "Emission"): lambda neuron: neuron.emission,
}

_MAPS: dict[tuple[str, str], Callable[[State, Sequence[Any]], list[tuple[Any, Any]]]] = {
    (_M, "Uids"): _pairs("SELECT hotkey, uid FROM neurons WHERE netuid = ?"),
    (_M, "Keys"): _pairs("SELECT uid, hotkey FROM neurons WHERE netuid = ?"),
    (_M, "IsNetworkMember"): _pairs("SELECT netuid, 1 FROM neurons WHERE hotkey = ?"),
    (_M, "Owner"): _pairs("SELECT hotkey, coldkey FROM owners"),
    (_M, "Axons"): _all_axons,
    (_M, "Weights"): _rows("weights"),
    (_M, "Bonds"): _rows("bonds"),
    (_M, "TimelockedWeightCommits"): _weight_commits,
    ("Commitments", "CommitmentOf"): _all_commitments,
    ("Commitments", "RevealedCommitments"): lambda state, params: [],
}


# Runtime APIs.


def _u16(share: float) -> int:
    return round(share * U16_MAX)


def _metagraph(state: State, subnet: Subnet) -> dict[str, Any]:
    neurons = state.neurons(subnet.netuid)
    stakes = state.stakes(subnet.netuid)
    stake = [stakes.get(n.hotkey, 0) for n in neurons]
    head = state.head()
    best = max((n.incentive + n.dividends for n in neurons), default=0.0) or 1.0
    rules = subnet.rules
    return {
        "netuid": subnet.netuid,
        "name": list(b"embedded"),
        "symbol": list("α".encode()),
        "identity": None,
        "network_registered_at": subnet.registered_at,
        "owner_hotkey": subnet.owner_hotkey,
        "owner_coldkey": subnet.owner_coldkey,
        "block": head,
        "tempo": rules.tempo,
        "last_step": subnet.last_epoch_block,
        "blocks_since_last_step": head - subnet.last_epoch_block,
        "num_uids": len(neurons),
        "max_uids": rules.max_uids,
        "tao_in": RAO_PER_TOKEN,
        "alpha_in": RAO_PER_TOKEN,
        "moving_price": {"bits": 1 << 32},
        "min_allowed_weights": rules.min_allowed_weights,
        "max_weights_limit": rules.max_weight_limit,
        "weights_version": rules.weights_version,
        "weights_rate_limit": rules.weights_rate_limit,
        "activity_cutoff": rules.activity_cutoff,
        "immunity_period": rules.immunity_period,
        "max_validators": rules.max_validators,
        "commit_reveal_weights_enabled": rules.commit_reveal,
        "commit_reveal_period": rules.reveal_period_epochs,
        "hotkeys": [n.hotkey for n in neurons],
        "coldkeys": [n.coldkey for n in neurons],
        "identities": [None] * len(neurons),
        "axons": [_axon(n) for n in neurons],
        "active": [n.active(head, rules) for n in neurons],
        "validator_permit": [bool(n.validator_permit) for n in neurons],
        "pruning_score": [_u16((n.incentive + n.dividends) / best) for n in neurons],
        "last_update": [n.last_update for n in neurons],
        "emission": [n.emission for n in neurons],
        "dividends": [_u16(n.dividends) for n in neurons],
        "incentives": [_u16(n.incentive) for n in neurons],
        "consensus": [_u16(n.consensus) for n in neurons],
        "trust": [_u16(n.trust) for n in neurons],
        "rank": [_u16(n.rank) for n in neurons],
        "block_at_registration": [n.registered_at for n in neurons],
        "alpha_stake": stake,
        "tao_stake": [0] * len(neurons),
        "total_stake": stake,
    }


def _neurons(state: State, subnet: Subnet, *, lite: bool) -> list[dict[str, Any]]:
    stakes = state.stakes(subnet.netuid)
    weights = {} if lite else state.matrix("weights", subnet.netuid)
    bonds = {} if lite else state.matrix("bonds", subnet.netuid)
    head = state.head()
    found = []
    for neuron in state.neurons(subnet.netuid):
        record: dict[str, Any] = {
            "hotkey": neuron.hotkey,
            "coldkey": neuron.coldkey,
            "uid": neuron.uid,
            "netuid": subnet.netuid,
            "active": neuron.active(head, subnet.rules),
            "axon_info": _axon(neuron),
            "stake": [(neuron.coldkey, stakes.get(neuron.hotkey, 0))],
            "rank": _u16(neuron.rank),
            "emission": neuron.emission,
            "incentive": _u16(neuron.incentive),
            "consensus": _u16(neuron.consensus),
            "trust": _u16(neuron.trust),
            "validator_trust": _u16(neuron.validator_trust),
            "dividends": _u16(neuron.dividends),
            "last_update": neuron.last_update,
            "validator_permit": bool(neuron.validator_permit),
        }
        if not lite:
            record["weights"] = [(uid, int(value)) for uid, value in weights.get(neuron.uid, {}).items()]
            record["bonds"] = [(uid, _u16(value)) for uid, value in bonds.get(neuron.uid, {}).items()]
        found.append(record)
    return found


_APIS: dict[tuple[str, str], Callable[[State, Subnet], Any]] = {
    ("SubnetInfoRuntimeApi", "get_metagraph"): _metagraph,
    ("SubnetInfoRuntimeApi", "get_next_epoch_start_block"): lambda state, subnet: (
        subnet.last_epoch_block + subnet.rules.tempo
    ),
    ("NeuronInfoRuntimeApi", "get_neurons_lite"): lambda state, subnet: _neurons(state, subnet, lite=True),
    ("NeuronInfoRuntimeApi", "get_neurons"): lambda state, subnet: _neurons(state, subnet, lite=False),
}
