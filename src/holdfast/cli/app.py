"""The command line as a whole: which commands there are, and how it ends.

`verify`, `policy create`, `policy predict` and `tpm` need neither daemon nor root; the rest goes
through the API, or to a program of ours.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Final, cast

import typer

from holdfast import __version__
from holdfast.cli import (
    backup,
    host,
    output,
    policy,
    predicting,
    recovering,
    rekeying,
    state,
    verifying,
    vtpms,
)
from holdfast.cli.given import Json
from holdfast.cli.output import failures, show
from holdfast.cli.tpm import run_command
from holdfast.errors import InvalidInput

app = typer.Typer(
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    help="A TPM 2.0 of its own for every Linux container, held fast to the host's TPM.",
)
policy_app = typer.Typer(no_args_is_help=True, help="Appraisal policies, and approved boot states.")
snapshot_app = typer.Typer(
    no_args_is_help=True, help="Snapshots of stopped vTPMs, kept on this host."
)
migrate_app = typer.Typer(no_args_is_help=True, help="Moves to another host: not in this version.")

_COMMANDS: Final[tuple[Callable[..., None], ...]] = (
    host.init, host.serve, host.status, host.doctor,
    vtpms.create, vtpms.clone, vtpms.start, vtpms.stop, vtpms.sleep, vtpms.retry, vtpms.rm,
    vtpms.ls, vtpms.inspect, vtpms.logs, vtpms.attest, vtpms.cdi, verifying.verify,
    recovering.recover, rekeying.rekey,
)  # fmt: skip
for _command in _COMMANDS:
    app.command()(_command)
app.add_typer(policy_app, name="policy")
policy_app.command("create")(verifying.create_policy)
policy_app.command("predict")(predicting.predict_boot)
policy_app.command()(policy.authorize)
app.add_typer(snapshot_app, name="snapshot")
for _name, _snapshots in state.SNAPSHOTS.items():
    snapshot_app.command(_name)(_snapshots)
app.add_typer(backup.app, name="backup")
app.add_typer(migrate_app, name="migrate")
migrate_app.command("send")(state.migrate_send)

# Typer has a click of its own, and exports of this error only the heir.
_UsageError: Final = cast(type[Exception], typer.BadParameter.__base__)


def run(arguments: list[str] | None = None) -> None:
    """Run the command line: whatever is wrong is one line, and the exit code tells its kind."""
    output.prepare()
    code = 0
    try:
        with failures():
            code = app(arguments, prog_name="holdfast", standalone_mode=False) or 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 1
    except _UsageError as error:
        code = _misused(error)
    output.leave(code)


def _misused(error: Any) -> int:
    """Say what of the command line is wrong; with nothing on it, help."""
    text, context = str(error.format_message()), error.ctx
    if type(error).__name__ == "NoArgsIsHelpError":
        error.show()
    else:
        command = context.command_path if context else "holdfast"
        output.say(f"{text.rstrip('.')}: see {command} --help")
    return 2


def _version_asked(asked: bool) -> None:
    if asked:
        version()
        raise typer.Exit


@app.callback()
def main(
    _version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_version_asked, is_eager=True, help="Show the version, and end."
        ),
    ] = False,
) -> None:
    pass


@app.command()
def version(as_json: Json = False) -> None:
    """Show the version."""
    show({"version": __version__}, as_json, lambda v: output.line(f"holdfast {v['version']}"))


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def tpm(
    context: typer.Context,
    state: Annotated[
        Path | None, typer.Option(help="Keep the TPM's state in this directory, unprotected.")
    ] = None,
    replay: Annotated[
        Path | None, typer.Option(help="A TCG2 event log to replay into it first.")
    ] = None,
) -> None:
    """Run a command with a TPM of its own: holdfast tpm -- tpm2_getrandom --hex 8

    The TPM is a plain one, in software, linked to nothing; it needs neither root nor daemon.
    """
    if not context.args:
        raise InvalidInput("which command? for example: holdfast tpm -- tpm2_getrandom --hex 8")
    raise typer.Exit(run_command(context.args, state, replay))
