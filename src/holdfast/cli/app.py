"""Commands: what each asks of the daemon, or does without one.

`verify`, `policy` and `tpm` need neither daemon nor root; the rest goes through the API.
"""

from __future__ import annotations

import json
import os
import pwd
import signal
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any, Final, cast
from urllib.parse import quote

import typer

from holdfast import __version__
from holdfast.cli import output, verifying
from holdfast.cli.output import failures, progress, show
from holdfast.cli.tpm import run_command
from holdfast.client import Client, NoDaemon
from holdfast.errors import Forbidden, HostError, InvalidInput, by_name
from holdfast.frontend.bundle import with_vtpm
from holdfast.ids import instance_name

app = typer.Typer(
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    help="A TPM 2.0 of its own for every Linux container, held fast to the host's TPM.",
)
policy_app = typer.Typer(no_args_is_help=True, help="Appraisal policies, and approved boot states.")
app.add_typer(policy_app, name="policy")
snapshot_app = typer.Typer(no_args_is_help=True, help="Snapshots: not in this version.")
app.add_typer(snapshot_app, name="snapshot")
migrate_app = typer.Typer(no_args_is_help=True, help="Moves to another host: not in this version.")
app.add_typer(migrate_app, name="migrate")
app.command()(verifying.verify)
policy_app.command("create")(verifying.create_policy)

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Name = Annotated[str, typer.Argument(help="The vTPM's name.")]
ConfigFile = Annotated[Path | None, typer.Option("--config", help="Configuration file (TOML).")]
_JSON_MAX: Final = 16 << 20  # bytes in a file of JSON
_UID_DIGITS: Final = 10
_MARKS: Final = {
    "ok": "[green]ok[/green]",
    "note": "[cyan]note[/cyan]",
    "warning": "[yellow]warning[/yellow]",
    "problem": "[red]problem[/red]",
}


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


@app.command()
def version(as_json: Json = False) -> None:
    """Show the version."""
    show({"version": __version__}, as_json, lambda v: output.line(f"holdfast {v['version']}"))


# --- the host ---


@app.command()
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
    _root("init")
    settings = _settings(config)
    there = _user(settings["keeper_user"]) is not None
    uid, gid = _keeper_user(settings["keeper_user"], make=True)
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
            made = _keeper(command)
    except BaseException:
        if not there:
            subprocess.run(["userdel", settings["keeper_user"]], check=False)
        raise

    def human(value: dict[str, Any]) -> None:
        output.line("initialised", _MARKS["ok"])
        output.line(f"recovery key (encrypted):   {value['recovery_key']}")
        output.line(f"site root key (encrypted):  {value['site_root_key']}")
        output.line(f"site root certificate:      {value['site_root_certificate']}")
        output.line(f"host AK name:               {value['host_ak_name']}")
        if print_recovery_key:
            output.line(f"recovery key (secret):      {value['recovery_key_hex']}")
        output.line("Move the encrypted files off this host. Then: holdfast serve")

    show(made, as_json, human)


@app.command()
def serve(config: ConfigFile = None) -> None:
    """Run Holdfast in the foreground: keeper, spawner and daemon."""
    _root("serve")
    _settings(config)  # what is wrong with it is said here, as by all other commands
    command = [sys.executable, "-P", "-m", "holdfast.daemon.supervisor"]
    command += ["--config", str(config)] if config else []
    os.execv(sys.executable, command)  # noqa: S606 - our own interpreter, our own module


@app.command()
def status(as_json: Json = False) -> None:
    """Show host, keeper, spawner, and how many vTPMs are in which state."""
    value = Client().call("GET", "/v1/status")

    def human(value: dict[str, Any]) -> None:
        for part in ("host", "keeper", "spawner"):
            found = value[part]
            output.line(f"{part}: {found['says']}", _MARKS[found["level"]])
        output.line(f"vTPMs: {_counted(value['vtpms'])}")
        if value["more"]:
            output.line(f"holdfast doctor has more: {', '.join(value['more'])}")

    show(value, as_json, human)
    _verdict(value)


@app.command()
def doctor(config: ConfigFile = None, as_json: Json = False) -> None:
    """Look for what this host lacks, and say it in plain words; all of it if a daemon runs."""
    if config is not None:
        _settings(config)  # what is wrong with it, though a daemon that runs has read its own
    try:
        value = Client().call("GET", "/v1/doctor")
    except NoDaemon:
        value = _of_config("ground", config)

    def human(value: dict[str, Any]) -> None:
        for finding in value["findings"]:
            mark = _MARKS[finding["level"]]
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


# --- vTPMs ---


