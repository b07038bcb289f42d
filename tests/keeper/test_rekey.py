"""Another root key in a keeper that serves: begun, interrupted anywhere, and ended."""

from __future__ import annotations

import signal
from dataclasses import replace
from uuid import UUID, uuid4

import pytest

from holdfast.keeper import vault
from holdfast.protocol import ipc
from tests.asking import until

from .box import Box, Client, Worker

INSTANCE = UUID(int=5)


def new_key(client: Client, instance: UUID) -> ipc.KeyGrant:
    with Worker() as worker:
        worker.lease(client, instance, ipc.Done)
        return worker.key(b"", ipc.KeyGrant)


def key_of(client: Client, wrapped: bytes, instance: UUID = INSTANCE) -> ipc.KeyGrant:
    with Worker() as worker:
        worker.lease(client, instance, ipc.Done)
        return worker.key(wrapped, ipc.KeyGrant)


def refused(client: Client, wrapped: bytes) -> ipc.Refused:
    with Worker() as worker:
        worker.lease(client, INSTANCE, ipc.Done)
        return worker.key(wrapped, ipc.Refused)


def rewrapped(client: Client, *keys: ipc.WrappedKey) -> list[bytes]:
    return [key.wrapped for key in client.ask(ipc.Rewrap(keys), ipc.Rewrapped).keys]


@pytest.fixture
def keeper(box: Box) -> Box:
    box.start()
    with box.connect() as client:
        until("it is open", lambda: client.ask(ipc.KeeperStatus(), ipc.KeeperState).open)
    return box


def again(keeper: Box) -> None:
    keeper.stop(signal.SIGKILL)
    keeper.start()
    with keeper.connect() as client:
        until("it is open", lambda: client.ask(ipc.KeeperStatus(), ipc.KeeperState).open)


def test_after_it_old_wrapped_keys_do_not_open_and_new_ones_do(keeper: Box) -> None:
    with keeper.connect() as client:
        before = new_key(client, INSTANCE)
        other = uuid4()
        wrong = ipc.WrappedKey(other, before.wrapped)
        for _ in range(2):
            client.ask(ipc.BeginRekey(), ipc.Done)
        assert key_of(client, before.wrapped).data_key == before.data_key
        now, none = rewrapped(client, ipc.WrappedKey(INSTANCE, before.wrapped), wrong)
        assert none == b""
        assert rewrapped(client, ipc.WrappedKey(INSTANCE, now)) == [now]
        for _ in range(2):
            client.ask(ipc.EndRekey(), ipc.Done)
        assert key_of(client, now).data_key == before.data_key
        assert refused(client, before.wrapped).error == "IntegrityError"


def test_a_keeper_that_is_killed_goes_on_where_it_was(keeper: Box) -> None:
    with keeper.connect() as client:
        before = new_key(client, INSTANCE)
        client.ask(ipc.BeginRekey(), ipc.Done)
        (now,) = rewrapped(client, ipc.WrappedKey(INSTANCE, before.wrapped))
        sealed = keeper.vault().next_root_key
    assert sealed is not None
    again(keeper)
    with keeper.connect() as client:
        assert key_of(client, before.wrapped).data_key == before.data_key
        assert key_of(client, now) == replace(before, wrapped=now)
        client.ask(ipc.BeginRekey(), ipc.Done)
        assert keeper.vault().next_root_key == sealed  # the same: no second one
        client.ask(ipc.EndRekey(), ipc.Done)
    again(keeper)
    with keeper.connect() as client:
        assert keeper.vault().root_key == sealed
        assert keeper.vault().next_root_key is None
        assert key_of(client, now).data_key == before.data_key
        assert refused(client, before.wrapped).error == "IntegrityError"


def test_the_issuing_ca_and_the_anchor_serve_as_before(keeper: Box) -> None:
    with keeper.connect() as client:
        client.ask(ipc.BeginRekey(), ipc.Done)
        client.ask(ipc.EndRekey(), ipc.Done)
        keeper.commit(client)
        client.ask(ipc.RoundQuote(1, bytes(32)), ipc.HostQuote)
    again(keeper)
    with keeper.connect() as client:
        keeper.commit(client)


def test_it_waits_for_nobody_who_changes_the_keepers_file(keeper: Box) -> None:
    with keeper.connect() as client:
        with vault.changing(keeper.keeper):
            assert client.ask(ipc.BeginRekey(), ipc.Refused).error == "Conflict"
            assert keeper.authorize(ok=False)["error"] == "Conflict"
        client.ask(ipc.BeginRekey(), ipc.Done)


def test_boot_states_that_are_approved_meanwhile_stay_approved(keeper: Box) -> None:
    with keeper.connect() as client:
        client.ask(ipc.BeginRekey(), ipc.Done)
    keeper.stop()
    keeper.swtpm.extend(7)
    keeper.authorize()
    keeper.start()
    with keeper.connect() as client:
        until("it is open", lambda: client.ask(ipc.KeeperStatus(), ipc.KeeperState).open)
        client.ask(ipc.EndRekey(), ipc.Done)
    assert len(keeper.vault().approvals) == 2
    again(keeper)


def test_a_living_worker_gets_a_key_that_follows_its_own_and_no_other_does(keeper: Box) -> None:
    with keeper.connect() as client, Worker() as worker, Worker() as more:
        worker.lease(client, INSTANCE, ipc.Done)
        first = worker.key(b"", ipc.KeyGrant)
        fd = (more.keepers.fileno(),)
        client.ask(ipc.MoreKeys(INSTANCE), ipc.Done, fd)
        question = ipc.KeyRequest(first.wrapped, successor=True)
        both = Client(more.keys).ask(question, ipc.KeyGrant)
        assert both.data_key == first.data_key
        assert both.successor not in (b"", first.data_key)
        nobody = client.ask(ipc.MoreKeys(uuid4()), ipc.Refused, fd)
        assert nobody.error == "Conflict"
        worker.end()
        gone = client.ask(ipc.MoreKeys(INSTANCE), ipc.Refused, fd)
        assert gone.error == "Conflict"
