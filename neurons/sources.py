"""Where `explain` and `audit` read a run from: the hub of the local network, another hub, or a copy in a folder."""

from __future__ import annotations

import socket
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from safetensors import SafetensorError
from safetensors.torch import load

from hivetrain.averaging.layout import PayloadLayout
from hivetrain.errors import ConfigError, HivetrainError, HubNotFound, IntegrityError
from hivetrain.hub.client import HubStore
from hivetrain.hub.folder import FolderStore
from hivetrain.identity import Verify
from hivetrain.manifest import Ref
from hivetrain.run import Recipe, parse_recipe
from hivetrain.scoring.published import read_records
from hivetrain.scoring.record import RoundRecord
from hivetrain.training.state import ADAPTER_NAME
from hivetrain.verification.receipt import MAX_SNAPSHOT_BYTES
from hivetrain.workbench import RECIPE_NAME, make_layout
from neurons.main import log_retries
from neurons.report import read_genesis

MAX_LEADERS = 64
MIN_PREFIX = 4
LOCAL_TIMEOUT_S = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedTerms:
    """`hivetrain.contribution.Terms`, read from epoch 0 without a model."""

    run_id: str
    schema_hash: str
    recipe: Recipe
    layout: PayloadLayout


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A run as it lies somewhere.

    Attributes:
        repo: of the run on the hub.
        endpoint: of the hub, "" where none is named.
        label: where it is, for messages.
        named: hotkeys that are known for validators beside those who led what is looked at.
    """

    store: HubStore | FolderStore
    repo: str
    endpoint: str
    label: str
    named: frozenset[str] = frozenset()

    def genesis(self) -> tuple[Ref, Recipe]:
        """Epoch 0 and the recipe in it.

        Raises:
            ConfigError: there is no run.
        """
        ref = self.store.resolve(0)
        if ref is None or RECIPE_NAME not in ref.manifest.files:
            raise ConfigError(f"{self.label} holds no run: it has no epoch 0")
        return ref, parse_recipe(self.store.read(ref, RECIPE_NAME).decode(errors="replace"))

    def terms(self) -> PublishedTerms:
        """What the run's receipts are held against.

        Raises:
            ConfigError: there is no run.
            IntegrityError: epoch 0 holds no adapter that can be read.
        """
        ref, recipe = self.genesis()
        entry = ref.manifest.files.get(ADAPTER_NAME)
        if entry is None or entry.size_bytes > MAX_SNAPSHOT_BYTES:
            raise IntegrityError(f"epoch 0 holds no {ADAPTER_NAME} of at most {MAX_SNAPSHOT_BYTES} bytes")
        try:
            tensors = load(self.store.read(ref, ADAPTER_NAME))
        except (SafetensorError, ValueError) as exc:
            raise IntegrityError(f"{ADAPTER_NAME} of epoch 0 cannot be read: {exc}") from exc
        return PublishedTerms(
            run_id=ref.manifest.run_id,
            schema_hash=ref.manifest.schema_hash,
            recipe=recipe,
            layout=make_layout(sum(tensor.numel() for tensor in tensors.values()), recipe.averaging),
        )

    def epoch(self, epoch: int, verify: Verify) -> Ref:
        """One epoch, its leader's signature checked.

        Raises:
            ConfigError: it is not there.
            IntegrityError: it is not signed by its leader.
        """
        if epoch == 0:
            raise ConfigError("epoch 0 is the genesis: nobody trained for it; name a later epoch")
        ref = self.store.resolve(epoch)
        if ref is None:
            there = [number for number in self.store.epochs() if number > 0]
            kept = f"it has {there[0]} to {there[-1]}" if there else "it has none yet"
            raise ConfigError(f"no epoch {epoch} in {self.label}; {kept}")
        manifest = ref.manifest
        if not manifest.is_signed(verify):
            raise IntegrityError(f"the manifest of epoch {epoch} is forged: the signature is not its leader's")
        return ref

    def validators(self, ref: Ref, verify: Verify) -> frozenset[str]:
        """Whom this place knows for validators: those who were named, who led ``ref``, and who led what it came from.

        Whoever can write to the hub can tag an epoch of its own beside those: nothing in ``ref``'s chain of parents
        names it, so its leader is nobody's validator by that.
        """
        leaders = {ref.manifest.leader}
        for _ in range(MAX_LEADERS):
            if ref.epoch <= 1:
                break  # the genesis is no validator's
            try:
                parent = self.epoch(ref.epoch - 1, verify)
            except (ConfigError, HubNotFound, IntegrityError):
                break
            if parent.manifest_sha256 != ref.manifest.parent:
                break
            ref = parent
            leaders.add(ref.manifest.leader)
        return self.named | leaders

    def records(self, ref: Ref, hotkey: str, verify: Verify) -> tuple[str, list[RoundRecord], dict[str, str]]:
        """The validators' records of the round that made an epoch, and why some are refused, by validator.

        Strangers' records are read as well, if they can be; nobody is refused for a file under a made-up name.

        Args:
            hotkey: a miner's, or the beginning of one miner's alone, as logs show it.

        Returns:
            The whole hotkey, the records, the reasons.

        Raises:
            ConfigError: none of them has ``hotkey``, or several begin with it.
            HivetrainError: there is none that holds.
        """
        number = ref.manifest.round
        known = self.validators(ref, verify)
        records, refused = read_records(self.store, self.repo, number, verify, known)
        refused = {validator: why for validator, why in refused.items() if validator in known}
        records = [record for record in records if record.run_id == ref.manifest.run_id]
        if not records:
            why = "; ".join(refused.values()) or "no validator has published any"
            raise HivetrainError(f"no checks of round {number}, which made epoch {ref.epoch}: {why}")
        hotkey = whose(hotkey, {one for record in records for one in record.miners}, ref.epoch)
        return hotkey, [record for record in records if hotkey in record.miners], refused


def whose(hotkey: str, miners: Collection[str], epoch: int) -> str:
    """The one of an epoch's ``miners`` that ``hotkey`` is, or is the beginning of.

    Raises:
        ConfigError: none, or several.
    """
    if hotkey in miners:
        return hotkey
    meant = [one for one in miners if len(hotkey) >= MIN_PREFIX and one.startswith(hotkey)]
    if len(meant) != 1:
        named = "is the beginning of several miners of" if meant else "is no miner's hotkey in"
        raise ConfigError(f"{hotkey} {named} epoch {epoch}; its miners: {', '.join(sorted(miners))}")
    return meant[0]


def _is_up(endpoint: str) -> bool:
    """False where nothing listens at a place of this machine's; what is elsewhere is asked when it is needed."""
    try:
        place = urlsplit(endpoint)
        if place.hostname not in ("127.0.0.1", "localhost", "::1") or place.port is None:
            return True
        with socket.create_connection((place.hostname, place.port), LOCAL_TIMEOUT_S):
            return True
    except ValueError:  # no port
        return True
    except OSError:
        return False


