"""The facade that the neurons use, over the embedded chain and over endpoints that do not answer."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hivetrain.errors import ChainError, ConfigError
from template.chain.client import Chain, Metagraph, NeuronInfo
from template.chain.keys import load_wallet
from tests.chain_fixture import NETUID, LocalChain, local_chain


@pytest.fixture
def net(tmp_path: Path) -> Iterator[LocalChain]:
    with local_chain(tmp_path, tempo=10, weights_rate_limit=3) as made:
        made.register("validator", stake=5000)
        made.register("miner")
        made.produce()
        yield made


def test_a_neuron_registers_serves_commits_and_is_seen(net: LocalChain) -> None:
    chain = net.client("new")
    assert chain.register() == 2
    chain.serve("127.0.0.2", 8091)
    chain.commit(b"hello")
    graph = net.client().metagraph()
    seen = graph.by_hotkey(net.hotkey("new"))
    assert seen is not None
    assert (seen.uid, seen.ip, seen.port, seen.registered_at) == (2, "127.0.0.2", 8091, 2)
    assert seen.coldkey == net.wallet("new").coldkeypub.ss58_address
    assert not seen.validator_permit
    assert seen.active
    assert net.client().commitments()[net.hotkey("new")].data == b"hello"


def test_a_wallet_from_disk_does_the_same(net: LocalChain) -> None:
    wallet = load_wallet("disk", "default", net.folder / "wallets", create=True)
    with Chain(network="local", netuid=NETUID, wallet=wallet, chain_endpoint=net.endpoint) as chain:
        assert chain.register() == 2
        chain.commit(b"from disk")
        assert chain.commitments()[wallet.hotkey.ss58_address].data == b"from disk"


def test_registering_again_gives_the_same_uid(net: LocalChain) -> None:
    chain = net.client("new")
    assert chain.register() == chain.register() == 2
    assert len(chain.metagraph().neurons) == 3


def test_a_registration_that_somebody_else_made_meanwhile_counts(
    net: LocalChain, monkeypatch: pytest.MonkeyPatch
) -> None:
    chain = net.client("new")
    look = chain._uid

    def first_look_then_the_other_process_registers(hotkey: str) -> int | None:
        found = look(hotkey)
        net.register("new")
        return found

    monkeypatch.setattr(chain, "_uid", first_look_then_the_other_process_registers)
    assert chain.register() == 2


def test_a_refused_registration_is_a_chain_error(net: LocalChain) -> None:
    net.ledger.set_rules(max_uids=2)
    with pytest.raises(ChainError, match="within their immunity period"):
        net.client("new").register()


def test_serving_the_same_address_again_sends_nothing(net: LocalChain) -> None:
    net.ledger.set_rules(serving_rate_limit=1000)
    chain = net.client("miner")
    chain.serve("127.0.0.1", 9000)
    chain.serve("127.0.0.1", 9000)
    with pytest.raises(ChainError, match="served 0 of 1000 blocks ago"):
        chain.serve("127.0.0.1", 9001)


def test_weights_come_back_as_shares(net: LocalChain) -> None:
    net.register("third")
    chain = net.client("validator")
    chain.set_weights({1: 3.0, 2: 1.0}, version_key=1)
    assert chain.weights() == {0: {1: pytest.approx(0.75, abs=1e-4), 2: pytest.approx(0.25, abs=1e-4)}}
    assert chain.blocks_since_last_update(0) == 0
    net.produce(3)
    assert chain.blocks_since_last_update(0) == 2
    assert (chain.tempo(), chain.weights_rate_limit()) == (10, 3)


def test_blocks_and_hashes(net: LocalChain) -> None:
    chain = net.client()
    assert chain.block() == 1
    net.produce()
    assert chain.block() == 2
    assert chain.block_hash(2) == net.ledger.block_hash(2)
    with pytest.raises(ChainError, match="block 3 does not exist"):
        chain.block_hash(3)


@pytest.mark.parametrize("data", [b"", b"a", b"\x00" * 128, b"t" * 129, bytes(range(256)) * 2, "ä".encode() * 200])
def test_commitments_of_every_size_come_back(net: LocalChain, data: bytes) -> None:
    chain = net.client("miner")
    chain.commit(data)
    found = chain.commitments()[net.hotkey("miner")]
    assert (found.data, found.block) == (data, 2)


def test_a_commitment_that_is_too_long_is_a_value_error(net: LocalChain) -> None:
    with pytest.raises(ValueError, match="at most 512 bytes, got 513"):
        net.client("miner").commit(b"x" * 513)


def test_a_commitment_names_a_block_whose_hash_was_unknown(net: LocalChain) -> None:
    net.client("miner").commit(b"x")
    block = net.client().commitments()[net.hotkey("miner")].block
    with pytest.raises(ChainError, match="does not exist"):
        net.client().block_hash(block)


@pytest.mark.parametrize(
    "act",
    [
        lambda chain: chain.serve("127.0.0.1", 9000),
        lambda chain: chain.commit(b"x"),
        lambda chain: chain.set_weights({1: 1.0}, version_key=1),
    ],
)
def test_a_stranger_is_told_to_register(net: LocalChain, act: Any) -> None:
    with pytest.raises(ConfigError, match="register the hotkey first"):
        act(net.client("stranger"))


@pytest.mark.parametrize(
    "act",
    [
        lambda chain: chain.register(),
        lambda chain: chain.serve("127.0.0.1", 9000),
        lambda chain: chain.commit(b"x"),
        lambda chain: chain.set_weights({1: 1.0}, version_key=1),
    ],
)
def test_acting_needs_a_wallet(net: LocalChain, act: Any) -> None:
    with pytest.raises(ConfigError, match=r"--wallet\.name"):
        act(net.client())


def test_setting_weights_too_soon_is_a_chain_error(net: LocalChain) -> None:
    chain = net.client("validator")
    chain.set_weights({1: 1.0}, version_key=1)
    with pytest.raises(ChainError, match="rate limit is 3 blocks"):
        chain.set_weights({1: 1.0}, version_key=1)


def test_weights_without_stake_are_a_chain_error(net: LocalChain) -> None:
    with pytest.raises(ChainError, match="the threshold is 1000"):
        net.client("miner").set_weights({0: 1.0}, version_key=1)


def test_an_old_version_key_is_a_config_error(net: LocalChain) -> None:
    net.ledger.set_rules(weights_version=9)
    with pytest.raises(ConfigError, match="update it"):
        net.client("validator").set_weights({1: 1.0}, version_key=8)
    net.client("validator").set_weights({1: 1.0}, version_key=9)


@pytest.mark.parametrize("weights", [{}, {1: 0.0}, {1: -1.0}, {1: float("nan")}, {1: float("inf")}])
def test_impossible_weights_are_a_value_error(net: LocalChain, weights: dict[int, float]) -> None:
    with pytest.raises(ValueError, match="weight"):
        net.client("validator").set_weights(weights, version_key=1)


@pytest.mark.parametrize(("ip", "port"), [("localhost", 1), ("", 1), ("127.0.0.1", 0), ("127.0.0.1", 65536)])
def test_an_impossible_address_is_a_config_error(net: LocalChain, ip: str, port: int) -> None:
    with pytest.raises(ConfigError, match=r"--axon\.external_"):
        net.client("miner").serve(ip, port)


def test_an_unknown_uid_is_a_chain_error(net: LocalChain) -> None:
    with pytest.raises(ChainError, match="has no uid 5"):
        net.client().blocks_since_last_update(5)


def test_registered_by_leaves_out_who_came_later() -> None:
    def neuron(uid: int, registered_at: int) -> NeuronInfo:
        scores = {"incentive": 0.0, "dividends": 0.0, "emission": 0.0, "stake": 0.0}
        place = {"ip": "", "port": 0, "coldkey": "c", "validator_permit": False, "active": True, "last_update": 0}
        return NeuronInfo(uid=uid, hotkey=f"h{uid}", registered_at=registered_at, **scores, **place)  # type: ignore[arg-type]

    graph = Metagraph(netuid=1, block=9, neurons=(neuron(0, 5), neuron(1, 9), neuron(2, 4)))
    assert [n.uid for n in graph.registered_by(5)] == [0, 2]
    assert graph.by_hotkey("h1") is graph.neurons[1]
    assert graph.by_hotkey("h9") is None


def test_threads_share_one_facade(net: LocalChain) -> None:
    chain = net.client("miner")
    errors: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for turn in range(5):
                chain.commit(f"{number}-{turn}".encode())
                assert chain.block() == 1
                assert len(chain.metagraph().neurons) == 2
        except BaseException as exc:
            errors.append(exc)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    with net.ledger.read() as state:
        rows = state.execute("SELECT nonce, error FROM extrinsics ORDER BY nonce").fetchall()
    assert rows == [(nonce, "") for nonce in range(30)]


def test_a_chain_must_be_started_and_can_be_closed_twice(net: LocalChain) -> None:
    chain = Chain(network="local", netuid=NETUID, chain_endpoint=net.endpoint)
    with pytest.raises(ChainError, match=r"start\(\) first"):
        chain.block()
    chain.start()
    chain.start()
    assert chain.block() == 1
    chain.close()
    chain.close()
    with pytest.raises(ChainError, match=r"start\(\) first"):
        chain.block()
    chain.start()
    assert chain.block() == 1
    chain.close()


@pytest.mark.parametrize(
    ("network", "endpoint", "message"),
    [
        ("nonsense", None, "Unknown network"),
        ("finney", "sqlite:///tmp/x.db", "needs --subtensor.network local"),
        ("local", "sqlite://relative/x.db", "sqlite:///ABSOLUTE/PATH"),
        ("local", "http://127.0.0.1:1", "Unknown network"),
    ],
)
def test_an_endpoint_that_cannot_work_is_a_config_error(network: str, endpoint: str | None, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Chain(network=network, netuid=1, chain_endpoint=endpoint).start()


def test_a_subnet_that_does_not_exist_is_a_config_error(net: LocalChain) -> None:
    with pytest.raises(ConfigError, match="has no subnet 99; check --netuid"):
        Chain(network="local", netuid=99, chain_endpoint=net.endpoint).start()


@pytest.mark.parametrize("content", [None, b"", b"garbage" * 1000])
def test_a_missing_or_broken_chain_is_one_clear_line(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "chain.db"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ChainError) as caught:
        Chain(network="local", netuid=1, chain_endpoint=f"sqlite://{path}").start()
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_chain_that_breaks_while_open_is_a_chain_error(net: LocalChain) -> None:
    chain = net.client(timeout_s=2)
    net.produce(3)
    with net.ledger.write() as state:
        state.execute("DROP TABLE commitments")
    with pytest.raises(ChainError, match="no such table"):
        chain.commitments()


def test_a_refused_connection_is_a_chain_error() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    with pytest.raises(ChainError, match=r"cannot be reached|did not answer"):
        Chain(network=f"ws://127.0.0.1:{port}", netuid=1, timeout_s=3).start()


def test_a_node_that_accepts_and_stays_silent_is_given_up() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        began = time.monotonic()
        with pytest.raises(ChainError, match=r"did not answer within 0\.5 s"):
            Chain(network="local", netuid=1, chain_endpoint=f"ws://127.0.0.1:{port}", timeout_s=0.5).start()
        assert time.monotonic() - began < 10
