"""What neurons commit on chain, and which epoch a round starts from."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hivetrain.errors import Fault, IntegrityError, PeerFault
from hivetrain.manifest import Manifest, Ref
from template.anchor import (
    MAX_ANCHOR_BYTES,
    Anchor,
    Candidate,
    candidates,
    find_base,
    first_owners,
    parse_anchor,
    parse_anchors,
)
from template.chain.client import ChainCommitment

RUN = "ab" * 32
FIELDS = {
    "p": "12D3Koo",
    "a": ["/ip4/10.0.0.1/tcp/4001"],
    "r": b"\xab" * 32,
    "h": "me/model",
    "e": 7,
    "m": b"\x01" * 32,
}


def packed(**changes: object) -> bytes:
    raw: bytes = msgpack.packb({**FIELDS, **changes})
    return raw


def test_an_anchor_survives_the_chain() -> None:
    anchor = Anchor(
        peer_id="12D3Koo",
        maddrs=("/ip4/10.0.0.1/tcp/4001",),
        run_id=b"\xab" * 32,
        repo="me/model",
        epoch=7,
        manifest=b"\x01" * 32,
    )
    assert anchor.to_bytes() == packed()
    assert parse_anchor(packed()) == anchor


def test_an_anchor_of_a_neuron_that_stands_for_nothing_survives_too() -> None:
    assert parse_anchor(Anchor().to_bytes()) == Anchor()


def test_more_addresses_than_a_commitment_holds_are_refused_with_the_fix() -> None:
    anchor = Anchor(maddrs=("/x" * 60,) * 4, run_id=b"r" * 32, manifest=b"m" * 32)
    with pytest.raises(ValueError, match=r"holds 512 bytes, got \d+: announce fewer addresses"):
        anchor.to_bytes()


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\xff\xff\xff",
        packed()[:-1],
        packed() + b"\x00",
        msgpack.packb([1, 2]),
        msgpack.packb({**FIELDS, "x": 1}),
        msgpack.packb({"p": "only"}),
        msgpack.packb({1: 2}),
        packed(p=b"bytes"),
        packed(p="x" * 65),
        packed(a="not a list"),
        packed(a=["x" * 121]),
        packed(a=["a"] * 5),
        packed(a=[""]),
        packed(a=[7]),
        packed(r=b"r" * 33),
        packed(r="text"),
        packed(h="no-owner"),
        packed(h="o/" + "x" * 95),
        packed(h="../o/model"),
        packed(h=None),
        packed(e=-2),
        packed(e=2**40),
        packed(e="7"),
        packed(e=7.0),
        packed(e=True),
        packed(e=None),
        packed(m=b"m" * 33),
        packed(m=msgpack.ExtType(5, b"")),
        b"\x81" * 400,
    ],
)
def test_what_is_no_anchor_is_malformed(raw: bytes) -> None:
    with pytest.raises(PeerFault) as caught:
        parse_anchor(raw)
    assert caught.value.fault is Fault.MALFORMED


def test_an_oversized_commitment_is_refused_though_a_part_of_it_would_parse() -> None:
    filler = "/x" * 55
    fields = {**FIELDS, "a": [filler] * 3}
    short = len(msgpack.packb(fields))
    fields["a"] = [*[filler] * 3, "y" * (MAX_ANCHOR_BYTES + 1 - short - 2)]
    raw = msgpack.packb(fields)
    assert len(raw) == MAX_ANCHOR_BYTES + 1
    for commitment in (raw, raw + b"\x00" * 100):
        with pytest.raises(PeerFault, match="the limit is 512"):
            parse_anchor(commitment)


@given(st.binary(max_size=600))
def test_no_bytes_of_a_stranger_raise_anything_else(raw: bytes) -> None:
    with contextlib.suppress(PeerFault):
        parse_anchor(raw)


def test_a_strangers_commitment_is_ignored() -> None:
    found = parse_anchors(
        {
            "ours": ChainCommitment(block=5, data=packed()),
            "theirs": ChainCommitment(block=6, data=b'{"model": "of another subnet"}'),
        }
    )
    assert found == {"ours": (5, parse_anchor(packed()))}


def anchored(epoch: int, block: int, *, run: str = RUN, digest: bytes = b"\x01" * 32) -> tuple[int, Anchor]:
    return block, Anchor(run_id=bytes.fromhex(run), epoch=epoch, manifest=digest)


def test_candidates_are_newest_first_and_of_one_epoch_the_earliest_anchored() -> None:
    anchors = {"a": anchored(3, 50), "b": anchored(4, 70), "c": anchored(4, 60), "d": anchored(4, 60)}
    found = candidates(anchors, {"a", "b", "c", "d"}, RUN)
    assert [(one.epoch, one.hotkey) for one in found] == [(4, "c"), (4, "d"), (4, "b"), (3, "a")]
    assert found[0] == Candidate(epoch=4, manifest_sha256="01" * 32, block=60, hotkey="c")


def test_only_permitted_validators_of_this_run_with_an_epoch_are_candidates() -> None:
    anchors = {
        "permitted": anchored(1, 10),
        "miner": anchored(9, 10),
        "other-run": anchored(9, 10, run="cd" * 32),
        "no-epoch": (10, Anchor(run_id=bytes.fromhex(RUN), manifest=b"\x01" * 32)),
        "short-digest": anchored(9, 10, digest=b"\x01" * 31),
    }
    found = candidates(anchors, {"permitted", "other-run", "no-epoch", "short-digest"}, RUN)
    assert [one.hotkey for one in found] == ["permitted"]


class Hub:
    """Epochs 0 to ``newest``, each the child of the last."""

    def __init__(self, newest: int) -> None:
        self.refs: dict[int, Ref] = {}
        for epoch in range(newest + 1):
            self.refs[epoch] = made(epoch, self.refs[epoch - 1].manifest_sha256 if epoch else "")

    def candidate(self, epoch: int, block: int, hotkey: str = "v") -> Candidate:
        return Candidate(epoch=epoch, manifest_sha256=self.refs[epoch].manifest_sha256, block=block, hotkey=hotkey)

    def base(
        self,
        found: list[Candidate],
        before_block: int = 100,
        acceptable: Callable[[Manifest], str | None] = lambda _: None,
    ) -> int:
        return find_base(found, before_block, self.refs.get, acceptable).epoch


def made(epoch: int, parent: str, nonce: str = "n" * 16) -> Ref:
    manifest = Manifest(
        run_id=RUN,
        epoch=epoch,
        round=epoch - 1,
        parent=parent,
        schema_hash="0" * 64,
        state_hash="0" * 64,
        files={},
        val_loss=1.0,
        block=epoch,
        nonce=nonce,
        leader="v",
    )
    return Ref(epoch=epoch, commit="c", manifest=manifest)


def test_a_round_starts_from_the_newest_anchor_before_its_first_block() -> None:
    hub = Hub(5)
    assert hub.base([hub.candidate(5, 99), hub.candidate(4, 50)]) == 5


def test_an_anchor_of_the_first_block_itself_is_too_young_and_gives_its_parent() -> None:
    hub = Hub(5)
    assert hub.base([hub.candidate(5, 100)]) == 4


def test_genesis_has_no_parent_and_counts_whenever_it_was_anchored() -> None:
    hub = Hub(0)
    assert hub.base([hub.candidate(0, 100)]) == 0


def test_an_earlier_anchor_of_the_same_epoch_wins_over_a_young_one() -> None:
    hub = Hub(5)
    found = candidates(
        {
            "late": (120, Anchor(run_id=bytes.fromhex(RUN), epoch=5, manifest=digest(hub, 5))),
            "early": (80, Anchor(run_id=bytes.fromhex(RUN), epoch=5, manifest=digest(hub, 5))),
        },
        {"late", "early"},
        RUN,
    )
    assert hub.base(found) == 5


def digest(hub: Hub, epoch: int) -> bytes:
    return bytes.fromhex(hub.refs[epoch].manifest_sha256)


def test_where_the_hub_holds_another_manifest_than_anchored_the_next_candidate_counts() -> None:
    hub = Hub(5)
    forged = Candidate(epoch=5, manifest_sha256="ff" * 32, block=50, hotkey="v")
    assert hub.base([forged, hub.candidate(3, 40)]) == 3


def test_a_young_anchor_of_a_replaced_manifest_does_not_vouch_for_its_parent() -> None:
    hub = Hub(5)
    forged = Candidate(epoch=5, manifest_sha256="ff" * 32, block=150, hotkey="v")
    with pytest.raises(IntegrityError, match="epoch 5: the hub's manifest is"):
        hub.base([forged])


def test_a_parent_that_was_replaced_on_the_hub_is_refused() -> None:
    hub = Hub(5)
    hub.refs[4] = made(4, hub.refs[3].manifest_sha256, nonce="x" * 16)
    with pytest.raises(IntegrityError, match="epoch 4: the hub's manifest is"):
        hub.base([hub.candidate(5, 100)])


def test_an_unacceptable_manifest_is_skipped() -> None:
    hub = Hub(5)
    found = [hub.candidate(5, 50), hub.candidate(4, 40)]
    assert hub.base(found, acceptable=lambda m: "forged" if m.epoch == 5 else None) == 4


def test_an_epoch_without_a_tag_is_skipped() -> None:
    hub = Hub(3)
    missing = Candidate(epoch=2**39, manifest_sha256="00" * 32, block=5, hotkey="v")
    assert hub.base([missing, hub.candidate(3, 50)]) == 3


def test_a_tag_that_cannot_be_read_as_a_manifest_is_skipped() -> None:
    hub = Hub(3)

    def resolve(epoch: int) -> Ref | None:
        if epoch == 3:
            raise IntegrityError("not a manifest")
        return hub.refs.get(epoch)

    found = [hub.candidate(3, 50), hub.candidate(2, 40)]
    assert find_base(found, 100, resolve, lambda _: None).epoch == 2


def test_where_nothing_can_be_verified_every_reason_is_told() -> None:
    hub = Hub(3)
    found = [
        Candidate(epoch=9, manifest_sha256="00" * 32, block=5, hotkey="v"),
        Candidate(epoch=3, manifest_sha256="ff" * 32, block=5, hotkey="v"),
        hub.candidate(2, 5),
    ]
    with pytest.raises(IntegrityError) as caught:
        hub.base(found, acceptable=lambda _: "no quorum")
    assert "epoch 9 has no tag on the hub" in str(caught.value)
    assert "anchored ffffffffffff" in str(caught.value)
    assert "epoch 2: no quorum" in str(caught.value)


def test_where_nothing_is_anchored_that_is_said() -> None:
    with pytest.raises(IntegrityError, match="nothing is anchored"):
        Hub(1).base([])


def test_a_peer_belongs_to_whoever_announced_it_first() -> None:
    anchors = {"thief": (9, Anchor(peer_id="12D3")), "victim": (4, Anchor(peer_id="12D3"))}
    assert first_owners({}, anchors, {"thief", "victim"}) == {"12D3": "victim"}
    # The victim's restart moves its block; who was known before stands.
    again = {"thief": (9, Anchor(peer_id="12D3")), "victim": (20, Anchor(peer_id="12D3"))}
    assert first_owners({"12D3": "victim"}, again, {"thief", "victim"}) == {"12D3": "victim"}


def test_a_peer_of_a_hotkey_that_left_can_be_announced_by_another() -> None:
    anchors = {"old": (4, Anchor(peer_id="12D3")), "new": (9, Anchor(peer_id="12D3"))}
    assert first_owners({"12D3": "old"}, anchors, {"new"}) == {"12D3": "new"}


def test_who_announces_no_peer_owns_none() -> None:
    assert first_owners({}, {"shy": (1, Anchor())}, {"shy"}) == {}


def test_who_did_not_come_as_the_peer_that_it_announced_gives_way_to_who_announces_it_too() -> None:
    both = {"aaa": (1, Anchor(peer_id="12D3")), "zzz": (1, Anchor(peer_id="12D3"))}
    assert first_owners({}, both, {"aaa", "zzz"}) == {"12D3": "aaa"}  # of one block: somebody has to be first
    assert first_owners({"12D3": "aaa"}, both, {"aaa", "zzz"}, {("12D3", "aaa")}) == {"12D3": "zzz"}
    # Where nobody else announces it, one absence changes nothing.
    alone = {"aaa": (1, Anchor(peer_id="12D3"))}
    assert first_owners({"12D3": "aaa"}, alone, {"aaa"}, {("12D3", "aaa")}) == {"12D3": "aaa"}
