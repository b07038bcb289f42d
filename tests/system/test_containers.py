"""Containers of podman and bare runc with a vTPM each: what they get, and what is refused.

podman, runc and tpm2-tools are those of the distribution, the images the demo's.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from holdfast.appraise.policy import parse_policy
from holdfast.appraise.verifier import appraise
from holdfast.errors import AppraisalError, Forbidden, HoldfastError, InvalidInput, NotFound
from holdfast.evidence.bundle import Evidence
from holdfast.evidence.round import Leaf
from holdfast.frontend.bundle import with_vtpm
from tests.asking import connect, until
from tests.cli.nobody import as_nobody

from .rootfs import make_rootfs
from .serve import IMAGE, Serve, a_host, as_user, build_images, container, podman

pytestmark = [
    pytest.mark.needs_root,
    pytest.mark.skipif(os.geteuid() != 0, reason="containers of the system need root"),
    pytest.mark.skipif(not shutil.which("podman"), reason="podman is not installed"),
    pytest.mark.skipif(not shutil.which("runc"), reason="runc is not installed"),
]

SUFFIX = os.getpid()
NONCE = "00112233445566778899aabbccddeeff"
BAD_NAMES = ("a/b", "../x", "..", "a..b", "x" * 300, "a\nb", "a\x00b", "\x1b[31m", "-x", " ", "ä")


@pytest.fixture(scope="module")
def host() -> Iterator[Serve]:
    """One Holdfast for all; podman looks for CDI devices in /run/cdi."""
    build_images()
    with a_host(cdi=Path("/run/cdi")) as made:
        made.directory.chmod(0o755)  # for the users who call the API
        yield made


@pytest.fixture
def vtpm(host: Serve, request: pytest.FixtureRequest) -> Iterator[str]:
    """A linked vTPM of the test's own."""
    name = f"t{SUFFIX}-{request.node.name.encode().hex()[-24:]}-{len(names)}"
    names.append(name)
    host.create(name, "linked")
    yield name
    destroy(host, name)


names: list[str] = []


def destroy(host: Serve, name: str) -> None:
    host.call("POST", f"/v1/vtpms/{name}/stop", {})
    host.call("DELETE", f"/v1/vtpms/{name}")


def device(vtpm: str) -> str:
    return f"--device=holdfast.dev/vtpm={vtpm}"


def is_off(host: Serve, name: str) -> bool:
    return bool(host.inspect(name)["state"] == "off")


# --- podman --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--user", "1000"),
        ("--read-only",),
        ("--uidmap", "0:100000:65536"),
        ("--cap-drop", "all", "--security-opt", "no-new-privileges"),
    ],
    ids=["root", "user", "read-only", "uidmap", "no-capabilities"],
)
def test_unmodified_tools_work_without_flags(
    host: Serve, vtpm: str, options: tuple[str, ...]
) -> None:
    script = "tpm2_getrandom --hex 8 && tpm2_pcrread sha256:13 && ls /run/vtpm"
    done = podman("--rm", device(vtpm), *options, IMAGE, "sh", "-c", script)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.split("\n")
    assert "evidence.sock" in lines
    assert "0x" + "0" * 64 not in done.stdout  # it was measured
    until("the container's end powers it off", lambda: is_off(host, vtpm))
    assert host.inspect(vtpm)["run"] == 1


def test_the_tools_see_what_the_daemon_says_was_measured(host: Serve, vtpm: str) -> None:
    with container(vtpm) as name:
        done = subprocess.run(
            ["podman", "exec", name, "tpm2_pcrread", "sha256:11,12,13,15"],
            capture_output=True, text=True, timeout=30, check=True,
        )  # fmt: skip
        said = host.inspect(vtpm)["pcrs"]["sha256"]
        for pcr in ("11", "12", "13", "15"):
            assert said[pcr].upper() in done.stdout
        events = host.call("GET", f"/v1/vtpms/{vtpm}/log")["events"]
        assert {event["pcr"] for event in events} >= {11, 12, 13, 15}


