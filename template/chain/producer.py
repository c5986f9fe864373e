"""The embedded chain's clock: ``python -m template.chain.producer --db PATH [--block-time S]``.

One block per interval while it runs; when it stops, so does the chain, and a restart goes on where the file
ends. A lock beside the database keeps a second producer from doubling the speed; the system drops it with the
process, so a killed producer leaves nothing to clean up.
"""

from __future__ import annotations

import argparse
import fcntl
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from hivetrain.errors import ConfigError, HivetrainError
from template.chain.ledger import LocalLedger

logger = logging.getLogger(__name__)


def produce(
    ledger: LocalLedger,
    block_time_s: float,
    wait: Callable[[float], bool],
    clock: Callable[[], float] = time.monotonic,
) -> int:
    """Produce blocks at a steady pace until ``wait`` says to stop.

    Args:
        ledger: the chain.
        block_time_s: seconds from one block to the next.
        wait: sleeps up to so many seconds; True to stop.
        clock: monotonic seconds.

    Returns:
        How many blocks were produced.
    """
    num_blocks = 0
    due = clock() + block_time_s
    while not wait(max(0.0, due - clock())):
        number = ledger.produce_block()
        num_blocks += 1
        logger.debug("block %d", number)
        # After a stall (a suspended laptop) the chain goes on from now; it does not catch up in a burst.
        due = max(due + block_time_s, clock())
    return num_blocks


def main(arguments: list[str] | None = None) -> int:
    """Run the producer until SIGTERM or SIGINT.

    Returns:
        0 when stopped, 2 for a bad flag or a second producer, 1 for a chain that cannot be used.
    """
    parser = argparse.ArgumentParser(prog="template.chain.producer", description="Produce the local chain's blocks.")
    parser.add_argument("--db", required=True, type=Path, help="the chain's database")
    parser.add_argument("--block-time", type=float, default=None, help="seconds per block; default: as set at genesis")
    parser.add_argument("--logging.debug", dest="debug", action="store_true", help="log every block")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.DEBUG if options.debug else logging.INFO, format="%(asctime)s %(message)s")
    if options.block_time is not None and not options.block_time > 0:
        parser.error(f"--block-time must be > 0, got {options.block_time}")

    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    try:
        with LocalLedger(options.db) as ledger:
            lock = _lock(ledger.path)
            try:
                block_time_s = options.block_time or ledger.block_time_s()
                logger.info("producing a block every %g s from block %d", block_time_s, ledger.head())
                produce(ledger, block_time_s, stop.wait)
                logger.info("stopped at block %d", ledger.head())
            finally:
                os.close(lock)
    except HivetrainError as exc:
        logger.error("%s", exc)
        return 2 if isinstance(exc, ConfigError) else 1
    return 0


def _lock(database: Path) -> int:
    path = database.with_name(database.name + ".producer")
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise ConfigError(f"another producer already runs for {database}; stop it first") from None
    return descriptor


if __name__ == "__main__":
    sys.exit(main())
