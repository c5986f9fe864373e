"""Arguments of a Trainer in a swarm, and what its constructor refuses: no swarm is started."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from hivetrain.errors import ConfigError
from tests.model_kit import gpt2

CONFIG: dict[str, Any] = {"dht": {}, "opt": {"run_id": "0123", "target_batch_size": 8}}

GIVEN_TO_THE_TRAINER = ("eval_dataset", "model", "optimizers", "optimizer_cls_and_kwargs", "args")


def arguments(tmp_path: Path, config: Any = CONFIG, **more: Any) -> Any:
    from hivetrain import SwarmArguments

    return SwarmArguments(
        output_dir=str(tmp_path), use_cpu=True, report_to=[], disable_tqdm=True, per_device_train_batch_size=4,
        hivemind_config=config, **more,
    )  # fmt: skip


def trainer(tmp_path: Path, **more: Any) -> Any:
    from hivetrain import SwarmTrainer

    given: dict[str, Any] = {"model": gpt2(), "train_dataset": [{"input_ids": torch.arange(8)}] * 64}
    arguments_of = {name: more.pop(name) for name in list(more) if name not in GIVEN_TO_THE_TRAINER}
    return SwarmTrainer(**{**given, "args": arguments(tmp_path, **arguments_of), **more})


def test_importing_hivetrain_loads_neither_transformers_nor_hivemind() -> None:
    code = "import sys, hivetrain; sys.exit(bool({'transformers', 'hivemind', 'torch'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_arguments_survive_a_dict_a_pickle_and_json(tmp_path: Path) -> None:
    from hivetrain import SwarmArguments

    args = arguments(tmp_path)
    again = SwarmArguments(**{name: value for name, value in args.to_dict().items() if name != "use_cpu"}, use_cpu=True)
    assert again.hivemind_config == args.hivemind_config == CONFIG
    assert pickle.loads(pickle.dumps(args)).hivemind_config == CONFIG
    assert json.loads(args.to_json_string())["hivemind_config"] == CONFIG
    assert "0123" in str(args)


def test_a_run_id_of_digits_stays_a_string_on_the_command_line(tmp_path: Path) -> None:
    from transformers import HfArgumentParser

    from hivetrain import SwarmArguments

    line = ["--output_dir", str(tmp_path), "--hivemind_config", json.dumps(CONFIG), "--swarm_epochs", "5"]
    (args,) = HfArgumentParser(SwarmArguments).parse_args_into_dataclasses(line)
    assert args.hivemind_config["opt"]["run_id"] == "0123"
    assert args.swarm_epochs == 5


def test_a_file_is_read_when_the_arguments_are_made(tmp_path: Path) -> None:
    file = tmp_path / "swarm.json"
    file.write_text(json.dumps(CONFIG))
    assert arguments(tmp_path, str(file)).hivemind_config == CONFIG


def test_two_peers_draw_different_data_and_one_can_choose_its_seed(tmp_path: Path) -> None:
    assert arguments(tmp_path).data_seed != arguments(tmp_path).data_seed
    assert arguments(tmp_path, data_seed=7).data_seed == 7


def test_arguments_that_cannot_work_are_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="run_id"):
        arguments(tmp_path, {"opt": {}})
    with pytest.raises(ConfigError, match="swarm_epochs"):
        arguments(tmp_path, swarm_epochs=-1)
    with pytest.raises(ConfigError, match="min_peers must be 1 or more, got 0"):
        arguments(tmp_path, min_peers=0)


def test_a_trainer_without_a_swarm_is_refused(tmp_path: Path) -> None:
    from transformers import TrainingArguments

    with pytest.raises(ConfigError, match="SwarmTrainer needs args=SwarmArguments"):
        trainer(tmp_path, config=None)
    with pytest.raises(ConfigError, match="got TrainingArguments"):
        trainer(tmp_path, args=TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[]))


def test_a_ready_optimizer_is_refused_for_its_schedule_would_be_ignored(tmp_path: Path) -> None:
    model = gpt2()
    with pytest.raises(ConfigError, match="schedule would be ignored"):
        trainer(tmp_path, model=model, optimizers=(torch.optim.SGD(model.parameters(), lr=0.1), None))


def test_a_plateau_schedule_and_an_impossible_target_are_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="own metrics"):
        trainer(
            tmp_path,
            lr_scheduler_type="greedy",
            eval_strategy="steps",
            eval_steps=5,
            eval_dataset=[{"input_ids": torch.arange(8)}],
        )
    with pytest.raises(ConfigError, match="below the 16 samples"):
        trainer(tmp_path, gradient_accumulation_steps=4)


def test_a_model_without_trainable_parameters_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no trainable parameter"):
        trainer(tmp_path, model=gpt2().requires_grad_(False))


def test_training_that_would_never_step_is_refused_before_anything_is_connected(tmp_path: Path) -> None:
    made = trainer(tmp_path, max_steps=1, config={"opt": {"run_id": "a", "target_batch_size": 100}})
    with pytest.raises(ConfigError, match="never be updated"):
        made.train()
    assert made.session is None


def test_an_optimizer_that_builds_its_own_groups_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="builds its own parameter groups"):
        trainer(tmp_path, max_steps=50, optimizer_cls_and_kwargs=(torch.optim.SGD, {"params": []})).train()