def open_source(*, dir: Path, endpoint: str = "", repo: str = "", copy: Path | None = None) -> Source:
    """The copy in a folder, the hub at ``endpoint``, or that of the network in ``dir``.

    Raises:
        ConfigError: nothing is there.
    """
    log_retries()
    named: frozenset[str] = frozenset()
    of_network = False
    if not endpoint and (dir / "genesis.json").is_file():
        genesis = read_genesis(dir)
        endpoint, repo, of_network = genesis.hub_endpoint, repo or genesis.hub_repo, True
        named = frozenset(wallet.ss58 for wallet in genesis.wallets if wallet.role == "validator")
    if copy is not None:
        if not copy.is_dir():
            raise ConfigError(f"no folder {copy}; write one with `hivetrain mirror {copy}`")
        return Source(store=FolderStore(copy), repo=repo, endpoint=endpoint, label=str(copy), named=named)
    if not endpoint:
        raise ConfigError(f"no run in {dir}; name --dir, --hub.endpoint and --hub.repo, or a copy with --from FOLDER")
    if of_network and not _is_up(endpoint):
        raise ConfigError(
            f"the network in {dir} does not run: its hub {endpoint} does not answer. Start it again with "
            "`hivetrain up`, or read a copy that `hivetrain mirror` wrote with --from FOLDER"
        )
    if not repo:
        raise ConfigError("--hub.repo is needed with --hub.endpoint: the run's repository, OWNER/NAME")
    return Source(
        store=HubStore(endpoint=endpoint, repo=repo),
        repo=repo,
        endpoint=endpoint,
        label=f"{repo} on {endpoint}",
        named=named,
    )
