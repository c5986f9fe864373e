"""The adapter to `hivemind.Optimizer`, which stays the engine of the rounds, and what we bend in it.

Bent, each because it was measured to go wrong otherwise: a download of the swarm's state that is retried without end,
or believed without a look at its shapes; batches of different sizes weighed wrongly; a gradient that is not finite and
would be everyone's; Ctrl-C ignored from the first averager on; processes that outlive the one they served.
"""

from __future__ import annotations

import hashlib
import logging
import multiprocessing
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import hivemind
import torch
from hivemind.averaging.allreduce import AllReduceRunner
from hivemind.averaging.averager import DecentralizedAverager
from hivemind.averaging.partition import AllreduceException
from hivemind.optim.grad_averager import GradientAverager
from hivemind.optim.progress_tracker import ProgressTracker
from hivemind.optim.state_averager import TrainingStateAverager, dump_optimizer_state
from hivemind.utils import ValueWithExpiration, get_dht_time
from hivemind.utils.asyncio import as_aiter, azip

from hivetrain.errors import ServiceError
from hivetrain.trainer.config import COMPRESSION_OPTIONS, SwarmConfig
from hivetrain.trainer.node import Node, die_with, quieten_asyncio
from hivetrain.trainer.rounds import RoundReport

logger = logging.getLogger(__name__)

MAX_BACKOFF_S = 30.0
FIRST_ESTIMATE_S = 0.1

_COMPRESSIONS: Mapping[str, Callable[[], Any]] = {
    "none": hivemind.compression.NoCompression,
    "float16": hivemind.compression.Float16Compression,
    "scaled_float16": hivemind.compression.ScaledFloat16Compression,
    "uniform_8bit": hivemind.compression.Uniform8BitQuantization,
    "quantile_8bit": hivemind.compression.Quantile8BitQuantization,
    "blockwise_8bit": hivemind.compression.BlockwiseQuantization,
}


class _Averager(DecentralizedAverager):  # type: ignore[misc]
    """What both averagers share: their process ends with ours, bytes sent are counted, downloads are checked."""

    sent_bytes: Any
    heard: Any  # of the newest round: the sum of the weights that members declared to us, and how many did

    def run(self) -> None:
        die_with(self._parent_pid)
        quieten_asyncio()
        super().run()

    async def _run_allreduce_inplace_(
        self, tensors: Any, group_info: Any, group_id: bytes | None = None, **kwargs: Any
    ) -> None:
        group_id = group_info.group_id if group_id is None else group_id
        runner = _CountingRunner(
            p2p=self._p2p, servicer_type=type(self), prefix=self.prefix, tensors=tensors, group_id=group_id,
            ordered_peer_ids=group_info.peer_ids, **kwargs,
        )  # fmt: skip
        runner.sent_bytes, runner.heard = self.sent_bytes, self.heard
        self.heard[:] = [runner.weight, 1.0]
        self._running_groups[group_id].set_result(runner)
        async for tensor, update in azip(as_aiter(*tensors), runner):
            if update.shape != tensor.shape:
                raise AllreduceException(f"an average has shape {tuple(update.shape)}, expected {tuple(tensor.shape)}")
            tensor.add_(update, alpha=self._averaging_alpha)
            self.last_updated = get_dht_time()
            self._state_updated.set()

    def load_state_from_peers(self, **kwargs: Any) -> tuple[Any, Sequence[torch.Tensor]] | None:
        state = super().load_state_from_peers(**kwargs)
        self.downloaded_epoch: int | None = None
        if state is None:
            return None
        metadata, tensors = state
        if problem := self._problem_of(metadata, tensors):
            logger.warning("a peer's state is refused: %s", problem)
            return None
        self.downloaded_epoch = metadata["epoch"]
        return metadata, tensors

    def _problem_of(self, metadata: Any, tensors: Sequence[torch.Tensor]) -> str | None:
        """What is wrong with a downloaded state; hivemind would copy it half and fail in the middle."""
        return None


