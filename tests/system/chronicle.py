"""What must be true of the vTPMs of one history, and how that is compared with a host.

A `Known` is the model of one vTPM: what it has acknowledged, and what a power cycle or a death has
taken from it. `compare` looks at the registry's file, at the API and at the processes.

Not here: what is done to them (`histories`).
"""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from holdfast.tpm2 import requests as rq
from holdfast.tpm2.algorithms import Alg
from holdfast.tpm2.constants import EK_RSA_HANDLE, Rh
from holdfast.tpm2.structures import PcrSelection
from tests.asking import rc
from tests.commands import data_in, digest_of, handle_of, said, say, sealed, unseal

from .serve import Serve, children
from .test_faults import INDEX, Wire

PCR: Final = 16
RANDOM: Final = rq.get_random(16)
READ_PCR: Final = rq.pcr_read(PcrSelection.of(Alg.SHA256, (PCR,)))
READ_EK: Final = rq.read_public(EK_RSA_HANDLE)
READ_NV: Final = rq.nv_read(Rh.OWNER, INDEX, 8, 0)
_ZERO: Final = bytes(32)
_BURIED: Final = ("sealed", "wrapped")  # columns


class Client:
    """Somebody who keeps a TPM open, with an object and a session in it."""

    def __init__(self, wire: Wire, secret: bytes) -> None:
        self.wire = wire
        self._secret = secret
        self._key = handle_of(wire.exchange(sealed(secret)))
        self._session = handle_of(wire.exchange(rq.start_policy_session()))
        self._digest = bytes(32)
        self._said = 0

    def goes_on(self) -> None:
        """All that it had is there, and its session goes on from where it was."""
        answer = self.wire.exchange(unseal(self._key))
        assert rc(answer) == 0, f"its object is gone: {rc(answer):#x}"
        assert data_in(answer) == self._secret, "its object is another's"
        digest = self.wire.exchange(digest_of(self._session))[12:44]
        assert digest == self._digest, f"its session is at {digest.hex()}"
        self._said += 1
        assert rc(self.wire.exchange(say(self._session, self._said))) == 0
        self._digest = said(self._digest, self._said)

    def has_nothing(self) -> None:
        """Its TPM was reset while it stayed connected."""
        for command in (unseal(self._key), digest_of(self._session)):
            assert rc(self.wire.exchange(command)) != 0


@dataclass
class Known:
    """One vTPM: `values` are those of which one is in its NV index; None: there is no index."""

    name: str
    id: str
    ek: bytes
    on: bool = False
    asleep: bool = False
    values: tuple[int | None, ...] = (None,)
    pcr: bytes = _ZERO
    epoch: int = 0
    rises: bool = True  # since its epoch was looked at last, something was committed
    lineage: int = 0
    restarts: int = 0
    snapshots: dict[str, tuple[int | None, ...]] = field(default_factory=dict)
    clients: list[Client] = field(default_factory=list)
    blobs: list[bytes] = field(default_factory=list)  # that it has slept with, in this run
    buried: set[bytes] = field(default_factory=set)  # what no file is to have once it is destroyed

    @property
    def state(self) -> str:
        return ("asleep" if self.asleep else "active") if self.on else "off"

    def off(self) -> None:
        """It has no power any more."""
        self.leave()
        self.on = self.asleep = False
        self.blobs.clear()
        self.pcr = _ZERO

    def leave(self) -> None:
        """Its clients go."""
        for client in self.clients:
            with contextlib.suppress(OSError):  # of a device that is gone
                client.wire.close()
        self.clients.clear()


class Randoms:
    """All random numbers that any TPM ever gave: none twice."""

    def __init__(self) -> None:
        self._seen: set[bytes] = set()

    def fresh(self, wire: Wire) -> None:
        answer = wire.exchange(RANDOM)
        assert rc(answer) == 0, hex(rc(answer))
        number = answer[12:]
        assert len(number) == 16
        assert number not in self._seen, f"the random number {number.hex()} came twice"
        self._seen.add(number)


def nv_of(wire: Wire) -> int | None:
    answer = wire.exchange(READ_NV)
    return int.from_bytes(answer[16:24], "big") if rc(answer) == 0 else None


def pcr_of(wire: Wire) -> bytes:
    return rq.pcr_read_values(wire.exchange(READ_PCR))[1][0]


# --- a host, seen from outside -------------------------------------------------------------------


@contextlib.contextmanager
def registry(host: Serve) -> Iterator[sqlite3.Connection]:
    """The registry, to be read."""
    with contextlib.closing(sqlite3.connect(f"file:{host.database}?mode=ro", uri=True)) as db:
        db.row_factory = sqlite3.Row
        yield db


