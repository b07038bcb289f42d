"""What managing a host leaves behind and shows: audit lines, JSON, secrets nowhere; who does work.

One `holdfast serve` for all of it.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from holdfast.daemon.starting import provider
from holdfast.errors import Conflict, Forbidden, InvalidInput, NotFound
from holdfast.tpm2 import requests as rq
from holdfast.tpm2.constants import NvAttr, Rh
from tests.asking import connect, exchange, rc, until
from tests.cli.nobody import as_nobody

from .running import GET_RANDOM, RANDOM_SIZE, busy
from .serve import PROGRAM, Serve, a_host, as_user, serves

NONCE = "00" * 16
OWNER = 4343
INDEX = 0x01500040
NV = NvAttr.OWNERWRITE | NvAttr.OWNERREAD | NvAttr.AUTHREAD | NvAttr.NO_DA


@pytest.fixture(scope="module")
def host() -> Iterator[Serve]:
    with a_host() as made:
        made.directory.chmod(0o755)
        yield made


@pytest.fixture
def vtpm(host: Serve, request: pytest.FixtureRequest) -> Iterator[str]:
    name = f"v-{request.node.name.encode().hex()[-20:]}"
    host.create(name, owner=OWNER)
    yield name
    with contextlib.suppress(NotFound):
        host.call("POST", f"/v1/vtpms/{name}/stop", {})
        host.call("DELETE", f"/v1/vtpms/{name}")


def sock_of(host: Serve, name: str) -> Path:
    return host.place(name) / "run" / "tpm.sock"


def test_a_boot_state_can_be_approved_while_the_keeper_serves(host: Serve) -> None:
    """It uses the same TPM, and leaves there what the keeper has there."""
    for number in range(3):
        done = host.cli(
            "policy", "authorize", "--config", str(host.config),
            "--identity", str(host.directory / "identity"),
            "--recovery-file", str(host.directory / "out" / "recovery.age"),
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        host.create(f"beside-{number}")
        assert host.finding("keeper")["level"] == "ok"


def test_a_recovery_file_that_is_none_is_named(host: Serve) -> None:
    done = host.cli(
        "policy", "authorize", "--config", str(host.config),
        "--identity", str(host.directory / "identity"),
        "--recovery-file", str(host.directory / "out" / "site-root-ca.key.age"),
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert "site-root-ca.key.age holds no recovery key" in done.stderr


def test_a_host_tpm_that_cannot_be_served_ends_serve_at_once(tmp_path: Path) -> None:
    config = tmp_path / "holdfast.toml"
    config.write_text(
        f'[host]\ntcti = "mssim:host=localhost"\n[paths]\nstate = "{tmp_path}/state"\n'
        f'run = "{tmp_path}/run"\n[keeper]\nuser = "root"\n'
    )
    command = [PROGRAM, "serve", "--config", str(config)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 2
    assert "device: or swtpm:path=" in done.stderr


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ({"name": "ends-"}, "starts and ends with a letter or digit"),
        ({"name": "x", "banks": ["sha1"]}, "verifiers look at sha256"),
        (
            {"name": "x", "start_policy": {}},
            'names configurations or layers, or says {"any": true}',
        ),
        ({"name": "x", "owner": 4294967295}, "an owner is a user's number"),
        ({"name": "x", "profile": "odd"}, "a profile is linked or plain"),
    ],
)
def test_what_cannot_be_made_is_refused_with_the_reason(
    host: Serve, body: dict[str, object], why: str
) -> None:
    with pytest.raises(InvalidInput, match=re.escape(why)):
        host.call("POST", "/v1/vtpms", body)


def test_a_plain_vtpm_that_is_on_is_not_started_again(host: Serve, vtpm: str) -> None:
    host.power_on(vtpm)
    with pytest.raises(Conflict, match="is on already"):
        host.power_on(vtpm)


# --- audit ---------------------------------------------------------------------------------------


def audited(host: Serve, since: int) -> list[dict[str, str]]:
    """Lines of the log from `since` on that name a user: who did what."""
    found = []
    for line in host.log()[since:].splitlines():
        pairs = dict(re.findall(r'(\w+)=("[^"]*"|\S+)', line))
        if "uid" in pairs:
            found.append({key: value.strip('"') for key, value in pairs.items()})
    return found


def test_every_call_that_changes_something_leaves_who_did_what_to_which(host: Serve) -> None:
    since = len(host.log())
    host.create("audited", owner=OWNER)

    def as_owner(method: str, path: str, body: dict[str, str] | None = None) -> None:
        answer = as_user(OWNER, lambda: host.call(method, path, body))
        assert isinstance(answer, dict), answer

    as_owner("POST", "/v1/vtpms/audited/start", {})
    as_owner("POST", "/v1/vtpms/audited/evidence", {"nonce": NONCE})
    as_owner("POST", "/v1/vtpms/audited/stop", {})
    state = {"ociVersion": "1", "id": "c1", "status": "stopped", "pid": 0, "bundle": "/"}
    host.call("POST", "/v1/hooks/poststop", {"vtpm": "audited", "state": state})
    host.call("DELETE", "/v1/vtpms/audited")
    lines = [line for line in audited(host, since) if line.get("vtpm") == "audited"]
    assert [(line["event"], line["uid"]) for line in lines] == [
        ("create", "0"), ("start", str(OWNER)), ("attest", str(OWNER)), ("stop", str(OWNER)),
        ("nothing to power off", "0"), ("destroy", "0"),
    ]  # fmt: skip
    for line in lines:
        assert int(line["pid"]) > 0
        assert line["timestamp"].startswith("20")
    assert lines[-2]["container"] == "c1"


def test_a_call_that_was_refused_leaves_who_wanted_what(host: Serve, vtpm: str) -> None:
    """Who tries what is not his is what an audit is for."""
    since = len(host.log())
    refused = as_user(OWNER + 1, lambda: host.call("DELETE", f"/v1/vtpms/{vtpm}"))
    assert refused == "Forbidden"
    assert as_user(OWNER + 1, lambda: host.call("POST", f"/v1/vtpms/{vtpm}/stop", {})) == refused
    lines = [line for line in audited(host, since) if line["uid"] == str(OWNER + 1)]
    assert len(lines) >= 2, host.log()[since:]


def test_what_a_caller_names_cannot_forge_a_line(host: Serve) -> None:
    since = len(host.log())
    forged = "x\ntimestamp=2020 event=create vtpm=forged uid=0 pid=1"
    with contextlib.suppress(Exception):
        host.create(forged)
    state = {"ociVersion": "1", "id": forged, "status": "stopped", "pid": 0, "bundle": "/"}
    with contextlib.suppress(Exception):
        host.call("POST", "/v1/hooks/poststop", {"vtpm": "x", "state": state})
    assert not [line for line in host.log()[since:].splitlines() if line.startswith("timestamp")]
    assert not [line for line in audited(host, since) if line.get("vtpm") == "forged"]


# --- the command line ----------------------------------------------------------------------------


def test_every_command_prints_json_where_it_is_asked_to(host: Serve, tmp_path: Path) -> None:
    policy = tmp_path / "start.json"
    policy.write_text('{"any": true}')
    for arguments, key in (
        (("version", "--json"), "version"),
        (("create", "jay", "--profile", "plain", "--start-policy", str(policy), "--json"), "id"),
        (("status", "--json"), "verdict"),
        (("doctor", "--json"), "findings"),
        (("ls", "--json"), "vtpms"),
        (("inspect", "jay"), "start_policy"),
        (("start", "jay", "--json"), "tcti"),
        (("logs", "jay", "--json"), "events"),
        (("cdi", "jay"), "devices"),
        (("attest", "jay", "--nonce", NONCE), "ak"),
        (("stop", "jay", "--json"), "state"),
        (("rm", "jay", "--json"), "name"),
    ):
        done = host.cli(*arguments)
        assert done.returncode == 0, (arguments, done.stderr)
        assert key in json.loads(done.stdout), arguments
        assert "\x1b" not in done.stdout


def test_who_is_not_root_neither_initialises_nor_serves(host: Serve) -> None:
    for command in (
        ("init", "--recovery-recipient", "age1", "--out", "/nowhere"),
        ("serve", "--config", str(host.config)),
    ):
        done = subprocess.run(
            as_nobody(PROGRAM, *command), capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 5, (command, done.stderr)
        assert "is for root" in done.stderr


def test_a_configuration_with_an_unknown_key_is_refused_by_name(
    host: Serve, tmp_path: Path
) -> None:
    for text, wrong in (
        ("[host]\ntcti_ = 'x'\n", "host.tcti_"),
        ("[paths]\nstate = 3\n", "paths.state"),
        ("[workers]\nblank = 'many'\n", "workers.blank"),
        ("[host\n", "TOML"),
    ):
        file = tmp_path / "holdfast.toml"
        file.write_text(text)
        done = host.cli("serve", "--config", str(file))
        assert done.returncode != 0
        assert wrong in done.stderr
        assert "Traceback" not in done.stderr
    done = host.cli("serve", "--config", str(tmp_path / "none.toml"))
    assert "none.toml" in done.stderr


def test_doctor_shows_the_version_of_libtpms_and_what_is_known_against_it(host: Serve) -> None:
    finding = host.finding("libtpms")
    version = re.match(r"\d+\.\d+\.\d+", finding["says"])
    assert version is not None
    if finding["level"] == "note":
        assert "CVE-" in finding["says"]
    assert host.finding("host TPM")["level"] == "warning"  # a stand-in is never silent
    assert "stand-in" in host.finding("host TPM")["says"]


def test_the_library_that_is_measured_is_the_one_that_runs(host: Serve, vtpm: str) -> None:
    host.power_on(vtpm)
    measured = provider()
    maps = {
        line.split()[-1]
        for pid in host.workers()
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines()
        if "/libtpms.so" in line
    }
    assert maps == {measured.libtpms_path}
    assert host.finding("libtpms")["says"].startswith(measured.libtpms_version)


# --- who does the work ---------------------------------------------------------------------------


def test_each_active_vtpm_has_a_worker_of_its_own_and_they_share_nothing(host: Serve) -> None:
    names = [f"own-{number}" for number in range(3)]
    try:
        for name in names:
            host.create(name)
            host.power_on(name)
        workers = host.workers()
        assert len(set(workers)) == 3
        users, groups, answers = set(), set(), set()
        for pid, name in zip(workers, names, strict=True):
            status = Path(f"/proc/{pid}/status").read_text()
            users.add(re.findall(r"Uid:\t(\d+)", status)[0])
            groups.add(Path(f"/proc/{pid}/cgroup").read_text())
            devices = [os.readlink(fd) for fd in Path(f"/proc/{pid}/fd").iterdir()]
            assert devices.count("/dev/fuse") == 1
            with connect(sock_of(host, name)) as sock:
                answers.add(exchange(sock, rq.read_public(0x81010001)))
        assert len(users) == len(groups) == len(answers) == 3
        for name in names:
            host.call("POST", f"/v1/vtpms/{name}/stop", {})
        assert host.workers() == []
    finally:
        for name in names:
            host.call("POST", f"/v1/vtpms/{name}/stop", {})
            host.call("DELETE", f"/v1/vtpms/{name}")


def test_no_byte_of_a_clients_goes_through_daemon_keeper_or_spawner(host: Serve, vtpm: str) -> None:
    """With all three stopped, clients old and new are served."""
    host.power_on(vtpm)
    others = list(host.children().values())
    assert len(others) == 4  # and the workers' mother
    with connect(sock_of(host, vtpm)) as old:
        assert len(exchange(old, GET_RANDOM)) == RANDOM_SIZE
        for pid in others:
            os.kill(pid, signal.SIGSTOP)
        try:
            assert len(exchange(old, GET_RANDOM)) == RANDOM_SIZE
            with connect(sock_of(host, vtpm)) as new:
                assert len(exchange(new, GET_RANDOM)) == RANDOM_SIZE
            fd = os.open(host.place(vtpm) / "dev" / "tpmrm0", os.O_RDWR)
            os.write(fd, GET_RANDOM)
            assert len(os.read(fd, 4096)) == RANDOM_SIZE
            os.close(fd)
        finally:
            for pid in others:
                os.kill(pid, signal.SIGCONT)


def test_who_connects_to_a_vtpm_that_is_off_makes_nobody_spin(host: Serve, vtpm: str) -> None:
    """A pending connection on a listener that nobody accepts is readable for ever."""
    assert host.inspect(vtpm)["state"] == "off"
    with connect(sock_of(host, vtpm)) as waiting:
        waiting.sendall(GET_RANDOM)
        until("blank workers wait", lambda: host.finding("spawner")["says"].endswith("3 wait"))
        its = host.children()
        before = {name: busy(pid) for name, pid in its.items()}
        waiting.settimeout(1.0)
        with pytest.raises(TimeoutError):
            waiting.recv(64)
        for name, pid in its.items():
            assert busy(pid) - before[name] < 0.3, name
        host.power_on(vtpm)  # it waited in the backlog, and is served
        waiting.settimeout(10.0)
        assert len(waiting.recv(64)) == RANDOM_SIZE


def test_what_is_off_cannot_be_attested_and_its_device_not_be_opened(
    host: Serve, vtpm: str
) -> None:
    with pytest.raises(Conflict):
        host.call("POST", f"/v1/vtpms/{vtpm}/evidence", {"nonce": NONCE})
    for name in ("tpm0", "tpmrm0"):
        path = host.place(vtpm) / "dev" / name
        assert path.exists()
        with pytest.raises(OSError, match="No such device or address"):
            os.open(path, os.O_RDWR)


# --- what is on the disk -------------------------------------------------------------------------


def files_with(directory: Path, secret: bytes) -> list[Path]:
    return [
        path
        for path in directory.rglob("*")
        if path.is_file() and not path.is_symlink() and secret in path.read_bytes()
    ]


def test_no_secret_of_a_tenants_is_on_the_disk_in_the_clear(host: Serve, vtpm: str) -> None:
    secret = os.urandom(32)
    host.power_on(vtpm)
    with connect(sock_of(host, vtpm)) as sock:
        assert rc(exchange(sock, rq.nv_define_space(Rh.OWNER, INDEX, NV, 32))) == 0
        assert rc(exchange(sock, rq.nv_write(Rh.OWNER, INDEX, secret, 0))) == 0
        assert secret in exchange(sock, rq.nv_read(Rh.OWNER, INDEX, 32, 0))
    places = (host.directory / "state", host.directory / "run" / "runs")
    marker = host.directory / "state" / "marker"
    marker.write_bytes(b"x" + secret)
    assert files_with(places[0], secret) == [marker]  # so it would be found
    marker.unlink()
    for _ in range(2):  # as it runs, and sealed
        for place in places:
            assert files_with(place, secret) == []
            assert files_with(place, secret.hex().encode()) == []
        host.call("POST", f"/v1/vtpms/{vtpm}/stop", {})
    host.power_on(vtpm)
    with connect(sock_of(host, vtpm)) as sock:
        assert secret in exchange(sock, rq.nv_read(Rh.OWNER, INDEX, 32, 0))


def test_only_root_comes_to_what_is_stored(host: Serve, vtpm: str) -> None:
    for directory, _, files in os.walk(host.directory / "state"):
        for name in files:
            path = Path(directory) / name
            reached = as_user(OWNER, lambda path=path: _readable(path))
            assert reached is False, path
    assert stat.S_IMODE((host.directory / "run" / "internal").stat().st_mode) == 0o700
    # The owner of a vTPM comes through to it, another user does not.
    device = host.place(vtpm) / "dev" / "tpmrm0"
    assert as_user(OWNER, lambda: os.path.exists(device)) is True
    assert as_user(OWNER + 1, lambda: os.path.exists(device)) is False


def _readable(path: Path) -> bool:
    try:
        path.read_bytes()
    except PermissionError:
        return False
    return True


def test_a_state_directory_on_another_host_opens_nothing(host: Serve, vtpm: str) -> None:
    """Its root key is sealed in the first one's TPM."""
    host.call("POST", f"/v1/vtpms/{vtpm}/stop", {})
    with a_host(running=False) as thief:
        shutil.rmtree(thief.directory / "state")
        shutil.copytree(host.directory / "state", thief.directory / "state")
        thief.start()
        assert vtpm in [each["name"] for each in thief.call("GET", "/v1/vtpms")["vtpms"]]
        finding = thief.finding("keeper")
        assert finding["level"] == "problem"
        with pytest.raises(Exception, match="host TPM") as caught:
            thief.power_on(vtpm)
        assert not isinstance(caught.value, (NotFound, Forbidden))
        assert [pid for pid in thief.workers() if serves(pid)] == []
