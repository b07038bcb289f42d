"""`rekey`: other keys for a host that goes on running.

The recovery keys, old and new, and the site root's are read and written by a program of the
keeper's (`keeper.succession`): no key comes here.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from holdfast.cli import output
from holdfast.cli.given import ConfigFile, Json, must_be_root
from holdfast.cli.output import MARKS, counted, progress, show
from holdfast.cli.programs import daemon_of, keeper, keeper_user, settings_of
from holdfast.client import NoDaemon
from holdfast.errors import HostError, InvalidInput

LOOK_SECONDS: Final = 0.1
STATES_LEFT: Final = 7  # exit code: some state does not open
_PATH: Final = "/v1/rekey"
_KEYS: Final = {"recovery": "recovery key", "root": "root key", "data": "data keys"}


def rekey(
    root: Annotated[bool, typer.Option("--root", help="Another root key.")] = False,
    data: Annotated[
        bool, typer.Option("--data", help="Another data key for each vTPM and each snapshot.")
    ] = False,
    recovery: Annotated[
        bool,
        typer.Option("--recovery", help="Another recovery key: needs the five options below."),
    ] = False,
    identity: Annotated[
        Path | None, typer.Option(help="age or ssh private key that opens both present files.")
    ] = None,
    recovery_file: Annotated[
        Path | None, typer.Option(help="The present recovery.age, as init wrote it.")
    ] = None,
    site_root_key: Annotated[
        Path | None, typer.Option(help="The present site-root-ca.key.age, as init wrote it.")
    ] = None,
    recovery_recipient: Annotated[
        str, typer.Option(help="age1… or ssh-… public key, or a file with one, for the new files.")
    ] = "",
    out: Annotated[
        Path | None, typer.Option(help="Directory for the new files; not that of the old ones.")
    ] = None,
    config: ConfigFile = None,
    as_json: Json = False,
) -> None:
    """Change keys, of a host that goes on running; without an option, root key and data keys.

    Who has an old one opens nothing that is written from now on. Backups that were made before open
    nowhere any more. If it is interrupted, run it again.
    """
    must_be_root("rekey")
    written: dict[str, Any] = {}
    if recovery:
        if not (identity and recovery_file and site_root_key and recovery_recipient and out):
            raise InvalidInput(
                "--recovery needs --identity, --recovery-file, --site-root-key, "
                "--recovery-recipient and --out"
            )
        files = identity, recovery_file, site_root_key, out
        written = _prepared(files, recovery_recipient, config)
    elif identity or recovery_file or site_root_key or recovery_recipient or out:
        raise InvalidInput("files and keys are named for --recovery: add that, or leave them out")
    if not (root or data or recovery):
        root = data = True
    value = _changed({"recovery": recovery, "root": root, "data": data}, config) | written
    show(value, as_json, _tell)
    if value["left"]:
        raise typer.Exit(STATES_LEFT)


def _prepared(
    files: tuple[Path, Path, Path, Path], recipient: str, config: Path | None
) -> dict[str, Any]:
    """Have what the new recovery key signs made; the new files, if they are written now."""
    identity, recovery_file, site_root_key, out = files
    settings = settings_of(config)
    uid, gid = keeper_user(settings["keeper_user"])
    with progress("making keys in the host TPM"):
        value = keeper(
            [
                "succeed", f"--dir={settings['keeper']}", f"--tcti={settings['tcti']}",
                f"--identity={identity}", f"--recovery-file={recovery_file}",
                f"--site-root-key={site_root_key}", f"--recovery-recipient={recipient}",
                f"--out={out}", f"--uid={uid}", f"--gid={gid}",
            ]
        )  # fmt: skip
    return {name: value[name] for name in ("recovery_key", "site_root_key") if name in value}


def _changed(parts: dict[str, bool], config: Path | None) -> dict[str, Any]:
    client = daemon_of(config)
    try:
        value: dict[str, Any] = client.call("POST", _PATH, parts)
    except NoDaemon:
        if not parts["recovery"]:
            raise
        raise HostError(
            "the new recovery key is prepared, and not yet in force: start holdfast serve, then "
            "run this again"
        ) from None
    with counted("changing keys") as told:
        while not value["done"]:
            time.sleep(LOOK_SECONDS)
            value = client.call("GET", _PATH)
            told(value["vtpms"], value["of"])
    return value


def _tell(value: dict[str, Any]) -> None:
    keys = " and ".join(_KEYS[part] for part in value["keys"])
    output.line(f"changed: {keys}", MARKS["ok"])
    if "recovery" in value["keys"]:
        for name in ("recovery_key", "site_root_key"):
            if name in value:
                output.line(f"{name.replace('_', ' ')} (encrypted): {value[name]}")
        output.line("The old recovery key is of no use any more. Move the new files off this host.")
        output.line("Verifiers begin a new progress file: this host's index is another.")
    if "root" in value["keys"] or "data" in value["keys"]:
        output.line(f"{value['vtpms']} vTPMs have other keys")
        output.line("Backups that were made before open nowhere any more: make others.")
    for name, why in value["left"].items():
        output.line(f"{name} has its data key as before: {why}", MARKS["problem"])
    if not value["anchored"]:
        output.line(
            "The day's budget of durable anchors is used up: until the next one, after a power "
            "cut, an older disk would be taken for the newest.",
            MARKS["warning"],
        )
