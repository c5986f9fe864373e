"""Our chain calls as a real node would receive them, encoded offline against real runtime metadata.

`fixtures/subtensor_spec461_metadata_v15.xz` is the V15 metadata of subtensor spec 461, taken unchanged from
`tests/fixtures/golden.json` ("metadata.v15_hex") of the bittensor 11.3.0 source distribution (Apache-2.0) and
compressed. The expected bytes are assembled by hand from SCALE, https://docs.polkadot.com/ ("Data Encoding").
"""

from __future__ import annotations

import functools
import hashlib
import ipaddress
import lzma
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from bittensor._transport.codec import RuntimeCodec  # the SDK's encoder; it has no public name

from template.chain import runtime
from template.chain.calls import CALLS
from template.chain.commitments import decode_fields, encode_fields
from template.chain.local import SPEC_VERSION, LocalSubstrate
from tests.chain_fixture import NETUID, LocalChain, local_chain

METADATA = Path(__file__).with_name("fixtures") / "subtensor_spec461_metadata_v15.xz"
METADATA_SHA256 = "0d812a161c40efbe58ac13785cb579ab79b0bc7c4b57f5bcd27981501a8c8ca8"


@functools.cache
def codec() -> RuntimeCodec:
    raw = lzma.decompress(METADATA.read_bytes())
    assert hashlib.sha256(raw).hexdigest() == METADATA_SHA256
    return RuntimeCodec(raw, spec_version=SPEC_VERSION, transaction_version=1)


def u16(value: int) -> bytes:
    return value.to_bytes(2, "little")


@pytest.fixture
def net(tmp_path: Path) -> Iterator[LocalChain]:
    with local_chain(tmp_path, tempo=10) as made:
        made.register("validator", stake=5000)
        made.register("miner")
        made.produce()
        yield made


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """The SCALE bytes of every call that the facade composes."""
    seen: list[bytes] = []
    compose = LocalSubstrate.compose

    async def both(self: LocalSubstrate, call: Any) -> Any:
        seen.append(codec().call_data(codec().compose_call(*call)))
        return await compose(self, call)

    monkeypatch.setattr(LocalSubstrate, "compose", both)
    return seen


def test_a_registration_is_call_7_7_with_netuid_and_public_key(net: LocalChain, sent: list[bytes]) -> None:
    net.client("new").register()
    assert sent == [b"\x07\x07" + u16(NETUID) + bytes(net.wallet("new").hotkey.public_key)]


@pytest.mark.parametrize(("ip", "kind"), [("127.0.0.2", 4), ("2001:db8::1", 6)])
def test_serving_sends_the_address_as_a_u128(net: LocalChain, sent: list[bytes], ip: str, kind: int) -> None:
    net.client("miner").serve(ip, 8091)
    address = int(ipaddress.ip_address(ip)).to_bytes(16, "little")
    version, protocol = (1).to_bytes(4, "little"), b"\x04"
    (data,) = sent
    assert data[:1] == b"\x07"
    assert data[2:] == u16(NETUID) + version + address + u16(8091) + bytes([kind]) + protocol + b"\x00\x00"
    assert codec().decode_call(data)["call_function"] == "serve_axon"


def test_a_short_commitment_is_one_fixed_field(net: LocalChain, sent: list[bytes]) -> None:
    net.client("miner").commit(b"abc")
    # Pallet 18, call 0; a vector of one; variant 4 is Raw3 (0 is None, 1 is Raw0).
    assert sent == [b"\x12\x00" + u16(NETUID) + b"\x04" + b"\x04" + b"abc"]


def test_a_long_commitment_is_one_big_field(net: LocalChain, sent: list[bytes]) -> None:
    data = bytes(range(256)) + b"\xff" * 256
    net.client("miner").commit(data)
    # Variant 136 is BigRaw; its length 512 in compact form is 512 << 2 | 1.
    assert sent == [b"\x12\x00" + u16(NETUID) + b"\x04" + b"\x88" + u16(512 << 2 | 1) + data]


