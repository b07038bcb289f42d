"""The API's edges on a real host: what is sent wrongly, slowly, or never; and the short view."""

from __future__ import annotations

import json
import os
import re
import select
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from holdfast.client import Client
from holdfast.daemon.__main__ import API_SECONDS
from tests.asking import connect

from .serve import Serve, a_host

NONCE = "00" * 16
STATE = {"ociVersion": "1", "id": "c", "status": "stopped", "pid": 0, "bundle": "/"}


@pytest.fixture(scope="module")
def host() -> Iterator[Serve]:
    with a_host() as one:
        one.create("web")
        one.power_on("web")
        yield one


def answer(
    host: Serve, method: str, path: str, body: bytes = b"", head: str = ""
) -> tuple[int, str, dict[str, Any]]:
    """(status, content type, JSON) of one request, byte by byte as given."""
    lines = f"{method} {path} HTTP/1.1\r\nHost: x\r\n{head}"
    lines += f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    with connect(host.api) as sock:
        sock.sendall(lines.encode() + body)
        data = b"".join(iter(lambda: sock.recv(65536), b""))
    top, _, rest = data.partition(b"\r\n\r\n")
    kind = re.search(rb"(?i)content-type: ([a-z/+]*)", top)
    assert kind is not None
    return int(top.split()[1]), kind[1].decode(), json.loads(rest)


def refused(
    host: Serve, status: int, why: str, method: str, path: str, body: bytes = b"", head: str = ""
) -> None:
    before = len(host.log())
    got, kind, problem = answer(host, method, path, body, head)
    assert (got, kind) == (status, "application/problem+json"), problem
    assert why in problem["detail"]
    assert problem["status"] == status
    assert "Traceback" not in host.log()[before:]


@pytest.mark.parametrize(
    ("path", "body", "why"),
    [
        ("/v1/vtpms", {}, "is not an instance name"),
        ("/v1/vtpms", {"name": "\ud800"}, "is not an instance name"),
        ("/v1/vtpms", {"name": "x", "owner": 10**30}, "an owner is a user's number"),
        ("/v1/vtpms", {"name": "x", "owner": 1000.0}, "owner is a whole number, not a fraction"),
        ("/v1/vtpms", {"name": "x", "banks": []}, "banks are some of"),
        ("/v1/vtpms", {"name": "x", "banks": ["sha256"] * 2}, "twice"),
        ("/v1/vtpms", {"name": "x", "unsafe_unlinked": 1}, "is true or false, not a whole number"),
        ("/v1/vtpms", {"name": "x", "start_policy": {"any": "yes"}}, "any is true or false"),
        ("/v1/vtpms", {"name": "x", "start_policy": {"config": [5]}}, "config is a list of texts"),
        ("/v1/vtpms", [], "not a JSON object"),
        ("/v1/vtpms/web/evidence", {"nonce": 5}, "nonce is text, not a whole number"),
        ("/v1/vtpms/web/evidence", {"nonce": "\u0663\u0663"}, "nonce is not hexadecimal"),
        ("/v1/vtpms/web/evidence", {"nonce": NONCE, "user_data": []}, "user_data is text"),
        ("/v1/vtpms/web/evidence", {"nonce": NONCE, "audience": "\ud800"}, "an audience is"),
        ("/v1/vtpms/web/evidence", {"nonce": NONCE, "audience": "a\0b"}, "an audience is"),
        ("/v1/hooks/poststop", {"vtpm": ["web"]}, "vtpm is text, not a list"),
        ("/v1/hooks/poststop", {"vtpm": "web"}, "container state: is not an object"),
        ("/v1/hooks/poststop", {"vtpm": None, "state": STATE}, "is not an instance name"),
        ("/v1/hooks/poststop", {"vtpm": "web", "state": []}, "state is an object, not a list"),
        ("/v1/hooks/poststop", {"vtpm": "web", "state": {**STATE, "pid": "1"}}, "pid is not"),
        ("/v1/hooks/poststop", {"vtpm": "web", "state": {**STATE, "bundle": "x"}}, "bundle is not"),
        ("/v1/hooks/poststop", {"vtpm": "web", "state": {**STATE, "id": "\ud800"}}, "id is not"),
    ],
)
def test_what_has_the_wrong_form_is_named(host: Serve, path: str, body: Any, why: str) -> None:
    refused(host, 400, why, "POST", path, json.dumps(body).encode())


@pytest.mark.parametrize(
    ("body", "head"),
    [
        (b"", ""),
        (b"{", ""),
        (b"\xff\xfe", ""),
        (json.dumps({"name": "x"}).encode("utf-16"), ""),
        (b'{"owner": ' + b"9" * 5000 + b"}", ""),
        (b"", "Content-Type: application/json; charset=nonsense\r\n"),
    ],
)
def test_a_body_that_is_no_json_is_refused(host: Serve, body: bytes, head: str) -> None:
    refused(host, 400, "not JSON", "POST", "/v1/vtpms", body, head)


