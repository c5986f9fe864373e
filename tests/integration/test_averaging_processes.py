"""Real processes over real libp2p on loopback, one of which fails in every way that needs no actor's script."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from bench.faults import CASES, SENDER, VALIDATOR, Group, group_of, judge

pytestmark = pytest.mark.slow

NAMES = {
    "no fault": "int4",
    "joins no round": "fp32",
    "nan": "int4",
    "1e30": "fp32",
    "wrong average": "int4",
    "refuses everyone": "fp32",
    "too few batches": "fp32",
    "other bytes": "int4",
    "outsider": "fp32",
    "two groups at once": "int4",
    "stopped": "fp32",
    "killed in the exchange": "fp32",
}
"""Faults and the codecs that they meet here; `bench.faults` runs all of them with both."""


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def daemon_of(group: Group, index: int) -> list[int]:
    pid = group.peers[index].pid
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.timeout(300)  # twelve rounds of four processes
def test_group_averages_over_libp2p_whatever_one_member_does() -> None:
    cases = [(case, NAMES[case.name]) for case in CASES if case.name in NAMES and case.bad != VALIDATOR]
    assert len(cases) == len(NAMES)
    with group_of(cases) as group:
        for number, (case, codec) in enumerate(cases):
            verdict = judge(case, group.round(number))
            assert verdict.wrong == [], f"{case.name}, {codec}"
        daemons = group.daemons()
        for index, peer in group.peers.items():
            if index != SENDER:
                assert peer.wait(20) == 0, "a closed swarm lets its process end"
        assert not any(is_running(pid) for pid in daemons), "and leaves no daemon"


def test_daemon_of_a_killed_member_dies_with_it() -> None:
    with group_of([(CASES[0], "fp32")]) as group:
        group.wait_for("ready-0-0.json", "ready-0-1.json")
        children = daemon_of(group, SENDER)
        assert children, "its libp2p daemon"
        group.peers[SENDER].kill()
        group.peers[SENDER].wait(60)
        deadline = time.monotonic() + 10
        while any(is_running(pid) for pid in children) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not any(is_running(pid) for pid in children)
