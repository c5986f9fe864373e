"""What steps of the swarm were, for the log, the progress bar and the tracker; and what to say where none was one."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundReport:
    """One step of the swarm, as this peer saw it.

    Attributes:
        epoch: of the swarm, after it.
        peers: in our group, ourselves included; 1: nobody else was there, or averaging failed.
        samples: of the group, by the weights that its members declared; where no part was ours to reduce, or we were
            alone, of the swarm, as far as the DHT had told us when the round began.
        seconds: for which our training waited.
        sent_bytes: of gradients and state that we sent to the group since the round began, without framing.
    """

    epoch: int
    peers: int
    samples: int
    seconds: float
    sent_bytes: int

    def metrics(self) -> dict[str, float]:
        """As a Trainer logs it."""
        return {
            "swarm_epoch": self.epoch,
            "swarm_peers": self.peers,
            "swarm_samples": self.samples,
            "swarm_seconds": round(self.seconds, 3),
            "swarm_sent_bytes": self.sent_bytes,
        }

    def postfix(self) -> str:
        """As a progress bar shows it."""
        return f"swarm epoch {self.epoch}, {self.peers} peers, {self.samples} samples, {self.seconds:.1f} s"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunReport:
    """One peer's run, at its end.

    Attributes:
        rounds: steps of the swarm that it made.
        averaged: of these, with others.
        epoch: of the swarm, that it has reached.
        joined: whether others were there before it.
        most_peers: of the swarm at any moment, ourselves included.
        samples: that it computed.
        target_batch_size, matchmaking_s: of its `hivemind_config`.
    """

    rounds: int
    averaged: int
    epoch: int
    joined: bool
    most_peers: int
    samples: int
    target_batch_size: int
    matchmaking_s: float

    def problem(self) -> str | None:
        """Why nothing was averaged, as far as we can know, and what would mend it; None: something was."""
        if self.averaged:
            return None
        if self.rounds and self.most_peers > 1:
            return (
                f"not one of {self.rounds} rounds was averaged with anybody, although {self.most_peers} peers were "
                f"there: they found no group in time. Raise matchmaking_time (now {self.matchmaking_s:g} s), or "
                f"target_batch_size (now {self.target_batch_size}) so that a swarm epoch takes several times as long"
            )
        if self.rounds:
            return (
                f"not one of {self.rounds} rounds was averaged with anybody: nobody else took part, and this model "
                "has learned from our data alone. Others join with the line that was printed at the start "
                "(initial_peers or PEERS), the same run_id, and a port of ours that they can reach"
            )
        if self.joined and self.epoch:
            return (
                f"we took part in no round: we came too late, and hold the swarm's state of epoch {self.epoch} as we "
                "downloaded it. Join earlier, or raise swarm_epochs for everyone"
            )
        return (
            f"the run ended without one round, and the model is as it began: our {self.samples} samples and those of "
            f"{self.most_peers - 1} other peers did not make target_batch_size = {self.target_batch_size}. Lower it, "
            "raise max_steps, or start the other peers before this one ends"
        )
