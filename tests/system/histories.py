"""What is done to the vTPMs of one history, each as its users and administrators do it.

Each method does one thing to a host that runs and to the model of it (`chronicle`), and returns
when the host says that it is done. What is looked at in between is looked at by `chronicle`.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import select
import shutil
import signal
import sqlite3
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, Final

import pytest

from holdfast.errors import Conflict, HoldfastError, NotFound
from holdfast.tpm2 import requests as rq
from holdfast.tpm2.algorithms import Alg
from holdfast.tpm2.constants import Rh
from tests.asking import connect, rc, receive, until

from .chronicle import (
    PCR,
    READ_EK,
    STATES,
    Client,
    Known,
    Randoms,
    blob_of,
    compare,
    content,
    copies,
    gone,
    held,
    nv_of,
    pcr_of,
    registry,
    registry_files,
)
from .serve import Serve
from .test_faults import INDEX, Device, Stream, define, write

SECONDS: Final = 60.0
WIRES: Final = (Stream, Device)


class History:
    """One history on `host`; `number` makes its names its own."""

    numbers = itertools.count(1)
    randoms = Randoms()
    eks: ClassVar[set[bytes]] = set()  # of all vTPMs that there ever were

    def __init__(self, host: Serve) -> None:
        self.host = host
        self.number = next(self.numbers)
        self.known: dict[str, Known] = {}
        self.made = 0
        self._values = itertools.count(1)

    def check(self) -> None:
        compare(self.host, self.known.values())

    # --- making and destroying ---

    def create(self) -> None:
        self._made(self.host.create(self._free()))

    def clone(self, known: Known) -> None:
        body = {"name": self._free()}
        self._made(self.host.call("POST", f"/v1/vtpms/{known.name}/clones", body))

    def _free(self) -> str:
        """A name that none has, or none any more."""
        names = (f"h{self.number}-{number}" for number in itertools.count(1))
        return next(name for name in names if name not in self.known)

    def _made(self, made: dict[str, Any]) -> None:
        """One whose EK nobody has had before."""
        with registry(self.host) as db:
            query = "SELECT ek_rsa FROM keys WHERE id = ?"
            (ek,) = db.execute(query, (made["id"],)).fetchone()
        assert ek not in self.eks, f"{made['name']} has the EK of another vTPM"
        self.eks.add(ek)
        self.made += 1
        self.known[made["name"]] = Known(made["name"], made["id"], ek)

    def destroy(self, known: Known) -> None:
        answer = self.host.call("DELETE", f"/v1/vtpms/{known.name}")
        assert answer["snapshots"] == len(known.snapshots), answer
        del self.known[known.name]
        with pytest.raises(NotFound):
            self.host.inspect(known.name)
        gone(self.host, known)

    # --- power ---

    def power_on(self, known: Known) -> None:
        self.host.power_on(known.name)
        known.on = known.rises = True
        self.look(known)

    def power_off(self, known: Known) -> None:
        self._stop(known)
        known.rises = True
        known.off()

    def _stop(self, known: Known) -> None:
        self.host.call("POST", f"/v1/vtpms/{known.name}/stop", {})

    # --- using ---

    def come(self, known: Known, kind: Callable[..., Any]) -> None:
        """A client that stays."""
        secret = f"of {known.name}, {next(self._values)}".encode()
        known.clients.append(Client(kind(self.host.place(known.name)), secret))
        self._woken(known)

    def write(self, known: Known) -> None:
        value = next(self._values)
        with contextlib.closing(Stream(self.host.place(known.name))) as wire:
            self._woken(known)
            if known.values == (None,):
                define(wire)
            answer = write(wire, value)
            assert answer == 0, hex(answer)
        known.values, known.rises = (value,), True

    def extend(self, known: Known) -> None:
        digest = hashlib.sha256(next(self._values).to_bytes(8, "big")).digest()
        with contextlib.closing(Stream(self.host.place(known.name))) as wire:
            assert rc(wire.exchange(rq.pcr_extend(PCR, {Alg.SHA256: digest}))) == 0
        known.pcr = hashlib.sha256(known.pcr + digest).digest()
        self._woken(known)

    def look(self, known: Known) -> None:
        """All of it is what it was; that is seen by who has it open, and by somebody who comes."""
        for client in known.clients:
            self.randoms.fresh(client.wire)
            client.goes_on()
        with contextlib.closing(Stream(self.host.place(known.name))) as wire:
            self.randoms.fresh(wire)
            value, pcr = nv_of(wire), pcr_of(wire)
            ek = rq.read_public_area(wire.exchange(READ_EK)).encode()
        assert ek == known.ek, f"{known.name} has another EK"
        assert value in known.values, f"{known.name}: {value} is there, not {known.values}"
        known.values = (value,)
        assert pcr == known.pcr, f"{known.name}: PCR 16 is {pcr.hex()}, not {known.pcr.hex()}"
        self._woken(known)

    def _woken(self, known: Known) -> None:
        """Somebody was served, and by no more than one."""
        if known.asleep:
            known.asleep, known.rises = False, True
            # Who is served may be so before the daemon has heard that all is done.
            until("it is awake", lambda: self._state(known) == "active")

    def _state(self, known: Known) -> str:
        live = copies(self.host).get(known.name, ())
        assert len(live) <= 1, f"{known.name} is live in {live}"
        return str(self.host.inspect(known.name)["state"])

    # --- sleeping ---

    def sleep(self, known: Known) -> None:
        def sleeps() -> bool:
            with contextlib.suppress(Conflict):  # its last client is just being let go
                self.host.call("POST", f"/v1/vtpms/{known.name}/sleep", {})
                return True
            return False

        until("it sleeps", sleeps, 5)
        known.asleep = True
        known.blobs.append(blob_of(self.host, known).read_bytes())

    def power_off_with_an_older_blob(self, known: Known) -> None:
        """It was shut down in order when it fell asleep before, and that is not what it is now."""
        blob_of(self.host, known).write_bytes(known.blobs[0])
        before = content(self.host, STATES)
        self._stop(known)
        assert content(self.host, STATES) == before
        known.off()

    def wake_with_an_older_blob(self, known: Known) -> None:
        """What it slept with before opens no more: a TPM Reset, and counted."""
        place = blob_of(self.host, known)
        place.write_bytes(known.blobs[0])
        for client in known.clients:
            client.has_nothing()
        Stream(self.host.place(known.name)).close()
        self._woken(known)
        self._reset(known)

    # --- snapshots ---

    def snapshot(self, known: Known) -> None:
        name = f"s{next(self._values)}"
        path = f"/v1/vtpms/{known.name}/snapshots"
        taken = self.host.call("POST", path, {"name": name})
        assert taken["epoch"] == known.epoch, taken
        known.snapshots[name] = known.values

    def restore(self, known: Known, name: str) -> None:
        path = f"/v1/vtpms/{known.name}/snapshots/{name}/restore"
        restored = self.host.call("POST", path, {"reason": "a history"})
        assert restored["epoch"]["was"] == known.epoch, restored
        assert restored["epoch"]["is"] > known.epoch, restored
        known.values, known.rises = known.snapshots[name], True
        known.lineage += 1
        assert restored["lineage"]["is"] == known.lineage, restored

    def remove(self, known: Known, name: str) -> None:
        self.host.call("DELETE", f"/v1/vtpms/{known.name}/snapshots/{name}")
        del known.snapshots[name]

    # --- what is refused ---

    def ask_for_what_cannot_be(self, known: Known) -> None:
        """Whatever a vTPM in this state cannot be asked for changes nothing."""
        one = f"/v1/vtpms/{known.name}"
        calls = [
            ("POST", "/v1/vtpms", {"name": known.name, "profile": "plain"}),
            ("POST", f"{one}/snapshots/none/restore", {"reason": "a history"}),
            ("DELETE", f"{one}/snapshots/none", None),
        ]
        if known.on:
            calls += [
                ("POST", f"{one}/start", {}), ("DELETE", one, None),
                ("POST", f"{one}/snapshots", {"name": "s"}),
            ]  # fmt: skip
            for name in known.snapshots:
                calls.append(("POST", f"{one}/snapshots/{name}/restore", {"reason": "a history"}))
        else:
            calls.append(("POST", f"{one}/sleep", {}))
        before = content(self.host)
        for call in calls:
            with pytest.raises((Conflict, NotFound)):
                self.host.call(*call)
        assert content(self.host) == before, f"{known.name} was changed by what was refused"

    # --- deaths ---

    def kill_worker(self, known: Known, delay: int, *, writes: bool) -> None:
        """A TPM Reset; with a write under way it is there or it is not."""
        (victim,) = copies(self.host)[known.name]
        self._kill(victim, known if writes else None, delay)
        self._replaced(known, victim)

    def kill(self, what: str, known: Known, delay: int) -> None:
        """kill -9 of keeper, daemon or spawner while `known` writes, if it is on."""
        victim, live = self.host.children()[what], copies(self.host)
        self._kill(victim, known if known.state == "active" else None, delay)
        until(f"a new {what}", lambda: self.host.children().get(what, victim) != victim, SECONDS)
        until("all answer", self._works, SECONDS)
        for each in self.known.values():
            for pid in live.get(each.name, ()):
                if what == "spawner":
                    self._replaced(each, pid)
                else:
                    now = copies(self.host).get(each.name)
                    assert now == {pid}, f"{each.name} is live in {now}, not {pid}"
            if what == "spawner" and each.asleep:  # whose connections went with it
                self._streams_end(each)
                until(f"{each.name} is heard", partial(self._heard, each), SECONDS)

    def _heard(self, known: Known) -> bool:
        return known.name in held(self.host)

    def _works(self) -> bool:
        """Keeper and spawner are there for whoever comes next."""
        if not self.host.answers():
            return False
        try:
            found = self.host.call("GET", "/v1/doctor")["findings"]
        except HoldfastError:
            return False
        findings = {finding["what"]: finding["level"] for finding in found}
        return {findings["keeper"], findings["spawner"], findings["freshness"]} == {"ok"}

    def _kill(self, victim: int, writer: Known | None, delay: int) -> None:
        """Kill, and hear what became of what was under way."""
        if writer is None or writer.values == (None,):
            os.kill(victim, signal.SIGKILL)
            return
        value = next(self._values)
        with connect(self.host.place(writer.name) / "run" / "tpm.sock", SECONDS) as sock:
            sock.sendall(rq.nv_write(Rh.OWNER, INDEX, value.to_bytes(8, "big"), 0))
            select.select([], [], [], delay / 1000)  # a moment, not a wait for anything
            os.kill(victim, signal.SIGKILL)
            try:
                refused = rc(receive(sock))
            except ConnectionError:
                writer.values = (*writer.values, value)
                return
        if not refused:
            writer.values, writer.rises = (value,), True

    def _replaced(self, known: Known, victim: int) -> None:
        """Another worker has taken this one's place; at no time there were two."""

        def replaced() -> bool:
            live = copies(self.host, (victim,)).get(known.name, set())
            assert len(live) <= 1, f"{known.name} is live in {live}"
            restarts = self.host.inspect(known.name)["restarts"]
            return restarts > known.restarts and len(live) == 1 and victim not in live

        until(f"{known.name} has another worker", replaced, SECONDS)
        with contextlib.closing(Stream(self.host.place(known.name))) as wire:
            self.randoms.fresh(wire)  # it serves
        self._streams_end(known)
        for client in known.clients:
            client.has_nothing()
        # While spawner or keeper is away it is tried again, and each try counts.
        tries = self.host.inspect(known.name)["restarts"] - known.restarts
        self._reset(known, tries)

    def _streams_end(self, known: Known) -> None:
        """Connections are gone with who had them; open files go on."""
        for client in [each for each in known.clients if isinstance(each.wire, Stream)]:
            with pytest.raises(ConnectionError):
                client.has_nothing()
            client.wire.close()
            known.clients.remove(client)

    def _reset(self, known: Known, tries: int = 1) -> None:
        known.leave()
        known.restarts += tries
        known.rises = True
        known.pcr = bytes(32)
        known.blobs.clear()

    # --- the whole host ---

    def stop_and_start(self) -> None:
        self._stop_all()
        self.host.start()

    def _stop_all(self) -> None:
        assert self.host.stop() == 0
        for known in self.known.values():
            known.rises |= known.on
            known.off()

    def put_an_older_registry_back(self, known: Known) -> None:
        """It is refused, and nothing of it changed; with the right one all goes on."""
        host, aside = self.host, self.host.directory / "aside"
        older, newest = aside / "older", aside / "newest"
        newest.mkdir(parents=True)
        with registry(host) as db, contextlib.closing(sqlite3.connect(older)) as copy:
            db.backup(copy)
        if not known.on:
            self.power_on(known)
        self._stop_all()
        for file in registry_files(host):
            file.rename(newest / file.name)
        shutil.copy(older, host.database)
        before = content(host, STATES)
        host.start()
        finding = host.finding("freshness")
        assert finding["level"] == "problem", finding
        for name in self.known:
            with pytest.raises(HoldfastError, match="older than"):
                host.power_on(name)
        with pytest.raises(HoldfastError, match="older than"):
            host.create("never")
        assert content(host, STATES) == before, "the older registry was changed"
        assert host.stop() == 0
        for file in registry_files(host):
            file.unlink()
        for file in newest.iterdir():
            file.rename(host.database.with_name(file.name))
        shutil.rmtree(aside)
        host.start()

    # --- its end ---

    def end(self) -> None:
        """Each is looked at a last time, and destroyed."""
        for known in list(self.known.values()):
            if known.on:
                self.look(known)
            else:
                self.power_on(known)
            self.power_off(known)
            self.destroy(known)
        self.check()
