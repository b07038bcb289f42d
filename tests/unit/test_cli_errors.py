"""Whatever is wrong, the command line says it in one line and ends with the code of its kind."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from holdfast.cli.app import run

from .evidence_maker import AUDIENCE, NONCE, Given, make, policy_text
from .web_host import HOST, WEB

PROGRAM = str(Path(sys.executable).with_name("holdfast"))
PEM_MISSING = '[trust]\nek_roots = ["file:missing.pem"]'
IS_ROOT = os.geteuid() == 0
NOBODY = 65534
VERIFY = ("verify", "EVIDENCE", "--audience", AUDIENCE, "--nonce", NONCE.hex(), "--policy")
AUTHORIZE = ("policy", "authorize", "--recovery-file", "nothere", "--identity", "nothere")
needs_root = pytest.mark.skipif(not IS_ROOT, reason="for who is not root the answer is another")

# A line of the table: arguments, exit code, and what the line has to say.
HERE = [
    (("frobnicate",), 2, "No such command 'frobnicate': see holdfast --help"),
    (("verify",), 2, "Missing argument .*: see holdfast verify --help"),
    (("verify", "--what"), 2, "No such option: --what.*: see holdfast verify --help"),
    (("policy", "frobnicate"), 2, "see holdfast policy --help"),
    (("tpm",), 2, "which command"),
    # The evidence.
    (("verify", "nothere", *VERIFY[2:], "policy.toml"), 2, "nothere: No such file"),
    (("verify", "directory", *VERIFY[2:], "policy.toml"), 2, "directory: Is a directory"),
    (("verify", "bin/x", *VERIFY[2:], "policy.toml"), 2, "bin/x: Not a directory"),
    (("verify", "loop", *VERIFY[2:], "policy.toml"), 2, "loop: Too many levels of symbolic"),
    (("verify", "x" * 300, *VERIFY[2:], "policy.toml"), 2, "File name too long"),
    (("verify", "/dev/zero", *VERIFY[2:], "policy.toml"), 2, "/dev/zero has more than"),
    # The policy.
    ((*VERIFY, "nothere"), 2, "nothere: No such file"),
    ((*VERIFY, "directory"), 2, "directory: Is a directory"),
    ((*VERIFY, "bin"), 2, "bin is no policy: it is not UTF-8"),
    ((*VERIFY, "empty"), 2, "empty: the policy is empty"),
    ((*VERIFY, "bad.toml"), 2, "bad.toml: the policy is not TOML.*line 1"),
    ((*VERIFY, "type.toml"), 2, "type.toml: the policy has no version"),
    ((*VERIFY, "pem.toml"), 2, "missing.pem"),
    # What else an appraisal is given.
    ((*VERIFY, "policy.toml", "--nonce", "xyz"), 2, "nonce is not hexadecimal"),
    ((*VERIFY, "policy.toml", "--user-data", "0"), 2, "user data is not hexadecimal"),
    ((*VERIFY, "policy.toml", "--ear-key", "nothere"), 2, "nothere: No such file"),
    ((*VERIFY, "policy.toml", "--ear-key", "bin"), 2, "bin is not a private key in PEM"),
    ((*VERIFY, "policy.toml", "--progress", "directory"), 2, "directory: Is a directory"),
    ((*VERIFY, "policy.toml", "--progress", "nothere/file"), 2, "nothere: No such file"),
    ((*VERIFY, "policy.toml", "--progress", "empty"), 7, "the progress file .*/empty: is not JSON"),
    ((*VERIFY, "policy.toml", "--progress", "bin"), 7, "the progress file .*/bin: is not JSON"),
    (("policy", "create", "EVIDENCE", "--nonce", "00", "--site-root", "nothere"), 2, "nothere"),
    (("policy", "create", "EVIDENCE", "--nonce", "00", "--site-root", "bin"), 2, "bin is not a"),
    # The daemon.
    (("ls",), 6, "no daemon answers at .*none.sock.*No such file.*is holdfast serve running"),
    (("status",), 6, "no daemon answers"),
    (("doctor", "--config", "type.toml"), 2, r"type.toml: host.tcti: is text"),
    (("create", "web"), 6, "no daemon answers"),
    (("create", "web", "--owner", "no-such-user"), 2, "there is no user 'no-such-user'"),
    (("create", "web", "--owner", "²"), 2, "there is no user"),
    (("create", "web", "--owner", "9" * 5000), 2, "there is no user"),
    (("create", "web", "--start-policy", "nothere"), 2, "nothere: No such file"),
    (("create", "web", "--start-policy", "directory"), 2, "directory: Is a directory"),
    (("create", "web", "--start-policy", "bin"), 2, "bin is not JSON: it is not UTF-8"),
    (("create", "web", "--start-policy", "bad.toml"), 2, "bad.toml is not JSON"),
    (("create", "web", "--start-policy", "deep.json"), 2, "deep.json is not JSON.*too deeply"),
    (("create", "web", "--start-policy", "/dev/zero"), 2, "/dev/zero has more than"),
    (("inspect", ""), 2, "'' is not an instance name"),
    (("snapshot", "frobnicate"), 2, "see holdfast snapshot --help"),
    (("snapshot", "create", "web", "s"), 6, "no daemon answers"),
    (("snapshot", "rm", "web", "../s"), 2, "is not a snapshot's name"),
    (("snapshot", "restore", "web", "s"), 2, "Missing option '--reason'"),
    (("backup", "ls", "nothere", "--identity", "nothere"), 2, "nothere: No such file"),
    (("backup", "ls", "bin", "--identity", "bin"), 2, "bin is not an age or ssh private key"),
    (("inspect", "../web"), 2, "is not an instance name"),
    (("inspect", "w\udcff"), 2, "is not an instance name"),
    (("rm", "x\x1b[31m\n"), 2, "is not an instance name"),
    # A TPM for a command.
    (("tpm", "--state", "bin", "--", "true"), 2, "bin is not a directory"),
    (("tpm", "--replay", "nothere", "--", "true"), 2, "nothere: No such file"),
]  # fmt: skip
AS_ROOT = [
    *(
        ((*command, "--config", config), 2, why)
        for command in (
            ("serve",), AUTHORIZE,
            ("init", "--recovery-recipient", "nothere", "--out", "out"),
        )
        for config, why in (
            ("nothere", "there is no configuration at nothere"),
            ("directory", "the configuration directory: Is a directory"),
            ("bin", "bin is not TOML: it is not UTF-8"),
            ("bad.toml", "bad.toml is not TOML: .*line 1"),
            ("type.toml", r"type.toml: host.tcti: is text"),
        )
    ),
    (("recover",), 6, "no daemon answers"),
    (("recover", "--accept-older"), 2, "--reason is needed"),
    (("recover", "--accept-older", "--reason", "r"), 2, "needs --identity and --recovery-file"),
    (("recover", "--accept-older", "--forget", "web"), 2, "one at a time"),
    (("rekey", "--identity", "bin"), 2, "are named for --recovery"),
    (("rekey", "--root", "--out", "out"), 2, "are named for --recovery"),
    (("doctor", "--config", "key.toml"), 2, r"key.toml: workers.blnk: there is no such key"),
    (("backup", "--out", "out"), 2, "which vTPMs"),
    (("backup", "web", "--all", "--out", "out"), 2, "which vTPMs"),
    (("backup", "web", "--out", "bin"), 4, "bin exists: nothing was written"),
    (("serve", "--config", "section.toml"), 2, r"section.toml: host: is a section"),
    (("serve", "--config", "key.toml"), 2, r"key.toml: workers.blnk: there is no such key"),
    (("serve", "--config", "bool.toml"), 2, r"bool.toml: host.stand_in: is true or false"),
    (("serve", "--config", "count.toml"), 2, r"count.toml: workers.blank: .*greater than or"),
    (("serve", "--config", "path.toml"), 2, r"path.toml: paths.state: is a path that begins"),
    ((*AUTHORIZE, "--config", "good.toml"), 3, "this host is not initialised: run holdfast init"),
    ((*AUTHORIZE, "--config", "user.toml"), 6, "no user hf:nobody: run holdfast init"),
    (
        ("init", "--recovery-recipient", "bin", "--out", "out", "--config", "good.toml"),
        2, "nor a file with one",
    ),
    (
        ("init", "--recovery-recipient", "key", "--out", "bin", "--config", "good.toml"),
        2, "bin: File exists",
    ),
    (
        ("init", "--recovery-recipient", "key", "--out", "out", "--config", "good.toml",
         "--owner-auth", "nothere"),
        2, "nothere: No such file",
    ),
    (
        ("init", "--recovery-recipient", "key", "--out", "out", "--config", "good.toml",
         "--owner-auth", "policy.toml"),
        2, "at most 32 bytes",
    ),
    (
        ("init", "--recovery-recipient", "key", "--out", "out", "--config", "good.toml"),
        6, "host TPM",
    ),
    (
        ("init", "--recovery-recipient", "key", "--out", "out", "--config", "good.toml",
         "--site", "-x", "--pcrs", "-1"),
        2, "PCRs 0 to 23",
    ),
]  # fmt: skip


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with everything that can be wrong, and no daemon."""
    files = {
        "bin": b"\xff\xfe\x00bin", "empty": b"", "bad.toml": b"[host\n",
        "type.toml": b"[host]\ntcti = 5\n", "section.toml": b"host = 3\n",
        "key.toml": b"[workers]\nblnk = 1\n", "bool.toml": b'[host]\nstand_in = "no"\n',
        "count.toml": b"[workers]\nblank = -1\n", "path.toml": b'[paths]\nstate = "state"\n',
        "deep.json": b"[" * 100_000,
        "policy.toml": policy_text(HOST).encode(),
        "pem.toml": policy_text(HOST).replace("[trust]", PEM_MISSING, 1).encode(),
        "evidence": make(Given(WEB)).encode_json(),
        "key": b"age1ql3z7hjy54pw3hyww5ayyfg7zqgvc7w3j2elw8zmrj2kg5sfn9aqmcac8p\n",
    }  # fmt: skip
    paths = f'[paths]\nstate = "{tmp_path}/state"\nrun = "{tmp_path}/run"\n'
    tcti = f'[host]\ntcti = "swtpm:path={tmp_path}/no-tpm.sock"\nstand_in = true\n'
    files["good.toml"] = f'{tcti}{paths}[keeper]\nuser = "root"\n'.encode()
    files["user.toml"] = f'{tcti}{paths}[keeper]\nuser = "hf:nobody"\n'.encode()
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "directory").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "unreadable.pem").mkdir()  # beside the policy; no policy names it
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOLDFAST_SOCKET", str(tmp_path / "none.sock"))
    return tmp_path


