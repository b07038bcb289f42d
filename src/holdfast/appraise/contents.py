"""What a container's own events say, as values: provider, configuration, image, identity, files.

Reads records whose digests are those of their content (`logs` has checked that), strictly by the
versions of their types; DecodeError names the event. The shapes are those of `measure.events` and
docs/measuring.md.

Not here: whether a TPM has signed them (`logs`), whether they are what the policy wants
(`reference`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from holdfast.errors import DecodeError, InvalidInput
from holdfast.eventlog.ima import BOOT_AGGREGATE, NOT_MEASURED, TEMPLATE_NG, Entry, entry_of
from holdfast.eventlog.records import CONFIG, IDENTITY, IMA, IMAGE, PROVIDER, Record
from holdfast.ids import InstanceId, InstanceName, instance_id, instance_name

TREE_FORMAT: Final = "holdfast.tree/1"
LAYERS_MAX: Final = 512
TEXT_MAX: Final = 4096
_DIGEST_SIZE: Final = 71  # sha256: and 64 digits
_CLAIMS: Final = ("source", "image_id", "manifest_digest", "reference")


def event_name(record: Record) -> str:
    """How an event of the container's log is called in errors."""
    return f"event {record.recnum} ({record.content_type})"


@dataclass(frozen=True)
class Provider:
    """PCR 11: what provides the vTPM from this event on."""

    event: str
    package: str
    libtpms: str
    libtpms_version: str
    python: str
    policy: str


@dataclass(frozen=True)
class Image:
    """PCR 13: layers from the bottom; `upper` is empty, none or a digest; `claimed` unverified.

    `events` names the event of each: what is claimed, the layers, the writable layer.
    """

    events: tuple[str, ...]
    kind: str
    layers: tuple[str, ...]
    upper: str
    claimed: Mapping[str, str]


@dataclass(frozen=True)
class ContainerIdentity:
    """PCR 15: whose vTPM, in which run, of which container."""

    event: str
    instance: InstanceId
    name: InstanceName
    container: str
    run: int
    config: str


@dataclass(frozen=True)
class Contents:
    """Everything a container's log says. `files` is None if execution is not measured."""

    provider: tuple[Provider, ...]
    config: str
    config_event: str
    image: Image
    identity: ContainerIdentity
    boot_aggregate: bytes | None
    files: tuple[tuple[str, Entry], ...] | None


def read_contents(records: Iterable[Record]) -> Contents:
    """Sort records by their type; DecodeError if one is missing, stands twice, or is misshapen."""
    by_type: dict[str, list[Record]] = {
        kind: [] for kind in (PROVIDER, CONFIG, IMAGE, IDENTITY, IMA)
    }
    for record in records:
        if record.content_type not in by_type:
            raise DecodeError(event_name(record), "is not of a type that a container's log has")
        by_type[record.content_type].append(record)
    if not by_type[PROVIDER]:
        raise DecodeError("container log", f"has no {PROVIDER}")
    config = _only(by_type[CONFIG], CONFIG)
    aggregate, files = _executed(by_type[IMA])
    return Contents(
        tuple(_provider(record) for record in by_type[PROVIDER]),
        _digest(_members(config, {"normalised"}), "normalised", config),
        event_name(config),
        _image(by_type[IMAGE]),
        _identity(_only(by_type[IDENTITY], IDENTITY)),
        aggregate,
        files,
    )


def _only(records: list[Record], kind: str) -> Record:
    if len(records) != 1:
        raise DecodeError("container log", f"has {len(records)} events {kind}, not one")
    return records[0]


def _members(record: Record, names: set[str]) -> Mapping[str, Any]:
    if set(record.content) != names:
        raise DecodeError(event_name(record), f"its members are not {', '.join(sorted(names))}")
    return record.content


def _text(content: Mapping[str, Any], name: str, record: Record) -> str:
    value = content[name]
    if not isinstance(value, str) or not 0 < len(value) <= TEXT_MAX:
        raise DecodeError(event_name(record), f"{name} is not a text")
    return value


def _digest(content: Mapping[str, Any], name: str, record: Record) -> str:
    value = _text(content, name, record)
    if len(value) != _DIGEST_SIZE or not value.startswith("sha256:"):
        raise DecodeError(event_name(record), f"{name} is not a sha256: digest")
    return value