class _CountingRunner(AllReduceRunner):  # type: ignore[misc]
    sent_bytes: Any
    heard: Any

    async def _generate_input_for_peer(self, peer_index: int) -> AsyncIterator[Any]:
        async for message in super()._generate_input_for_peer(peer_index):
            self._count(message)
            yield message

    async def rpc_aggregate_part(self, stream: Any, context: Any) -> AsyncIterator[Any]:
        async for message in super().rpc_aggregate_part(self._listen(stream), context):
            self._count(message)
            yield message

    async def _listen(self, stream: Any) -> AsyncIterator[Any]:
        first = True
        async for message in stream:
            if first:
                with self.heard.get_lock():
                    self.heard[0] += message.weight
                    self.heard[1] += 1
            first = False
            yield message

    def _count(self, message: Any) -> None:
        with self.sent_bytes.get_lock():
            self.sent_bytes.value += len(message.tensor_part.buffer)


class _GradientAverager(GradientAverager, _Averager):  # type: ignore[misc]
    def __init__(self, *args: Any, sent_bytes: Any, **kwargs: Any) -> None:
        self.sent_bytes, self.heard = sent_bytes, multiprocessing.Array("d", 2)
        super().__init__(*args, **kwargs)

    @torch.no_grad()
    def load_accumulators_into_averager_(self) -> None:
        # hivemind divides by the number of batches, which is right only where all have the size of the first.
        samples = self.local_samples_accumulated
        scale = self._anchor_batch_size / samples if samples else 0.0
        with self.get_tensors() as averaged:
            for accumulated, mean in zip(self._grad_accumulators(), averaged, strict=True):
                mean.copy_(accumulated, non_blocking=True).mul_(scale)


class _StateAverager(TrainingStateAverager, _Averager):  # type: ignore[misc]
    def __init__(self, *, sent_bytes: Any, **kwargs: Any) -> None:
        self.sent_bytes, self.heard = sent_bytes, multiprocessing.Array("d", 2)
        super().__init__(**kwargs)

    def download(self, timeout_s: float) -> bool:
        """Load the newest state that a peer shares; False if none is as new as ours."""
        before = self.local_epoch
        self.load_state_from_peers(timeout=timeout_s)
        return self.downloaded_epoch is not None and self.downloaded_epoch >= before

    @torch.no_grad()
    def relink(self) -> None:
        """Average the optimizer's statistics that are in use: loading a state replaced the tensors shared for it."""
        if not self.reuse_tensors:
            return
        weights = [weight for group in self.optimizer.param_groups for weight in group["params"]]
        shared = iter(self._averaged_tensors[len(weights) :])
        with self.lock_averaged_tensors:
            for name in self.opt_keys_for_averaging:
                for weight in weights:
                    tensor, loaded = next(shared), self.optimizer.state[weight][name]
                    if tensor.data_ptr() != loaded.data_ptr():
                        tensor.copy_(loaded)
                        self.optimizer.state[weight][name] = tensor

    def _problem_of(self, metadata: Any, tensors: Sequence[torch.Tensor]) -> str | None:
        return problem_of_state(self.optimizer, self.extra_tensors, metadata, tensors)


def problem_of_state(
    optimizer: torch.optim.Optimizer, extra_tensors: Sequence[torch.Tensor], metadata: Any, tensors: Sequence[Any]
) -> str | None:
    """What makes a downloaded state another than ours, in words; None: it can be loaded."""
    values, moments = dump_optimizer_state(optimizer)
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    expected = [tuple(tensor.shape) for tensor in (*weights, *extra_tensors, *moments)]
    if not isinstance(metadata, dict) or not isinstance(metadata.get("epoch"), int):
        return f"its epoch is {metadata.get('epoch') if isinstance(metadata, dict) else metadata!r}"
    theirs = metadata.get("optimizer_metadata")
    if not isinstance(theirs, list | tuple) or [_kind(one) for one in theirs] != [_kind(one) for one in values]:
        return "its optimizer is another one"
    shapes = [tuple(tensor.shape) for tensor in tensors]
    if shapes != expected:
        return f"it has {len(shapes)} tensors, ours {len(expected)}, or other shapes"
    if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors):
        return "it holds values that are not finite"
    return None


