"""Commands about vTPMs: each is one call of the API."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from holdfast.cli import output
from holdfast.cli.given import ConfigFile, Json, Name, json_file, quoted, uid_of
from holdfast.cli.output import MARKS, progress, show
from holdfast.cli.programs import daemon_of, of_config
from holdfast.client import Client, NoDaemon
from holdfast.frontend.bundle import with_vtpm


def create(
    name: Name,
    profile: Annotated[str, typer.Option(help="linked (for a container) or plain.")] = "linked",
    owner: Annotated[str, typer.Option(help="User who may start, stop and attest it.")] = "",
    bank: Annotated[list[str] | None, typer.Option(help="PCR bank; may be repeated.")] = None,
    start_policy: Annotated[
        Path | None, typer.Option(help="JSON file: which image or configuration may start it.")
    ] = None,
    unsafe_unlinked: Annotated[
        bool,
        typer.Option(
            "--unsafe-unlinked", help="Start even if the host's event log cannot be replayed."
        ),
    ] = False,
    ports: Annotated[
        str,
        typer.Option(
            metavar="swtpm|mssim",
            help="Listen on 127.0.0.1:2321 and 2322 in the container's network, speaking this.",
        ),
    ] = "",
    devices: Annotated[
        str,
        typer.Option(
            metavar="auto|vtpm-proxy|cuse|fuse",
            help="What /dev/tpm0 and tpmrm0 are: device nodes where the kernel can, or files.",
        ),
    ] = "",
    mode: Annotated[
        str,
        typer.Option(metavar="vtpm|passthrough", help="A TPM of its own, or one of the host's."),
    ] = "vtpm",
    tpm: Annotated[
        str, typer.Option(metavar="DEVICE", help="The TPM that is passed through, as /dev/tpm1.")
    ] = "",
    as_json: Json = False,
) -> None:
    """Make a vTPM, and the CDI device a container is started with."""
    body: dict[str, Any] = {"name": name}
    if mode != "vtpm" or tpm:
        body |= {"mode": mode, "tpm": tpm}
    if profile != "linked" or not tpm:
        body["profile"] = profile
    if owner:
        body["owner"] = uid_of(owner)
    if bank:
        body["banks"] = bank
    if start_policy is not None:
        body["start_policy"] = json_file(start_policy)
    if unsafe_unlinked:
        body["unsafe_unlinked"] = True
    if ports:
        body["ports"] = ports
    if devices:
        body["devices"] = devices
    with progress(f"making {name}"):
        value = Client().call("POST", "/v1/vtpms", body)

    show(value, as_json, _made)


def _made(value: dict[str, Any]) -> None:
    """Say what was made, and how it is used."""
    output.line(f"{value['name']} ({value['id']})", MARKS["ok"])
    if value["profile"] == "linked" or value["tpm"]:
        output.line(f"podman run --device {value['device']} IMAGE")
    else:
        output.line(f"holdfast start {value['name']}; TPM2TOOLS_TCTI={value['tcti']}")


def clone(
    name: Annotated[str, typer.Argument(help="The vTPM whose settings are taken.")],
    new: Annotated[str, typer.Argument(help="The new vTPM's name.")],
    owner: Annotated[str, typer.Option(help="User who may start, stop and attest it.")] = "",
    as_json: Json = False,
) -> None:
    """Make a new vTPM with the settings of another: nothing of that one's state is copied.

    It has seeds, keys, certificates and an id of its own. There is no way to copy a TPM.
    """
    body: dict[str, Any] = {"name": new}
    if owner:
        body["owner"] = uid_of(owner)
    with progress(f"making {new}"):
        value = Client().call("POST", f"/v1/vtpms/{quoted(name)}/clones", body)

    def human(value: dict[str, Any]) -> None:
        _made(value)
        output.line(
            f"It is a new TPM, made as {value['settings_of']} was: none of that one's keys, NV or "
            "sealed data are in it."
        )

    show(value, as_json, human)


def start(name: Name, as_json: Json = False) -> None:
    """Power on a plain vTPM. A linked one is powered on by starting its container."""
    value = Client().call("POST", f"/v1/vtpms/{quoted(name)}/start", {})
    show(value, as_json, lambda v: output.line(f"TPM2TOOLS_TCTI={v['tcti']}"))


def stop(name: Name, as_json: Json = False) -> None:
    """Power a vTPM off, in order. Its container finds its device gone."""
    value = Client().call("POST", f"/v1/vtpms/{quoted(name)}/stop", {})
    show(value, as_json, lambda v: output.line(f"{v['name']} is {v['state']}"))


def sleep(name: Name, as_json: Json = False) -> None:
    """Put a vTPM that nobody uses to sleep now: its memory is free until somebody comes.

    Who has it open does not notice. vTPMs do so by themselves after a while.
    """
    value = Client().call("POST", f"/v1/vtpms/{quoted(name)}/sleep", {})
    show(value, as_json, lambda v: output.line(f"{v['name']} is {v['state']}"))


def retry(name: Name, as_json: Json = False) -> None:
    """Let a vTPM that failed be started again, its state untouched."""
    value = Client().call("POST", f"/v1/vtpms/{quoted(name)}/retry", {})
    show(value, as_json, lambda v: output.line(f"{v['name']} is {v['state']}"))


def rm(name: Name, as_json: Json = False) -> None:
    """Destroy a vTPM: its keys, its snapshots and everything sealed to it are gone for good."""
    value = Client().call("DELETE", f"/v1/vtpms/{quoted(name)}")

    def human(value: dict[str, Any]) -> None:
        count = value["snapshots"]
        with_it = f", and {count} snapshot{'s' * (count > 1)} with it" if count else ""
        output.line(f"{value['name']} is destroyed{with_it}")

    show(value, as_json, human)


def ls(as_json: Json = False) -> None:
    """List vTPMs."""
    value = Client().call("GET", "/v1/vtpms")

    def human(value: dict[str, Any]) -> None:
        rows = [
            (v["name"], v["state"], v["profile"], v["container"][:12], str(v["run"]),
             str(v["restarts"]), v["created"])
            for v in value["vtpms"]
        ]  # fmt: skip
        output.table(("NAME", "STATE", "PROFILE", "CONTAINER", "RUN", "RESTARTS", "CREATED"), rows)

    show(value, as_json, human)


def inspect(name: Name, config: ConfigFile = None) -> None:
    """Show everything about a vTPM, as JSON: also what is wrong with it, and what to do.

    While no daemon runs, root is shown what is on disk.
    """
    path = f"/v1/vtpms/{quoted(name)}"
    try:
        value = daemon_of(config).call("GET", path)
    except NoDaemon:
        if os.geteuid() != 0:
            raise
        value = of_config("instances", config, f"--name={name}")
    show(value, True, lambda _: None)


def logs(name: Name, as_json: Json = False) -> None:
    """Show what was measured for the last run."""
    value = Client().call("GET", f"/v1/vtpms/{quoted(name)}/log")

    def human(value: dict[str, Any]) -> None:
        rows = [
            (str(e["recnum"]), str(e["pcr"]), e["content_type"], json.dumps(e["content"]))
            for e in value["events"]
        ]
        output.table(("EVENT", "PCR", "TYPE", "CONTENT"), rows)

    show(value, as_json, human)


def attest(
    name: Name,
    nonce: Annotated[str, typer.Option(help="The verifier's nonce, 8 to 64 bytes in hex.")],
    audience: Annotated[str, typer.Option(help="Whom the evidence is for.")] = "",
    user_data: Annotated[str, typer.Option(help="What it is bound to, in hex.")] = "",
    out: Annotated[Path | None, typer.Option(help="Write here instead of printing.")] = None,
) -> None:
    """Make evidence: a deep quote of a running vTPM, down to the host's TPM."""
    body = {"nonce": nonce, "audience": audience, "user_data": user_data}
    value = Client().call("POST", f"/v1/vtpms/{quoted(name)}/evidence", body)
    text = json.dumps(value, separators=(",", ":"), sort_keys=True)
    if out is None:
        sys.stdout.write(text + "\n")
    else:
        out.write_text(text)


def cdi(
    name: Name,
    bundle: Annotated[
        Path | None,
        typer.Option(help="An OCI bundle whose config.json is given this vTPM, for bare runc."),
    ] = None,
) -> None:
    """Print the CDI specification of a vTPM (it is in /run/cdi already), or edit a bundle by it."""
    value = Client().call("GET", f"/v1/vtpms/{quoted(name)}/cdi")
    if bundle is None:
        show(value, True, lambda _: None)
        return
    config = bundle / "config.json"
    edits = value["devices"][0]["containerEdits"]
    edited = with_vtpm(json_file(config), edits)
    fresh = bundle / "config.json.new"
    fresh.write_text(json.dumps(edited, indent=2))
    fresh.rename(config)
    output.line(f"{config}: runc run -b {bundle} NAME", MARKS["ok"])