def test_a_second_container_on_the_same_vtpm_is_refused_and_told_why(
    host: Serve, vtpm: str
) -> None:
    with container(vtpm) as first:
        done = podman("--rm", device(vtpm), IMAGE, "echo", "started")
        assert done.returncode != 0
        assert "started" not in done.stdout
        assert "a vTPM belongs to one container at a time" in done.stderr
        command = ["podman", "exec", first, "tpm2_getrandom", "--hex", "8"]
        subprocess.run(command, check=True, timeout=30, stdout=subprocess.DEVNULL)
    until("the first one's end powers it off", lambda: is_off(host, vtpm))
    assert podman("--rm", device(vtpm), IMAGE, "echo", "started").stdout == "started\n"


def test_a_container_that_is_killed_powers_off(host: Serve, vtpm: str) -> None:
    with container(vtpm) as name:
        assert host.inspect(vtpm)["state"] == "active"
        subprocess.run(["podman", "kill", name], check=True, timeout=30, stdout=subprocess.DEVNULL)
        until("it is off", lambda: is_off(host, vtpm))


def test_what_a_container_made_is_there_for_the_next_one(host: Serve, vtpm: str) -> None:
    first = "tpm2_nvdefine -Q 0x1500001 -s 4 && printf kept | tpm2_nvwrite 0x1500001 -i -"
    done = podman("--rm", device(vtpm), IMAGE, "sh", "-c", first)
    assert done.returncode == 0, done.stderr
    until("it is off", lambda: is_off(host, vtpm))
    done = podman("--rm", device(vtpm), IMAGE, "tpm2_nvread", "0x1500001")
    assert done.stdout == "kept"


def test_an_unknown_vtpm_starts_no_container(host: Serve) -> None:
    done = podman("--rm", device(f"none-{SUFFIX}"), IMAGE, "echo", "started")
    assert done.returncode != 0
    assert "started" not in done.stdout


# --- start policies ------------------------------------------------------------------------------


@contextlib.contextmanager
def with_policy(host: Serve, policy: dict[str, Any]) -> Iterator[str]:
    name = f"p{SUFFIX}-{len(names)}"
    names.append(name)
    host.create(name, "linked", start_policy=policy)
    try:
        yield name
    finally:
        destroy(host, name)


def layers(host: Serve, vtpm: str) -> list[str]:
    events = host.call("GET", f"/v1/vtpms/{vtpm}/log")["events"]
    contents = [json.loads(e) if isinstance(e := event["content"], str) else e for event in events]
    return [c["digest"] for c in contents if isinstance(c, dict) and c.get("part") == "layer"]


def test_a_start_policy_lets_its_layers_start_and_no_others(host: Serve, vtpm: str) -> None:
    assert podman("--rm", device(vtpm), IMAGE, "true").returncode == 0
    right = layers(host, vtpm)
    assert len(right) == 2
    with with_policy(host, {"layers": right}) as name:
        assert podman("--rm", device(name), IMAGE, "true").returncode == 0
        until("it is off", lambda: is_off(host, name))
        other = IMAGE.removesuffix("-a") + "-b"
        done = podman("--rm", device(name), other, "echo", "started")
        assert done.returncode != 0
        assert "started" not in done.stdout
        assert "does not allow this image" in done.stderr
        assert host.inspect(name)["state"] == "off"
    with with_policy(host, {"layers": right[::-1]}) as name:
        done = podman("--rm", device(name), IMAGE, "echo", "started")
        assert "does not allow this image" in done.stderr
        assert "started" not in done.stdout


def test_a_hook_that_runs_after_ours_must_be_named(host: Serve, vtpm: str, tmp_path: Path) -> None:
    hook = {
        "version": "1.0.0", "hook": {"path": "/bin/true"}, "when": {"always": True},
        "stages": ["createContainer"],
    }  # fmt: skip
    (tmp_path / "hook.json").write_text(json.dumps(hook))

    def run(name: str) -> subprocess.CompletedProcess[str]:
        command = ["podman", "--hooks-dir", str(tmp_path), "run", "--runtime", "runc", "--rm"]
        command += ["--network", "none", "--ulimit", "nofile=1024:1024"]
        command += ["--ulimit", "nproc=1024:1024", device(name), IMAGE, "echo", "started"]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)

    done = run(vtpm)
    assert done.returncode != 0
    assert "started" not in done.stdout
    assert "/bin/true is a hook that runs after this was measured" in done.stderr
    with with_policy(host, {"any": True, "hooks": ["/bin/true"]}) as name:
        assert run(name).stdout == "started\n"
    with with_policy(host, {"any": True, "hooks": ["/bin/false"]}) as name:
        assert run(name).returncode != 0


