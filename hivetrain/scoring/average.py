"""The moving average behind the weights: keyed by hotkey, starting at 0, surviving a restart.

It starts at 0 so that nobody gains by leaving and coming back. A proven lie sets it to 0 and starts a cooldown. Who
comes new waits as long before its scores count, so that no liar is better off under another name; those whom the very
first round sees do not wait, for nobody was paid before. Two refusals in a row set the average to 0.

`AverageState` is all of it: a validator publishes it before and after every round, and anybody can take the step from
one to the other.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hivetrain.errors import ConfigError
from hivetrain.run import Scoring
from hivetrain.scoring.score import Score, Unscored

MAX_ENTRIES = 4096
Round = Annotated[int, Field(ge=-1, lt=1 << 50)]


class Entry(BaseModel):
    """What one hotkey has come to."""

    model_config = ConfigDict(extra="forbid")
    value: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] = 0.0
    cooldown_until: Round = 0  # first round with pay again
    paid_from: Round = 0  # first round whose score counts
    refusals: Annotated[int, Field(ge=0, lt=1 << 50)] = 0  # since the last check that it passed


class AverageState(BaseModel):
    """Every hotkey's entry after ``last_round``; both rounds are -1 before the first."""

    model_config = ConfigDict(extra="forbid")
    first_round: Round = -1
    last_round: Round = -1
    entries: Annotated[dict[Annotated[str, Field(max_length=64)], Entry], Field(max_length=MAX_ENTRIES)] = {}


class MovingAverage:
    """Scores by hotkey, averaged over rounds.

    Args:
        path: where it is kept; read by `load`, written by every `update`. None: nowhere.
        scoring: the recipe's rate and cooldown.
        state: where it stands.
    """

    def __init__(self, path: Path | None, scoring: Scoring, state: AverageState | None = None) -> None:
        self._path = path
        self._scoring = scoring
        self._file = state.model_copy(deep=True) if state is not None else AverageState()

    def load(self) -> None:
        """Read the file, if there is one.

        Raises:
            ConfigError: it is there and cannot be understood; nothing is overwritten.
        """
        if self._path is None or not self._path.exists():
            return
        try:
            self._file = AverageState.model_validate_json(self._path.read_bytes())
        except (ValidationError, OSError) as exc:
            raise ConfigError(
                f"{self._path} does not hold a validator's scores ({exc.__class__.__name__}); "
                "move it away: the newest record that was published is gone on from"
            ) from exc

    def catch_up(self, state: AverageState) -> None:
        """Go on from ``state`` where that is newer, and save."""
        if state.last_round > self._file.last_round:
            self._file = state.model_copy(deep=True)
            self._save()

    @property
    def state(self) -> AverageState:
        """A copy of where it stands."""
        return self._file.model_copy(deep=True)

    @property
    def last_round(self) -> int:
        """The newest round that is in the average, -1 for none."""
        return self._file.last_round

    def cooldown_left(self, hotkey: str, round_number: int) -> int:
        """Rounds without pay that are left for ``hotkey``, this one included."""
        entry = self._file.entries.get(hotkey)
        return max(0, entry.cooldown_until - round_number) if entry else 0

    def waits_until(self, hotkey: str) -> int:
        """The first round whose score counts for ``hotkey``; 0 for a stranger."""
        entry = self._file.entries.get(hotkey)
        return entry.paid_from if entry else 0

    def owes(self, hotkey: str) -> bool:
        """Whether ``hotkey`` refused the last check that it was asked for: it is asked again until it passes one."""
        entry = self._file.entries.get(hotkey)
        return entry is not None and entry.refusals > 0

    def value(self, hotkey: str) -> float:
        """The average of ``hotkey``, 0 for a stranger."""
        entry = self._file.entries.get(hotkey)
        return entry.value if entry else 0.0

    def update(self, round_number: int, scores: Mapping[str, Score | Unscored], registered: Collection[str]) -> None:
        """Take one round in, forget who is no longer registered, and save.

        A round that is already in changes nothing: a validator that restarts in mid-round counts it once.
        """
        if round_number <= self._file.last_round:
            return
        if self._file.first_round < 0:
            # An older file names no first round: what it holds was there before.
            self._file.first_round = round_number if self._file.last_round < 0 else 0
        for hotkey, score in scores.items():
            self._take(hotkey, score, round_number)
        for hotkey in set(self._file.entries) - set(registered):
            entry = self._file.entries[hotkey]
            entry.value = 0.0
            if entry.cooldown_until <= round_number + 1:  # a liar who comes back still sits its cooldown out
                del self._file.entries[hotkey]
        self._file.last_round = round_number
        self._save()

    def _take(self, hotkey: str, score: Score | Unscored, round_number: int) -> None:
        entry = self._file.entries.get(hotkey)
        if entry is None:
            wait = 0 if round_number == self._file.first_round else self._scoring.cooldown_rounds
            entry = self._file.entries[hotkey] = Entry(paid_from=round_number + wait)
        if isinstance(score, Unscored):
            return
        alpha = self._scoring.ema_alpha
        earned = score.score if round_number >= entry.paid_from else 0.0
        entry.value = min(1.0, (1 - alpha) * entry.value + alpha * earned)
        if score.passed:
            entry.refusals = 0
        elif score.refused:
            entry.refusals += 1
            entry.value = 0.0  # or whoever works only where it owes a check would live on what it earned before
        if score.lied:
            entry.value = 0.0
            entry.cooldown_until = round_number + 1 + self._scoring.cooldown_rounds

    def weights(self) -> dict[str, float]:
        """Shares that sum to 1 over the hotkeys above 0; empty when nobody is."""
        positive = {hotkey: entry.value for hotkey, entry in self._file.entries.items() if entry.value > 0}
        total = math.fsum(positive.values())
        return {hotkey: value / total for hotkey, value in positive.items()}

    def _save(self) -> None:
        if self._path is None:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self._path.with_suffix(".tmp")
        with temporary.open("w") as file:
            json.dump(self._file.model_dump(mode="json"), file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self._path)
