"""`rekey`: other keys for a host that goes on running."""

from __future__ import annotations

import time
from typing import Annotated, Any, Final

import typer

from holdfast.cli import output
from holdfast.cli.given import Json, must_be_root
from holdfast.cli.output import MARKS, counted, show
from holdfast.client import Client

LOOK_SECONDS: Final = 0.1
STATES_LEFT: Final = 7  # exit code: some state does not open
_PATH: Final = "/v1/rekey"


def rekey(
    root: Annotated[bool, typer.Option("--root", help="Another root key.")] = False,
    data: Annotated[
        bool, typer.Option("--data", help="Another data key for each vTPM and each snapshot.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Change keys, of a host that goes on running; without an option, root key and data keys.

    Who has an old one opens nothing that is written from now on. Backups that were made before open
    nowhere any more. If it is interrupted, run it again.
    """
    must_be_root("rekey")
    everything = not (root or data)
    value = Client().call("POST", _PATH, {"root": root or everything, "data": data or everything})
    with counted("changing keys") as told:
        while not value["done"]:
            time.sleep(LOOK_SECONDS)
            value = Client().call("GET", _PATH)
            told(value["vtpms"], value["of"])
    show(value, as_json, _tell)
    if value["left"]:
        raise typer.Exit(STATES_LEFT)


def _tell(value: dict[str, Any]) -> None:
    keys = " and ".join({"root": "root key", "data": "data keys"}[part] for part in value["keys"])
    output.line(f"{keys} changed, of {value['vtpms']} vTPMs", MARKS["ok"])
    output.line("Backups that were made before open nowhere any more: make others.")
    for name, why in value["left"].items():
        output.line(f"{name} has its data key as before: {why}", MARKS["problem"])
    if not value["anchored"]:
        output.line(
            "The day's budget of durable anchors is used up: until the next one, after a power "
            "cut, an older disk would be taken for the newest.",
            MARKS["warning"],
        )
