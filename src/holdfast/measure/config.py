"""A container's configuration, normalised: the same for every run of the same command.

Duty: read config.json (OCI runtime specification) strictly, take out what a runtime makes up anew
for each run, and say which hooks run after ours. Not here: where the file comes from (`oci`), what
a policy allows (`instance`).

Rules: what cannot be understood exactly as the runtime understands it is refused (duplicate keys,
known keys in another case, which Go accepts as well); what is taken out is listed by name in the
tables below, everything else is measured, hooks included; the result is RFC 8785 JSON.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NoReturn

import rfc8785

from holdfast.errors import DecodeError, InvalidInput, NotFound

CONFIG_MAX: Final = 4 << 20
MOUNTS_MAX: Final = 1024
ID_MAPS_MAX: Final = 340  # as many as the kernel takes for one namespace
_WHAT: Final = "container configuration"
_SAFE_INTEGER: Final = 2**53 - 1

# What stands for a part that differs from run to run. A configuration that has one of these
# strings of its own is refused, so that no two configurations become one.
CONTAINER_ID: Final = "{container-id}"
SHORT_ID: Final = "{short-id}"
ROOTFS: Final = "{rootfs}"
ANONYMOUS: Final = "{anonymous-volume}"
NETWORK: Final = "{network-namespace}"
DEVICE: Final = "{vtpm-device}"
_PLACEHOLDERS: Final = (CONTAINER_ID, SHORT_ID, ROOTFS, ANONYMOUS, NETWORK, DEVICE)
# Ids that podman, CRI-O, containerd's CRI and Docker make up. One that a person chose is the same
# for every run, and might be a string as common as "a": it is left alone.
_GENERATED_ID: Final = re.compile(r"[0-9a-f]{64}")
_SHORT: Final = 12
_ANONYMOUS_VOLUME: Final = re.compile(r"/volumes/[0-9a-f]{64}/_data")
_NETWORK_NAMESPACE: Final = re.compile(
    r"/(?:var/)?run/(?:user/\d+/)?netns/(?:cni-|netns-)?[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"
)

# Annotations that say when or where a run took place, and that no runtime acts upon.
DROPPED_ANNOTATIONS: Final = frozenset(
    {
        "io.kubernetes.cri-o.Created",  # podman and CRI-O: the time
        "io.kubernetes.cri-o.IP.0",
        "io.kubernetes.cri-o.IP.1",
        "io.kubernetes.cri-o.LogPath",
        "io.kubernetes.cri-o.MountPoint",
        "io.kubernetes.cri-o.ResolvPath",
        "io.kubernetes.cri-o.SandboxID",
        "io.kubernetes.cri.sandbox-id",
        "io.kubernetes.cri.sandbox-uid",
        "io.kubernetes.pod.uid",
        "kubernetes.io/config.seen",
    }
)
# Lists that are sets: no runtime looks at their order. (section, key)
_SETS: Final = (
    ("process/capabilities", "ambient"),
    ("process/capabilities", "bounding"),
    ("process/capabilities", "effective"),
    ("process/capabilities", "inheritable"),
    ("process/capabilities", "permitted"),
    ("process/user", "additionalGids"),
    ("process", "rlimits"),
    ("linux", "maskedPaths"),
    ("linux", "namespaces"),
    ("linux", "readonlyPaths"),
    ("linux/seccomp", "architectures"),
)
# Keys we look into, by section: the same word in another case would be the same key to Go.
_KNOWN: Final[Mapping[str, frozenset[str]]] = {
    "": frozenset(
        {"annotations", "hooks", "hostname", "linux", "mounts", "ociVersion", "process", "root"}
    ),
    "process": frozenset({"capabilities", "consoleSize", "cwd", "env", "rlimits", "user"}),
    "process/capabilities": frozenset(
        {"ambient", "bounding", "effective", "inheritable", "permitted"}
    ),
    "process/user": frozenset({"additionalGids"}),
    "root": frozenset({"path", "readonly"}),
    "linux": frozenset(
        {"cgroupsPath", "gidMappings", "maskedPaths", "namespaces", "readonlyPaths", "seccomp"}
        | {"devices", "resources", "uidMappings"}
    ),
    "linux/seccomp": frozenset({"architectures"}),
    "linux/resources": frozenset({"devices"}),
    "hooks": frozenset(
        {"prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop"}
    ),
}
_KNOWN_MOUNT: Final = frozenset({"destination", "source", "type", "options"})
_KNOWN_DEVICE: Final[Mapping[str, type]] = {
    "type": str, "path": str, "access": str, "allow": bool, "major": int, "minor": int,
    "fileMode": int, "uid": int, "gid": int,
}  # fmt: skip
_TYPES: Final = {str: "a string", bool: "true or false", int: "a whole number"}
_KNOWN_HOOK: Final = frozenset({"path", "args", "env", "timeout"})
_KNOWN_NAMESPACE: Final = frozenset({"type", "path"})
_KNOWN_ID_MAP: Final = frozenset({"containerID", "hostID", "size"})

# The order in which runc 1.1 and crun run hooks before user code. `prestart`, though older, comes
# first: libcontainer runs both lists one after the other at the same place. `poststart` runs when
# the user's process already does.
STAGES: Final = ("prestart", "createRuntime", "createContainer", "startContainer")

Json = dict[str, Any]


@dataclass(frozen=True)
class Hook:
    """One hook of the configuration and the stage it runs in."""

    stage: str
    path: str
    args: tuple[str, ...]
    env: tuple[str, ...] = ()


@dataclass(frozen=True)
class IdMap:
    """How ids of the container's user namespace are ids of the host; empty for no namespace."""

    ranges: tuple[tuple[int, int, int], ...] = ()  # (container, host, size)

    def host(self, number: int) -> int | None:
        """The id on the host, or None where the container cannot have it."""
        if not self.ranges:
            return number
        for inside, outside, size in self.ranges:
            if inside <= number < inside + size:
                return outside + number - inside
        return None


