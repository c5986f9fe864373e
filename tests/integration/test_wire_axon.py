"""The axon on a real socket: who is refused, at which step, and that nobody else notices."""

from __future__ import annotations

import asyncio
import logging
import signal
import time

import bittensor as bt
import pytest
from wire_kit import (
    ALIVE,
    MINER,
    OTHER_MINER,
    RICH_VALIDATOR,
    STRANGER,
    TRAIN,
    TRAIN_REPLY,
    VALIDATOR,
    address,
    connection,
    head,
    policy,
    post,
    read_answer,
    report,
    send_raw,
    serving,
    signed,
)

from hivetrain.errors import ConfigError
from template.access import NeuronFacts
from template.axon import Axon, AxonSettings, Caller
from template.dendrite import Dendrite, Failure
from template.listener import ConnectionLimits
from template.protocol import AllReduce, IsAlive, IsAliveReply, Message, Opening, Train, TrainReply

BODY = TRAIN.to_bytes()
GARBAGE = b"\xc1 this is no msgpack"


async def until(condition, seconds=5.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "condition did not come true"
        await asyncio.sleep(0.005)


def test_a_validator_is_answered_with_a_signed_reply() -> None:
    async def scenario() -> None:
        async with serving() as axon:
            answer = await post(axon.port, signed(body=BODY), BODY)
        assert answer.status == 200
        assert answer.headers["x-hivetrain-hotkey"] == MINER.ss58_address.lower()
        assert TrainReply.from_bytes(answer.body, 1 << 20) == TRAIN_REPLY

    asyncio.run(scenario())


def test_a_wallet_from_disk_serves_and_asks(tmp_path) -> None:
    wallet = bt.Wallet(name="n", hotkey="h", path=str(tmp_path))
    wallet.create_new_coldkey(use_password=False, suppress=True)
    wallet.create_new_hotkey(use_password=False, suppress=True)
    hotkey = wallet.hotkey.ss58_address
    facts = {hotkey: NeuronFacts(uid=0, stake=1.0, validator_permit=True)}

    async def answer(_: IsAlive, caller: Caller) -> IsAliveReply:
        assert (caller.hotkey, caller.uid, caller.validator_permit) == (hotkey, 0, True)
        return ALIVE

    async def scenario() -> None:
        axon = Axon(wallet, type(policy())(registry=facts.get), host="127.0.0.1", port=0)
        axon.attach(IsAlive, answer)
        await axon.start()
        async with Dendrite(wallet) as dendrite:
            reply = await dendrite.call(address(axon), IsAlive())
        await axon.close()
        assert reply.reply == ALIVE, reply.detail

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("headers", "status", "says"),
    [
        (dict, 401, "missing X-Bittensor-Version"),
        (lambda: signed(body=b"another body"), 401, "signature does not verify"),
        (lambda: signed(body=BODY, path="/AllReduce"), 401, "signature does not verify"),
        (lambda: signed(body=BODY, receiver=OTHER_MINER.ss58_address), 401, "another receiving hotkey"),
        (lambda: signed(body=BODY, age_s=11.0), 401, "older than"),
        (lambda: signed(body=BODY, age_s=-5.0), 401, "in the future"),
        (lambda: signed(body=BODY, age_s=5.0), 401, "already accepted"),  # fresh, but of before we listened
        (lambda: signed(STRANGER, body=BODY), 403, "not registered"),
        (lambda: signed(OTHER_MINER, body=BODY), 403, "validator permit"),
        (lambda: {**signed(body=BODY), "X-Bittensor-Crypto": "ed25519"}, 401, "must be sr25519"),
        (lambda: {**signed(body=BODY), "X-Bittensor-Nonce": "1_0"}, 401, "malformed X-Bittensor-Nonce"),
        (lambda: {**signed(body=BODY), "x-bittensor-NONCE": "10"}, 401, "given twice"),
        (
            lambda: {**signed(STRANGER, body=BODY), "X-Bittensor-Hotkey": VALIDATOR.ss58_address},
            401,
            "signature does not verify",
        ),
    ],
    ids=[
        "unsigned",
        "tampered body",
        "signed for another route",
        "wrong receiver",
        "stale",
        "from the future",
        "older than the process",
        "unregistered",
        "no permit",
        "other scheme",
        "nonce that int() would take",
        "a header twice",
        "stolen hotkey",
    ],
)
def test_a_bad_request_is_refused_before_its_body_is_parsed(headers, status, says) -> None:
    handled = []

    async def handler(ask: Train, _: Caller) -> Message:
        handled.append(ask)
        return TRAIN_REPLY

    async def scenario() -> None:
        async with serving(train=handler) as axon:
            refused = await post(axon.port, headers(), BODY)
            served = await post(axon.port, signed(body=BODY), BODY)
        assert refused.status == status
        assert says in refused.error
        assert served.status == 200
        assert handled == [TRAIN]

    asyncio.run(scenario())


