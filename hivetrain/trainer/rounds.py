"""What one step of the swarm was, for the log, the progress bar and the tracker."""

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
