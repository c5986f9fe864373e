"""Whether a manifest may be a base: led by whose turn it was, signed by it, and by members of a quorum of samples."""

from __future__ import annotations

from collections.abc import Callable

from hivetrain.identity import Verify
from hivetrain.manifest import Manifest, state_message
from hivetrain.workbench import BASE_WEIGHTS


def why_unacceptable(
    manifest: Manifest,
    *,
    run_id: str,
    schema_hash: str,
    quorum: float,
    registered: Callable[[str], bool],
    base_epoch: Callable[[int], int],
    why_no_publisher: Callable[[str, int, int], str | None],
    verify: Verify,
) -> str | None:
    """Why ``manifest`` is refused, or None.

    Args:
        run_id: ours.
        schema_hash: ours.
        quorum: share of the samples whose members must have signed the state, in (0, 1].
        registered: whether a hotkey is registered now; a throwaway key stands for nobody.
        base_epoch: the epoch that holds the base of an epoch, by the recipe.
        why_no_publisher: why ``(hotkey, round, attempt)`` cannot be what was led, or None (`template.leader`).
        verify: checks signatures.
    """
    if manifest.run_id != run_id:
        return f"run {manifest.run_id[:12]}, ours is {run_id[:12]}"
    if not manifest.is_signed(verify):
        return f"not signed by its leader {manifest.leader}"
    if manifest.epoch == 0:
        return None
    if manifest.schema_hash != schema_hash:
        return f"schema {manifest.schema_hash[:12]}, ours is {schema_hash[:12]}"
    wanted = base_epoch(manifest.epoch)
    if manifest.base_epoch != wanted:
        return f"names epoch {manifest.base_epoch} for its base, by the recipe that is epoch {wanted}"
    if wanted == manifest.epoch and BASE_WEIGHTS not in manifest.files:
        return f"its adapter was merged, and it holds no {BASE_WEIGHTS}"
    why = why_no_publisher(manifest.leader, manifest.round, manifest.attempt)
    if why is not None:
        return why
    message = state_message(manifest.run_id, manifest.round, manifest.attempt, manifest.state_hash)
    total = sum(manifest.weights.values())
    signed = sum(
        weight
        for hotkey, weight in manifest.weights.items()
        if registered(hotkey) and verify(hotkey, message, _hex(manifest.signatures.get(hotkey, "")))
    )
    if total <= 0 or signed < quorum * total:
        return f"members who hold {signed:g} of {total:g} samples signed, the quorum is {quorum:.2f}"
    return None


def _hex(text: str) -> bytes:
    try:
        return bytes.fromhex(text)
    except ValueError:
        return b""