def test_a_replayed_request_is_refused_and_the_next_one_is_served() -> None:
    async def scenario() -> None:
        async with serving() as axon:
            headers = signed(body=BODY)
            answers = [await post(axon.port, headers, BODY) for _ in range(2)]
            fresh = await post(axon.port, signed(body=BODY), BODY)
        assert [answer.status for answer in (*answers, fresh)] == [200, 401, 200]
        assert "already accepted" in answers[1].error

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("key", "status"),
    [(None, 401), (STRANGER, 403), (OTHER_MINER, 403), (VALIDATOR, 422)],
    ids=["nobody", "stranger", "miner", "validator"],
)
def test_only_a_permitted_caller_has_its_garbage_parsed(key, status) -> None:
    async def scenario() -> None:
        async with serving() as axon:
            answer = await post(axon.port, signed(key, body=GARBAGE) if key else {}, GARBAGE)
        assert answer.status == status

    asyncio.run(scenario())


def test_a_message_of_the_wrong_schema_is_refused_without_an_echo() -> None:
    async def scenario() -> None:
        body = b"\x81\xa6secret\xa6thing!"
        async with serving() as axon:
            answer = await post(axon.port, signed(body=body), body)
        assert answer.status == 422
        assert "thing!" not in answer.error

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("length", "status"),
    [("999999999", 413), ("9" * 4000, 413), (str(Train.max_request_bytes + 1), 413), (None, 411), ("-1", 411)],
)
def test_length_is_judged_before_a_byte_of_the_body_is_sent(length, status) -> None:
    async def scenario() -> None:
        async with serving() as axon:
            headers = signed(body=BODY) | ({"Content-Length": length} if length else {})
            answer = await send_raw(axon.port, head("/Train", headers))
        # "-1" does not get past the HTTP parser itself.
        assert answer.status in (status, 400 if length in ("-1", "9" * 4000) else status)

    asyncio.run(scenario())


def test_a_chunked_body_has_no_length_and_is_refused() -> None:
    async def scenario() -> None:
        async with serving() as axon:
            headers = signed(body=BODY) | {"Transfer-Encoding": "chunked"}
            answer = await send_raw(axon.port, head("/Train", headers))
        assert answer.status == 411

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("POST", "/Nothing", 404), ("POST", "/Tr%61in", 404), ("POST", "/Train/", 404), ("GET", "/Train", 405)],
)
def test_only_the_exact_route_by_post_is_known(method, path, status) -> None:
    async def scenario() -> None:
        async with serving() as axon:
            headers = signed(body=BODY, path=path) | {"Content-Length": str(len(BODY))}
            answer = await send_raw(axon.port, head(path, headers, method) + BODY)
        assert answer.status == status

    asyncio.run(scenario())


