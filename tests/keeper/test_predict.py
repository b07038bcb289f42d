"""A boot state approved before the boot: predicted from the log, its root key opens at once.

The logs are of two real boots (`tests/fixtures/boot`) that differ in the program they start.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from holdfast.eventlog import tcg2
from holdfast.hwtpm.transport import Transport
from holdfast.protocol import ipc
from holdfast.tpm2 import requests as rq
from holdfast.tpm2.algorithms import Alg
from holdfast.tpm2.commands import Cc
from tests.hwtpm.swtpm import Swtpm

from .box import Box

BOOT = Path(__file__).parents[1] / "fixtures" / "boot"
PROGRAM = str(Path(sys.executable).with_name("holdfast"))
pytestmark = pytest.mark.needs_root  # peers of the keeper are


def boot(swtpm: Swtpm, log: Path) -> None:
    """Power the TPM on and extend what firmware did in that boot."""
    swtpm.stop()
    swtpm.start()
    transport = Transport(swtpm.tcti)
    tcti = transport.attach()
    for event in tcg2.parse(log.read_bytes()).extends():
        digests = {Alg.SHA256: event.digests[Alg.SHA256]}
        tcti.transmit(rq.pcr_extend(event.pcr, digests))
        rq.response(Cc.PCR_Extend, bytes(tcti.receive()))
    transport.close()


@pytest.fixture
def host() -> Iterator[Box]:
    """A host that was set up in the first of the two boots."""
    directory = Path(tempfile.mkdtemp(prefix="hf"))
    directory.chmod(0o711)
    swtpm = Swtpm(directory)
    box = Box(directory, swtpm)
    try:
        boot(swtpm, BOOT / "old.bin")
        box.provision()
        write_config(box, BOOT / "old.bin")
        yield box
    finally:
        box.stop()
        swtpm.stop()
        shutil.rmtree(directory)


def write_config(box: Box, log: Path) -> None:
    (box.directory / "holdfast.toml").write_text(
        f'[host]\ntcti = "{box.swtpm.tcti}"\nevent_log = "{log}"\nstand_in = true\n'
        f'[paths]\nstate = "{box.directory}"\n'
    )


def predict(box: Box, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [PROGRAM, "policy", "predict", "--config", str(box.directory / "holdfast.toml")]
    return subprocess.run(
        [*command, *arguments], cwd=BOOT, capture_output=True, text=True, timeout=60, check=False
    )


def why_not_open(box: Box) -> str:
    """Empty when the keeper is open."""
    box.start()
    with box.connect() as client:
        state = client.ask(ipc.KeeperStatus(), ipc.KeeperState)
    box.stop()
    assert state.open is not bool(state.why_not)
    return state.why_not


def test_what_was_predicted_and_approved_opens_at_the_next_boot(host: Box) -> None:
    assert why_not_open(host) == ""
    values = host.directory / "next.json"
    done = predict(host, "--boot-application", "old.efi=new.efi", "--out", str(values))
    assert done.returncode == 0, done.stderr
    host.authorize("--values", str(values))
    assert why_not_open(host) == ""  # until the update is made, all is as it was
    boot(host.swtpm, BOOT / "new.bin")
    assert why_not_open(host) == ""
    boot(host.swtpm, BOOT / "old.bin")  # and back, as long as the old one is not retired
    assert why_not_open(host) == ""


def test_what_was_not_predicted_does_not_open_and_its_pcr_is_named(host: Box) -> None:
    values = host.directory / "next.json"
    predict(host, "--out", str(values))  # the change that is coming is left out
    host.authorize("--values", str(values))
    boot(host.swtpm, BOOT / "new.bin")
    assert "of sha256:0,2,4,7, PCR 4 differs" in why_not_open(host)


def test_pcrs_are_those_that_were_approved_and_the_keeper_may_serve_meanwhile(host: Box) -> None:
    host.start()
    done = predict(host)
    seen = json.loads((BOOT / "pcrs.json").read_text())["old"]
    assert json.loads(done.stdout) == {pcr: seen[pcr] for pcr in ("0", "2", "4", "7")}
    with host.connect() as client:
        assert client.ask(ipc.KeeperStatus(), ipc.KeeperState).open


def test_a_log_that_is_not_of_this_boot_predicts_nothing(host: Box) -> None:
    write_config(host, BOOT / "new.bin")
    done = predict(host)
    assert (done.returncode, done.stdout) == (7, "")
    assert "does not lead to what the host TPM has in PCR 4" in done.stderr
    host.swtpm.extend(2)
    write_config(host, BOOT / "old.bin")
    assert "host TPM has in PCR 2:" in predict(host).stderr
    assert predict(host, "--pcrs", "0,4,7").returncode == 0


def test_the_boot_state_that_counts_and_the_one_there_is_are_told(host: Box) -> None:
    boot(host.swtpm, BOOT / "new.bin")
    state = host.run("boot-state")
    seen = json.loads((BOOT / "pcrs.json").read_text())
    assert state["pcrs"] == [0, 2, 4, 7]
    assert state["present"]["4"] == seen["new"]["4"]
    (approved,) = state["approved"]
    assert approved == {"version": 1, "values": {p: seen["old"][p] for p in ("0", "2", "4", "7")}}
