"""`snapshot`, `backup` and `recover` on a host that runs: what comes back, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pyrage
import pytest

from holdfast.client import Client
from holdfast.errors import Forbidden, HoldfastError, IntegrityError
from holdfast.evidence.bundle import Anchored, Evidence
from holdfast.hwtpm.policy import RecoverySigner, sha256
from holdfast.keeper.freshness import recovery_message

from .serve import Serve, a_host, as_user
from .test_faults import Stream, define, read, write

OWNER = 61000
WHY = "a test"


@pytest.fixture(scope="module")
def host() -> Iterator[Serve]:
    with a_host() as made:
        made.directory.chmod(0o755)
        yield made


# --- what is done --------------------------------------------------------------------------------


def turn(host: Serve, name: str, value: int | None = None, *, new: bool = False) -> int:
    """Power on, write `value` if there is one, read, power off: what was read."""
    host.power_on(name)
    wire = Stream(host.place(name))
    try:
        if new:
            define(wire)
        if value is not None:
            assert write(wire, value) == 0
        return read(wire)
    finally:
        wire.close()
        host.call("POST", f"/v1/vtpms/{name}/stop", {})


def evidence(host: Serve, name: str) -> Anchored:
    """What evidence of it says of the host TPM's anchor."""
    host.power_on(name)
    try:
        value = host.call("POST", f"/v1/vtpms/{name}/evidence", {"nonce": "0123456789abcdef"})
    finally:
        host.call("POST", f"/v1/vtpms/{name}/stop", {})
    text = json.dumps(value, separators=(",", ":"), sort_keys=True)
    return Evidence.decode(text.encode()).anchored


def made(host: Serve, name: str, value: int = 1, **more: Any) -> str:
    host.create(name, **more)
    turn(host, name, value, new=True)
    return name


def told(host: Serve, *arguments: str, code: int = 0) -> Any:
    """What the command line prints as JSON; its error, if it is to end with another code."""
    done = host.cli(*arguments, "--json")
    assert done.returncode == code, (done.stdout, done.stderr)
    return json.loads(done.stdout) if done.stdout else done.stderr


def keys(host: Serve) -> tuple[str, ...]:
    return (
        "--identity", str(host.directory / "identity"),
        "--recovery-file", str(host.directory / "out" / "recovery.age"),
        "--config", str(host.config),
    )  # fmt: skip


def identity(host: Serve) -> tuple[str, str]:
    return "--identity", str(host.directory / "identity")


def change(host: Serve, statement: str, *values: object) -> None:
    """Edit the registry beside the daemon, as who has the disk may."""
    with closing(sqlite3.connect(host.database)) as db, db:
        db.execute(statement, values)


def journal(host: Serve) -> list[tuple[str, str]]:
    with closing(sqlite3.connect(host.database)) as db:
        return db.execute("SELECT event, detail FROM journal ORDER BY number").fetchall()


def registry_files(host: Serve) -> list[Path]:
    return sorted(host.database.parent.glob("registry.sqlite*"))


# --- snapshots -----------------------------------------------------------------------------------


def test_a_snapshot_is_taken_listed_restored_and_removed(host: Serve) -> None:
    name = made(host, "snap", 1)
    before = told(host, "snapshot", "create", name, "before")
    assert before.keys() == {"vtpm", "name", "created", "epoch", "bytes"}
    turn(host, name, 2)
    named = told(host, "snapshot", "create", name)["name"]
    assert len(named) == len("20261125T215900Z")
    assert [s["name"] for s in told(host, "snapshot", "ls", name)["snapshots"]] == ["before", named]
    assert before in told(host, "snapshot", "ls")["snapshots"]
    restored = told(host, "snapshot", "restore", name, "before", "--reason", WHY)
    assert restored["epoch"]["is"] == restored["epoch"]["was"] + 1
    assert restored["lineage"] == {"was": 0, "is": 1}
    assert (restored["reason"], restored["anchored"]) == (WHY, True)
    assert turn(host, name) == 1
    assert told(host, "snapshot", "restore", name, named, "--reason", WHY)["lineage"]["is"] == 2
    assert turn(host, name) == 2  # a newer one stays
    assert evidence(host, name).path.leaf.lineage == 2
    assert ("restore", f"snapshot before of epoch {before['epoch']}: {WHY}") in journal(host)
    error = told(host, "snapshot", "rm", name, "before", "nothere", named, code=3)
    assert "removed before: before" in error
    assert [s["name"] for s in told(host, "snapshot", "ls", name)["snapshots"]] == [named]
    assert "snapshot 'before'" in told(
        host, "snapshot", "restore", name, "before", "--reason", WHY, code=3
    )
    assert told(host, "rm", name)["snapshots"] == 1


