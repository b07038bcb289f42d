"""Whatever cannot be opened says why and what to do: online, and while no daemon runs.

One host for all of it; in the end nothing of it opens any more.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from holdfast.errors import HoldfastError, HostError, IntegrityError

from .serve import Serve, a_host

BOOT = Path(__file__).parents[1] / "fixtures" / "boot"
POLICY = {"config": [f"sha256:{'1' * 64}"]}


@pytest.fixture(scope="module")
def host() -> Iterator[Serve]:
    with a_host() as made:
        yield made


def change(host: Serve, statement: str) -> None:
    """Damage the registry of a host that was stopped."""
    with closing(sqlite3.connect(host.database, isolation_level=None)) as db:
        assert db.execute(statement).rowcount == 1


def offline(host: Serve, *arguments: str) -> Any:
    done = host.cli(*arguments, "--config", str(host.config))
    assert done.stdout, done.stderr
    return json.loads(done.stdout)


def told(report: Any, what: str) -> list[str]:
    return [finding["says"] for finding in report["findings"] if finding["what"] == what]


def test_the_daemon_of_a_configuration_is_found_by_that(host: Serve) -> None:
    """Where its run directory is not the default, and nothing in the environment says so."""
    done = host.cli_with({}, "doctor", "--config", str(host.config), "--json")
    assert "vtpms" in json.loads(done.stdout)  # which a daemon alone can tell
    done = host.cli_with({}, "doctor", "--json")
    assert "vtpms" not in json.loads(done.stdout)


def test_what_is_wrong_with_a_vtpm_is_told_with_a_daemon_and_without(host: Serve) -> None:
    for name in ("good", "stale", "fell", "row"):
        host.create(name)
    host.stop()
    change(
        host, "UPDATE states SET sealed = x'00' WHERE id = (SELECT id FROM instances "
        "WHERE name = 'stale')",
    )  # fmt: skip
    change(
        host, "UPDATE instances SET state = 'failed', record = json_set(record, '$.why_failed', "
        "'its worker keeps dying: x') WHERE name = 'fell'",
    )  # fmt: skip
    change(host, "UPDATE instances SET record = '[]' WHERE name = 'row'")

    report = offline(host, "doctor", "--json")
    assert "was changed, or a part of it was put back" in told(report, "vTPM stale")[0]
    assert "its worker keeps dying: x" in told(report, "vTPM fell")[0]
    assert "its row in the registry is damaged" in told(report, "vTPM row")[0]
    assert told(report, "vTPM good") == []
    shown = offline(host, "inspect", "fell")
    assert (shown["state"], shown["daemon"]) == ("failed", False)
    assert shown["why_failed"] == "its worker keeps dying: x"
    assert "holdfast retry fell" in shown["findings"][0]["says"]
    done = host.cli("inspect", "row", "--config", str(host.config))
    assert (done.returncode, done.stdout) == (7, "")
    assert "its row in the registry is damaged" in done.stderr

    host.start()
    report = host.call("GET", "/v1/doctor")
    assert "was changed, or a part of it was put back" in told(report, "vTPM stale")[0]
    assert "its worker keeps dying: x" in told(report, "vTPM fell")[0]
    assert "its row in the registry is damaged" in told(report, "vTPM row")[0]
    assert told(report, "vTPM good") == []
    assert host.inspect("good")["findings"] == []
    assert "was changed" in host.inspect("stale")["findings"][0]["says"]
    with pytest.raises(IntegrityError, match="row: its row in the registry is damaged"):
        host.inspect("row")
    host.power_on("good")


def test_why_a_start_was_refused_is_known_until_one_is_not(host: Serve) -> None:
    host.create("web", owner=1)
    host.stop()
    change(host, "UPDATE instances SET record = json_set(record, '$.owner', 2) WHERE name = 'web'")
    host.start()
    with pytest.raises(HoldfastError):
        host.power_on("web")
    why = host.inspect("web")["why_not_started"]
    assert "name, owner, profile or start policy that the registry has" in why
    assert told(host.call("GET", "/v1/doctor"), "vTPM web") == [f"it was not started: {why}"]
    host.stop()
    change(host, "UPDATE instances SET record = json_set(record, '$.owner', 1) WHERE name = 'web'")
    host.start()
    host.power_on("web")
    assert host.inspect("web")["why_not_started"] == ""


def test_a_boot_state_that_is_not_approved_is_told_by_the_event_that_made_it_so(
    host: Serve,
) -> None:
    host.stop()
    host.end_tpm()
    host.start_tpm(BOOT / "new.bin")
    host.event_log = BOOT / "new.bin"
    host.write_config()
    host.start()
    report = host.call("GET", "/v1/doctor")
    assert "PCR 4 differs" in told(report, "keeper")[0]
    (says,) = told(report, "boot state")
    assert says.startswith("since the last boot in which it opened: PCR 4: event 14 EV_EFI_ACTION")
    assert "holdfast policy predict" in says
    status = host.call("GET", "/v1/status")
    assert says in status["keeper"]["says"]
    with pytest.raises(HostError, match="PCR 4 differs"):
        host.create("another")


def test_a_registry_of_a_newer_version_is_told_while_nothing_can_run(host: Serve) -> None:
    if host.process is not None:
        host.stop()
    with closing(sqlite3.connect(host.database, isolation_level=None)) as db:
        db.execute("PRAGMA user_version = 99")
    report = offline(host, "doctor", "--json")
    assert "has schema 99" in told(report, "registry")[0]
    assert report["verdict"] == "problem"
