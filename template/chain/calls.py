"""The extrinsics of the embedded chain: what a signed call changes, and why it may be refused.

Checks and error names follow the pallets (spec 461), so that the SDK and our client meet the same refusals as on
a real chain. One deliberate difference: 127.0.0.1 is accepted as a served ip, which mainnet refuses.
"""

from __future__ import annotations

import ipaddress
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from template.chain.faults import DispatchError
from template.chain.registration import register_neuron
from template.chain.state import RAO_PER_TOKEN, NeuronRow, State, Subnet

U16_MAX = 65535
MAX_COMMITMENT_FIELDS = 3
MAX_BIG_RAW_BYTES = 512
MAX_RAW_BYTES = 128
MAX_COMMITMENT_BYTES_PER_EPOCH = 3100
MIN_COMMITMENT_CHARGE_BYTES = 100
MAX_UNREVEALED_COMMITS = 10
MAX_COMMIT_BYTES = 5000


@dataclass(frozen=True, slots=True)
class LocalCall:
    """A composed call. ``data`` is its canonical encoding: what is signed and stored."""

    module: str
    function: str
    params: dict[str, Any]

    @property
    def data(self) -> bytes:
        """Canonical JSON, bytes as ``0x`` hex."""
        return json.dumps(
            [self.module, self.function, self.params], sort_keys=True, separators=(",", ":"), default=_plain
        ).encode()


def _plain(value: object) -> object:
    if isinstance(value, bytes | bytearray):
        return "0x" + bytes(value).hex()
    raise TypeError(f"cannot encode {type(value).__name__} in a call")


def compose(module: str, function: str, params: dict[str, Any]) -> LocalCall:
    """Check a call's name and argument names against what the embedded chain knows.

    Raises:
        LookupError: an unknown call, or a missing or unknown argument.
        TypeError: an argument that no call takes.
    """
    known = CALLS.get((module, function))
    if known is None:
        raise LookupError(f"the embedded chain has no call {module}.{function}")
    names = known[1]
    if set(params) != set(names):
        raise LookupError(f"{module}.{function} takes {', '.join(names)}; got {', '.join(params)}")
    call = LocalCall(module, function, dict(params))
    # A round trip through the encoding: what is applied is exactly what was signed.
    decoded = json.loads(call.data)
    return LocalCall(module, function, decoded[2])


def dispatch(state: State, signer: str, call: LocalCall) -> None:
    """Apply a call inside the caller's transaction.

    Raises:
        DispatchError: refused; the caller rolls back to before it.
    """
    try:
        CALLS[call.module, call.function][0](state, signer, call.params)
    except (TypeError, ValueError, KeyError, AttributeError, OverflowError) as exc:
        # A real node refuses such bytes while decoding them.
        raise DispatchError("InvalidArgument", f"{call.module}.{call.function}: malformed arguments: {exc!r}") from exc


def _subnet(state: State, netuid: int, error: str = "SubnetNotExists") -> Subnet:
    subnet = state.subnet(int(netuid))
    if subnet is None:
        raise DispatchError(error, f"subnet {netuid} does not exist")
    return subnet


def _neuron(state: State, netuid: int, hotkey: str, error: str = "HotKeyNotRegisteredInSubNet") -> NeuronRow:
    neuron = state.neuron(netuid, hotkey)
    if neuron is None:
        raise DispatchError(error, f"hotkey {hotkey} is not registered on subnet {netuid}")
    return neuron


def _burned_register(state: State, signer: str, params: dict[str, Any]) -> None:
    register_neuron(state, int(params["netuid"]), str(params["hotkey"]), signer)


def _serve_axon(state: State, signer: str, params: dict[str, Any]) -> None:
    subnet = _subnet(state, params["netuid"])
    neuron = _neuron(state, subnet.netuid, signer, "HotKeyNotRegisteredInNetwork")
    block, limit = state.pending(), subnet.rules.serving_rate_limit
    if limit and neuron.served_at and block - neuron.served_at < limit:
        raise DispatchError("ServingRateLimitExceeded", f"served {block - neuron.served_at} of {limit} blocks ago")
    ip, ip_type, port = int(params["ip"]), int(params["ip_type"]), int(params["port"])
    if ip_type not in (4, 6):
        raise DispatchError("InvalidIpType", f"ip_type must be 4 or 6, got {ip_type}")
    withdrawn = ip == 0 and port == 1  # what the SDK's ResetAxon sends
    address = ipaddress.IPv4Address(ip) if ip_type == 4 else ipaddress.IPv6Address(ip)
    if not withdrawn and (address.is_unspecified or address.is_multicast or int(address) == 0xFFFFFFFF):
        raise DispatchError("InvalidIpAddress", f"{address} cannot be served from")
    if not 0 < port <= U16_MAX:
        raise DispatchError("InvalidPort", f"port must be in 1..65535, got {port}")
    state.update_neuron(
        subnet.netuid,
        neuron.uid,
        ip=str(ip),
        ip_type=ip_type,
        port=port,
        protocol=int(params["protocol"]),
        version=int(params["version"]),
        served_at=block,
    )