def never(*_: object) -> None:
    raise AssertionError("nothing is to be run")


def called(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], arguments: tuple[str, ...]
) -> tuple[int, str, str]:
    given = ["evidence" if argument == "EVIDENCE" else argument for argument in arguments]
    monkeypatch.setattr(sys, "argv", ["holdfast", *given])
    monkeypatch.setattr(os, "execv", never)  # `serve` would take the place of the tests
    with pytest.raises(SystemExit) as ended:
        run()
    out, err = capfd.readouterr()
    assert isinstance(ended.value.code, int)
    return ended.value.code, out, err


def one_line(err: str) -> str:
    assert "Traceback" not in err
    assert err.startswith("holdfast: "), err
    assert err.count("\n") == 1, err
    assert err.endswith("\n"), err
    return err


@pytest.mark.parametrize(("arguments", "code", "why"), HERE)
def test_what_is_wrong_is_said_in_one_line(
    place: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str],
    arguments: tuple[str, ...], code: int, why: str,
) -> None:  # fmt: skip
    ended, out, err = called(monkeypatch, capfd, arguments)
    assert re.search(why, one_line(err)), err
    assert (ended, out) == (code, "")


@needs_root
@pytest.mark.parametrize(("arguments", "code", "why"), AS_ROOT)
def test_what_is_wrong_with_the_host_is_said_in_one_line(
    place: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str],
    arguments: tuple[str, ...], code: int, why: str,
) -> None:  # fmt: skip
    ended, out, err = called(monkeypatch, capfd, arguments)
    assert re.search(why, one_line(err)), err
    assert (ended, out) == (code, "")
    assert not (place / "state" / "keeper" / "vault.json").exists()


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00bin", b"{}", b"[" * 100_000])
def test_evidence_that_is_none_is_refused_at_its_form(
    place: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], content: bytes
) -> None:
    (place / "evidence").write_bytes(content)
    ended, out, err = called(monkeypatch, capfd, (*VERIFY, "policy.toml"))
    assert (ended, err) == (7, "")
    assert out.startswith("refused at step form: ")
    assert out.count("\n") == 1


