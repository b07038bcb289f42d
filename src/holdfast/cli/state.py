"""Commands about a vTPM's state: what keeps it, moves it, or brings it back."""

from __future__ import annotations

from holdfast.cli.given import Name, quoted
from holdfast.client import Client


def snapshot_create(name: Name) -> None:
    """Refused, with the reason: of a TPM that is passed through there can be none."""
    Client().call("POST", f"/v1/vtpms/{quoted(name)}/snapshots", {})


def migrate_send(name: Name) -> None:
    """Refused, with the reason: a TPM that is passed through cannot move."""
    Client().call("POST", f"/v1/vtpms/{quoted(name)}/moves", {})