@pytest.mark.parametrize(
    "policy",
    [{"layer": []}, {"layers": "sha256:aa"}, {"any": 1}, {"hooks": ["/x"]}, {"layers": [1]}],
)
def test_a_start_policy_that_is_none_is_refused(host: Serve, policy: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput, match="start policy"):
        host.create(f"q{SUFFIX}", "linked", start_policy=policy)


# --- bare runc -----------------------------------------------------------------------------------

ASK = r"exec 3<>/dev/tpmrm0; printf '\200\1\0\0\0\14\0\0\1\173\0\10' >&3; cat <&3; env >&2"


def test_bare_runc_with_the_edits_of_holdfast_cdi(host: Serve, vtpm: str, tmp_path: Path) -> None:
    make_rootfs(tmp_path / "rootfs")
    subprocess.run(["runc", "spec"], cwd=tmp_path, check=True)
    spec = json.loads(host.cli("cdi", vtpm).stdout)
    config = json.loads((tmp_path / "config.json").read_text())
    config["process"]["terminal"] = False
    config["process"]["args"] = ["sh", "-c", ASK]
    config["process"].pop("rlimits", None)
    config = with_vtpm(config, spec["devices"][0]["containerEdits"])
    (tmp_path / "config.json").write_text(json.dumps(config))
    done = subprocess.run(
        ["runc", "run", f"bare-{SUFFIX}"], cwd=tmp_path, capture_output=True, timeout=60,
        stdin=subprocess.DEVNULL, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len(done.stdout) == 20
    assert done.stdout[:10] == bytes.fromhex("80010000001400000000")
    assert b"TPM2TOOLS_TCTI=device:/dev/tpmrm0" in done.stderr
    until("its end powers it off", lambda: is_off(host, vtpm))
    assert host.inspect(vtpm)["run"] == 1


# --- inside the container ------------------------------------------------------------------------


def http(path: Path, method: str, target: str, body: Any = None) -> tuple[int, bytes]:
    """One HTTP request over a Unix socket."""
    data = json.dumps(body).encode() if body is not None else b""
    head = f"{method} {target} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    with connect(path, 30) as sock:
        sock.sendall(head.encode() + data)
        answer = b""
        with contextlib.suppress(ConnectionResetError):
            while piece := sock.recv(65536):
                answer += piece
    header, _, content = answer.partition(b"\r\n\r\n")
    return int(header.split()[1]), content


def init_pid(name: str) -> int:
    command = ["podman", "inspect", "--format", "{{.State.Pid}}", name]
    return int(subprocess.run(command, capture_output=True, check=True, timeout=30).stdout)


def test_a_container_gets_its_own_evidence_and_nothing_else_on_its_socket(host: Serve) -> None:
    with with_policy(host, {"any": True}) as one, with_policy(host, {"any": True}) as two:
        with container(one) as first, container(two) as second:
            for vtpm, name in ((one, first), (two, second)):
                path = Path(f"/proc/{init_pid(name)}/root/run/vtpm/evidence.sock")
                status, body = http(path, "POST", "/v1/evidence", {"nonce": NONCE})
                assert status == 200, body
                leaf = Leaf.decode(Evidence.decode(body).leaf)
                assert str(leaf.instance) == host.inspect(vtpm)["id"]
                assert leaf.nonce.hex() == NONCE
                for method, target in (
                    ("GET", "/v1/vtpms"),
                    ("GET", f"/v1/vtpms/{one}"),
                    ("POST", f"/v1/vtpms/{two}/evidence"),
                    ("POST", f"/v1/vtpms/{vtpm}/stop"),
                    ("DELETE", f"/v1/vtpms/{vtpm}"),
                    ("POST", "/v1/hooks/poststop"),
                    ("GET", "/v1/doctor"),
                ):
                    assert http(path, method, target, {})[0] == 404, target
                assert http(path, "GET", "/v1/evidence")[0] == 405
                for wrong in ({}, {"nonce": "xy"}, {"nonce": NONCE, "instance": two}, [], "x"):
                    assert http(path, "POST", "/v1/evidence", wrong)[0] == 400, wrong
        until("both are off", lambda: is_off(host, one) and is_off(host, two))


# --- who may call what ---------------------------------------------------------------------------


def test_a_user_may_do_to_his_own_what_is_his_to_do_and_nothing_to_anothers(host: Serve) -> None:
    mine, others = f"mine{SUFFIX}", f"others{SUFFIX}"
    host.create(mine, owner=4242)
    host.create(others)
    host.power_on(others)
    state = {"ociVersion": "1", "id": "c1", "status": "stopped", "pid": 0, "bundle": "/"}
    allowed = (
        ("GET", f"/v1/vtpms/{mine}", None),
        ("POST", f"/v1/vtpms/{mine}/start", {}),
        ("POST", f"/v1/vtpms/{mine}/evidence", {"nonce": NONCE}),
        ("GET", f"/v1/vtpms/{mine}/log", None),
        ("GET", f"/v1/vtpms/{mine}/cdi", None),
        ("POST", f"/v1/vtpms/{mine}/stop", {}),
        ("GET", "/v1/version", None),
    )
    refused = (
        ("GET", f"/v1/vtpms/{others}", None),
        ("POST", f"/v1/vtpms/{others}/start", {}),
        ("POST", f"/v1/vtpms/{others}/evidence", {"nonce": NONCE}),
        ("GET", f"/v1/vtpms/{others}/log", None),
        ("GET", f"/v1/vtpms/{others}/cdi", None),
        ("POST", f"/v1/vtpms/{others}/stop", {}),
        ("POST", f"/v1/vtpms/{others}/retry", {}),
        ("POST", f"/v1/vtpms/{mine}/sleep", {}),
        ("DELETE", f"/v1/vtpms/{others}", None),
        ("DELETE", f"/v1/vtpms/{mine}", None),
        ("POST", "/v1/vtpms", {"name": "new", "profile": "plain"}),
        ("POST", "/v1/hooks/createRuntime", {"vtpm": mine, "state": state}),
        ("POST", "/v1/hooks/poststop", {"vtpm": mine, "state": state}),
        ("GET", "/v1/doctor", None),
        ("GET", "/v1/status", None),
    )
    try:
        listed = as_user(4242, lambda: host.call("GET", "/v1/vtpms"))
        assert [vtpm["name"] for vtpm in listed["vtpms"]] == [mine]
        for call in allowed:
            answer = as_user(4242, lambda call=call: host.call(*call))
            assert isinstance(answer, dict), (call, answer)
        for call in refused:
            assert as_user(4242, lambda call=call: host.call(*call)) == "Forbidden", call
        with pytest.raises(NotFound):
            host.inspect("new")
        assert host.inspect(others)["state"] == "active"
        status = as_user(4242, lambda: http(host.api, "DELETE", f"/v1/vtpms/{others}")[0])
        assert status == 403
        assert issubclass(Forbidden, HoldfastError)
    finally:
        for name in (mine, others):
            with contextlib.suppress(HoldfastError):
                host.call("POST", f"/v1/vtpms/{name}/stop", {})
            host.call("DELETE", f"/v1/vtpms/{name}")


def test_the_inner_sockets_are_not_for_users(host: Serve) -> None:
    inner = host.directory / "run" / "internal"
    for name in ("keeper.sock", "spawner.sock"):
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)

        def reaches(sock: socket.socket = sock, path: str = str(inner / name)) -> bool:
            try:
                sock.connect(path)
            except OSError:
                return False
            return True

        with sock:
            assert as_user(4242, reaches) is False


