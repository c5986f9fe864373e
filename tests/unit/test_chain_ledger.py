"""The embedded chain's ledger: genesis, blocks, epochs, replacement, and the producer's pace."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from hivetrain.errors import ChainError
from template.chain import ledger as ledger_module
from template.chain.ledger import LocalLedger, create_local_chain
from template.chain.producer import main, produce
from template.chain.state import RAO_PER_TOKEN, State
from tests.chain_fixture import NETUID, LocalChain, local_chain


@pytest.fixture
def net(tmp_path: Path) -> Iterator[LocalChain]:
    with local_chain(tmp_path, tempo=10) as made:
        yield made


def permits(net: LocalChain) -> list[bool]:
    with net.ledger.read() as state:
        return [bool(neuron.validator_permit) for neuron in state.neurons(NETUID)]


def test_blocks_advance_by_one_with_hashes_that_differ(net: LocalChain) -> None:
    hashes = [net.ledger.block_hash(0)]
    for number in (1, 2, 3):
        assert net.ledger.produce_block() == number
        hashes.append(net.ledger.block_hash(number))
    assert net.ledger.head() == 3
    assert len(set(hashes)) == 4
    assert all(value is not None and len(value) == 66 and value.startswith("0x") for value in hashes)
    assert net.ledger.block_hash(4) is None


def test_two_chains_have_different_hashes(tmp_path: Path) -> None:
    with local_chain(tmp_path / "a") as one, local_chain(tmp_path / "b") as two:
        one.produce()
        two.produce()
        assert one.ledger.block_hash(0) != two.ledger.block_hash(0)
        assert one.ledger.block_hash(1) != two.ledger.block_hash(1)


def test_a_second_handle_sees_the_same_chain(net: LocalChain) -> None:
    net.produce(2)
    with LocalLedger(net.ledger.path) as other:
        assert other.head() == 2
        assert other.block_hash(2) == net.ledger.block_hash(2)


def test_genesis_registrations_belong_to_block_zero_and_later_ones_to_the_pending_block(net: LocalChain) -> None:
    net.register("early")
    net.produce(3)
    net.register("late")
    with net.ledger.read() as state:
        assert [neuron.registered_at for neuron in state.neurons(NETUID)] == [0, 4]


def test_permits_follow_stake_at_genesis_and_at_the_epoch_later(net: LocalChain) -> None:
    net.register("validator", stake=5000)
    net.register("poor", stake=999)
    assert permits(net) == [True, False]
    net.produce()
    net.ledger.fund(net.hotkey("poor"), 2)
    assert permits(net) == [True, False]
    net.produce(9)
    assert permits(net) == [True, True]


def test_only_so_many_validators_hold_a_permit(tmp_path: Path) -> None:
    with local_chain(tmp_path, max_validators=2) as net:
        for name, stake in (("a", 2000), ("b", 3000), ("c", 1500)):
            net.register(name, stake=stake)
        assert permits(net) == [True, True, False]


def test_consensus_runs_once_at_each_tempo(net: LocalChain) -> None:
    net.register("validator", stake=5000)
    net.register("miner")
    net.produce()
    net.client("validator").set_weights({1: 1.0}, version_key=1)
    net.produce(8)
    assert net.client().metagraph().neurons[1].incentive == 0.0
    net.produce()  # block 10
    graph = net.client().metagraph()
    assert graph.block == 10
    assert graph.neurons[1].incentive == 1.0
    assert graph.neurons[0].dividends == 1.0
    # 10 blocks of one token, less the owner's 18%, half by incentive: 4.1
    assert graph.neurons[1].emission == pytest.approx(4.1)
    net.produce(9)
    assert net.ledger.incentive_paid()[net.hotkey("miner")] == pytest.approx(1.0)
    net.produce()  # block 20
    assert net.ledger.incentive_paid()[net.hotkey("miner")] == pytest.approx(2.0)
    with net.ledger.read() as state:
        subnet = state.subnet(NETUID)
        assert subnet is not None
        assert (subnet.last_epoch_block, subnet.epoch_index) == (20, 2)


def test_an_epoch_that_fails_leaves_no_block_behind(net: LocalChain, monkeypatch: pytest.MonkeyPatch) -> None:
    net.produce(9)

    def broken(*_: object) -> bool:
        raise RuntimeError("in mid-epoch")

    monkeypatch.setattr(ledger_module.epoch, "run_if_due", broken)
    with pytest.raises(RuntimeError, match="mid-epoch"):
        net.ledger.produce_block()
    assert net.ledger.head() == 9


def test_weights_older_than_a_registration_are_not_the_newcomers(tmp_path: Path) -> None:
    with local_chain(tmp_path, tempo=4, max_uids=3, immunity_period=2, weights_rate_limit=0) as net:
        net.register("validator", stake=5000)
        net.register("good")
        net.register("bad")
        net.produce()
        validator = net.client("validator")
        validator.set_weights({1: 0.9, 2: 0.1}, version_key=1)
        net.produce(3)
        assert net.register("newcomer") == 2  # least paid
        net.produce(4)
        graph = validator.metagraph()
        assert graph.neurons[2].hotkey == net.hotkey("newcomer")
        assert graph.neurons[2].incentive == 0.0
        assert graph.neurons[1].incentive == 1.0
        validator.set_weights({1: 0.5, 2: 0.5}, version_key=1)
        net.produce(4)
        assert validator.metagraph().neurons[2].incentive == pytest.approx(0.5, abs=1e-4)


def test_the_least_paid_neuron_outside_immunity_is_replaced(tmp_path: Path) -> None:
    with local_chain(tmp_path, tempo=4, max_uids=3, immunity_period=6, weights_rate_limit=0) as net:
        net.register("validator", stake=5000)
        net.register("paid")
        net.produce()
        net.client("validator").set_weights({1: 1.0}, version_key=1)
        net.produce(3)
        assert net.register("immune") == 2  # registered in block 5, unpaid
        net.produce(4)
        # Paid nothing, but immune: of the other two, the miner's half equals the validator's; older uid first.
        victim = net.register("newcomer")
        assert victim == 0
        assert net.client().metagraph().by_hotkey(net.hotkey("validator")) is None


def test_a_full_subnet_of_immune_neurons_refuses(tmp_path: Path) -> None:
    with local_chain(tmp_path, max_uids=2, immunity_period=50) as net:
        net.register("a")
        net.register("b")
        net.produce()
        with pytest.raises(ChainError, match="within their immunity period"):
            net.register("c")
        assert len(net.client().metagraph().neurons) == 2


def test_registering_twice_gives_the_same_uid(net: LocalChain) -> None:
    assert net.register("a") == net.register("a") == 0


def test_another_coldkey_cannot_take_a_hotkey(net: LocalChain) -> None:
    net.register("a")
    with net.ledger.write() as state:
        state.execute("DELETE FROM neurons")
    with pytest.raises(ChainError, match="belongs to coldkey"):
        net.ledger.register(net.hotkey("a"), net.hotkey("b"))


def test_a_failed_transaction_leaves_nothing(net: LocalChain) -> None:
    def half() -> None:
        with net.ledger.write() as state:
            state.set_setting("half", "done")
            raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        half()
    with net.ledger.read() as state:
        assert state.setting("half") == ""


def test_rules_change_and_persist(net: LocalChain) -> None:
    net.ledger.set_rules(weights_version=9)
    with LocalLedger(net.ledger.path) as other, other.read() as state:
        subnet = state.subnet(NETUID)
        assert subnet is not None
        assert subnet.rules.weights_version == 9
        assert subnet.rules.tempo == 10
    with pytest.raises(ValueError, match="tempo must be at least 1"):
        net.ledger.set_rules(tempo=0)


@pytest.mark.parametrize("stake", [0.0, -1.0, float("nan"), float("inf")])
def test_impossible_stake_is_refused(net: LocalChain, stake: float) -> None:
    with pytest.raises(ValueError, match="stake must be finite"):
        net.ledger.fund(net.hotkey("a"), stake)


def test_stake_adds_up_in_rao(net: LocalChain) -> None:
    net.ledger.fund(net.hotkey("a"), 0.1)
    net.ledger.fund(net.hotkey("a"), 0.2)
    with net.ledger.read() as state:
        assert state.stake(NETUID, net.hotkey("a")) == round(0.3 * RAO_PER_TOKEN)


def test_an_existing_file_is_never_overwritten(net: LocalChain) -> None:
    with pytest.raises(ChainError, match="already at"):
        create_local_chain(net.ledger.path, netuid=NETUID)
    assert [path.name for path in net.folder.iterdir() if path.name.startswith(".")] == []


def test_a_missing_chain_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(ChainError, match="hivetrain up"):
        LocalLedger(tmp_path / "none.db")
    assert not (tmp_path / "none.db").exists()


@pytest.mark.parametrize("content", [b"", b"not a database, but long enough to be looked at" * 40])
def test_a_file_that_is_no_chain_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "chain.db"
    path.write_bytes(content)
    with pytest.raises(ChainError, match="is not a local chain"):
        LocalLedger(path)


def test_another_applications_database_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.db"
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE blocks (number INTEGER)")
    connection.close()
    with pytest.raises(ChainError, match="is not a local chain"):
        LocalLedger(path)


@pytest.mark.parametrize(
    "options",
    [{"netuid": 0}, {"netuid": 70000}, {"block_time_s": 0}, {"tempo": 0}, {"kappa": 0}, {"max_weight_limit": 0}],
)
def test_impossible_genesis_is_refused(tmp_path: Path, options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must be"):
        create_local_chain(tmp_path / "chain.db", **{"netuid": 1, **options})  # type: ignore[arg-type]
    assert not (tmp_path / "chain.db").exists()


def test_a_closed_ledger_says_so(net: LocalChain) -> None:
    net.ledger.close()
    net.ledger.close()
    with pytest.raises(ChainError, match="is closed"):
        net.ledger.head()


def test_threads_share_one_ledger(net: LocalChain) -> None:
    def work() -> None:
        for _ in range(20):
            net.ledger.produce_block()
            net.ledger.head()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert net.ledger.head() == 80
    with net.ledger.read() as state:
        assert State.scalar(state, "SELECT COUNT(*) FROM blocks") == 81


def test_the_producer_keeps_its_pace_and_does_not_catch_up_after_a_stall(net: LocalChain) -> None:
    now = 100.0
    waits: list[float] = []
    stalls = {2: 30.0}  # after the third wait the machine sleeps for half a minute

    def wait(seconds: float) -> bool:
        nonlocal now
        waits.append(seconds)
        now += seconds + stalls.get(len(waits) - 1, 0.0)
        return len(waits) > 6

    assert produce(net.ledger, 2.0, wait, lambda: now) == 6
    # Three waits of 2 s; the stall makes the next block due at once; then the pace is 2 s again.
    assert waits == [2.0, 2.0, 2.0, 0.0, 2.0, 2.0, 2.0]
    assert net.ledger.head() == 6


def test_the_producer_refuses_a_missing_chain(tmp_path: Path) -> None:
    assert main(["--db", str(tmp_path / "none.db")]) == 1


def test_the_producer_refuses_an_impossible_block_time(tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--db", str(tmp_path / "none.db"), "--block-time", "0"])
    assert stopped.value.code == 2
