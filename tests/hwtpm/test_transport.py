"""A host TPM that is absent, silent, broken or full: always an error that says so, in time."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from holdfast.errors import HostError
from holdfast.hwtpm.context import Context
from holdfast.hwtpm.host import HostTpm
from holdfast.hwtpm.transport import Transport
from holdfast.tpm2.constants import ST_NO_SESSIONS
from holdfast.tpm2.wire import u16, u32

from .swtpm import Swtpm

SILENT_SECONDS = 0.3


@contextmanager
def server(path: Path, answer: Callable[[socket.socket], None]) -> Iterator[str]:
    """Something that is no TPM, answering each connection with `answer`; the TCTI to reach it."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()
    held = []

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            held.append(connection)
            answer(connection)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield f"swtpm:path={path}"
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join()
        for connection in held:
            connection.close()


@pytest.mark.parametrize("tcti", ["swtpm:path=/nonexistent/tpm", "device:/nonexistent/tpm"])
def test_absent_tpm_is_a_host_error_that_names_it(tcti: str) -> None:
    with pytest.raises(HostError, match="nonexistent"):
        Context(Transport(tcti))


def test_unknown_tcti_is_a_host_error() -> None:
    with pytest.raises(HostError, match="nonsuch"):
        Transport("nonsuch:conf")


def test_silent_tpm_is_given_up_in_time(tmp_path: Path) -> None:
    with server(tmp_path / "s", lambda _: None) as tcti:
        started = time.monotonic()
        with pytest.raises(HostError, match="did not answer in time"):
            Context(Transport(tcti, SILENT_SECONDS))
        assert time.monotonic() - started < 10 * SILENT_SECONDS


def test_tpm_that_falls_silent_is_waited_for_once_only(swtpm: Swtpm) -> None:
    context = swtpm.context(SILENT_SECONDS)
    tpm = HostTpm(context)
    tpm.open_primary(bytes(32), b"a" * 32)
    assert swtpm.process is not None
    swtpm.stop()
    swtpm.socket.unlink(missing_ok=True)
    with server(swtpm.socket, lambda _: None):
        started = time.monotonic()
        for _ in range(20):
            with pytest.raises(HostError):
                tpm.read_pcrs()
        context.close()
        assert time.monotonic() - started < 10 * SILENT_SECONDS


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"\x00" * 10,
        u16(ST_NO_SESSIONS) + u32(0xFFFFFFFF) + u32(0),
        u16(ST_NO_SESSIONS) + u32(5) + u32(0),
        u16(ST_NO_SESSIONS) + u32(12) + u32(0) + b"zz",
        u16(ST_NO_SESSIONS) + u32(10) + u32(0x100),  # TPM_RC_INITIALIZE
    ],
)
def test_nonsense_instead_of_a_tpm_is_a_host_error(tmp_path: Path, answer: bytes) -> None:
    def reply(connection: socket.socket) -> None:
        connection.recv(4096)
        connection.sendall(answer)
        connection.shutdown(socket.SHUT_RDWR)

    with server(tmp_path / "s", reply) as tcti, pytest.raises(HostError):
        Context(Transport(tcti, SILENT_SECONDS))


def test_what_a_killed_predecessor_left_is_cleared_away(swtpm: Swtpm) -> None:
    for _ in range(3):  # each leaves a primary and a session; the TPM has three slots
        context = swtpm.context()
        HostTpm(context).open_primary(bytes(32), b"a" * 32)
        context.hmac()
        context.esapi.close()
    context = swtpm.context()
    tpm = HostTpm(context)
    tpm.open_primary(bytes(32), b"a" * 32)
    tpm.use_ak(tpm.create_ak())
    context.close()


def test_closed_context_leaves_nothing_in_the_tpm(swtpm: Swtpm) -> None:
    context = swtpm.context()
    tpm = HostTpm(context)
    tpm.open_primary(bytes(32), b"a" * 32)
    tpm.use_ak(tpm.create_ak())
    context.close()
    for kind in ("handles-transient", "handles-loaded-session"):
        assert swtpm.tool("tpm2_getcap", kind).strip() == ""


def test_values_of_all_banks_are_read_consistently(swtpm: Swtpm) -> None:
    swtpm.extend(4)
    context = swtpm.context()
    values = context.read_pcrs()
    context.close()
    assert all(set(bank) == set(range(24)) for bank in values.values())
    shown = swtpm.tool("tpm2_pcrread", "sha256:4").split("0x")[1].strip().lower()
    assert next(bank for alg, bank in values.items() if alg.name == "SHA256")[4].hex() == shown
