"""What the wire's tests share: keys, a metagraph of them, a running axon, and a caller that speaks raw HTTP."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from bittensor import http_auth
from bittensor.wallets import Keypair

from template.access import AccessPolicy, NeuronFacts
from template.axon import Axon, AxonSettings, Caller
from template.dendrite import PeerAddress
from template.protocol import AllReduce, AllReduceReply, IsAlive, IsAliveReply, Message, Train, TrainReply

RUN_ID = "ab" * 32
MINER = Keypair.create_from_uri("//Miner")
VALIDATOR = Keypair.create_from_uri("//Validator")
RICH_VALIDATOR = Keypair.create_from_uri("//RichValidator")
OTHER_MINER = Keypair.create_from_uri("//OtherMiner")
STRANGER = Keypair.create_from_uri("//Stranger")

METAGRAPH = {
    MINER.ss58_address: NeuronFacts(uid=0, stake=0.0, validator_permit=False),
    VALIDATOR.ss58_address: NeuronFacts(uid=1, stake=100.0, validator_permit=True),
    RICH_VALIDATOR.ss58_address: NeuronFacts(uid=2, stake=9000.0, validator_permit=True),
    OTHER_MINER.ss58_address: NeuronFacts(uid=3, stake=5.0, validator_permit=False),
}

ALIVE = IsAliveReply(version=1, role="miner", run_id=RUN_ID, epoch=3, round=4, state="training")
TRAIN = Train(run_id=RUN_ID, round=4)
TRAIN_REPLY = TrainReply(run_id=RUN_ID, round=4, status="training", epoch=3, step=5, num_steps=50, loss=4.5)


async def say_alive(_: IsAlive, __: Caller) -> IsAliveReply:
    return ALIVE


async def report(_: Train, __: Caller) -> TrainReply:
    return TRAIN_REPLY


async def join(ask: AllReduce, _: Caller) -> AllReduceReply:
    return AllReduceReply(run_id=ask.run_id, round=ask.round, attempt=ask.attempt, accepted=True, completed=False)


def policy(**changes: Any) -> AccessPolicy:
    return AccessPolicy(registry=METAGRAPH.get, **changes)


@asynccontextmanager
async def serving(
    settings: AxonSettings | None = None,
    train: Callable[[Train, Caller], Coroutine[Any, Any, Message]] = report,
    access: AccessPolicy | None = None,
    train_timeout_s: float = 10.0,
    max_in_flight: int = 16,
) -> AsyncIterator[Axon]:
    axon = Axon(MINER, access or policy(), host="127.0.0.1", port=0, settings=settings)
    axon.attach(IsAlive, say_alive)
    axon.attach(Train, train, timeout_s=train_timeout_s, max_in_flight=max_in_flight)
    axon.attach(AllReduce, join)
    await axon.start()
    try:
        yield axon
    finally:
        await axon.close()


def address(axon: Axon, hotkey: str | None = None) -> PeerAddress:
    return PeerAddress(hotkey=hotkey or axon.hotkey, ip="127.0.0.1", port=axon.port)


def signed(
    key: Any = VALIDATOR,
    *,
    path: str = "/Train",
    body: bytes = b"",
    receiver: str = MINER.ss58_address,
    age_s: float = 0.0,
) -> dict[str, str]:
    nonce_ns = time.time_ns() - int(age_s * 1e9)
    return dict(http_auth.sign(key, method="POST", path=path, body=body, receiver_ss58=receiver, nonce_ns=nonce_ns))


@dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def error(self) -> str:
        return str(json.loads(self.body)["error"])


def head(path: str, headers: dict[str, str], method: str = "POST") -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "Host: axon", *(f"{name}: {value}" for name, value in headers.items())]
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


async def read_answer(reader: asyncio.StreamReader) -> Answer:
    raw = await reader.readuntil(b"\r\n\r\n")
    first, *rest = raw.decode().strip().split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in rest)
    body = await reader.readexactly(int(headers.get("content-length", "0")))
    return Answer(int(first.split()[1]), headers, body)


@asynccontextmanager
async def connection(
    port: int, host: str = "127.0.0.1"
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A connection of its own to the axon, from ``host`` (loopback has many); whoever closes it first."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, local_addr=(host, 0))
    try:
        async with asyncio.timeout(8):
            yield reader, writer
    finally:
        writer.close()
        await asyncio.gather(writer.wait_closed(), return_exceptions=True)


async def send_raw(port: int, raw: bytes) -> Answer:
    """Send bytes on a connection of their own and return the answer; fails after 8 s without one."""
    async with connection(port) as (reader, writer):
        writer.write(raw)
        await writer.drain()
        return await read_answer(reader)


async def post(port: int, headers: dict[str, str], body: bytes = b"", *, path: str = "/Train") -> Answer:
    return await send_raw(port, head(path, {**headers, "Content-Length": str(len(body))}) + body)
