"""Real processes over real libp2p on loopback."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from averaging_peer import DEADLINE_S, SECTIONS, Key, make_vectors, weight

pytestmark = pytest.mark.slow

ELEMENTS = 213_120
PEER = Path(__file__).with_name("averaging_peer.py")


class Group:
    """Processes of one group, and the folder in which they meet."""

    def __init__(self, folder: Path, num_senders: int, num_peers: int, doomed: int = -1, frames: int = 0) -> None:
        self.folder = folder
        self.num_senders = num_senders
        self.peers = []
        for index in range(num_peers):
            with (folder / f"log-{index}").open("w") as log:
                numbers = [index, num_senders, num_peers, ELEMENTS, frames if index == doomed else 0]
                arguments = [str(folder), *(str(number) for number in numbers)]
                self.peers.append(subprocess.Popen([sys.executable, str(PEER), *arguments], stdout=log, stderr=log))

    def wait_for(self, *names: str, timeout_s: float = 100.0) -> None:
        deadline = time.monotonic() + timeout_s
        while not all((self.folder / name).exists() for name in names):
            for index, peer in enumerate(self.peers):
                if peer.poll() not in (None, 0, -signal.SIGKILL):
                    pytest.fail(f"peer {index} exited: {(self.folder / f'log-{index}').read_text()[-2000:]}")
            if time.monotonic() > deadline:
                pytest.fail(f"no {names} after {timeout_s} s")
            time.sleep(0.02)

    def start_round(self) -> None:
        self.wait_for(*(f"ready-{i}.json" for i in range(len(self.peers))))
        (self.folder / "go.json").write_text("{}")

    def outcome(self, index: int) -> dict[str, object]:
        self.wait_for(f"outcome-{index}.json")
        loaded: dict[str, object] = json.loads((self.folder / f"outcome-{index}.json").read_text())
        return loaded

    def close(self) -> None:
        for peer in self.peers:
            peer.kill()
            peer.wait()


@pytest.fixture
def groups(tmp_path: Path) -> Iterator[list[Group]]:
    started: list[Group] = []
    yield started
    for group in started:
        group.close()


def mean_bits(senders: list[int]) -> list[int]:
    total = torch.tensor(0.0)
    sums = {name: torch.zeros(ELEMENTS) for name in SECTIONS}
    for i in senders:
        total = total + weight(i)
        for name, vector in make_vectors(i, ELEMENTS).items():
            sums[name] = sums[name] + vector * weight(i)
    return [int((sums[name] / total).view(torch.int32).to(torch.int64).sum()) for name in SECTIONS]


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_three_members_and_a_validator_average_over_libp2p(groups: list[Group], tmp_path: Path) -> None:
    group = Group(tmp_path, num_senders=3, num_peers=4)
    groups.append(group)
    group.start_round()
    outcomes = [group.outcome(i) for i in range(4)]
    expected = mean_bits([0, 1, 2])
    for outcome in outcomes:
        assert outcome["complete"], outcome["faults"]
        assert outcome["faults"] == []
        assert outcome["bits"] == expected
        assert outcome["sha256"] == outcomes[0]["sha256"]
    for peer in group.peers:
        assert peer.wait(20) == 0, "a closed swarm lets its process end"
    for outcome in outcomes:
        assert not is_running(int(outcome["daemon"])), "and leaves no daemon"  # type: ignore[call-overload]


def test_member_killed_in_mid_round_is_left_out_and_its_daemon_dies_with_it(
    groups: list[Group], tmp_path: Path
) -> None:
    group = Group(tmp_path, num_senders=3, num_peers=4, doomed=1, frames=11)  # 9 to begin three streams, 12 to end them
    groups.append(group)
    group.wait_for(*(f"ready-{i}.json" for i in range(4)))
    victim = group.peers[1]
    children = [int(pid) for pid in Path(f"/proc/{victim.pid}/task/{victim.pid}/children").read_text().split()]
    assert children, "its libp2p daemon"
    group.start_round()
    assert victim.wait(60) == -signal.SIGKILL
    key = Key(2)
    outcomes = [group.outcome(i) for i in (0, 2, 3)]
    for outcome in outcomes:
        assert {hotkey for hotkey, _, _ in outcome["faults"]} == {key.hotkey}  # type: ignore[attr-defined]
        assert outcome["missing"] == [1]
        assert outcome["included"][key.hotkey] < 1.0  # type: ignore[index]
        assert outcome["sha256"] == outcomes[0]["sha256"]
        assert outcome["bits"] == outcomes[0]["bits"]
        assert outcome["seconds"] < DEADLINE_S  # type: ignore[operator]
    deadline = time.monotonic() + 10
    while any(is_running(pid) for pid in children) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(is_running(pid) for pid in children)