# --- names, exit codes, hooks --------------------------------------------------------------------


def test_exit_codes_say_what_kind_of_failure_it_was(host: Serve, vtpm: str) -> None:
    codes = {
        ("inspect", "nobody"): 3,
        ("rm", "nobody"): 3,
        ("stop", "nobody"): 3,
        ("attest", "nobody", "--nonce", NONCE): 3,
        ("create", vtpm): 4,
        ("start", vtpm): 4,  # it is linked
        ("attest", vtpm, "--nonce", NONCE): 4,  # it is off
        ("create", "x", "--profile", "odd"): 2,
        ("create", "x", "--bank", "md5"): 2,
        ("create",): 2,
        ("inspect", vtpm): 0,
        ("ls",): 0,
        ("doctor",): 0,
    }
    for arguments, code in codes.items():
        done = host.cli(*arguments)
        assert done.returncode == code, (arguments, done.stdout, done.stderr)
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "name", [n for n in BAD_NAMES if not n.startswith("-") and "\x00" not in n]
)
def test_a_name_that_is_none_is_refused_by_every_command(host: Serve, name: str) -> None:
    for command in (("create", name), ("inspect", name), ("rm", name), ("cdi", name)):
        done = host.cli(*command)
        assert done.returncode == 2, (command, done.stdout, done.stderr)
        assert "\x1b[31m" + name not in done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize("name", BAD_NAMES)