@app.command()
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
        body["owner"] = _uid(owner)
    if bank:
        body["banks"] = bank
    if start_policy is not None:
        body["start_policy"] = _json_file(start_policy)
    if unsafe_unlinked:
        body["unsafe_unlinked"] = True
    if ports:
        body["ports"] = ports
    if devices:
        body["devices"] = devices
    with progress(f"making {name}"):
        value = Client().call("POST", "/v1/vtpms", body)

    def human(value: dict[str, Any]) -> None:
        output.line(f"{value['name']} ({value['id']})", _MARKS["ok"])
        if value["profile"] == "linked" or value["tpm"]:
            output.line(f"podman run --device {value['device']} IMAGE")
        else:
            output.line(f"holdfast start {value['name']}; TPM2TOOLS_TCTI={value['tcti']}")

    show(value, as_json, human)


@app.command()
def start(name: Name, as_json: Json = False) -> None:
    """Power on a plain vTPM. A linked one is powered on by starting its container."""
    value = Client().call("POST", f"/v1/vtpms/{_quoted(name)}/start", {})
    show(value, as_json, lambda v: output.line(f"TPM2TOOLS_TCTI={v['tcti']}"))


@app.command()
def stop(name: Name, as_json: Json = False) -> None:
    """Power a vTPM off, in order. Its container finds its device gone."""
    value = Client().call("POST", f"/v1/vtpms/{_quoted(name)}/stop", {})
    show(value, as_json, lambda v: output.line(f"{v['name']} is {v['state']}"))


@app.command()
def retry(name: Name, as_json: Json = False) -> None:
    """Let a vTPM that failed be started again, its state untouched."""
    value = Client().call("POST", f"/v1/vtpms/{_quoted(name)}/retry", {})
    show(value, as_json, lambda v: output.line(f"{v['name']} is {v['state']}"))


@snapshot_app.command("create")
def snapshot_create(name: Name) -> None:
    """Refused, with the reason: of a TPM that is passed through there can be none."""
    Client().call("POST", f"/v1/vtpms/{_quoted(name)}/snapshots", {})


@migrate_app.command("send")
def migrate_send(name: Name) -> None:
    """Refused, with the reason: a TPM that is passed through cannot move."""
    Client().call("POST", f"/v1/vtpms/{_quoted(name)}/moves", {})


@app.command()
def rm(name: Name, as_json: Json = False) -> None:
    """Destroy a vTPM: its keys and everything sealed to it are gone for good."""
    value = Client().call("DELETE", f"/v1/vtpms/{_quoted(name)}")
    show(value, as_json, lambda v: output.line(f"{v['name']} is destroyed"))


@app.command()
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


@app.command()
def inspect(name: Name) -> None:
    """Show everything about a vTPM, as JSON."""
    value = Client().call("GET", f"/v1/vtpms/{_quoted(name)}")
    show(value, True, lambda _: None)


@app.command()
def logs(name: Name, as_json: Json = False) -> None:
    """Show what was measured for the last run."""
    value = Client().call("GET", f"/v1/vtpms/{_quoted(name)}/log")

    def human(value: dict[str, Any]) -> None:
        rows = [
            (str(e["recnum"]), str(e["pcr"]), e["content_type"], json.dumps(e["content"]))
            for e in value["events"]
        ]
        output.table(("EVENT", "PCR", "TYPE", "CONTENT"), rows)

    show(value, as_json, human)


# --- evidence ---


@app.command()
def attest(
    name: Name,
    nonce: Annotated[str, typer.Option(help="The verifier's nonce, 8 to 64 bytes in hex.")],
    audience: Annotated[str, typer.Option(help="Whom the evidence is for.")] = "",
    user_data: Annotated[str, typer.Option(help="What it is bound to, in hex.")] = "",
    out: Annotated[Path | None, typer.Option(help="Write here instead of printing.")] = None,
) -> None:
    """Make evidence: a deep quote of a running vTPM, down to the host's TPM."""
    body = {"nonce": nonce, "audience": audience, "user_data": user_data}
    value = Client().call("POST", f"/v1/vtpms/{_quoted(name)}/evidence", body)
    text = json.dumps(value, separators=(",", ":"), sort_keys=True)
    if out is None:
        sys.stdout.write(text + "\n")
    else:
        out.write_text(text)


# --- the rest ---


