"""What one appraisal leaves for the next, as text: so that nothing goes back unseen between them.

Not here: the comparison (`verifier`), and where the text is kept (its caller's).
"""

from __future__ import annotations

import json
from typing import Any, Final

from holdfast.appraise.result import Progress
from holdfast.errors import DecodeError, InvalidInput
from holdfast.ids import instance_id
from holdfast.tpm2.structures import ClockInfo

_WHAT: Final = "progress"
_VERSION: Final = 2
_CLOCK: Final = {"clock": int, "reset_count": int, "restart_count": int, "safe": bool}
_MEMBERS: Final = {
    "version": int,
    "instance": str,
    "lineage": int,
    "epoch": int,
    "run": int,
    "vtpm_clock": dict,
    "host_ak_name": str,
    "host_clock": dict,
    "log_events": int,
    "log_head": str,
}
_MAP_MEMBERS: Final = {"index_name": str, "sequence": int, "unclean": int, "recoveries": int}


def encode(progress: Progress) -> str:
    """JSON, with a version."""
    value = {
        "version": _VERSION,
        "instance": str(progress.instance),
        "lineage": progress.lineage,
        "epoch": progress.epoch,
        "run": progress.run,
        "vtpm_clock": _from_clock(progress.vtpm_clock),
        "host_ak_name": progress.host_ak_name.hex(),
        "host_clock": _from_clock(progress.host_clock),
        "log_events": progress.log_events,
        "log_head": progress.log_head.hex(),
        "index_name": progress.index_name.hex(),
        "sequence": progress.sequence,
        "unclean": progress.unclean,
        "recoveries": progress.recoveries,
    }
    return json.dumps(value, indent=2) + "\n"


def decode(text: str) -> Progress:
    """The progress that `encode` wrote, or its first version; DecodeError for anything else."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DecodeError(_WHAT, f"is not JSON: {error}") from None
    if isinstance(value, dict) and value.get("version") == 1:  # knew nothing of the host's map
        _check(value, _MEMBERS, "it")
        value |= {"version": _VERSION, "index_name": "", "sequence": 0, "unclean": 0}
        value["recoveries"] = 0
    _check(value, _MEMBERS | _MAP_MEMBERS, "it")
    if value["version"] != _VERSION:
        raise DecodeError(_WHAT, f"has version {value['version']}, not {_VERSION}")
    try:
        instance = instance_id(value["instance"])
        ak, head, index = (
            bytes.fromhex(value[name]) for name in ("host_ak_name", "log_head", "index_name")
        )
    except (InvalidInput, ValueError) as error:
        raise DecodeError(_WHAT, str(error)) from None
    return Progress(
        instance, value["lineage"], value["epoch"], value["run"],
        _to_clock(value["vtpm_clock"]), ak, _to_clock(value["host_clock"]),
        value["log_events"], head,
        index, value["sequence"], value["unclean"], value["recoveries"],
    )  # fmt: skip


def _from_clock(clock: ClockInfo) -> dict[str, Any]:
    return {name: getattr(clock, name) for name in _CLOCK}


def _to_clock(value: Any) -> ClockInfo:
    _check(value, _CLOCK, "a clock of it")
    return ClockInfo(**value)


def _check(value: Any, members: dict[str, type], what: str) -> None:
    if not isinstance(value, dict) or set(value) != set(members):
        raise DecodeError(_WHAT, f"{what} has not the members {', '.join(members)}")
    for name, kind in members.items():
        if type(value[name]) is not kind or (kind is int and value[name] < 0):
            raise DecodeError(_WHAT, f"its {name} is not what it should be")
