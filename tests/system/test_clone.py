"""A clone is a new TPM with the settings of another; of what that one holds it has nothing."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from holdfast.errors import Conflict, InvalidInput, NotFound
from holdfast.tpm2 import requests as rq
from holdfast.tpm2.constants import AK_HANDLE, EK_ECC_HANDLE, EK_RSA_HANDLE, NvAttr, Rh
from tests.asking import connect, exchange, rc

from .serve import Serve, a_host, as_user

OWNER = 4343
INDEX = 0x01500040
NV = NvAttr.OWNERWRITE | NvAttr.OWNERREAD | NvAttr.AUTHREAD | NvAttr.NO_DA
SETTINGS = (
    "profile", "banks", "start_policy", "unsafe_unlinked", "ports", "devices", "mode", "tpm",
)  # fmt: skip
NOT_THERE = 0x28B  # TPM_RC_HANDLE of the second handle: the index


@pytest.fixture(scope="module")
def host() -> Iterator[Serve]:
    with a_host() as made:
        made.directory.chmod(0o755)
        yield made


def rows(host: Serve, instance: str) -> dict[str, list[tuple[Any, ...]]]:
    """All that the store has of an instance, whatever its tables are called."""
    found = {}
    with sqlite3.connect(f"file:{host.database}?mode=ro", uri=True) as db:
        names = [row[0] for row in db.execute("SELECT name FROM sqlite_schema WHERE type='table'")]
        for name in names:
            columns = [row[1] for row in db.execute(f"PRAGMA table_info({name})")]
            if "id" in columns:
                query = f"SELECT * FROM {name} WHERE id = ?"
                found[name] = db.execute(query, (instance,)).fetchall()
    return found


def blobs(found: list[tuple[Any, ...]]) -> set[bytes]:
    return {value for row in found for value in row if isinstance(value, bytes)}


def ask(sock: Path, *commands: bytes) -> list[bytes]:
    with connect(sock) as client:
        return [exchange(client, command) for command in commands]


def sock_of(host: Serve, name: str) -> Path:
    return host.place(name) / "run" / "tpm.sock"


def publics(host: Serve, name: str) -> list[bytes]:
    handles = (EK_RSA_HANDLE, EK_ECC_HANDLE, AK_HANDLE)
    answers = ask(sock_of(host, name), *map(rq.read_public, handles))
    return [rq.read_public_area(answer).name for answer in answers]


def test_a_clone_has_all_the_settings_and_an_identity_of_its_own(host: Serve) -> None:
    policy = {"config": [f"sha256:{'1' * 64}"], "hooks": ["/usr/bin/hook"]}
    first = host.create(
        "web", "linked", owner=OWNER, banks=["sha256"], start_policy=policy,
        unsafe_unlinked=True, ports="mssim", devices="fuse",
    )  # fmt: skip
    before = rows(host, first["id"])
    assert before["states"]
    assert before["keys"]
    second = host.call("POST", "/v1/vtpms/web/clones", {"name": "web-2", "owner": OWNER + 1})
    assert [second[name] for name in SETTINGS] == [first[name] for name in SETTINGS]
    assert (second["name"], second["owner"], second["state"]) == ("web-2", OWNER + 1, "off")
    assert (second["run"], second["restarts"]) == (0, 0)
    assert second["id"] != first["id"]
    assert second["device"] == "holdfast.dev/vtpm=web-2"
    assert rows(host, first["id"]) == before
    here, there = rows(host, first["id"]), rows(host, second["id"])
    keys, other = here["keys"][0], there["keys"][0]
    same = {at for at, (one, two) in enumerate(zip(keys, other, strict=True)) if one == two}
    assert same == {7}  # the certificates of those that signed
    blobs = [
        {v for v in state[0] if isinstance(v, bytes)} for state in (here["states"], there["states"])
    ]
    assert blobs[0].isdisjoint(blobs[1])


def test_nothing_that_a_tpm_holds_is_in_its_clone(host: Serve) -> None:
    host.create("db", banks=["sha384", "sha1"])
    host.power_on("db")
    secret = os.urandom(32)
    define, write = (
        rq.nv_define_space(Rh.OWNER, INDEX, NV, 32),
        rq.nv_write(Rh.OWNER, INDEX, secret, 0),
    )
    assert [rc(answer) for answer in ask(sock_of(host, "db"), define, write)] == [0, 0]
    done = host.cli("clone", "db", "db-2")  # of one that is on: its state is not looked at
    assert done.returncode == 0, done.stderr
    assert "none of that one's keys, NV or sealed data are in it" in done.stdout
    assert host.inspect("db-2")["banks"] == ["sha384", "sha1"]
    host.power_on("db-2")
    read = rq.nv_read(Rh.OWNER, INDEX, 32, 0)
    (here,), (there,) = ask(sock_of(host, "db"), read), ask(sock_of(host, "db-2"), read)
    assert secret in here
    assert rc(there) == NOT_THERE
    assert set(publics(host, "db")).isdisjoint(publics(host, "db-2"))


def test_what_is_no_clone_is_refused_with_the_reason(host: Serve) -> None:
    host.create("one", owner=OWNER)
    path = "/v1/vtpms/one/clones"
    with pytest.raises(Conflict, match="a vTPM named one already"):
        host.call("POST", path, {"name": "one"})
    with pytest.raises(NotFound, match="no vTPM named none"):
        host.call("POST", "/v1/vtpms/none/clones", {"name": "two"})
    with pytest.raises(InvalidInput, match="is not an instance name"):
        host.call("POST", path, {"name": "../two"})
    with pytest.raises(InvalidInput, match="'banks' is not known here"):
        host.call("POST", path, {"name": "two", "banks": ["sha1"]})
    refused = as_user(OWNER, lambda: host.call("POST", path, {"name": "two"}))
    assert refused == "Forbidden"
    assert [vtpm["name"] for vtpm in host.call("GET", "/v1/vtpms")["vtpms"]].count("two") == 0
