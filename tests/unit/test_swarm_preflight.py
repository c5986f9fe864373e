"""What is refused before the first connection: each was measured to go wrong without an error."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from hivetrain.errors import ConfigError
from hivetrain.trainer.config import SwarmConfig, read_config
from hivetrain.trainer.fingerprint import differences, fingerprint
from hivetrain.trainer.preflight import TrainerFacts, check_trainer, plan_epochs, steps_bound

FACTS = TrainerFacts(batch_per_step=4, schedule="linear", num_trainable=10)


def swarm(**opt: object) -> SwarmConfig:
    return read_config({"opt": {"run_id": "a", "target_batch_size": 64, **opt}})


def test_an_ordinary_trainer_passes() -> None:
    check_trainer(FACTS, swarm(batch_size_per_step=4, delay_grad_averaging=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_trainable": 0}, "is_trainable=True"),
        ({"batch_per_step": 65}, "target_batch_size 64 is below the 65 samples"),
        ({"schedule": "reduce_lr_on_plateau"}, "own metrics"),
        ({"schedule": "greedy"}, "own metrics"),
        ({"scaler_module": "hivemind.optim.grad_scaler"}, "leaves gradients scaled"),
        ({"ready_optimizer": True}, "schedule would be ignored"),
        ({"world_size": 2}, "one process per GPU"),
        ({"sharded": True}, "one process per GPU"),
        ({"auto_find_batch_size": True}, "mid-run"),
    ],
)
def test_a_trainer_that_would_go_wrong_is_refused(change: dict[str, object], message: str) -> None:
    facts = dataclasses.replace(FACTS, **change)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=message):
        check_trainer(facts, swarm())


def test_torchs_own_gradient_scaler_passes() -> None:
    check_trainer(dataclasses.replace(FACTS, scaler_module="torch.amp.grad_scaler"), swarm())


@pytest.mark.parametrize(
    ("opt", "message"),
    [
        ({"batch_size_per_step": 8}, "leave it out"),
        ({"delay_grad_averaging": True, "delay_optimizer_step": False}, "needs delay_optimizer_step"),
        ({"use_local_updates": True, "delay_grad_averaging": True}, "averages no gradients"),
        ({"use_local_updates": True, "grad_compression": "int8"}, "averages no gradients: drop grad_compression"),
        ({"delay_optimizer_step": True, "offload_optimizer": False}, "need offload_optimizer"),
    ],
)
def test_options_that_exclude_each_other_are_refused(opt: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_trainer(FACTS, swarm(**opt))


def test_a_run_that_would_never_step_is_refused() -> None:
    # 1 sample, accumulated 4 times, 10 steps: 40 samples towards a target of 100.
    with pytest.raises(ConfigError, match=r"never be updated: max_steps 10 x 4 samples = 40"):
        plan_epochs(max_steps=10, batch_per_step=4, target_batch_size=100, swarm_epochs=0)


def test_the_run_is_as_long_as_its_first_peer_alone_would_make_it() -> None:
    assert plan_epochs(max_steps=100, batch_per_step=4, target_batch_size=128, swarm_epochs=0) == 3
    assert plan_epochs(max_steps=1, batch_per_step=4, target_batch_size=128, swarm_epochs=7) == 7


def test_the_bound_on_steps_leaves_room_for_the_whole_run() -> None:
    assert steps_bound(swarm_epochs=7, batch_per_step=4, target_batch_size=130) >= 7 * 33


def print_of(
    model: torch.nn.Module, optimizer: str = "AdamW", schedule: str = "linear", **opt: object
) -> dict[str, str]:
    return fingerprint(model, optimizer, schedule, swarm(**opt))


def linear(size: int = 4, frozen: bool = False) -> torch.nn.Module:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(size, 4), torch.nn.Linear(4, 2))
    model[0].requires_grad_(not frozen)
    return model


def test_equal_trainings_have_equal_fingerprints_whatever_the_initial_weights() -> None:
    other = linear()
    torch.nn.init.zeros_(next(other.parameters()))
    assert differences(print_of(linear()), print_of(other)) == []


def test_a_base_in_another_precision_is_the_same_base() -> None:
    assert differences(print_of(linear(frozen=True)), print_of(linear(frozen=True).bfloat16())) == []


@pytest.mark.parametrize(
    ("other", "what"),
    [
        (print_of(linear(5)), "model"),
        (print_of(linear(frozen=True)), "model"),
        (print_of(linear(), optimizer="SGD"), "optimizer"),
        (print_of(linear(), schedule="cosine"), "schedule"),
        (print_of(linear(), average_state_every=1), "averaging"),
    ],
)
def test_a_difference_is_named_with_its_fix(other: dict[str, str], what: str) -> None:
    found = differences(print_of(linear()), other)
    assert any(line.startswith(f"{what}: the swarm has [") for line in found)


def test_another_base_is_another_training() -> None:
    other = linear(frozen=True)
    with torch.no_grad():
        next(other.parameters())[0, 0] += 1
    assert [line.split(":")[0] for line in differences(print_of(linear(frozen=True)), print_of(other))] == ["base"]
