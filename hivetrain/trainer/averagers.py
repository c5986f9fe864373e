"""hivemind's two averagers, of gradients and of state, as we bend them.

Groups are hivemind's: who is in one, when, and whether another is looked for. What a group does is ours (`exchange`):
hivemind's own all-reduce hands each member a difference coded for it, so that members end with different bits, believes
whatever a sender says, and takes five times as long.

Bent besides, as it was measured to go wrong: a download of the swarm's state that is believed without a look at its
shapes; batches of different sizes weighed wrongly; processes that outlive the one they served.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import multiprocessing
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import hivemind
import torch
from hivemind.averaging.averager import AveragingMode, DecentralizedAverager
from hivemind.averaging.control import AveragingStage
from hivemind.averaging.partition import AllreduceException
from hivemind.optim.grad_averager import GradientAverager
from hivemind.optim.state_averager import TrainingStateAverager, dump_optimizer_state
from hivemind.utils import get_dht_time
from hivemind.utils.asyncio import enter_asynchronously

from hivetrain.averaging.guest import Guest
from hivetrain.errors import PeerFault, ServiceError
from hivetrain.trainer.config import Reach
from hivetrain.trainer.exchange import Averaged, Vector, average, cut_from_one
from hivetrain.trainer.keys import SessionKey
from hivetrain.trainer.lobby import Lobby
from hivetrain.trainer.meeting import Arrival, Meeting, Times
from hivetrain.trainer.node import die_with, quieten_asyncio

logger = logging.getLogger(__name__)

PROTOCOL = "/hivetrain/swarm/2/"
MAX_MADDRS = 16

COMPRESSIONS: Mapping[str, Callable[[], Any]] = {
    "none": hivemind.compression.NoCompression,
    "float16": hivemind.compression.Float16Compression,
    "scaled_float16": hivemind.compression.ScaledFloat16Compression,
    "uniform_8bit": hivemind.compression.Uniform8BitQuantization,
    "quantile_8bit": hivemind.compression.Quantile8BitQuantization,
    "blockwise_8bit": hivemind.compression.BlockwiseQuantization,
}


class Notes:
    """What an averager's process tells ours: of the newest round, and in all."""

    def __init__(self) -> None:
        self._sent = multiprocessing.Value("q", 0)
        self._round = multiprocessing.Array("d", 2)
        self._due = multiprocessing.Value("d", math.inf)

    @property
    def sent_bytes(self) -> int:
        """Of vectors, since the beginning, without framing."""
        return int(self._sent.value)

    @property
    def due(self) -> float:
        """When the group that was formed last is to average, by `time.monotonic`; infinite: nobody has called it."""
        return float(self._due.value)

    @due.setter
    def due(self, value: float) -> None:
        self._due.value = value

    @property
    def members(self) -> int:
        """Whose vectors the newest mean is of."""
        return int(self._round[0])

    @property
    def weight(self) -> float:
        """The sum of their weights."""
        return float(self._round[1])

    def take(self, averaged: Averaged) -> None:
        """A round has ended."""
        weights = [weight for weight in averaged.weights.values() if weight > 0]
        self._round[:] = [len(weights), sum(weights)]
        with self._sent.get_lock():
            self._sent.value += averaged.sent_bytes