def registry_files(host: Serve) -> list[Path]:
    return sorted(host.database.parent.glob(host.database.name + "*"))


STATES: Final = ("states", "keys", "snapshots", "gone")


def content(host: Serve, tables: tuple[str, ...] = ("instances", *STATES)) -> list[tuple[Any, ...]]:
    """All rows that say what vTPMs there are, and what their states are."""
    with registry(host) as db:
        return [tuple(row) for name in tables for row in db.execute(f"SELECT * FROM {name}")]


def copies(host: Serve, workers: Iterable[int] = ()) -> dict[str, set[int]]:
    """Processes in which a vTPM is live, by its name: workers that have one of its sockets.

    As the kernel says it. `workers`: others to be looked at than the spawner's.
    """
    spawner = host.children().get("spawner")
    its = children(spawner) if spawner else ()
    # One just forked has its maker's until it is in its box.
    return _holders(host, (pid for pid in {*workers, *its} if _boxed(pid)))


def held(host: Serve) -> set[str]:
    """Names of vTPMs whose sockets the spawner has: whoever comes is heard."""
    spawner = host.children().get("spawner")
    return set(_holders(host, (spawner,))) if spawner else set()


def _holders(host: Serve, pids: Iterable[int]) -> dict[str, set[int]]:
    base = f"{host.directory}/run/vtpm/"
    names = {}
    for line in Path("/proc/net/unix").read_text(errors="replace").splitlines():
        if base in line:  # others' names may be any bytes
            inode, path = line.split()[6:8]
            names[inode] = path.removeprefix(base).partition("/")[0]
    found: dict[str, set[int]] = {}
    for pid in pids:
        for inode in _sockets(pid) & names.keys():
            found.setdefault(names[inode], set()).add(pid)
    return found


def _boxed(pid: int) -> bool:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has ended
        return "\nSeccomp:\t2" in Path(f"/proc/{pid}/status").read_text()
    return False


def _sockets(pid: int) -> set[str]:
    """Inodes of a process's sockets."""
    found: set[str] = set()
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has ended
        for fd in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(FileNotFoundError):  # closed meanwhile
                target = os.readlink(f"/proc/{pid}/fd/{fd}")
                if target.startswith("socket:["):
                    found.add(target[8:-1])
    return found


def compare(host: Serve, all_known: Iterable[Known]) -> None:
    """The host has these vTPMs and no others, and each is what is known of it."""
    by_id = {known.id: known for known in all_known}
    with registry(host) as db:
        made = {row["id"]: row for row in db.execute("SELECT * FROM instances")}
        states = {row["id"]: row for row in db.execute("SELECT * FROM states")}
        keys = {row["id"]: row for row in db.execute("SELECT * FROM keys")}
        taken = list(db.execute("SELECT * FROM snapshots"))
    for rows in (made, states, keys):
        assert rows.keys() == by_id.keys(), f"there are {list(rows)}, not {list(by_id)}"
    for own, known in by_id.items():
        record, state = json.loads(made[own]["record"]), states[own]
        assert made[own]["name"] == known.name
        assert keys[own]["ek_rsa"] == known.ek, f"{known.name} has another EK"
        least = known.epoch + known.rises
        assert state["epoch"] >= least, f"{known.name}: epoch {state['epoch']}, not {least}"
        known.epoch, known.rises = state["epoch"], False
        for what in ("lineage", "restarts"):
            wanted = getattr(known, what)
            assert record[what] == wanted, f"{known.name}: {what} {record[what]}, not {wanted}"
        its = {row["name"]: row for row in taken if row["instance"] == own}
        assert its.keys() == known.snapshots.keys(), f"{known.name} has snapshots {list(its)}"
        known.buried |= {row[what] for row in (*its.values(), state) for what in _BURIED}
    assert {row["instance"] for row in taken} <= by_id.keys(), "there are snapshots of nobody"
    listed = {each["name"]: each["state"] for each in host.call("GET", "/v1/vtpms")["vtpms"]}
    states_known = {known.name: known.state for known in by_id.values()}
    assert listed == states_known, f"they are {listed}, not {states_known}"
    live = {name: len(pids) for name, pids in copies(host).items()}
    alive = {known.name: 1 for known in by_id.values() if known.state == "active"}
    assert live == alive, f"live are {live}, not {alive}"


def gone(host: Serve, known: Known) -> None:
    """Nothing that could be opened is left of it in any file of the registry."""
    for file in registry_files(host):
        data = file.read_bytes()
        assert not any(piece in data for piece in known.buried), f"{known.name} is still in {file}"
    assert not host.place(known.name).exists()
    assert not blob_of(host, known).exists()


def blob_of(host: Serve, known: Known) -> Path:
    """Where what it sleeps with is kept."""
    return host.directory / "run" / "asleep" / known.id
