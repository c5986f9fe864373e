"""What a target may cost, and what it may raise: nothing.

Memory is the process's peak: what one input adds to it, beyond a fixed allowance and a multiple of its own length. Time
is this thread's CPU time, so that a busy machine finds nothing.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass

from hivetrain.errors import Fault, PeerFault

SPARE_BYTES = 48 << 20
"""A peak may rise by so much whatever the input: Python and torch take memory from the system in pieces."""
BYTES_PER_BYTE = 64
MAX_CPU_S = 2.0
"""Of one input, instrumented: some three times what it takes without."""
MAX_DETAIL = 20_000


class Violation(AssertionError):
    """A target's promise does not hold."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Something that takes a stranger's bytes.

    Attributes:
        name: also of the folder of its inputs.
        run: takes any bytes; raises where something is wrong.
        max_len: bytes of the longest input.
        promise: in words.
        weight: of its share of the time.
    """

    name: str
    run: Callable[[bytes], None]
    max_len: int
    promise: str
    weight: float = 1.0


def exercise(target: Target, data: bytes) -> None:
    """Run ``target`` on ``data``.

    Raises:
        Violation: it breaks its promise, or costs more than the input explains.
        Exception: whatever else it raises is a finding too.
    """
    before, started = _peak_bytes(), time.thread_time()
    target.run(data)
    taken, grown = time.thread_time() - started, _peak_bytes() - before
    require(taken <= MAX_CPU_S, f"{target.name}: {taken:.2f} CPU seconds for {len(data)} bytes")
    allowed = SPARE_BYTES + BYTES_PER_BYTE * len(data)
    require(grown <= allowed, f"{target.name}: {grown >> 20} MiB for {len(data)} bytes, allowed {allowed >> 20}")


def require(holds: bool, what: str) -> None:
    """Raise `Violation` unless ``holds``."""
    if not holds:
        raise Violation(what)


def declared(exc: PeerFault, faults: Collection[Fault]) -> None:
    """Check that a fault is one of those that the docstring names, and says so in bounded words."""
    require(exc.fault in faults, f"undeclared fault {exc.fault.value}: {exc.detail[:200]}")
    require(len(exc.detail) <= MAX_DETAIL, f"a fault in {len(exc.detail)} characters")


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
