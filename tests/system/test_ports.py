"""A vTPM on ports of its container's network, where tpm2-tss looks by itself."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from holdfast.errors import InvalidInput
from holdfast.frontend.ports import COMMANDS, CONTROLS
from holdfast.protocol.mssim import Signal
from holdfast.tpm2 import requests as rq
from holdfast.tpm2.constants import Rc
from holdfast.tpm2.wire import u32
from tests.asking import until

from .serve import IMAGE, PODMAN, Serve, a_host, build_images, container

pytestmark = [
    pytest.mark.needs_root,
    pytest.mark.skipif(os.geteuid() != 0, reason="containers of the system need root"),
    pytest.mark.skipif(not shutil.which("podman"), reason="podman is not installed"),
]

ASK = """
import socket, sys
with socket.create_connection(("127.0.0.1", int(sys.argv[1])), timeout=20) as sock:
    sock.sendall(bytes.fromhex(sys.argv[2]))
    print(sock.recv(4096).hex())
"""


@pytest.fixture(scope="module")
def host() -> Iterator[Serve]:
    build_images()
    with a_host(cdi=Path("/run/cdi")) as made:
        yield made


def pid_of(name: str) -> str:
    command = ["podman", "inspect", "--format", "{{.State.Pid}}", name]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def inside(pid: str, *command: str, check: bool = True) -> str:
    """Run a program of the host's in the container's network, with nothing said of a TPM."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("TPM2TOOLS", "TCTI"))}
    done = subprocess.run(
        ["nsenter", "-t", pid, "-n", *command], env={**environment, "TSS2_LOG": "all+NONE"},
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert not check or done.returncode == 0, done.stderr
    return done.stdout if check else str(done.returncode)


def ask(pid: str, port: int, request: bytes) -> bytes:
    return bytes.fromhex(inside(pid, "python3", "-c", ASK, str(port), request.hex()))


def framed(locality: int, command: bytes) -> bytes:
    return u32(Signal.SEND_COMMAND) + bytes((locality,)) + u32(len(command)) + command


def test_tpm2_tss_finds_it_by_itself(host: Serve) -> None:
    name = f"ports-{os.getpid()}"
    host.create(name, "linked", ports="swtpm")
    for _ in range(2):  # the ports go with each run
        with container(name) as running:
            pid = pid_of(running)
            assert len(inside(pid, "tpm2_getrandom", "--hex", "8")) == 16
            inside(pid, "tpm2_createprimary", "-Q", "-c", "/dev/null")
            assert ask(pid, CONTROLS, u32(1))[:4] == u32(0)
            assert ask(pid, CONTROLS, u32(2) + u32(0)) == u32(0x0A)  # INIT is the host's
            refused = ask(pid, COMMANDS, framed(0, rq.get_random(8)))
            assert refused == rq.error_response(Rc.COMMAND_SIZE)  # no prefix in a container
            tool = ["tpm2_getrandom", "--hex", "8", "-T", "swtpm:port=2321"]
            in_it = subprocess.run(
                ["podman", "exec", running, *tool], capture_output=True, text=True, check=False
            )
            assert len(in_it.stdout) == 16, in_it.stderr
        until("it is off", lambda: host.inspect(name)["state"] == "off")
    with socket.socket() as sock:  # on the host itself nobody listens
        assert sock.connect_ex(("127.0.0.1", COMMANDS)) != 0


def test_the_simulator_s_protocol_is_spoken_and_its_signals_do_nothing(host: Serve) -> None:
    name = f"mssim-{os.getpid()}"
    host.create(name, "linked", ports="mssim")
    with container(name) as running:
        pid = pid_of(running)
        tcti = "mssim:host=127.0.0.1,port=2321"
        assert len(inside(pid, "tpm2_getrandom", "-T", tcti, "--hex", "8")) == 16
        before = inside(pid, "tpm2_readclock", "-T", tcti)
        for signal in Signal:
            if signal in (Signal.SESSION_END, Signal.STOP, Signal.REMOTE_HANDSHAKE):
                continue
            if signal in (5, 6, 7, 8):  # of the command port
                continue
            assert ask(pid, CONTROLS, u32(signal)) == u32(0), signal
        for unknown in (0, 19, 20, 21, 99, 0xFFFFFFFF):
            assert ask(pid, CONTROLS, u32(unknown)) == b""
        after = inside(pid, "tpm2_readclock", "-T", tcti)
        lines = [[line for line in text.split("\n") if "count" in line] for text in (before, after)]
        assert lines[0] == lines[1]  # neither reset nor restarted
        random = rq.get_random(8)
        for locality in (1, 2, 3, 4, 32, 255):
            answer = ask(pid, COMMANDS, framed(locality, random))
            assert answer == u32(10) + rq.error_response(Rc.LOCALITY) + u32(0)
        assert len(ask(pid, COMMANDS, framed(0, random))) == 4 + 20 + 4
        assert ask(pid, COMMANDS, u32(15) + u32(1)) == u32(1) + u32(4) + u32(0)
        for lie in (u32(20), framed(0, b""), u32(8) + b"\0" + u32(4097), u32(5), u32(99), random):
            assert ask(pid, COMMANDS, lie) == b""
        assert len(inside(pid, "tpm2_getrandom", "-T", tcti, "--hex", "8")) == 16


def test_a_container_in_the_host_s_network_gets_no_ports(host: Serve) -> None:
    name = f"hostnet-{os.getpid()}"
    host.create(name, "linked", ports="swtpm")
    options = [option for option in PODMAN if option not in ("--network", "none")]
    done = subprocess.run(
        [*options, "--rm", f"--device=holdfast.dev/vtpm={name}", "--network=host", IMAGE, "true"],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode != 0
    assert "the container has the host's network" in done.stderr
    assert host.inspect(name)["state"] == "off"
    with container(name):
        assert host.inspect(name)["state"] == "active"


def test_ports_are_of_two_kinds_and_a_container_s(host: Serve) -> None:
    with pytest.raises(InvalidInput, match="swtpm or mssim"):
        host.create("ftp", "linked", ports="ftp")
    with pytest.raises(InvalidInput, match="no container"):
        host.create("plain", "plain", ports="swtpm")