def test_a_name_that_is_none_makes_nothing(host: Serve, name: str) -> None:
    before = sorted(path.name for path in Path("/run/cdi").iterdir() if str(SUFFIX) in path.name)
    with pytest.raises(InvalidInput):
        host.create(name)
    state = {"ociVersion": "1", "id": "c1", "status": "stopped", "pid": 0, "bundle": "/"}
    with pytest.raises(InvalidInput):
        host.call("POST", "/v1/hooks/poststop", {"vtpm": name, "state": state})
    after = sorted(path.name for path in Path("/run/cdi").iterdir() if str(SUFFIX) in path.name)
    assert before == after
    assert not any(vtpm["name"] == name for vtpm in host.call("GET", "/v1/vtpms")["vtpms"])


def test_poststop_of_another_container_changes_nothing(host: Serve, vtpm: str) -> None:
    with container(vtpm):
        before = host.inspect(vtpm)
        for foreign in ("c1", "0" * 64, before["container"][:-1], before["container"] + "0"):
            state = {
                "ociVersion": "1", "id": foreign, "status": "stopped", "pid": 0, "bundle": "/",
            }  # fmt: skip
            host.call("POST", "/v1/hooks/poststop", {"vtpm": vtpm, "state": state})
        assert host.inspect(vtpm) == before
        assert before["state"] == "active"


# --- evidence ------------------------------------------------------------------------------------


def test_evidence_of_a_run_is_accepted_and_with_another_nonce_refused(
    host: Serve, vtpm: str, tmp_path: Path
) -> None:
    evidence, policy = str(tmp_path / "evidence.json"), str(tmp_path / "policy.toml")
    with container(vtpm):
        assert host.cli("attest", vtpm, "--nonce", NONCE, "--out", evidence).returncode == 0
        made = host.cli(
            "policy", "create", evidence, "--nonce", NONCE, "--out", policy,
            "--site-root", str(host.directory / "out" / "site-root-ca.pem"),
            "--software-host-tpm", host.made["host_ak_name"],
        )  # fmt: skip
        assert made.returncode == 0, made.stderr
        done = host.cli("verify", evidence, "--policy", policy, "--nonce", NONCE)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "accepted" in done.stdout
        done = host.cli("verify", evidence, "--policy", policy, "--nonce", "ff" * 16)
        assert done.returncode == 7
        assert "refused" in done.stdout
        assert "accepted" not in done.stdout
        done = host.cli(
            "verify", evidence, "--policy", policy, "--nonce", NONCE, "--audience", "another"
        )
        assert done.returncode in (2, 7)
        assert "accepted" not in done.stdout


@pytest.fixture(scope="module")
def sample(host: Serve) -> dict[str, Path]:
    """Evidence of a container's linked vTPM, by real TPMs throughout, and its policy."""
    directory = host.directory / "sample"  # where others may read
    directory.mkdir(mode=0o755)
    files = {name: directory / name for name in ("evidence.json", "policy.toml")}
    with with_policy(host, {"any": True}) as name, container(name):
        asked = ("--nonce", NONCE, "--audience", "a verifier", "--user-data", "c0ffee")
        done = host.cli("attest", name, *asked, "--out", str(files["evidence.json"]))
        assert done.returncode == 0, done.stderr
        made = host.cli(
            "policy", "create", str(files["evidence.json"]), *asked,
            "--out", str(files["policy.toml"]),
            "--site-root", str(host.directory / "out" / "site-root-ca.pem"),
            "--software-host-tpm", host.made["host_ak_name"],
        )  # fmt: skip
        assert made.returncode == 0, made.stderr
    return files


