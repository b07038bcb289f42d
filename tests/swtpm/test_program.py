"""`holdfast-swtpm` as its drivers meet it: libvirt, Incus, swtpm_setup, QEMU, shell scripts."""

from __future__ import annotations

import array
import json
import os
import signal
import socket
import subprocess
from pathlib import Path

import pytest
from cryptography import x509

from holdfast.protocol.control import Command
from holdfast.tpm2 import requests as rq
from holdfast.tpm2.constants import Rc
from holdfast.tpm2.wire import u32
from tests.asking import until

from .program import OURS, SECONDS, SETUP, STARTED, THEIRS, Program, refused, running

SET_LOCALITY = bytes.fromhex("80010000000b20001000")
FAILURE = rq.error_response(Rc.FAILURE)


@pytest.fixture
def program(tmp_path: Path) -> Program:
    return Program(tmp_path)


# --- what is probed before anything is started ------------------------------------------------


def test_capabilities_are_those_that_drivers_look_for() -> None:
    done = subprocess.run(
        [*OURS, "socket", "--tpm2", "--print-capabilities"],
        capture_output=True, text=True, timeout=SECONDS, check=True,
    )  # fmt: skip
    said = json.loads(done.stdout)
    assert said["type"] == "swtpm"
    assert {"tpm-2.0", "cmdarg-seccomp", "cmdarg-key-fd", "cmdarg-pwd-fd", "flags-opt-startup",
            "cmdarg-print-states", "nvram-backend-dir", "cmdarg-migration"} <= set(
        said["features"]
    )  # fmt: skip
    assert "tpm-1.2" not in said["features"]


def test_what_came_with_profiles_is_said_to_be_there_where_it_is() -> None:
    """Debian 12's libtpms has none; lab/test_newer_libtpms.py runs on one that has."""
    said = {}
    for program in (OURS, (SETUP,)):
        done = subprocess.run(
            [*program, *(("socket",) if program == OURS else ()), "--tpm2", "--print-capabilities"],
            capture_output=True, text=True, timeout=SECONDS, check=True,
        )  # fmt: skip
        said = json.loads(done.stdout)
        assert not [name for name in said["features"] if "profile" in name or "info" in name]
        assert "profiles" not in said


def test_information_is_of_the_library_and_leaves_nothing(tmp_path: Path) -> None:
    def info(*options: str) -> object:
        done = subprocess.run(
            [*OURS, "socket", "--tpm2", "--print-info", "7", *options], cwd=tmp_path,
            capture_output=True, text=True, timeout=SECONDS, check=True,
        )  # fmt: skip
        return json.loads(done.stdout)

    without = info()
    assert isinstance(without, dict)
    assert without["TPMAttributes"]["manufacturer"] == "id:00001014"
    (tmp_path / "state").mkdir()
    assert info("--tpmstate", "dir=state") == without
    assert info("--tpmstate", "backend-uri=file://one") == without
    assert [path.name for path in tmp_path.rglob("*")] == ["state"]
    with running(Program(tmp_path), *STARTED):
        before = (tmp_path / "state" / "tpm2-00.permall").read_bytes()
        assert isinstance(beside := info("--tpmstate", "dir=state"), dict)
        assert beside["TPMAttributes"] == without["TPMAttributes"]
        assert (tmp_path / "state" / "tpm2-00.permall").read_bytes() == before


def test_help_lists_what_is_probed_there_too() -> None:
    for interface in ("socket", "chardev"):
        done = subprocess.run(
            [*OURS, interface, "--help"], capture_output=True, text=True, timeout=SECONDS,
            check=True,
        )  # fmt: skip
        assert "--seccomp" in done.stdout
        assert "--migration-key" in done.stdout
    version = subprocess.run([*OURS, "--version"], capture_output=True, text=True, check=True)
    assert version.stdout.startswith("TPM emulator version ")


@pytest.mark.parametrize("linear", [False, True])
def test_states_are_printed_with_their_sizes(program: Program, linear: bool) -> None:
    place = "backend-uri=file://" + str(program.directory / "one") if linear else "dir=state"
    program.state = ("--tpmstate", place)
    asked = [*OURS, "socket", "--tpm2", "--tpmstate", place, "--print-states"]

    def states() -> object:
        done = subprocess.run(
            asked, cwd=program.directory, capture_output=True, text=True, check=True
        )
        return json.loads(done.stdout)

    (program.directory / "state").mkdir()
    assert states() == {"type": "swtpm", "states": []}
    with running(program, *STARTED):
        program.ioctl("-v")
        found = states()
    assert isinstance(found, dict)
    assert [state["name"] for state in found["states"]] == ["permall", "volatilestate"]
    assert all(state["size"] > 1000 for state in found["states"])