def test_a_restore_beyond_the_days_budget_is_done_and_what_is_owed_is_said() -> None:
    with a_host(per_day=1) as host:
        name = made(host, "web", 1)  # a boot's first commit takes the one there is
        told(host, "snapshot", "create", name, "s")
        assert host.finding("wear")["level"] == "note"
        assert told(host, "snapshot", "restore", name, "s", "--reason", WHY)["anchored"] is False
        said = host.cli("snapshot", "restore", name, "s", "--reason", WHY).stdout
        assert "budget of durable anchors is used up" in said
        assert host.finding("wear")["level"] == "warning"
        store = host.call("GET", "/v1/status")["store"]
        assert store["durable_anchors"] == {"used": 1, "left": 0}
        assert store["durability"] == "fsync"
        assert turn(host, name) == 1


def test_what_people_are_told_of_snapshots(host: Serve) -> None:
    name = made(host, "said")
    assert "said: snapshot one, epoch" in host.cli("snapshot", "create", name, "one").stdout
    assert host.cli("snapshot", "ls").stdout.startswith("VTPM\tSNAPSHOT\tCREATED\tEPOCH\tSIZE\n")
    said = host.cli("snapshot", "restore", name, "one", "--reason", WHY).stdout
    assert "lineage 1, was 0" in said
    assert "Attestations show from now on" in said
    assert "said is destroyed, and 1 snapshot with it" in host.cli("rm", name).stdout


@pytest.mark.parametrize(
    ("arguments", "code", "why"),
    [
        (("create", "busy", "s"), 4, "while it is not off"),
        (("create", "free", "../s"), 2, "is not a snapshot's name"),
        (("create", "free", "taken"), 4, "has a snapshot taken already"),
        (("create", "nothere"), 3, "no vTPM named nothere"),
        (("restore", "free", "taken"), 2, "Missing option '--reason'"),
        (("restore", "free", "taken", "--reason", " "), 2, "a reason is needed"),
        (("restore", "free", "taken", "--reason", "two\nlines"), 2, "a reason is needed"),
        (("restore", "free", "other", "--reason", WHY), 3, "no snapshot 'other'"),
        (("restore", "fixed", "s", "--reason", WHY), 5, '"restore": false: it is never set back'),
        (("rm", "free", "other"), 3, "no snapshot 'other'"),
    ],
)
def test_what_cannot_be_is_refused_with_the_reason(
    various: Serve, arguments: tuple[str, ...], code: int, why: str
) -> None:
    assert why in told(various, "snapshot", *arguments, code=code)


@pytest.fixture(scope="module")
def various(host: Serve) -> Iterator[Serve]:
    for name in ("busy", "free"):
        host.create(name)
    host.create("fixed", start_policy={"any": True, "restore": False})
    host.power_on("busy")
    host.call("POST", "/v1/vtpms/free/snapshots", {"name": "taken"})
    host.call("POST", "/v1/vtpms/fixed/snapshots", {"name": "s"})
    yield host
    host.call("POST", "/v1/vtpms/busy/stop", {})


def test_a_start_policys_restore_is_true_or_false(host: Serve) -> None:
    with pytest.raises(HoldfastError, match="restore is true or false"):
        host.create("odd", start_policy={"any": True, "restore": "no"})


