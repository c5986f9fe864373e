"""Real processes over real libp2p on loopback, one of which fails in every way that needs no actor's script."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from averaging_peer import BAD, DEADLINE_S, SECTIONS, Key, make_vectors, weight

pytestmark = pytest.mark.slow

ELEMENTS = 213_120
PEER = Path(__file__).with_name("averaging_peer.py")
BLAME = {
    "absent": {"absent"},
    "nan": {"not_finite"},
    "1e30": {"out_of_bound"},
    "wrong average": {"wrong_average"},
    "refuses everyone": {"absent"},
    "too few batches": {"late", "absent"},
    "other bytes": {"not_committed", "absent"},
    "stopped": {"late", "absent"},
    "killed": {"late", "absent"},
}


class Group:
    """Processes of one group, and the folder in which they meet."""

    def __init__(self, folder: Path, num_senders: int, num_peers: int, faults: Sequence[str]) -> None:
        self.folder = folder
        self.peers = []
        for index in range(num_peers):
            with (folder / f"log-{index}").open("w") as log:
                numbers = [str(number) for number in (index, num_senders, num_peers, ELEMENTS)]
                command = [sys.executable, str(PEER), str(folder), *numbers, ",".join(faults)]
                self.peers.append(subprocess.Popen(command, stdout=log, stderr=log))

    def wait_for(self, *names: str, timeout_s: float = 100.0) -> None:
        deadline = time.monotonic() + timeout_s
        while not all((self.folder / name).exists() for name in names):
            for index, peer in enumerate(self.peers):
                if peer.poll() not in (None, 0, -signal.SIGKILL):
                    pytest.fail(f"peer {index} exited: {(self.folder / f'log-{index}').read_text()[-2000:]}")
            if time.monotonic() > deadline:
                pytest.fail(f"no {names} after {timeout_s} s")
            time.sleep(0.02)

    def start_round(self, number: int, members: Sequence[int]) -> None:
        self.wait_for(*(f"ready-{number}-{i}.json" for i in members))
        go = self.folder / f"go-{number}.json"
        go.with_suffix(".tmp").write_text("{}")
        go.with_suffix(".tmp").rename(go)

    def outcomes(self, number: int, members: Sequence[int]) -> list[dict[str, Any]]:
        names = [f"outcome-{number}-{i}.json" for i in members]
        self.wait_for(*names)
        return [json.loads((self.folder / name).read_text()) for name in names]

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
        for name, vector in make_vectors(i, ELEMENTS, "none").items():
            sums[name] = sums[name] + vector * weight(i)
    return [int((sums[name] / total).view(torch.int32).to(torch.int64).sum()) for name in SECTIONS]


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.timeout(300)  # ten rounds of four processes
def test_group_averages_over_libp2p_whatever_one_member_does(groups: list[Group], tmp_path: Path) -> None:
    faults = ["none", *BLAME]  # the one that is killed comes last
    group = Group(tmp_path, num_senders=3, num_peers=4, faults=faults)
    groups.append(group)
    victim, honest, bad = group.peers[BAD], [i for i in range(4) if i != BAD], Key(BAD + 1).hotkey
    for number, fault in enumerate(faults):
        group.start_round(number, range(4))
        outcomes = group.outcomes(number, honest)
        for outcome in outcomes:
            assert outcome["complete"], (fault, outcome["faults"])
            assert outcome["sha256"] == outcomes[0]["sha256"], fault
            assert outcome["bits"] == outcomes[0]["bits"], fault
            assert outcome["seconds"] < DEADLINE_S, fault
            assert {hotkey for hotkey, _, _ in outcome["faults"]} <= {bad, ""}, fault
        seen = {kind for outcome in outcomes for hotkey, kind, _ in outcome["faults"] if hotkey == bad}
        if fault == "none":
            assert all(outcome["faults"] == [] for outcome in outcomes)
            assert outcomes[0]["bits"] == mean_bits([0, 1, 2])
            assert group.outcomes(number, [BAD])[0]["sha256"] == outcomes[0]["sha256"]
        else:
            assert seen, fault
            assert seen <= BLAME[fault], fault
        if fault == "absent":
            assert outcomes[0]["bits"] == mean_bits([0, 2])
        if fault == "killed":
            assert victim.wait(60) == -signal.SIGKILL
        else:
            if fault == "stopped":
                victim.send_signal(signal.SIGCONT)
            group.outcomes(number, [BAD])
    ends = [f"end-{i}.json" for i in honest]
    group.wait_for(*ends)
    for i in honest:
        assert group.peers[i].wait(20) == 0, "a closed swarm lets its process end"
    daemons = [int(json.loads((tmp_path / name).read_text())["daemon"]) for name in ends]
    assert not any(is_running(pid) for pid in daemons), "and leaves no daemon"


def test_daemon_of_a_killed_member_dies_with_it(groups: list[Group], tmp_path: Path) -> None:
    group = Group(tmp_path, num_senders=2, num_peers=2, faults=["killed"])
    groups.append(group)
    group.wait_for("ready-0-0.json", "ready-0-1.json")
    victim = group.peers[BAD]
    children = [int(pid) for pid in Path(f"/proc/{victim.pid}/task/{victim.pid}/children").read_text().split()]
    assert children, "its libp2p daemon"
    victim.kill()
    assert victim.wait(60) == -signal.SIGKILL
    deadline = time.monotonic() + 10
    while any(is_running(pid) for pid in children) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(is_running(pid) for pid in children)
