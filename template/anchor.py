"""What a neuron commits on chain: where it is reached, and (validators) which epoch it stands for.

One slot per hotkey, at most 512 bytes, feeless. A round's base is the newest epoch whose manifest hash was
anchored by a permitted validator before the round's first block, so no two nodes start from different states.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Annotated

import msgpack
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hivetrain.errors import Fault, IntegrityError, PeerFault
from hivetrain.manifest import Manifest, Ref
from template.chain.client import ChainCommitment

MAX_ANCHOR_BYTES = 512
MAX_MADDR_CHARS = 120


Maddr = Annotated[str, Field(min_length=1, max_length=MAX_MADDR_CHARS)]


class Anchor(BaseModel):
    """The content of one hotkey's commitment."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    peer_id: Annotated[str, Field(max_length=64)] = ""
    # An empty address would travel into the leader's plan, which every member then refuses.
    maddrs: Annotated[tuple[Maddr, ...], Field(max_length=4)] = ()
    run_id: Annotated[bytes, Field(max_length=32)] = b""
    repo: Annotated[str, Field(max_length=96, pattern=r"^([\w.-]+/[\w.-]+)?$")] = ""  # the run's on the hub
    epoch: Annotated[int, Field(ge=-1, lt=2**40)] = -1  # -1: stands for none
    manifest: Annotated[bytes, Field(max_length=32)] = b""  # raw sha256 of the manifest file

    def to_bytes(self) -> bytes:
        """Msgpack with one-letter keys.

        Raises:
            ValueError: longer than a commitment may be; announce fewer addresses.
        """
        fields = {
            "p": self.peer_id,
            "a": list(self.maddrs),
            "r": self.run_id,
            "h": self.repo,
            "e": self.epoch,
            "m": self.manifest,
        }
        raw: bytes = msgpack.packb(fields)
        if len(raw) > MAX_ANCHOR_BYTES:
            raise ValueError(f"a commitment holds {MAX_ANCHOR_BYTES} bytes, got {len(raw)}: announce fewer addresses")
        return raw


def parse_anchor(raw: bytes) -> Anchor:
    """Parse a stranger's commitment.

    Raises:
        PeerFault: MALFORMED.
    """
    try:
        if len(raw) > MAX_ANCHOR_BYTES:
            raise ValueError(f"{len(raw)} bytes, the limit is {MAX_ANCHOR_BYTES}")
        fields = msgpack.unpackb(raw, strict_map_key=True)
        if not isinstance(fields, dict) or set(fields) != {"p", "a", "r", "h", "e", "m"}:
            raise ValueError("not an anchor's keys")
        if not isinstance(fields["a"], list):
            raise ValueError("addresses are not a list")
        return Anchor(
            peer_id=fields["p"],
            maddrs=tuple(fields["a"]),
            run_id=fields["r"],
            repo=fields["h"],
            epoch=fields["e"],
            manifest=fields["m"],
        )
    except (ValueError, ValidationError, msgpack.UnpackException) as exc:
        raise PeerFault(Fault.MALFORMED, f"commitment is not an anchor: {exc}") from exc


def parse_anchors(commitments: Mapping[str, ChainCommitment]) -> dict[str, tuple[int, Anchor]]:
    """``hotkey -> (block of commitment, anchor)`` for every commitment that parses."""
    anchors: dict[str, tuple[int, Anchor]] = {}
    for hotkey, commitment in commitments.items():
        try:
            anchors[hotkey] = (commitment.block, parse_anchor(commitment.data))
        except PeerFault:
            continue  # a stranger's commitment of another kind is nobody's fault
    return anchors


