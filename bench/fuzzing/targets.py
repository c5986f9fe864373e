"""Every target by name, in the order in which they run."""

from __future__ import annotations

from bench.fuzzing import accusing, answers, asking, openings, parsing, signing, transit
from bench.fuzzing.guard import Target, Violation

_KIB = 1 << 10
SLOW = 4.0
"""Weight of a target that runs hundreds of inputs a second where the others run thousands."""


def _planted(data: bytes) -> None:
    """A bug behind a short prefix, by which the fuzzer shows that it is not blind."""
    if len(data) >= 4 and data[0] == 0x48 and data[1] == 0x69 and data[2] == 0x76 and data[3] == 0x65:
        raise Violation("the planted bug is found")


_ALL = (
    Target(name="receipt", run=parsing.receipt, max_len=33 * _KIB, promise="a receipt, or a declared fault"),
    Target(
        name="synapse", run=parsing.synapse, max_len=64 * _KIB, promise="a message of the wire, or a declared fault"
    ),
    Target(name="plan", run=parsing.plan, max_len=16 * _KIB, promise="a group plan, or a declared fault"),
    Target(name="message", run=parsing.message, max_len=16 * _KIB, promise="a message of the all-reduce, or a fault"),
    Target(name="stream", run=parsing.stream, max_len=16 * _KIB, promise="frames as they were sealed, or a lost link"),
    Target(name="record", run=parsing.record, max_len=64 * _KIB, promise="checks that can be told, or refused"),
    Target(name="manifest", run=parsing.manifest, max_len=16 * _KIB, promise="a manifest, or refused"),
    Target(name="evidence", run=accusing.evidence, max_len=64 * _KIB, promise="proves nothing"),
    Target(name="steps", run=openings.steps, max_len=4 * _KIB, promise="records that were committed to, or a fault"),
    Target(name="snapshot", run=openings.snapshot, max_len=4 * _KIB, promise="a committed snapshot, or a fault"),
    Target(name="proof", run=openings.proof, max_len=4 * _KIB, promise="holds for what was committed to only"),
    Target(
        name="remainder", run=openings.remainder, max_len=4 * _KIB, promise="what the round before left, or a fault"
    ),
    Target(name="reply", run=transit.reply, max_len=4 * _KIB, promise="altered on its way, it convicts nobody"),
    Target(name="request", run=transit.request, max_len=4 * _KIB, promise="altered on its way, it is not let in"),
    Target(name="challenge", run=asking.challenge, max_len=4 * _KIB, promise="opens for committed coins only"),
    Target(name="joining", run=asking.joining, max_len=4 * _KIB, promise="joins the groups of its own round only"),
    Target(name="greeting", run=transit.greeting, max_len=4 * _KIB, promise="only who holds the key gets through"),
    Target(
        name="signed-receipt", run=signing.receipt, max_len=4 * _KIB, promise="costs nobody but its signer", weight=SLOW
    ),
    Target(
        name="signed-record", run=signing.record, max_len=4 * _KIB, promise="convicts nobody of what it did not sign"
    ),
    Target(
        name="accusation",
        run=accusing.accusation,
        max_len=4 * _KIB,
        promise="convicts nobody but its maker",
        weight=SLOW,
    ),
    Target(
        name="answer",
        run=answers.answer,
        max_len=4 * _KIB,
        promise="a verdict on the answering miner alone",
        weight=SLOW,
    ),
)
TARGETS = {target.name: target for target in _ALL}
PLANTED = Target(name="planted", run=_planted, max_len=8, promise="none: a bug to be found")


def find_target(name: str) -> Target:
    """The target of that name, `PLANTED` among them.

    Raises:
        KeyError: there is none.
    """
    return PLANTED if name == PLANTED.name else TARGETS[name]


def warm_up(target: Target) -> None:
    """Run it once on nothing: what it makes once is no input's doing."""
    parsing.prepare()
    target.run(b"")


__all__ = ["PLANTED", "TARGETS", "find_target", "warm_up"]
