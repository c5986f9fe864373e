"""What happens between two steps of a Trainer in a swarm: rounds are reported, and the end is recognised."""

from __future__ import annotations

import logging
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

logger = logging.getLogger(__name__)


class SwarmCallback(TrainerCallback):  # type: ignore[misc]  # transformers has no types here
    """Belongs to one `SwarmTrainer`."""

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._reported = self._rounds = self._averaged = 0
        self._stepped = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._reported = self._rounds = self._averaged = 0
        self._stepped = False
        self._trainer.rounds.clear()
        # Only here are a checkpoint's optimizer and epoch loaded, too.
        self._trainer.session.adopt_state()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        session = self._trainer.session
        self._report()
        if session.epoch >= session.swarm_epochs and not control.should_training_stop:
            control.should_training_stop = True
            control.should_log = True
            control.should_save = control.should_save or args.save_strategy == SaveStrategy.STEPS
            control.should_evaluate = control.should_evaluate or args.eval_strategy == IntervalStrategy.STEPS
        if self._trainer.interrupted:
            control.should_training_stop = True
        elif not self._stepped and not control.should_training_stop:
            session.await_peers(args.min_peers, lambda: self._trainer.interrupted)
        self._stepped = True
        if control.should_training_stop:
            session.settle()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if control.should_training_stop:
            self._trainer.session.settle()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if problem := self._trainer.run_report(self._rounds, self._averaged).problem():
            logger.warning("swarm: %s", problem)

    def _report(self) -> None:
        trainer = self._trainer
        for report in [report for report in trainer.rounds if report.epoch > self._reported]:
            self._reported = report.epoch
            self._rounds += 1
            self._averaged += report.peers > 1
            logger.info(
                "swarm: epoch=%d peers=%d samples=%d seconds=%.2f sent_bytes=%d",
                report.epoch, report.peers, report.samples, report.seconds, report.sent_bytes,
            )  # fmt: skip
            trainer.log(report.metrics())
            for callback in trainer.callback_handler.callbacks:
                if (bar := getattr(callback, "training_bar", None)) is not None:
                    bar.set_postfix_str(report.postfix())
