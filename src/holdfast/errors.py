"""One tree of errors, split by whose fault it is.

    HoldfastError
    ├── PeerError             the other side's bytes or behaviour
    │   ├── DecodeError       bytes that are not what they claim to be
    │   └── ProtocolError     well-formed, but not allowed now or not for this peer
    ├── CallerError           what the caller asked for cannot be
    │   ├── InvalidInput      a name, option or file that is not acceptable
    │   ├── NotFound          no such instance, file or event
    │   ├── Conflict          not in this state, or already in use
    │   └── Forbidden         not for this caller
    ├── TpmError              a TPM answered with a response code
    ├── IntegrityError        sealed, signed or logged data is not what it was
    │   └── AppraisalError    evidence does not satisfy the policy
    └── HostError             the host lacks, or refuses, something we need

Errors carry facts; words for people and colours are added where the program ends.
Failures of the operating system stay OSError.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final


class HoldfastError(Exception):
    """Base of every error this package raises on purpose."""


class PeerError(HoldfastError):
    """The other side sent something it should not have."""


class DecodeError(PeerError):
    """Bytes do not follow their format: `what` was being read, `why` it failed."""

    def __init__(self, what: str, why: str) -> None:
        super().__init__(f"{what}: {why}")
        self.what = what
        self.why = why


class ProtocolError(PeerError):
    """A message is well-formed but not allowed here or now."""


class CallerError(HoldfastError):
    """What the caller asked for cannot be done as asked."""


class InvalidInput(CallerError):
    """A name, option, file or policy that is not acceptable."""


class NotFound(CallerError):
    """There is no such thing."""


class Conflict(CallerError):
    """Not in this state, or in use by somebody else."""


class Forbidden(CallerError):
    """The caller may not do this."""


class TpmError(HoldfastError):
    """A TPM answered `command` with response code `rc` (TPM 2.0 Part 2, 6.6)."""

    def __init__(self, rc: int, command: str) -> None:
        super().__init__(f"{command} failed with TPM response code 0x{rc:x}")
        self.rc = rc
        self.command = command


class IntegrityError(HoldfastError):
    """Sealed, signed or logged data is not what it was when it was made."""


class AppraisalError(IntegrityError):
    """Evidence fails appraisal: `step` is the first step that does not hold, `why` the reason."""

    def __init__(self, step: str, why: str) -> None:
        super().__init__(f"{step}: {why}")
        self.step = step
        self.why = why


class HostError(HoldfastError):
    """The host lacks something we need: what it is, and what to do about it."""


EXIT_CODES: Final[Mapping[type[HoldfastError], int]] = {
    InvalidInput: 2,
    NotFound: 3,
    Conflict: 4,
    Forbidden: 5,
    HostError: 6,
    IntegrityError: 7,
    DecodeError: 7,
}


# Those that are made of a text alone, as a text is all that another process tells of an error.
_OF_A_TEXT: Final[Mapping[str, type[HoldfastError]]] = {
    kind.__name__: kind
    for kind in (
        HoldfastError, PeerError, ProtocolError, CallerError, InvalidInput, NotFound, Conflict,
        Forbidden, IntegrityError, HostError,
    )
}  # fmt: skip


def by_name(name: str, why: str) -> HoldfastError:
    """The error that another process of ours has named; HostError for what is not of a text."""
    return _OF_A_TEXT.get(name, HostError)(why)


def exit_code(error: Exception) -> int:
    """How a program of ours ends for this error."""
    return next((code for kind, code in EXIT_CODES.items() if isinstance(error, kind)), 1)
