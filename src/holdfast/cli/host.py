"""Commands about the host: set it up, run Holdfast on it, look at it.

Not here: what they do. Each is one call of the API, or one program of ours (`programs`).
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from holdfast.cli import output
from holdfast.cli.given import ConfigFile, Json, must_be_root
from holdfast.cli.output import MARKS, progress, show
from holdfast.cli.programs import (
    daemon_of,
    keeper,
    keeper_user,
    of_config,
    settings_of,
    user,
)
from holdfast.client import Client, NoDaemon


def init(
    recovery_recipient: Annotated[
        str, typer.Option(help="age1… or ssh-… public key, or a file with one: gets the keys.")
    ],
    out: Annotated[Path, typer.Option(help="Where the encrypted keys are written.")],
    config: ConfigFile = None,
    site: Annotated[str, typer.Option(help="The site's name, in every certificate.")] = (
        "Holdfast site"
    ),
    pcrs: Annotated[str, typer.Option(help="Host PCRs that make up the boot state.")] = "0,2,4,7",
    owner_auth: Annotated[
        Path | None,
        typer.Option(help="File with the host TPM's owner authorization value; - asks for it."),
    ] = None,
    crl: Annotated[
        str, typer.Option(help="Where the issuing CA's revocation list will be, for certificates.")
    ] = "",
    print_recovery_key: Annotated[
        bool, typer.Option("--print-recovery-key", help="Print it too, in hex, once.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Set this host up, once: keys in its TPM, a site root CA, a recovery key that leaves it.

    Move the written files off this host: recovery.age approves later boot states,
    site-root-ca.key.age certifies further hosts, site-root-ca.pem is what verifiers trust.
    """
    must_be_root("init")
    settings = settings_of(config)
    there = user(settings["keeper_user"]) is not None
    uid, gid = keeper_user(settings["keeper_user"], make=True)
    command = [
        "provision", f"--dir={settings['keeper']}", f"--tcti={settings['tcti']}",
        f"--recovery-recipient={recovery_recipient}", f"--out={out}", f"--pcrs={pcrs}",
        f"--site={site}", f"--uid={uid}", f"--gid={gid}",
    ]  # fmt: skip
    command += ["--stand-in"] if settings["stand_in"] else []
    command += [f"--owner-auth={owner_auth}"] if owner_auth else []
    command += [f"--crl={crl}"] if crl else []
    command += ["--print-recovery-key"] if print_recovery_key else []
    try:
        with progress("making keys in the host TPM"):
            made = keeper(command)
    except BaseException:
        if not there:
            subprocess.run(["userdel", settings["keeper_user"]], check=False)
        raise

    def human(value: dict[str, Any]) -> None:
        output.line("initialised", MARKS["ok"])
        output.line(f"recovery key (encrypted):   {value['recovery_key']}")
        output.line(f"site root key (encrypted):  {value['site_root_key']}")
        output.line(f"site root certificate:      {value['site_root_certificate']}")
        output.line(f"host AK name:               {value['host_ak_name']}")
        if print_recovery_key:
            output.line(f"recovery key (secret):      {value['recovery_key_hex']}")
        output.line("Move the encrypted files off this host. Then: holdfast serve")

    show(made, as_json, human)


def serve(config: ConfigFile = None) -> None:
    """Run Holdfast in the foreground: keeper, spawner and daemon."""
    must_be_root("serve")
    settings_of(config)  # what is wrong with it is said here, as by all other commands
    command = [sys.executable, "-P", "-m", "holdfast.daemon.supervisor"]
    command += ["--config", str(config)] if config else []
    os.execv(sys.executable, command)  # noqa: S606 - our own interpreter, our own module


def status(as_json: Json = False) -> None:
    """Show host, keeper, spawner, and how many vTPMs are in which state."""
    value = Client().call("GET", "/v1/status")

    def human(value: dict[str, Any]) -> None:
        for part in ("host", "keeper", "spawner"):
            found = value[part]
            output.line(f"{part}: {found['says']}", MARKS[found["level"]])
        counts = value["counts"]
        awake = f"{counts['awake']} awake, {counts['asleep']} asleep"
        output.line(f"vTPMs: {_counted(value['vtpms'])} ({awake})")
        output.line(
            f"since the daemon began: {counts['commits']} commits in {counts['groups']} groups, "
            f"{counts['syncs']} waits for the disk, {counts['wakes']} wakes, "
            f"{counts['restarts']} workers replaced, {counts['refusals']} calls refused"
        )
        output.line(
            f"durable anchors: {counts['anchors_used']} in the last day, {counts['anchors_left']} "
            f"left; {counts['unanchored']} commits are newer than the last"
        )
        if value["more"]:
            output.line(f"holdfast doctor has more: {', '.join(value['more'])}")

    show(value, as_json, human)
    _verdict(value)


def doctor(config: ConfigFile = None, as_json: Json = False) -> None:
    """Look for what this host lacks, and say it in plain words; all of it if a daemon runs."""
    try:
        value = daemon_of(config).call("GET", "/v1/doctor")
    except NoDaemon:
        value = of_config("ground", config)

    def human(value: dict[str, Any]) -> None:
        for finding in value["findings"]:
            mark = MARKS[finding["level"]]
            output.line(f"{finding['what']}: {finding['says']}", mark)
        if "vtpms" in value:
            output.line(f"vTPMs: {_counted(value['vtpms'])}")

    show(value, as_json, human)
    _verdict(value)


def _counted(states: dict[str, int]) -> str:
    return ", ".join(f"{count} {state}" for state, count in states.items()) or "none"


def _verdict(value: dict[str, Any]) -> None:
    if value["verdict"] == "problem":
        raise typer.Exit(6)
