"""The adapter to `hivemind.Optimizer`, which stays the engine of the rounds, and what we bend in it.

Training waits for others as little as it can without a step of staleness. A group is looked for early, so that it is
formed when the swarm has its samples. Until it is formed we go on: what is computed meanwhile counts in the same round.
And whoever sees first that the swarm will have its samples after the step to come calls the rest of the group for then.

Bent besides, each because it was measured to go wrong otherwise: a download of the swarm's state that is retried
without end; a gradient that is not finite and would be everyone's; Ctrl-C ignored from the first averager on.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import math
import statistics
import time
from collections import deque
from collections.abc import Callable
from typing import Any, cast

import hivemind
import torch
from hivemind.averaging.control import AveragingStage
from hivemind.optim.state_averager import dump_optimizer_state
from hivemind.utils import get_dht_time

from hivetrain.errors import ServiceError
from hivetrain.trainer.averagers import COMPRESSIONS, Notes, SwarmGradientAverager, SwarmStateAverager
from hivetrain.trainer.config import CODECS, CODED_OPTIONS, SwarmConfig
from hivetrain.trainer.finite import all_finite
from hivetrain.trainer.node import Node, kept_interrupt
from hivetrain.trainer.rounds import RoundReport
from hivetrain.trainer.tracker import SwarmTracker

logger = logging.getLogger(__name__)

MAX_BACKOFF_S = 30.0
LEFT_BEHIND_TRIES = 3
EARLY = 1.5  # times the matchmaking, before the swarm is expected to have its samples: a group is looked for
LONG_STEP = 1 / 6  # of the averaging timeout: who has longer steps comes at once, for a third is all that others wait


class SwarmOptimizer(hivemind.Optimizer):  # type: ignore[misc]
    """`hivemind.Optimizer` for a Trainer.

    Args:
        node: a started node.
        config: the swarm's options.
        params: parameter groups of the model.
        optimizer: makes the optimizer of given groups, with its state in place.
        scheduler: makes its schedule, stepped once per epoch of the swarm.
        batch_size_per_step: samples of a step whose batches were not counted.
        take_samples: samples since it was last called.
        on_round: called after each step of the swarm, on the training thread.
        shares_state: whether others may download our state from the beginning.
        is_last_step: whether training ends after the step under way.
    """

    def __init__(
        self,
        *,
        node: Node,
        config: SwarmConfig,
        params: Any,
        optimizer: Callable[[Any], torch.optim.Optimizer],
        scheduler: Callable[[torch.optim.Optimizer], Any],
        batch_size_per_step: int,
        take_samples: Callable[[], int],
        on_round: Callable[[RoundReport], None],
        shares_state: bool,
        is_last_step: Callable[[], bool],
    ) -> None:
        self._take_samples, self._is_last_step = take_samples, is_last_step
        self._on_round, self._shares_state = on_round, shares_state
        self._notes, self._state_notes = Notes(), Notes()
        self._reach = config.reach
        self._group_size: int | None = None
        self._group_samples: int | None = None
        self._own_samples, self.most_peers = 0, 1
        self._steps_s: deque[float] = deque(maxlen=5)
        self._step_ended: float | None = None
        self._waits_since: float | None = None
        self._failed_downloads, self._behind_since = 0, 0.0
        self.scheduled_grads: Any = None
        self.scheduled_state: Any = None
        options = dict(config.opt)
        self._request_timeout = cast(dict[str, Any], options["averager_opts"])["request_timeout"]
        options["batch_size_per_step"] = batch_size_per_step
        options["client_mode"] = True  # hivemind reads any value as "what the DHT is"
        self._codecs = [CODECS[str(options.pop(name, "none"))] for name in CODED_OPTIONS]
        if "load_state_compression" in options:
            options["load_state_compression"] = COMPRESSIONS[str(options["load_state_compression"])]()
        if not options.get("use_local_updates"):
            options["grad_averager_factory"] = self._make_grad_averager
        with kept_interrupt():
            super().__init__(
                dht=node.dht, run_id=config.run_id, target_batch_size=config.target_batch_size,
                params=params, optimizer=optimizer, scheduler=scheduler, **options,
            )  # fmt: skip
        self.tracker.called = self._is_called

    def _make_progress_tracker(self, target_batch_size: int, **kwargs: Any) -> SwarmTracker:
        return SwarmTracker(
            dht=self.dht,
            prefix=self.run_id,
            target_batch_size=target_batch_size,
            client_mode=self.client_mode,
            status_loglevel=self.status_loglevel,
            **kwargs,
        )

    def _make_state_averager(self, **kwargs: Any) -> SwarmStateAverager:
        sharing = self._shares_state and not self.client_mode
        return SwarmStateAverager(
            dht=self.dht, prefix=f"{self.run_id}_state_averager", min_matchmaking_time=self.matchmaking_time,
            allreduce_timeout=self.allreduce_timeout, shutdown_timeout=self.shutdown_timeout,
            offload_optimizer=self.offload_optimizer, custom_gradients=self.offload_optimizer,
            status_loglevel=self.status_loglevel, next_chunk_timeout=self.next_chunk_timeout,
            client_mode=self.client_mode, allow_state_sharing=sharing, start=True, codec=self._codecs[1],
            notes=self._state_notes, reach=self._reach(1), **kwargs,
        )  # fmt: skip

    def _make_grad_averager(self, **kwargs: Any) -> SwarmGradientAverager:
        # Nobody downloads a gradient averager's state: it is the state averager's that counts.
        return SwarmGradientAverager(
            **{**kwargs, "request_timeout": self._request_timeout, "allow_state_sharing": False},
            codec=self._codecs[0], notes=self._notes, reach=self._reach(0),
        )  # fmt: skip

    def step(self, closure: Any = None, batch_size: int | None = None, grad_scaler: Any = None) -> Any:
        if self._step_ended is not None:
            self._steps_s.append(time.monotonic() - self._step_ended)
        samples = self._take_samples()
        self.most_peers = max(self.most_peers, self.tracker.global_progress.num_peers)
        try:
            return super().step(closure, batch_size or samples or None, grad_scaler)
        finally:
            self._step_ended = time.monotonic()

    @property
    def trained_samples(self) -> int:
        """Of the whole group, that our last step was of; 0: we have made none since we loaded a state."""
        return self._group_samples or self._own_samples  # where no part was ours to reduce, the group's are not known

    @property
    def can_share(self) -> bool:
        """Whether others can download our state: nobody can dial us in client mode."""
        return not self.client_mode

    def share_state(self, shared: bool) -> None:
        """Let others download our state, or not."""
        if self.can_share:
            self.state_averager.allow_state_sharing = shared

    def flush(self) -> None:
        """Wait, at most an averaging timeout, for updates under way, and apply them."""
        self.state_averager.step(wait_for_delayed_updates=True, apply_delayed_updates=True)

    def download(self, timeout_s: float, least_epoch: int = 0) -> bool:
        """Load the newest state that a peer shares. Returns whether one is as new as ours and ``least_epoch``."""
        loaded = bool(self.state_averager.download(timeout_s, least_epoch))
        if loaded:
            self._own_samples, self._group_samples = 0, None
            self._announce_epoch()
        return loaded

    def state_dict(self) -> Any:
        saved = super().state_dict()
        # In one order, however a peer came by it: equal states are equal files.
        return {
            "state": _in_order(saved["state"]),
            "param_groups": [_in_order(group) for group in saved["param_groups"]],
        }

    def load_state_dict(self, state_dict: Any) -> None:
        super().load_state_dict(state_dict)
        self._announce_epoch()

    def _announce_epoch(self) -> None:
        self.state_averager.relink()
        self.state_averager._update_scheduler()
        known = self.tracker.global_progress
        if self.local_epoch > known.epoch:  # until it hears of it, the tracker would not count our samples
            known.epoch, known.samples_accumulated, known.eta_next_epoch = self.local_epoch, 0, float("inf")
        self.tracker.report_local_progress(self.local_epoch, samples_accumulated=0)
        if not self.client_mode:
            self.state_averager.state_sharing_priority = self.local_epoch
        if self.grad_averager is not None:
            self.grad_averager.reset_accumulated_grads_()

    def digest(self) -> str:
        """A hash of weights and moments."""
        digest = hashlib.blake2b(digest_size=16)
        _, moments = dump_optimizer_state(self.opt)
        for tensor in (*(weight for group in self.opt.param_groups for weight in group["params"]), *moments):
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            digest.update(flat.view(torch.uint8).numpy())
        return digest.hexdigest()

    def load_state_from_peers(self, least_epoch: int = 0, **kwargs: Any) -> None:
        """Catch up with the swarm: one try, longer apart as they fail.

        Args:
            least_epoch: an older state is not taken.

        Raises:
            ServiceError: for `load_state_timeout` seconds nobody gave us a state.
        """
        control, self.scheduled_grads = self.scheduled_grads, None
        if control is not None and not control.done():
            if control.stage is AveragingStage.LOOKING_FOR_GROUP:
                control.cancel()
            else:
                self._tag_along_with_zero_weight(control)
        self.state_averager.step(wait_for_delayed_updates=True)
        with self.tracker.pause_updates():
            loaded = self.download(self.load_state_timeout, least_epoch)
            held = self.local_epoch
            if loaded and self.tracker.global_epoch - 1 <= held < self.tracker.global_epoch:
                self.state_averager.local_epoch = self.tracker.global_epoch
            self._announce_epoch()
            if not self.client_mode:  # who has the epoch's work is asked before us, who have only its number
                self.state_averager.state_sharing_priority = held
        if loaded:
            self._failed_downloads = 0
            return
        now = time.monotonic()
        self._behind_since = now if self._failed_downloads == 0 else self._behind_since
        self._failed_downloads += 1
        if now - self._behind_since > self.load_state_timeout:
            raise ServiceError(
                f"for {now - self._behind_since:.0f} s no peer gave us the swarm's state (it is at epoch "
                f"{self.tracker.global_epoch}, we are at {self.local_epoch}): can they be reached from here?"
            )
        wait_s = min(2.0 ** (self._failed_downloads - 1), MAX_BACKOFF_S)
        logger.warning("swarm: epoch=%s of the swarm not loaded, next try in %.0f s", self.tracker.global_epoch, wait_s)
        time.sleep(wait_s)

    def _maybe_schedule_gradient_averaging(self) -> None:
        if self._looks_for_groups(self.scheduled_grads):
            self.scheduled_grads = self.grad_averager.schedule_step(timeout=self._patience_s())
        self._call_group()

    def _maybe_schedule_state_averaging(self) -> None:
        epoch = max(self.local_epoch + 1, self.tracker.global_epoch)
        if epoch % self.average_state_every or self.state_averager.averaging_in_progress:
            return
        if self._looks_for_groups(self.scheduled_state):
            self.scheduled_state = self.state_averager.schedule_step(gather=epoch, timeout=self._patience_s())

    def _looks_for_groups(self, control: Any) -> bool:
        """Whether it is time to look for a group, and ``control`` does not already."""
        # Alone, hivemind would look for a group, drop it in the end, and take a newcomer into the dropped one.
        if self.tracker.global_progress.num_peers <= 1:
            return False
        free = control is None or control.triggered or control.done()
        return bool(free and self._eta_s() <= EARLY * self.matchmaking_time)

    def _eta_s(self) -> float:
        return max(0.0, float(self.tracker.estimated_next_update_time - get_dht_time()))

    def _patience_s(self) -> float:
        """For how long a group is looked for: the averaging timeout counts from when the swarm has its samples."""
        return self._eta_s() + float(self.averaging_timeout)

    def _step_s(self) -> float:
        """How long one of our steps takes: most of the last ones, whatever was done between two."""
        return statistics.median(self._steps_s) if self._steps_s else 0.0

    def _call_group(self) -> None:
        """Call the group for the end of our next step, where the swarm will have its samples then."""
        control, step_s = self.scheduled_grads, self._step_s()
        if control is None or not _is_formed(control) or self._notes.due < math.inf or self._waits_for_states_group():
            return
        if 0 < step_s <= LONG_STEP * self.allreduce_timeout and self._eta_s() <= step_s and not self._is_last_step():
            self.grad_averager.call_group(step_s)

    def _is_called(self) -> bool:
        """Whether our group is formed, and the end of none of our steps is nearer to the time it was called for."""
        control = self.scheduled_grads
        if control is None or control.triggered or not _is_formed(control) or self._notes.due == math.inf:
            return False
        return self._is_last_step() or time.monotonic() + self._step_s() / 2 >= self._notes.due

    def _waits_for_states_group(self) -> bool:
        """Whether the state's group is looked for, and the swarm has had its samples for less than the matchmaking."""
        state = self.scheduled_state
        if state is None or state.triggered or state.done() or _is_formed(state):
            return False
        return self._waits_since is None or time.monotonic() - self._waits_since < self.matchmaking_time

    def _goes_on(self) -> bool:
        """Whether training goes on although the swarm has its samples: the group is not formed yet, or comes later."""
        control = self.scheduled_grads
        if self.grad_averager is None or self.tracker.global_progress.num_peers <= 1 or self._is_called():
            return False
        if control is None or control.triggered or control.done():
            return False
        self._waits_since = time.monotonic() if self._waits_since is None else self._waits_since
        if not _is_formed(control):
            return True
        return not self._is_last_step() and (self._waits_for_states_group() or self._notes.due < math.inf)

    def _is_left_behind(self) -> bool:
        """Whether others have ended our epoch, no group of ours is about to, and they may give us their state."""
        if self.grad_averager is None or self.tracker.global_epoch <= self.local_epoch:
            return False
        if self._failed_downloads >= LEFT_BEHIND_TRIES:  # who ended it may be gone: with local gradients, then
            return False
        return self.scheduled_grads is None or not _is_formed(self.scheduled_grads)

    def _check_and_accumulate_gradients(self, batch_size: int, grad_scaler: Any) -> bool:
        if not all_finite(list(self.grad_averager._grads_from_parameters())):
            logger.warning("swarm: a gradient is not finite: these %d samples are left out", batch_size)
            return False
        return bool(super()._check_and_accumulate_gradients(batch_size, grad_scaler))

    def _begin_averaging_gradients(self, grad_scaler: Any) -> bool:
        began = bool(super()._begin_averaging_gradients(grad_scaler))
        if began or self.delay_grad_averaging:
            return began
        # Without a group hivemind loads our gradients into the averager alone: an optimizer that is not offloaded would
        # step with its last batch.
        self.scheduled_grads = None
        return True

    def _average_gradients_and_load_into_optimizer(self, maybe_step_control: Any) -> None:
        """Wait for the group's mean, and step with it; where there is no group, or no mean in time, with our own.

        Ours is in the averager's tensors since the round began, which emptied the accumulators: hivemind would load
        these a second time, and step with zeros.
        """
        control = maybe_step_control
        self._group_size, self._group_samples = 1, None
        if control is None:
            self.grad_averager.load_accumulators_into_averager_()
        else:
            try:
                control.result(self.averaging_timeout)
                self._group_size, self._group_samples = self._notes.members, round(self._notes.weight)
            except (Exception, asyncio.CancelledError) as exc:
                logger.log(self.status_loglevel, "Proceeding with local gradients: no mean of the group: %r", exc)
                if not control.done():  # it would write into the tensors when it finds a group after all
                    control.cancel()
        self._load_averaged_gradients_into_optimizer_()
        # The optimizer's own, which are the averager's where it is offloaded, and copies of them elsewhere. A late
        # round holds them until all of its mean is there, or none.
        gradients = [weight.grad for group in self.opt.param_groups for weight in group["params"]]
        with torch.no_grad(), self.grad_averager.get_tensors():
            if not all_finite(gradients):
                logger.warning("swarm: the group's mean is not finite: this step is taken without it")
                for gradient in gradients:
                    gradient.zero_()

    def _update_global_epoch(self, grad_scaler: Any) -> None:
        if self._is_left_behind():  # a step alone would be one that nobody else makes
            newest = self.tracker.global_epoch
            logger.warning("swarm: the others went on to epoch %d without us", newest)
            self.load_state_from_peers(least_epoch=newest)  # one that is as old as ours lacks the step that we missed
            return
        if self._goes_on():
            return
        self._waits_since = None
        samples, sent, began = self.tracker.global_progress.samples_accumulated, self._sent_bytes(), time.perf_counter()
        self._group_size = self._group_samples = None
        self._own_samples = 0 if self.grad_averager is None else self.grad_averager.local_samples_accumulated
        super()._update_global_epoch(grad_scaler)
        self._failed_downloads = 0
        peers = self._group_size
        if peers is None:  # averaged in the background, or local updates: as many as the swarm counts
            peers = max(1, self.tracker.global_progress.num_peers)
        self._on_round(
            RoundReport(
                epoch=self.local_epoch,
                peers=peers,
                samples=self._group_samples or samples,
                seconds=time.perf_counter() - began,
                sent_bytes=self._sent_bytes() - sent,
            )
        )

    def _sent_bytes(self) -> int:
        return self._notes.sent_bytes + self._state_notes.sent_bytes

    def children(self) -> list[int]:
        """Process ids to end if closing fails."""
        return [averager.pid for averager in (self.state_averager, self.grad_averager) if averager is not None]


def _in_order(values: Any) -> Any:
    if not isinstance(values, dict):
        return values
    return {name: _in_order(values[name]) for name in sorted(values, key=str)}


def _is_formed(control: Any) -> bool:
    return bool(control.stage is AveragingStage.AWAITING_TRIGGER and not control.done())
