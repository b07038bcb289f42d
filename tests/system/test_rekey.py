"""Other keys for a host that goes on running: what goes on, and what the old ones still open.

Root knows all keys here because the host's TPM is software, and opened by the test itself.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import sqlite3
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from holdfast.errors import Conflict, HoldfastError, IntegrityError
from holdfast.store.sealing import Kind, Owner, unseal
from holdfast.tpm2 import requests as rq
from holdfast.tpm2.constants import Rh
from tests.asking import connect, exchange, rc, until
from tests.commands import handle_of
from tests.scanning import in_files, patterns

from .known import INDEX, Stored, data_key, put_secrets_in, stored, unsealed
from .serve import Serve, a_host
from .test_faults import Stream, define, read, write

NAMES = ("awake", "asleep", "off")


@dataclass
class Changed:
    """A host before its keys were changed, and after that."""

    host: Serve
    root: bytes
    place: Path
    told: dict[str, Any] = field(default_factory=dict)
    markers: dict[str, bytes] = field(default_factory=dict)  # what each vTPM has in NV
    before: dict[str, Stored] = field(default_factory=dict)
    wrapped: dict[str, bytes] = field(default_factory=dict)  # of all rows, before
    epochs: dict[str, int] = field(default_factory=dict)
    worker: int = 0
    session: tuple[socket.socket, int] | None = None


def rows(host: Serve) -> dict[str, bytes]:
    """Every wrapped data key, as the registry has it."""
    with contextlib.closing(sqlite3.connect(host.database)) as db:
        states = db.execute("SELECT id, wrapped FROM states").fetchall()
        snapshots = db.execute("SELECT instance || name, wrapped FROM snapshots").fetchall()
    return dict(states + snapshots)


def nv(host: Serve, name: str) -> bytes:
    with contextlib.closing(connect(host.place(name) / "run/tpm.sock")) as sock:
        answer = exchange(sock, rq.nv_read(Rh.OWNER, INDEX, 32, 0))
    assert rc(answer) == 0
    return answer[16:48]


def falls_asleep(host: Serve, name: str) -> bool:
    """Whether it is at rest by now: its clients' ends may be still to be seen."""
    with contextlib.suppress(Conflict):
        host.call("POST", f"/v1/vtpms/{name}/sleep", {})
    return bool(host.inspect(name)["state"] == "asleep")


def ready(changed: Changed) -> None:
    """One that serves a client with a session, one that sleeps, one that is off with snapshots."""
    host = changed.host
    for name in NAMES:
        host.create(name)
        host.power_on(name)
        changed.markers[name] = put_secrets_in(host.place(name))["NV data"]
    host.call("POST", "/v1/vtpms/off/stop", {})
    for snapshot in ("first", "second"):
        host.call("POST", "/v1/vtpms/off/snapshots", {"name": snapshot})
    for name in ("awake", "asleep"):  # with snapshots of when they were off
        host.call("POST", f"/v1/vtpms/{name}/stop", {})
        host.call("POST", f"/v1/vtpms/{name}/snapshots", {"name": "earlier"})
        host.power_on(name)
    until("it sleeps", lambda: falls_asleep(host, "asleep"))
    (changed.worker,) = host.workers()
    sock = connect(host.place("awake") / "run/tpm.sock")
    changed.session = sock, handle_of(exchange(sock, rq.start_policy_session()))
    archive = host.cli("backup", "off", "--config", str(host.config), "--out", str(archived(host)))
    assert archive.returncode == 0, archive.stderr
    changed.before = {name: stored(host, name, changed.place) for name in NAMES}
    changed.wrapped = rows(host)
    changed.epochs = {name: changed.before[name].epoch for name in NAMES}


def archived(host: Serve) -> Path:
    return host.directory / "archive"


def rekey(host: Serve, *options: str) -> dict[str, Any]:
    done = host.cli("rekey", "--json", *options)
    assert done.returncode == 0, done.stderr
    told: dict[str, Any] = json.loads(done.stdout)
    return told


def backed_up_before_and_after(host: Serve) -> None:
    """The archive of before is refused; one that is made now is not, of whatever state."""
    identity = str(host.directory / "identity")
    command = ("backup", "restore", str(archived(host)), "--identity", identity)
    done = host.cli(*command, "--reason", "a test")
    assert done.returncode == 7
    assert "before this host's keys were changed" in done.stderr
    again = str(host.directory / "again")
    done = host.cli("backup", "off", "--config", str(host.config), "--out", again)
    assert done.returncode == 0, done.stderr
    command = ("backup", "restore", again, "--identity", identity, "--reason", "a test")
    assert host.cli(*command).returncode == 0


@contextlib.contextmanager
def a_changed_host(place: Path, *options: str) -> Iterator[Changed]:
    with a_host(running=False) as host:
        root, _ = unsealed(host, f"swtpm:path={host.directory}/tpm.sock")
        with host.config.open("a") as config:
            config.write("[workers]\nidle_after = 0\n")
        host.start()
        made = Changed(host, root, place)
        ready(made)
        made.told = rekey(host, *options)
        yield made
        if made.session is not None:
            made.session[0].close()