@contextmanager
def as_nobody() -> Iterator[None]:
    """As a user for whom modes count."""
    if not IS_ROOT:
        yield
        return
    os.setegid(NOBODY)
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ((*VERIFY, "policy.toml"), "evidence: Permission denied"),
        (("verify", "directory/x", *VERIFY[2:], "policy.toml"), "directory/x: Permission denied"),
        (("init", "--recovery-recipient", "key", "--out", "out"), "init is for root"),
        (("serve",), "serve is for root"),
        (AUTHORIZE, "policy authorize is for root"),
        (("recover",), "recover is for root"),
        (("backup", "web", "--out", "out"), "backup is for root"),
        (("backup", "restore", "f", "--identity", "k", "--reason", "r"), "restore is for root"),
    ],
)
def test_what_may_not_be_read_or_done_is_said_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], place: Path,
    arguments: tuple[str, ...], why: str,
) -> None:  # fmt: skip
    for path in (place, *place.parents):
        if (
            path != Path("/tmp")
            and path.stat().st_uid == os.getuid()
            and path.is_relative_to("/tmp")
        ):
            path.chmod(0o755)
    (place / "evidence").chmod(0)
    (place / "directory").chmod(0)
    try:
        with as_nobody():
            ended, out, err = called(monkeypatch, capfd, arguments)
    finally:
        (place / "directory").chmod(0o700)
    assert why in one_line(err)
    assert (ended, out) == (5, "")


