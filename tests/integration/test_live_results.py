"""What counts as an epoch of a running network: what its validators published, whatever else is tagged on its hub."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from hivetrain.errors import HubError
from hivetrain.hub.client import HubStore
from hivetrain.manifest import Manifest, epoch_tag
from neurons.report import Genesis, LiveResults, Member
from template.chain.keys import WalletIdentity, load_wallet
from template.validator.publish import file_entries, sign_manifest
from tests.hub_fixture import HubProcess, make_manifest, running_hub

FILES = {"adapter.safetensors": b"values"}
REPO = "hivetrain/model"


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubProcess]:
    with running_hub(tmp_path_factory.mktemp("hub")) as running:
        yield running


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, WalletIdentity]:
    folder = tmp_path_factory.mktemp("wallets")
    return {
        name: WalletIdentity(load_wallet(name, "default", folder, create=True)) for name in ("validator-1", "miner-1")
    }


def publish(store: HubStore, epoch: int, key: WalletIdentity, **changes: object) -> Manifest:
    manifest = make_manifest(epoch, FILES).model_copy(
        update={"files": file_entries(FILES), "leader": key.hotkey, **changes}
    )
    signed = sign_manifest(manifest, key)
    if "leader_signature" in changes:
        signed = signed.model_copy(update={"leader_signature": changes["leader_signature"]})
    store.publish(signed, FILES)
    return signed


def test_only_what_a_validator_of_the_run_signed_is_an_epoch(
    hub: HubProcess, keys: dict[str, WalletIdentity], tmp_path: Path
) -> None:
    validator, miner = keys["validator-1"], keys["miner-1"]
    members = [
        Member(name=name, hotkey_name="default", role=name.split("-")[0], ss58=key.hotkey) for name, key in keys.items()
    ]
    genesis = Genesis(
        run_id="1" * 64,
        netuid=1,
        chain_endpoint="ws://127.0.0.1:1",
        hub_endpoint=hub.url,
        hub_repo=REPO,
        block_time_s=1.0,
        wallets=tuple(members),
    )
    store, results = HubStore(endpoint=hub.url, repo=REPO), LiveResults(tmp_path, genesis)
    first = publish(store, 0, validator)
    true = publish(store, 1, validator)
    publish(store, 2, miner)
    publish(store, 3, validator, leader_signature="00" * 64)
    publish(store, 4, validator, leader_signature="no hex")
    publish(store, 5, miner, leader=validator.hotkey)
    assert results.epochs() == [0, 1]
    assert (results.manifest(0), results.manifest(1)) == (first, true)
    for epoch in (2, 3, 4, 5, 6):
        with pytest.raises(HubError, match=f"no {epoch_tag(epoch)} that a validator"):
            results.manifest(epoch)
    store.clear(2, lambda manifest: "not a validator's")
    late = publish(store, 2, validator)
    assert results.epochs() == [0, 1, 2]
    assert results.manifest(2) == late
