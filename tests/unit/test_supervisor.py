from __future__ import annotations

from pathlib import Path

import pytest

from hivetrain.supervisor import Backoff, log_tail


def test_the_delay_doubles_up_to_its_limit() -> None:
    backoff = Backoff(first_s=1.0, max_s=5.0)
    assert [backoff.delay_s(n) for n in (1, 2, 3, 4, 400)] == [1.0, 2.0, 4.0, 5.0, 5.0]


@pytest.mark.parametrize(("content", "expected"), [(b"", []), (b"a\n\nb\n", ["a", "b"]), (b"\xff\n", ["\ufffd"])])
def test_the_tail_of_a_log_skips_empty_lines_and_survives_any_bytes(
    tmp_path: Path, content: bytes, expected: list[str]
) -> None:
    log = tmp_path / "x.log"
    log.write_bytes(content)
    assert log_tail(log) == expected


def test_the_tail_of_a_long_log_is_its_last_lines(tmp_path: Path) -> None:
    log = tmp_path / "x.log"
    log.write_text("".join(f"line {n}\n" for n in range(50_000)))
    assert log_tail(log, 2) == ["line 49998", "line 49999"]


def test_a_log_that_does_not_exist_has_no_tail(tmp_path: Path) -> None:
    assert log_tail(tmp_path / "none.log") == []
