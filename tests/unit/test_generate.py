"""Which epoch `generate` takes: the one that a miner would start from, whatever else is tagged on the hub."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from hivetrain.errors import HubNotFound, IntegrityError
from hivetrain.hub.memory import MemoryStore
from hivetrain.manifest import Manifest, Ref, state_message
from hivetrain.run import Recipe
from hivetrain.workbench import make_layout
from neurons.generate import MAX_TAGS, newest_epoch
from neurons.sources import PublishedTerms
from template.anchor import Anchor
from template.chain.client import Chain
from template.chain.keys import WalletIdentity
from template.validator.publish import sign_manifest
from tests.chain_fixture import NETUID, LocalChain, local_chain
from tests.hub_fixture import make_manifest

RECIPE = Recipe()
TERMS = PublishedTerms(run_id="1" * 64, schema_hash="ab" * 32, recipe=RECIPE, layout=make_layout(8, RECIPE.averaging))


@pytest.fixture
def net(tmp_path: Path) -> Iterator[LocalChain]:
    with local_chain(tmp_path) as made:
        made.register("validator", stake=5000)
        for name in ("miner", "miner-2", "miner-3"):
            made.register(name)
        made.produce(12)
        yield made


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore()


def published(
    net: LocalChain, store: MemoryStore, epoch: int, *signers: str, leader: str = "validator", **changes: object
) -> Ref:
    fields = make_manifest(epoch, {}).model_dump() | {
        "schema_hash": TERMS.schema_hash,
        "weights": {net.hotkey(name): 100.0 for name in ("miner", "miner-2", "miner-3") if epoch > 0},
        "leader": net.hotkey(leader),
    }
    manifest = Manifest.model_validate(fields | changes)
    message = state_message(manifest.run_id, manifest.round, manifest.attempt, manifest.state_hash)
    signed = {net.hotkey(name): WalletIdentity(net.wallet(name)).sign(message).hex() for name in signers}
    manifest = manifest.model_copy(update={"signatures": signed})
    return store.publish(sign_manifest(manifest, WalletIdentity(net.wallet(leader))), {})


def anchor(net: LocalChain, ref: Ref, who: str = "validator") -> None:
    said = Anchor(run_id=bytes.fromhex(TERMS.run_id), epoch=ref.epoch, manifest=bytes.fromhex(ref.manifest_sha256))
    net.client(who).commit(said.to_bytes())
    net.produce()


def taken(net: LocalChain, store: MemoryStore) -> tuple[Ref, str]:
    return newest_epoch(store, TERMS, lambda: Chain(network="local", netuid=NETUID, chain_endpoint=net.endpoint))


def test_the_anchored_epoch_is_taken_and_no_newer_tag(net: LocalChain, store: MemoryStore) -> None:
    genesis = published(net, store, 0)
    anchor(net, genesis)
    first = published(net, store, 1, "miner", "miner-2", "miner-3")
    assert taken(net, store) == (genesis, "")
    anchor(net, first)
    false = published(net, store, 2, leader="miner")
    anchor(net, false, "miner")  # no validator's word
    assert taken(net, store) == (first, "")
    assert store.latest() == false


@pytest.mark.parametrize(
    ("signers", "leader", "words"),
    [
        (("miner",), "validator", "members who hold 100 of 300 samples signed"),
        (("miner", "miner-2", "miner-3"), "miner", "is no permitted validator"),
    ],
)
def test_an_anchored_epoch_that_no_miner_would_take_is_refused(
    net: LocalChain, store: MemoryStore, signers: tuple[str, ...], leader: str, words: str
) -> None:
    published(net, store, 0)
    anchor(net, published(net, store, 1, *signers, leader=leader))
    with pytest.raises(IntegrityError, match=words):
        taken(net, store)


def test_without_a_chain_the_newest_tag_is_taken_and_the_doubt_is_said(
    net: LocalChain, store: MemoryStore, tmp_path: Path
) -> None:
    newest = published(net, store, 3)
    nowhere = f"sqlite://{tmp_path}/none/chain.db"
    found, doubt = newest_epoch(store, TERMS, lambda: Chain(network="local", netuid=NETUID, chain_endpoint=nowhere))
    assert found == newest
    assert doubt.startswith("the chain does not say which epoch is anchored, so epoch 3 may be anybody's: ")


class Tagged(MemoryStore):
    """A hub on which somebody tagged commits without a manifest."""

    def __init__(self, *false: int) -> None:
        super().__init__()
        self._false = false

    def epochs(self) -> list[int]:
        return [*super().epochs(), *self._false]

    def resolve(self, epoch: int) -> Ref | None:
        if epoch in self._false:
            raise HubNotFound(f"no manifest.json at epoch {epoch}")
        return super().resolve(epoch)


def test_without_a_chain_no_tag_hides_the_newest_epoch_of_the_run(net: LocalChain, tmp_path: Path) -> None:
    def without_chain(store: MemoryStore) -> Ref:
        nowhere = f"sqlite://{tmp_path}/none/chain.db"
        return newest_epoch(store, TERMS, lambda: Chain(network="local", netuid=NETUID, chain_endpoint=nowhere))[0]

    store = Tagged(999_998, 999_999)
    newest = published(net, store, 3)
    published(net, store, 7, run_id="2" * 64)
    assert without_chain(store) == newest
    swamped = Tagged(*range(1000, 1000 + MAX_TAGS))
    published(net, swamped, 3)
    with pytest.raises(IntegrityError, match="none of the newest 64 tags"):
        without_chain(swamped)
