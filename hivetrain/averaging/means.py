"""A part's mean as it grows, batch by batch: on its reducer while it is reduced, on everyone else as it arrives.

It is passed on in the same way from either: batches as soon as they are there, then the signed result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import pairwise

from hivetrain.averaging.clock import Patience, Signal
from hivetrain.averaging.codecs import Bytes
from hivetrain.averaging.group import GroupPlan, Part
from hivetrain.averaging.messages import MeanBatch, Refusal, Result, receive
from hivetrain.averaging.outcome import Link
from hivetrain.averaging.results import mask_runs
from hivetrain.averaging.store import MeanStore
from hivetrain.averaging.transport import Stream
from hivetrain.errors import PeerFault
from hivetrain.run import CHUNK_ELEMENTS
from hivetrain.verification.merkle import MerkleTree, leaf_digest, leaf_digests

STALE = "stale"
BOUND_SLACK = 1.01  # a mean of values within the bound may pass it by its rounding


class Mean:
    """Batches of one part's mean, in order, and the result once it is whole.

    Attributes:
        rank: of the reducer that made it; None until the first batch tells.
        masks: one per batch that is here.
        result: set when all is here and signed.
        unfit: what was wrong with the first batch that cannot be a mean.
        failed: set where no more will come.
        grown: notified at every change.
    """

    def __init__(self, plan: GroupPlan, store: MeanStore, part: Part, rank: int | None = None) -> None:
        self.part = part
        self.rank = rank
        self.batches = plan.batches(part)
        self.masks: list[bytes] = []
        self.result: Result | None = None
        self.unfit: PeerFault | None = None
        self.failed: str | None = None
        self.grown = Signal()
        self._plan = plan
        self._bound = plan.max_abs * BOUND_SLACK
        self._store = store
        self._digests: list[bytes] = []
        self._tree: MerkleTree | None = None

    @property
    def tree(self) -> MerkleTree:
        """Over the blocks of a whole mean: leaf i is the bytes of block i."""
        if self._tree is None:
            self._tree = MerkleTree(self._digests)
        return self._tree

    def has(self, index: int) -> bool:
        """Whether batch ``index`` is here; past the last one, the result."""
        return index < len(self.masks) or (index == len(self.batches) and self.result is not None)

    def add(self, mask: bytes, pieces: Iterable[Bytes] | None = None) -> None:
        """Keep the next batch: ``pieces``, as the plan cuts it, or what was written to its `view`."""
        means = iter(pieces or ())
        for start, stop in self._plan.pieces(*self.batches[len(self.masks)]):
            if pieces is None:
                fault = self._store.take_in(start, stop, self._bound)
            else:
                fault = self._store.put(start, stop, next(means), self._bound)
            self.unfit = self.unfit or fault
            self._digests += self._block_digests(start, stop)
        self.masks.append(mask)
        self.grown.notify()

    def _block_digests(self, start: int, stop: int) -> list[bytes]:
        layout, view = self._plan.layout, self._store.view(start, stop)
        spans = layout.spans(start, stop)
        if len(spans) == 1:  # every block but the last has the same size
            return leaf_digests(view, spans[0].codec.encoded_size(self._plan.block_chunks * CHUNK_ELEMENTS))
        edges = [layout.byte_offset(end) - layout.byte_offset(start) for _, end in self._plan.blocks(start, stop)]
        return [leaf_digest(view[low:high]) for low, high in pairwise([0, *edges])]

    def fits(self, result: Result) -> bool:
        """Whether ``result`` is signed over these very bytes and masks."""
        return result.root == self.tree.root and result.masks == mask_runs(self.batches, self.masks)

    def finish(self, result: Result) -> None:
        """It is whole."""
        self.result = result
        self.grown.notify()

    def fail(self, why: str) -> None:
        """No more of it will come."""
        self.failed = why
        self.grown.notify()

    def view(self, index: int) -> memoryview:
        """Encoded bytes of batch ``index``."""
        return self._store.view(*self.batches[index])


class Refused(Exception):
    """The other side does not give its mean, and says why.

    Attributes:
        stale: it had one, which turned out to be void while it was sent.
    """

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(f"{refusal.fault}: {refusal.detail}")
        self.stale = refusal.fault == STALE


async def send_mean(
    stream: Stream,
    mean: Mean,
    link: Link,
    patience: Patience,
    first: int = 0,
    refusal: Callable[[], PeerFault | None] = lambda: None,
) -> None:
    """Send a mean from batch ``first`` on as it grows, and its result; or a `Refusal`, where ``refusal`` says so.

    Raises:
        LinkLost: the stream ended.
        TimeoutError: it is not read.
    """
    for index in range(first, len(mean.batches) + 1):
        patience.hold()
        while mean.failed is not None or not mean.has(index):
            if (fault := refusal()) is not None or mean.failed is not None:
                why = Refusal(fault=STALE, detail=mean.failed or "")
                if fault is not None:
                    why = Refusal(fault=fault.fault.value, detail=fault.detail[:500])
                await stream.send(why.to_bytes())
                return
            await mean.grown.wait()
        patience.feed()
        if index < len(mean.batches):
            assert mean.rank is not None
            await stream.send(MeanBatch(rank=mean.rank, included=mean.masks[index]).to_bytes(), more=True)
            data = mean.view(index)
            await stream.send(data)
            link.bytes_sent += len(data)
    assert mean.result is not None
    await stream.send(mean.result.to_bytes())


async def receive_mean(
    stream: Stream,
    mean: Mean,
    link: Link,
    progress: Callable[[], None],
    now: Callable[[], float],
) -> Result:
    """Take batches until the mean is whole; then the result that its bearer claims for it, unchecked.

    Raises:
        LinkLost: the stream ended.
        PeerFault: TRUNCATED, OVERSIZED or MALFORMED.
        Refused: it will not come.
    """
    while len(mean.masks) < len(mean.batches):
        header = await receive(stream, MeanBatch, Refusal)
        if isinstance(header, Refusal):
            raise Refused(header)
        if mean.rank is not None and mean.rank != header.rank:
            raise Refused(Refusal(fault=STALE, detail=f"it began as of rank {mean.rank}, now it is {header.rank}"))
        mean.rank = header.rank
        began = now()
        data = mean.view(len(mean.masks))
        await stream.receive_into(data)
        link.seconds += now() - began
        link.bytes_received += len(data)
        mean.add(header.included)
        progress()
    answer = await receive(stream, Result, Refusal)
    if isinstance(answer, Refusal):
        raise Refused(answer)
    return answer