# --- its process ------------------------------------------------------------------------------


def test_the_started_process_is_the_one_it_says(program: Program) -> None:
    with running(program, "--pid", f"file={program.directory / 'pid'}"):
        assert program.process is not None
        pid = int((program.directory / "pid").read_text())
        assert pid == program.process.pid
        status = Path(f"/proc/{pid}/status").read_text()
        assert "Name:\tswtpm\n" in status
        assert "Seccomp:\t2\n" in status
        assert "NoNewPrivs:\t1\n" in status
        assert program.shut_down() == 0
    assert sorted(path.name for path in program.directory.iterdir()) == ["state"]


def test_in_the_background_it_is_ready_when_its_parent_has_ended(program: Program) -> None:
    directory = program.directory
    (directory / "state").mkdir()
    started = subprocess.run(
        [*OURS, "socket", "--tpm2", "--daemon", "--tpmstate", "dir=state",
         "--ctrl", "type=unixio,path=data.ctrl", "--pid", "file=pid", "--log", "file=log"],
        cwd=directory, timeout=SECONDS, check=True,
    )  # fmt: skip
    assert started.returncode == 0
    pid = int((directory / "pid").read_text())
    os.kill(pid, 0)
    assert program.ask(u32(Command.INIT) + u32(0)) == u32(0)  # a relative directory works
    assert program.ask(u32(Command.SHUTDOWN)) == u32(0)
    until("its pid file is gone", lambda: not (directory / "pid").exists(), SECONDS)
    assert (directory / "log").read_text() == "swtpm: ready\nswtpm: ended\n"
    assert (directory / "state" / "tpm2-00.permall").exists()


def test_in_the_background_what_goes_wrong_is_still_told(tmp_path: Path) -> None:
    state = tmp_path / "state"
    state.mkdir()
    (state / "tpm2-00.permall").write_bytes(b"no TPM's state")
    said = refused(
        tmp_path, "socket", "--tpm2", "--daemon", "--tpmstate", "dir=state",
        "--server", "type=unixio,path=data", *STARTED,
    )  # fmt: skip
    assert said.startswith(f"swtpm: {state}/tpm2-00.permall: TPM state: ")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_in_order(program: Program, number: signal.Signals) -> None:
    for expected_safe in (True, True):
        with running(program, *STARTED):
            clock = program.send(rq.command(rq.Cc.ReadClock))
            assert bool(clock[-1]) == expected_safe
            assert program.process is not None
            program.process.send_signal(number)
            assert program.ended() == 0
    assert not program.control.exists()


def test_without_its_own_shutdown_the_clock_is_not_safe(program: Program) -> None:
    flags = ("--flags", "not-need-init,startup-clear,disable-auto-shutdown")
    with running(program, *flags):
        program.shut_down()
    with running(program, *flags):
        assert program.send(rq.command(rq.Cc.ReadClock))[-1] == 0


def test_no_two_run_on_one_state(program: Program, tmp_path: Path) -> None:
    with running(program, *STARTED):
        for command in (OURS, THEIRS):
            other = subprocess.run(
                [*command, "socket", "--tpm2", "--tpmstate", f"dir={tmp_path / 'state'}",
                 "--server", f"type=unixio,path={tmp_path / 'other'}", *STARTED],
                capture_output=True, text=True, timeout=SECONDS, check=False,
            )  # fmt: skip
            assert other.returncode != 0
            assert "lock" in other.stderr
    with running(Program(tmp_path, THEIRS), *STARTED):
        said = refused(
            tmp_path, "socket", "--tpm2", "--tpmstate", "dir=state",
            "--server", "type=unixio,path=other",
        )  # fmt: skip
        assert "Could not lock access to lockfile" in said


# --- descriptors that are handed over ---------------------------------------------------------


def test_inherited_descriptors_are_served(program: Program) -> None:
    data, their_data = socket.socketpair()
    control, their_control = socket.socketpair()
    with data, control:
        with their_data, their_control:
            (program.directory / "state").mkdir()
            program.process = subprocess.Popen(
                [*OURS, "socket", "--tpm2", "--tpmstate", "backend-uri=dir://state,lock",
                 "--server", f"type=tcp,fd={their_data.fileno()}",
                 "--ctrl", f"type=unixio,clientfd={their_control.fileno()}", *STARTED],
                pass_fds=(their_data.fileno(), their_control.fileno()), cwd=program.directory,
                stderr=subprocess.PIPE, text=True,
            )  # fmt: skip
        for sock in (data, control):
            sock.settimeout(SECONDS)
        data.sendall(rq.get_random(8))
        assert len(data.recv(4096)) == 20
        control.sendall(u32(Command.SHUTDOWN))
        assert control.recv(64) == u32(0)
        assert program.ended() == 0