def _provider(record: Record) -> Provider:
    content = _members(record, {"package", "libtpms", "python", "policy"})
    package, libtpms = content["package"], content["libtpms"]
    if not isinstance(package, dict) or set(package) != {"format", "digest"}:
        raise DecodeError(event_name(record), "package is not a format and a digest")
    if package["format"] != TREE_FORMAT:
        raise DecodeError(event_name(record), "package is digested in a format we do not know")
    if not isinstance(libtpms, dict) or set(libtpms) != {"path", "version", "digest"}:
        raise DecodeError(event_name(record), "libtpms is not a path, a version and a digest")
    return Provider(
        event_name(record),
        _digest(package, "digest", record),
        _digest(libtpms, "digest", record),
        _text(libtpms, "version", record),
        _text(content, "python", record),
        _digest(content, "policy", record),
    )


def _image(records: list[Record]) -> Image:
    """What is claimed, then each layer from the bottom, then the writable layer; nothing else."""
    if len(records) < 3 or len(records) > LAYERS_MAX + 2:
        raise DecodeError("container log", f"has {len(records)} events {IMAGE}")
    first, *between, last = records
    claim = _members(first, {"part", "kind", "claimed"})
    if claim["part"] != "claimed" or claim["kind"] not in ("overlay", "plain"):
        raise DecodeError(event_name(first), "is not an image's first event")
    layers = []
    for index, record in enumerate(between):
        content = _members(record, {"part", "index", "format", "digest"})
        if content["part"] != "layer" or content["index"] != index or _is_bool(content["index"]):
            raise DecodeError(event_name(record), f"is not layer {index} of the image")
        if content["format"] != TREE_FORMAT:
            raise DecodeError(event_name(record), "is digested in a format we do not know")
        layers.append(_digest(content, "digest", record))
    content = _members(last, {"part", "format", "digest"})
    if content["part"] != "upper" or content["format"] != TREE_FORMAT:
        raise DecodeError(event_name(last), "is not an image's last event")
    upper = content["digest"]
    if upper is None:
        upper = "none"
    elif upper != "empty":
        upper = _digest(content, "digest", last)
    return Image(
        tuple(map(event_name, records)), claim["kind"], tuple(layers), upper,
        _claimed(claim["claimed"], first),
    )  # fmt: skip


def _is_bool(value: object) -> bool:
    """JSON's true is not the number 1."""
    return isinstance(value, bool)


def _claimed(value: object, record: Record) -> Mapping[str, str]:
    if value is None:
        return {}
    if not isinstance(value, dict) or set(value) != set(_CLAIMS):
        raise DecodeError(event_name(record), f"claimed is not {', '.join(_CLAIMS)}")
    return {name: _text(value, name, record) for name in _CLAIMS if value[name] is not None}


def _identity(record: Record) -> ContainerIdentity:
    content = _members(record, {"instance", "container", "name", "run", "config"})
    run = content["run"]
    if not isinstance(run, int) or _is_bool(run) or run < 0:
        raise DecodeError(event_name(record), "run is not a number")
    try:
        instance = instance_id(_text(content, "instance", record))
        name = instance_name(_text(content, "name", record))
    except InvalidInput as error:
        raise DecodeError(event_name(record), str(error)) from None
    return ContainerIdentity(
        event_name(record), instance, name, _text(content, "container", record), run,
        _digest(content, "config", record),
    )  # fmt: skip


def _executed(records: list[Record]) -> tuple[bytes | None, tuple[tuple[str, Entry], ...] | None]:
    """(boot aggregate, files) if execution is measured, else (None, None). The first event says."""
    if not records:
        raise DecodeError("container log", "PCR 10 has no event: zero never means clean")
    entries = [(event_name(record), entry_of(record)) for record in records]
    event, first = entries[0]
    if first.template_name != TEMPLATE_NG or first.algorithm != "sha256":
        raise DecodeError(event, "does not say whether execution is measured")
    if first.path == NOT_MEASURED and first.file_digest == bytes(32):
        if len(entries) > 1:
            raise DecodeError(entries[1][0], "is a file, after execution was not measured")
        return None, None
    if first.path != BOOT_AGGREGATE:
        raise DecodeError(event, "does not say whether execution is measured")
    return first.file_digest, tuple(entries[1:])
