"""Why the embedded chain refuses a call: the real chain's error names, so that the SDK classifies them alike."""

from __future__ import annotations


class DispatchError(Exception):
    """A call that was included and failed; state is as before it.

    Args:
        name: the pallet's error, such as ``SettingWeightsTooFast``.
        message: expected and actual values.
    """

    def __init__(self, name: str, message: str) -> None:
        super().__init__(f"{name}: {message}")
        self.name = name
        self.message = message