def test_the_query_as_sent_is_part_of_what_is_signed() -> None:
    async def scenario() -> None:
        async with serving() as axon:
            path = "/Train?a=%2Fb"
            right = await post(axon.port, signed(body=BODY, path=path), BODY, path=path)
            decoded = await post(axon.port, signed(body=BODY, path="/Train?a=/b"), BODY, path=path)
        assert (right.status, decoded.status) == (200, 401)

    asyncio.run(scenario())


def test_a_slow_body_ends_with_408_while_a_good_caller_is_served() -> None:
    settings = AxonSettings(body_timeout_s=0.4, max_reading=2)

    async def scenario() -> None:
        async with serving(settings) as axon:
            # Claims the good caller's hotkey, and sends one byte of the body.
            slow_headers = signed(body=BODY) | {"Content-Length": str(len(BODY))}
            slow = asyncio.create_task(send_raw(axon.port, head("/Train", slow_headers) + BODY[:1]))
            async with Dendrite(VALIDATOR) as dendrite:
                served = [await dendrite.call(address(axon), TRAIN) for _ in range(3)]
                assert not slow.done()
            answer = await slow
        assert all(reply.ok for reply in served)
        assert answer.status == 408
        assert f"1 of {len(BODY)} bytes" in answer.error

    asyncio.run(scenario())


def test_headers_that_never_end_lose_the_connection() -> None:
    settings = AxonSettings(connections=ConnectionLimits(header_timeout_s=0.2))

    async def scenario() -> None:
        async with serving(settings) as axon:
            for opening in (b"", b"POST /Train HTTP/1.1\r\nHost: x\r\n"):
                async with connection(axon.port) as (reader, writer):
                    writer.write(opening)
                    with pytest.raises((ConnectionResetError, asyncio.IncompleteReadError)):
                        await reader.readexactly(1)

    asyncio.run(scenario())


def test_one_host_cannot_hold_every_connection() -> None:
    settings = AxonSettings(connections=ConnectionLimits(max_connections=8, max_per_host=2))

    async def scenario() -> None:
        async with serving(settings) as axon, connection(axon.port), connection(axon.port):
            async with connection(axon.port) as (reader, _):
                with pytest.raises((ConnectionResetError, asyncio.IncompleteReadError)):
                    await reader.readexactly(1)
            async with connection(axon.port, host="127.0.0.9") as (reader, writer):
                writer.write(head("/Train", signed(body=BODY) | {"Content-Length": str(len(BODY))}) + BODY)
                assert (await read_answer(reader)).status == 200

    asyncio.run(scenario())


def test_a_handler_that_raises_gives_500_without_internals_and_the_axon_goes_on(caplog) -> None:
    calls = []

    async def breaks_once(ask: Train, caller: Caller) -> Message:
        calls.append(ask)
        if len(calls) == 1:
            raise RuntimeError("/home/me/secret.key is missing")
        return await report(ask, caller)

    async def scenario() -> None:
        async with serving(train=breaks_once) as axon:
            broken = await post(axon.port, signed(body=BODY), BODY)
            served = await post(axon.port, signed(body=BODY), BODY)
        assert (broken.status, served.status) == (500, 200)
        assert "secret" not in broken.error

    with caplog.at_level(logging.ERROR, logger="template.axon"):
        asyncio.run(scenario())
    assert "secret.key is missing" in caplog.text  # the traceback is in our own log


def test_a_handler_of_the_wrong_type_of_reply_gives_500() -> None:
    async def wrong(_: Train, __: Caller) -> Message:
        return ALIVE

    async def scenario() -> None:
        async with serving(train=wrong) as axon:
            assert (await post(axon.port, signed(body=BODY), BODY)).status == 500

    asyncio.run(scenario())


def test_a_handler_past_its_time_is_cancelled_with_504() -> None:
    cancelled = []

    async def hangs(_: Train, __: Caller) -> Message:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.append(True)
            raise
        return TRAIN_REPLY

    async def scenario() -> None:
        async with serving(train=hangs, train_timeout_s=0.1) as axon:
            answer = await post(axon.port, signed(body=BODY), BODY)
        assert answer.status == 504
        assert cancelled == [True]

    asyncio.run(scenario())


