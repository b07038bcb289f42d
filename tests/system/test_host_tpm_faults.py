"""A host TPM that resets, is another, is in lockout or has lost an index, under the real daemon.

One that dies, does not answer or answers errors is in `test_faults`; more of these, with the keeper
alone, in `tests/keeper`.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from holdfast.errors import HostError
from holdfast.hwtpm.anchor import HYBRID_INDEX
from holdfast.tpm2 import requests as rq
from holdfast.tpm2.commands import Cc
from holdfast.tpm2.constants import NvAttr, Rc, Rh
from holdfast.tpm2.wire import sized, u16, u32
from tests.asking import connect, exchange, rc, until

from .serve import Serve, a_host
from .test_faults import GET_RANDOM, Stream, attest, define, keeper_is_open, read, write

THEIRS = 0x01500005


@pytest.fixture(scope="module")
def host() -> Iterator[Serve]:
    with a_host() as made:
        yield made


def powered(host: Serve, name: str) -> Stream:
    """A vTPM that is on, and has 1 in an index."""
    host.create(name)
    host.power_on(name)
    wire = Stream(host.place(name))
    define(wire)
    assert write(wire, 1) == 0
    return wire


def cut(host: Serve) -> None:
    """The host TPM has no power any more, and nobody told it."""
    assert host.tpm is not None
    host.tpm.kill()
    host.tpm.wait()


def ask(host: Serve, command: bytes) -> int:
    """A command of the host's owner."""
    with connect(host.directory / "tpm.sock") as sock:
        return rc(exchange(sock, command))


def unclean(host: Serve) -> int:
    """How many ends that were not in order are counted."""
    findings = host.call("GET", "/v1/doctor")["findings"]
    says = [finding["says"] for finding in findings if finding["what"] == "history"]
    return int(says[0].split(": ")[1].partition(";")[0]) if says else 0


def test_a_reset_while_we_serve_is_noticed_and_counted_and_nothing_stops(host: Serve) -> None:
    wire = powered(host, "resets")
    (worker,) = host.workers()
    before = unclean(host)
    for count in (1, 2):
        cut(host)
        host.start_tpm()
        assert write(wire, 10 + count) == 0
        assert read(wire) == 10 + count
        assert host.finding("freshness")["level"] == "warning"
        assert unclean(host) == before + count
        attest(host, "resets")
        host.create(f"after-{count}")
    assert host.workers() == [worker]
    wire.close()
    host.call("POST", "/v1/vtpms/resets/stop", {})


def test_lockout_of_the_host_tpm_stops_nothing(host: Serve) -> None:
    """Somebody guesses at an object of somebody else's; ours are not exposed to that."""
    limits = u32(1) + u32(1000) + u32(1000)
    dictionary = rq.command(Cc.DictionaryAttackParameters, (Rh.LOCKOUT,), (rq.Auth(),), limits)
    wrong = (rq.Auth(password=b"wrong"),)
    guess = rq.command(Cc.NV_Write, (THEIRS, THEIRS), wrong, sized(bytes(8)) + u16(0))
    exposed = NvAttr.AUTHREAD | NvAttr.AUTHWRITE
    assert ask(host, dictionary) == 0
    assert ask(host, rq.nv_define_space(Rh.OWNER, THEIRS, exposed, 8)) == 0
    assert [ask(host, guess) for _ in range(3)][-1] == Rc.LOCKOUT
    wire = powered(host, "locked-out")
    keeper = host.children()["keeper"]
    os.kill(keeper, signal.SIGKILL)
    until("another keeper", lambda: host.children().get("keeper", keeper) != keeper)
    until("the keeper is open", lambda: keeper_is_open(host))
    assert write(wire, 2) == 0
    host.create("made-in-lockout")
    attest(host, "locked-out")
    host.call("DELETE", "/v1/vtpms/made-in-lockout")  # which is remembered durably
    assert ask(host, guess) == Rc.LOCKOUT
    wire.close()
    host.call("POST", "/v1/vtpms/locked-out/stop", {})


def refuses(host: Serve, wire: Stream, name: str, why: str) -> None:
    """Nothing is acknowledged or begun; what runs is of use, and it is said why."""
    before = read(wire)
    assert write(wire, before + 100) == Rc.NV_UNAVAILABLE
    assert read(wire) == before
    assert len(wire.exchange(GET_RANDOM)) == 20
    for attempt in (
        lambda: host.create("never"),
        lambda: host.power_on("resets"),
        lambda: attest(host, name),
    ):
        with pytest.raises(HostError, match=why):
            attempt()
    finding = host.finding("keeper")
    assert finding["level"] == "problem"
    assert why in finding["says"]
    assert why in host.call("GET", "/v1/status")["keeper"]["says"]


def test_another_host_tpm_is_refused_by_name_until_the_right_one_is_back(host: Serve) -> None:
    wire = powered(host, "abroad")
    ours, kept = host.directory / "host-tpm", host.directory / "ours"
    cut(host)
    ours.rename(kept)
    host.start_tpm()
    refuses(host, wire, "abroad", "cleared or replaced")
    cut(host)
    ours.rename(host.directory / "theirs")
    kept.rename(ours)
    host.start_tpm()
    until("the keeper is open", lambda: keeper_is_open(host), 70)
    assert write(wire, 3) == 0
    assert read(wire) == 3
    attest(host, "abroad")
    wire.close()
    host.call("POST", "/v1/vtpms/abroad/stop", {})


def test_an_index_that_the_hosts_owner_removed_is_named_and_nothing_is_changed(host: Serve) -> None:
    wire = powered(host, "anchored")
    undefine = rq.command(Cc.NV_UndefineSpace, (Rh.OWNER, HYBRID_INDEX), (rq.Auth(),))
    assert ask(host, undefine) == 0
    refuses(host, wire, "anchored", "hybrid chain's index 0x01804849 is not in this host TPM")
    wire.close()
