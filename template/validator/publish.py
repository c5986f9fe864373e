"""PUBLISH: from the state that the group signed to a tag on the hub and a hash on chain."""

from __future__ import annotations

import hashlib
import logging
import secrets
from collections.abc import Callable, Mapping
from types import MappingProxyType

from hivetrain.errors import HivetrainError, HubConflict
from hivetrain.hub.store import ModelStore, always
from hivetrain.identity import Identity
from hivetrain.manifest import MAX_RUNS, FaultEntry, FileEntry, Manifest, Ref
from hivetrain.model.load import CONFIG_NAME, weights_file
from hivetrain.training.state import state_files
from hivetrain.verification.receipt import Receipt
from hivetrain.workbench import BASE_PREFIX, BASE_WEIGHTS, Parts
from template.validator.lead import Led

logger = logging.getLogger(__name__)

MAX_FAULTS = 200
MAX_FALSE_TAGS = 64
"""So many tags past the newest epoch are looked at before each publish."""
PUBLISH_TRIES = 3


def anybody(_manifest: Manifest) -> None:
    """Where whatever was published first stands."""


class NotPublished(HivetrainError):
    """A gate refuses this state: the round makes no epoch. Says which and why."""


def check_gates(parts: Parts, led: Led, val_loss: float, parent_loss: float) -> None:
    """Quorum and held-out loss.

    Raises:
        NotPublished: one of them refuses.
    """
    gates = parts.recipe.gates
    weights = sent_weights(led)
    total = sum(weights.values())
    signed = sum(weights.get(hotkey, 0.0) for hotkey in led.signatures)
    if total <= 0 or signed < gates.quorum * total:
        raise NotPublished(
            f"members who hold {signed:g} of {total:g} samples signed the state, the quorum is {gates.quorum:.2f}"
        )
    limit = parent_loss * (1 + gates.heldout_tolerance)
    if not val_loss <= limit:
        raise NotPublished(
            f"held-out loss {val_loss:.4f} is worse than {limit:.4f} (the parent's is {parent_loss:.4f})"
        )


def sent_weights(led: Led) -> dict[str, float]:
    """Weight of every sender whose vector is in the mean."""
    assert led.done.outcome is not None
    included = led.done.outcome.included
    return {m.hotkey: m.weight for m in led.plan.members if m.sends and included.get(m.hotkey, 0.0) > 0}


def publish_epoch(
    *,
    store: ModelStore,
    parts: Parts,
    base: Ref,
    led: Led,
    val_loss: float,
    block: int,
    identity: Identity,
    receipts: Mapping[str, Receipt] = MappingProxyType({}),
    before_tag: Callable[[], None] = always,
    why_refused: Callable[[Manifest], str | None] = anybody,
) -> Ref:
    """Publish the led round's state as the next epoch.

    Args:
        receipts: what the members signed, by hotkey: the manifest names them, and what its mean lacks, so that
            everyone can tell which remainder follows. One that is not of the vector that the plan names is left out.
        before_tag: called when all is uploaded; what it raises ends the publish without a tag.
        why_refused: why nobody may start from a manifest, or None: such a one takes no epoch's place.

    Raises:
        HubConflict: somebody else published this epoch first.
        HubError: the hub did not take it within the limit.
    """
    state, outcome = led.done.state, led.done.outcome
    assert state is not None
    assert outcome is not None
    files: dict[str, bytes] = state_files(state, parts.flat)
    if state.base is not None:
        files[BASE_PREFIX + CONFIG_NAME] = store.read(parts.genesis, BASE_PREFIX + CONFIG_NAME)
        files[BASE_WEIGHTS] = weights_file(state.base)
    weights = sent_weights(led)
    sent = {member.hotkey: member.root.hex() for member in led.plan.members if member.root is not None}
    # Who was left out in more places than a manifest holds starts from a remainder of zero.
    named = sorted(
        hotkey
        for hotkey in weights
        if hotkey in receipts
        and receipts[hotkey].payload_root == sent.get(hotkey)
        and len(outcome.left_out.get(hotkey, ())) <= MAX_RUNS
    )
    manifest = Manifest(
        run_id=parts.run_id,
        epoch=state.epoch,
        round=led.plan.round,
        attempt=led.plan.attempt,
        parent=base.manifest_sha256,
        schema_hash=parts.schema_hash,
        state_hash=led.done.state_hash,
        base_epoch=parts.recipe.adapter.base_epoch(state.epoch),
        files=file_entries(files),
        members=tuple(sorted(weights)),
        weights=weights,
        receipts={hotkey: receipts[hotkey].sha256() for hotkey in named},
        left_out={hotkey: outcome.left_out[hotkey] for hotkey in named if hotkey in outcome.left_out},
        faults=tuple(
            FaultEntry(hotkey=fault.hotkey, fault=fault.fault.value, detail=fault.detail[:500])
            for fault in outcome.faults[:MAX_FAULTS]
            if fault.hotkey
        ),
        val_loss=val_loss,
        samples=int(sum(weights.values())),
        total_samples=base.manifest.total_samples + int(sum(weights.values())),
        allreduce_seconds=outcome.seconds,
        allreduce_bytes=outcome.bytes_sent + outcome.bytes_received,
        block=block,
        nonce=secrets.token_hex(16),
        leader=identity.hotkey,
        signatures={hotkey: led.signatures[hotkey] for hotkey in weights if hotkey in led.signatures},
    )
    return put_epoch(store, sign_manifest(manifest, identity), files, before_tag, why_refused)


def put_epoch(
    store: ModelStore,
    manifest: Manifest,
    files: Mapping[str, bytes],
    before_tag: Callable[[], None] = always,
    why_refused: Callable[[Manifest], str | None] = anybody,
) -> Ref:
    """Publish ``manifest``, and remove the tags at its place and past it that nobody may follow.

    Whoever holds the hub's token can tag first; without the leader's and the members' keys that is worth nothing.

    Raises:
        HubConflict, HubError: as `publish_epoch`.
    """
    for tries_left in reversed(range(PUBLISH_TRIES)):
        cleared = clear_way(store, manifest.epoch, why_refused)
        try:
            return store.publish(manifest, files, before_tag)
        except HubConflict:
            if not tries_left or not (cleared or clear_way(store, manifest.epoch, why_refused)):
                raise
    raise AssertionError("the last try returns or raises")


def clear_way(store: ModelStore, epoch: int, why_refused: Callable[[Manifest], str | None]) -> dict[int, str]:
    """Remove the tags from ``epoch`` on that nobody may follow; why, by epoch."""
    cleared = {}
    for number in [one for one in store.epochs() if one >= epoch][:MAX_FALSE_TAGS]:
        why = store.clear(number, why_refused)
        if why is not None:
            logger.warning("the tag of epoch %d was put by somebody who may not, and is removed: %s", number, why)
            cleared[number] = why
    return cleared


def sign_manifest(manifest: Manifest, identity: Identity) -> Manifest:
    """``manifest`` with its leader's signature."""
    return manifest.model_copy(update={"leader_signature": identity.sign(manifest.signed_bytes()).hex()})


def file_entries(files: Mapping[str, bytes]) -> dict[str, FileEntry]:
    """Size and sha256 of every file."""
    return {
        name: FileEntry(sha256=hashlib.sha256(content).hexdigest(), size_bytes=len(content))
        for name, content in files.items()
    }
