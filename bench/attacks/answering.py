"""Cheats in what a miner answers to a challenge: nothing, too late, or what it computed only when it was asked."""

from __future__ import annotations

from bench.attacks.cheat import Cheat, Kind, Scene, in_windows
from bench.attacks.training import Invented
from hivetrain.training.inner import RoundWork
from hivetrain.verification.receipt import encode_snapshot
from template.protocol import Train, TrainReply


class Refuses(Invented):
    """No work: commits noise, and says no to every challenge."""

    def answer(self, request: Train, honest: TrainReply) -> TrainReply | None:
        return honest.model_copy(update={"status": "refused", "openings": (), "remainder": None})


class AnswersLate(Invented):
    """No work: commits noise, and answers when the time for checks is over."""

    def answer(self, request: Train, honest: TrainReply) -> TrainReply | None:
        return None


class WorksOnDemand(Invented):
    """Trains nothing, commits noise, and computes what is asked once it is asked."""

    def __init__(self, name: str, what: str) -> None:
        super().__init__(name, what)
        self._scene: Scene | None = None

    def train(self, scene: Scene) -> RoundWork:
        self._scene = scene
        return super().train(scene)

    def answer(self, request: Train, honest: TrainReply) -> TrainReply | None:
        assert self._scene is not None
        ends = self._scene.steps()
        last = max(request.snapshots)
        computed = in_windows(self._scene, dict.fromkeys(range(last + 1, len(ends)), 0)).snapshots
        openings = tuple(
            opening.model_copy(update={"payload": encode_snapshot(computed[opening.index]).payload})
            for opening in honest.openings
        )
        return honest.model_copy(update={"openings": openings})


class Sleeper(Cheat):
    """Works until it has been challenged, then does as ``resting`` does until it is challenged again.

    It cannot know when it will be drawn, but it knows when it was.
    """

    kind = Kind.PART

    def __init__(self, name: str, what: str, resting: Cheat) -> None:
        super().__init__(name, what)
        self.resting: Cheat = resting
        self._rests = self._challenged = False

    def train(self, scene: Scene) -> RoundWork:
        self._rests, self._challenged = self._rests is not self._challenged, False
        return self.resting.train(scene) if self._rests else super().train(scene)

    def answer(self, request: Train, honest: TrainReply) -> TrainReply | None:
        self._challenged = True
        return self.resting.answer(request, honest) if self._rests else honest