def first_owners(
    known: Mapping[str, str],
    anchors: Mapping[str, tuple[int, Anchor]],
    registered: Collection[str],
    doubted: Collection[tuple[str, str]] = (),
) -> dict[str, str]:
    """``peer id -> hotkey`` of who was the first to announce it, among those registered now.

    A peer is bound to a hotkey only by a handshake, so anybody can announce another's. The first one owns it, unless
    it did not come to an all-reduce as that peer, and somebody else announces it too.

    Args:
        known: from the last time; it stands.
        doubted: (peer id, hotkey) of those who did not come.
    """
    owners = {p: hotkey for p, hotkey in known.items() if hotkey in registered and (p, hotkey) not in doubted}
    claims = [(anchor.peer_id, hotkey, block) for hotkey, (block, anchor) in anchors.items() if hotkey in registered]
    for peer, hotkey, _ in sorted(claims, key=lambda one: ((one[0], one[1]) in doubted, one[2], one[1])):
        if peer:
            owners.setdefault(peer, hotkey)
    return owners


def voted_run(anchors: Mapping[str, tuple[int, Anchor]], stakes: Mapping[str, float]) -> tuple[str, str] | None:
    """``(run id, repo)`` behind which permitted validators hold the most stake, or None when nobody names a run.

    Args:
        stakes: of every permitted validator, by hotkey.
    """
    votes: dict[tuple[str, str], float] = {}
    for hotkey, (_, anchor) in anchors.items():
        if hotkey in stakes and len(anchor.run_id) == 32 and anchor.repo:
            run = (anchor.run_id.hex(), anchor.repo)
            votes[run] = votes.get(run, 0.0) + stakes[hotkey]
    return max(sorted(votes), key=lambda run: votes[run]) if votes else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """An epoch that a permitted validator anchored."""

    epoch: int
    manifest_sha256: str
    block: int
    hotkey: str


def candidates(anchors: Mapping[str, tuple[int, Anchor]], permitted: set[str], run_id: str) -> list[Candidate]:
    """Anchored epochs of this run, newest first; of equal epochs the earliest anchored first."""
    found = [
        Candidate(epoch=anchor.epoch, manifest_sha256=anchor.manifest.hex(), block=block, hotkey=hotkey)
        for hotkey, (block, anchor) in anchors.items()
        if hotkey in permitted and anchor.epoch >= 0 and len(anchor.manifest) == 32 and anchor.run_id.hex() == run_id
    ]
    return sorted(found, key=lambda c: (-c.epoch, c.block, c.hotkey))


def find_base(
    found: list[Candidate],
    before_block: int,
    resolve: Callable[[int], Ref | None],
    acceptable: Callable[[Manifest], str | None],
) -> Ref:
    """The base of a round that begins at ``before_block``.

    Args:
        found: from :func:`candidates`.
        before_block: the round's first block; younger anchors do not count, their parents do.
        resolve: an epoch's tag on the hub.
        acceptable: why a manifest is refused (signatures, quorum), or None.

    Raises:
        IntegrityError: nothing that is anchored can be verified.
    """
    reasons: list[str] = []
    for candidate in found:
        epoch, digest = candidate.epoch, candidate.manifest_sha256
        young = candidate.block >= before_block
        try:
            ref = resolve(epoch)
            if ref is not None and young and ref.manifest_sha256 == digest and epoch > 0:
                # Anchored after this round began: its parent is what everybody could see in time.
                epoch, digest = epoch - 1, ref.manifest.parent
                ref = resolve(epoch)
        except IntegrityError as exc:
            reasons.append(f"epoch {epoch}: {exc}")
            continue
        if ref is None:
            reasons.append(f"epoch {epoch} has no tag on the hub")
        elif ref.manifest_sha256 != digest:
            reasons.append(f"epoch {epoch}: the hub's manifest is {ref.manifest_sha256[:12]}, anchored {digest[:12]}")
        elif (why := acceptable(ref.manifest)) is not None:
            reasons.append(f"epoch {epoch}: {why}")
        else:
            return ref
    raise IntegrityError("no anchored epoch can be verified: " + ("; ".join(reasons) or "nothing is anchored"))