@app.command()
def cdi(
    name: Name,
    bundle: Annotated[
        Path | None,
        typer.Option(help="An OCI bundle whose config.json is given this vTPM, for bare runc."),
    ] = None,
) -> None:
    """Print the CDI specification of a vTPM (it is in /run/cdi already), or edit a bundle by it."""
    value = Client().call("GET", f"/v1/vtpms/{_quoted(name)}/cdi")
    if bundle is None:
        show(value, True, lambda _: None)
        return
    config = bundle / "config.json"
    edits = value["devices"][0]["containerEdits"]
    edited = with_vtpm(_json_file(config), edits)
    fresh = bundle / "config.json.new"
    fresh.write_text(json.dumps(edited, indent=2))
    fresh.rename(config)
    output.line(f"{config}: runc run -b {bundle} NAME", _MARKS["ok"])


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


@policy_app.command()
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
    config: ConfigFile = None,
    as_json: Json = False,
) -> None:
    """Approve the host's present boot state, with the recovery key."""
    _root("policy authorize")
    settings = _settings(config)
    uid, gid = _keeper_user(settings["keeper_user"])
    command = [
        "authorize", f"--dir={settings['keeper']}", f"--tcti={settings['tcti']}",
        f"--identity={identity}", f"--recovery-file={recovery_file}",
        f"--uid={uid}", f"--gid={gid}",
    ]  # fmt: skip
    command += [f"--values={values}"] if values else []
    made = _keeper([*command, "--retire"] if retire else command)
    show(made, as_json, lambda v: output.line(f"approved, version {v['version']}"))


# --- parts ---


def _root(what: str) -> None:
    if os.geteuid() != 0:
        raise Forbidden(f"{what} is for root")


def _quoted(name: str) -> str:
    """A name in a path; InvalidInput for what is no name."""
    return quote(instance_name(name), safe="")


def _uid(owner: str) -> int:
    if owner.isascii() and owner.isdigit() and len(owner) <= _UID_DIGITS:
        return int(owner)
    try:
        return pwd.getpwnam(owner).pw_uid
    except (KeyError, ValueError):
        raise InvalidInput(f"there is no user {owner!a}") from None


def _json_file(path: Path) -> Any:
    with path.open("rb") as file:
        data = file.read(_JSON_MAX + 1)
    if len(data) > _JSON_MAX:
        raise InvalidInput(f"{path} has more than {_JSON_MAX} bytes")
    try:
        return json.loads(data.decode())  # of bytes, Python would take UTF-16 as well
    except UnicodeDecodeError:
        raise InvalidInput(f"{path} is not JSON: it is not UTF-8") from None
    except ValueError as error:
        raise InvalidInput(f"{path} is not JSON: {error}") from None
    except RecursionError:
        raise InvalidInput(f"{path} is not JSON of ours: it nests too deeply") from None


def _module(arguments: list[str]) -> Any:
    """Run one of our modules and read the JSON it prints; its error becomes ours."""
    command = [sys.executable, "-P", "-m", *arguments]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe) as process:
        printed, said = _printed(process)
    try:
        value = json.loads(printed)
    except ValueError:
        last = said.decode(errors="replace").strip().rpartition("\n")[2]
        raise HostError(f"{arguments[0]} ended with {process.returncode}: {last}") from None
    if process.returncode:
        if value.get("errno"):
            raise OSError(value["errno"], os.strerror(value["errno"]), value["file"])
        raise by_name(value["error"], value["why"])
    return value


def _printed(process: subprocess.Popen[bytes]) -> tuple[bytes, bytes]:
    """All it prints. Interrupted, it is told so and waited for: it takes back what it has made."""
    try:
        return process.communicate()
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        process.send_signal(signal.SIGINT)  # a terminal has told it too; it heeds the first
        process.communicate()
        raise


def _keeper(arguments: list[str]) -> dict[str, Any]:
    value = _module(["holdfast.keeper", *arguments])
    assert isinstance(value, dict)
    return value


def _settings(config: Path | None) -> dict[str, Any]:
    return _of_config("settings", config)


def _of_config(module: str, config: Path | None) -> dict[str, Any]:
    """What one of the daemon's modules says of the configuration."""
    given = ["--config", str(config)] if config else []
    value = _module([f"holdfast.daemon.{module}", *given])
    assert isinstance(value, dict)
    return value


def _keeper_user(name: str, *, make: bool = False) -> tuple[int, int]:
    """The keeper's own user; with `make` it is made if there is none."""
    entry = _user(name)
    if entry is None and not make:
        raise HostError(f"there is no user {name}: run holdfast init")
    if entry is None:
        command = ["useradd", "--system", "--no-create-home", "--shell", "/usr/sbin/nologin", name]
        if subprocess.run(command, check=False).returncode:
            raise HostError(f"the user {name} could not be made")
        entry = pwd.getpwnam(name)
    return entry.pw_uid, entry.pw_gid


def _user(name: str) -> pwd.struct_passwd | None:
    try:
        return pwd.getpwnam(name)
    except KeyError:
        return None
