"""COMMIT: ask every miner for its receipt, and hand over the digest of the coins that choose what is checked."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from hivetrain.errors import PeerFault
from hivetrain.identity import Verify
from hivetrain.verification.receipt import Expected, Receipt, check_receipt, parse_receipt
from template.chain.client import NeuronInfo
from template.dendrite import Dendrite, Failure, PeerAddress, Reply
from template.network import NetworkThread
from template.protocol import Train, TrainReply

logger = logging.getLogger(__name__)

CALL_TIMEOUT_S = 4.0


@dataclass(slots=True, kw_only=True)
class Collected:
    """What came in by the end of COMMIT.

    Attributes:
        receipts: valid ones, by hotkey.
        refused: why there is none, in words, where the miner is at fault.
        ours: why we could not ask, in words: costs nobody.
    """

    receipts: dict[str, Receipt] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    ours: dict[str, str] = field(default_factory=dict)


def address_of(neuron: NeuronInfo) -> PeerAddress:
    """Where a neuron says on chain that it serves."""
    return PeerAddress(hotkey=neuron.hotkey, ip=neuron.ip, port=neuron.port)


def collect_receipts(
    *,
    miners: Sequence[NeuronInfo],
    expected: Mapping[str, Expected],
    run_id: str,
    round_number: int,
    coins_digest: bytes,
    dendrite: Dendrite,
    network: NetworkThread,
    verify: Verify,
    keep_waiting: Callable[[], bool],
    time_left_s: Callable[[], float] = lambda: CALL_TIMEOUT_S,
) -> Collected:
    """Ask again and again until every miner has handed in, or COMMIT ends.

    Args:
        expected: what an honest receipt of each miner must say, by hotkey.
        keep_waiting: pauses a moment; False when the phase is over.
        time_left_s: until COMMIT ends: a silent miner may not stretch it into the time for checks.
    """
    collected = Collected()
    missing = {neuron.hotkey: neuron for neuron in miners if neuron.port > 0}
    collected.refused.update({neuron.hotkey: "serves no axon" for neuron in miners if neuron.port == 0})
    synapse = Train(run_id=run_id, round=round_number, want="receipt", coins=coins_digest)
    line_works = False  # some miner's signed answer came through
    while missing:
        peers = [address_of(neuron) for neuron in missing.values()]
        # All at once: in turns, the silent ones would use up the time of this call.
        timeout_s = min(CALL_TIMEOUT_S, max(1.0, time_left_s()))
        calls = dendrite.call_many(peers, synapse, timeout_s=timeout_s, concurrency=len(peers))
        for reply in network.run(calls, CALL_TIMEOUT_S + 5):
            line_works = line_works or reply.ok
            if _take(reply, expected[reply.hotkey], verify, collected):
                del missing[reply.hotkey]
        if missing and not keep_waiting():
            break
    if not line_works and len(missing) > 1:
        # Not one of several miners could be reached, or let us in: more likely it is our own line or clock.
        collected.ours.update(dict.fromkeys(missing, "no miner could be reached from here"))
    return collected


def _take(reply: Reply[TrainReply], expected: Expected, verify: Verify, collected: Collected) -> bool:
    """Note one reply; True when there is nothing more to wait for."""
    hotkey = reply.hotkey
    if reply.reply is None:
        if reply.failure is Failure.OURS:
            collected.ours[hotkey] = reply.detail
        else:
            collected.refused[hotkey] = f"{reply.failure.value if reply.failure else 'failed'}: {reply.detail}"
        return False
    collected.ours.pop(hotkey, None)
    if reply.reply.receipt is None:
        collected.refused[hotkey] = f"no receipt yet: {reply.reply.status}"
        return False
    try:
        receipt = parse_receipt(reply.reply.receipt, hotkey=hotkey, verify=verify)
        check_receipt(receipt, expected)
    except PeerFault as exc:
        logger.warning("receipt of %s is refused: %s", hotkey[:8], exc)
        collected.refused[hotkey] = str(exc)
        return True
    collected.refused.pop(hotkey, None)
    collected.receipts[hotkey] = receipt
    return True
