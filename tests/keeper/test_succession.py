"""Another recovery key, prepared beside the present one, and a keeper that goes over to it."""

from __future__ import annotations

import json
import signal
from typing import Any

import pyrage
import pytest

from holdfast.evidence.freshness import Anchor
from holdfast.hwtpm.host import INDICES, OTHER_INDICES
from holdfast.keeper import vault
from holdfast.protocol import ipc
from tests.asking import until

from .box import Box, Client


def prepare(box: Box, out: str = "new", *, ok: bool = True) -> dict[str, Any]:
    key = box.directory / "identity"
    key.write_text(str(box.identity))
    fresh = pyrage.x25519.Identity.generate()
    made = box.run(
        "succeed", "--identity", str(key), "--recovery-file", str(box.out / "recovery.age"),
        "--site-root-key", str(box.out / "site-root-ca.key.age"),
        "--recovery-recipient", str(fresh.to_public()), "--out", str(box.directory / out),
        *box.user(), ok=ok,
    )  # fmt: skip
    (box.directory / f"{out}.identity").write_text(str(fresh))
    return made


def indices(box: Box) -> list[int]:
    shown = box.swtpm.tool("tpm2_getcap", "handles-nv-index").split()
    there = {int(word, 16) for word in shown if word.startswith("0x")}
    return sorted(there & {*INDICES, *OTHER_INDICES})


def opened(box: Box, client: Client) -> None:
    until("it is open", lambda: client.ask(ipc.KeeperStatus(), ipc.KeeperState).open)


def go_over(box: Box) -> None:
    """As a daemon has the keeper do it; and what it finds then."""
    with box.connect() as client:
        opened(box, client)
        link = box.commit(client)
        client.ask(ipc.Succeed(), ipc.Done)
        opened(box, client)
        client.ask(ipc.MapLeaves(True, ()), ipc.Done)
        found = client.ask(ipc.OpenMap(link.encode(), b"", b"", b""), ipc.MapOpened)
        assert found.found == "carried"


def test_what_is_prepared_takes_nothing_away_and_is_prepared_once(box: Box) -> None:
    before = box.vault()
    assert prepare(box)["prepared"] == "now"
    assert box.vault() == before
    assert indices(box) == sorted((*INDICES, *OTHER_INDICES))
    successor = vault.load(box.keeper, vault.SUCCESSOR)
    assert prepare(box, "other")["prepared"] == "before"
    assert vault.load(box.keeper, vault.SUCCESSOR) == successor
    assert not (box.directory / "other").exists()
    box.start()  # and the present one serves as before
    with box.connect() as client:
        opened(box, client)


def test_the_keeper_goes_over_removes_what_was_and_opens_again(box: Box) -> None:
    before = box.vault()
    prepare(box)
    box.start()
    go_over(box)
    after = box.vault()
    assert (after.recovery_before, after.retired) == (before.recovery_public, 0)
    assert after.recovery_public != before.recovery_public
    assert after.ca_key != before.ca_key
    assert after.root_certificate == before.root_certificate
    assert indices(box) == sorted(OTHER_INDICES)
    assert not vault.succeeded(box.keeper)
    box.stop(signal.SIGKILL)
    box.start()
    with box.connect() as client:
        opened(box, client)
    assert prepare(box, "again")["prepared"] == "in force"  # told of the old key: nothing to do


def test_boot_states_that_are_approved_stay_so_and_retired_ones_do_not_come_back(box: Box) -> None:
    box.swtpm.extend(7)
    box.authorize("--retire")
    box.swtpm.extend(7)
    box.authorize()
    approved = [approval.values for approval in box.vault().approvals]
    assert len(approved) == 2
    prepare(box)
    box.start()
    go_over(box)
    assert [approval.values for approval in box.vault().approvals] == approved


def test_what_a_try_that_was_cut_short_left_in_the_tpm_is_removed(box: Box) -> None:
    for number in OTHER_INDICES[1:3]:
        box.swtpm.tool("tpm2_nvdefine", hex(number), "-C", "o", "-s", "8")
    assert prepare(box)["prepared"] == "now"
    box.start()
    go_over(box)


def test_a_tpm_that_fails_midway_changes_nothing(box: Box) -> None:
    before = box.vault()
    box.swtpm.stop()
    assert prepare(box, ok=False)["error"] == "HostError"
    assert box.vault() == before
    assert not vault.succeeded(box.keeper)
    box.swtpm.start()
    prepare(box, "second")
    box.start()
    go_over(box)


@pytest.mark.parametrize("action", ["authorize", "root key"])
def test_what_else_changes_the_file_waits_until_it_is_done(box: Box, action: str) -> None:
    prepare(box)
    if action == "authorize":
        assert box.authorize(ok=False)["error"] == "Conflict"
        return
    box.start()
    with box.connect() as client:
        opened(box, client)
        assert client.ask(ipc.BeginRekey(), ipc.Refused).error == "Conflict"
        assert client.ask(ipc.KeeperStatus(), ipc.KeeperState).open


def test_it_waits_until_the_root_key_is_changed(box: Box) -> None:
    box.start()
    with box.connect() as client:
        opened(box, client)
        client.ask(ipc.BeginRekey(), ipc.Done)
    box.stop()
    assert "finish holdfast rekey first" in prepare(box, ok=False)["why"]


def test_what_the_new_chains_begin_with_is_believed_of_the_keeper_alone(box: Box) -> None:
    """Whoever can write the keeper's file, and not open the root key, says nothing about states."""
    prepare(box)
    file = box.keeper / vault.FILE
    (box.keeper / vault.SUCCESSOR).rename(file)
    value = json.loads(file.read_text())
    value["carried"] = (Anchor(7, bytes(32), clean=True).encode() + bytes(32)).hex()
    file.write_text(json.dumps(value))
    box.start()
    with box.connect() as client:
        state = client.ask(ipc.KeeperStatus(), ipc.KeeperState)
    assert not state.open
    assert "does not say what its chains began with" in state.why_not