def test_an_inherited_listener_is_served(program: Program) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.fspath(program.directory / "data.ctrl"))
        listener.listen()
        (program.directory / "state").mkdir()
        program.process = subprocess.Popen(
            [*OURS, "socket", "--tpm2", "--tpmstate", "dir=state",
             "--ctrl", f"type=unixio,fd={listener.fileno()}"],
            pass_fds=(listener.fileno(),), cwd=program.directory,
            stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
    assert program.ask(u32(Command.GET_CONFIG)) == u32(0) + u32(0)
    assert program.shut_down() == 0


def test_a_data_descriptor_comes_by_the_control_channel_once(program: Program) -> None:
    with running(program), socket.socket(socket.AF_UNIX) as control:
        control.settimeout(SECONDS)
        control.connect(os.fspath(program.control))

        def hand_over() -> tuple[bytes, socket.socket]:
            mine, theirs = socket.socketpair()
            with theirs:
                rights = array.array("i", [theirs.fileno()])
                control.sendmsg(
                    [u32(Command.SET_DATAFD)],
                    [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights.tobytes())],
                )
                return control.recv(64), mine

        result, data = hand_over()
        with data:
            assert result == u32(0)
            data.sendall(rq.command(rq.Cc.ReadClock))
            assert data.recv(64) == FAILURE  # QEMU's probe, before INIT: tag 0x8001, 0x101
            second, other = hand_over()
            assert second == u32(0x1F)
            with other:
                assert other.recv(1) == b""
        control.sendall(u32(Command.SET_DATAFD))
        assert control.recv(64) == u32(0x03)  # without a descriptor

        def taken() -> bool:  # once it has been seen that the first has gone
            again, data = hand_over()
            data.close()
            return again == u32(0)

        program.wait_for(taken)


