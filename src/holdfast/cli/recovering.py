"""`recover`: what is wrong with states on disk, and the explicit ways on.

The recovery key is read by a program of the keeper's (`keeper.signing`): no key comes here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from holdfast.cli import output
from holdfast.cli.given import ConfigFile, Json, must_be_root
from holdfast.cli.output import MARKS, show
from holdfast.cli.programs import daemon_of, keeper, settings_of
from holdfast.client import Client
from holdfast.errors import Conflict, InvalidInput

TO_RECOVER = 7  # exit code: there is something


def recover(
    accept_older: Annotated[
        bool,
        typer.Option(
            "--accept-older",
            help="Accept all states as they are on disk, with the recovery key: needs --identity "
            "and --recovery-file.",
        ),
    ] = False,
    forget: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="Give up a row that is damaged, a vTPM whose state is gone, or by its id a state "
            "of no vTPM.",
        ),
    ] = "",
    reason: Annotated[str, typer.Option(help="Why, for the journal: one line.")] = "",
    identity: Annotated[
        Path | None, typer.Option(help="age or ssh private key of the recipient.")
    ] = None,
    recovery_file: Annotated[
        Path | None, typer.Option(help="The recovery.age that init wrote.")
    ] = None,
    config: ConfigFile = None,
    as_json: Json = False,
) -> None:
    """Say what of the states on disk cannot be used, and why; nothing is changed by that.

    With --accept-older they are accepted: every later attestation shows it. With --forget one is
    given up for good. Both are journalled with their reason.
    """
    must_be_root("recover")
    if accept_older and forget:
        raise InvalidInput("--accept-older and --forget are two things: one at a time")
    if (accept_older or forget) and not reason:
        raise InvalidInput("--reason is needed: it is journalled")
    client = daemon_of(config)
    if forget:
        body = {"name": forget, "reason": reason}
        value = client.call("POST", "/v1/recovery/forget", body)
        show(value, as_json, lambda v: output.line(f"{v['forgotten']} is given up", MARKS["ok"]))
    elif accept_older:
        if identity is None or recovery_file is None:
            raise InvalidInput("--accept-older needs --identity and --recovery-file")
        value = _accept(client, reason, (identity, recovery_file), config)
        show(value, as_json, _tell_accepted)
    else:
        value = client.call("GET", "/v1/recovery")
        show(value, as_json, _tell)
        if value["needed"]:
            raise typer.Exit(TO_RECOVER)


def _accept(
    client: Client, reason: str, key: tuple[Path, Path], config: Path | None
) -> dict[str, Any]:
    """`key`: an identity, and the recovery file that it opens."""
    identity, recovery_file = key
    found = client.call("GET", "/v1/recovery")
    if not found["link"]:
        raise Conflict("there is nothing to accept: what is on disk is the newest")
    settings = settings_of(config)
    signed = keeper(
        [
            "sign-recovery", f"--dir={settings['keeper']}", f"--link={found['link']}",
            f"--reason={reason}", f"--identity={identity}", f"--recovery-file={recovery_file}",
        ]
    )  # fmt: skip
    body = {"link": found["link"], "reason": reason, **signed}
    value: dict[str, Any] = client.call("POST", "/v1/recovery", body)
    return value


def _tell(value: dict[str, Any]) -> None:
    if not value["needed"]:
        output.line("there is nothing to recover", MARKS["ok"])
    if value["why"]:
        output.line(value["why"], MARKS["problem"])
    for each in value["vtpms"]:
        output.line(f"{each['name'] or each['id']}: {each['why']}", MARKS["problem"])
    if value["link"]:
        output.line(
            "Put back what was there last, if there is a copy: then nothing is lost. If there is "
            "none, what is there can be accepted. What was made or written after it is lost "
            "then, and archives that were made after it are of no use:"
        )
        output.line(
            "  holdfast recover --accept-older --reason WHY --identity KEY --recovery-file "
            "recovery.age"
        )


def _tell_accepted(value: dict[str, Any]) -> None:
    output.line("what is on disk is accepted as the newest", MARKS["ok"])
    if value["accepted"]:
        output.line(f"with another state than was written last: {', '.join(value['accepted'])}")
    output.line(f"Attestations show from now on that it was: recoveries {value['recoveries']}.")
