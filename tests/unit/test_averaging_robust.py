"""Robust means against definitions in float64, against a bad member, and to the bit."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hivetrain.averaging.robust import MEAN_NAMES, get_mean, num_trimmed

SIZE = 1000
ROBUST = [name for name in MEAN_NAMES if name != "mean"]


def honest(num: int, size: int = SIZE, seed: int = 0) -> list[Tensor]:
    """Vectors that share a direction, as the pseudo-gradients of one round do."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(size, generator=generator)
    return [common + 0.3 * torch.randn(size, generator=generator) for _ in range(num)]


def distance(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def average(vectors: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(vectors)).mean(dim=0)


def test_an_unknown_mean_is_refused_and_the_known_ones_are_named() -> None:
    with pytest.raises(ValueError, match=r"trimmed_mean.*got 'mode'"):
        get_mean("mode")


def test_the_mean_is_weighted_in_order_in_separate_float32_operations() -> None:
    vectors, weights = honest(3), [3.0, 5.0, 7.0]
    expected = np.zeros(SIZE, np.float32)
    for vector, weight in zip(vectors, weights, strict=True):
        expected = expected + vector.numpy() * np.float32(weight)
    assert np.array_equal(get_mean("mean")(vectors, weights).numpy(), expected / np.float32(15))


@pytest.mark.parametrize("num", [3, 4, 5, 8, 9, 10])
def test_the_trimmed_mean_is_what_is_left_after_sorting_and_dropping_both_ends(num: int) -> None:
    vectors, drop = honest(num), num_trimmed(num)
    kept = np.sort(torch.stack(vectors).double().numpy(), axis=0)[drop : num - drop]
    found = get_mean("trimmed_mean")(vectors, [2.0] * num)
    assert np.allclose(found.numpy(), kept.mean(axis=0), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("num", [1, 2, 3, 4, 7])
def test_the_median_is_the_middle_value_or_the_mean_of_the_two(num: int) -> None:
    vectors = honest(num)
    expected = np.median(torch.stack(vectors).double().numpy(), axis=0)
    assert np.allclose(get_mean("median")(vectors, [2.0] * num).numpy(), expected, rtol=1e-6, atol=1e-6)


def test_a_quarter_rounded_up_is_trimmed_and_a_value_is_always_left() -> None:
    assert [num_trimmed(num) for num in range(1, 13)] == [0, 0, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3]


def test_weights_count_among_the_values_that_are_kept() -> None:
    vectors = [torch.tensor([value]) for value in (100.0, 1.0, 4.0, -100.0)]
    assert get_mean("trimmed_mean")(vectors, [9.0, 1.0, 2.0, 9.0]).item() == 3.0


def test_of_equal_values_the_first_in_the_plan_ranks_lowest() -> None:
    vectors = [torch.tensor([value]) for value in (1.0, 1.0, 1.0)]
    assert get_mean("median")(vectors, [2.0, 3.0, 5.0]).item() == 1.0
    tied = [torch.tensor([0.0]), torch.tensor([0.0]), torch.tensor([6.0]), torch.tensor([6.0])]
    # Places 1 and 2 are kept: the second member and the third.
    assert get_mean("trimmed_mean")(tied, [1.0, 1.0, 2.0, 50.0]).item() == 4.0


def test_the_norm_bound_shortens_whoever_is_longer_than_the_median() -> None:
    short, middle, long = (torch.zeros(2) for _ in range(3))
    short[0], middle[1], long[0] = 1.0, 2.0, 40.0
    found = get_mean("norm_bound")([short, middle, long], [1.0, 1.0, 1.0])
    assert found.tolist() == [1.0, pytest.approx(2 / 3)]


def test_of_two_members_the_longer_is_bound_to_the_shorter() -> None:
    found = get_mean("norm_bound")([torch.tensor([3.0, 4.0]), torch.tensor([30.0, 40.0])], [1.0, 1.0])
    assert found.tolist() == pytest.approx([3.0, 4.0])


@pytest.mark.parametrize("name", MEAN_NAMES)
@pytest.mark.parametrize("num", [1, 2, 3, 4, 10])
def test_equal_vectors_give_that_vector(name: str, num: int) -> None:
    vector = honest(1)[0]
    assert torch.allclose(get_mean(name)([vector] * num, [1.0 + i for i in range(num)]), vector, rtol=1e-6)


@pytest.mark.parametrize("name", MEAN_NAMES)
@pytest.mark.parametrize("num", [1, 2, 3, 4, 10])
def test_zero_vectors_give_zero(name: str, num: int) -> None:
    assert not get_mean(name)([torch.zeros(SIZE)] * num, [1.0] * num).any()


@pytest.mark.parametrize("name", MEAN_NAMES)
def test_one_member_alone_is_returned_as_it_is(name: str) -> None:
    vector = honest(1)[0]
    assert torch.equal(get_mean(name)([vector], [1.0]), vector)


@pytest.mark.parametrize("name", MEAN_NAMES)
def test_the_members_vectors_are_neither_written_to_nor_returned(name: str) -> None:
    vectors = honest(4)
    before = [vector.clone() for vector in vectors]
    get_mean(name)(vectors, [1.0, 2.0, 3.0, 4.0]).zero_()
    assert all(map(torch.equal, vectors, before))
    get_mean(name)(vectors[:1], [1.0]).zero_()
    assert torch.equal(vectors[0], before[0])


@pytest.mark.parametrize("name", MEAN_NAMES)
def test_second_moments_stay_non_negative_but_for_rounding(name: str) -> None:
    moments = [vector.square() * 10 ** (2 * place) for place, vector in enumerate(honest(4))]
    assert float(get_mean(name)(moments, [1.0] * 4).min()) >= -1e-6


@pytest.mark.parametrize("name", ROBUST)
@pytest.mark.parametrize(("num", "bad"), [(3, 1), (4, 1), (10, 3)])
def test_a_shouting_minority_moves_a_robust_mean_by_no_more_than_its_like(name: str, num: int, bad: int) -> None:
    vectors = honest(num)
    wanted = average(vectors[bad:])
    vectors[:bad] = [1e6 * wanted.roll(1)] * bad
    # The cap alone leaves the bad their share of the weight; the others leave less.
    assert distance(get_mean(name)(vectors, [1.0] * num), wanted) < (0.6 if name == "norm_bound" else 0.35)
    assert distance(get_mean("mean")(vectors, [1.0] * num), wanted) > 1e5


@pytest.mark.parametrize("name", ["trimmed_mean", "median", "centered_clip"])
def test_a_flipped_sign_costs_less_than_in_the_plain_mean(name: str) -> None:
    vectors = honest(4)
    wanted = average(vectors[1:])
    vectors[0] = -wanted
    plain = distance(get_mean("mean")(vectors, [1.0] * 4), wanted)
    assert distance(get_mean(name)(vectors, [1.0] * 4), wanted) < 0.75 * plain


@pytest.mark.parametrize("name", MEAN_NAMES)
def test_the_order_of_the_members_moves_the_result_by_no_more_than_rounding(name: str) -> None:
    vectors = honest(5)
    there, back = get_mean(name)(vectors, [1.0] * 5), get_mean(name)(vectors[::-1], [1.0] * 5)
    assert torch.allclose(there, back, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", MEAN_NAMES)
def test_the_number_of_threads_and_the_memory_behind_a_vector_change_no_bit(name: str) -> None:
    vectors = honest(5, size=262_144)
    shifted = [torch.cat([torch.zeros(1), vector])[1:] for vector in vectors]  # off every alignment of 8 bytes
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = get_mean(name)(vectors, [1.0, 2.0, 3.0, 4.0, 5.0])
        torch.set_num_threads(2)
        two = get_mean(name)(shifted, [1.0, 2.0, 3.0, 4.0, 5.0])
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(one, two)


@given(st.integers(3, 9), st.integers(0, 2**32 - 1))
@settings(max_examples=50, deadline=None)
def test_every_coordinate_stays_between_the_honest_ones_whatever_a_tolerated_minority_sends(
    num: int, seed: int
) -> None:
    vectors, bad = honest(num, size=64, seed=seed), num_trimmed(num)
    good = torch.stack(vectors[bad:])
    generator = torch.Generator().manual_seed(seed)
    for place in range(bad):
        vectors[place] = 10.0 ** (8 * torch.rand(64, generator=generator) - 4) * torch.randn(64, generator=generator)
    found = get_mean("trimmed_mean")(vectors, [1.0] * num)
    slack = 1e-5 * good.abs().max()
    assert bool((found >= good.min(dim=0).values - slack).all() and (found <= good.max(dim=0).values + slack).all())


def reference_norm_bound(vectors: Sequence[Tensor], weights: Sequence[float]) -> bytes:
    """The definition, in python floats and one float32 operation at a time."""

    def norm(values: list[float]) -> float:
        sums = [value * value for value in values]
        while len(sums) > 1:
            half = -(-len(sums) // 2)
            sums = [x + y for x, y in zip(sums[:half], [*sums[half:], 0.0], strict=False)]
        return float(np.sqrt(sums[0]))

    rows = [[float(value) for value in vector] for vector in vectors]
    norms = [norm(row) for row in rows]
    bound = sorted(norms)[(len(norms) - 1) // 2]
    mean = []
    for column in zip(*rows, strict=True):
        total, weight_sum = np.float32(0), np.float32(0)
        for value, length, weight in zip(column, norms, weights, strict=True):
            single = np.float32(value)
            if length > bound:
                single = np.float32(single * np.float32(bound / length))
            total = np.float32(total + np.float32(single * np.float32(weight)))
            weight_sum = np.float32(weight_sum + np.float32(weight))
        mean.append(np.float32(total / weight_sum))
    return np.array(mean, np.float32).tobytes()


@pytest.mark.parametrize("size", [1, 2, 3, 64, 777])
def test_the_norm_bound_is_its_definition_to_the_bit(size: int) -> None:
    vectors, weights = honest(5, size=size), [3.0, 1.0, 4.0, 1.0, 5.0]
    found = get_mean("norm_bound")(vectors, weights).numpy().tobytes()
    assert hashlib.sha256(found).digest() == hashlib.sha256(reference_norm_bound(vectors, weights)).digest()