@pytest.mark.parametrize("which", ["data", "control"])
def test_it_ends_with_the_connection_that_it_is_to_end_with(program: Program, which: str) -> None:
    if which == "data":
        program.start("--terminate", *STARTED)
        path = program.data
    else:
        program.directory.joinpath("state").mkdir()
        program.process = subprocess.Popen(
            [*OURS, "socket", "--tpm2", "--tpmstate", "dir=state",
             "--ctrl", "type=unixio,path=data.ctrl,terminate"],
            cwd=program.directory, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        program.wait_for(program.control.is_socket)
        path = program.control
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(os.fspath(path))
    assert program.ended() == 0


# --- TPM commands -----------------------------------------------------------------------------


def test_a_connection_for_each_command_where_that_is_asked_for(program: Program) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (program.directory / "state").mkdir()
    program.process = subprocess.Popen(
        [*OURS, "socket", "--tpm2", "--tpmstate", "dir=state", "--port", str(port), *STARTED],
        cwd=program.directory, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip

    def served() -> bool:
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=SECONDS) as sock:
                sock.sendall(rq.get_random(8))
                assert len(sock.recv(4096)) == 20
                assert sock.recv(1) == b""
        except ConnectionRefusedError:
            return False
        return True

    program.wait_for(served)
    assert served()
    program.kill()


def test_locality_by_prefix_by_control_and_in_band(program: Program) -> None:
    digest = bytes(32)
    extend = rq.pcr_extend(20, {rq.Alg.SHA256: digest})  # localities 1, 2 and 3 may
    locality_refused = rq.error_response(Rc.LOCALITY)
    with running(program, *STARTED, "--locality", "reject-locality-4"):
        assert program.send(extend) == locality_refused
        for locality, answer in ((2, bytes(4)), (0, b"\0\0\x09\x07"), (4, b"\0\0\x09\x07")):
            framed = u32(8) + bytes([locality]) + u32(len(extend)) + extend
            response = program.send(framed)
            assert response[:4] == u32(len(response) - 8)
            assert response[10:14] == answer
            assert response[-4:] == u32(0)
        assert program.ask(u32(Command.SET_LOCALITY) + b"\2") == u32(0)
        assert program.send(extend)[6:10] == bytes(4)
        assert program.ask(u32(Command.SET_LOCALITY) + bytes(4)) == u32(0)
        assert program.send(extend) == locality_refused
        for too_high in (4, 5, 255):
            assert program.ask(u32(Command.SET_LOCALITY) + bytes([too_high])) == u32(0x3D)
        assert program.send(SET_LOCALITY + b"\2") == FAILURE
        assert program.send(extend) == locality_refused
    with running(program, *STARTED, "--locality", "allow-set-locality"):
        assert program.send(SET_LOCALITY + b"\2")[6:10] == bytes(4)
        assert program.send(extend)[6:10] == bytes(4)


@pytest.mark.parametrize(
    "frame",
    [b"\x80\x01\0\0\0\x09\0\0\x01\x81", b"\x80\x01\0\0\x10\x01", b"GET / HTTP/1.1\r\n\r\n",
     u32(8) + b"\0" + u32(9), u32(8) + b"\0" + u32(4097), u32(20)],
)  # fmt: skip
def test_what_is_no_command_ends_the_connection_and_nothing_else(
    program: Program, frame: bytes
) -> None:
    with running(program, *STARTED):
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(SECONDS)
            sock.connect(os.fspath(program.data))
            sock.sendall(frame.ljust(10, b"\0"))
            assert sock.recv(64) == rq.error_response(Rc.COMMAND_SIZE)
            assert sock.recv(1) == b""
        assert len(program.send(rq.get_random(8))) == 20


def test_a_command_of_tpm_1_2_is_answered_as_swtpm_does(program: Program) -> None:
    asked = bytes.fromhex("00c10000000a000000f1")  # so firmware and QEMU find out what it is
    with running(program, *STARTED):
        ours = program.send(asked)
        program.shut_down()
    with running(Program(program.directory, THEIRS), *STARTED) as theirs:
        assert theirs.send(asked) == ours
    assert ours[6:10] != bytes(4)


def test_split_and_pipelined_commands_are_answered_each(program: Program) -> None:
    with running(program, *STARTED), socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(SECONDS)
        sock.connect(os.fspath(program.data))
        one = rq.get_random(8)
        framed = u32(8) + b"\0" + u32(len(one)) + one
        stream = one + framed + one
        for cut in range(1, len(stream)):
            sock.sendall(stream[:cut])
            sock.sendall(stream[cut:])
            answers = b""
            while len(answers) < 20 + 28 + 20:
                answers += sock.recv(4096)
            assert answers[20:24] == u32(20)


# --- swtpm_setup ------------------------------------------------------------------------------


def test_debian_s_swtpm_setup_makes_a_tpm_with_us(program: Program) -> None:
    directory = program.directory
    (directory / "state").mkdir()
    done = subprocess.run(
        ["swtpm_setup", "--tpm2", "--tpm-state", "state", "--tpm", f"{OURS[0]} socket",
         "--create-ek-cert", "--create-platform-cert", "--lock-nvram", "--overwrite"],
        cwd=directory, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    with running(program, *STARTED):
        handles = program.tool("tpm2_getcap", "handles-persistent").split()
        assert "0x81010001" in handles
        program.tool("tpm2_nvread", "-o", "certificate", "0x01c00002")
        x509.load_der_x509_certificate((directory / "certificate").read_bytes())


# --- what is refused --------------------------------------------------------------------------

CTRL = ("--ctrl", "type=unixio,path=c")


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ((), "--tpmstate option is required"),
        (("--tpmstate", "dir=nowhere", *CTRL), "Could not open TPM state directory"),
        (("--tpmstate", "dor=state", *CTRL), "tpmstate options: Unknown option 'dor=state'"),
        (("--tpmstate", "dir=state,dir=x", *CTRL), "'dir' is given twice"),
        (("--tpmstate", "dir=state,backend-uri=dir://x", *CTRL), "one of dir, backend-uri"),
        (("--tpmstate", "backend-uri=http://x", *CTRL), "neither dir:// nor file://"),
        (("--tpmstate", "dir=state,mode=0999", *CTRL), "mode '0999' is not a valid number"),
        (("--tpmstate", "dir=state,backup", *CTRL), "Unknown option 'backup'"),
        (("--tpmstate", "dir=state,fsync=false", *CTRL), "fsync=false is not offered"),
        (("--tpmstate", "dir=state"), "--server, --port, --fd or --ctrl is needed"),
        (("--tpmstate", "dir=state", "--frob", *CTRL), "unrecognized arguments: --frob"),
        (("--tpmstate", "dir=state", "--profile", "x", *CTRL), "Unknown option 'x'"),
        (("--tpmstate", "dir=state", "--profile", "name=null", *CTRL), "needs libtpms 0.10"),
        (("--tpmstate", "dir=state", "--profile", "name=x,file=y", *CTRL), "one of name, profile"),
        (("--tpmstate", "dir=state", "--profile", 'profile={"Name":"x"', *CTRL), "Unterminated"),
        (("--tpmstate", "dir=state", "--profile", "profile={}x", *CTRL), "following JSON map"),
        (("--tpmstate", "dir=state", "--profile", "fd=2", *CTRL), "greater than 2"),
        (("--tpmstate", "dir=state", "--profile", "name=x,remove-disabled=y", *CTRL), "'y' for"),
        (("--print-profiles",), "--print-profiles needs libtpms 0.10 or newer, and this is 0.9"),
        (("--print-info", "0x20"), "--print-info 0x20 needs libtpms 0.10 or newer"),
        (("--print-info", "all"), "Cannot parse info value 'all'."),
        (("--tpmstate", "dir=state", "--flags", "frob", *CTRL), "Unknown option 'frob'"),
        (("--tpmstate", "dir=state", "--flags", "startup-clear,startup-state", *CTRL), "at most"),
        (("--tpmstate", "dir=state", "--locality", "x", *CTRL), "Unknown option 'x'"),
        (("--tpmstate", "dir=state", "--ctrl", "type=carrier"), "is not unixio or tcp"),
        (("--tpmstate", "dir=state", "--ctrl", "type=unixio"), "unixio needs path"),
        (("--tpmstate", "dir=state", "--ctrl", "type=tcp"), "tcp needs port"),
        (("--tpmstate", "dir=state", "--ctrl", "type=tcp,port=65536"), "not a valid number"),
        (("--tpmstate", "dir=state", "--ctrl", "type=tcp,port=-1"), "not a valid number"),
        (("--tpmstate", "dir=state", "--ctrl", "type=unixio,fd=1"), "greater than 2"),
        (("--tpmstate", "dir=state", "--ctrl", "type=unixio,fd=999"), "is no socket"),
        (("--tpmstate", "dir=state", "--ctrl", "type=unixio,path=no/such/place"), "Could not open"),
        (("--tpmstate", "dir=state", "--ctrl", "type=unixio,path=" + "x" * 108), "longer than 107"),
        (("--tpmstate", "dir=state", "--key", "file=nokey", *CTRL), "Unable to open file nokey"),
        (("--tpmstate", "dir=state", "--key", "file=short", *CTRL), "has 8 bits"),
        (("--tpmstate", "dir=state", "--key", "file=words", *CTRL), "is not hexadecimal"),
        (("--tpmstate", "dir=state", "--key", "pwdfile=empty", *CTRL), "is empty"),
        (("--tpmstate", "dir=state", "--key", "file=x,mode=des", *CTRL), "mode 'des'"),
        (("--tpmstate", "dir=state", "--key", "mode=aes-cbc", *CTRL), "one of file, fd"),
        (("--tpmstate", "dir=state", "--log", "file=l,level=20", *CTRL), "with their secrets"),
        (("--tpmstate", "dir=state", "--log", "file=no/such/log", *CTRL), "Could not open logfile"),
        (("--tpmstate", "dir=state", "--pid", "file=no/such/pid", *CTRL), "Could not write pid"),
        (("--tpmstate", "dir=state", "--seccomp", "action=maim", *CTRL), "'maim' is not known"),
        (("--tpmstate", "dir=state", "--runas", "nobody-at-all", *CTRL), "does not exist"),
        (("--tpmstate", "dir=state", "--port", "1", "--fd", "5", *CTRL), "exclude each other"),
    ],
)
def test_what_we_do_not_have_is_said_and_nothing_is_left(
    tmp_path: Path, options: tuple[str, ...], why: str
) -> None:
    (tmp_path / "state").mkdir()
    for name, text in (("short", "00"), ("words", "no key at all"), ("empty", "")):
        (tmp_path / name).write_text(text)
    before = sorted(tmp_path.rglob("*"))
    said = refused(tmp_path, "socket", "--tpm2", *options)
    assert said.startswith("swtpm: ")
    assert why in said
    assert said.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_only_tpm_2_is_offered(tmp_path: Path) -> None:
    assert "--tpm2" in refused(tmp_path, "socket", "--tpmstate", "dir=.", *CTRL)
    assert "Unsupported TPM interface type 'cuse'" in refused(tmp_path, "cuse")
    chardev = refused(tmp_path, "chardev", "--tpm2", "--tpmstate", "dir=.", "--vtpm-proxy")
    assert "/dev/vtpmx" in chardev or Path("/dev/vtpmx").exists()