class _Averager(DecentralizedAverager):  # type: ignore[misc]
    """What both share: the exchange, downloads that are checked, and a process that ends with ours."""

    def __init__(self, *args: Any, reach: Reach, codec: str, notes: Notes, **kwargs: Any) -> None:
        self._reach, self._codec, self.notes = reach, codec, notes
        self._lobby: Lobby | None = None
        self._opening: asyncio.Task[None] | None = None
        self._vector: Vector | None = None
        self._meeting: Meeting | None = None
        self._meetings: dict[bytes, tuple[Any, Meeting]] = {}
        super().__init__(*args, **kwargs)

    def run(self) -> None:
        die_with(self._parent_pid)
        quieten_asyncio()
        super().run()

    # In the averager's process

    async def _step(self, **kwargs: Any) -> None:
        failed = (
            self._opening is not None
            and self._opening.done()
            and (self._opening.cancelled() or self._opening.exception() is not None)
        )
        if self._opening is None or failed:
            self._opening = asyncio.create_task(self._open_lobby())
        try:
            await super()._step(**kwargs)
        finally:  # cancelled in the turn in which its group was found, a step has a meeting that it never comes to
            step = kwargs["step"]
            for group_id in [group_id for group_id, (whose, _) in self._meetings.items() if whose is step]:
                await self._meetings.pop(group_id)[1].close()

    async def _shutdown(self, timeout: float | None) -> None:
        self._running_groups.clear()
        await super()._shutdown(timeout)

    async def _open_lobby(self) -> None:
        # Of the class: a second try, after one that failed, must not wrap what the first one put in its place.
        look = partial(type(self._matchmaking).look_for_group, self._matchmaking)
        self._matchmaking.look_for_group = lambda step: self._look_for_group(look, step)
        self._me = SessionKey()
        guest = Guest(
            self._p2p,
            f"{PROTOCOL}{self.prefix}",
            self._reach.host_maddrs,
            self._reach.announce_maddrs,
            client_mode=self.client_mode,
            bulk=self._reach.bulk,
            bulk_port=self._reach.bulk_port,
        )
        lobby = Lobby(guest)
        await lobby.start()
        self._maddrs = [] if self.client_mode else guest.visible_maddrs()[:MAX_MADDRS]
        self._vector = Vector(self._averaged_tensors, self._codec)
        self._lobby = lobby

    async def _look_for_group(self, look: Callable[[Any], Awaitable[Any]], step: Any) -> Any:
        """A group, whose members meet as soon as it is formed; where they part before it is used, another one."""
        assert self._opening is not None
        await asyncio.shield(self._opening)
        while True:
            self.notes.due = math.inf
            group = await look(step)
            if group is None:
                return None
            self.notes.due = math.inf  # training may have called the group that fell apart just then
            meeting = self._meeting = self._meet(group)
            try:
                if not step.triggered:
                    step.stage = AveragingStage.AWAITING_TRIGGER
                    await _either(step.wait_for_trigger(), meeting.broken.wait())
                if step.triggered or not meeting.broken.is_set():
                    self._meetings[group.group_id] = step, meeting
                    return group
            except BaseException:
                await meeting.close()
                raise
            logger.info("swarm: the group fell apart before it averaged: looking for another")
            await meeting.close()
            step.stage = AveragingStage.LOOKING_FOR_GROUP

    def _meet(self, group: Any) -> Meeting:
        assert self._lobby is not None
        assert self._vector is not None
        modes = [AveragingMode(self.serializer.loads(gathered)[1]) for gathered in group.gathered]
        leader = next(peer for peer, mode in zip(group.peer_ids, modes, strict=True) if mode != AveragingMode.CLIENT)
        total_s = self._allreduce_timeout or 60.0
        meeting = Meeting(
            group=group.group_id,
            peer_ids=[peer.to_base58() for peer in group.peer_ids],
            leader=leader.to_base58(),
            lobby=self._lobby,
            arrival=Arrival(
                hotkey=self._me.hotkey,
                maddrs=self._maddrs,
                reduces=not self.client_mode,
                layout=self._vector.layout.layout_hash,
            ),
            layout=self._vector.layout,
            times=Times(
                absent_s=min(self.next_chunk_timeout or total_s, total_s / 3), ready_s=total_s / 3, total_s=total_s
            ),
            on_called=self._on_called,
        )
        meeting.start()
        return meeting

    def _on_called(self, in_s: float) -> None:
        self.notes.due = time.monotonic() + in_s

    async def _call_group(self, in_s: float) -> None:
        if self._meeting is not None:
            await self._meeting.call(in_s)

    async def _aggregate_with_group(self, group_info: Any, *, weight: float, **kwargs: Any) -> Any:
        (_, meeting), vector = self._meetings.pop(group_info.group_id), self._vector
        assert vector is not None
        loop = asyncio.get_running_loop()
        seed = group_info.group_id + self.peer_id.to_bytes()
        try:
            async with enter_asynchronously(self.get_tensors()) as tensors:
                payload, tree = await loop.run_in_executor(None, vector.encode, tensors, seed)
                averaged = await average(meeting, self._me, float(weight), payload, tree, vector.memory)
                if averaged.mean is not None:
                    await _to_its_end(loop.run_in_executor(None, vector.copy_into, averaged.mean, tensors))
                self.last_updated = get_dht_time()
                self._state_updated.set()
            self.notes.take(averaged)
            gathered = zip(group_info.peer_ids, group_info.gathered, strict=True)
            told = {peer: self.serializer.loads(self.serializer.loads(packed)[2]) for peer, packed in gathered}
            return {peer: said for peer, said in told.items() if peer.to_base58() in averaged.weights}
        except (ServiceError, PeerFault, ValueError) as exc:
            raise AllreduceException(f"the group has no mean: {exc}") from exc
        finally:
            await meeting.close()
            running = self._running_groups.get(group_info.group_id)
            if running is not None and not running.done():
                running.set_result(None)

    async def _load_state_from_peers(self, future: Any, timeout: float | None = None) -> None:
        # hivemind bounds each piece. What is not here in time nobody waits for any more, and another try may begin.
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(super()._load_state_from_peers(future, timeout=timeout), timeout)

    # In ours

    def call_group(self, in_s: float) -> None:
        """Have the group that is formed come in so many seconds, and us too, unless somebody has called it before."""
        self.notes.due = min(self.notes.due, time.monotonic() + in_s)
        self._outer_pipe.send(("_call_group", [], {"in_s": in_s}))

    def load_state_from_peers(self, timeout: float | None = None) -> tuple[Any, Sequence[torch.Tensor]] | None:
        self.downloaded_epoch: int | None = None
        began = time.monotonic()
        try:
            state = super().load_state_from_peers(timeout=timeout)
        except TimeoutError:
            state = None
        if state is None:
            if timeout is not None and time.monotonic() - began >= timeout:
                logger.warning("swarm: no peer's state came within %.0f s: raise load_state_timeout", timeout)
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


