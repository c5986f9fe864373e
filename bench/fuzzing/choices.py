"""Bytes read as choices: the same bytes always alter the same message in the same way.

Where the bytes end, every further choice is 0, and 0 always means "as an honest peer would": no bytes at all give the
honest message.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

T = TypeVar("T")

NUMBERS: tuple[int, ...] = (
    *(0, 1, 2, 3, 4, 5, 7, 8, 9, 50, 63, 64, 65, 255, 256, 257, 4095, 4096, 4097, 100_000, 1_000_000),
    *(-1, -2, -(1 << 31), -(1 << 63)),
    *(2**power + off for power in (31, 32, 40, 50, 53, 63, 64) for off in (-1, 0, 1)),
    10**40,
    10**4000,
)
FLOATS = (0.0, -0.0, 1.0, -1.0, 0.5, 1e-45, 1e-8, 1e4, 1e9, 3.4e38, 1e300, float("nan"), float("inf"), float("-inf"))
TEXTS = ("", "a", "\0", "é", "00" * 32, "ff" * 32, "0" * 64, "x" * 65, "z" * 1000, "\U0001f41d" * 20, "../../x", "1e9")
DEEPEST = 12


class Choices:
    """Reads ``data`` from its front."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def take(self, num_bytes: int) -> bytes:
        """The next bytes; fewer at the end."""
        piece = self._data[self._at : self._at + num_bytes]
        self._at += len(piece)
        return piece

    def rest(self) -> bytes:
        """All that is left."""
        return self.take(len(self._data) - self._at)

    def below(self, stop: int) -> int:
        """A number in ``[0, stop)``."""
        if stop <= 1:
            return 0
        return int.from_bytes(self.take((stop.bit_length() + 7) // 8), "little") % stop

    def flag(self) -> bool:
        """Yes or no."""
        return self.below(2) == 1

    def pick(self, options: Sequence[T]) -> T:
        """One of ``options``, of which the first is the honest one."""
        return options[self.below(len(options))]

    def number(self) -> int:
        """An integer near some limit, or any of 64 bits."""
        which = self.below(len(NUMBERS) + 1)
        return NUMBERS[which] if which < len(NUMBERS) else int.from_bytes(self.take(8), "little", signed=True)

    def scalar(self) -> Any:
        """A value of some type."""
        kind = self.below(7)
        if kind == 0:
            return self.number()
        if kind == 1:
            return self.pick(FLOATS)
        if kind == 2:
            return self.pick(TEXTS)
        if kind == 3:
            return self.take(self.below(64)).decode("latin-1")
        return (None, True, [], {})[kind - 4] if kind < 7 else None


def altered(value: Any, choices: Choices, strange: Sequence[Any] = ()) -> Any:
    """``value`` (of dicts, lists and scalars) with none to three changes somewhere in it.

    Args:
        strange: further values that may take a place.
    """
    for _ in range(choices.below(4)):
        value = _change(value, choices, strange, 0)
    return value


def _change(value: Any, choices: Choices, strange: Sequence[Any], depth: int) -> Any:
    inside = isinstance(value, dict | list | tuple) and len(value) > 0 and depth < DEEPEST
    if inside and choices.below(16) != 15:
        if isinstance(value, dict):
            return _changed_dict(value, choices, strange, depth)
        return _changed_list(list(value), choices, strange, depth)
    if isinstance(value, str | bytes) and value and choices.flag():
        return _changed_run(value, choices)
    if isinstance(value, int) and not isinstance(value, bool) and choices.flag():
        return value + choices.pick((1, -1, 2, 256, -256))
    if strange and choices.flag():
        return choices.pick(strange)
    return choices.take(choices.below(64)) if isinstance(value, bytes) and choices.flag() else choices.scalar()


def _changed_dict(value: dict[Any, Any], choices: Choices, strange: Sequence[Any], depth: int) -> dict[Any, Any]:
    keys = sorted(value, key=str)
    key, what = choices.pick(keys), choices.below(8)
    if what == 6:
        return {name: one for name, one in value.items() if name != key}
    if what == 7:
        other = choices.pick((*keys, *TEXTS))
        return value | {other: value[key]}
    return value | {key: _change(value[key], choices, strange, depth + 1)}


def _changed_list(value: list[Any], choices: Choices, strange: Sequence[Any], depth: int) -> list[Any]:
    at, what = choices.below(len(value)), choices.below(8)
    if what == 5:
        return value[:at] + value[at + 1 :]
    if what == 6:
        return value * (1 + choices.below(5))
    if what == 7:
        other = choices.below(len(value))
        value[at], value[other] = value[other], value[at]
        return value
    value[at] = _change(value[at], choices, strange, depth + 1)
    return value


def _changed_run(value: str | bytes, choices: Choices) -> str | bytes:
    """A string with one place changed, cut, or longer."""
    at, what = choices.below(len(value)), choices.below(4)
    if what == 0:
        other = choices.below(128)
        middle: str | bytes = chr(other) if isinstance(value, str) else bytes([other])
        return value[:at] + middle + value[at + 1 :]  # type: ignore[operator]
    if what == 1:
        return value[:at]
    if what == 2:
        return value + value[at:]  # type: ignore[operator]
    return value[at:]


def flipped(raw: bytes, choices: Choices) -> bytes:
    """``raw`` as somebody on the way may leave it: with up to three bytes changed, cut short, or replaced."""
    for _ in range(choices.below(4)):
        at, what = choices.below(max(1, len(raw))), choices.below(8)
        if what == 5:
            raw = raw[:at]
        elif what == 6:
            raw = raw[:at] + choices.take(1 + choices.below(16)) + raw[at:]
        elif what == 7:
            raw = choices.rest()
        else:
            raw = raw[:at] + bytes([raw[at] ^ (1 + choices.below(255))]) + raw[at + 1 :] if raw else b"\0"
    return raw


__all__ = ["Choices", "altered", "flipped"]
