"""Every call of the embedded chain, and every reason for which it refuses one."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from template.chain.calls import compose, dispatch
from template.chain.faults import DispatchError
from tests.chain_fixture import NETUID, LocalChain, local_chain

VERSION = 5


@pytest.fixture
def net(tmp_path: Path) -> Iterator[LocalChain]:
    """Uids: 0 validator (permit), 1 miner, 2 rich but without a permit yet; head is block 1."""
    rules = {"weights_rate_limit": 4, "weights_version": VERSION, "serving_rate_limit": 3, "min_allowed_weights": 2}
    with local_chain(tmp_path, tempo=50, **rules) as made:
        made.register("validator", stake=5000)
        made.register("miner")
        made.produce()
        made.register("rich", stake=5000)
        made.produce(5)
        yield made


def apply(net: LocalChain, signer: str, module: str, function: str, **params: Any) -> None:
    with net.ledger.write() as state:
        dispatch(state, net.hotkey(signer), compose(module, function, params))


def set_weights(net: LocalChain, signer: str, row: dict[int, int], **changes: Any) -> None:
    params = {"netuid": NETUID, "mecid": 0, "dests": list(row), "weights": list(row.values()), "version_key": VERSION}
    apply(net, signer, "SubtensorModule", "set_mechanism_weights", **{**params, **changes})


def serve(net: LocalChain, signer: str = "miner", ip: str = "10.0.0.1", **changes: Any) -> None:
    address = ipaddress.ip_address(ip)
    params = {"netuid": NETUID, "version": 1, "ip": int(address), "port": 8091, "ip_type": address.version}
    params |= {"protocol": 4, "placeholder1": 0, "placeholder2": 0}
    apply(net, signer, "SubtensorModule", "serve_axon", **{**params, **changes})


def commit(net: LocalChain, signer: str, *fields: Any) -> None:
    apply(net, signer, "Commitments", "set_commitment", netuid=NETUID, info={"fields": list(fields)})


def refusal(run: Any, *args: Any, **kwargs: Any) -> str:
    with pytest.raises(DispatchError) as caught:
        run(*args, **kwargs)
    return caught.value.name


def test_weights_are_stored_max_upscaled(net: LocalChain) -> None:
    set_weights(net, "validator", {1: 100, 2: 50})
    with net.ledger.read() as state:
        assert state.matrix("weights", NETUID) == {0: {1: 65535, 2: 32768}}
        assert state.neurons(NETUID)[0].last_update == 7


@pytest.mark.parametrize(
    ("signer", "row", "changes", "name"),
    [
        ("stranger", {1: 1, 2: 1}, {}, "HotKeyNotRegisteredInSubNet"),
        ("validator", {1: 1, 2: 1}, {"netuid": 99}, "MechanismDoesNotExist"),
        ("validator", {1: 1, 2: 1}, {"mecid": 1}, "MechanismDoesNotExist"),
        ("miner", {0: 1, 2: 1}, {}, "NotEnoughStakeToSetWeights"),
        ("rich", {0: 1, 1: 1}, {}, "NeuronNoValidatorPermit"),
        ("validator", {1: 1, 2: 1}, {"version_key": VERSION - 1}, "IncorrectWeightVersionKey"),
        ("validator", {1: 1, 2: 1}, {"weights": [1]}, "WeightVecNotEqualSize"),
        ("validator", {}, {"dests": [1, 1], "weights": [1, 1]}, "DuplicateUids"),
        ("validator", {1: 1, 3: 1}, {}, "UidVecContainInvalidOne"),
        ("validator", {-1: 1, 1: 1}, {}, "UidVecContainInvalidOne"),
        ("validator", {0: 1, 1: 1, 2: 1, 3: 1}, {}, "UidsLengthExceedUidsInSubNet"),
        ("validator", {1: 1}, {}, "WeightVecLengthIsLow"),
        ("validator", {1: 0, 2: 0}, {}, "InvalidArgument"),
        ("validator", {1: 65536, 2: 1}, {}, "InvalidArgument"),
        ("validator", {1: -1, 2: 1}, {}, "InvalidArgument"),
        ("validator", {}, {"dests": "xy", "weights": [1, 1]}, "InvalidArgument"),
        ("validator", {}, {"dests": None}, "InvalidArgument"),
    ],
)
def test_weights_are_refused(net: LocalChain, signer: str, row: dict[int, int], changes: Any, name: str) -> None:
    assert refusal(set_weights, net, signer, row, **changes) == name
    with net.ledger.read() as state:
        assert state.matrix("weights", NETUID) == {}


def test_weights_wait_for_their_rate_limit(net: LocalChain) -> None:
    set_weights(net, "validator", {1: 1, 2: 1})
    net.produce(3)
    assert refusal(set_weights, net, "validator", {1: 2, 2: 1}) == "SettingWeightsTooFast"
    net.produce()
    set_weights(net, "validator", {1: 2, 2: 1})


def test_one_weight_may_not_hold_more_than_the_limit(net: LocalChain) -> None:
    net.ledger.set_rules(max_weight_limit=65535 // 2)
    assert refusal(set_weights, net, "validator", {1: 3, 2: 1}) == "MaxWeightExceeded"


def test_a_weight_to_itself_needs_no_permit_and_no_minimum(net: LocalChain) -> None:
    set_weights(net, "rich", {2: 1})
    with net.ledger.read() as state:
        assert state.matrix("weights", NETUID) == {2: {2: 65535}}


def test_weights_cannot_be_set_at_genesis(tmp_path: Path) -> None:
    with local_chain(tmp_path) as fresh:
        fresh.register("validator", stake=5000)
        fresh.register("miner")
        assert refusal(set_weights, fresh, "validator", {1: 1}) == "SettingWeightsTooFast"


def test_plain_weights_are_refused_where_commits_are_asked_for(net: LocalChain) -> None:
    net.ledger.set_rules(commit_reveal=True)
    assert refusal(set_weights, net, "validator", {1: 1, 2: 1}) == "CommitRevealEnabled"


@pytest.mark.parametrize(
    ("rules", "changes", "name"),
    [
        ({}, {}, "CommitRevealDisabled"),
        ({"commit_reveal": True}, {"commit_reveal_version": 3}, "IncorrectCommitRevealVersion"),
        ({"commit_reveal": True}, {"commit": "0x"}, "InvalidArgument"),
        ({"commit_reveal": True}, {"commit": "0x" + "00" * 5001}, "InvalidArgument"),
        ({"commit_reveal": True}, {"commit": "hello"}, "InvalidArgument"),
        ({"commit_reveal": True}, {"reveal_round": 2**70}, "InvalidArgument"),
        ({"commit_reveal": True}, {"mecid": 1}, "MechanismDoesNotExist"),
    ],
)
def test_timelocked_commits_are_refused(net: LocalChain, rules: Any, changes: Any, name: str) -> None:
    net.ledger.set_rules(**rules)
    params = {"netuid": NETUID, "mecid": 0, "commit": "0x01", "reveal_round": 9, "commit_reveal_version": 4} | changes
    function = "commit_timelocked_mechanism_weights"
    assert refusal(apply, net, "validator", "SubtensorModule", function, **params) == name


def test_timelocked_commits_wait_for_the_rate_limit_too(net: LocalChain) -> None:
    net.ledger.set_rules(commit_reveal=True)
    params = {"netuid": NETUID, "commit": b"\x01", "reveal_round": 9, "commit_reveal_version": 4}
    apply(net, "validator", "SubtensorModule", "commit_timelocked_weights", **params)
    name = refusal(apply, net, "validator", "SubtensorModule", "commit_timelocked_weights", **params)
    assert name == "CommittingWeightsTooFast"


@pytest.mark.parametrize("ip", ["127.0.0.1", "127.0.0.2", "10.1.2.3", "::1", "2001:db8::1"])
def test_an_axon_is_served_on_loopback_and_elsewhere(net: LocalChain, ip: str) -> None:
    serve(net, ip=ip)
    neuron = net.client().metagraph().neurons[1]
    assert (neuron.ip, neuron.port) == (str(ipaddress.ip_address(ip)), 8091)


@pytest.mark.parametrize(
    ("signer", "changes", "name"),
    [
        ("stranger", {}, "HotKeyNotRegisteredInNetwork"),
        ("miner", {"netuid": 99}, "SubnetNotExists"),
        ("miner", {"ip": "0.0.0.0"}, "InvalidIpAddress"),
        ("miner", {"ip": "255.255.255.255"}, "InvalidIpAddress"),
        ("miner", {"ip": "224.0.0.1"}, "InvalidIpAddress"),
        ("miner", {"port": 0}, "InvalidPort"),
        ("miner", {"port": 65536}, "InvalidPort"),
        ("miner", {"ip_type": 5}, "InvalidIpType"),
        ("miner", {"ip": "::1", "ip_type": 4, "port": 1}, None),
        ("miner", {"ip": "2001:db8::1", "ip_type": 4}, "InvalidArgument"),
    ],
)
def test_an_axon_is_refused(net: LocalChain, signer: str, changes: Any, name: str | None) -> None:
    if name is None:
        serve(net, signer, **changes)  # ::1 as a number is a valid if useless IPv4 address
        return
    assert refusal(serve, net, signer, **changes) == name


def test_serving_waits_for_its_rate_limit(net: LocalChain) -> None:
    serve(net)
    assert refusal(serve, net) == "ServingRateLimitExceeded"
    net.produce(3)
    serve(net, ip="10.0.0.2")


def test_a_reset_axon_is_withdrawn(net: LocalChain) -> None:
    serve(net)
    net.produce(3)
    serve(net, ip="0.0.0.0", port=1)
    assert net.client().metagraph().neurons[1].ip == ""


@pytest.mark.parametrize(
    ("signer", "fields", "name"),
    [
        ("stranger", [{"Raw1": "0x00"}], "AccountNotAllowedCommit"),
        ("miner", [{"Raw1": "0x00"}] * 4, "TooManyFieldsInCommitmentInfo"),
        ("miner", [{"Raw2": "0x00"}], "InvalidArgument"),
        ("miner", [{"Raw129": "0x" + "00" * 129}], "InvalidArgument"),
        ("miner", [{"BigRaw": "0x" + "00" * 513}], "InvalidArgument"),
        ("miner", [{"Sha256": "0x" + "00" * 32}], "InvalidArgument"),
        ("miner", ["None"], "InvalidArgument"),
        ("miner", [{"Raw1": "zz"}], "InvalidArgument"),
    ],
)
def test_a_commitment_is_refused(net: LocalChain, signer: str, fields: list[Any], name: str) -> None:
    assert refusal(commit, net, signer, *fields) == name
    assert net.client().commitments() == {}


def test_a_commitment_replaces_the_one_before_and_names_its_block(net: LocalChain) -> None:
    commit(net, "miner", {"Raw3": "0x616263"})
    net.produce()
    commit(net, "miner", {"BigRaw": "0x" + b"x".hex() * 200})
    found = net.client().commitments()
    assert [(c.block, c.data) for c in found.values()] == [(8, b"x" * 200)]


def test_commitments_have_a_budget_for_each_epoch(net: LocalChain) -> None:
    for _ in range(6):
        commit(net, "miner", {"BigRaw": "0x" + "00" * 512})  # 3,072 of 3,100 bytes
    assert refusal(commit, net, "miner", {"Raw1": "0x00"}) == "SpaceLimitExceeded"  # a byte is charged as 100
    net.produce(50)
    commit(net, "miner", {"Raw1": "0x00"})


@pytest.mark.parametrize(
    ("module", "function", "params"),
    [
        ("Balances", "transfer_all", {}),
        ("SubtensorModule", "burned_register", {"netuid": 1}),
        ("SubtensorModule", "burned_register", {"netuid": 1, "hotkey": "x", "more": 1}),
    ],
)
def test_an_unknown_call_or_argument_is_not_composed(module: str, function: str, params: dict[str, Any]) -> None:
    with pytest.raises(LookupError, match=r"has no call|takes"):
        compose(module, function, params)


def test_an_argument_that_cannot_be_encoded_is_not_composed() -> None:
    with pytest.raises(TypeError, match="cannot encode"):
        compose("SubtensorModule", "burned_register", {"netuid": 1, "hotkey": object()})


def test_registration_into_no_subnet_is_refused(net: LocalChain) -> None:
    params = {"netuid": 99, "hotkey": net.hotkey("new")}
    assert refusal(apply, net, "new", "SubtensorModule", "burned_register", **params) == "SubnetNotExists"
