"""The one error tree.

    HivetrainError
    ├── PeerFault           a peer did wrong: a value that is recorded and scored, never our failure
    ├── ServiceError        chain, hub, data or disk did not answer: retried within a limit, then "not scored"
    │   ├── ChainError
    │   ├── HubError
    │   │   └── HubConflict     somebody else published first: the loser of a clean race
    │   ├── DataError
    │   └── IntegrityError      bytes whose sha256 is not the published one
    └── ConfigError         a flag, file or environment that cannot work: one clear line, exit code 2
        └── RecipeError
            └── SchemaMismatch  our trainable vector is not the run's: names the field that differs

Three kinds, never mixed. A bug is none of them: it propagates and the process exits non-zero.
"""

from __future__ import annotations

import enum


class HivetrainError(Exception):
    """Anything that this project raises on purpose."""


class Fault(enum.Enum):
    """What a peer did wrong, as it is written into manifests and scores."""

    ABSENT = "absent"  # did not connect or did not send before the deadline
    LATE = "late"  # sent, but after the deadline
    TRUNCATED = "truncated"  # sent fewer bytes than the layout names
    OVERSIZED = "oversized"  # sent or declared more bytes than the layout names
    MALFORMED = "malformed"  # bytes that do not parse as the message they claim to be
    WRONG_SCHEMA = "wrong_schema"  # another model, recipe, round or layout
    NOT_FINITE = "not_finite"  # NaN or infinity
    OUT_OF_BOUND = "out_of_bound"  # finite, but past the recipe's bound
    NOT_COMMITTED = "not_committed"  # bytes that the signed root does not cover
    BAD_SIGNATURE = "bad_signature"  # a signature that does not verify, or of somebody else
    IMPOSTOR = "impostor"  # the libp2p peer is not the one whose hotkey the group names
    WRONG_AVERAGE = "wrong_average"  # a reducer returned something else than the mean
    WRONG_REPLAY = "wrong_replay"  # recomputation did not give what the receipt says
    REFUSED = "refused"  # asked for something it committed to, and would not show it
    DOUBLE_COMMIT = "double_commit"  # two receipts for one round


class PeerFault(HivetrainError):
    """A peer's fault. Raised inside an adapter, caught at its edge and recorded as a value.

    Args:
        fault: what kind.
        detail: expected and actual values, in words.
    """

    def __init__(self, fault: Fault, detail: str) -> None:
        super().__init__(f"{fault.value}: {detail}")
        self.fault = fault
        self.detail = detail


class ServiceError(HivetrainError):
    """A service that we depend on did not answer rightly. Never costs a miner."""


class ChainError(ServiceError):
    """The chain is unreachable, or refused a call."""


class HubError(ServiceError):
    """The model hub is unreachable, or refused a request."""


class HubConflict(HubError):
    """Somebody else published this epoch first."""


class HubNotFound(HubError):
    """No such repo, revision or file."""


class DataError(ServiceError):
    """Training data cannot be read as the index says."""


class IntegrityError(ServiceError):
    """Bytes that were read do not have the published sha256."""


class ConfigError(HivetrainError):
    """A user's setting cannot work. The message holds expected, actual and the fix."""


class RecipeError(ConfigError):
    """`run.toml` is unreadable or holds an impossible value."""


class SchemaMismatch(RecipeError):
    """Our trainable vector differs from the run's; the message names the field."""