def test_a_hotkey_past_its_places_gets_429_and_another_hotkey_and_route_do_not_notice() -> None:
    entered: list[str] = []
    release = asyncio.Event()

    async def waits(_: Train, caller: Caller) -> Message:
        entered.append(caller.hotkey)
        await release.wait()
        return TRAIN_REPLY

    async def scenario() -> None:
        async with serving(AxonSettings(in_flight_per_hotkey=2), train=waits) as axon:
            held = [asyncio.create_task(post(axon.port, signed(body=BODY), BODY)) for _ in range(2)]
            await until(lambda: len(entered) == 2)
            over = await post(axon.port, signed(body=BODY), BODY)
            other = asyncio.create_task(post(axon.port, signed(RICH_VALIDATOR, body=BODY), BODY))
            await until(lambda: len(entered) == 3)
            alive = await post(
                axon.port, signed(path="/IsAlive", body=IsAlive().to_bytes()), IsAlive().to_bytes(), path="/IsAlive"
            )
            release.set()
            done = [await task for task in (*held, other)]
        assert (over.status, alive.status) == (429, 200)
        assert [answer.status for answer in done] == [200, 200, 200]

    asyncio.run(scenario())


def test_too_many_requests_per_second_get_429() -> None:
    async def scenario() -> None:
        async with serving(AxonSettings(rate_per_s=0.001, burst=2)) as axon:
            return [(await post(axon.port, signed(body=BODY), BODY)).status for _ in range(3)]

    assert asyncio.run(scenario()) == [200, 200, 429]


def test_waiting_requests_are_served_by_stake() -> None:
    order: list[str] = []
    release = asyncio.Event()

    async def waits(_: Train, caller: Caller) -> Message:
        order.append(caller.hotkey)
        await release.wait()
        return TRAIN_REPLY

    async def scenario() -> None:
        async with serving(train=waits, max_in_flight=1) as axon:
            gate = axon._routes["/Train"].gate
            tasks = [asyncio.create_task(post(axon.port, signed(VALIDATOR, body=BODY), BODY))]
            await until(lambda: len(order) == 1)
            for waiting, key in enumerate((VALIDATOR, RICH_VALIDATOR), start=1):
                tasks.append(asyncio.create_task(post(axon.port, signed(key, body=BODY), BODY)))
                await until(lambda waiting=waiting: len(gate._waiting) == waiting)
            release.set()
            assert [(await task).status for task in tasks] == [200, 200, 200]
        assert order == [key.ss58_address for key in (VALIDATOR, RICH_VALIDATOR, VALIDATOR)]

    asyncio.run(scenario())


def test_a_reader_that_never_reads_loses_its_connection_and_its_place() -> None:
    big = TRAIN_REPLY.model_copy(update={"openings": (Opening(index=0, step=0, payload=bytes(32 << 20)),)})

    async def opens(_: Train, __: Caller) -> Message:
        return big

    async def scenario() -> None:
        settings = AxonSettings(in_flight_per_hotkey=1, min_reply_rate=1e12, reply_grace_s=0.3)
        async with serving(settings, train=opens) as axon:
            limiter = axon._routes["/Train"].limiter
            async with connection(axon.port) as (_, writer):
                writer.transport.pause_reading()
                writer.write(head("/Train", signed(body=BODY) | {"Content-Length": str(len(BODY))}) + BODY)
                await until(lambda: bool(limiter._usage) and limiter._usage[VALIDATOR.ss58_address].in_flight == 1)
                await until(lambda: limiter._usage[VALIDATOR.ss58_address].in_flight == 0)
                await until(lambda: not axon._listener._connections.transports)

    asyncio.run(scenario())


