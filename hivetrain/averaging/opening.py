"""The opening side: bring our vector to a part's reducer, take the part's mean, or get it from whoever holds it."""

from __future__ import annotations

import asyncio
import logging

from hivetrain.averaging.group import Member, Part
from hivetrain.averaging.messages import (
    MAX_CONFIRM_BYTES,
    RESULT_FRAME_BYTES,
    Block,
    Confirm,
    Contribution,
    Fetch,
    FetchReply,
    Refusal,
    Result,
    blocks,
    receive,
)
from hivetrain.averaging.state import RECONNECT_GRACE_S, RoundState
from hivetrain.averaging.transport import LinkLost, Stream
from hivetrain.errors import Fault, PeerFault

logger = logging.getLogger(__name__)

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.05, 1.0
ASK_TIMEOUT_S = 5.0
POLL_S = 0.25
REFUSAL_WAIT_S = 0.5


async def obtain_part(state: RoundState, part: Part) -> None:
    """See one foreign part through: deliver, receive or fetch, then compare notes with its reducer.

    Raises:
        ServiceError: our own side does not work.
    """
    stream, story = await _from_reducer(state, part)
    if part.index not in state.held:
        state.pending.discard(part.index)  # from here on we answer "none" to whoever asks us
        await _fetch(state, part)
    state.settle(part)
    # A reducer is absent only where its mean is nowhere: a bad link of ours is not its fault.
    if part.index not in state.held and not state.ledger.blames(part.reducer.hotkey, part.index):
        state.blame(
            part.reducer.hotkey, Fault.ABSENT, f"nobody holds the mean of part {part.index}: {story}", part.index
        )
    if stream is not None:
        await _compare_notes(state, part.reducer, stream)


async def _from_reducer(state: RoundState, part: Part) -> tuple[Stream | None, str]:
    """The stream on which the mean came, or None and why not."""
    give_up, pause = state.send_deadline, FIRST_PAUSE_S
    while True:
        stream: Stream | None = None
        delivered = False
        try:
            stream = await state.connect(part.reducer, give_up)
            async with asyncio.timeout_at(state.send_deadline):
                await _deliver(state, part, stream)
            delivered = True
            async with asyncio.timeout_at(state.fetch_at):
                answer = await receive(stream, Result, Refusal)
                if isinstance(answer, Result):
                    await receive_result(state, part, part.reducer, stream, answer)
                    if part.index in state.held:
                        return stream, ""
                    story = "its mean was unfit"
                else:
                    story = f"it refused our vector: {answer.fault}: {answer.detail}"
                    logger.warning("part %d: %s: %s", part.index, part.reducer.hotkey, story)
        except TimeoutError:
            story = "its mean did not come in time" if delivered else "it did not take our vector in time"
        except LinkLost as lost:
            story = lost.detail
            if stream is not None:
                give_up = min(state.send_deadline, state.now() + RECONNECT_GRACE_S)
            refused = stream is not None and not delivered and await _refusal(stream)
            if not delivered and not refused and state.now() + pause < give_up:
                if stream is not None:
                    await stream.close()
                await asyncio.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE_S)
                continue
        except PeerFault as fault:
            story = str(fault)
            state.blame(part.reducer.hotkey, fault.fault, fault.detail, part.index)
        if stream is not None:
            await stream.close()
        return None, story


async def _deliver(state: RoundState, part: Part, stream: Stream) -> None:
    """Our header and our chunks of the part, each block with its proof."""
    num_chunks = part.stop - part.start if state.member.sends else 0
    await stream.send(Contribution(part=part.index, num_chunks=num_chunks).to_bytes())
    if state.tree is None or state.payload is None:
        return
    view, layout = memoryview(state.payload), state.plan.layout
    link = state.ledger.links[part.reducer.hotkey]
    for start, stop in blocks(part.start, part.stop):
        await stream.send(Block(start=start, stop=stop, proof=state.tree.range_proof(start, stop)).to_bytes())
        data = view[layout.byte_offset(start) : layout.byte_offset(stop)]
        await stream.send(data)
        link.bytes_sent += len(data)


