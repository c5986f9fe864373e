"""What is wrong with a stranger's message, at a cost that does not depend on how much is."""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import ValidationError

MAX_LISTED = 256
"""pydantic makes a list of dicts of its errors, two kilobytes each: 3 MB of unknown fields come to 600 MB and 3 s."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """The first field that is wrong.

    Attributes:
        where: its path, at most 100 characters: an unknown field's name is the stranger's, however long.
        message: in pydantic's words, at most 150 characters.
        kind: pydantic's name for it.
    """

    where: str
    message: str
    kind: str


def first_problem(exc: ValidationError) -> Problem:
    """The first of ``exc``'s errors, or how many they are where they are too many to list. Echoes no value."""
    count = exc.error_count()
    if count > MAX_LISTED:
        return Problem(where="", message=f"{count} fields are wrong", kind="")
    first = exc.errors(include_url=False, include_context=False, include_input=False)[0]
    where = ".".join(map(str, first["loc"]))[:100]
    return Problem(where=where, message=first["msg"][:150], kind=first["type"])


__all__ = ["Problem", "first_problem"]