def test_a_body_that_is_not_in_its_encoding_is_refused(host: Serve) -> None:
    gzip = "Content-Encoding: gzip\r\n"
    refused(host, 400, "not in its encoding", "POST", "/v1/vtpms", b"[]", gzip)


def test_what_is_no_http_is_not_logged(host: Serve) -> None:
    before = len(host.log())
    for _ in range(20):
        with connect(host.api) as sock:
            sock.sendall(b"\x16\x03\x01\r\n\r\n")
            assert sock.recv(64).startswith(b"HTTP/1.0 400")
    assert host.log()[before:] == ""


def test_what_the_host_does_not_have_is_named_and_audited(host: Serve) -> None:
    host.create("bundled", unsafe_unlinked=True, profile="linked")
    state = {**STATE, "status": "created", "pid": os.getpid(), "bundle": "/nowhere"}
    body = json.dumps({"vtpm": "bundled", "state": state}).encode()
    why = "/nowhere/config.json: No such file or directory"
    before = len(host.log())
    refused(host, 503, why, "POST", "/v1/hooks/createRuntime", body)
    assert why in host.log()[before:]
    assert host.inspect("bundled")["state"] == "off"
    host.call("DELETE", "/v1/vtpms/bundled")


def test_what_the_api_does_not_have_is_a_problem_too(host: Serve) -> None:
    refused(host, 404, "there is no '/v2' here", "GET", "/v2")
    refused(host, 404, "there is no '/v1/vtpms/' here", "GET", "/v1/vtpms/")
    refused(host, 405, "'PUT' here", "PUT", "/v1/vtpms")
    refused(host, 413, "a body has at most", "POST", "/v1/vtpms", b" " * (2 << 20))


def test_who_sends_half_a_request_or_none_is_not_waited_for(host: Serve) -> None:
    begin = time.monotonic()
    unsaid, head, body = (connect(host.api, 60) for _ in range(3))
    head.sendall(b"GET /v1/version HTTP/1.1\r\nX-Slow: ")
    body.sendall(b"POST /v1/vtpms HTTP/1.1\r\nHost: x\r\nContent-Length: 50\r\n\r\n{")
    gone: set[socket.socket] = set()
    while len(gone) < 2:
        # A byte of the head every now and then does not help.
        if head not in gone and not select.select([head], [], [], 0.5)[0]:
            head.sendall(b"x")
        for sock in {unsaid, head} - gone:
            if select.select([sock], [], [], 0)[0]:
                assert sock.recv(64) == b""
                gone.add(sock)
        assert time.monotonic() - begin < API_SECONDS + 10
    assert time.monotonic() - begin > API_SECONDS / 2
    assert b"did not arrive in" in body.recv(4096)
    for sock in (unsaid, head, body):
        sock.close()
    assert host.call("GET", "/v1/version")["api"] == 1


def test_one_client_may_call_again_after_a_long_silence(host: Serve) -> None:
    """The daemon closes what is idle: a client holds nothing open between two calls."""
    client = Client(host.api)
    assert client.call("GET", "/v1/version")["api"] == 1
    open_files = len(list(Path(f"/proc/{host.children()['daemon']}/fd").iterdir()))
    for _ in range(20):
        assert client.call("GET", "/v1/version")["api"] == 1
    assert len(list(Path(f"/proc/{host.children()['daemon']}/fd").iterdir())) < open_files + 10


# --- status --------------------------------------------------------------------------------------


def test_status_is_the_short_view(host: Serve) -> None:
    status = host.call("GET", "/v1/status")
    assert set(status) == {
        "verdict", "host", "keeper", "spawner", "more", "vtpms", "counts", "root_key_memory",
        "store",
    }  # fmt: skip
    assert "software stand-in" in status["host"]["says"]
    assert status["root_key_memory"]
    says = f"the root key is open, in {status['root_key_memory']}"
    assert status["keeper"] == {"level": "ok", "says": says}
    assert status["spawner"]["level"] == "ok"
    assert status["vtpms"] == {"active": 1}
    doctor = host.call("GET", "/v1/doctor")
    assert set(doctor) == {"verdict", "findings", "vtpms", "root_key_memory"}
    shown = host.cli("status")
    assert shown.returncode == 0, shown.stderr
    lines = shown.stdout.splitlines()
    assert [line.split()[1] for line in lines[:3]] == ["host:", "keeper:", "spawner:"]
    assert lines[3] == "vTPMs: 1 active (1 awake, 0 asleep)"
    assert "libtpms" not in shown.stdout
    assert "libtpms" in host.cli("doctor").stdout


def test_what_a_program_reads_is_not_cut_at_eighty_columns(host: Serve) -> None:
    name = "a" + "-long" * 12
    host.create(name)
    assert name in host.cli("ls").stdout
    assert f"swtpm:path={host.place(name)}/run/tpm.sock\n" in host.cli("start", name).stdout