def _kind(entry: Any) -> Any:
    """A tensor and its place, or a value's type, in what `dump_optimizer_state` says."""
    if not isinstance(entry, dict):
        return None
    return (entry.get("type"), entry["index"]) if entry.get("type") == "tensor" else type(entry.get("value")).__name__


class _Tracker(ProgressTracker):  # type: ignore[misc]
    def _parse_swarm_progress_data(self, metadata: Any) -> Any:
        # What the DHT holds of ourselves is older than what we know: with it, an epoch would last some steps longer.
        ours = self.local_progress
        if isinstance(metadata, dict) and metadata and (ours.samples_accumulated or self._local_public_key in metadata):
            entry = ValueWithExpiration(ours.dict(), get_dht_time() + self.metadata_expiration)
            metadata = {**metadata, self._local_public_key: entry}
        return super()._parse_swarm_progress_data(metadata)


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
    ) -> None:
        self._take_samples, self._on_round, self._shares_state = take_samples, on_round, shares_state
        self._sent = multiprocessing.Value("q", 0)
        self._group_size: int | None = None
        self._group_samples: int | None = None
        self._failed_downloads, self._behind_since = 0, 0.0
        self.scheduled_grads: Any = None
        options = dict(config.opt)
        self._request_timeout = cast(dict[str, Any], options["averager_opts"])["request_timeout"]
        options["batch_size_per_step"] = batch_size_per_step
        options["client_mode"] = True  # hivemind reads any value as "what the DHT is"
        for name in COMPRESSION_OPTIONS:
            if name in options:
                options[name] = _COMPRESSIONS[str(options[name])]()
        if not options.get("use_local_updates"):
            options["grad_averager_factory"] = self._make_grad_averager
        with _kept_interrupt():
            super().__init__(
                dht=node.dht, run_id=config.run_id, target_batch_size=config.target_batch_size,
                params=params, optimizer=optimizer, scheduler=scheduler, **options,
            )  # fmt: skip
        # Without a first estimate hivemind looks for the first group for a state only when training waits for it.
        for estimate in (self.delay_before_state_averaging, self.state_averager.delay_before_averaging):
            estimate.update(task_size=1, interval=FIRST_ESTIMATE_S)

    def _make_progress_tracker(self, target_batch_size: int, **kwargs: Any) -> _Tracker:
        return _Tracker(
            dht=self.dht,
            prefix=self.run_id,
            target_batch_size=target_batch_size,
            client_mode=self.client_mode,
            status_loglevel=self.status_loglevel,
            start=True,
            **kwargs,
        )

    def _make_state_averager(self, **kwargs: Any) -> _StateAverager:
        sharing = self._shares_state and not self.client_mode
        return _StateAverager(
            dht=self.dht, prefix=f"{self.run_id}_state_averager", min_matchmaking_time=self.matchmaking_time,
            allreduce_timeout=self.allreduce_timeout, shutdown_timeout=self.shutdown_timeout,
            offload_optimizer=self.offload_optimizer, custom_gradients=self.offload_optimizer,
            status_loglevel=self.status_loglevel, next_chunk_timeout=self.next_chunk_timeout,
            client_mode=self.client_mode, allow_state_sharing=sharing, sent_bytes=self._sent, start=True, **kwargs,
        )  # fmt: skip

    def _make_grad_averager(self, **kwargs: Any) -> _GradientAverager:
        # Nobody downloads a gradient averager's state: it is the state averager's that counts.
        return _GradientAverager(
            **{**kwargs, "request_timeout": self._request_timeout, "allow_state_sharing": False},
            sent_bytes=self._sent,
        )

    def step(self, closure: Any = None, batch_size: int | None = None, grad_scaler: Any = None) -> Any:
        samples = self._take_samples()
        return super().step(closure, batch_size or samples or None, grad_scaler)

    def share_state(self, shared: bool) -> None:
        """Let others download our state, or not."""
        if not self.client_mode:
            self.state_averager.allow_state_sharing = shared

    def flush(self) -> None:
        """Wait, at most an averaging timeout, for updates under way, and apply them."""
        self.state_averager.step(wait_for_delayed_updates=True, apply_delayed_updates=True)

    def download(self, timeout_s: float) -> bool:
        """Load the newest state that a peer shares. Returns whether there was one as new as ours."""
        loaded = bool(self.state_averager.download(timeout_s))
        if loaded:
            self._announce_epoch()
        return loaded

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

    def load_state_from_peers(self, **kwargs: Any) -> None:
        """Catch up with the swarm: one try, longer apart as they fail.

        Raises:
            ServiceError: for `load_state_timeout` seconds nobody gave us a state.
        """
        if self.scheduled_grads is not None and not self.scheduled_grads.done():
            self._tag_along_with_zero_weight(self.scheduled_grads)
        self.scheduled_grads = None
        self.state_averager.step(wait_for_delayed_updates=True)
        with self.tracker.pause_updates():
            loaded = self.download(self.averaging_timeout)
            if loaded and self.tracker.global_epoch - 1 <= self.local_epoch < self.tracker.global_epoch:
                self.state_averager.local_epoch = self.tracker.global_epoch
            self._announce_epoch()
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
        # Alone, hivemind would look for a group, drop it in the end, and take a newcomer into the dropped one.
        if self.tracker.global_progress.num_peers > 1:
            super()._maybe_schedule_gradient_averaging()

    def _maybe_schedule_state_averaging(self) -> None:
        if self.tracker.global_progress.num_peers > 1:
            super()._maybe_schedule_state_averaging()

    def _check_and_accumulate_gradients(self, batch_size: int, grad_scaler: Any) -> bool:
        if not all(bool(torch.isfinite(grad).all()) for grad in self.grad_averager._grads_from_parameters()):
            logger.warning("swarm: a gradient is not finite: these %d samples are left out", batch_size)
            return False
        return bool(super()._check_and_accumulate_gradients(batch_size, grad_scaler))

    def _average_gradients_and_load_into_optimizer(self, maybe_step_control: Any) -> None:
        super()._average_gradients_and_load_into_optimizer(maybe_step_control)
        control = maybe_step_control
        self._group_size, self._group_samples = 1, None
        if control is not None and control.done() and not control.cancelled() and control.exception() is None:
            self._group_size = len(control.result())
            samples, heard = self.grad_averager.heard
            self._group_samples = round(samples) if heard == self._group_size else None
        with torch.no_grad(), self.grad_averager.get_tensors() as gradients:
            if not all(bool(torch.isfinite(gradient).all()) for gradient in gradients):
                logger.warning("swarm: the group's mean is not finite: this step is taken without it")
                for gradient in gradients:
                    gradient.zero_()

    def _update_global_epoch(self, grad_scaler: Any) -> None:
        samples, sent, began = self.tracker.global_progress.samples_accumulated, self._sent.value, time.perf_counter()
        self._group_size = self._group_samples = None
        super()._update_global_epoch(grad_scaler)
        peers = self._group_size
        if peers is None:  # averaged in the background, or local updates: as many as the swarm counts
            peers = max(1, self.tracker.global_progress.num_peers)
        self._on_round(
            RoundReport(
                epoch=self.local_epoch,
                peers=peers,
                samples=self._group_samples or samples,
                seconds=time.perf_counter() - began,
                sent_bytes=self._sent.value - sent,
            )
        )

    def children(self) -> list[int]:
        """Process ids to end if closing fails."""
        return [averager.pid for averager in (self.state_averager, self.grad_averager) if averager is not None]


@contextmanager
def _kept_interrupt() -> Iterator[None]:
    """hivemind makes this process ignore Ctrl-C when it starts an averager."""
    try:
        handler = signal.getsignal(signal.SIGINT)
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
