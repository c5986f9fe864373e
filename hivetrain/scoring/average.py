"""The moving average behind the weights: keyed by hotkey, starting at 0, surviving a restart.

It starts at 0 so that nobody gains by leaving and coming back. A proven lie sets it to 0 and starts a cooldown.
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


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid")
    value: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] = 0.0
    cooldown_until: int = 0  # first round with pay again


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid")
    last_round: int = -1
    entries: dict[str, _Entry] = {}


class MovingAverage:
    """Scores by hotkey, averaged over rounds.

    Args:
        path: where it is kept; read by `load`, written by every `update`.
        scoring: the recipe's rate and cooldown.
    """

    def __init__(self, path: Path, scoring: Scoring) -> None:
        self._path = path
        self._scoring = scoring
        self._file = _File()

    def load(self) -> None:
        """Read the file, if there is one.

        Raises:
            ConfigError: it is there and cannot be understood; nothing is overwritten.
        """
        if not self._path.exists():
            return
        try:
            self._file = _File.model_validate_json(self._path.read_bytes())
        except (ValidationError, OSError) as exc:
            raise ConfigError(
                f"{self._path} does not hold a validator's scores ({exc.__class__.__name__}); "
                "move it away to start from zero"
            ) from exc

    @property
    def last_round(self) -> int:
        """The newest round that is in the average, -1 for none."""
        return self._file.last_round

    def cooldown_left(self, hotkey: str, round_number: int) -> int:
        """Rounds without pay that are left for ``hotkey``, this one included."""
        entry = self._file.entries.get(hotkey)
        return max(0, entry.cooldown_until - round_number) if entry else 0

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
        for hotkey, score in scores.items():
            if isinstance(score, Unscored):
                continue
            entry = self._file.entries.setdefault(hotkey, _Entry())
            alpha = self._scoring.ema_alpha
            entry.value = min(1.0, (1 - alpha) * entry.value + alpha * score.score)
            if score.lied:
                entry.value = 0.0
                entry.cooldown_until = round_number + 1 + self._scoring.cooldown_rounds
        for hotkey in set(self._file.entries) - set(registered):
            entry = self._file.entries[hotkey]
            entry.value = 0.0
            if entry.cooldown_until <= round_number + 1:  # a liar who comes back still sits its cooldown out
                del self._file.entries[hotkey]
        self._file.last_round = round_number
        self._save()

    def weights(self) -> dict[str, float]:
        """Shares that sum to 1 over the hotkeys above 0; empty when nobody is."""
        positive = {hotkey: entry.value for hotkey, entry in self._file.entries.items() if entry.value > 0}
        total = math.fsum(positive.values())
        return {hotkey: value / total for hotkey, value in positive.items()}

    def _save(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self._path.with_suffix(".tmp")
        with temporary.open("w") as file:
            json.dump(self._file.model_dump(mode="json"), file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self._path)
