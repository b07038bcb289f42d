"""Another recovery key for a host that goes on running: what goes on, and what the old one is for.

Its indices, its issuing CA and the policies of its keys are others afterwards; what the chains
remembered is not.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyrage
import pytest

from holdfast.errors import HoldfastError
from holdfast.evidence.bundle import Anchored, Evidence
from holdfast.hwtpm.host import INDICES, OTHER_INDICES
from holdfast.hwtpm.transport import Transport
from holdfast.keeper import vault
from holdfast.tpm2 import requests as rq
from holdfast.tpm2.commands import Cc
from holdfast.tpm2.constants import Cap
from tests.asking import connect, exchange, rc
from tests.commands import handle_of

from .serve import Serve, a_host, build_images, container
from .test_faults import Stream, define, read, write

NONCE = "0123456789abcdef"


@dataclass
class Keys:
    """An administrator's files, of one recovery key after the other."""

    host: Serve
    identity: Path
    files: Path
    count: int = 0

    def present(self) -> tuple[str, ...]:
        return (
            "--identity", str(self.identity), "--recovery-file", str(self.files / "recovery.age"),
            "--config", str(self.host.config),
        )  # fmt: skip

    def change(self, *options: str) -> tuple[str, ...]:
        """What `rekey` is to be told; then `took` the new files."""
        self.count += 1
        fresh = pyrage.x25519.Identity.generate()
        place = self.host.directory / f"new{self.count}"
        self._next = self.host.directory / f"identity{self.count}", place
        self._next[0].write_text(str(fresh))
        return (
            "rekey", "--recovery", *self.present(), "--json",
            "--site-root-key", str(self.files / "site-root-ca.key.age"),
            "--recovery-recipient", str(fresh.to_public()), "--out", str(place), *options,
        )  # fmt: skip

    def took(self) -> None:
        self.identity, self.files = self._next


def keys_of(host: Serve) -> Keys:
    return Keys(host, host.directory / "identity", host.directory / "out")


def changed(keys: Keys, *options: str) -> dict[str, Any]:
    done = keys.host.cli(*keys.change(*options))
    assert done.returncode == 0, done.stderr
    keys.took()
    told: dict[str, Any] = json.loads(done.stdout)
    return told


def anchored(host: Serve, name: str) -> Anchored:
    """What evidence says of the host TPM's anchor."""
    value = host.call("POST", f"/v1/vtpms/{name}/evidence", {"nonce": NONCE})
    text = json.dumps(value, separators=(",", ":"), sort_keys=True)
    return Evidence.decode(text.encode()).anchored


def indices(host: Serve) -> set[int]:
    """Those of ours that are in the host TPM."""
    transport = Transport(f"swtpm:path={host.directory}/tpm.sock")
    try:
        tcti = transport.attach()
        tcti.transmit(rq.get_capability(Cap.HANDLES, INDICES[0], 64))
        params = rq.response(Cc.GetCapability, bytes(tcti.receive())).params
        params.take(5)
        there = {params.u32() for _ in range(params.u32())}
    finally:
        transport.close()
    return there & {*INDICES, *OTHER_INDICES}


@pytest.fixture
def host() -> Iterator[Serve]:
    with a_host(per_day=1000) as made:
        yield made


def test_vtpms_evidence_and_the_count_of_what_was_go_on(host: Serve) -> None:
    host.create("web")
    host.power_on("web")
    (worker,) = host.workers()
    wire = Stream(host.place("web"))
    define(wire)
    assert write(wire, 7) == 0
    before, keys = anchored(host, "web"), keys_of(host)
    with contextlib.closing(connect(host.place("web") / "run/tpm.sock")) as sock:
        session = handle_of(exchange(sock, rq.start_policy_session()))
        told = changed(keys)
        assert told["keys"] == ["recovery"]
        assert Path(told["recovery_key"]).exists()
        assert rc(exchange(sock, rq.flush_context(session))) == 0
    assert host.workers() == [worker]
    assert read(wire) == 7
    assert write(wire, 8) == 0
    after = anchored(host, "web")
    assert after.public != before.public
    now, then = after.link.anchor, before.link.anchor
    assert now.sequence > then.sequence
    assert (now.boot, now.unclean, now.recoveries) == (then.boot, 0, 0)
    host.create("made-later")
    host.power_on("made-later")
    anchored(host, "made-later")
    assert indices(host) == set(OTHER_INDICES)
    wire.close()


def test_after_a_reset_of_the_tpm_all_is_in_order(host: Serve) -> None:
    keys = keys_of(host)
    host.create("web")
    for there in (OTHER_INDICES, INDICES):  # and back to the first numbers
        changed(keys)
        assert host.stop() == 0
        host.end_tpm()
        host.start_tpm()
        host.start()
        assert host.finding("freshness")["says"].endswith(
            "all was in order when the host ended last"
        )
        host.power_on("web")
        host.call("POST", "/v1/vtpms/web/stop", {})
        assert indices(host) == set(there)


def test_the_old_recovery_key_is_of_no_use_and_the_new_one_is(host: Serve) -> None:
    keys = keys_of(host)
    old = keys.present()
    changed(keys)
    done = host.cli("policy", "authorize", *old)
    assert done.returncode == 4
    assert "another by now" in done.stderr
    done = host.cli("policy", "authorize", *keys.present())
    assert done.returncode == 0, done.stderr


