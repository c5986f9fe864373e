"""A `Trainer` that trains with whoever else has the same `run_id`.

The optimizer and its schedule are made by the Trainer's own settings, but inside `hivemind.Optimizer`, and only once a
checkpoint's weights are loaded: made before, they would hold the old ones. The schedule follows the swarm's epoch; what
the Trainer steps is a view of it.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections import deque
from typing import Any

import torch
from transformers import Trainer, get_scheduler

from hivetrain.errors import ConfigError
from hivetrain.trainer.arguments import SwarmArguments
from hivetrain.trainer.board import Board
from hivetrain.trainer.callback import SwarmCallback
from hivetrain.trainer.clip import clipped
from hivetrain.trainer.config import read_config
from hivetrain.trainer.fingerprint import fingerprint
from hivetrain.trainer.initial import with_state
from hivetrain.trainer.membership import Presence
from hivetrain.trainer.peers import join_lines, peers_of
from hivetrain.trainer.preflight import TrainerFacts, check_trainer, plan_epochs, steps_bound
from hivetrain.trainer.rounds import RoundReport, RunReport
from hivetrain.trainer.schedule import SwarmSchedule
from hivetrain.trainer.session import Interrupts, Session, guard_exit

logger = logging.getLogger(__name__)


class SwarmTrainer(Trainer):  # type: ignore[misc]  # transformers has no types here
    """`Trainer` whose `args` are `SwarmArguments` with a `hivemind_config`; everything else is as in `Trainer`.

    Training ends at `swarm_epochs` steps of the swarm, or at this peer's own `max_steps` or `num_train_epochs`.

    Raises:
        ConfigError: it cannot work in a swarm; `train` raises it too, where the swarm trains something else.
        ServiceError: from `train`: the swarm cannot be reached, or gives no state.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not isinstance(self.args, SwarmArguments) or self.args.hivemind_config is None:
            raise ConfigError(
                "SwarmTrainer needs args=SwarmArguments(..., hivemind_config={'dht': {}, 'opt': {'run_id': ..., "
                f"'target_batch_size': ...}}}}), got {type(self.args).__name__}"
            )
        self._config = read_config(self.args.hivemind_config, peers_of(os.environ, self.args.peers_file))
        check_trainer(self._facts(), self._config)
        if self.args.swarm_epochs and self.args.max_steps <= 0:
            target = self._config.target_batch_size
            self.args.max_steps = steps_bound(self.args.swarm_epochs, self._batch_per_step, target)
        self._session: Session | None = None
        self._planned_epochs = 0
        self._samples = self._computed = 0
        self._interrupts = Interrupts()
        self.rounds: deque[RoundReport] = deque(maxlen=1000)
        self.add_callback(SwarmCallback(self))

    @property
    def session(self) -> Session | None:
        """Our stay in the swarm, while `train` runs."""
        return self._session

    @property
    def interrupted(self) -> bool:
        """Whether Ctrl-C asked this training to stop."""
        return self._interrupts.asked

    @property
    def _batch_per_step(self) -> int:
        return int(self.args.train_batch_size * self.args.gradient_accumulation_steps)

    def run_report(self, rounds: int, averaged: int) -> RunReport:
        """What the run was, while in the swarm.

        Args:
            rounds: steps of the swarm that we made.
            averaged: of these, with others.
        """
        session = self._session
        assert session is not None
        return RunReport(
            rounds=rounds,
            averaged=averaged,
            epoch=session.epoch,
            joined=session.joined,
            most_peers=session.optimizer.most_peers,
            samples=self._computed,
            target_batch_size=self._config.target_batch_size,
            matchmaking_s=self._config.seconds("matchmaking_time"),
        )

    def _facts(self) -> TrainerFacts:
        scaler = getattr(self.accelerator, "scaler", None)
        trainable = sum(value.numel() for value in self.model.parameters() if value.requires_grad)
        return TrainerFacts(
            batch_per_step=self._batch_per_step,
            schedule=str(getattr(self.args.lr_scheduler_type, "value", self.args.lr_scheduler_type)),
            num_trainable=trainable,
            world_size=self.args.world_size,
            sharded=bool(self.is_deepspeed_enabled or self.is_fsdp_enabled),
            auto_find_batch_size=self.args.auto_find_batch_size,
            scaler_module=type(scaler).__module__ if scaler is not None else "",
            ready_optimizer=self.optimizer is not None or self.lr_scheduler is not None,
        )

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer.train`. Leaves the swarm however it ends; Ctrl-C stops after the step, a second one now."""
        guard_exit()
        with self._interrupts.caught():
            try:
                try:
                    return super().train(*args, **kwargs)
                finally:
                    self._leave()
            except KeyboardInterrupt:  # while leaving, too
                raise SystemExit(130) from None

    def set_initial_training_values(self, args: Any, dataloader: Any) -> Any:
        """As in `Trainer`; refuses a run that would never step, before anything is connected."""
        values = super().set_initial_training_values(args, dataloader)
        check_trainer(self._facts(), self._config)
        self._planned_epochs = plan_epochs(
            values[-1], self._batch_per_step, self._config.target_batch_size, self.args.swarm_epochs
        )
        return values

    def create_optimizer(self, model: Any = None) -> Any:
        """Join the swarm and make the optimizer, from the weights as they are now."""
        if self._session is None:
            self._session = self._join(self.model if model is None else model)
        self.optimizer = self._session.optimizer
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """A view of the schedule that the swarm's optimizer steps."""
        self.lr_scheduler: SwarmSchedule | None = SwarmSchedule(self.optimizer if optimizer is None else optimizer)
        self._created_lr_scheduler = True
        return self.lr_scheduler

    def _join(self, model: torch.nn.Module) -> Session:
        with warnings.catch_warnings():  # what hivemind's imports deprecate is not ours to change
            warnings.simplefilter("ignore")
            from hivetrain.trainer.engine import SwarmOptimizer
            from hivetrain.trainer.node import Node

        args = self.args
        optimizer_cls, settings = self.optimizer_cls_and_kwargs or self.get_optimizer_cls_and_kwargs(args, model)
        if not (isinstance(optimizer_cls, type) and issubclass(optimizer_cls, torch.optim.Optimizer)) or (
            {"params", "model", "optimizer_dict"} & settings.keys()
        ):
            raise ConfigError(
                f"optim={args.optim!r} builds its own parameter groups, which a swarm cannot: use another"
            )
        self._computed = 0
        print_of = fingerprint(model, _in_words(optimizer_cls, settings, args), self._schedule_in_words(), self._config)
        node = Node(self._config)
        node.start()
        try:
            for line in join_lines(node.visible_maddrs(), ["python", *sys.argv]):
                print(line, flush=True)
            epochs = self._planned_epochs or args.swarm_epochs
            me = Presence(peer_id=node.peer_id, since=node.now(), swarm_epochs=epochs, fingerprint=print_of)
            board = Board(node, self._config.run_id, me, asked_epochs=args.swarm_epochs)
            session = Session(self._config, node, board, board.join())
        except BaseException:
            node.close()
            raise
        self._session = session  # from here on `_leave` closes it
        session.optimizer = SwarmOptimizer(
            node=node,
            config=self._config,
            params=self._parameter_groups(model),
            optimizer=lambda groups: clipped(with_state(optimizer_cls(groups, **settings)), args.max_grad_norm),
            scheduler=lambda inner: self._schedule_of(inner, session.swarm_epochs),
            batch_size_per_step=self._batch_per_step,
            take_samples=self._take_samples,
            on_round=self.rounds.append,
            shares_state=session.founding,
            is_last_step=lambda: self.interrupted or self.state.global_step + 1 >= self.state.max_steps,
        )
        return session

    def _parameter_groups(self, model: torch.nn.Module) -> list[dict[str, Any]]:
        decayed = set(self.get_decay_parameter_names(model))
        named = [(name, value) for name, value in model.named_parameters() if value.requires_grad]
        groups = [
            {"params": [value for name, value in named if name in decayed], "weight_decay": self.args.weight_decay},
            {"params": [value for name, value in named if name not in decayed], "weight_decay": 0.0},
        ]
        return [group for group in groups if group["params"]]

    def _schedule_of(self, optimizer: torch.optim.Optimizer, epochs: int) -> Any:
        return get_scheduler(
            self.args.lr_scheduler_type,
            optimizer=optimizer,
            num_warmup_steps=self.args.get_warmup_steps(epochs),
            num_training_steps=epochs,
            scheduler_specific_kwargs=self.args.lr_scheduler_kwargs,
        )

    def _schedule_in_words(self) -> str:
        args = self.args
        kind = getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)
        more = f", {args.lr_scheduler_kwargs}" if args.lr_scheduler_kwargs else ""
        return f"{kind}, learning_rate={args.learning_rate:g}, warmup_steps={args.warmup_steps:g}{more}"

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """As in `Trainer`; counts samples, by which the swarm weighs this peer's gradient."""
        sizes = [len(value) for value in inputs.values() if isinstance(value, torch.Tensor) and value.dim() > 0]
        self._samples += sizes[0] if sizes else self.args.train_batch_size
        return super().training_step(model, inputs, *args, **kwargs)

    def _clip_grad_norm(self, model: Any) -> Any:
        # The norm of this step alone, for the log: clipped is the mean of all peers (`clipped`).
        return self.accelerator.clip_grad_norm_(model.parameters(), float("inf"))

    def _take_samples(self) -> int:
        taken, self._samples = self._samples, 0
        self._computed += taken
        return taken

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        self.flush()
        super()._save_checkpoint(*args, **kwargs)

    def save_model(self, *args: Any, **kwargs: Any) -> None:
        """As in `Trainer`, with every update of the swarm applied."""
        self.flush()
        super().save_model(*args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """As in `Trainer`, with every update of the swarm applied."""
        self.flush()
        return super().evaluate(*args, **kwargs)

    def flush(self) -> None:
        """Apply updates of the swarm that are under way, while in it."""
        if self._session is not None and self._session.optimizer is not None:
            self._session.optimizer.flush()

    def _leave(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            # A second `train` joins anew.
            self.optimizer, self.lr_scheduler = None, None
            session.close()


def _in_words(optimizer_cls: type, settings: dict[str, Any], args: SwarmArguments) -> str:
    shown = {name: value for name, value in sorted(settings.items()) if name != "lr"}
    listed = ", ".join(f"{name}={value}" for name, value in shown.items())
    decay, clip = f"weight_decay={args.weight_decay:g}", f"max_grad_norm={args.max_grad_norm:g}"
    return f"{optimizer_cls.__name__}({listed}), {decay}, {clip}"[:1000]
