"""A miner: trains on what it is assigned, commits to what it did, averages with the group.

    python neurons/miner.py --netuid 1 --wallet.name miner --wallet.hotkey default --axon.port 8091

One round, as `Miner.round` tells it: find the base, train, commit, take part in the all-reduce, and see what
was published. A round that fails is skipped; the next one starts from the newest published epoch.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

if __package__ in (None, ""):  # run as a script: make the checkout importable
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import logging
from collections.abc import Callable

from hivetrain.averaging.feedback import Feedback
from hivetrain.contribution import Contribution, build_contribution
from hivetrain.data.assignment import NoSlot
from hivetrain.data.reader import RoundData
from hivetrain.errors import ServiceError
from hivetrain.progress import Phase, Position, phase_window
from hivetrain.tracking import metrics
from hivetrain.training.inner import RoundWork, StepReport, TrainingDiverged
from hivetrain.training.state import State
from neurons.main import run_neuron
from template.neuron import Neuron

logger = logging.getLogger(__name__)


class Miner(Neuron):
    """Trains."""

    def start(self) -> None:
        """Open everything, as `Node.start`, and what error feedback owes from before a restart."""
        super().start()
        self.feedback = Feedback(
            self.config.state_dir / "remainder", self.parts.layout, run_id=self.run_id, hotkey=self.identity.hotkey
        )
        self.feedback.load()

    def round(self, position: Position) -> None:
        """One round of this miner."""
        base = self.find_base(position)
        self.adopt(base)
        self.begin_round(position, base)
        self.status.update(round=position.round, epoch=base.epoch, step=0)
        contribution = self.train(position)
        if contribution is not None:
            if contribution.carried is not None:
                self.feedback.keep(contribution.receipt, contribution.carried)
            self.board.commit(contribution)
            self.events.append(
                "committed",
                f"round {position.round}: {contribution.receipt.num_steps} steps, loss {contribution.receipt.loss:.3f}",
                round=position.round,
                steps=contribution.receipt.num_steps,
                loss=contribution.receipt.loss,
            )
            self._say("committed", "")
        if self.wait_for_phase(position, Phase.VERIFY):
            self.learn_leader(position)
        if self.wait_for_phase(position, Phase.PUBLISH):
            self._say("waiting", "for the next epoch")
            self.wait_for_epoch(position)

    def learn_leader(self, position: Position) -> None:
        """Know who leads before it calls; a chain that stammers is asked again until the all-reduce."""
        end = phase_window(position.round, Phase.PUBLISH, self.schedule)[0]
        while self.blocks.block < end and not self.stopping.is_set():
            try:
                self.leader_order(position.round)
                return
            except ServiceError as exc:
                logger.warning("cannot tell who leads yet: %s", exc)
                self.wait_for_block(self.blocks.block + 1)

    def train(self, position: Position) -> Contribution | None:
        """Take inner steps until the assignment, the recipe or TRAIN ends; None where there is nothing to commit."""
        assert self.held is not None
        base, state = self.held.ref, self.held.state
        rank = self.ranks(position.round_start).get(self.identity.hotkey)
        if self.metagraph.by_hotkey(self.identity.hotkey) is None:
            self._require_registered()
        if rank is None:
            self._say("waiting", "registered during this round, trains from the next")
            return None
        try:
            data = self.load_data(position.round, rank)
        except NoSlot as exc:
            self._say("waiting", str(exc))
            return None
        num_steps = data.num_steps(self.recipe.inner.max_steps)
        self.board.update(state="training", num_steps=num_steps)
        self.status.update(state="training", num_steps=num_steps, detail="")
        deadline = position.round_start + self.schedule.train
        started = time.perf_counter()
        global_step = state.step

        def on_step(report: StepReport) -> None:
            done = report.step + 1
            rate = done * report.num_tokens / (time.perf_counter() - started)
            self.board.update(step=done, loss=report.loss, tokens_per_second=rate)
            self.status.update(step=done, loss=report.loss, tokens_per_second=rate)
            self.tracker.log(
                {
                    metrics.TRAIN_LOSS: report.loss,
                    metrics.TRAIN_STEP: done,
                    metrics.TRAIN_TOKENS_PER_SECOND: rate,
                    metrics.TRAIN_LEARNING_RATE: report.lr,
                    metrics.TRAIN_GRAD_NORM: report.grad_norm,
                    metrics.GLOBAL_EPOCH: base.epoch,
                },
                step=global_step + done,
            )

        try:
            work = self.do_steps(
                state,
                data,
                num_steps,
                lambda: self.stopping.is_set() or self.blocks.block >= deadline,
                on_step,
            )
        except TrainingDiverged as exc:
            logger.error("round %d: %s", position.round, exc)
            self.events.append("diverged", str(exc), round=position.round)
            return None
        if work.num_steps == 0 or self.stopping.is_set():
            return None
        logger.info(
            "round %d: %d steps in %.1f s, loss %.3f -> %.3f",
            position.round,
            work.num_steps,
            work.seconds,
            work.losses[0],
            work.losses[-1],
        )
        return self.contribute(position.round, rank, data, work)

    # -- the steps of `train`, each of which a subclass may replace ----------------------------------------

    def load_data(self, round_number: int, rank: int) -> RoundData:
        """The tokens that the round assigns to ``rank``; raises as `Workbench.round_data`."""
        return self.bench.round_data(self.parts, round_number, rank)

    def do_steps(
        self,
        state: State,
        data: RoundData,
        num_steps: int,
        should_stop: Callable[[], bool],
        on_step: Callable[[StepReport], None],
    ) -> RoundWork:
        """Up to ``num_steps`` inner steps on the assigned data; raises as `InnerLoop.run`."""
        return self.parts.loop.run(state, data.batch, num_steps=num_steps, should_stop=should_stop, on_step=on_step)

    def contribute(self, round_number: int, rank: int, data: RoundData, work: RoundWork) -> Contribution:
        """What is committed of ``work``."""
        assert self.held is not None
        return build_contribution(
            parts=self.parts,
            base=self.held.ref,
            start=self.held.state,
            work=work,
            data=data,
            round_number=round_number,
            rank=rank,
            identity=self.identity,
            remainder=self.feedback.remainder(self.held.ref.manifest),
        )


def main() -> None:
    """Parse the flags, run, and exit 0 when stopped, 2 for a setting that cannot work, 1 for anything else."""
    sys.exit(run_neuron("miner", Miner))


if __name__ == "__main__":
    main()
