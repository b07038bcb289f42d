"""`backup`: the states of stopped vTPMs in a file that only a named key opens.

The file is written and read by a program of the keeper's (`keeper.backup`): no key comes here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from holdfast.cli import output
from holdfast.cli.given import ConfigFile, Json, must_be_root, quoted
from holdfast.cli.output import MARKS, progress, show
from holdfast.cli.programs import daemon_of, keeper, settings_of
from holdfast.cli.state import Reason, tell_restored
from holdfast.client import Client, NoDaemon
from holdfast.errors import Conflict, HoldfastError, InvalidInput, exit_code

_OFF = "off"


class _Named(TyperGroup):
    """`backup web` is `backup create web`; a vTPM that is called as a command needs the latter."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in {*self.commands, "--help"}:
            args = ["create", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=_Named, no_args_is_help=True,
    help="Backups of stopped vTPMs: holdfast backup NAME... --out FILE, or --all.",
)  # fmt: skip
File = Annotated[Path, typer.Argument(metavar="FILE", help="The archive.")]
Identity = Annotated[Path, typer.Option(help="age or ssh private key of a recipient.")]


@app.command("create")
def create(
    out: Annotated[Path, typer.Option(help="The file to write; there must be none.")],
    names: Annotated[
        list[str] | None, typer.Argument(metavar="NAME...", help="vTPMs that are off.")
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="All that are off.")] = False,
    recipient: Annotated[
        list[str] | None,
        typer.Option(
            help="age1… or ssh-… public key, or a file with one, that can open it; may be "
            "repeated. Without one: that of init."
        ),
    ] = None,
    config: ConfigFile = None,
    as_json: Json = False,
) -> None:
    """Write the states of vTPMs that are off to an archive, encrypted."""
    must_be_root("backup")
    if bool(names) == everything:
        raise InvalidInput("which vTPMs? either their names, or --all")
    if out.exists():
        raise Conflict(f"{out} exists: nothing was written")
    settings = settings_of(config)
    client = daemon_of(config)
    wanted, left = _all(client) if everything else (names or [], [])
    with progress("backing up"):
        lines = [
            json.dumps(client.call("POST", f"/v1/vtpms/{quoted(name)}/backups", {}))
            for name in wanted
        ]
        command = ["write-archive", f"--dir={settings['keeper']}", f"--out={out}"]
        command += [f"--recipient={text}" for text in recipient or ()]
        value = keeper(command, "\n".join(lines).encode())
    value["left_out"] = left

    def human(value: dict[str, Any]) -> None:
        told = ", ".join(f"{v['name']} (epoch {v['epoch']})" for v in value["vtpms"]) or "no vTPM"
        output.line(f"{value['file']}: {told}", MARKS["ok"])
        output.line(f"opens with the key of: {', '.join(value['recipients'])}")
        output.line(f"SHA-256 {value['sha256']}")

    show(value, as_json, human)
    if left:
        raise Conflict(f"{out} is written, without those that are not off: {', '.join(left)}")


def _all(client: Client) -> tuple[list[str], list[str]]:
    """Names of vTPMs that are off, and of others; a TPM that is passed through has no state."""
    vtpms = [
        client.call("GET", f"/v1/vtpms/{quoted(v['name'])}")
        for v in client.call("GET", "/v1/vtpms")["vtpms"]
    ]
    ours = [v for v in vtpms if v["mode"] == "vtpm"]
    return (
        [v["name"] for v in ours if v["state"] == _OFF],
        [v["name"] for v in ours if v["state"] != _OFF],
    )


@app.command("ls")
def ls(file: File, identity: Identity, as_json: Json = False) -> None:
    """Show what is in an archive; it needs no daemon, and no host."""
    value = keeper(["read-archive", f"--file={file}", f"--identity={identity}"])

    def human(value: dict[str, Any]) -> None:
        output.line(f"of {value['host']} ({value['site']}), {value['created']}")
        rows = [(v["name"], v["id"], str(v["epoch"]), v["created"]) for v in value["vtpms"]]
        output.table(("VTPM", "BACKUP", "EPOCH", "CREATED"), rows)

    show(value, as_json, human)


@app.command("restore")
def restore(
    file: File,
    identity: Identity,
    reason: Reason,
    names: Annotated[
        list[str] | None, typer.Argument(metavar="NAME...", help="Only these vTPMs.")
    ] = None,
    config: ConfigFile = None,
    as_json: Json = False,
) -> None:
    """Set vTPMs of this host that are off back to an archive, as snapshot restore does.

    One that cannot be set back is told, and stays as it is; the others are set back.
    """
    must_be_root("backup restore")
    command = ["read-archive", "--states", f"--file={file}", f"--identity={identity}"]
    archive = keeper(command + [f"--name={name}" for name in names or ()])
    restored: list[dict[str, Any]] = []
    left: dict[str, HoldfastError] = {}
    client = daemon_of(config)
    for each in archive["vtpms"]:
        name = each.pop("name")
        body = {**each, "reason": reason}
        try:
            restored.append(client.call("POST", f"/v1/vtpms/{quoted(name)}/restore", body))
        except HoldfastError as error:
            if isinstance(error, NoDaemon) and not restored:
                raise
            left[name] = error  # others can be set back all the same
    told = {name: str(error) for name, error in left.items()}
    if left and not restored:
        first = next(iter(left.values()))
        raise type(first)("; ".join(f"{name}: {why}" for name, why in told.items()))

    def human(value: dict[str, Any]) -> None:
        for each in restored:
            tell_restored(each)
        for name, why in value["left"].items():
            output.line(f"{name} is as it was: {why}", MARKS["problem"])

    show({"restored": restored, "left": told}, as_json, human)
    if left:
        raise typer.Exit(exit_code(next(iter(left.values()))))
