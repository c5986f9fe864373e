"""What peers of one swarm must have in common, and how the first difference is told in words.

hivemind compares the shapes of what it averages, late and by a hash: with another model it retries without end; with
another base or learning rate it averages what does not belong together. So peers publish these few strings in the DHT
before anything else, and whoever comes with others is refused before a single tensor moves.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

import torch

from hivetrain.trainer.config import SwarmConfig

SAMPLED = 256  # elements of each frozen tensor that the base's digest covers

Fingerprint = dict[str, str]

_FIX = {
    "model": "load the same model with the same adapter configuration",
    "base": "load the same base weights (same name, revision and quantization)",
    "optimizer": "use the same optimizer settings",
    "schedule": "use the same lr_scheduler_type, learning_rate and warm-up; leave swarm_epochs to the swarm",
    "averaging": "use the same options in hivemind_config['opt']",
}


def fingerprint(model: torch.nn.Module, optimizer: str, schedule: str, config: SwarmConfig) -> Fingerprint:
    """What identifies this peer's part in a run, each value short and readable.

    Args:
        model: as it will be trained.
        optimizer: its name and settings, without the learning rate.
        schedule: its kind and settings.
        config: the options that have to agree come from here.
    """
    trainable = [(name, value) for name, value in model.named_parameters() if value.requires_grad]
    frozen = [(name, value) for name, value in model.named_parameters() if not value.requires_grad]
    shapes = "\n".join(f"{name} {tuple(value.shape)}" for name, value in trainable)
    names = (
        "use_local_updates", "average_state_every", "average_opt_statistics", "grad_compression",
        "state_averaging_compression",
    )  # fmt: skip
    averaging = {name: config.opt[name] for name in names if config.opt.get(name)}
    return {
        "model": f"{_class_of(model)}, {len(trainable)} trainable tensors of {sum(v.numel() for _, v in trainable)} "
        f"elements, {_digest([shapes.encode()])}",
        "base": f"{len(frozen)} frozen tensors of {sum(v.numel() for _, v in frozen)} elements, "
        f"{_digest(_samples(frozen))}",
        "optimizer": optimizer,
        "schedule": schedule,
        "averaging": f"target_batch_size={config.target_batch_size} "
        + " ".join(f"{name}={value}" for name, value in averaging.items()),
    }


def differences(ours: Mapping[str, str], theirs: Mapping[str, str]) -> list[str]:
    """Where two fingerprints differ, in words with the fix; empty if they agree."""
    found = []
    for name in sorted(ours.keys() | theirs.keys()):
        mine, other = ours.get(name, "nothing"), theirs.get(name, "nothing")
        if mine != other:
            found.append(f"{name}: the swarm has [{other}], we have [{mine}]: {_FIX.get(name, 'use the same version')}")
    return found


def _class_of(model: torch.nn.Module) -> str:
    """The class of the model below any adapter."""
    base = getattr(model, "get_base_model", None)
    inner = base() if callable(base) else model
    wrapped = "" if inner is model else f"{type(model).__name__} of "
    return f"{wrapped}{type(inner).__name__}"


def _samples(tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterable[bytes]:
    for name, value in tensors:
        yield f"{name} {tuple(value.shape)}".encode()
        flat = value.detach().reshape(-1)
        stride = max(1, flat.numel() // SAMPLED)
        sample = flat[::stride][:SAMPLED].cpu()
        # Quantized weights are bytes; everything else in one type, so that the dtype it was loaded with may differ.
        exact = sample if sample.dtype in (torch.uint8, torch.int8) else sample.to(torch.bfloat16).view(torch.int16)
        yield exact.contiguous().numpy().tobytes()


def _digest(pieces: Iterable[bytes]) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()
