"""What a run says at its end where nothing was averaged: the likely cause and what mends it."""

from __future__ import annotations

import dataclasses
import logging
import re
import types

import pytest

from hivetrain.trainer.callback import SwarmCallback
from hivetrain.trainer.rounds import RoundReport, RunReport

ALONE = RunReport(
    rounds=4, averaged=0, epoch=4, joined=False, most_peers=1, samples=400, target_batch_size=96, matchmaking_s=5.0
)


@pytest.mark.parametrize(
    ("change", "cause", "fix"),
    [
        ({}, "not one of 4 rounds.*nobody else took part", "Others join with the line.*PEERS.*the same run_id"),
        ({"most_peers": 3}, "3 peers were there: they found no group", r"Raise matchmaking_time \(now 5 s\)"),
        (
            {"rounds": 0, "epoch": 0, "samples": 40},
            "our 40 samples and those of 0 other peers did not make target_batch_size = 96",
            "Lower it, raise max_steps",
        ),
        ({"rounds": 0, "epoch": 4, "joined": True}, "came too late.*state of epoch 4", "Join earlier"),
        ({"rounds": 0, "epoch": 0, "joined": True}, "without one round", "raise max_steps"),
    ],
    ids=["nobody came", "no group", "too few samples", "too late", "joined, too few samples"],
)
def test_a_run_without_an_averaged_round_names_the_cause_and_the_fix(
    change: dict[str, int], cause: str, fix: str
) -> None:
    problem = dataclasses.replace(ALONE, **change).problem()  # type: ignore[arg-type]
    assert problem is not None
    assert re.search(f"{cause}.*{fix}", problem), problem


def test_a_run_with_one_averaged_round_has_no_problem() -> None:
    assert dataclasses.replace(ALONE, averaged=1).problem() is None


class Trainer:
    """What the callback asks of a trainer."""

    def __init__(self) -> None:
        self.rounds: list[RoundReport] = []
        self.waited_for: list[int] = []
        self.session = types.SimpleNamespace(
            adopt_state=lambda: None,
            await_peers=lambda least, is_stopped: self.waited_for.append(least),
            epoch=0,
            swarm_epochs=9,
        )
        self.interrupted = False
        self.callback_handler = types.SimpleNamespace(callbacks=[])

    def log(self, metrics: dict[str, float]) -> None: ...

    def run_report(self, rounds: int, averaged: int) -> RunReport:
        return dataclasses.replace(ALONE, rounds=rounds, averaged=averaged)


@pytest.mark.parametrize("peers", [1, 2])
def test_the_log_says_so_at_the_end_of_training(peers: int, caplog: pytest.LogCaptureFixture) -> None:
    trainer = Trainer()
    callback, control = SwarmCallback(trainer), types.SimpleNamespace(should_training_stop=False)
    args = types.SimpleNamespace(min_peers=3)
    callback.on_train_begin(args, None, control)
    for epoch, members in ((1, 1), (2, peers)):
        trainer.rounds.append(RoundReport(epoch=epoch, peers=members, samples=96, seconds=0.1, sent_bytes=0))
        callback.on_step_end(args, None, control)
    callback.on_step_end(args, None, control)
    assert trainer.waited_for == [3], "once"
    with caplog.at_level(logging.WARNING):
        callback.on_train_end(None, None, control)
    assert ("not one of 2 rounds" in caplog.text) == (peers == 1)
