"""Commands about a vTPM's state: snapshots, which keep it or bring it back, and moves."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, Final
from urllib.parse import quote

import typer

from holdfast.cli import output
from holdfast.cli.given import Json, Name, quoted
from holdfast.cli.output import MARKS, show
from holdfast.client import Client
from holdfast.errors import HoldfastError
from holdfast.ids import instance_name

SnapshotName = Annotated[str, typer.Argument(metavar="SNAPSHOT", help="The snapshot's name.")]
Reason = Annotated[str, typer.Option(help="Why, for the journal: one line.")]


def create(
    name: Name,
    snapshot: Annotated[
        str, typer.Argument(metavar="SNAPSHOT", help="Its name; without one, the time.")
    ] = "",
    as_json: Json = False,
) -> None:
    """Take a snapshot of a vTPM that is off."""
    body = {"name": snapshot} if snapshot else {}
    value = Client().call("POST", f"/v1/vtpms/{quoted(name)}/snapshots", body)
    show(value, as_json, lambda v: output.line(_taken(v)))


def _taken(value: dict[str, Any]) -> str:
    return f"{value['vtpm']}: snapshot {value['name']}, epoch {value['epoch']}"


def ls(
    name: Annotated[str, typer.Argument(help="Only this vTPM's.")] = "", as_json: Json = False
) -> None:
    """List snapshots, the oldest first."""
    path = f"/v1/vtpms/{quoted(name)}/snapshots" if name else "/v1/snapshots"
    value = Client().call("GET", path)

    def human(value: dict[str, Any]) -> None:
        rows = [
            (s["vtpm"], s["name"], s["created"], str(s["epoch"]), str(s["bytes"]))
            for s in value["snapshots"]
        ]
        output.table(("VTPM", "SNAPSHOT", "CREATED", "EPOCH", "SIZE"), rows)

    show(value, as_json, human)


def restore(name: Name, snapshot: SnapshotName, reason: Reason, as_json: Json = False) -> None:
    """Set a vTPM that is off back to a snapshot. Every later attestation shows that it was.

    It goes on as the next epoch, with a higher lineage; newer snapshots stay.
    """
    path = f"/v1/vtpms/{quoted(name)}/snapshots/{_quoted(snapshot)}/restore"
    value = Client().call("POST", path, {"reason": reason})
    show(value, as_json, tell_restored)


def tell_restored(value: dict[str, Any]) -> None:
    """Say what became of a vTPM that was set back."""
    epoch, lineage = value["epoch"], value["lineage"]
    output.line(
        f"{value['vtpm']}: set back to {value['snapshot']} of epoch {value['of_epoch']}; "
        f"epoch {epoch['is']}, was {epoch['was']}; lineage {lineage['is']}, was {lineage['was']}",
        MARKS["ok"],
    )
    output.line(f"Attestations show from now on, as lineage {lineage['is']}, that it was.")
    if not value["anchored"]:
        output.line(
            "The day's budget of durable anchors is used up: it is remembered durably with the "
            "next one; until then, after a power cut, an older disk would undo it unseen.",
            MARKS["warning"],
        )


def rm(
    name: Name,
    snapshots: Annotated[
        list[str], typer.Argument(metavar="SNAPSHOT...", help="Names of snapshots.")
    ],
    as_json: Json = False,
) -> None:
    """Remove snapshots: nobody can restore them any more."""
    removed: list[str] = []
    try:
        for snapshot in snapshots:
            path = f"/v1/vtpms/{quoted(name)}/snapshots/{_quoted(snapshot)}"
            Client().call("DELETE", path)
            removed.append(snapshot)
    except HoldfastError as error:
        done = f" (removed before: {', '.join(removed)})" if removed else ""
        raise type(error)(f"{snapshots[len(removed)]}: {error}{done}") from None
    value = {"vtpm": name, "removed": removed}
    show(value, as_json, lambda v: output.line(f"{name}: removed {', '.join(v['removed'])}"))


def _quoted(snapshot: str) -> str:
    return quote(instance_name(snapshot, "a snapshot's name"), safe="")


SNAPSHOTS: Final[Mapping[str, Callable[..., None]]] = {
    "create": create, "ls": ls, "restore": restore, "rm": rm,
}  # fmt: skip


def migrate_send(name: Name) -> None:
    """Refused, with the reason: a TPM that is passed through cannot move."""
    Client().call("POST", f"/v1/vtpms/{quoted(name)}/moves", {})
