"""Sizes of parts from measured rates."""

from __future__ import annotations

import pytest

from hivetrain.averaging.butterfly import LinkStats
from template.validator.links import NUM_ROUNDS, LinkBook


def link(hotkey: str, megabytes: float, seconds: float = 1.0) -> LinkStats:
    return LinkStats(
        hotkey=hotkey, bytes_sent=0, bytes_received=int(megabytes * 1e6), seconds=seconds, first_byte_s=0.1
    )


def book(*rounds: dict[str, float]) -> LinkBook:
    """Megabytes per second of each member, round by round."""
    made = LinkBook()
    for rates in rounds:
        made.note(link(hotkey, 2 * rate, 2.0) for hotkey, rate in rates.items())
    return made


def test_who_was_never_measured_has_no_share_of_its_own() -> None:
    assert book().shares() == {}


def test_equal_lines_reduce_equal_parts() -> None:
    assert book({"a": 5.0, "b": 5.0}).shares() == {"a": 1.0, "b": 1.0}


def test_a_part_grows_with_the_rate_of_its_line() -> None:
    assert book({"a": 2.0, "b": 3.0, "c": 4.0}).shares() == pytest.approx({"a": 2 / 3, "b": 1.0, "c": 4 / 3})


def test_no_part_is_more_than_four_times_another() -> None:
    assert book({"a": 1.0, "b": 30.0, "c": 3000.0}).shares() == {"a": 0.5, "b": 1.0, "c": 2.0}


def test_one_odd_round_among_others_moves_nothing() -> None:
    steady = {"a": 4.0, "b": 4.0}
    assert book(steady, steady, {"a": 400.0, "b": 4.0}, steady).shares() == {"a": 1.0, "b": 1.0}


def test_a_line_that_has_changed_is_believed_after_some_rounds() -> None:
    before, after = {"a": 4.0, "b": 4.0}, {"a": 6.0, "b": 4.0}
    assert book(*[before] * NUM_ROUNDS, *[after] * NUM_ROUNDS).shares() == {"a": 1.2, "b": 0.8}


@pytest.mark.parametrize("small", [link("a", 0.9), link("a", 0.0, 0.0), link("a", 5.0, 0.0)])
def test_what_gives_no_rate_is_left_out(small: LinkStats) -> None:
    made = LinkBook()
    made.note([small])
    assert made.shares() == {}


def test_who_left_the_subnet_is_forgotten() -> None:
    made = book({"a": 5.0, "b": 5.0})
    made.forget({"b"})
    assert made.shares() == {"b": 1.0}
