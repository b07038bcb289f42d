"""A directory that is a copy, older, or another host's; vTPMs that change names: each is refused.

A second `serve` on the same directory is in `test_faults`, as states that change places are; blobs
of sleeping vTPMs in `test_sleep_host`; one state, or a registry, put back in
`test_recover_commands`.
"""

from __future__ import annotations

import contextlib
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from holdfast.errors import HoldfastError, HostError, IntegrityError

from .serve import Serve, a_host
from .test_faults import READ_EK, Stream, define, read, write


def in_use(host: Serve, name: str, value: int = 0) -> tuple[int, bytes]:
    """What is in its index, after `value` is if that is one; and its EK. It is off again then."""
    host.power_on(name)
    wire = Stream(host.place(name))
    try:
        if value == 1:
            define(wire)
        if value:
            assert write(wire, value) == 0
        return read(wire), wire.exchange(READ_EK)
    finally:
        wire.close()
        host.call("POST", f"/v1/vtpms/{name}/stop", {})


def put(source: Path, target: Path) -> None:
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)


def files(directory: Path) -> dict[str, bytes]:
    """What of it is not to be changed: a daemon's own journal and its log are."""
    with contextlib.closing(sqlite3.connect(directory / "registry.sqlite")) as db:
        tables = ("instances", "states", "links", "anchored", "gone", "keys")
        return {t: repr(db.execute(f"SELECT * FROM {t}").fetchall()).encode() for t in tables}


@contextmanager
def a_copy(host: Serve) -> Iterator[Serve]:
    """Another `serve` of the same host, on a copy of its directory."""
    directory = host.directory / "copy"
    put(host.directory / "state", directory / "state")
    copy = Serve(directory, directory / "cdi", host.event_log)
    copy.write_config(tcti=f"swtpm:path={host.directory}/tpm.sock")
    try:
        yield copy
    finally:
        copy.end()


def test_a_copied_directory_is_refused_while_one_is_served_and_one_of_them_ever_after() -> None:
    """Whichever went on alone is the newest; the other is older then, for good."""
    with a_host() as host:
        host.create("web")
        in_use(host, "web", 1)
        with a_copy(host) as copy:
            with pytest.raises(AssertionError, match="another Holdfast serves this host"):
                copy.start()
            copy.process = None
            assert in_use(host, "web", 2)[0] == 2
            assert host.stop() == 0
            put(host.directory / "state", copy.directory / "state")
            copy.start()
            assert in_use(copy, "web")[0] == 2  # it was copied in order, and is the only one
            in_use(copy, "web", 3)
            assert copy.stop() == 0
        before = files(host.directory / "state")
        host.start()
        for _ in range(2):
            with pytest.raises(IntegrityError, match="older than"):
                host.power_on("web")
            with pytest.raises(HoldfastError, match="older than"):
                host.call("DELETE", "/v1/vtpms/web")
        assert "older than" in host.finding("freshness")["says"]
        assert host.stop() == 0
        assert files(host.directory / "state") == before


def test_another_hosts_directory_or_registry_is_refused_by_name() -> None:
    with a_host() as host, a_host() as other:
        host.create("ours")
        in_use(host, "ours", 1)
        other.create("theirs")
        in_use(other, "theirs", 1)
        for each in (host, other):
            assert each.stop() == 0
        state, kept = host.directory / "state", host.directory / "kept"
        put(state, kept)

        put(other.directory / "state", state)
        before = files(state)
        host.start()
        with pytest.raises(HostError, match="not the keeper's any more: it was cleared or"):
            host.power_on("theirs")
        assert "cleared or replaced" in host.finding("keeper")["says"]
        assert host.stop() == 0
        assert files(state) == before

        put(kept, state)
        for file in state.glob("registry.sqlite*"):
            file.unlink()
        for file in (other.directory / "state").glob("registry.sqlite*"):
            shutil.copy(file, state)
        host.start()
        with pytest.raises(IntegrityError, match="not this host's"):
            host.power_on("theirs")
        assert "not this host's" in host.finding("freshness")["says"]
        assert host.stop() == 0
        assert files(state) == before

        put(kept, state)
        host.start()
        assert in_use(host, "ours")[0] == 1


def test_vtpms_whose_records_are_renamed_or_given_away_are_refused_by_name() -> None:
    changes = (
        "UPDATE instances SET name = 'another' WHERE name = 'renamed'",
        "UPDATE instances SET record = json_set(record, '$.owner', 1000) WHERE name = 'given'",
        "UPDATE instances SET name = 'x' WHERE name = 'left'",  # two that change places
        "UPDATE instances SET name = 'left' WHERE name = 'right'",
        "UPDATE instances SET name = 'right' WHERE name = 'x'",
    )
    with a_host() as host:
        eks = {}
        for name in ("renamed", "given", "left", "right", "untouched"):
            host.create(name)
            eks[name] = in_use(host, name, 1)[1]
        assert host.stop() == 0
        with contextlib.closing(sqlite3.connect(host.database)) as db, db:
            kept = db.execute("SELECT id, name, record FROM instances").fetchall()
            for change in changes:
                db.execute(change)
        host.start()
        for name in ("another", "given", "left", "right") * 2:
            with pytest.raises(IntegrityError, match="name, owner, profile or start policy"):
                host.power_on(name)
            assert "name, owner, profile" in host.finding(f"vTPM {name}")["says"]
        assert in_use(host, "untouched") == (1, eks["untouched"])
        assert host.stop() == 0
        with contextlib.closing(sqlite3.connect(host.database)) as db, db:
            db.execute("UPDATE instances SET name = id")
            db.executemany("UPDATE instances SET name = ?2, record = ?3 WHERE id = ?1", kept)
        host.start()
        for name, ek in eks.items():
            assert in_use(host, name) == (1, ek)
