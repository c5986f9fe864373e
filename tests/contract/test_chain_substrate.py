"""bittensor's `Substrate` protocol: what the SDK itself needs of the embedded chain."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import bittensor as bt
import pytest

from template.chain.local import LocalSubstrate
from tests.chain_fixture import NETUID, LocalChain, local_chain

Use = Callable[[Callable[[Any], Awaitable[Any]]], Any]


@pytest.fixture
def net(tmp_path: Path) -> Iterator[LocalChain]:
    with local_chain(tmp_path, tempo=10) as made:
        made.register("validator", stake=5000)
        made.register("miner")
        made.produce(2)
        yield made


@pytest.fixture
def use(net: LocalChain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Use:
    """Runs a coroutine function on a connected `bt.Client` over the embedded chain."""
    monkeypatch.setenv("BTCLI_TOKEN_SYMBOLS_CACHE", str(tmp_path / "symbols.json"))

    def run(op: Callable[[Any], Awaitable[Any]]) -> Any:
        async def body() -> Any:
            async with bt.Client("local", substrate=LocalSubstrate(net.ledger.path)) as client:
                return await op(client)

        return asyncio.run(body())

    return run


METHODS = [name for name, member in vars(bt.Substrate).items() if inspect.isfunction(member) and name[0] != "_"]


@pytest.mark.parametrize("implementation", [LocalSubstrate, bt.RpcSubstrate])
@pytest.mark.parametrize("name", METHODS)
def test_every_method_of_the_protocol_is_there_with_its_arguments(implementation: type, name: str) -> None:
    wanted = inspect.signature(getattr(bt.Substrate, name)).parameters
    offered = inspect.signature(getattr(implementation, name)).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in offered.values())
    missing = [key for key, p in wanted.items() if key not in offered and not (takes_any and p.kind is p.KEYWORD_ONLY)]
    assert missing == []


def test_connecting_writes_nothing_outside_the_chain(use: Use, tmp_path: Path) -> None:
    use(lambda client: client.block())
    assert not (tmp_path / "symbols.json").exists()


def test_epoch_status(use: Use, net: LocalChain) -> None:
    net.produce(10)  # block 12; the epoch ran at 10
    status = use(lambda client: client.epochs.epoch_status(netuid=NETUID))
    assert status["tempo"] == 10
    assert status["last_epoch_block"] == 10
    assert status["epoch_index"] == 1
    assert status["blocks_since_last_step"] == 2
    assert status["next_epoch_start_block"] == 20
    assert status["blocks_remaining"] == 8
    assert status["seconds_remaining"] == 8.0


def test_the_sdks_metagraph_carries_commitments_and_stake(use: Use, net: LocalChain) -> None:
    net.client("miner").commit(b"hello")
    graph = use(lambda client: client.subnets.metagraph(netuid=NETUID))
    assert len(graph) == graph.num_uids == 2
    assert graph.block == 2
    assert [n.uid for n in graph.validators] == [0]
    assert graph.neuron(0).total_stake.rao == 5000 * 10**9
    miner = graph.by_hotkey(net.hotkey("miner"))
    assert miner is not None
    assert (miner.commitment.value, miner.commitment.block, miner.commitment.status) == ("hello", 3, "plain")


def test_neurons_with_weights_and_bonds(use: Use, net: LocalChain) -> None:
    net.client("validator").set_weights({1: 1.0}, version_key=1)
    net.produce(10)
    neurons = use(lambda client: client.neurons.all(netuid=NETUID, lite=False))
    assert [n.uid for n in neurons] == [0, 1]
    assert neurons[0].raw["weights"] == [(1, 65535)]
    assert neurons[0].raw["bonds"] == [(1, 65535)]
    bonds = use(lambda client: client.weights.bonds(netuid=NETUID))
    assert bonds[0] == {1: 1.0}


def test_a_commitment_by_hotkey_and_by_map(use: Use, net: LocalChain) -> None:
    net.client("miner").commit(b"org/repo@abc")
    hotkey = net.hotkey("miner")
    one = use(lambda client: client.identity.commitment(netuid=NETUID, hotkey_ss58=hotkey))
    assert (one.data, one.block) == ("org/repo@abc", 3)
    listed = use(lambda client: client.subnets.commitments(netuid=NETUID))
    assert listed[hotkey].uid == 1


def test_waiting_for_a_block(use: Use, net: LocalChain) -> None:
    async def wait(client: Any) -> int:
        waiting = asyncio.create_task(client.wait_for_block(4, timeout=20))
        while not waiting.done():
            net.ledger.produce_block()
            await asyncio.sleep(0.01)
        return (await waiting).number

    assert use(wait) >= 4


def test_a_block_shows_its_extrinsics_and_its_parent(use: Use, net: LocalChain) -> None:
    net.client("miner").commit(b"x")
    net.produce()
    info = use(lambda client: client.block_info(3))
    (extrinsic,) = info.extrinsics
    assert extrinsic["address"] == net.hotkey("miner")
    assert extrinsic["call"]["call_function"] == "set_commitment"
    assert info.hash == net.ledger.block_hash(3)
    assert info.header["parentHash"] == net.ledger.block_hash(2)


def test_the_sdk_raises_the_real_codes_before_signing(use: Use, net: LocalChain) -> None:
    net.client("validator").set_weights({1: 1.0}, version_key=1)
    intent = bt.SetWeights(netuid=NETUID, weights={1: 1.0}, version_key=1)
    for name, code in (("validator", bt.ErrorCode.RATE_LIMITED), ("stranger", bt.ErrorCode.NOT_REGISTERED)):
        wallet = net.wallet(name)
        with pytest.raises(bt.ChainError) as caught:
            use(lambda client, wallet=wallet: client.execute(intent, wallet))
        assert caught.value.code is code


def test_a_refused_call_is_a_failed_receipt_that_uses_its_nonce(use: Use, net: LocalChain) -> None:
    call = bt.calls.SubtensorModule.burned_register(netuid=99, hotkey=net.hotkey("new"))
    wallet = net.wallet("new")
    result = use(lambda client: client.submit_call(call, wallet))
    assert not result.success
    assert result.error.name == "SubnetNotExists"
    assert result.error.code is bt.ErrorCode.SUBNET_NOT_EXISTS
    substrate = LocalSubstrate(net.ledger.path)

    async def nonce() -> int:
        await substrate.connect()
        try:
            return await substrate.account_next_index(wallet.coldkey.ss58_address)
        finally:
            await substrate.close()

    assert asyncio.run(nonce()) == 1


def test_a_receipt_names_its_block_and_can_be_found_there(use: Use, net: LocalChain) -> None:
    call = bt.calls.Commitments.set_commitment(netuid=NETUID, info={"fields": [{"Raw1": "0x01"}]})
    wallet = net.wallet("miner")
    result = use(lambda client: client.submit_call(call, wallet, signer="hotkey"))
    assert (result.success, result.extrinsic_id, result.fee.rao) == (True, "3-0000", 0)
    net.produce()
    with net.ledger.read() as state:
        digest = state.scalar("SELECT hash FROM extrinsics")

    async def find(client: Any) -> Any:
        block_hash = await client._substrate.block_hash(3)
        return await client._substrate.find_extrinsic(digest, block_hash)

    assert use(find).success


def test_a_key_that_cannot_sign_changes_nothing(use: Use, net: LocalChain) -> None:
    public = type(net.wallet("miner").hotkey)(ss58_address=net.hotkey("miner"))
    call = bt.calls.Commitments.set_commitment(netuid=NETUID, info={"fields": [{"Raw1": "0x01"}]})
    with pytest.raises(bt.ChainError, match="cannot sign"):
        use(lambda client: client.submit_call(call, public, signer="hotkey"))
    assert net.client().commitments() == {}


def test_a_signature_of_somebody_else_is_refused(use: Use, net: LocalChain) -> None:
    class Impostor:
        ss58_address = net.hotkey("miner")
        public_key = net.wallet("miner").hotkey.public_key
        crypto_type = 1
        ss58_format = 42

        def sign(self, payload: bytes) -> bytes:
            return bytes(net.wallet("validator").hotkey.sign(payload))

    call = bt.calls.Commitments.set_commitment(netuid=NETUID, info={"fields": [{"Raw1": "0x01"}]})
    result = use(lambda client: client.submit_call(call, Impostor(), signer="hotkey"))
    assert not result.success
    assert "signature does not verify" in result.message
    assert net.client().commitments() == {}


def test_a_pinned_nonce_is_used_once(net: LocalChain) -> None:
    async def body() -> tuple[Any, Any]:
        substrate = LocalSubstrate(net.ledger.path)
        await substrate.connect()
        try:
            fields = {"fields": [{"Raw1": "0x01"}]}
            call = await substrate.compose(bt.calls.Commitments.set_commitment(netuid=NETUID, info=fields))
            key = net.wallet("miner").hotkey
            return await substrate.submit(call, key, nonce=0), await substrate.submit(call, key, nonce=0)
        finally:
            await substrate.close()

    first, second = asyncio.run(body())
    assert first.success
    assert not second.success
    assert "outdated" in second.message


@pytest.mark.parametrize(
    "op",
    [
        lambda client: client.query(("SubtensorModule", "NoSuchItem"), [NETUID]),
        lambda client: client.query_map(("SubtensorModule", "NoSuchItem"), [NETUID]),
        lambda client: client.runtime(("NoApi", "no_method"), [NETUID]),
        lambda client: client.constant(("Balances", "ExistentialDeposit")),
        lambda client: client.decode_scale("Call", b""),
        lambda client: client.compose(("Balances", "transfer_all", {})),
    ],
)
def test_what_the_embedded_chain_does_not_hold_is_an_sdk_error(use: Use, op: Any) -> None:
    with pytest.raises(bt.ChainError, match="embedded chain"):
        use(op)


def test_a_missing_chain_is_a_connection_error(tmp_path: Path) -> None:
    with pytest.raises(bt.RpcConnectionError, match="no chain at"):
        asyncio.run(LocalSubstrate(tmp_path / "none.db").connect())


def test_reading_before_connecting_is_an_sdk_error(net: LocalChain) -> None:
    with pytest.raises(bt.ConnectionNotReady):
        asyncio.run(LocalSubstrate(net.ledger.path).block_number())
