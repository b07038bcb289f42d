"""`python -m holdfast.keeper`: serves for the supervisor; all other actions are for the CLI.

They print one JSON object: what was done, or {"error", "why"} with exit code 1,
and where the system refused something {"errno", "file"} too.
Interrupted, they take back what they have made and print nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import getpass
import json
import os
import resource
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from holdfast.errors import HoldfastError, HostError, InvalidInput
from holdfast.hwtpm.transport import Transport
from holdfast.keeper import backup
from holdfast.keeper.archive import ARCHIVE_MAX
from holdfast.keeper.boot_state import boot_state
from holdfast.keeper.leases import DESCRIPTORS, LEASES_MAX
from holdfast.keeper.provision import DEFAULT_PCRS, Site, authorize, provision
from holdfast.keeper.service import PEERS_MAX, Keeper, log
from holdfast.keeper.signing import sign_recovery
from holdfast.keeper.sole import claim
from holdfast.keeper.succession import succeed
from holdfast.linux import channel, process
from holdfast.linux.secret import Kind, SecretMemory
from holdfast.sandbox import keeper as sandbox
from holdfast.tpm2.constants import PCR_COUNT

INTERRUPTED: Final = 130
AUTH_MAX: Final = 32  # bytes in an owner authorization value
VALUES_MAX: Final = 65_536  # bytes in a file of PCR values
_OTHER_DESCRIPTORS: Final = 64


def main(arguments: list[str]) -> int:
    options = _parse(arguments)
    # Every one of these processes has a key of the host's, or its recovery key, for a while.
    process.limit(resource.RLIMIT_CORE, 0)
    process.set_dumpable(False)
    actions: Mapping[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
        "provision": _provision, "authorize": _authorize, "boot-state": _boot_state,
        "succeed": _succeed,
        "sign-recovery": _sign_recovery, "write-archive": _write_archive,
        "read-archive": _read_archive,
    }  # fmt: skip
    try:
        if options.action == "serve":
            return _serve(options)
        signal.signal(signal.SIGINT, _interrupted)
        result = actions[options.action](options)
        if getattr(options, "uid", 0):
            _give_away(options.dir, options.uid, options.gid)
    except KeyboardInterrupt:
        return INTERRUPTED
    except (HoldfastError, OSError) as error:
        told: dict[str, Any] = {"error": type(error).__name__, "why": str(error)}
        if isinstance(error, OSError) and error.errno:
            told |= {"errno": error.errno, "file": error.filename}
        print(json.dumps(told, default=str))
        return 1
    print(json.dumps(result))
    return 0


def _interrupted(*_: object) -> None:
    """Once: whoever interrupts again does not interrupt the taking back."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise KeyboardInterrupt


def _provision(options: argparse.Namespace) -> dict[str, Any]:
    if options.recovery_recipient is None:
        raise InvalidInput(
            "a recovery recipient is needed: an age or ssh public key, or a file with one"
        )
    site = Site(
        options.site, _numbers(options.pcrs), options.crl, options.stand_in,
        _auth(options.owner_auth),
    )  # fmt: skip
    return provision(
        options.dir, options.tcti, options.recovery_recipient, options.out, site,
        show=options.print_recovery_key,
    )  # fmt: skip


def _authorize(options: argparse.Namespace) -> dict[str, Any]:
    return authorize(
        options.dir, options.tcti, options.identity, options.recovery_file,
        retire=options.retire, values=_values(options.values), other_pcrs=options.other_pcrs,
    )  # fmt: skip


def _succeed(options: argparse.Namespace) -> dict[str, Any]:
    return succeed(
        options.dir, options.tcti, options.identity, options.recovery_file,
        options.site_root_key, options.recovery_recipient, options.out,
    )  # fmt: skip


def _boot_state(options: argparse.Namespace) -> dict[str, Any]:
    return boot_state(options.dir, options.tcti)


def _sign_recovery(options: argparse.Namespace) -> dict[str, Any]:
    return sign_recovery(
        options.dir, options.link, options.reason, options.identity, options.recovery_file
    )


def _write_archive(options: argparse.Namespace) -> dict[str, Any]:
    given = sys.stdin.buffer.read(2 * ARCHIVE_MAX)
    return backup.write(options.dir, options.out, options.recipient, given)


def _read_archive(options: argparse.Namespace) -> dict[str, Any]:
    names = (options.name or []) if options.states else None
    return backup.read(options.file, options.identity, names)


def _serve(options: argparse.Namespace) -> int:
    process.set_name("holdfast-keeper")
    sole = claim(options.tcti)
    transport = None
    try:
        transport = Transport(options.tcti)  # a device is opened while we still may
    except HostError as error:
        log(str(error))
    if transport is not None and not transport.bounded:
        raise InvalidInput(
            f"the keeper serves with device:… or swtpm:path=…, not {options.tcti}: it has no "
            "network, starts no process, and must not wait for ever"
        )
    listener = channel.listen(options.socket, 0o600)
    _raise_descriptor_limit()
    memory = SecretMemory()  # a call that the sandbox does not allow
    if memory.kind is not Kind.MEMFD_SECRET:
        log(f"the root key will be in {memory.kind.value}, {memory.why_not}")
    for what in sandbox.enter(options.uid, options.gid):
        log(what)
    keeper = Keeper(listener, options.dir, options.tcti, memory, transport)
    signal.signal(signal.SIGTERM, lambda *_: keeper.stop())
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    keeper.run()
    sole.close()
    with contextlib.suppress(OSError):
        options.socket.unlink()
    return 0