def test_an_owner_takes_and_lists_snapshots_and_the_rest_is_roots(host: Serve) -> None:
    host.create("owned", owner=OWNER)
    host.create("others")
    host.call("POST", "/v1/vtpms/others/snapshots", {"name": "theirs"})

    def ask(uid: int, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        return as_user(uid, lambda: Client(host.api).call(method, path, body))

    one = "/v1/vtpms/owned/snapshots"
    assert ask(OWNER, "POST", one, {"name": "mine"})["name"] == "mine"
    assert [s["name"] for s in ask(OWNER, "GET", "/v1/snapshots")["snapshots"]] == ["mine"]
    for uid, method, path, body in (
        (OWNER + 1, "POST", one, {}),
        (OWNER + 1, "GET", one, None),
        (OWNER, "DELETE", f"{one}/mine", None),
        (OWNER, "POST", f"{one}/mine/restore", {"reason": WHY}),
        (OWNER, "POST", "/v1/vtpms/owned/backups", {}),
        (OWNER, "POST", "/v1/vtpms/owned/restore", {"reason": WHY}),
        (OWNER, "GET", "/v1/recovery", None),
        (OWNER, "POST", "/v1/recovery", {"link": "", "reason": WHY, "signature": ""}),
        (OWNER, "POST", "/v1/recovery/forget", {"name": "owned", "reason": WHY}),
    ):
        assert ask(uid, method, path, body) == "Forbidden", (method, path)


# --- backups -------------------------------------------------------------------------------------


def test_an_archive_is_written_shown_and_restored(host: Serve, tmp_path: Path) -> None:
    one, two = made(host, "kept1", 1), made(host, "kept2", 1)
    file = tmp_path / "archive"
    written = told(host, "backup", one, two, "--out", str(file), "--config", str(host.config))
    assert [v["name"] for v in written["vtpms"]] == [one, two]
    assert written["recipients"][0].startswith("age1")
    assert file.stat().st_mode & 0o777 == 0o600
    assert list(tmp_path.iterdir()) == [file]
    assert told(host, "snapshot", "ls", one)["snapshots"] == []
    shown = told(host, "backup", "ls", str(file), *identity(host))
    assert [(v["name"], v["epoch"]) for v in shown["vtpms"]] == [
        (v["name"], v["epoch"]) for v in written["vtpms"]
    ]
    for name in (one, two):
        turn(host, name, 2)
    restored = told(host, "backup", "restore", str(file), one, *identity(host), "--reason", WHY)
    assert [(v["vtpm"], v["lineage"]["is"]) for v in restored["restored"]] == [(one, 1)]
    assert (turn(host, one), turn(host, two)) == (1, 2)
    both = told(host, "backup", "restore", str(file), *identity(host), "--reason", WHY)
    assert [v["vtpm"] for v in both["restored"]] == [one, two]
    assert turn(host, two) == 1
    # What is restored outlives a restart, and so does the archive.
    host.stop()
    host.start()
    told(host, "backup", "restore", str(file), two, *identity(host), "--reason", WHY)
    # It does not bring back what was destroyed, nor what has its name now.
    told(host, "rm", one)
    again = ("backup", "restore", str(file), one, *identity(host), "--reason", WHY)
    assert "was destroyed" in told(host, *again, code=7)
    host.create(one)
    assert "was destroyed" in told(host, *again, code=7)


def test_a_state_that_is_backed_up_again_makes_the_map_no_larger(host: Serve) -> None:
    host.create("same")

    def leaves() -> int:
        with closing(sqlite3.connect(host.database)) as db:
            return int(db.execute("SELECT count(*) FROM newest").fetchone()[0])

    host.call("POST", "/v1/vtpms/same/backups", {})
    count = leaves()
    host.call("POST", "/v1/vtpms/same/backups", {})
    assert leaves() == count
    turn(host, "same", 1, new=True)
    host.call("POST", "/v1/vtpms/same/backups", {})
    assert leaves() == count + 1


def test_only_a_recipients_key_opens_an_archive(host: Serve, tmp_path: Path) -> None:
    host.create("closed")
    other, third = (pyrage.x25519.Identity.generate() for _ in range(2))
    (tmp_path / "other").write_text(str(other))
    (tmp_path / "third").write_text(str(third))
    out = tmp_path / "archive"
    recipients = ("--recipient", str(other.to_public()))
    told(host, "backup", "closed", "--out", str(out), "--config", str(host.config), *recipients)
    assert told(host, "backup", "ls", str(out), "--identity", str(tmp_path / "other"))["vtpms"]
    for key in (tmp_path / "third", host.directory / "identity"):
        error = told(host, "backup", "ls", str(out), "--identity", str(key), code=2)
        assert "does not open" in error
    again = ("backup", "closed", "--out", str(out), "--config", str(host.config))
    assert "exists: nothing was written" in told(host, *again, code=4)


def test_what_is_on_is_left_out_and_that_is_said(various: Serve, tmp_path: Path) -> None:
    out = tmp_path / "archive"
    various.create("awake")
    various.power_on("awake")
    done = various.cli("backup", "--all", "--out", str(out), "--config", str(various.config))
    assert done.returncode == 4
    assert "is written, without those that are not off: awake" in done.stderr
    shown = told(various, "backup", "ls", str(out), *identity(various))
    names = {v["name"] for v in shown["vtpms"]}
    assert "free" in names
    assert "awake" not in names
    named = ("backup", "awake", "--out", str(tmp_path / "b"), "--config", str(various.config))
    assert "while it is not off" in told(various, *named, code=4)
    assert not (tmp_path / "b").exists()
    various.call("POST", "/v1/vtpms/awake/stop", {})


def test_a_changed_backup_or_another_hosts_is_refused_by_name(host: Serve) -> None:
    host.create("mine")
    backup = host.call("POST", "/v1/vtpms/mine/backups", {})
    body = {key: value for key, value in backup.items() if key != "name"} | {"reason": WHY}
    for other, why in (
        ({"sealed": "AAAA"}, "was changed"),
        ({"epoch": backup["epoch"] + 1}, "was changed"),
        ({"id": "0" * 8 + "-0000-4000-8000-" + "0" * 12}, "does not know of that backup"),
        ({"instance": "0" * 8 + "-0000-4000-8000-" + "0" * 12}, "has never had that vTPM"),
    ):
        with pytest.raises(IntegrityError, match=why):
            host.call("POST", "/v1/vtpms/mine/restore", body | other)
    host.create("beside")
    with pytest.raises(HoldfastError, match="another vTPM"):
        host.call("POST", "/v1/vtpms/beside/restore", body)
    with pytest.raises(HoldfastError, match="no backup as holdfast backup writes it"):
        host.call("POST", "/v1/vtpms/mine/restore", body | {"sealed": "!"})


# --- recovery ------------------------------------------------------------------------------------


def test_where_nothing_is_wrong_there_is_nothing_to_recover(host: Serve) -> None:
    found = told(host, "recover")
    assert (found["needed"], found["why"], found["accepted"]) == (False, "", [])
    accept = ("recover", "--accept-older", "--reason", WHY, *keys(host))
    assert "nothing to accept" in told(host, *accept, code=4)
    host.create("well")
    forget = ("recover", "--forget", "well", "--reason", WHY)
    assert "nothing is wrong" in told(host, *forget, code=4)
    assert "--reason is needed" in told(host, "recover", "--forget", "well", code=2)


def test_an_older_registry_is_refused_by_name_until_the_recovery_key_accepts_it(
    tmp_path: Path,
) -> None:
    with a_host() as host:
        name = made(host, "web", 1)
        host.stop()
        older = tmp_path / "older"
        older.mkdir()
        for file in registry_files(host):
            shutil.copy(file, older)
        host.start()
        turn(host, name, 2)
        host.stop()
        for file in registry_files(host):
            file.unlink()
        for file in older.iterdir():
            shutil.copy(file, host.database.parent)
        host.start()

        with pytest.raises(HoldfastError, match="older than"):
            host.power_on(name)
        finding = host.finding("freshness")
        assert finding["level"] == "problem"
        assert "older than" in finding["says"]
        found = told(host, "recover", code=7)
        assert found["needed"]
        assert "older than" in found["why"]
        assert "holdfast recover --accept-older --reason" in host.cli("recover").stdout
        forget = ("recover", "--forget", name, "--reason", WHY)
        assert "first what is on disk has to be accepted" in told(host, *forget, code=7)
        assert "it was not started" in host.finding(f"vTPM {name}")["says"]

        # Another host's recovery key; and a signature of any key but this host's.
        accept = ("recover", "--accept-older", "--reason", WHY)
        other = pyrage.x25519.Identity.generate()
        (tmp_path / "key").write_text(str(other))
        (tmp_path / "recovery.age").write_bytes(pyrage.encrypt(os.urandom(32), [other.to_public()]))
        wrong = ("--identity", str(tmp_path / "key"))
        wrong += ("--recovery-file", str(tmp_path / "recovery.age"), "--config", str(host.config))
        assert "is not this host's recovery key" in told(host, *accept, *wrong, code=2)
        signer = RecoverySigner(os.urandom(32))
        signed = signer.sign(sha256(recovery_message(bytes.fromhex(found["link"]), WHY))).encode()
        body = {"link": found["link"], "reason": WHY, "signature": signed.hex()}
        with pytest.raises(Forbidden, match="not signed with this host's recovery key"):
            host.call("POST", "/v1/recovery", body)
        with pytest.raises(HoldfastError, match="older than"):
            host.power_on(name)

        value = told(host, *accept, *keys(host))
        assert value["recoveries"] == 1
        assert not told(host, "recover")["needed"]
        assert ("recover", WHY) in journal(host)
        findings = host.call("GET", "/v1/doctor")["findings"]
        assert not [each for each in findings if each["what"] == f"vTPM {name}"]
        assert evidence(host, name).link.anchor.recoveries == 1
        assert turn(host, name) == 1
        assert "accepted: 1;" in host.finding("history")["says"]
        # It holds from now on, also over a restart.
        host.stop()
        host.start()
        assert turn(host, name, 3) == 3
        assert not told(host, "recover")["needed"]


def test_one_state_put_back_is_named_accepted_and_shown_by_its_lineage() -> None:
    with a_host() as host:
        name, other = made(host, "web", 1), made(host, "beside", 7)
        own = host.inspect(name)["id"]
        with closing(sqlite3.connect(host.database)) as db:
            query = "SELECT epoch, sealed, wrapped FROM states WHERE id = ?"
            older = db.execute(query, (own,)).fetchone()
        turn(host, name, 2)
        change(
            host, "UPDATE states SET epoch = ?, sealed = ?, wrapped = ? WHERE id = ?", *older, own
        )
        found = told(host, "recover", code=7)
        assert [v["name"] for v in found["vtpms"]] == [name]
        with pytest.raises(HoldfastError):
            host.power_on(name)
        assert turn(host, other) == 7
        value = told(host, "recover", "--accept-older", "--reason", WHY, *keys(host))
        assert value["accepted"] == [name]
        assert evidence(host, name).path.leaf.lineage == 1
        assert turn(host, name) == 1
        assert turn(host, other) == 7


def test_what_is_gone_for_good_is_given_up_by_name_and_does_not_come_back() -> None:
    with a_host() as host:
        damaged, row, well = made(host, "damaged"), made(host, "row"), made(host, "well", 5)
        host.call("POST", f"/v1/vtpms/{row}/snapshots", {"name": "s"})
        own = host.inspect(row)["id"]
        host.stop()
        with closing(sqlite3.connect(host.database)) as db:
            kept = db.execute("SELECT * FROM states WHERE id = ?", (own,)).fetchone()
        change(
            host,
            "UPDATE states SET sealed = zeroblob(99) WHERE id = ?",
            next(i for (i,) in ids(host, damaged)),
        )
        change(host, "UPDATE instances SET record = '{}' WHERE name = ?", row)
        host.start()
        found = told(host, "recover", code=7)
        assert {v["name"] for v in found["vtpms"]} == {damaged, row}
        for name in (damaged, row):
            assert told(host, "recover", "--forget", name, "--reason", WHY) == {"forgotten": name}
        assert not told(host, "recover")["needed"]
        assert [e for e, _ in journal(host)] == ["forget", "forget"]
        host.stop()
        host.start()
        assert [v["name"] for v in host.call("GET", "/v1/vtpms")["vtpms"]] == [well]
        assert turn(host, well) == 5
        with closing(sqlite3.connect(host.database)) as db:
            assert db.execute("SELECT count(*) FROM snapshots").fetchone() == (0,)
        # Its state put back beside the host's own: refused.
        host.stop()
        change(host, "DELETE FROM gone WHERE id = ?", own)
        change(host, "INSERT INTO states VALUES (?, ?, ?, ?, ?, ?)", *kept)
        host.start()
        found = told(host, "recover", code=7)
        assert found["why"]
        assert own in {v["id"] for v in found["vtpms"]}


def test_a_registry_from_before_a_rekey_is_not_accepted_beside_the_keepers_file_of_after_it(
    tmp_path: Path,
) -> None:
    with a_host() as host:
        name = made(host, "one", 5)
        host.stop()
        for file in registry_files(host):
            shutil.copy2(file, tmp_path)
        host.start()
        told(host, "rekey")
        host.stop()
        newer = tmp_path / "newer"
        newer.mkdir()
        for file in registry_files(host):
            shutil.move(file, newer)
        for file in tmp_path.glob("registry.sqlite*"):
            shutil.copy2(file, host.database.parent)
        host.start()
        command = ("recover", "--accept-older", "--reason", WHY, *keys(host))
        assert "are of two copies" in told(host, *command, code=4)
        assert told(host, "recover", code=7)["needed"]
        host.stop()
        for file in registry_files(host):
            file.unlink()
        for file in newer.iterdir():
            shutil.copy2(file, host.database.parent)
        host.start()
        assert turn(host, name) == 5


def test_a_damaged_state_is_mended_by_a_snapshot_or_a_backup(tmp_path: Path) -> None:
    """Nothing has to be accepted for that: the host knows both, and what was there last."""
    with a_host() as host:
        by_snapshot, by_backup = made(host, "one", 5), made(host, "two", 6)
        host.call("POST", f"/v1/vtpms/{by_snapshot}/snapshots", {"name": "s"})
        file = str(tmp_path / "archive")
        told(host, "backup", by_backup, "--out", file, "--config", str(host.config))
        names = by_snapshot, by_backup
        host.stop()
        change(host, "UPDATE states SET sealed = zeroblob(99)")
        host.start()
        for name in names:
            with pytest.raises(HoldfastError, match="is not the one that was written last"):
                host.power_on(name)
        body = {"reason": WHY}
        restored = [host.call("POST", f"/v1/vtpms/{by_snapshot}/snapshots/s/restore", body)]
        restored += told(host, "backup", "restore", file, *identity(host), "--reason", WHY)[
            "restored"
        ]
        assert [each["epoch"]["is"] - each["epoch"]["was"] for each in restored] == [1, 1]
        assert (turn(host, by_snapshot), turn(host, by_backup)) == (5, 6)
        assert not told(host, "recover")["needed"]
        assert evidence(host, by_snapshot).link.anchor.recoveries == 0


def test_of_an_archive_what_cannot_be_set_back_is_told_and_the_others_are(tmp_path: Path) -> None:
    with a_host() as host:
        for number, name in enumerate(("first", "gone", "last")):
            made(host, name, number)
        file = str(tmp_path / "archive")
        told(host, "backup", "--all", "--out", file, "--config", str(host.config))
        for name in ("first", "last"):
            turn(host, name, 9)
        host.call("DELETE", "/v1/vtpms/gone")
        command = ("backup", "restore", file, *identity(host), "--reason", WHY)
        value = told(host, *command, "--config", str(host.config), code=7)
        assert [each["vtpm"] for each in value["restored"]] == ["first", "last"]
        assert list(value["left"]) == ["gone"]
        assert "was destroyed" in value["left"]["gone"]
        assert (turn(host, "first"), turn(host, "last")) == (0, 2)
        done = host.cli(*command)
        assert "gone is as it was: that vTPM was destroyed" in done.stdout


def ids(host: Serve, name: str) -> list[tuple[str]]:
    with closing(sqlite3.connect(host.database)) as db:
        return db.execute("SELECT id FROM instances WHERE name = ?", (name,)).fetchall()