async def _either(one: Awaitable[object], other: Awaitable[object]) -> None:
    tasks = [asyncio.ensure_future(one), asyncio.ensure_future(other)]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _to_its_end(work: asyncio.Future[None]) -> None:
    """Wait for ``work`` even where we are cancelled meanwhile, and take it as done.

    A time-out that comes while the mean is copied would leave half of it in the gradients. A moment later all of it is
    there, as with everyone else in the group.
    """
    try:
        await asyncio.shield(work)
    except asyncio.CancelledError:
        await work


class SwarmGradientAverager(GradientAverager, _Averager):  # type: ignore[misc]
    """Averages gradients, weighted by samples."""

    def __init__(self, parameters: Iterable[torch.nn.Parameter], **kwargs: Any) -> None:
        parameters = tuple(parameters)
        # As one vector they travel from where they are, and their mean lands there.
        whole = all(parameter.dtype == torch.float32 for parameter in parameters)
        averaged = cut_from_one([parameter.shape for parameter in parameters]) if whole else ()
        super().__init__(parameters, averaged_grads=averaged, **kwargs)

    # hivemind's are generators that set and reset what autograd does at each tensor: most of what adding up costs.

    @torch.no_grad()
    def _grads_from_parameters(self) -> Iterator[torch.Tensor]:
        for parameter in self.parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        return iter([parameter.grad for parameter in self.parameters])

    def _grad_accumulators(self) -> Iterator[torch.Tensor]:
        return iter(self._local_accumulators)  # always ours: `reuse_grad_buffers` is refused

    @torch.no_grad()
    def load_accumulators_into_averager_(self) -> None:
        # hivemind divides by the number of batches, which is right only where all have the size of the first.
        samples = self.local_samples_accumulated
        scale = self._anchor_batch_size / samples if samples else 0.0
        with self.get_tensors() as averaged:
            for accumulated, mean in zip(self._grad_accumulators(), averaged, strict=True):
                if accumulated.device == mean.device and accumulated.dtype == mean.dtype:
                    torch.mul(accumulated, scale, out=mean)
                else:
                    mean.copy_(accumulated, non_blocking=True).mul_(scale)

    @torch.no_grad()
    def reset_accumulated_grads_(self) -> None:
        # hivemind asks for it twice in each round.
        self._accumulators_used_in_step = False
        if self.local_times_accumulated:
            super().reset_accumulated_grads_()


class SwarmStateAverager(TrainingStateAverager, _Averager):  # type: ignore[misc]
    """Averages weights, and what of the optimizer's state is asked for; lets others download all of it."""

    _least_epoch = 0

    def download(self, timeout_s: float, least_epoch: int = 0) -> bool:
        """Load the newest state that a peer shares; False if none is as new as ours and ``least_epoch``."""
        self._least_epoch = max(self.local_epoch, least_epoch)
        self.load_state_from_peers(timeout=timeout_s)
        return self.downloaded_epoch is not None

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
        if problem := problem_of_state(self.optimizer, self.extra_tensors, metadata, tensors):
            return problem
        if metadata["epoch"] < self._least_epoch:
            return f"it is of epoch {metadata['epoch']}, and we need {self._least_epoch}"
        return None


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