def _set_mechanism_weights(state: State, signer: str, params: dict[str, Any]) -> None:
    if int(params["mecid"]) != 0:
        raise DispatchError("MechanismDoesNotExist", f"mechanism {params['mecid']} does not exist")
    _set_weights(state, signer, params)


def _set_weights(state: State, signer: str, params: dict[str, Any]) -> None:
    subnet = _subnet(state, params["netuid"], "MechanismDoesNotExist")
    if subnet.rules.commit_reveal:
        raise DispatchError("CommitRevealEnabled", f"subnet {subnet.netuid} takes timelocked commits only")
    neuron = _neuron(state, subnet.netuid, signer)
    uids, values = [int(uid) for uid in params["dests"]], [int(value) for value in params["weights"]]
    _check_may_weigh(state, subnet, neuron, "SettingWeightsTooFast")
    store_weights(state, subnet, neuron, uids, values, int(params["version_key"]))
    state.update_neuron(subnet.netuid, neuron.uid, last_update=state.pending())


def _check_may_weigh(state: State, subnet: Subnet, neuron: NeuronRow, too_fast: str) -> None:
    rules = subnet.rules
    stake = state.stake(subnet.netuid, neuron.hotkey) / RAO_PER_TOKEN
    if stake < rules.stake_threshold:
        raise DispatchError(
            "NotEnoughStakeToSetWeights",
            f"{neuron.hotkey} has stake {stake:g}, the threshold is {rules.stake_threshold:g}",
        )
    if not state.pending():
        raise DispatchError(too_fast, "weights can be set from block 1 on")  # LastUpdate 0 means never
    since = state.pending() - neuron.last_update
    if rules.weights_rate_limit and neuron.last_update and since < rules.weights_rate_limit:
        raise DispatchError(too_fast, f"last set {since} blocks ago, the limit is {rules.weights_rate_limit}")


def store_weights(
    state: State, subnet: Subnet, neuron: NeuronRow, uids: list[int], values: list[int], version_key: int
) -> None:
    """Check a weight vector and store it, max-upscaled to u16.

    Raises:
        DispatchError: the first check that fails, by its pallet name.
    """
    rules = subnet.rules
    if version_key < rules.weights_version:
        raise DispatchError(
            "IncorrectWeightVersionKey", f"version_key {version_key} is older than {rules.weights_version}"
        )
    if len(uids) != len(values):
        raise DispatchError("WeightVecNotEqualSize", f"{len(uids)} uids but {len(values)} weights")
    num_neurons = len(state.neurons(subnet.netuid))
    if len(uids) > num_neurons:
        raise DispatchError("UidsLengthExceedUidsInSubNet", f"{len(uids)} weights for {num_neurons} neurons")
    if len(set(uids)) != len(uids):
        raise DispatchError("DuplicateUids", "a uid appears twice")
    if any(not 0 <= uid < num_neurons for uid in uids):
        raise DispatchError("UidVecContainInvalidOne", f"uids must be in 0..{num_neurons - 1}, got {sorted(uids)}")
    if any(not 0 <= value <= U16_MAX for value in values) or not any(values):
        raise DispatchError("InvalidArgument", "weights must be u16 and not all zero")
    to_self = uids == [neuron.uid]
    if not to_self and not neuron.validator_permit:
        raise DispatchError("NeuronNoValidatorPermit", f"uid {neuron.uid} holds no validator permit")
    if not to_self and len(uids) < rules.min_allowed_weights:
        raise DispatchError("WeightVecLengthIsLow", f"{len(uids)} weights, at least {rules.min_allowed_weights} needed")
    if not to_self and max(values) * U16_MAX > rules.max_weight_limit * sum(values):
        raise DispatchError("MaxWeightExceeded", f"one weight is more than {rules.max_weight_limit}/65535 of the row")
    top = max(values)
    row = {uid: round(value * U16_MAX / top) for uid, value in zip(uids, values, strict=True)}
    state.set_row("weights", subnet.netuid, neuron.uid, {uid: value for uid, value in row.items() if value})


