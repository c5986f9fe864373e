"""Every cheat by the name that `hivetrain up --attack` takes."""

from __future__ import annotations

from collections.abc import Callable

from bench.attacks import training
from bench.attacks.answering import AnswersLate, Refuses, Sleeper, WorksOnDemand
from bench.attacks.cheat import Cheat, Kind, Scene
from bench.attacks.sending import (
    FalseAccuser,
    Hijacks,
    Inflates,
    OtherBytes,
    Pickled,
    Poisoned,
    TwoReceipts,
    TwoSpeeds,
    WrongMean,
    WrongShape,
)
from bench.attacks.training import (
    Copy,
    Invented,
    Noisy,
    OldState,
    OtherBatches,
    OwnBase,
    PrefixThenGarbage,
    Scaled,
    Skips,
    SkipsEverywhere,
    Stale,
    Zero,
)
from hivetrain.training.inner import Batches

Make = Callable[[str], Cheat]


def _batches(what: str, kind: Kind, batches: Callable[[Scene], Batches]) -> Make:
    return lambda name: OtherBatches(name, what, kind, batches)


CATALOGUE: dict[str, Make] = {
    "random": lambda name: Invented(name, "takes no step and hands in a random walk"),
    "zero": lambda name: Zero(name, "takes no step and hands in the state as it was"),
    "stale": lambda name: Stale(name, "replays the moves of its first round in every later one"),
    "copy": lambda name: Copy(name, "hands in another miner's snapshots of the same round"),
    "copy-noise": lambda name: Copy(name, "hands in another miner's snapshots with 5% noise", 0.05),
    "two-hotkeys": lambda name: Copy(name, "a second hotkey of one machine, which hands in the first one's work again"),
    "sign-flip": lambda name: Scaled(name, "does the work, and turns its last vector round", -1.0),
    "scale-1.1": lambda name: Scaled(name, "does the work, and goes 1.1 times as far", 1.1),
    "scale-1.5": lambda name: Scaled(name, "does the work, and goes 1.5 times as far", 1.5),
    "scale-5": lambda name: Scaled(name, "does the work, and goes 5 times as far", 5.0),
    "noise-0.5": lambda name: Noisy(name, "does the work, and adds noise of 0.5% of the round's move", 0.005),
    "noise-3": lambda name: Noisy(name, "does the work, and adds noise of 3% of the round's move", 0.03),
    "noise-10": lambda name: Noisy(name, "does the work, and adds noise of 10% of the round's move", 0.1),
    "noise-30": lambda name: Noisy(name, "does the work, and adds noise of 30% of the round's move", 0.3),
    "wrong-base": lambda name: OwnBase(name, "goes on from its own last vector, and claims the published state"),
    "old-state": lambda name: OldState(name, "starts from the epoch before, and claims the newest"),
    "skip-5": lambda name: Skips(name, "leaves out 5% of the steps, in one window", 0.05),
    "skip-10": lambda name: Skips(name, "leaves out 10% of the steps, in one window", 0.1),
    "skip-25": lambda name: Skips(name, "leaves out 25% of the steps, in as few windows as will do", 0.25),
    "skip-50": lambda name: Skips(name, "leaves out 50% of the steps, in as few windows as will do", 0.5),
    "skip-spread": lambda name: SkipsEverywhere(name, "leaves out the last step of every window"),
    "half-sequence": _batches("trains on half of every sequence", Kind.PART, training.half_sequences),
    "half-batch": _batches("trains on half of every batch", Kind.PART, training.half_batches),
    "other-data": _batches("trains on another miner's data", Kind.WORKS, training.others_data),
    "own-data-twice": _batches("reads half of its data and trains on it twice", Kind.WORKS, training.own_data_twice),
    "one-batch": _batches("trains on its first batch in every step", Kind.WORKS, training.one_batch),
    "claims-more": lambda name: Skips(name, "takes half of the steps and claims all of them", 0.5),
    "honest-prefix": lambda name: PrefixThenGarbage(name, "takes half of the steps, then hands in a random walk"),
    "other-bytes": lambda name: OtherBytes(name, "commits to its work and averages something else"),
    "inflated-weight": lambda name: Inflates(name, "claims ten times its samples"),
    "refuses": lambda name: Refuses(name, "commits noise, and refuses every challenge", Kind.WHOLE),
    "answers-late": lambda name: AnswersLate(name, "commits noise, and answers when checks are over", Kind.WHOLE),
    "on-demand": lambda name: WorksOnDemand(name, "commits noise, and computes what it is asked to open"),
    "sleeper": lambda name: Sleeper(
        name, "works until it is challenged, then hands in a random walk until it is again", Invented(name, "")
    ),
    "refusing-sleeper": lambda name: Sleeper(
        name, "works until it is challenged, then rests and refuses the next challenge", Refuses(name, "")
    ),
    "fast-to-validator": lambda name: TwoSpeeds(name, "sends fast to validators and slowly to miners", False),
    "slow-to-validator": lambda name: TwoSpeeds(name, "sends fast to miners and slowly to validators", True),
    "nan": lambda name: Poisoned(name, "does the work, and commits to a payload with NaN in it", float("nan")),
    "infinity": lambda name: Poisoned(
        name, "does the work, and commits to a payload with infinity in it", float("inf")
    ),
    "1e30": lambda name: Poisoned(name, "does the work, and commits to a payload with 1e30 in it", 1e30),
    "wrong-shape": lambda name: WrongShape(name, "announces a vector of another shape in the all-reduce"),
    "pickle": lambda name: Pickled(name, "commits to pickles for snapshots and payload"),
    "two-receipts": lambda name: TwoReceipts(name, "commits noise, and signs another receipt whenever it is asked"),
    "wrong-mean": lambda name: WrongMean(name, "does the work, and returns a wrong mean as a reducer"),
    "false-accusation": lambda name: FalseAccuser(name, "does the work, and brings false evidence against others"),
    "hijacked-peer": lambda name: Hijacks(name, "does the work, and announces an honest miner's peer as its own"),
}
"""Miners. What has no work in it at all is `bench.attacks.outside`'s."""


def make_cheat(name: str) -> Cheat:
    """A fresh cheat of that name.

    Raises:
        ValueError: there is none; names those that there are.
    """
    if name not in CATALOGUE:
        raise ValueError(f"no attack {name!r}; there are: {', '.join(CATALOGUE)}")
    return CATALOGUE[name](name)