@pytest.fixture(scope="module")
def changed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Changed]:
    with a_changed_host(tmp_path_factory.mktemp("copy")) as made:
        yield made


def test_it_says_what_was_changed(changed: Changed) -> None:
    assert changed.told == {
        "keys": ["root", "data"], "vtpms": 3, "of": 3, "left": {}, "anchored": True, "done": True,
    }  # fmt: skip
    with contextlib.closing(sqlite3.connect(changed.host.database)) as db:
        told = db.execute("SELECT event, detail FROM journal ORDER BY number").fetchall()
    assert told == [("rekey", "root, data"), ("rekeyed", "root, data")]
    audit = [line for line in changed.host.log().splitlines() if "parts=" in line]
    assert len(audit) == 1, audit
    assert "event=rekey" in audit[0], audit


def test_every_wrapped_key_is_another_and_the_old_ones_are_in_no_file(changed: Changed) -> None:
    now = rows(changed.host)
    assert set(now) == set(changed.wrapped)
    assert len(now) == 7
    assert not set(now.values()) & set(changed.wrapped.values())
    directory = changed.host.directory
    places = [directory / "state", directory / "run" / "asleep"]
    assert in_files(places, patterns(changed.wrapped)) == {}
    old = {name: each.sealed[:128] for name, each in changed.before.items()}
    assert in_files(places, patterns(old)) == {}
    there = in_files(places, patterns(now))  # and they are really read
    assert str(changed.host.database) in "".join(there)


def test_a_client_s_session_goes_on_in_the_same_worker(changed: Changed) -> None:
    assert changed.host.workers() == [changed.worker]
    assert changed.session is not None
    sock, session = changed.session
    assert rc(exchange(sock, rq.flush_context(session))) == 0
    assert nv(changed.host, "awake") == changed.markers["awake"]


def test_each_goes_on_where_it_was(changed: Changed) -> None:
    host = changed.host
    states = {name: host.inspect(name)["state"] for name in NAMES}
    assert states == {"awake": "active", "asleep": "asleep", "off": "off"}
    assert host.inspect("asleep")["restarts"] == 0
    assert nv(host, "asleep") == changed.markers["asleep"]
    for snapshot in ("first", "second"):
        body = {"reason": "a test"}
        host.call("POST", f"/v1/vtpms/off/snapshots/{snapshot}/restore", body)
        host.power_on("off")
        assert nv(host, "off") == changed.markers["off"]
        host.call("POST", "/v1/vtpms/off/stop", {})


def test_snapshots_are_as_they_were_by_name_time_and_order(changed: Changed) -> None:
    listed = changed.host.call("GET", "/v1/vtpms/off/snapshots")["snapshots"]
    assert [each["name"] for each in listed] == ["first", "second"]
    assert {each["epoch"] for each in listed} == {changed.epochs["off"]}


def test_an_older_backup_is_refused_and_a_new_one_is_not(changed: Changed) -> None:
    backed_up_before_and_after(changed.host)


def test_old_keys_open_nothing_that_is_there(changed: Changed) -> None:
    """The last of those that want the host as it is: it is ended, and its TPM opened."""
    host = changed.host
    now = {name: stored(host, name, changed.place) for name in NAMES}
    assert changed.session is not None
    changed.session[0].close()
    assert host.stop() == 0
    root, _ = unsealed(host, f"swtpm:path={host.directory}/tpm.sock")
    assert root != changed.root
    for name, was in changed.before.items():
        instance, record = was.record.id, now[name].record
        owner = Owner(instance, record.profile, record.terms)
        with pytest.raises(IntegrityError):
            data_key(changed.root, instance, now[name].wrapped)
        with pytest.raises(IntegrityError):
            data_key(root, instance, was.wrapped)
        old, new = (
            data_key(changed.root, instance, was.wrapped),
            data_key(root, instance, now[name].wrapped),
        )
        assert old != new
        sealed, epoch = now[name].sealed, now[name].epoch
        unseal(new, owner, epoch, Kind.PERMANENT, sealed)
        with pytest.raises(IntegrityError):
            unseal(old, owner, epoch, Kind.PERMANENT, sealed)


# --- single keys ---