@dataclass(frozen=True)
class Provision:
    """What the runtime itself makes in a fresh root file system: mount points, by whose ids."""

    mountpoints: frozenset[bytes] = frozenset()  # relative to the root, normalised
    uids: IdMap = IdMap()
    gids: IdMap = IdMap()


@dataclass(frozen=True)
class ConfigFacts:
    """A configuration: as it arrived, as it is measured, and what else follows from it."""

    raw_digest: bytes
    normalised: bytes
    normalised_digest: bytes
    rootfs: str
    annotations: Mapping[str, str]
    provision: Provision
    hooks: tuple[Hook, ...] = ()  # as `hooks` lists them


def config_facts(
    data: bytes, container_id: str, numbers: Sequence[tuple[int, int]] = ()
) -> ConfigFacts:
    """Everything measured of config.json; DecodeError or InvalidInput if it is not acceptable.

    `numbers`: major and minor of the vTPM's own device nodes, which the kernel makes up.
    """
    config = parse_config(data)
    normalised = _normalise(config, container_id, numbers)
    linux = _object(config, "linux")
    destinations = [_text(mount, "destination", "mount") for mount in _mounts(config)]
    destinations.append(_text(_object(config, "process"), "cwd", "process", "/"))
    return ConfigFacts(
        raw_digest=hashlib.sha256(data).digest(),
        normalised=normalised,
        normalised_digest=hashlib.sha256(normalised).digest(),
        rootfs=_text(_object(config, "root"), "path", "root"),
        annotations=_strings(config, "annotations"),
        provision=Provision(
            frozenset(b"/".join(parts) for parts in map(_parts, destinations) if parts),
            _id_map(linux, "uidMappings"),
            _id_map(linux, "gidMappings"),
        ),
        hooks=hooks(config),
    )


def parse_config(data: bytes) -> Json:
    """Read config.json, or raise DecodeError.

    Refused: more than CONFIG_MAX bytes, anything but UTF-8 JSON (RFC 8259) with an object at its
    top, duplicate keys, numbers with a fraction or exponent, lone surrogates, known keys written
    in another case.
    """
    if len(data) > CONFIG_MAX:
        raise DecodeError(_WHAT, f"more than {CONFIG_MAX} bytes")
    try:
        text = data.decode()
        value = json.loads(
            text,
            object_pairs_hook=_unique,
            parse_float=_refuse_number,
            parse_constant=_refuse_number,
        )
        rfc8785.dumps(_canonical_numbers(value))
    except RecursionError:
        raise DecodeError(_WHAT, "nested too deeply") from None
    except ValueError as error:
        raise DecodeError(_WHAT, str(error)) from None
    if not isinstance(value, dict):
        raise DecodeError(_WHAT, "is not an object")
    _check_spelling(value)
    return value


def hooks(config: Json) -> tuple[Hook, ...]:
    """The hooks before user code, in the order in which they run."""
    found = []
    lists = _object(config, "hooks")
    for stage in STAGES:
        for hook in _objects(lists, stage, "hooks"):
            _check_keys(hook, _KNOWN_HOOK, "a hook")
            args, env = (_hook_strings(hook, name) for name in ("args", "env"))
            found.append(Hook(stage, _text(hook, "path", "hook"), args, env))
    return tuple(found)


def _hook_strings(hook: Json, name: str) -> tuple[str, ...]:
    value = hook.get(name) or []
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise DecodeError(_WHAT, f"a hook's {name} are not a list of strings")
    return tuple(value)