def test_a_copy_from_before_opens_in_the_host_tpm_no_more(host: Serve, tmp_path: Path) -> None:
    """Not even the root key: what approved it is gone with the index that it names."""
    state, copy = host.directory / "state", tmp_path / "state"
    shutil.copytree(state, copy)
    changed(keys_of(host))
    assert host.stop() == 0
    shutil.rmtree(state)
    shutil.copytree(copy, state)
    host.start()
    says = host.finding("keeper")["says"]
    assert "0x01804846" in says, says
    assert "is not in this host TPM" in says, says


def test_all_keys_at_once(host: Serve) -> None:
    host.create("web")
    told = changed(keys_of(host), "--root", "--data")
    assert told["keys"] == ["recovery", "root", "data"]
    assert (told["vtpms"], told["left"], told["done"]) == (1, {}, True)
    host.power_on("web")


def test_another_root_key_and_other_approvals_wait_until_it_is_done(host: Serve) -> None:
    """Prepared while no daemon runs, it is in force when one does, and not before."""
    keys = keys_of(host)
    host.create("web")
    assert host.stop() == 0
    given = keys.change()
    done = host.cli(*given)
    assert done.returncode == 6
    assert "start holdfast serve, then run this again" in done.stderr
    host.start()
    done = host.cli("policy", "authorize", *keys.present())
    assert done.returncode == 4, done.stderr
    done = host.cli("rekey", "--root")
    assert done.returncode == 4, done.stderr
    assert "--recovery" in done.stderr
    done = host.cli(*given)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["keys"] == ["recovery", "root"]
    keys.took()
    host.power_on("web")
    done = host.cli("policy", "authorize", *keys.present())
    assert done.returncode == 0, done.stderr


def test_what_is_not_given_or_is_anothers_changes_nothing(host: Serve) -> None:
    keys = keys_of(host)
    before = vault.load(host.directory / "state" / "keeper")
    assert host.cli("rekey", "--recovery").returncode == 2
    given = list(keys.change())
    given[given.index("--site-root-key") + 1] = str(keys.files / "recovery.age")
    assert host.cli(*given).returncode == 2
    given = list(keys.change())
    given[given.index("--out") + 1] = str(keys.files)
    done = host.cli(*given)
    assert done.returncode == 4
    assert "exists" in done.stderr
    assert vault.load(host.directory / "state" / "keeper") == before
    assert indices(host) == set(INDICES)


def test_a_disk_from_the_moment_before_is_refused_after_it(host: Serve, tmp_path: Path) -> None:
    """What was carried over is exactly what there was: an older registry is not that."""
    host.create("web")
    host.power_on("web")
    assert host.stop() == 0
    copy = tmp_path / "registry"
    copy.mkdir()
    for path in host.database.parent.glob("registry.sqlite*"):
        shutil.copy(path, copy)
    host.start()
    host.power_on("web")
    changed(keys_of(host))
    assert host.process is not None
    host.children()
    host.process.send_signal(signal.SIGTERM)
    assert host.process.wait(60) == 0
    host.process = None
    for path in host.database.parent.glob("registry.sqlite*"):
        path.unlink()
    for path in copy.iterdir():
        shutil.copy(path, host.database.parent)
    host.start()
    assert host.finding("freshness")["level"] == "problem"
    with pytest.raises(HoldfastError):
        host.power_on("web")


@pytest.mark.skipif(not shutil.which("podman"), reason="podman is not installed")
def test_evidence_is_accepted_by_the_same_policy_and_by_progress_begun_anew(
    tmp_path: Path,
) -> None:
    """Of a vTPM whose certificates are of the issuing CA before, and of one of the present one."""
    build_images()
    with a_host(cdi=Path("/run/cdi")) as host:
        given = ("--nonce", NONCE, "--site-root", str(host.directory / "out/site-root-ca.pem"))

        def judged(name: str, evidence: Path, progress: str) -> tuple[int, str]:
            done = host.cli("attest", name, "--nonce", NONCE, "--out", str(evidence))
            assert done.returncode == 0, done.stderr
            policy = str(tmp_path / name)  # which names the configuration of its container
            if not Path(policy).exists():
                software = ("--software-host-tpm", host.made["host_ak_name"], "--out", policy)
                made = host.cli("policy", "create", str(evidence), *given, *software)
                assert made.returncode == 0, made.stderr
            done = host.cli(
                "verify", str(evidence), "--policy", policy, "--nonce", NONCE,
                "--progress", str(tmp_path / progress),
            )  # fmt: skip
            return done.returncode, done.stdout

        old, new = f"old{os.getpid()}", f"new{os.getpid()}"
        host.create(old, "linked")
        with container(old):
            assert judged(old, tmp_path / "1", "first")[0] == 0
            assert judged(old, tmp_path / "2", "first")[0] == 0
            changed(keys_of(host))
            code, says = judged(old, tmp_path / "3", "first")
            assert (code, "begin a new progress" in says) == (7, True), says
            assert judged(old, tmp_path / "4", "second")[0] == 0
            assert judged(old, tmp_path / "5", "second")[0] == 0
        host.create(new, "linked")
        with container(new):
            assert judged(new, tmp_path / "6", "third")[0] == 0
