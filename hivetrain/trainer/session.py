"""One stay in a swarm: from the first connection to a goodbye that ends, whatever happens in between."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from hivetrain.errors import ServiceError
from hivetrain.trainer.board import Board
from hivetrain.trainer.config import SwarmConfig
from hivetrain.trainer.membership import MAX_TARGETS, Presence

logger = logging.getLogger(__name__)

CLOSE_TIMEOUT_S = 30.0
EXIT_TIMEOUT_S = 10.0
JOIN_TRIES_APART_S = 1.0


class Session:
    """A started node, our place on the board, and the optimizer that averages with the others.

    Args:
        config: the swarm's options.
        node: a started node; closed by `close`.
        board: where we have taken our place.
        elders: who came before us.
    """

    def __init__(self, config: SwarmConfig, node: Any, board: Board, elders: list[Presence]) -> None:
        self._config, self._node, self._board, self._elders = config, node, board, elders
        self.joined = bool(elders)
        self.optimizer: Any = None
        self._settled = False

    @property
    def founding(self) -> bool:
        """Whether nobody came before us."""
        return not self.joined

    @property
    def swarm_epochs(self) -> int:
        """After which epoch the run ends."""
        return self._board.me.swarm_epochs

    @property
    def epoch(self) -> int:
        return int(self.optimizer.local_epoch)

    def adopt_state(self) -> None:
        """Begin from the swarm's state, if there is a swarm; only then may others download ours.

        Two peers that begin with different weights would average them.

        Raises:
            ServiceError: those who came before us are there, and give us no state.
        """
        until = time.monotonic() + self._config.seconds("load_state_timeout")
        resumed = self.epoch
        while self._elders:
            if self.optimizer.download(max(JOIN_TRIES_APART_S, until - time.monotonic())):
                logger.info("swarm: epoch=%d loaded from the swarm", self.epoch)
                break
            here = {other.peer_id for other in self._board.others()}
            self._elders = [elder for elder in self._elders if elder.peer_id in here]
            if resumed and self.optimizer.tracker.global_epoch <= resumed:
                logger.info("swarm: our checkpoint of epoch %d is the newest state: others load it from us", resumed)
                break
            if time.monotonic() > until:
                raise ServiceError(
                    f"the swarm's state could not be loaded from {', '.join(elder.peer_id for elder in self._elders)}: "
                    "are these peers reachable from here, and at least one of them not in client mode? A large state "
                    "over a slow link needs a longer load_state_timeout"
                )
            time.sleep(JOIN_TRIES_APART_S)
        self.optimizer.share_state(True)

    def await_peers(
        self, least: int, is_stopped: Callable[[], bool], wait: Callable[[float], None] = time.sleep
    ) -> None:
        """Wait until so many peers train, we included, the swarm goes on without us, or we are told to stop.

        Who trains is who has told of samples: a peer that is here may still load its model, or our state.
        """
        tracker, looks = self.optimizer.tracker, 0
        while not is_stopped():
            known = tracker.global_progress
            missing = least - max(1, known.num_peers)
            if missing <= 0 or known.epoch > self.epoch:
                break
            if looks == 0:
                tracker.tell_idle()
            if looks == 2:
                print(f"Waiting for {missing} more of {least} peers; Ctrl-C stops", flush=True)
            looks += 1
            tracker.look_again()
            wait(JOIN_TRIES_APART_S)
        if looks:
            tracker.performance_ema.reset_timer()  # waiting is no work

    def settle(self) -> None:
        """Apply what is under way; at the end of the run, also hold the same bits as the others."""
        self.optimizer.flush()
        if self._settled or self.epoch < self.swarm_epochs:
            return
        self._settled = True
        load_s = self._config.seconds("load_state_timeout")
        try:
            agreed = self._board.settle(
                state=lambda: (self.epoch, self.optimizer.digest(), self.optimizer.trained_samples),
                shares=self.optimizer.can_share,
                download=lambda: bool(self.optimizer.download(load_s)),
                keep_sharing=self.optimizer.share_state,
                deadline_s=self._config.seconds("averaging_timeout"),
                download_s=load_s,
                most_samples=MAX_TARGETS * self._config.target_batch_size,
            )
        except ServiceError as exc:
            logger.warning("swarm: the others' last state is not known, ours may differ: %s", exc)
            return
        if agreed:
            logger.info("swarm: epoch=%d reached, everyone here holds state %s", self.epoch, self.optimizer.digest())
        else:
            logger.warning("swarm: not everyone ended with one state in time: the last states may differ")

    def close(self) -> None:
        """Leave the swarm within `CLOSE_TIMEOUT_S`, or until Ctrl-C; what has not ended by then is ended."""
        closer = threading.Thread(target=self._close, name="swarm-close", daemon=True)
        children = [*self._node.children(), *(self.optimizer.children() if self.optimizer is not None else ())]
        closer.start()
        began = time.monotonic()
        try:
            closer.join(CLOSE_TIMEOUT_S)
        finally:
            if closer.is_alive():
                waited_s = time.monotonic() - began
                logger.warning("swarm: not left within %.0f s: its processes are ended", waited_s)
                for pid in children:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)

    def _close(self) -> None:
        for step in (self._board.close, self._end_optimizer, self._node.close):
            try:
                step()
            except Exception as exc:  # the others have to be closed all the same
                logger.debug("swarm: %s while leaving: %r", step, exc)

    def _end_optimizer(self) -> None:
        if self.optimizer is not None:
            self.optimizer.shutdown()


class Interrupts:
    """Ctrl-C during training: the first asks to stop after this step, the second stops now."""

    def __init__(self) -> None:
        self.asked = False

    @contextlib.contextmanager
    def caught(self) -> Iterator[None]:
        """Catch them while training; in another thread than the main one they are nobody's."""
        self.asked = False
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGINT, self._on_signal)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def _on_signal(self, signum: int, frame: object) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        print("\nStopping after this step (a round under way is ended first); Ctrl-C again stops now", flush=True)


_guarded = threading.Event()


def guard_exit(clock_wait: Callable[[float], None] = time.sleep) -> None:
    """End the process if it hangs at its exit, as hivemind's threads can make it; once is enough."""
    if _guarded.is_set():
        return
    _guarded.set()

    def watch() -> None:
        threading.main_thread().join()
        clock_wait(EXIT_TIMEOUT_S)
        os._exit(1 if hasattr(sys, "last_value") else 0)

    threading.Thread(target=watch, name="swarm-exit", daemon=True).start()