def test_a_port_in_use_is_a_config_error_that_names_the_port_and_the_fix() -> None:
    async def scenario() -> None:
        async with serving() as axon:
            second = Axon(MINER, policy(), host="127.0.0.1", port=axon.port)
            with pytest.raises(ConfigError, match=rf"127\.0\.0\.1:{axon.port} is in use.*--axon\.port"):
                await second.start()
            await second.close()

    asyncio.run(scenario())


def test_an_axon_leaves_signals_alone_and_frees_its_port() -> None:
    async def scenario() -> None:
        before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
        async with serving() as axon:
            port = axon.port
            assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
        again = Axon(MINER, policy(), host="127.0.0.1", port=port)
        await again.start()
        await again.close()

    asyncio.run(scenario())


def test_a_request_of_before_a_restart_is_refused_after_it() -> None:
    async def scenario() -> None:
        async with serving() as axon:
            captured = signed(body=BODY)
            assert (await post(axon.port, captured, BODY)).status == 200
        async with serving() as axon:
            assert (await post(axon.port, captured, BODY)).status == 401

    asyncio.run(scenario())


def test_two_requests_on_one_connection_are_both_served() -> None:
    async def scenario() -> None:
        async with serving() as axon, connection(axon.port) as (reader, writer):
            for _ in range(2):
                headers = signed(body=BODY) | {"Content-Length": str(len(BODY))}
                writer.write(head("/Train", headers) + BODY)
                assert (await read_answer(reader)).status == 200

    asyncio.run(scenario())


def test_allreduce_takes_a_permit_and_is_answered() -> None:
    async def scenario() -> None:
        ask = AllReduce(run_id="ab" * 32, round=1, attempt=0, plan=b"plan", base_manifest="cd" * 32)
        async with serving() as axon, Dendrite(VALIDATOR) as dendrite, Dendrite(OTHER_MINER) as miner:
            good = await dendrite.call(address(axon), ask)
            bad = await miner.call(address(axon), ask)
            alive = await miner.call(address(axon), IsAlive())
        assert good.reply is not None
        assert good.reply.accepted
        assert (bad.failure, bad.status) == (Failure.REFUSED, 403)
        assert alive.ok

    asyncio.run(scenario())


def test_nonces_that_could_outlive_their_memory_are_a_wrong_setting() -> None:
    with pytest.raises(ValueError, match=r"axon\.body_timeout_s"):
        AxonSettings(body_timeout_s=600.0)


def test_a_hotkey_that_is_no_sr25519_key_is_refused_at_construction() -> None:
    key = type(VALIDATOR).create_from_uri("//Ed", crypto_type=0)
    with pytest.raises(ValueError, match="sr25519"):
        Axon(key, policy())


def test_a_refusal_reaches_a_caller_that_is_still_sending_its_body() -> None:
    async def scenario() -> None:
        async with serving() as axon, connection(axon.port) as (reader, writer):
            plan = bytes(900 << 10)
            headers = signed(STRANGER, path="/AllReduce", body=plan) | {"Content-Length": str(len(plan))}
            writer.write(head("/AllReduce", headers))
            assert (await read_answer(reader)).status == 403
            writer.write(plan)
            await writer.drain()
            assert await reader.read() == b""  # closed, not reset

    asyncio.run(scenario())


def test_closing_ends_a_handler_in_progress_without_an_error_in_the_log(caplog) -> None:
    entered = asyncio.Event()

    async def hangs(_: Train, __: Caller) -> Message:
        entered.set()
        await asyncio.Event().wait()
        return TRAIN_REPLY

    async def scenario() -> None:
        async with serving(AxonSettings(close_grace_s=0.1), hangs) as axon, Dendrite(VALIDATOR) as dendrite:
            call = asyncio.create_task(dendrite.call(address(axon), TRAIN, attempts=1))
            await entered.wait()
            await axon.close()
            assert (await call).failure is Failure.UNREACHABLE

    with caplog.at_level(logging.WARNING):
        asyncio.run(scenario())
    assert caplog.text == ""
