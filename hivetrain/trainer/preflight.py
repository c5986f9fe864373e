"""What is refused before the first connection, because it would fail late, hang, or train something else.

Each check stands for something that was measured to go wrong without an error: a schedule that is ignored, gradients
that are lost or left scaled, an optimizer that never steps.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass

from hivetrain.errors import ConfigError
from hivetrain.trainer.config import SwarmConfig

logger = logging.getLogger(__name__)

# They set the rate from what this peer's evaluation says: peers would differ.
LOCAL_SCHEDULES = ("reduce_lr_on_plateau", "greedy")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainerFacts:
    """What a Trainer is about to do.

    Attributes:
        batch_per_step: samples between two calls of the optimizer: per device, devices, accumulation.
        schedule: `lr_scheduler_type`, as a string.
        num_trainable: elements of trainable tensors.
        world_size: processes of this Trainer.
        sharded: DeepSpeed or FSDP.
        auto_find_batch_size: whether the batch may shrink in mid-run.
        scaler_module: where the gradient scaler's class comes from; empty without one.
        ready_optimizer: whether an optimizer or scheduler object was handed to the Trainer.
    """

    batch_per_step: int
    schedule: str
    num_trainable: int
    world_size: int = 1
    sharded: bool = False
    auto_find_batch_size: bool = False
    scaler_module: str = ""
    ready_optimizer: bool = False


def check_trainer(facts: TrainerFacts, config: SwarmConfig) -> None:
    """Refuse what cannot work in a swarm.

    Raises:
        ConfigError: with every reason, each with its fix.
    """
    problems: list[str] = []
    if facts.num_trainable == 0:
        problems.append(
            "the model has no trainable parameter, so that training would change nothing: an adapter loaded for "
            "inference needs PeftModel.from_pretrained(..., is_trainable=True)"
        )
    if config.target_batch_size < facts.batch_per_step:
        problems.append(
            f"target_batch_size {config.target_batch_size} is below the {facts.batch_per_step} samples of one step of "
            "this peer (per_device_train_batch_size x devices x gradient_accumulation_steps): raise the one or lower "
            "the others"
        )
    given = config.opt.get("batch_size_per_step")
    if given not in (None, facts.batch_per_step):
        problems.append(
            f"batch_size_per_step is {given!r}, but a step has {facts.batch_per_step} samples: leave it out"
        )
    if facts.schedule in LOCAL_SCHEDULES:
        problems.append(
            f"lr_scheduler_type {facts.schedule!r} follows this peer's own metrics, and peers would train with "
            "different rates: use one that depends on the step alone, such as 'cosine'"
        )
    if facts.scaler_module.split(".")[0] == "hivemind":
        problems.append(
            "hivemind.GradScaler leaves gradients scaled inside a Trainer: use fp16=True (torch's scaler) or bf16=True"
        )
    if facts.ready_optimizer:
        problems.append(
            "an optimizer or scheduler object is built before a checkpoint is loaded and its schedule would be "
            "ignored: use `optim` and `lr_scheduler_type`, or optimizer_cls_and_kwargs"
        )
    if facts.world_size > 1 or facts.sharded:
        problems.append("torchrun, DeepSpeed and FSDP are not supported: start one process per GPU, each a peer")
    if facts.auto_find_batch_size:
        problems.append("auto_find_batch_size changes the batch in mid-run: set per_device_train_batch_size")
    problems += _bad_combinations(config.opt)
    if problems:
        raise ConfigError("this Trainer cannot join the swarm:\n" + "\n".join(f"  - {problem}" for problem in problems))


def _bad_combinations(opt: Mapping[str, object]) -> list[str]:
    problems = []
    if opt.get("delay_grad_averaging") and not opt.get("delay_optimizer_step", True):
        problems.append("delay_grad_averaging needs delay_optimizer_step")
    if opt.get("use_local_updates") and opt.get("delay_grad_averaging"):
        problems.append("use_local_updates averages no gradients: drop delay_grad_averaging")
    if opt.get("use_local_updates") and opt.get("grad_compression"):
        problems.append("use_local_updates averages no gradients: drop grad_compression, or set that of the state")
    if opt.get("offload_optimizer") is False and (opt.get("delay_optimizer_step") or opt.get("delay_grad_averaging")):
        problems.append("delay_optimizer_step and delay_grad_averaging need offload_optimizer")
    return problems


def plan_epochs(max_steps: int, batch_per_step: int, target_batch_size: int, swarm_epochs: int) -> int:
    """How many steps the swarm makes in all, as far as this peer knows.

    Args:
        max_steps: optimizer steps of this peer.
        batch_per_step: samples of each.
        target_batch_size: samples of one step of the swarm.
        swarm_epochs: what the user asked for; 0: as many as this peer would make alone.

    Raises:
        ConfigError: alone it would make none, and nothing says that others help.
    """
    if swarm_epochs:
        return swarm_epochs
    samples = max_steps * batch_per_step
    if samples < target_batch_size:
        raise ConfigError(
            f"the model would never be updated: max_steps {max_steps} x {batch_per_step} samples = {samples}, but one "
            f"step of the swarm takes target_batch_size = {target_batch_size} samples (not steps). Lower "
            "target_batch_size, raise max_steps, or set swarm_epochs if other peers bring the rest"
        )
    return samples // target_batch_size


def steps_bound(swarm_epochs: int, batch_per_step: int, target_batch_size: int) -> int:
    """A `max_steps` that a peer with `swarm_epochs` and none of its own does not reach before the swarm ends.

    Four times what it needs alone: steps whose gradients are dropped (out of step, overflown) count as well.
    """
    return 4 * swarm_epochs * math.ceil(target_batch_size / batch_per_step) + 100