def hooks_after(ordered: Sequence[Hook], ours: Hook) -> Sequence[Hook]:
    """Every hook that runs between the first run of ours and user code; NotFound without ours.

    Ours is so with its arguments and environment: with others it does something else. A second run
    of ours is among those after it: it too comes after what was measured.
    """
    for index, hook in enumerate(ordered):
        if hook == ours:
            return ordered[index + 1 :]
    raise NotFound(
        f"no {ours.stage} hook of the configuration is exactly {ours.path!a} with the arguments "
        f"{list(ours.args)} and the environment {list(ours.env)}: take it as holdfast cdi shows it"
    )


def _normalise(config: Json, container_id: str, numbers: Sequence[tuple[int, int]]) -> bytes:
    text = json.dumps(config, ensure_ascii=False)
    for placeholder in _PLACEHOLDERS:
        if placeholder in text:
            raise InvalidInput(f"the configuration contains {placeholder}, which stands for itself")
    result = _canonical_numbers(config)
    if _GENERATED_ID.fullmatch(container_id):
        result = _substituted(result, container_id)
    _normalise_process(_object(result, "process"))
    _normalise_linux(_object(result, "linux"), numbers)
    annotations = _strings(result, "annotations")
    if annotations:
        result["annotations"] = {
            name: value for name, value in annotations.items() if name not in DROPPED_ANNOTATIONS
        }
    root = _object(result, "root")
    if root:
        root["path"] = ROOTFS
    mounts = _mounts(result)
    for mount in mounts:
        if isinstance(source := mount.get("source"), str):
            mount["source"] = _ANONYMOUS_VOLUME.sub(f"/volumes/{ANONYMOUS}/_data", source)
    if mounts:
        result["mounts"] = canonical_order(mounts)
    for path, key in _SETS:
        _sort(_section(result, path), key)
    return rfc8785.dumps(result)


def _normalise_process(process: Json) -> None:
    process.pop("consoleSize", None)  # the size of somebody's window
    env = process.get("env")
    if isinstance(env, list) and all(isinstance(item, str) for item in env):
        # By name, so that of two values of one name the later stays the later.
        process["env"] = sorted(env, key=lambda item: item.split("=", 1)[0].encode())


def _normalise_linux(linux: Json, numbers: Sequence[tuple[int, int]]) -> None:
    _normalise_devices(_objects(linux, "devices", "linux"), numbers)
    rules = _objects(_object(linux, "resources"), "devices", "linux.resources")
    _normalise_devices(rules, numbers)
    for namespace in _objects(linux, "namespaces", "linux"):
        _check_keys(namespace, _KNOWN_NAMESPACE, "a namespace")
        path = namespace.get("path")
        if namespace.get("type") == "network" and isinstance(path, str):
            namespace["path"] = _NETWORK_NAMESPACE.sub(NETWORK, path)


def _normalise_devices(devices: list[Json], numbers: Sequence[tuple[int, int]]) -> None:
    for device in devices:
        found = tuple(map(device.get, ("type", "major", "minor")))
        for index, number in enumerate(numbers):
            if found == ("c", *number):
                device.update(major=DEVICE, minor=index)


def canonical_order(mounts: list[Json]) -> list[Json]:
    """The mounts in the one order that stands for all orders of the same effect.

    A mount hides, or is made inside, another where one's destination is the other's or above it:
    those keep their order. All others commute, and podman lists them in a different order at every
    run: of those that may come next, the one with the smallest destination does.
    """
    keys = [_parts(_text(mount, "destination", "mount")) for mount in mounts]
    after: list[list[int]] = [[] for _ in mounts]  # those that a mount has to precede
    blocked = [0] * len(mounts)
    for later, key in enumerate(keys):
        for earlier in range(later):
            if _related(keys[earlier], key):
                after[earlier].append(later)
                blocked[later] += 1
    ready = [(key, index) for index, key in enumerate(keys) if not blocked[index]]
    heapq.heapify(ready)
    ordered = []
    while ready:
        _, index = heapq.heappop(ready)
        ordered.append(mounts[index])
        for later in after[index]:
            blocked[later] -= 1
            if not blocked[later]:
                heapq.heappush(ready, (keys[later], later))
    return ordered


def _related(one: tuple[bytes, ...], two: tuple[bytes, ...]) -> bool:
    shorter = min(len(one), len(two))
    return one[:shorter] == two[:shorter]


def _parts(path: str) -> tuple[bytes, ...]:
    """A path inside the container as its components, `.` and `..` resolved as in a chroot."""
    parts: list[bytes] = []
    for part in path.encode().split(b"/"):
        if part == b"..":
            del parts[-1:]
        elif part not in (b"", b"."):
            parts.append(part)
    return tuple(parts)


