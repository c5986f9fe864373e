"""What is under way: replies and requests that a relay alters, and handshakes of whoever connects."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, cast

from bittensor import http_auth

from bench.fuzzing.choices import Choices, flipped
from bench.fuzzing.guard import declared, require
from bench.fuzzing.samples import CHEAT, MINERS, honest_group, honest_receipt
from hivetrain.averaging.codecs import Bytes
from hivetrain.averaging.handshake import Ends, NonceLedger, finish_greeting, greet
from hivetrain.averaging.messages import Hello, HelloConfirm
from hivetrain.averaging.transport import LinkLost
from hivetrain.errors import Fault, PeerFault
from hivetrain.scoring.score import LIES, CheckResult
from hivetrain.verification.challenge import Draw
from hivetrain.verification.judge import Answer
from hivetrain.verification.receipt import Receipt, parse_receipt, sign_receipt
from template import wire
from template.chain.keys import WalletIdentity
from template.chain.keys import verify as verify_sr25519
from template.dendrite import Failure, Reply
from template.protocol import Opening, Train, TrainReply
from template.validator.verify import Verifier, second_receipt
from tests.chain_fixture import dev_wallet
from tests.keys import verify

NONCE = 1_700_000_000_000_000_000
MAX_REPLY_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sent:
    """What two honest neurons sent each other, with real sr25519 signatures."""

    receipt: Receipt
    body: bytes
    headers: dict[str, str]
    request: bytes
    auth: dict[str, str]


MINER, ASKER = WalletIdentity(dev_wallet("fuzz-miner")), WalletIdentity(dev_wallet("fuzz-validator"))


@lru_cache(maxsize=1)
def _sent() -> _Sent:
    receipt = sign_receipt(honest_receipt().model_copy(update={"hotkey": MINER.hotkey}), MINER)
    reply = TrainReply(
        run_id=receipt.run_id,
        round=receipt.round,
        status="opened",
        epoch=0,
        step=50,
        num_steps=50,
        receipt=receipt.to_bytes(),
        openings=(Opening(index=4, step=50, payload=bytes(56), proof=(bytes(32),)),),
        steps=bytes(28),
    )
    body = reply.to_bytes()
    request = Train(run_id=receipt.run_id, round=receipt.round, want="open", snapshots=(4,), coins=bytes(32)).to_bytes()
    auth = http_auth.sign(
        dev_wallet("fuzz-validator").hotkey,
        method="POST",
        path=Train.route,
        body=request,
        receiver_ss58=MINER.hotkey,
        nonce_ns=NONCE,
    )
    headers = _seal(body).headers(dev_wallet("fuzz-miner").hotkey)
    return _Sent(receipt=receipt, body=body, headers=headers, request=request, auth=dict(auth))


def _seal(body: bytes) -> wire.ReplySeal:
    return wire.ReplySeal(
        status=200,
        route=Train.route,
        nonce=NONCE,
        sender=MINER.hotkey,
        receiver=ASKER.hotkey,
        body_sha256=wire.sha256_hex(body),
    )


@dataclass(frozen=True, slots=True)
class _Untouched:
    """Judges an answer that came through: it must be the miner's own."""

    honest: TrainReply

    def judge(self, receipt: Receipt, drawn: Draw, answer: Answer) -> CheckResult:
        shown = {opening.index: (opening.payload, opening.proof) for opening in self.honest.openings}
        require(dict(answer.openings) == shown and answer.steps == self.honest.steps, "an altered answer is judged")
        return CheckResult(distance=0.0)


def reply(data: bytes) -> None:
    """A miner's answer to a challenge, altered on its way: it never comes to a verdict that the miner lied."""
    choices, sent = Choices(data), _sent()
    body = flipped(sent.body, choices)
    signature = flipped(sent.headers[wire.HEADER_REPLY_SIGNATURE].encode(), choices).decode("latin-1")
    found: Reply[TrainReply]
    if not _seal(body).is_signed_by_sender(signature):
        found = Reply(hotkey=MINER.hotkey, failure=Failure.BAD_SIGNATURE, detail="the signature does not cover it")
    else:
        require(body == sent.body, "an altered reply is taken for the sender's")
        found = Reply(hotkey=MINER.hotkey, reply=Train.parse_reply(body, MAX_REPLY_BYTES))
    honest = TrainReply.from_bytes(sent.body, MAX_REPLY_BYTES)
    nothing: Any = None
    verifier = Verifier(
        parts=nothing,
        base=nothing,
        state=nothing,
        round_number=1,
        coins=bytes(32),
        dendrite=nothing,
        network=nothing,
        load_data=cast("Any", None),
        address=cast("Any", None),
        in_time=lambda: True,
        judging=_Untouched(honest),
    )
    try:
        result = verifier.check_one(sent.receipt, Draw(hotkey=MINER.hotkey, windows=(4,)), found)
        require(result.fault is None, f"an honest answer comes to {result.fault}")
    except PeerFault as exc:
        declared(exc, {Fault.REFUSED})
        require(exc.fault not in LIES and found.failure is not None, "an honest answer is refused")
    _second(sent.receipt, choices)


