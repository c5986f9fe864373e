"""Timelocked weights, opened offline with a beacon signature that drand published long ago.

The signature is quicknet's for round 1000, https://api.drand.sh/52db9ba70e0cc0f6eaf7803dd07447a1f5477735fd3f661792ba94600c84e971/public/1000
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import bittensor as bt
import bittensor_core
import pytest

from hivetrain.errors import ChainError
from template.chain.reveal import reveal_commits
from tests.chain_fixture import NETUID, LocalChain, local_chain

ROUND = 1000
SIGNATURE = "b44679b9a59af2ec876b1a6b1ad52ea9b1615fc3982b19576350f93447cb1125e342b73a8dd2bacbe47e4b6b63ed5e39"
ROUND_AT_S = 1692803367 + 3 * (ROUND - 1)  # quicknet's genesis, a round every 3 s
BLOCKS_TO_REVEAL = 12


@pytest.fixture
def net(tmp_path: Path) -> Iterator[LocalChain]:
    with local_chain(tmp_path, commit_reveal=True, weights_rate_limit=0) as made:
        made.register("validator", stake=5000)
        made.register("miner")
        made.register("other")
        made.produce()
        yield made


def commit_for_round_1000(net: LocalChain, name: str, uids: list[int], values: list[int], signed_for: str = "") -> None:
    """Commit as the SDK does, with a block time that lands the reveal in the past, and submit it."""
    public_key = bytes(net.wallet(signed_for or name).hotkey.public_key)
    for offset_s in range(-12, 13):
        ciphertext, reveal_round = bittensor_core.get_encrypted_commit_v2(
            uids=uids,
            weights=values,
            version_key=1,
            last_epoch_block=0,
            pending_epoch_at=0,
            subnet_epoch_index=0,
            tempo=10,
            blocks_since_last_step=0,
            current_block=1,
            subnet_reveal_period_epochs=1,
            block_time=(ROUND_AT_S + offset_s - time.time()) / BLOCKS_TO_REVEAL,
            hotkey=public_key,
        )
        if reveal_round == ROUND:
            break
    else:
        raise AssertionError("no block time reaches round 1000")
    submit(net, name, bytes(ciphertext))


def submit(net: LocalChain, name: str, ciphertext: bytes, reveal_round: int = ROUND) -> None:
    call = bt.calls.SubtensorModule.commit_timelocked_mechanism_weights(
        netuid=NETUID, mecid=0, commit=ciphertext, reveal_round=reveal_round, commit_reveal_version=4
    )
    chain = net.client(name)
    wallet = net.wallet(name)
    chain._connection.write("committing weights", lambda client: client.submit_call(call, wallet, signer="hotkey"))


def num_stored(net: LocalChain) -> int:
    with net.ledger.read() as state:
        return int(state.scalar("SELECT COUNT(*) FROM weight_commits"))


def test_committed_weights_take_effect_when_the_round_is_signed(net: LocalChain) -> None:
    commit_for_round_1000(net, "validator", [1, 2], [65535, 21845])
    assert net.client().weights() == {}
    assert reveal_commits(net.ledger, NETUID, ROUND, SIGNATURE) == 1
    assert net.client().weights() == {0: {1: pytest.approx(0.75), 2: pytest.approx(0.25)}}
    assert num_stored(net) == 0


def test_a_wrong_signature_opens_nothing_and_drops_nothing(net: LocalChain) -> None:
    commit_for_round_1000(net, "validator", [1], [65535])
    with pytest.raises(ValueError, match="not the signature of round 1000"):
        reveal_commits(net.ledger, NETUID, ROUND, "00" * 48)
    with pytest.raises(ValueError, match="not the signature of round 1001"):
        reveal_commits(net.ledger, NETUID, ROUND + 1, SIGNATURE)
    assert num_stored(net) == 1


def test_a_commit_made_for_another_hotkey_is_dropped(net: LocalChain) -> None:
    commit_for_round_1000(net, "validator", [1], [65535], signed_for="other")
    assert reveal_commits(net.ledger, NETUID, ROUND, SIGNATURE) == 0
    assert net.client().weights() == {}
    assert num_stored(net) == 0


def test_a_commit_that_does_not_open_is_dropped(net: LocalChain) -> None:
    submit(net, "validator", b"\x00" * 200)
    assert reveal_commits(net.ledger, NETUID, ROUND, SIGNATURE) == 0
    assert num_stored(net) == 0


def test_a_commit_with_an_impossible_row_is_dropped(net: LocalChain) -> None:
    commit_for_round_1000(net, "validator", [1, 77], [65535, 1])
    assert reveal_commits(net.ledger, NETUID, ROUND, SIGNATURE) == 0
    assert net.client().weights() == {}


def test_the_sdk_commits_by_itself_when_the_subnet_asks_for_it(net: LocalChain) -> None:
    chain = net.client("validator")
    chain.set_weights({1: 1.0}, version_key=1)
    assert chain.weights() == {}
    pending = chain._connection.read(lambda client: client.weights.timelocked_weight_commits(netuid=NETUID))
    ((commit,),) = pending.values()
    assert commit["hotkey"] == net.hotkey("validator")
    assert commit["reveal_round"] > ROUND
    assert chain.blocks_since_last_update(0) == 0


def test_at_most_ten_commits_wait(net: LocalChain) -> None:
    for _ in range(10):
        submit(net, "validator", b"\x01" * 100)
    with pytest.raises(ChainError, match="10 commits are not revealed"):
        submit(net, "validator", b"\x01" * 100)
