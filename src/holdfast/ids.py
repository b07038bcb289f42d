"""Names and identifiers: what an instance may be called, and how it is told from all others.

Not here: looking an instance up (that is `instance`).
"""

from __future__ import annotations

import re
from typing import Final, NewType
from uuid import RFC_4122, UUID

from holdfast.errors import InvalidInput

NAME_MAX: Final = 63
# The grammar of CDI device names (CDI specification, "device name"), so that one name serves both.
_NAME: Final = re.compile(r"[A-Za-z0-9]([A-Za-z0-9_.:-]*[A-Za-z0-9])?")

InstanceName = NewType("InstanceName", str)
InstanceId = NewType("InstanceId", UUID)


def instance_name(text: str, what: str = "an instance name") -> InstanceName:
    """Check a name given by a person; raise InvalidInput with what is wrong with it."""
    if len(text) > NAME_MAX:
        raise InvalidInput(f"{what} has at most {NAME_MAX} characters, not {len(text)}")
    if not _NAME.fullmatch(text) or ".." in text:
        raise InvalidInput(
            f"{text!a} is not {what}: it starts and ends with a letter or "
            "digit, has letters, digits and _ . : - between, and no two dots in a row"
        )
    return InstanceName(text)


def instance_id(text: str) -> InstanceId:
    """Read an instance id (RFC 9562 UUID in its canonical form)."""
    try:
        uuid = UUID(text)
    except ValueError:
        raise InvalidInput(f"{text!a} is not an instance id (a UUID)") from None
    if str(uuid) != text or uuid.variant != RFC_4122:
        raise InvalidInput(f"{text!a} is not a UUID in canonical form")
    return InstanceId(uuid)