def test_the_root_key_alone_leaves_states_as_they_are(tmp_path: Path) -> None:
    with a_changed_host(tmp_path, "--root") as changed:
        host = changed.host
        assert changed.told["keys"] == ["root"]
        now = rows(host)
        assert set(now) == set(changed.wrapped)
        assert not set(now.values()) & set(changed.wrapped.values())
        for name, was in changed.before.items():
            found = stored(host, name, tmp_path)
            assert (found.epoch, found.sealed) == (was.epoch, was.sealed)
            assert host.inspect(name)["state"] in ("active", "asleep", "off")
        assert in_files([host.directory / "state"], patterns(changed.wrapped)) == {}
        # What runs has its key as it was wrapped before: its next commit does not bring that back.
        with contextlib.closing(connect(host.place("awake") / "run/tpm.sock")) as sock:
            assert rc(exchange(sock, rq.nv_write(Rh.OWNER, INDEX, b"x" * 32, 0))) == 0
        assert stored(host, "awake", tmp_path).epoch == changed.epochs["awake"] + 1
        assert rows(host) == now
        for name in ("awake", "asleep"):
            host.call("POST", f"/v1/vtpms/{name}/stop", {})
        assert rows(host) == now
        backed_up_before_and_after(host)
        for name in NAMES:
            host.power_on(name)
        assert nv(host, "awake") == b"x" * 32


def test_data_keys_alone_leave_the_root_key(tmp_path: Path) -> None:
    with a_changed_host(tmp_path, "--data") as changed:
        host = changed.host
        now = {name: stored(host, name, tmp_path) for name in NAMES}
        assert host.stop() == 0
        root, _ = unsealed(host, f"swtpm:path={host.directory}/tpm.sock")
        assert root == changed.root
        for name, was in changed.before.items():
            found = now[name]
            assert found.epoch > was.epoch
            assert data_key(root, was.record.id, found.wrapped) != data_key(
                root, was.record.id, was.wrapped
            )


def test_a_client_that_never_pauses_notices_nothing_and_loses_nothing() -> None:
    with a_host() as host:
        host.create("web")
        host.power_on("web")
        wire = Stream(host.place("web"))
        define(wire)
        stop, written = threading.Event(), [0]
        answers: set[int] = set()

        def go_on() -> None:
            while not stop.is_set():
                answers.add(write(wire, written[0] + 1))
                written[0] += 1

        client = threading.Thread(target=go_on)
        client.start()
        try:
            before = written[0]
            for _ in range(3):
                rekey(host)
            assert written[0] > before
        finally:
            stop.set()
            client.join()
        assert answers == {0}
        assert read(wire) == written[0]
        wire.close()
        assert host.inspect("web")["restarts"] == 0
        host.call("POST", "/v1/vtpms/web/stop", {})
        host.power_on("web")
        wire = Stream(host.place("web"))
        assert read(wire) == written[0]
        wire.close()


def test_a_copy_of_the_old_disk_does_not_start(tmp_path: Path) -> None:
    with a_host() as host:
        host.create("web")
        host.power_on("web")
        assert host.stop() == 0
        state, copy = host.directory / "state", tmp_path / "state"
        shutil.copytree(state, copy, symlinks=True)
        host.start()
        rekey(host)
        assert host.stop() == 0
        shutil.rmtree(state)
        shutil.copytree(copy, state, symlinks=True)
        host.start()
        assert host.finding("freshness")["level"] == "problem"
        with pytest.raises(HoldfastError, match="older"):
            host.power_on("web")


def test_a_state_that_does_not_open_is_named_and_the_others_go_on(tmp_path: Path) -> None:
    with a_host() as host:
        for name in ("good", "bad"):
            host.create(name)
        bad = stored(host, "bad", tmp_path)
        with contextlib.closing(sqlite3.connect(host.database)) as db:
            db.execute(
                "UPDATE states SET wrapped = ? WHERE id = ?",
                (bad.wrapped[:-1] + bytes((bad.wrapped[-1] ^ 1,)), str(bad.record.id)),
            )
            db.commit()
        done = host.cli("rekey", "--json")
        assert done.returncode == 7, done.stderr
        told = json.loads(done.stdout)
        assert set(told["left"]) == {"bad"}
        assert told["done"]
        host.power_on("good")


def test_what_was_not_finished_is_told_and_finished_with_whatever_is_changed_next() -> None:
    with a_host() as host:
        host.create("web")
        sealed = rows(host)
        with contextlib.closing(sqlite3.connect(host.database)) as db:  # as one that was killed
            db.execute("INSERT INTO journal VALUES (NULL, 'then', '', 'rekey', 'root, data')")
            db.commit()
        assert "Run holdfast rekey again" in host.finding("rekey")["says"]
        assert rekey(host, "--root")["keys"] == ["root", "data"]
        assert rows(host) != sealed
        findings = host.call("GET", "/v1/doctor")["findings"]
        assert not [each for each in findings if each["what"] == "rekey"]


def test_an_empty_request_is_refused_and_so_is_a_second_one_meanwhile() -> None:
    with a_host() as host:
        with pytest.raises(HoldfastError, match="which keys"):
            host.call("POST", "/v1/rekey", {})
        with pytest.raises(HoldfastError, match="run holdfast rekey again"):
            host.call("GET", "/v1/rekey")
        host.create("web")
        host.call("POST", "/v1/rekey", {"root": True, "data": True})
        with pytest.raises(HoldfastError, match="already"):
            host.call("POST", "/v1/rekey", {"root": True})