def _commit_timelocked(state: State, signer: str, params: dict[str, Any]) -> None:
    if int(params.get("mecid", 0)) != 0:
        raise DispatchError("MechanismDoesNotExist", f"mechanism {params['mecid']} does not exist")
    subnet = _subnet(state, params["netuid"], "MechanismDoesNotExist")
    if not subnet.rules.commit_reveal:
        raise DispatchError("CommitRevealDisabled", f"subnet {subnet.netuid} takes plain weights")
    if int(params["commit_reveal_version"]) != 4:
        raise DispatchError(
            "IncorrectCommitRevealVersion", f"version 4 expected, got {params['commit_reveal_version']}"
        )
    neuron = _neuron(state, subnet.netuid, signer)
    _check_may_weigh(state, subnet, neuron, "CommittingWeightsTooFast")
    ciphertext = _bytes(params["commit"])
    if not 0 < len(ciphertext) <= MAX_COMMIT_BYTES:
        raise DispatchError("InvalidArgument", f"a commit has 1 to {MAX_COMMIT_BYTES} bytes, got {len(ciphertext)}")
    unrevealed = state.scalar(
        "SELECT COUNT(*) FROM weight_commits WHERE netuid = ? AND hotkey = ?", (subnet.netuid, signer)
    )
    if unrevealed >= MAX_UNREVEALED_COMMITS:
        raise DispatchError("TooManyUnrevealedCommits", f"{unrevealed} commits are not revealed yet")
    state.execute(
        "INSERT INTO weight_commits (netuid, epoch, hotkey, block, ciphertext, reveal_round) VALUES (?, ?, ?, ?, ?, ?)",
        (subnet.netuid, subnet.epoch_index, signer, state.pending(), ciphertext, int(params["reveal_round"])),
    )
    state.update_neuron(subnet.netuid, neuron.uid, last_update=state.pending())


def _set_commitment(state: State, signer: str, params: dict[str, Any]) -> None:
    subnet = _subnet(state, params["netuid"])
    _neuron(state, subnet.netuid, signer, "AccountNotAllowedCommit")
    fields = params["info"]["fields"]
    if not isinstance(fields, list) or len(fields) > MAX_COMMITMENT_FIELDS:
        raise DispatchError("TooManyFieldsInCommitmentInfo", f"at most {MAX_COMMITMENT_FIELDS} fields")
    charge = max(sum(len(field_bytes(field)) for field in fields), MIN_COMMITMENT_CHARGE_BYTES)
    previous = state.execute(
        "SELECT usage_epoch, used_bytes FROM commitments WHERE netuid = ? AND hotkey = ?", (subnet.netuid, signer)
    ).fetchone()
    used = previous[1] if previous is not None and previous[0] == subnet.epoch_index else 0
    if used + charge > MAX_COMMITMENT_BYTES_PER_EPOCH:
        raise DispatchError(
            "SpaceLimitExceeded", f"{used} + {charge} bytes in this epoch, {MAX_COMMITMENT_BYTES_PER_EPOCH} allowed"
        )
    state.execute(
        "INSERT OR REPLACE INTO commitments VALUES (?, ?, ?, ?, ?, ?)",
        (subnet.netuid, signer, state.pending(), json.dumps(fields), subnet.epoch_index, used + charge),
    )


def field_bytes(field: Any) -> bytes:
    """The bytes of one plain commitment field: ``{"Raw<N>": ...}`` of exactly N <= 128, or ``{"BigRaw": ...}``.

    Raises:
        DispatchError: another variant or size.
    """
    (variant, value), *others = field.items()
    data = _bytes(value)
    if variant == "BigRaw":
        valid = len(data) <= MAX_BIG_RAW_BYTES
    else:
        valid = variant == f"Raw{len(data)}" and len(data) <= MAX_RAW_BYTES
    if others or not valid:
        raise DispatchError("InvalidArgument", f"{variant} with {len(data)} bytes is no commitment field")
    return data


def _bytes(value: Any) -> bytes:
    if not isinstance(value, str) or not value.startswith("0x"):
        raise ValueError(f"bytes must be 0x hex, got {value!r:.40}")
    return bytes.fromhex(value[2:])


_WEIGHTS = ("netuid", "dests", "weights", "version_key")
_COMMIT = ("netuid", "commit", "reveal_round", "commit_reveal_version")

CALLS: dict[tuple[str, str], tuple[Callable[[State, str, dict[str, Any]], None], tuple[str, ...]]] = {
    ("SubtensorModule", "burned_register"): (_burned_register, ("netuid", "hotkey")),
    ("SubtensorModule", "serve_axon"): (
        _serve_axon,
        ("netuid", "version", "ip", "port", "ip_type", "protocol", "placeholder1", "placeholder2"),
    ),
    ("SubtensorModule", "set_weights"): (_set_weights, _WEIGHTS),
    ("SubtensorModule", "set_mechanism_weights"): (_set_mechanism_weights, (*_WEIGHTS, "mecid")),
    ("SubtensorModule", "commit_timelocked_weights"): (_commit_timelocked, _COMMIT),
    ("SubtensorModule", "commit_timelocked_mechanism_weights"): (_commit_timelocked, (*_COMMIT, "mecid")),
    ("Commitments", "set_commitment"): (_set_commitment, ("netuid", "info")),
}
"""Every call that the embedded chain knows: how it is applied, and its arguments' names."""
