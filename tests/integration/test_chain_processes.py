"""The embedded chain shared by real processes: concurrent writers, and a producer that is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from template.chain.client import Chain
from template.chain.ledger import LocalLedger
from tests.chain_fixture import NETUID, LocalChain, local_chain

DEADLINE_S = 60.0

WRITER = """
import sys
from template.chain.client import Chain
from tests.chain_fixture import dev_wallet

endpoint, name, num_commits = sys.argv[1], sys.argv[2], int(sys.argv[3])
with Chain(network="local", netuid=7, wallet=dev_wallet(name), chain_endpoint=endpoint) as chain:
    chain.register()
    for turn in range(num_commits):
        chain.commit(f"{name}-{turn}".encode())
        chain.block()
        chain.metagraph()
"""


@pytest.fixture
def net(tmp_path: Path) -> Iterator[LocalChain]:
    with local_chain(tmp_path, tempo=5, block_time_s=0.05) as made:
        yield made


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        time.sleep(0.02)


def run(*arguments: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen([sys.executable, *arguments], env=environment, text=True, **pipes)  # type: ignore[call-overload, no-any-return]


def producer(net: LocalChain, *flags: str) -> subprocess.Popen[str]:
    return run("-m", "template.chain.producer", "--db", str(net.ledger.path), *flags)


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    output, _ = process.communicate(timeout=DEADLINE_S)
    return process.returncode, output


def kill(process: subprocess.Popen[str], number: signal.Signals = signal.SIGKILL) -> tuple[int, str]:
    process.send_signal(number)
    return finish(process)


def test_a_killed_producer_stops_the_blocks_and_a_restart_goes_on(net: LocalChain) -> None:
    first = producer(net)
    try:
        until(lambda: net.ledger.head() >= 6)
        assert kill(first)[0] == -signal.SIGKILL
    finally:
        first.kill()
    head = net.ledger.head()
    before = [net.ledger.block_hash(number) for number in range(head + 1)]
    time.sleep(0.3)  # six block times: proof of absence needs time to pass
    assert net.ledger.head() == head

    second = producer(net)
    try:
        until(lambda: net.ledger.head() >= head + 3)
        rival = finish(producer(net))
        assert rival[0] == 2
        assert "another producer already runs" in rival[1]
        code, output = kill(second, signal.SIGTERM)
    finally:
        second.kill()
    assert code == 0, output
    assert [net.ledger.block_hash(number) for number in range(head + 1)] == before
    with LocalLedger(net.ledger.path) as again:
        assert again.head() >= head + 3


@pytest.mark.slow
def test_writers_in_several_processes_lose_nothing(net: LocalChain) -> None:
    # Two processes sign with one key. Even theirs stay within the bytes of one epoch.
    num_commits, names = 14, ["a", "b", "c", "shared", "shared"]
    clock = producer(net)
    writers = [run("-c", textwrap.dedent(WRITER), net.endpoint, name, str(num_commits)) for name in names]
    try:
        for writer in writers:
            code, output = finish(writer)
            assert code == 0, output
    finally:
        for process in [*writers, clock]:
            process.kill()
            process.communicate()
    with net.ledger.read() as state:
        rows = state.execute("SELECT signer, nonce, function, error FROM extrinsics ORDER BY signer, nonce").fetchall()
    commits = [row for row in rows if row[2] == "set_commitment"]
    assert {error for _, _, _, error in commits} == {""}
    assert len(commits) == num_commits * len(names)
    for name in set(names):
        signed = [nonce for signer, nonce, function, _ in commits if signer == net.hotkey(name)]
        assert signed == list(range(num_commits * names.count(name)))
    with Chain(network="local", netuid=NETUID, chain_endpoint=net.endpoint) as chain:
        graph = chain.metagraph()
        assert sorted(n.hotkey for n in graph.neurons) == sorted({net.hotkey(name) for name in names})
        assert set(chain.commitments()) == {net.hotkey(name) for name in names}


@pytest.mark.slow
def test_a_producer_killed_again_and_again_leaves_whole_epochs(net: LocalChain) -> None:
    for name in ("validator", "miner"):
        net.register(name, stake=5000 if name == "validator" else 0)
    for turn in range(6):
        head = net.ledger.head()
        process = producer(net, "--block-time", "0.0005")
        try:
            until(lambda head=head, turn=turn: net.ledger.head() > head + 7 * turn)  # type: ignore[misc]
            kill(process)
        finally:
            process.kill()
    with net.ledger.read() as state:
        head = state.head()
        assert state.scalar("SELECT COUNT(*) FROM blocks") == head + 1
        epochs = state.execute("SELECT epoch, block, COUNT(*) FROM payouts GROUP BY epoch ORDER BY epoch").fetchall()
    assert epochs == [(number, 5 * number, 2) for number in range(1, head // 5 + 1)]