def test_who_may_not_connect_to_the_daemon_is_told_so(
    place: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (place / "none.sock").write_text("no socket")
    ended, _, err = called(monkeypatch, capfd, ("ls",))
    assert "none.sock (Connection refused)" in one_line(err)
    assert ended == 6
    monkeypatch.setenv("HOLDFAST_SOCKET", "/" + "x" * 200)
    ended, _, err = called(monkeypatch, capfd, ("ls",))
    assert "path too long" in one_line(err)
    assert ended == 6


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (b"", "went away"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", "went away"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi", "answered no JSON"),
        (b"HTTP/1.1 500 Oops\r\nContent-Length: 2\r\n\r\n[]", "refused without saying why"),
    ],
)
def test_who_is_no_daemon_is_told_from_one(
    place: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str],
    answer: bytes, why: str,
) -> None:  # fmt: skip
    def serve(listener: socket.socket) -> None:
        sock, _ = listener.accept()
        with sock:
            sock.recv(65536)
            sock.sendall(answer)

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("none.sock")
        listener.listen()
        thread = threading.Thread(target=serve, args=(listener,))
        thread.start()
        ended, _, err = called(monkeypatch, capfd, ("ls",))
        thread.join()
    assert why in one_line(err)
    assert ended == 6


# --- output that nobody reads, and ends that somebody else brings about --------------------------


def test_output_that_nobody_reads_ends_quietly(place: Path) -> None:
    for arguments in (("version",), ("version", "--json"), ("--help",)):
        read, write = os.pipe()
        os.close(read)
        done = subprocess.run(
            [PROGRAM, *arguments], stdout=write, stderr=subprocess.PIPE, timeout=30, check=False
        )
        os.close(write)
        assert (done.returncode, done.stderr) == (1, b""), arguments


