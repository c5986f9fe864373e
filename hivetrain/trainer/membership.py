"""Who is in the swarm, whether they train the same thing, and when they end with the same bits: pure decisions.

Peers publish two records in the DHT, each under its owner's key and signed by it: that they are here (with their
fingerprint), and how they ended (epoch and hash of the state). Every peer reads the same records and decides the same.

At the end, peers that went through the same rounds can still differ in a last bit, or by a whole round that one of
them missed: a member that fails goes on with its own gradients. So they compare hashes. The run's state is the one
whose last step was of the most samples, and of equal ones the one that most hold; the others download it, so somebody
has to be able to share it. Whoever came in the last epoch has the number of that epoch too, but not its work.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

from hivetrain.errors import ConfigError
from hivetrain.trainer.fingerprint import Fingerprint, differences

MAX_TEXT = 1000
MAX_EPOCHS = 1 << 40
MAX_SAMPLES = 1 << 60
MAX_TARGETS = 1000  # a step has more samples than the target where a group is looked for longer than it takes


@dataclass(frozen=True, slots=True, kw_only=True)
class Presence:
    """A peer says that it is here.

    Attributes:
        peer_id: who.
        since: DHT time at which it came.
        swarm_epochs: after which epoch the run ends.
        fingerprint: what it trains.
    """

    peer_id: str
    since: float
    swarm_epochs: int
    fingerprint: Fingerprint

    def to_wire(self) -> list[object]:
        return [self.peer_id, self.since, self.swarm_epochs, self.fingerprint]

    @classmethod
    def from_wire(cls, value: object) -> Presence | None:
        """The record that a stranger wrote, or None if it is none."""
        match value:
            case [str(peer_id), float(since), int(epochs), dict(found)] if (
                len(peer_id) <= MAX_TEXT and since == since and 0 < epochs < MAX_EPOCHS and len(found) <= 16
            ):
                if all(isinstance(text, str) and len(text) <= MAX_TEXT for pair in found.items() for text in pair):
                    return cls(peer_id=peer_id, since=since, swarm_epochs=epochs, fingerprint=found)
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    """How a peer ended.

    Attributes:
        peer_id: who.
        epoch: of the swarm.
        digest: hash of its weights and moments.
        samples: of all in the group, that its last step was of; 0: it made none since it loaded a state.
        shares: whether others can download its state; in client mode they cannot.
    """

    peer_id: str
    epoch: int
    digest: str
    samples: int
    shares: bool = True

    def to_wire(self) -> list[object]:
        return [self.peer_id, self.epoch, self.digest, self.samples, self.shares]

    @classmethod
    def from_wire(cls, value: object) -> Ending | None:
        """The record that a stranger wrote, or None if it is none."""
        match value:
            case [str(peer_id), int(epoch), str(digest), int(samples), bool(shares)] if (
                len(peer_id) <= MAX_TEXT
                and len(digest) <= 128
                and 0 <= epoch < MAX_EPOCHS
                and 0 <= samples < MAX_SAMPLES
            ):
                return cls(peer_id=peer_id, epoch=epoch, digest=digest, samples=samples, shares=shares)
        return None


def elders(me: Presence, others: Sequence[Presence]) -> list[Presence]:
    """Those who came before us, the eldest first; whoever has none begins the run."""
    return sorted(
        (other for other in others if other.peer_id != me.peer_id and _age(other) < _age(me)),
        key=_age,
    )


def require_same_run(me: Presence, others: Sequence[Presence], run_id: str) -> None:
    """Refuse to train with those who came before us where they train something else.

    Raises:
        ConfigError: names what differs and the fix.
    """
    for elder in elders(me, others):
        if found := differences(me.fingerprint, elder.fingerprint):
            raise ConfigError(
                f"run_id {run_id!r} is in use for another training (by peer {elder.peer_id}):\n"
                + "\n".join(f"  - {difference}" for difference in found)
                + "\nUse the same settings as the swarm, or another run_id"
            )


def canonical(endings: Sequence[Ending], most_samples: int = MAX_SAMPLES) -> Ending | None:
    """Whose state is the run's.

    Of those at the newest epoch, and of these, if there are any, that a holder shares: the state whose last step was of
    the most samples; ties: that most hold; ties: of the lowest peer id. More than ``most_samples`` count as none.
    """
    if not endings:
        return None
    newest = max(ending.epoch for ending in endings)
    last = [ending for ending in endings if ending.epoch == newest]
    shared = {ending.digest for ending in last if ending.shares}
    last = [ending for ending in last if ending.digest in shared or not shared]
    votes = Counter(ending.digest for ending in last)
    work = dict.fromkeys(votes, 0)
    for ending in last:
        if ending.samples <= most_samples:
            work[ending.digest] = max(work[ending.digest], ending.samples)
    best = max((work[digest], votes[digest]) for digest in votes)
    holders = [ending for ending in last if (work[ending.digest], votes[ending.digest]) == best]
    return min(holders, key=lambda ending: ending.peer_id)


def agreed(endings: Mapping[Hashable, Ending], expected: Sequence[Hashable]) -> bool:
    """Whether everyone who is expected has ended, with one state."""
    found = [endings.get(owner) for owner in expected]
    return all(found) and len({(ending.epoch, ending.digest) for ending in found if ending}) <= 1


def _age(presence: Presence) -> tuple[float, str]:
    return presence.since, presence.peer_id
