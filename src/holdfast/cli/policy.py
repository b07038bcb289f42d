"""`policy authorize`: boot states of this host that its root key opens in."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from holdfast.cli import output
from holdfast.cli.given import ConfigFile, Json, must_be_root
from holdfast.cli.output import show
from holdfast.cli.programs import keeper, keeper_user, settings_of


def authorize(
    identity: Annotated[Path, typer.Option(help="age or ssh private key of the recipient.")],
    recovery_file: Annotated[Path, typer.Option(help="The recovery.age that init wrote.")],
    retire: Annotated[
        bool, typer.Option("--retire", help="Retire all boot states approved before.")
    ] = False,
    values: Annotated[
        Path | None,
        typer.Option(help="JSON file with PCRs to approve instead: of the next kernel, before it."),
    ] = None,
    other_pcrs: Annotated[
        bool,
        typer.Option(
            "--other-pcrs", help="The values may be of other PCRs than those approved before."
        ),
    ] = False,
    config: ConfigFile = None,
    as_json: Json = False,
) -> None:
    """Approve the host's present boot state, with the recovery key."""
    must_be_root("policy authorize")
    settings = settings_of(config)
    uid, gid = keeper_user(settings["keeper_user"])
    command = [
        "authorize", f"--dir={settings['keeper']}", f"--tcti={settings['tcti']}",
        f"--identity={identity}", f"--recovery-file={recovery_file}",
        f"--uid={uid}", f"--gid={gid}",
    ]  # fmt: skip
    command += [f"--values={values}"] if values else []
    command += ["--other-pcrs"] if other_pcrs else []
    made = keeper([*command, "--retire"] if retire else command)
    show(made, as_json, lambda v: output.line(f"approved, version {v['version']}"))
