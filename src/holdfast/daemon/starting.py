"""What happens between a container's creation and its vTPM's power-on: everything is measured.

In order: configuration and image are measured, through the runtime's own pre-exec init; the start
policy judges them, and the hooks after ours; provider, configuration, image and identity become
events; with the host's log they are the run. Runs in a thread.

Not here: whether the host's log leads to the host TPM's PCRs is looked at before (`host`).
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import subprocess
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, Final

import holdfast
from holdfast.client import DEFAULT_SOCKET, ENVIRONMENT
from holdfast.daemon.config import Config
from holdfast.errors import Conflict, DecodeError, HostError, InvalidInput
from holdfast.eventlog import tcg2
from holdfast.eventlog.cel import decode_json
from holdfast.eventlog.ima import not_measured_record
from holdfast.eventlog.records import Record, make_record
from holdfast.eventlog.replay import PcrValues, first_difference, pcr_values
from holdfast.eventlog.tcg2 import Tcg2Log
from holdfast.frontend import cdi
from holdfast.frontend.nodes import DEVICES, Number
from holdfast.ids import InstanceName
from holdfast.instance.run import Run, host_extends
from holdfast.linux.opening import open_in_root
from holdfast.linux.process import boot_id
from holdfast.measure.cache import FileTreeCache
from holdfast.measure.config import CONFIG_MAX, ConfigFacts, Hook, config_facts, hooks_after
from holdfast.measure.events import (
    Measurement,
    ProviderFacts,
    config_content,
    identity_content,
    image_contents,
    provider_content,
    provider_facts,
)
from holdfast.measure.rootfs import image_facts, rootfs_path
from holdfast.protocol.oci_state import ContainerState
from holdfast.store.registry import Instance
from holdfast.tpm2.algorithms import HASH_NAMES, Alg
from holdfast.tpm2.constants import HOST_PCRS

LIBTPMS: Final = "libtpms.so.0"
_FIND: Final = """
import ctypes, sys
print(ctypes.CDLL(sys.argv[1]).TPMLIB_GetVersion())
print(next(m.split(None, 5)[5].strip() for m in open("/proc/self/maps") if "/libtpms.so" in m))
"""
_FIND_SECONDS: Final = 10.0
_POLICY_KEYS: Final = frozenset({"any", "config", "layers", "hooks", "restore"})


class HostLog:
    """The host's event log, read anew for each start: it may have grown."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._parsed: tuple[bytes, Tcg2Log] | None = None

    def read(self) -> tuple[bytes, Tcg2Log]:
        """The log's bytes and events; HostError if there is none."""
        try:
            data = self._path.read_bytes()
        except OSError as error:
            raise HostError(
                f"the host's event log {self._path} cannot be read ({error.strerror}): linked "
                "vTPMs need it; host.event_log names another place"
            ) from None
        parsed = self._parsed  # by any thread: one value, replaced as a whole
        if parsed is None or parsed[0] != data:
            try:
                parsed = self._parsed = data, tcg2.parse(data)
            except DecodeError as error:
                raise HostError(f"the host's event log {self._path} is none: {error.why}") from None
        return parsed

    def bank_names(self) -> tuple[str, ...]:
        return tuple(HASH_NAMES[alg] for alg in self.read()[1].algorithms)

    def contradiction(self, shown: PcrValues) -> str | None:
        """Where the log does not lead to the PCRs that the host TPM shows: PCR and event."""
        log = self.read()[1]
        differs = first_difference(shown, pcr_values(log), HOST_PCRS)
        if differs is None:
            return None
        number = int(differs.split()[1])
        last = next((e for e in reversed(log.extends()) if e.pcr == number), None)
        event = f"its last event there is {last.type_name}" if last else "it has no event there"
        return f"{differs} of the host TPM is not what the event log leads to; {event}"


def run_again(container: str, pid: int, log: bytes, records: str, banks: Sequence[Alg]) -> Run:
    """A run as it was saved: the same log, the same records."""
    host = (log, tcg2.parse(log)) if log else None
    return _run(container, pid, host, decode_json(records), banks)