def _raise_descriptor_limit() -> None:
    """Room for every lease there can be, or for as many as the system allows."""
    wanted = DESCRIPTORS * LEASES_MAX + PEERS_MAX + _OTHER_DESCRIPTORS
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError:
        raise InvalidInput(f"{text!a} is not a list of PCRs such as 0,2,4,7") from None


def _auth(path: Path | None) -> bytes:
    """An authorization value from a file, so that it is in no argument list; - is standard input,
    where a terminal asks without showing it."""
    if path is None:
        return b""
    if str(path) != "-":
        with path.open("rb") as file:
            value = file.read(AUTH_MAX + 2)
    elif sys.stdin.isatty():
        value = getpass.getpass("Owner authorization of the host TPM: ").encode()
    else:
        value = sys.stdin.buffer.read(AUTH_MAX + 2)
    value = value.rstrip(b"\n")
    if len(value) > AUTH_MAX:
        raise InvalidInput(f"an authorization value has at most {AUTH_MAX} bytes")
    return value


def _values(path: Path | None) -> Mapping[int, bytes] | None:
    """PCR values from a JSON file: {"0": "hex", …}, SHA-256."""
    if path is None:
        return None
    try:
        with path.open("rb") as file:
            given = json.loads(file.read(VALUES_MAX))
        values = {int(pcr): bytes.fromhex(text) for pcr, text in given.items()}
    except (ValueError, AttributeError, TypeError):
        values = {}
    known = set(values) <= set(range(PCR_COUNT))
    if not values or not known or {len(value) for value in values.values()} != {32}:
        raise InvalidInput(f'{path} does not hold SHA-256 PCR values as {{"0": "hex", …}}')
    return values


def _give_away(directory: Path, uid: int, gid: int) -> None:
    for path in (directory, *directory.iterdir()):
        os.chown(path, uid, gid)


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="holdfast-keeper", description=__doc__)
    actions = parser.add_subparsers(dest="action", required=True)
    place = argparse.ArgumentParser(add_help=False)
    place.add_argument("--dir", type=Path, required=True)
    common = argparse.ArgumentParser(add_help=False, parents=[place])
    common.add_argument("--tcti", required=True)
    common.add_argument("--uid", type=int, default=0)
    common.add_argument("--gid", type=int, default=0)
    made = actions.add_parser("provision", parents=[common])
    made.add_argument("--recovery-recipient")
    made.add_argument("--out", type=Path, required=True)
    made.add_argument("--pcrs", default=",".join(map(str, DEFAULT_PCRS)))
    made.add_argument("--site", default="Holdfast site")
    made.add_argument("--crl", default="", help="URI of the host CA's revocation list")
    made.add_argument("--owner-auth", type=Path, help="file with the owner's value, or -")
    made.add_argument("--stand-in", action="store_true")
    made.add_argument("--print-recovery-key", action="store_true")
    allowed = actions.add_parser("authorize", parents=[common])
    allowed.add_argument("--identity", type=Path, required=True)
    allowed.add_argument("--recovery-file", type=Path, required=True)
    allowed.add_argument("--values", type=Path, help="JSON file with PCR values to approve")
    allowed.add_argument("--other-pcrs", action="store_true")
    allowed.add_argument("--retire", action="store_true")
    followed = actions.add_parser("succeed", parents=[common])
    followed.add_argument("--identity", type=Path, required=True)
    followed.add_argument("--recovery-file", type=Path, required=True)
    followed.add_argument("--site-root-key", type=Path, required=True)
    followed.add_argument("--recovery-recipient", required=True)
    followed.add_argument("--out", type=Path, required=True)
    signed = actions.add_parser("sign-recovery", parents=[place])
    signed.add_argument("--link", type=bytes.fromhex, required=True)
    signed.add_argument("--reason", required=True)
    signed.add_argument("--identity", type=Path, required=True)
    signed.add_argument("--recovery-file", type=Path, required=True)
    written = actions.add_parser("write-archive", parents=[place])
    written.add_argument("--out", type=Path, required=True)
    written.add_argument("--recipient", action="append", default=[])
    opened = actions.add_parser("read-archive")
    opened.add_argument("--file", type=Path, required=True)
    opened.add_argument("--identity", type=Path, required=True)
    opened.add_argument("--states", action="store_true", help="their ciphertext too")
    opened.add_argument("--name", action="append", help="only this vTPM's")
    actions.add_parser("boot-state", parents=[common])
    served = actions.add_parser("serve", parents=[common])
    served.add_argument("--socket", type=Path, required=True)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
