"""The order of test files: those that take longest begin first, so that two processes end at about the same time.

Which take long is told by the timeouts that they declare themselves; the order within a file stays.
"""

from __future__ import annotations

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sort the files by their longest declared timeout."""
    longest: dict[str, float] = {}
    for item in items:
        marker = item.get_closest_marker("timeout")
        seconds = float(marker.args[0]) if marker is not None and marker.args else 0.0
        longest[item.nodeid.split("::")[0]] = max(longest.get(item.nodeid.split("::")[0], 0.0), seconds)
    items.sort(key=lambda item: -longest[item.nodeid.split("::")[0]])