async def receive_result(state: RoundState, part: Part, bearer: Member, stream: Stream, result: Result) -> None:
    """Take the bytes that follow ``result``; whatever is unfit is blamed, not held.

    Raises:
        LinkLost: the stream ended.
        PeerFault: OVERSIZED: more bytes than announced.
    """
    included = state.check_result(result, part, bearer.hotkey)
    if included is None:
        return
    began, pieces, remaining = state.now(), [], result.size_bytes
    link = state.ledger.links[bearer.hotkey]
    while remaining:
        piece = await stream.receive(min(remaining, RESULT_FRAME_BYTES))
        if not piece:
            raise PeerFault(Fault.TRUNCATED, f"the mean ended {remaining} bytes early")
        pieces.append(piece)
        remaining -= len(piece)
        link.bytes_received += len(piece)
    link.seconds += state.now() - began
    state.hold(result, part, included, b"".join(pieces), bearer.hotkey)


async def _refusal(stream: Stream) -> bool:
    """Whether a reducer that broke off said that it does not want our vector."""
    try:
        async with asyncio.timeout(REFUSAL_WAIT_S):
            await receive(stream, Refusal)
    except (TimeoutError, PeerFault):
        return False
    return True


async def _compare_notes(state: RoundState, reducer: Member, stream: Stream) -> None:
    """Exchange signed results, once we have all that we will get."""
    try:
        async with asyncio.timeout_at(state.deadline):
            await state.all_settled.wait()
            await stream.send(state.confirm().to_bytes())
            state.merge_confirm(await receive(stream, Confirm, max_bytes=MAX_CONFIRM_BYTES), reducer.hotkey)
            state.content.add(reducer.hotkey)
            state.on_change()
    except (TimeoutError, LinkLost) as exc:
        logger.info("%s did not confirm: %s", reducer.hotkey, exc)
    except PeerFault as fault:
        state.blame(reducer.hotkey, fault.fault, fault.detail)
    finally:
        await stream.close()


async def _fetch(state: RoundState, part: Part) -> None:
    """Ask the others until one has the part, or none expects it any more. Validators first, its reducer last."""
    others = [m for m in state.plan.members if m.hotkey not in (state.me.hotkey, part.reducer.hotkey)]
    holders = [*sorted(others, key=lambda member: member.sends), part.reducer]
    streams: dict[str, Stream] = {}  # kept open between questions: whoever answers then waits for us
    try:
        while state.now() < state.fetch_close and part.index not in state.held:
            answers = await asyncio.gather(*(_ask(state, holder, part, streams) for holder in holders))
            for holder, answer in zip(holders, answers, strict=True):
                if answer == "have" and part.index not in state.held:
                    await _take(state, holder, part, streams.pop(holder.hotkey))
            if part.index in state.held or "pending" not in answers:
                return
            await asyncio.sleep(POLL_S)
    finally:
        for stream in streams.values():
            await stream.close()


async def _ask(state: RoundState, holder: Member, part: Part, streams: dict[str, Stream]) -> str:
    """ "have" (then ``streams`` has the stream on which to take it), "pending" or "none"."""
    until = min(state.fetch_close, state.now() + ASK_TIMEOUT_S)
    try:
        if holder.hotkey not in streams:
            streams[holder.hotkey] = await state.connect(holder, until)
        stream = streams[holder.hotkey]
        async with asyncio.timeout_at(until):
            await stream.send(Fetch(part=part.index, take=False).to_bytes())
            return (await receive(stream, FetchReply)).status
    except (TimeoutError, LinkLost):
        pass
    except PeerFault as fault:
        state.blame(holder.hotkey, fault.fault, fault.detail, part.index)
    if lost := streams.pop(holder.hotkey, None):
        await lost.close()
    return "none"


async def _take(state: RoundState, holder: Member, part: Part, stream: Stream) -> None:
    """Have the part sent by a member that says it has it. It gets half of the time that is left."""
    now = state.now()
    try:
        async with asyncio.timeout_at(now + (state.fetch_close - now) / 2):
            await stream.send(Fetch(part=part.index, take=True).to_bytes())
            if (await receive(stream, FetchReply)).status == "have":
                await receive_result(state, part, holder, stream, await receive(stream, Result))
    except (TimeoutError, LinkLost) as exc:
        logger.info("part %d did not come from %s: %s", part.index, holder.hotkey, exc)
    except PeerFault as fault:
        state.blame(holder.hotkey, fault.fault, fault.detail, part.index)
    finally:
        await stream.close()