def test_weights_go_to_mechanism_zero_with_our_version(net: LocalChain, sent: list[bytes]) -> None:
    net.register("other")
    net.client("validator").set_weights({1: 1.0, 2: 0.5}, version_key=1234)
    # Max-upscaled: 1.0 is 65535 and 0.5 is 32768 (round half to even of 32767.5).
    uids, values = b"\x08" + u16(1) + u16(2), b"\x08" + u16(65535) + u16(32768)
    assert sent == [b"\x07\x77" + u16(NETUID) + b"\x00" + uids + values + (1234).to_bytes(8, "little")]


def test_timelocked_weights_are_encoded_with_version_4(net: LocalChain, sent: list[bytes]) -> None:
    net.ledger.set_rules(commit_reveal=True)
    net.client("validator").set_weights({1: 1.0}, version_key=1234)
    (data,) = sent
    decoded = codec().decode_call(data)
    arguments = {argument["name"]: argument["value"] for argument in decoded["call_args"]}
    assert decoded["call_function"] == "commit_timelocked_mechanism_weights"
    assert (arguments["netuid"], arguments["mecid"], arguments["commit_reveal_version"]) == (NETUID, 0, 4)
    assert data[-2:] == u16(4)


@pytest.mark.parametrize("data", [b"", b"abc", b"\xff\x80", b"t" * 129, "ä".encode() * 100, b"\xff" * 512, b"0x6162"])
def test_a_stored_commitment_reads_back_as_the_real_codec_shows_it(net: LocalChain, data: bytes) -> None:
    entry = codec().storage_entry("Commitments", "CommitmentOf")
    record = {"deposit": 0, "block": 2, "info": {"fields": encode_fields(data)}}
    shown = codec().decode(entry.value_type, codec().encode(entry.value_type, record))
    assert decode_fields(shown) == data
    net.client("miner").commit(data)
    with net.ledger.read() as state:
        ours = runtime.query(state, "Commitments", "CommitmentOf", [NETUID, net.hotkey("miner")], state.head())
    assert ours == shown


@pytest.mark.parametrize("call", sorted(CALLS))
def test_every_call_takes_the_real_ones_arguments(call: tuple[str, str]) -> None:
    module, function = call
    pallets = {pallet.name: pallet for pallet in codec().metadata_ir().pallets}
    (real,) = [found for found in pallets[module].calls if found.name == function]
    assert sorted(argument.name for argument in real.args) == sorted(CALLS[call][1])


# Newer than spec 461; the SDK asks for it before it sets weights.
NEWER = {("SubtensorModule", "SubnetEpochConsensus")}


@pytest.mark.parametrize(
    "item",
    sorted(
        {*runtime._CHAIN_ITEMS, *runtime._SUBNET_ITEMS, *runtime._COLUMNS, *runtime._MAPS} - NEWER,
    ),
)
def test_every_storage_item_exists_in_the_real_runtime(item: tuple[str, str]) -> None:
    assert codec().storage_entry(*item).name == item[1]


@pytest.mark.parametrize("api", sorted(runtime._APIS))
def test_every_runtime_api_exists_in_the_real_runtime(api: tuple[str, str]) -> None:
    methods = codec().runtime_api_map[api[0]]
    assert api[1] in methods or api[1] in methods.get("methods", {})


def test_every_refusal_has_a_name_of_the_real_runtime() -> None:
    pallets = {pallet.name: pallet for pallet in codec().metadata_ir().pallets}
    real = {error.name for module in ("SubtensorModule", "Commitments") for error in pallets[module].errors}
    source = Path(runtime.__file__).parent
    text = "".join((source / name).read_text() for name in ("calls.py", "registration.py"))
    used = set(re.findall(r'"([A-Z][a-z]+(?:[A-Z][A-Za-z]*)+)"', text)) - {"SubtensorModule", "BigRaw"}
    assert len(used) > 20
    # What a node refuses while decoding has no name.
    assert used - real == {"InvalidArgument"}
