"""The container state that a runtime gives a hook on its standard input.

Duty: decode it (OCI runtime specification 1.0, "State"), strictly and bounded. Not here: reading
standard input, and acting on it. Rule: imports nothing slow, for every container start waits here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from holdfast.errors import DecodeError

STATE_MAX: Final = 1 << 20
PID_MAX: Final = 1 << 22  # PID_MAX_LIMIT of 64-bit Linux
_PATH_MAX: Final = 4096
_WHAT: Final = "container state"
_ID: Final = re.compile(r"[A-Za-z0-9_+,.-]{1,1024}")  # what runc accepts
_STATUS: Final = frozenset({"creating", "created", "running", "stopped"})


@dataclass(frozen=True)
class ContainerState:
    """A container as its runtime describes it; `pid` is 0 where no process is left."""

    id: str
    status: str
    pid: int
    bundle: str
    annotations: Mapping[str, str]


def parse_state(data: bytes) -> ContainerState:
    """Read the state, or raise DecodeError.

    Refused: more than STATE_MAX bytes, anything but one UTF-8 JSON object, duplicate keys, and
    what `checked_state` refuses.
    """
    if len(data) > STATE_MAX:
        raise DecodeError(_WHAT, f"more than {STATE_MAX} bytes")
    try:
        value = json.loads(data.decode(), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise DecodeError(_WHAT, str(error)) from None
    return checked_state(value)


def checked_state(value: object) -> ContainerState:
    """The state in a JSON value that was read already, or DecodeError.

    Refused: anything but an object, an id that runc would refuse, a process number out of range or
    missing where one has to be, a bundle that is no absolute path, annotations that are not
    strings.
    """
    if not isinstance(value, dict):
        raise DecodeError(_WHAT, "is not an object")
    container, bundle = value.get("id"), value.get("bundle")
    if not isinstance(container, str) or not _ID.fullmatch(container) or container in (".", ".."):
        raise DecodeError(_WHAT, "id is not a container's")
    if not isinstance(bundle, str) or not _is_path(bundle):
        raise DecodeError(_WHAT, "bundle is not an absolute path")
    status = value.get("status")
    if not isinstance(status, str) or status not in _STATUS:
        raise DecodeError(_WHAT, "status is none that the specification names")
    pid = value.get("pid", 0)
    if type(pid) is not int or not 0 <= pid <= PID_MAX or (pid == 0 and status != "stopped"):
        raise DecodeError(_WHAT, "pid is not a process's")
    return ContainerState(container, status, pid, bundle, _annotations(value))


def _annotations(value: Mapping[str, Any]) -> dict[str, str]:
    annotations = value.get("annotations")
    if annotations is None:
        return {}
    if not isinstance(annotations, dict) or not all(
        isinstance(text, str) for text in annotations.values()
    ):
        raise DecodeError(_WHAT, "annotations are not strings")
    return annotations


def _is_path(text: str) -> bool:
    return text.startswith("/") and len(text) <= _PATH_MAX and text.isprintable()


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key occurs twice in one object")
    return result
