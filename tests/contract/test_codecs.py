"""One suite over every codec: sizes, chunks, determinism, errors within their bounds, and every refusal.

The bytes are pinned against a second implementation, in plain Python and one value at a time, at the end of this file.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hivetrain.averaging.codecs import CODEC_NAMES, get_codec
from hivetrain.averaging.codecs.rounding import dither
from hivetrain.errors import Fault, PeerFault
from hivetrain.run import CHUNK_ELEMENTS

LOGS = ("log8", "log4")
LOSSY = tuple(name for name in CODEC_NAMES if name != "fp32")
BLOCKED = tuple(name for name in LOSSY if name != "fp16")
SIGNED = tuple(name for name in CODEC_NAMES if name not in LOGS)
FLOAT_MAX = float(np.finfo(np.float32).max)
REACH = {"log8": 32, "log4": 14}  # octaves
LENGTHS = (1, 7, 64, 65, 4095, 4096, 4097, 3 * 4096 + 130)

# Relative L2 error on normal values, and on the squares of normal values over six octaves of scale for the logs.
BOUNDS = {
    "fp32": 0.0,
    "fp16": 3e-4,
    "int8": 0.009,
    "int4": 0.16,
    "int2": 0.36,
    "sign": 0.61,
    "topk-1%": 0.97,
    "topk-10%": 0.76,
    "log8": 0.03,
    "log4": 0.4,
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def sample(name: str, num_elements: int, seed: int = 0) -> Tensor:
    """Values that the codec is for."""
    values = torch.randn(num_elements, generator=torch.Generator().manual_seed(seed))
    return values**2 * 1e-8 if name in LOGS else values * 1e-3


def round_trip(name: str, values: Tensor, seed: int = 0) -> Tensor:
    codec = get_codec(name)
    return codec.decode(codec.encode(values, seed), values.numel())


@pytest.mark.parametrize("name", CODEC_NAMES)
@pytest.mark.parametrize("num_elements", LENGTHS)
def test_sizes_are_what_the_codec_says(name: str, num_elements: int) -> None:
    codec = get_codec(name)
    data = codec.encode(sample(name, num_elements), 5)
    assert len(data) == codec.encoded_size(num_elements)
    decoded = codec.decode(data, num_elements)
    assert decoded.shape == (num_elements,)
    assert decoded.dtype is torch.float32


@pytest.mark.parametrize("name", CODEC_NAMES)
@pytest.mark.parametrize("num_elements", LENGTHS)
def test_every_chunk_encodes_and_decodes_alone(name: str, num_elements: int) -> None:
    codec, values = get_codec(name), sample(name, num_elements)
    pieces = list(values.split(CHUNK_ELEMENTS))
    alone = [codec.encode(piece, 5 + j) for j, piece in enumerate(pieces)]
    assert codec.encode(values, 5) == b"".join(alone)
    decoded = [codec.decode(data, len(piece)) for data, piece in zip(alone, pieces, strict=True)]
    assert torch.equal(codec.decode(b"".join(alone), num_elements), torch.cat(decoded))


@pytest.mark.parametrize("name", CODEC_NAMES)
def test_long_vectors_are_the_same_as_their_chunks(name: str) -> None:
    codec, values = get_codec(name), sample(name, 40 * CHUNK_ELEMENTS)  # past the rows that are worked on at once
    data, size = codec.encode(values, 2**63), codec.encoded_size(CHUNK_ELEMENTS)
    for j in (0, 6, 7, 39):
        piece = values[j * CHUNK_ELEMENTS : (j + 1) * CHUNK_ELEMENTS]
        assert codec.encode(piece, 2**63 + j) == data[j * size : (j + 1) * size]


@pytest.mark.parametrize("name", CODEC_NAMES)
def test_the_error_is_within_the_documented_bound(name: str) -> None:
    values = sample(name, 50_000)
    if name in LOGS:
        values *= 2.0 ** (torch.arange(50_000) // 100 % 7)
    error = float((round_trip(name, values) - values).norm() / values.norm())
    assert error <= BOUNDS[name]
    assert error >= 0.5 * BOUNDS[name] or name in LOGS  # a bound that says something


@pytest.mark.parametrize("name", CODEC_NAMES)
def test_bytes_depend_on_values_seed_and_name_alone(name: str) -> None:
    codec, values = get_codec(name), sample(name, 20_000)
    data = codec.encode(values, 9)
    torch.manual_seed(123)
    torch.set_num_threads(2)
    assert codec.encode(values.clone(), 9) == data
    strided = torch.stack((values, values)).t()[:, 0]
    assert codec.encode(strided, 9) == data
    stochastic = name in ("int8", "int4", "log8", "log4")
    assert (codec.encode(values, 10) != data) is stochastic


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", CODEC_NAMES)
def test_a_gpu_writes_the_same_bytes(name: str) -> None:
    codec = get_codec(name)
    for num_elements in (1, 77, 4096, 300 * 4096 + 77):
        for spread in (0.0, 8.0, 40.0):
            scales = torch.exp2(spread * torch.randn(num_elements, generator=torch.Generator().manual_seed(1)))
            values = (sample(name, num_elements) * scales).clamp(-3e38, 3e38)
            values[::17] = 0.0
            assert codec.encode(values.cuda(), 3) == codec.encode(values, 3)


@pytest.mark.parametrize("name", CODEC_NAMES)
@pytest.mark.parametrize("seed", [0, 1, 2**56 - 1, 2**64 - 1, 2**70])
def test_any_seed_will_do(name: str, seed: int) -> None:
    values = sample(name, 5000)
    assert round_trip(name, values, seed).isfinite().all()


# -- rounding ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_stochastic_rounding_has_no_direction(name: str) -> None:
    values = sample(name, 4096)
    mean = torch.stack([round_trip(name, values, 1000 * seed) for seed in range(400)]).mean(0)
    once = (round_trip(name, values) - values).norm() / values.norm()
    assert (mean - values).norm() / values.norm() < 0.07 * once  # 1 / sqrt(400) = 0.05


@pytest.mark.parametrize("name", LOGS)
def test_what_changes_by_less_than_a_level_moves_on_average(name: str) -> None:
    values = torch.tensor([1e-6, *[2e-6] * 62, 1e-3])
    grown = values * 1.002
    before = torch.stack([round_trip(name, values, 7 * seed)[1:-1] for seed in range(300)]).mean()
    after = torch.stack([round_trip(name, grown, 7 * seed)[1:-1] for seed in range(300)]).mean()
    assert after > before


def test_dither_is_uniform_and_differs_between_chunks_and_places() -> None:
    numbers = dither(12345, 64, torch.device("cpu"))
    assert numbers.shape == (64, CHUNK_ELEMENTS)
    assert float(numbers.min()) >= 0.0
    assert float(numbers.max()) < 1.0
    counts = torch.histc(numbers, bins=64, min=0.0, max=1.0)
    expected = numbers.numel() / 64
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    assert chi_square < 63 + 5 * math.sqrt(2 * 63)
    centred = numbers - 0.5
    noise = 5 / 12 / math.sqrt(numbers.numel())
    for shift in (1, 2, 64, 2048):
        assert abs(float((centred[:, shift:] * centred[:, :-shift]).mean())) < noise * 1.5
    assert abs(float((centred[1:] * centred[:-1]).mean())) < noise


# -- special values ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CODEC_NAMES)
def test_zeros_stay_zeros(name: str) -> None:
    values = torch.zeros(5000)
    values[4500] = -0.0
    assert not round_trip(name, values).any()


@pytest.mark.parametrize("name", [name for name in SIGNED if name not in ("sign", "int2")])
def test_a_zero_among_others_stays_zero(name: str) -> None:
    values = sample(name, 5000)
    values[::3] = 0.0
    assert not round_trip(name, values)[::3].any()


@pytest.mark.parametrize("name", CODEC_NAMES)
@pytest.mark.parametrize("value", [1e-45, 1e-40, 1.2e-38, 1e-30, 1e30, 3e38, FLOAT_MAX])
def test_what_is_tiny_or_huge_stays_finite_and_near(name: str, value: float) -> None:
    values = torch.full((4100,), value)
    values[::2] = value * 0.5
    decoded = round_trip(name, values)
    assert decoded.isfinite().all()
    assert (decoded >= 0).all()
    if name != "fp16" and not (name in BLOCKED and value < 1e-29):
        assert float(decoded.max()) > 0.45 * value


@pytest.mark.parametrize("name", CODEC_NAMES)
@pytest.mark.parametrize("power", [0.0, 0.1, 1.0, 4.0])
def test_no_value_is_decoded_past_the_largest_by_a_percent(name: str, power: float) -> None:
    # The all-reduce holds a reducer to the recipe's bound with that much slack.
    values = torch.randn(5000, generator=torch.Generator().manual_seed(4)).abs() ** power
    values[::7] *= 0.5
    if name in SIGNED:
        values[::2] *= -1
    for seed in range(5):
        assert float(round_trip(name, values, seed).abs().max()) <= 1.01 * float(values.abs().max())


@pytest.mark.parametrize("name", LOGS)
@pytest.mark.parametrize("tiny", [1e-45, 1e-41, 1e-38, 1e-20])
def test_a_small_second_moment_never_becomes_zero(name: str, tiny: float) -> None:
    values = torch.full((300,), tiny)
    values[5] = 1.0
    values[6] = 0.0
    for seed in range(20):
        decoded = round_trip(name, values, seed)
        assert decoded[6] == 0
        assert int((decoded > 0).sum()) == 299


@pytest.mark.parametrize("name", LOGS)
def test_every_second_moment_is_within_one_level(name: str) -> None:
    reach = REACH[name] - 0.1
    octaves = torch.linspace(-4 - reach, -4, 128)
    values = torch.exp2(octaves)
    level = (reach + 0.1) / (2 ** int(name[3:]) - 2)
    off = (round_trip(name, values).log2() - octaves).abs()
    assert float(off.max()) <= level + 0.09  # the bits of a float are log2 within 0.09


@pytest.mark.parametrize("name", LOGS)
def test_a_second_moment_beyond_reach_is_lifted_and_costs_the_others_nothing(name: str) -> None:
    values = torch.exp2(torch.linspace(-8, -4, 128))
    values[7] = 2.0**-100
    decoded = round_trip(name, values)
    level = REACH[name] / (2 ** int(name[3:]) - 2)
    off = (decoded.log2() - values.log2()).abs()
    assert float(torch.cat((off[:7], off[8:])).max()) <= level + 0.09
    assert decoded[7] >= 2.0 ** (-4.1 - REACH[name])


@pytest.mark.parametrize("name", LOSSY)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 4095, 4100])
def test_values_that_are_not_finite_are_refused(name: str, value: float, place: int) -> None:
    values = sample(name, 4101)
    values[place] = value
    with pytest.raises(ValueError, match=f"{name} encodes finite values only"):
        get_codec(name).encode(values, 0)


@pytest.mark.parametrize("name", LOGS)
def test_negative_second_moments_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=">= 0 only"):
        get_codec(name).encode(torch.tensor([1.0, -1e-30]), 0)


def test_fp32_carries_any_bits() -> None:
    bits = torch.tensor([0x7F800000, 0x7FC00001, 1, -(2**31)], dtype=torch.int32)
    data = get_codec("fp32").encode(bits.view(torch.float32), 0)
    assert data == struct.pack("<4i", *bits.tolist())
    assert torch.equal(get_codec("fp32").decode(data, 4).view(torch.int32), bits)


def test_fp16_rounds_to_nearest_even_and_is_cut_at_its_largest() -> None:
    values = torch.tensor([1.0, 1 + 2**-11, 1 + 3 * 2**-11, -0.0, 70000.0, -1e30])
    data = get_codec("fp16").encode(values, 0)
    assert data == struct.pack("<6e", 1.0, 1.0, 1 + 2**-9, -0.0, 65504.0, -65504.0)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(LOSSY),
    st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=300),
    st.integers(0, 2**64),
)
def test_any_finite_values_come_back_finite(name: str, values: list[float], seed: int) -> None:
    tensor = torch.tensor(values, dtype=torch.float32)
    decoded = round_trip(name, tensor.abs() if name in LOGS else tensor, seed)
    assert decoded.isfinite().all()


@pytest.mark.parametrize("name", [name for name in SIGNED if name not in ("fp32", "fp16")])
def test_encoding_brings_values_nearer_to_zero_rest(name: str) -> None:
    # What error feedback rests on: the rest is shorter than the vector.
    for spread in (0.0, 3.0, 12.0):
        scales = torch.exp2(spread * torch.randn(9000, generator=torch.Generator().manual_seed(2)))
        values = sample(name, 9000) * scales
        assert float((round_trip(name, values) - values).norm()) < float(values.norm())


# -- bytes from strangers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CODEC_NAMES)
@pytest.mark.parametrize("num_elements", [10, 4096, 5000])
@pytest.mark.parametrize(("change", "fault"), [(-1, Fault.TRUNCATED), (1, Fault.OVERSIZED)])
def test_bytes_of_another_size_are_refused(name: str, num_elements: int, change: int, fault: Fault) -> None:
    codec = get_codec(name)
    with pytest.raises(PeerFault) as refused:
        codec.decode(bytes(codec.encoded_size(num_elements) + change), num_elements)
    assert refused.value.fault is fault


@pytest.mark.parametrize("name", ["int8", "int4", "int2", "sign", *LOGS])
@pytest.mark.parametrize("word", [0x7F80, 0x7FC0, 0xFF80, 0xFFFF])
@pytest.mark.parametrize("num_elements", [100, 5000])
def test_a_scale_that_is_not_finite_is_refused(name: str, word: int, num_elements: int) -> None:
    codec = get_codec(name)
    data = bytearray(codec.encode(sample(name, num_elements), 0))
    at = codec.encoded_size(num_elements // CHUNK_ELEMENTS * CHUNK_ELEMENTS)  # the last chunk's first word
    if name in LOGS:
        at += 2 * -(-(num_elements % CHUNK_ELEMENTS) // 128)  # the largest value's: the least is compared with it
    data[at : at + 2] = struct.pack("<H", word)
    with pytest.raises(PeerFault) as refused:
        codec.decode(data, num_elements)
    assert refused.value.fault is Fault.NOT_FINITE


@pytest.mark.parametrize("name", ["int8", "int4", "int2", "sign", *LOGS])
def test_a_negative_scale_is_malformed(name: str) -> None:
    codec = get_codec(name)
    data = bytearray(codec.encode(sample(name, 100), 0))
    data[0:2] = struct.pack("<H", 0x8000 | 0x3F80)
    with pytest.raises(PeerFault) as refused:
        codec.decode(data, 100)
    assert refused.value.fault is Fault.MALFORMED


@pytest.mark.parametrize("name", ["int8", "int4", "int2"])
def test_a_scale_whose_levels_would_not_be_finite_is_malformed(name: str) -> None:
    codec = get_codec(name)
    data = bytearray(codec.encode(sample(name, 100), 0))
    data[0:2] = struct.pack("<H", 0x7F7F)
    with pytest.raises(PeerFault) as refused:
        codec.decode(data, 100)
    assert refused.value.fault is Fault.MALFORMED


@pytest.mark.parametrize("name", ["topk-1%", "topk-10%"])
@pytest.mark.parametrize(
    ("places", "word", "fault"),
    [
        ([3, 3], 0x3F80, Fault.MALFORMED),
        ([4, 3], 0x3F80, Fault.MALFORMED),
        ([3, 4096], 0x3F80, Fault.MALFORMED),
        ([3, 0xFFFF], 0x3F80, Fault.MALFORMED),
        ([0, 1], 0x7F80, Fault.NOT_FINITE),
        ([0, 1], 0xFFC1, Fault.NOT_FINITE),
    ],
)
def test_places_and_values_that_topk_never_writes_are_refused(
    name: str, places: list[int], word: int, fault: Fault
) -> None:
    codec = get_codec(name)
    kept = codec.encoded_size(CHUNK_ELEMENTS) // 4
    every = [*range(kept - 2), *places] if places[0] == 0 else [*places, *range(3000, 3000 + kept - 2)]
    if places[0] == 0:
        every = list(range(kept))
    with pytest.raises(PeerFault) as refused:
        codec.decode(struct.pack(f"<{2 * kept}H", *every, *[word] * kept), CHUNK_ELEMENTS)
    assert refused.value.fault is fault


@pytest.mark.parametrize("name", ["topk-1%", "topk-10%"])
def test_a_place_past_a_short_chunk_is_refused(name: str) -> None:
    codec = get_codec(name)
    kept = codec.encoded_size(50) // 4
    with pytest.raises(PeerFault, match="below 50"):
        codec.decode(struct.pack(f"<{2 * kept}H", *range(51 - kept, 51), *[0x3F80] * kept), 50)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(BLOCKED), st.integers(1, 300), st.data())
def test_whatever_bytes_come_are_refused_or_decode_to_finite_values(
    name: str, num_elements: int, data: st.DataObject
) -> None:
    size = get_codec(name).encoded_size(num_elements)
    raw = data.draw(st.binary(min_size=size, max_size=size))
    try:
        decoded = get_codec(name).decode(raw, num_elements)
    except PeerFault as fault:
        assert fault.fault in (Fault.NOT_FINITE, Fault.MALFORMED)  # noqa: PT017 - either outcome is right
    else:
        assert decoded.shape == (num_elements,)
        assert decoded.isfinite().all()


@pytest.mark.parametrize("name", CODEC_NAMES)
def test_a_view_into_a_message_decodes_like_bytes(name: str) -> None:
    codec, values = get_codec(name), sample(name, 5000)
    data = codec.encode(values, 1)
    inside = memoryview(b"xyz" + data + b"z")[3:-1]
    assert torch.equal(codec.decode(inside, 5000), codec.decode(data, 5000))
    assert torch.equal(codec.decode(bytearray(data), 5000), codec.decode(data, 5000))


def test_an_unknown_codec_names_those_that_exist() -> None:
    with pytest.raises(ValueError, match=r"fp32, fp16, int8, .* log4, got 'zip'"):
        get_codec("zip")


# -- a second implementation, from docs/protocol.md, one value at a time -------------------------------------

f32 = np.float32
MASK = 2**64 - 1


def random_16(seed: int, place: int) -> int:
    """The 16 bits that element ``place`` of chunk ``seed`` rounds under."""
    z = seed * 0x9E3779B97F4A7C15 & MASK
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & MASK
    z = (z ^ z >> 27) * 0x94D049BB133111EB & MASK
    z ^= z >> 31
    x = (place % 2048 * 0x9E3779B9 & 0xFFFFFFFF) ^ (z & 0xFFFFFFFF)
    x = (x ^ x >> 16) * 0x85EBCA6B & 0xFFFFFFFF ^ z >> 32
    x = (x ^ x >> 13) * 0xC2B2AE35 & 0xFFFFFFFF
    x ^= x >> 16
    return x & 0xFFFF if place < 2048 else x >> 16


def bits_of(value: float) -> int:
    return int(f32(value).view(np.uint32))


def of_bits(bits: int) -> np.float32:
    return np.uint32(bits).view(np.float32)


def packed(codes: list[int], bits: int, block: int) -> bytes:
    """Codes of one chunk, block by block."""
    width, out = block * bits // 8, bytearray()
    for start in range(0, len(codes), block):
        lanes = bytearray(width)
        for i, code in enumerate(codes[start : start + block]):
            lanes[i % width] |= code << (bits * (i // width))
        out += lanes[: min(len(codes) - start, width)]
    return bytes(out)


def plain_top_scaled(values: list[float], seed: int, bits: int) -> bytes:
    zero, words, codes = 2 ** (bits - 1), [], []
    for start in range(0, len(values), 64):
        block = values[start : start + 64]
        top = f32(max(abs(value) for value in block))
        word = bits_of(top * f32(1 / (zero - 1))) + 0xFFFF >> 16
        words.append(word)
        inverse = f32(1) / of_bits(word << 16)
        for i, value in enumerate(block):
            level = f32(value) * inverse + f32(random_16(seed, start + i)) * f32(2**-16) + f32(zero)
            codes.append(int(min(max(level, f32(1)), f32(2 * zero - 0.5))))
    return struct.pack(f"<{len(words)}H", *words) + packed(codes, bits, 64)


def plain_mean_scaled(values: list[float], bits: int) -> bytes:
    half, words, codes = 2 ** (bits - 1), [], []
    for start in range(0, len(values), 256):
        block = values[start : start + 256]
        sums = [f32(abs(value)) * f32(1 / 256) for value in block] + [f32(0)] * (256 - len(block))
        while len(sums) > 1:
            sums = [a + b for a, b in zip(sums[: len(sums) // 2], sums[len(sums) // 2 :], strict=True)]
        mean = sums[0] * (f32(256) / f32(len(block)))
        most = f32(max(abs(value) for value in block))
        word = bits_of(mean if bits == 1 else min(mean * f32(2 / 3), most * f32(1 / 3))) + 0x8000 >> 16
        words.append(word)
        if bits == 1:
            codes += [int(value < 0) for value in block]
            continue
        inverse = f32(0.5) / of_bits(word << 16)
        codes += [int(min(max(f32(v) * inverse + f32(half), f32(0)), f32(2 * half - 0.5))) for v in block]
    return struct.pack(f"<{len(words)}H", *words) + packed(codes, bits, 256)


def plain_topk(values: list[float], percent: int) -> bytes:
    kept = sorted(
        sorted(range(len(values)), key=lambda i: (-abs(values[i]), i))[: math.ceil(len(values) * percent / 100)]
    )
    words = [((bits_of(abs(values[i])) + 0x8000) >> 16) | (0x8000 if values[i] < 0 else 0) for i in kept]
    return struct.pack(f"<{2 * len(kept)}H", *kept, *words)


def plain_logarithmic(values: list[float], seed: int, bits: int) -> bytes:
    lows, highs, codes = [], [], []
    top = f32(2**bits - 2)
    for start in range(0, len(values), 128):
        block = [bits_of(value) for value in values[start : start + 128]]
        highs.append(max(block) + 0xFFFF >> 16)
        lows.append(max(min(b for b in block if b) >> 16, highs[-1] - (REACH[f"log{bits}"] << 7)))
        per_bit = top / f32(highs[-1] - lows[-1] << 16)
        for i, one in enumerate(block):
            level = f32(one - (lows[-1] << 16)) * per_bit + f32(random_16(seed, start + i)) * f32(2**-16)
            codes.append(int(min(max(level, f32(0)), top)) + 1 if one else 0)
    return struct.pack(f"<{2 * len(lows)}H", *lows, *highs) + packed(codes, bits, 128)


@pytest.mark.parametrize("name", [name for name in CODEC_NAMES if not name.startswith("fp")])
@pytest.mark.parametrize("num_elements", [300, 4096])
def test_the_bytes_are_those_of_the_plain_implementation(name: str, num_elements: int) -> None:
    tensor = sample(name, num_elements, seed=3)
    tensor[10] = 0.0
    tensor[20] = tensor[21]  # a tie
    values = [float(value) for value in tensor]
    expected = {
        "int8": lambda: plain_top_scaled(values, 77, 8),
        "int4": lambda: plain_top_scaled(values, 77, 4),
        "int2": lambda: plain_mean_scaled(values, 2),
        "sign": lambda: plain_mean_scaled(values, 1),
        "topk-1%": lambda: plain_topk(values, 1),
        "topk-10%": lambda: plain_topk(values, 10),
        "log8": lambda: plain_logarithmic(values, 77, 8),
        "log4": lambda: plain_logarithmic(values, 77, 4),
    }[name]()
    assert get_codec(name).encode(tensor, 77) == expected


def test_dither_is_that_of_the_plain_implementation() -> None:
    numbers = dither(2**64 - 1, 3, torch.device("cpu"))
    for chunk in range(3):
        for place in (0, 1, 2047, 2048, 4095):
            assert float(numbers[chunk, place]) * 65536 == random_16(2**64 - 1 + chunk & MASK, place)


def test_decoded_values_by_hand() -> None:
    one = struct.pack("<H", 0x3F80)
    assert get_codec("int8").decode(one + bytes([0, 127, 128, 255]), 4).tolist() == [-128.0, -1.0, 0.0, 127.0]
    assert get_codec("int4").decode(one + bytes([0x08, 0x0F, 0x01]), 3).tolist() == [0.0, 7.0, -7.0]
    assert get_codec("int2").decode(one + bytes([0, 1, 2, 3]), 4).tolist() == [-3.0, -1.0, 1.0, 3.0]
    assert get_codec("sign").decode(one + bytes([0, 1]), 2).tolist() == [1.0, -1.0]
    assert get_codec("topk-1%").decode(struct.pack("<2H", 2, 0xC000), 4).tolist() == [0.0, 0.0, -2.0, 0.0]
    least, largest = struct.pack("<H", 0x3F80), struct.pack("<H", 0x4000)  # 1 and 2
    decoded = get_codec("log8").decode(least + largest + bytes([0, 1, 255, 128]), 4)
    assert decoded.tolist() == [0.0, 1.0, 2.0, 1.5]
