"""Our records in the DHT: that we are here and what we train, and in the end, which state we hold.

One thread keeps the first one fresh, so that a peer that is gone is forgotten within `PRESENCE_S`.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Hashable, Mapping
from typing import Protocol

from hivetrain.errors import ConfigError, ServiceError
from hivetrain.trainer.membership import MAX_SAMPLES, Ending, Presence, agreed, canonical, elders, require_same_run

logger = logging.getLogger(__name__)

PRESENCE_S = 30.0
REFRESH_S = 8.0
ENDING_S = 600.0
POLL_S = 0.5
OURS = None  # whose record needs no owner


class Directory(Protocol):
    """Where records are kept: each peer writes its own, everyone reads all, by owner. Both raise `ServiceError`."""

    def publish(self, key: str, value: object | None, expires_in_s: float) -> None: ...
    def read(self, key: str) -> Mapping[Hashable, object]: ...


class Board:
    """Our place among the peers of one run.

    Args:
        directory: where records are kept.
        run_id: the swarm's name.
        me: who we are and what we train.
        asked_epochs: `swarm_epochs` as the user gave it; 0: as the swarm says.
    """

    def __init__(self, directory: Directory, run_id: str, me: Presence, asked_epochs: int) -> None:
        self._directory, self._run_id, self.me, self._asked = directory, run_id, me, asked_epochs
        self._stopping = threading.Event()
        self._refresher = threading.Thread(target=self._refresh, name="swarm-presence", daemon=True)

    def join(self) -> list[Presence]:
        """Take our place. Returns those who came before us; none: we begin the run.

        Raises:
            ConfigError: they train something else; says what.
            ServiceError: the DHT did not answer.
        """
        self._agree_with(self.others())
        self._publish()
        # Who came at the same moment wrote before it read, so that one of the two sees the other.
        others = self.others()
        try:
            if self._agree_with(others):
                self._publish()
        except ConfigError:
            self._withdraw()
            raise
        self._refresher.start()
        return elders(self.me, others)

    def _agree_with(self, others: list[Presence]) -> bool:
        """Check what the elders train, and take their number of epochs; whether that changed ours."""
        require_same_run(self.me, others, self._run_id)
        before = elders(self.me, others)
        if not before or before[0].swarm_epochs == self.me.swarm_epochs:
            return False
        if self._asked:
            raise ConfigError(
                f"run_id {self._run_id!r} ends after {before[0].swarm_epochs} swarm epochs, we ask for {self._asked}: "
                "leave swarm_epochs out, or use another run_id"
            )
        self.me = dataclasses.replace(self.me, swarm_epochs=before[0].swarm_epochs)
        return True

    def others(self) -> list[Presence]:
        """Everyone else who is here."""
        return list(self._here().values())

    def settle(
        self,
        state: Callable[[], tuple[int, str, int]],
        shares: bool,
        download: Callable[[], bool],
        keep_sharing: Callable[[bool], None],
        deadline_s: float,
        download_s: float,
        most_samples: int = MAX_SAMPLES,
        wait: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> bool:
        """At the end of a run: hold the same bits as everyone who is still here.

        Args:
            state: the epoch at which we ended, the hash of what we hold, and of how many samples its last step was.
            shares: whether others can download it, as they cannot in client mode.
            download: loads the newest state that is shared; whether that worked.
            keep_sharing: whether others may download ours.
            deadline_s: how long to wait for the others to end.
            download_s: and then, for one state among those who did: whoever holds it stays for those who load it.
            most_samples: that a step can have been of; who says more is not believed.

        Returns:
            Whether all who are here ended with one state; past the deadline, all who ended.
        """
        until, mine = clock() + deadline_s, self._publish_ending(*state(), shares)
        while True:
            here = self._here()
            found = {OURS: mine, **self._endings(here)}
            newest = {one.peer_id: owner for owner, one in sorted(here.items(), key=lambda item: item[1].since)}
            # Who was killed and came back signs with another key: the one before says nothing any more.
            alive = (owner for owner, one in here.items() if owner in found or newest[one.peer_id] == owner)
            expected, present = [OURS, *alive], list(found.values())
            if (late := clock() - until) >= 0:  # whoever was killed is still listed for a while
                expected = list(found)
            if agreed(found, expected):
                return True
            if late >= download_s:
                return False
            chosen = canonical(present, most_samples)
            held = chosen is None or chosen.digest == mine.digest
            keep_sharing(held)
            # Whoever is still on its way to the end may hold the run's state: only then is it known.
            known = len(present) == len(expected)
            if known and not any(ending.shares for ending in present):  # states differ, and stay so
                return False
            if not held and known and download():
                mine = self._publish_ending(*state(), shares)
            else:
                wait(POLL_S)

    def close(self) -> None:
        """Say that we are gone. Safe to call twice."""
        if not self._stopping.is_set():
            self._stopping.set()
            self._withdraw()

    def _here(self) -> dict[Hashable, Presence]:
        read = self._directory.read(self._key("peers"))
        found = {owner: Presence.from_wire(value) for owner, value in read.items()}
        return {owner: one for owner, one in found.items() if one is not None and one.peer_id != self.me.peer_id}

    def _endings(self, here: Mapping[Hashable, Presence]) -> dict[Hashable, Ending]:
        """How those who are here ended, as each says of itself: nobody ends another's run."""
        read = self._directory.read(self._key("end"))
        found = {owner: Ending.from_wire(read[owner]) for owner in here if owner in read}
        return {owner: one for owner, one in found.items() if one is not None and one.peer_id == here[owner].peer_id}

    def _publish_ending(self, epoch: int, digest: str, samples: int, shares: bool) -> Ending:
        ending = Ending(peer_id=self.me.peer_id, epoch=epoch, digest=digest, samples=samples, shares=shares)
        self._directory.publish(self._key("end"), ending.to_wire(), ENDING_S)
        return ending

    def _publish(self) -> None:
        self._directory.publish(self._key("peers"), self.me.to_wire(), PRESENCE_S)

    def _withdraw(self) -> None:
        try:
            self._directory.publish(self._key("peers"), None, PRESENCE_S)
        except ServiceError as exc:
            logger.debug("swarm: our record expires by itself: %s", exc)

    def _refresh(self) -> None:
        while not self._stopping.wait(REFRESH_S):
            try:
                self._publish()
            except ServiceError as exc:
                logger.warning("swarm: %s", exc)

    def _key(self, what: str) -> str:
        return f"{self._run_id}_hivetrain_{what}"