def _substituted(value: Any, container_id: str) -> Any:
    """The value with the id and its short form replaced in every string and key."""
    if isinstance(value, str):
        return value.replace(container_id, CONTAINER_ID).replace(container_id[:_SHORT], SHORT_ID)
    if isinstance(value, list):
        return [_substituted(item, container_id) for item in value]
    if isinstance(value, dict):
        return {
            _substituted(name, container_id): _substituted(item, container_id)
            for name, item in value.items()
        }
    return value


def _canonical_numbers(value: Any) -> Any:
    """A copy in which integers that JSON cannot carry safely (RFC 7493, 2.2) are decimal strings.

    Runtimes refuse a string where they expect a number, so no other configuration looks the same.
    """
    if isinstance(value, dict):
        return {name: _canonical_numbers(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_canonical_numbers(item) for item in value]
    if isinstance(value, int) and not -_SAFE_INTEGER <= value <= _SAFE_INTEGER:
        return str(value)
    return value


def _sort(section: Json, key: str) -> None:
    value = section.get(key)
    if isinstance(value, list):
        section[key] = sorted(value, key=rfc8785.dumps)


def _unique(pairs: Iterable[tuple[str, Any]]) -> Json:
    result: Json = {}
    for name, value in pairs:
        if name in result:
            raise ValueError(f"the key {name!a} occurs twice in one object")
        name.encode()  # a lone surrogate is a ValueError
        result[name] = value
    return result


def _refuse_number(text: str) -> NoReturn:
    raise ValueError(f"{text[:40]} is not an integer")


def _check_spelling(config: Json) -> None:
    for path, known in _KNOWN.items():
        _check_keys(_section(config, path), known, path or "the top")
    for mount in _mounts(config):
        _check_keys(mount, _KNOWN_MOUNT, "a mount")
    hooks(config)
    linux = _object(config, "linux")
    rules = _objects(_object(linux, "resources"), "devices", "linux.resources")
    for device in (*_objects(linux, "devices", "linux"), *rules):
        _check_device(device)


def _check_device(device: Json) -> None:
    """A device or a rule whose parts are of their types; crun takes `true` for any number."""
    _check_keys(device, frozenset(_KNOWN_DEVICE), "a device")
    for name, kind in _KNOWN_DEVICE.items():
        value = device.get(name)
        if value is not None and type(value) is not kind:
            raise DecodeError(_WHAT, f"{name} of a device is not {_TYPES[kind]}")


def _check_keys(section: Json, known: frozenset[str], where: str) -> None:
    folded = {name.casefold() for name in known}
    for name in section:
        if name not in known and name.casefold() in folded:
            raise DecodeError(_WHAT, f"{name!a} at {where} is a known key in another case")


def _section(config: Json, path: str) -> Json:
    section = config
    for name in path.split("/") if path else ():
        section = _object(section, name)
    return section


def _object(section: Json, key: str) -> Json:
    """An object inside another; absent and null are both empty, as for Go."""
    value = section.get(key)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise DecodeError(_WHAT, f"{key} is not an object")
    return value


def _objects(section: Json, key: str, where: str) -> list[Json]:
    value = section.get(key)
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise DecodeError(_WHAT, f"{key} of {where} is not a list of objects")
    return value


def _mounts(config: Json) -> list[Json]:
    mounts = _objects(config, "mounts", "the top")
    if len(mounts) > MOUNTS_MAX:
        raise DecodeError(_WHAT, f"more than {MOUNTS_MAX} mounts")
    return mounts


def _text(section: Json, key: str, where: str, default: str | None = None) -> str:
    value = section.get(key, default)
    if not isinstance(value, str) or not value or "\0" in value:
        raise DecodeError(_WHAT, f"{key} of {where} is not a string")
    return value


def _strings(section: Json, key: str) -> dict[str, str]:
    value = _object(section, key)
    if not all(isinstance(item, str) for item in value.values()):
        raise DecodeError(_WHAT, f"{key} has a value that is not a string")
    return value


def _id_map(linux: Json, key: str) -> IdMap:
    ranges = []
    entries = _objects(linux, key, "linux")
    if len(entries) > ID_MAPS_MAX:
        raise DecodeError(_WHAT, f"more than {ID_MAPS_MAX} {key}")
    for entry in entries:
        _check_keys(entry, _KNOWN_ID_MAP, key)
        numbers = tuple(entry.get(name, 0) for name in ("containerID", "hostID", "size"))
        if not all(type(number) is int and 0 <= number < 2**32 for number in numbers):
            raise DecodeError(_WHAT, f"{key} has a number out of range")
        ranges.append(numbers)
    return IdMap(tuple(ranges))