def relayed_run(state: ContainerState, numbers: Sequence[Number]) -> Run:
    """A run of a TPM that is passed through: it speaks for itself, so nothing is measured."""
    process = os.open(f"/proc/{state.pid}", os.O_RDONLY | os.O_DIRECTORY)
    try:
        if numbers:
            facts = _config_of(state, numbers)
            check_nodes(process, rootfs_path(state.bundle, facts.rootfs), numbers)
    finally:
        os.close(process)
    return replace(plain_run(), container=state.id, init_pid=state.pid)


def _config_of(state: ContainerState, numbers: Sequence[Number]) -> ConfigFacts:
    text = _read_regular(Path(state.bundle) / "config.json", CONFIG_MAX + 1)
    return config_facts(text, state.id, numbers)


def plain_run() -> Run:
    """A run of a vTPM that is linked to nothing."""
    return Run("", 0, 0, b"", 0, (), ())


def measured_run(
    record: Instance,
    banks: Sequence[Alg],
    state: ContainerState,
    config: Config,
    log: HostLog,
    numbers: Sequence[Number],
) -> Run:
    """Measure the container; Conflict if the start policy does not allow it.

    `numbers`: of the device nodes that it is to have, if it is to have any.
    """
    process = os.open(f"/proc/{state.pid}", os.O_RDONLY | os.O_DIRECTORY)
    try:
        facts = _config_of(state, numbers)
        check_nodes(process, rootfs_path(state.bundle, facts.rootfs), numbers)
        ours = our_hook(container_edits(record.name, config))
        later = [hook.path for hook in hooks_after(facts.hooks, ours)]
        image = image_facts(
            process,
            rootfs_path(state.bundle, facts.rootfs),
            facts,
            state.id,
            _tree_cache(config.paths.run / "internal" / "tree-cache.json"),
        )
    finally:
        os.close(process)
    images = image_contents(image)
    _judge(record, facts.normalised_digest.hex(), images, later)
    policy = hashlib.sha256(json.dumps(record.start_policy, sort_keys=True).encode()).digest()
    measurements = (
        provider_content(replace(provider(), policy=policy)),
        config_content(facts),
        *images,
        identity_content(record.id, state.id, record.name, record.run + 1, facts.raw_digest),
    )
    records: list[Record] = [not_measured_record(0, banks)]
    records += [
        make_record(number, m.content_type, m.content, banks)
        for number, m in enumerate(measurements, 1)
    ]
    host = None if record.unlinked else log.read()
    return _run(state.id, state.pid, host, tuple(records), banks)


def _run(
    container: str,
    pid: int,
    host: tuple[bytes, Tcg2Log] | None,
    records: tuple[Record, ...],
    banks: Sequence[Alg],
) -> Run:
    own = tuple((r.pcr, r.digests) for r in records)
    if host is None:
        return Run(container, pid, 0, b"", 0, own, records)
    log, parsed = host
    if parsed.startup_locality == 4:
        raise HostError("the host began with an H-CRTM sequence, which cannot be replayed")
    extends = (*host_extends(parsed, banks), *own)
    events = len(parsed.extends())
    return Run(container, pid, parsed.startup_locality, log, events, extends, records)


def check_policy(policy: Mapping[str, Any]) -> None:
    """InvalidInput unless a start policy says something we understand."""
    unknown = sorted(set(policy) - _POLICY_KEYS)
    if unknown:
        raise InvalidInput(f"a start policy has no {unknown[0]!a}")
    for key in ("config", "layers", "hooks"):
        value = policy.get(key, [])
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise InvalidInput(f"the start policy's {key} is a list of texts")
    for key in ("any", "restore"):
        if not isinstance(policy.get(key, False), bool):
            raise InvalidInput(f"the start policy's {key} is true or false")
    if not policy.get("any") and not policy.get("config") and not policy.get("layers"):
        raise InvalidInput('a start policy names configurations or layers, or says {"any": true}')