class Judge:
    """Appraises the sample's evidence, or what was made of it."""

    def __init__(self, sample: dict[str, Path]) -> None:
        self.json = sample["evidence.json"].read_bytes().strip()
        self.cbor = Evidence.decode(self.json).encode_cbor()  # the other form of the same
        self._policy = parse_policy(sample["policy.toml"].read_text())
        self._now = datetime.datetime.now(datetime.UTC)

    def step(self, data: bytes, nonce: str = NONCE, user_data: str = "c0ffee") -> str:
        """The step that refuses it; empty if it is accepted."""
        challenge = (bytes.fromhex(nonce), "a verifier", bytes.fromhex(user_data))
        given = (*challenge, self._now)
        try:
            appraise(data, self._policy, *given)
        except AppraisalError as error:
            return error.step
        return ""

    def accepted(self, data: bytes, bits: int) -> list[int]:
        """Places at which one changed bit, of the lowest `bits` in turn, is not noticed."""
        mutable, places = bytearray(data), []
        for place in range(len(data)):
            mask = 1 << place % bits
            mutable[place] ^= mask
            if not self.step(bytes(mutable)):
                places.append(place)
            mutable[place] ^= mask
        return places


def test_any_one_byte_of_real_evidence_that_is_changed_is_noticed(
    sample: dict[str, Path],
) -> None:
    """There is nothing in it that is not signed: no place may survive."""
    judge = Judge(sample)
    assert len(judge.json) > 15_000
    assert judge.step(judge.json) == judge.step(judge.cbor) == ""
    # Bits 6 and 7 leave the alphabet, which is refused early. test_appraise_flips does more of
    # this, with evidence that was made up.
    assert judge.accepted(judge.json, 6) == []


def test_real_evidence_is_for_its_challenge_alone_and_whole(sample: dict[str, Path]) -> None:
    judge = Judge(sample)
    assert judge.step(judge.json, nonce="00" * 16) != ""
    assert judge.step(judge.json, user_data="c0ffed") != ""
    for data in (judge.json, judge.cbor):
        for wrong in (data[:-1], data + b"\0", data + data, b"", data[1:]):
            assert judge.step(wrong) != ""


OFFLINE = """\
import sys
sys.argv = ["holdfast", *sys.argv[1:]]
from holdfast.cli import main
try:
    main()
except SystemExit as end:
    status = end.code or 0
maps = open("/proc/self/maps").read()
for library in ("libtss2", "libtpms", "libseccomp"):
    assert library not in maps, library
for module in ("tpm2_pytss", "aiohttp", "holdfast.hwtpm", "holdfast.engine", "holdfast.daemon"):
    assert module not in sys.modules, module
interfaces = open("/proc/self/net/dev").read().split("\\n")[2:]
assert not [line for line in interfaces if line and not line.strip().startswith("lo:")]
sys.exit(status)
"""


def test_anybody_verifies_offline_with_neither_daemon_nor_tpm_nor_its_libraries(
    host: Serve, sample: dict[str, Path]
) -> None:
    """As another user, in a network with nothing in it."""
    asked = ("--nonce", NONCE, "--audience", "a verifier", "--user-data", "c0ffee")

    def verify(evidence: Path) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", OFFLINE, "verify", str(evidence), *asked]
        command += ["--policy", str(sample["policy.toml"]), "--json"]
        return subprocess.run(
            ["unshare", "--net", *as_nobody(*command)], cwd="/", capture_output=True, text=True,
            env={"PATH": os.environ["PATH"], "HOLDFAST_SOCKET": "/nobody", "HOME": "/nowhere"},
            timeout=60, check=False,
        )  # fmt: skip

    done = verify(sample["evidence.json"])
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout)["accepted"] is True
    data = sample["evidence.json"].read_bytes()
    wrong = host.directory / "sample" / "wrong.json"
    wrong.write_bytes(data.replace(b"A", b"B", 1))
    done = verify(wrong)
    assert done.returncode == 7, done.stdout + done.stderr
    assert json.loads(done.stdout)["accepted"] is False