def _second(receipt: Receipt, choices: Choices) -> None:
    raw = flipped(receipt.to_bytes(), choices)
    require(second_receipt(receipt, raw) is None, "an altered receipt counts as a second one")
    try:
        found = parse_receipt(raw, hotkey=MINER.hotkey, verify=verify_sr25519)
        require(found.signed_bytes() == receipt.signed_bytes(), "a receipt that nobody signed is taken")
    except PeerFault as exc:
        declared(exc, {Fault.OVERSIZED, Fault.MALFORMED, Fault.BAD_SIGNATURE})


def request(data: bytes) -> None:
    """A challenge on its way to a miner: its headers, its body, and any other signature."""
    choices, sent = Choices(data), _sent()
    headers = [(name, flipped(value.encode(), choices).decode("latin-1")) for name, value in sent.auth.items()]
    if choices.flag():
        headers = headers[choices.below(len(headers)) :] + headers[: choices.below(3)]
    body = flipped(sent.request, choices)
    try:
        claim = wire.read_claim(headers, receiver=MINER.hotkey)
        caller = wire.verify_request(
            dict(headers),
            body,
            method="POST",
            target=Train.route,
            receiver=MINER.hotkey,
            nonces=http_auth.InMemoryNonceStore(retention=60.0),
            started_ns=0,
            arrived_ns=NONCE + 1,
        )
    except wire.AuthFailure:
        require(headers != list(sent.auth.items()) or body != sent.request, "an honest request is refused")
    else:
        require(caller == claim.hotkey == ASKER.hotkey and body == sent.request, "an altered request is let in")
    text = choices.take(64).decode("latin-1")
    require(not verify_sr25519(text, body, choices.rest()), "a signature that nobody made holds")


@dataclass(slots=True)
class _Script:
    """A `Stream` whose peer sends what was written before it was asked."""

    remote_peer_id: str
    frames: list[bytes]
    sent: list[bytes] = field(default_factory=list)

    async def send(self, frame: Bytes, more: bool = False) -> None:
        self.sent.append(bytes(frame))

    async def receive(self, max_bytes: int) -> bytes:
        if not self.frames:
            raise LinkLost("it ended")
        return self.frames.pop(0)[:max_bytes]

    async def receive_into(self, buffer: memoryview) -> None:
        raise LinkLost("it ended")

    async def close(self) -> None: ...


def greeting(data: bytes) -> None:
    """Whoever connects, as whomever: only who holds the key gets through, and a stranger is laid at nobody's door."""
    asyncio.run(_greeting(data))


async def _greeting(data: bytes) -> None:
    choices, group = Choices(data), honest_group()
    plan, me = group.plan, MINERS[2]
    member = plan.members[choices.below(2)]
    peer_id = choices.pick((member.peer_id, "peer-0", "peer-1", "elsewhere"))
    group_id = plan.group_id()
    hello = Hello(group_id=group_id, hotkey=member.hotkey, nonce=choices.take(32).ljust(32, b"\0")).to_bytes()
    shown = flipped(hello, choices)
    script = _Script(peer_id, [shown])
    try:
        greeted = await greet(script, plan, group_id, me, "peer-2", NonceLedger())
    except PeerFault as exc:
        declared(exc, {Fault.MALFORMED, Fault.WRONG_SCHEMA, Fault.IMPOSTOR, Fault.BAD_SIGNATURE, Fault.ABSENT})
        return
    require(greeted.member.peer_id == peer_id, "a peer passes for another member")
    signed = CHEAT.sign(_as_cheat(greeted.ends, choices).message("opener"))
    confirm = flipped(HelloConfirm(signature=signed).to_bytes(), choices)
    script.frames.append(confirm)
    try:
        await finish_greeting(script, greeted, verify)
        require(greeted.member.hotkey == CHEAT.hotkey, f"{greeted.member.hotkey} is taken to be here, and is not")
    except PeerFault as exc:
        declared(exc, {Fault.MALFORMED, Fault.BAD_SIGNATURE, Fault.ABSENT})


def _as_cheat(ends: Ends, choices: Choices) -> Ends:
    if choices.flag():
        return Ends(
            group_id=ends.group_id,
            opener_hotkey=CHEAT.hotkey,
            opener_peer_id="peer-0",
            opener_nonce=choices.take(32),
            acceptor_hotkey=ends.acceptor_hotkey,
            acceptor_peer_id=ends.acceptor_peer_id,
            acceptor_nonce=ends.acceptor_nonce,
        )
    return ends


__all__ = ["greeting", "reply", "request"]