def _judge(
    record: Instance, config: str, images: Sequence[Measurement], later: Sequence[str]
) -> None:
    """The instance's start policy: which image or configuration may power it on."""
    policy: Mapping[str, Any] = record.start_policy or {"any": True}
    unnamed = [path for path in later if path not in policy.get("hooks", [])]
    if os.fspath(hook_path()) in unnamed:
        raise Conflict(f"a container has one vTPM: {record.name} is not its only one")
    if unnamed:
        raise Conflict(
            f"{unnamed[0]} is a hook that runs after this was measured: name it in the start "
            f"policy of {record.name}, or have it run before"
        )
    if policy.get("any"):
        return
    allowed = policy.get("config")
    if allowed and f"sha256:{config}" not in allowed:
        raise Conflict(
            f"the start policy of {record.name} does not allow this configuration (sha256:{config})"
        )
    layers = [str(m.content["digest"]) for m in images if m.content.get("part") == "layer"]
    if policy.get("layers") and layers != policy["layers"]:
        raise Conflict(
            f"the start policy of {record.name} does not allow this image "
            f"(layers {', '.join(layers)})"
        )


def check_nodes(process: int, rootfs: str, numbers: Sequence[Number]) -> None:
    """Conflict unless the container's devices are its vTPM's: a runtime may put the host's there.

    That is what it does for a container in a user namespace, which may make no device nodes.
    `process` is an open /proc/PID.
    """
    if not numbers:
        return
    root = os.open("root", os.O_PATH | os.O_DIRECTORY, dir_fd=process)
    try:
        for device, number in zip(DEVICES, numbers, strict=True):
            found = open_in_root(root, os.fsencode(f"{rootfs}/dev/{device}"), os.O_PATH)
            try:
                status = os.fstat(found)
            finally:
                os.close(found)
            there = Number(os.major(status.st_rdev), os.minor(status.st_rdev))
            if not stat.S_ISCHR(status.st_mode) or there != number:
                raise Conflict(
                    f"/dev/{device} of the container is not the device of its vTPM: its bundle was "
                    "made for an earlier run, or it is in a user namespace and has no nodes of its "
                    "own, for which make the vTPM with --devices fuse"
                )
    finally:
        os.close(root)


def container_edits(name: InstanceName, config: Config, numbers: Sequence[Number] = ()) -> cdi.Json:
    """What a container that gets this vTPM is given, by CDI or in its bundle.

    Our hooks are told where the API is, if need be: a runtime gives them no environment of ours.
    """
    api = config.paths.api
    told = () if api == DEFAULT_SOCKET else (f"{ENVIRONMENT}={api}",)
    return cdi.container_edits(name, config.paths.vtpm(name), hook_path(), told, numbers)


def our_hook(edits: cdi.Json) -> Hook:
    """The first hook of such edits: the one that measures."""
    hook = edits["hooks"][0]
    return Hook(hook["hookName"], hook["path"], tuple(hook["args"]), tuple(hook.get("env", ())))


def _read_regular(path: Path, size: int) -> bytes:
    """Up to `size` bytes of a file that is one: another kind might keep us waiting."""
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise InvalidInput(f"{path} is not a regular file")
        return file.read(size)


def hook_path() -> Path:
    """The hook executable, where this interpreter's packages have their programs."""
    return Path(sysconfig.get_path("scripts")) / "holdfast-hook"


@cache
def _tree_cache(path: Path) -> FileTreeCache:
    return FileTreeCache(path, str(boot_id()))


@cache
def provider() -> ProviderFacts:
    """What provides vTPMs: our source, libtpms, Python, under no policy yet.

    Read once for a daemon's life, at its start, when it is what runs.
    """
    path, version = _library()
    return provider_facts(Path(holdfast.__file__).parent, path, version, b"")


def _library() -> tuple[Path, str]:
    """The file that the dynamic linker finds under libtpms' name, and its version.

    Asked of a process of its own: this one never has the library.
    """
    done = subprocess.run(
        [sys.executable, "-I", "-c", _FIND, LIBTPMS],
        capture_output=True, text=True, timeout=_FIND_SECONDS, check=False,
    )  # fmt: skip
    if done.returncode != 0:
        raise HostError(f"{LIBTPMS} is not installed (Debian: apt install libtpms0)")
    version, path = done.stdout.splitlines()
    number = int(version)
    return Path(path), f"{number >> 16}.{number >> 8 & 0xFF}.{number & 0xFF}"