def test_output_for_which_there_is_no_room_is_an_error(place: Path) -> None:
    for arguments in (("version",), ("version", "--json")):
        with Path("/dev/full").open("wb") as full:
            done = subprocess.run(
                [PROGRAM, *arguments], stdout=full, stderr=subprocess.PIPE, timeout=30, check=False
            )
        assert done.returncode == 6, arguments
        assert "standard output: No space left" in one_line(done.stderr.decode())


def test_closed_descriptors_are_no_error(place: Path) -> None:
    for closed in (">&-", "2>&-", "<&- >&- 2>&-"):
        done = subprocess.run(
            ["sh", "-c", f'"$0" version {closed}', PROGRAM],
            capture_output=True, timeout=30, check=False,
        )  # fmt: skip
        assert (done.returncode, done.stderr) == (0, b""), closed


def test_a_character_that_the_terminal_lacks_is_no_error(place: Path) -> None:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind("none.sock")
    listener.listen()
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    body = '{"name": "w\u00e9b", "state": "off"}'.encode()

    def serve() -> None:
        sock, _ = listener.accept()
        with sock:
            request = sock.recv(65536)
            while not request.endswith(b"{}"):
                request += sock.recv(65536)
            sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body)

    thread = threading.Thread(target=serve)
    thread.start()
    done = subprocess.run(
        [PROGRAM, "stop", "web"], env=environment, capture_output=True, timeout=30, check=False
    )
    thread.join()
    listener.close()
    assert (done.returncode, done.stdout, done.stderr) == (0, b"w\\xe9b is off\n", b"")


def test_interrupted_it_ends_with_130_and_nothing_else(place: Path) -> None:
    """Interrupted while it waits for a daemon that does not answer, as by Ctrl-C."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("none.sock")
        listener.listen()
        with subprocess.Popen(
            [PROGRAM, "ls"], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            start_new_session=True,
        ) as process:  # fmt: skip
            listener.settimeout(20)
            sock, _ = listener.accept()
            with sock, suppress(OSError):
                sock.recv(65536)
                os.killpg(process.pid, signal.SIGINT)
                out, err = process.communicate(timeout=20)
    assert (process.returncode, out, err) == (130, b"", b"")


def test_interrupted_while_a_file_is_awaited_it_ends_with_130(place: Path) -> None:
    os.mkfifo("fifo")
    with (
        subprocess.Popen(
            [PROGRAM, "verify", "fifo", "--policy", "policy.toml", "--nonce", NONCE.hex()],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
        ) as process,
        Path("fifo").open("wb"),  # opens when the other side does
    ):  # fmt: skip
        os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=20)
    assert (process.returncode, out, err) == (130, b"", b"")


def test_without_a_daemon_doctor_says_what_can_be_seen_and_what_is_to_be_done_next(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], place: Path
) -> None:
    """What a host lacks is asked most often before Holdfast runs on it."""
    code, out, err = called(monkeypatch, capfd, ("doctor", "--config", "good.toml", "--json"))
    assert (code, err) == (6, "")
    said = {found["what"]: (found["level"], found["says"]) for found in json.loads(out)["findings"]}
    assert said["daemon"] == ("problem", "this host is not set up yet: holdfast init")
    missing = f"there is no {place}/no-tpm.sock: start what serves it"
    assert said["host TPM"] == ("problem", missing)
    (place / "no-tpm.sock").touch()
    (place / "state" / "keeper").mkdir(parents=True)
    code, out, _ = called(monkeypatch, capfd, ("doctor", "--config", "good.toml"))
    assert code == 6
    assert "problem daemon: it does not run: holdfast serve" in out
    assert f"ok host TPM: {place}/no-tpm.sock is there\n" in out
    assert "ok library: libtpms.so" in out
    assert "vTPMs:" not in out
