"""QEMU drives a Holdfast TPM through its life: firmware, kernel, IMA, reset, off, migration."""

from __future__ import annotations

import base64
import re
import time

import pytest

from holdfast.eventlog import ima, tcg2
from holdfast.eventlog.replay import initial, replay
from holdfast.tpm2.algorithms import Alg

from .conftest import MakeVm, Vm

SECURITY = "/sys/kernel/security"


def pcrs(vm: Vm) -> dict[int, bytes]:
    """sha256 PCRs as the guest's kernel reads them."""
    text = vm.guest.run("cd /sys/class/tpm/tpm0/pcr-sha256 && grep . *")
    return {int(n): bytes.fromhex(value) for n, value in re.findall(r"(\d+):([0-9A-F]{64})", text)}


def read_file(vm: Vm, path: str) -> bytes:
    return base64.b64decode(vm.guest.run(f"base64 {path}"))


def clock(vm: Vm) -> dict[str, str]:
    text = vm.guest.run("tpm2_readclock")
    return dict(re.findall(r"(\w+): (\w+)", text))


@pytest.mark.parametrize("model", ["tpm-crb", "tpm-tis"])
def test_firmware_and_kernel_measure_into_it(make_vm: MakeVm, model: str) -> None:
    vm = make_vm("vm", model=model, append="ima_policy=tcb")
    vm.start()
    log = tcg2.parse(read_file(vm, f"{SECURITY}/tpm0/binary_bios_measurements"))
    values = pcrs(vm)
    steps = [(event.pcr, event.digests) for event in log.extends()]
    replayed = replay(initial((Alg.SHA256,), log.startup_locality), steps)[Alg.SHA256]
    assert len(steps) > 20
    for pcr in (0, 1, 2, 3, 4, 5, 6, 7, 9):
        assert replayed[pcr] == values[pcr], pcr
        assert any(values[pcr])
    # The kernel's own driver and its resource manager, by unmodified tools without any option.
    assert vm.guest.run("ls /dev/tpm0 /dev/tpmrm0").split() == ["/dev/tpm0", "/dev/tpmrm0"]
    vm.guest.run(
        "cd /run && tpm2_createprimary -Q -c p.ctx && "
        "tpm2_create -Q -C p.ctx -G ecc -u k.pub -r k.priv && "
        "tpm2_load -Q -C p.ctx -u k.pub -r k.priv -c k.ctx && echo hello > m && "
        "tpm2_sign -Q -c k.ctx -g sha256 -o s m && tpm2_verifysignature -Q -c k.ctx -m m -s s"
    )
    # IMA: what ran is in its log, and its log leads to PCR 10.
    vm.guest.run("tpm2_getrandom 8")
    measured: tuple[tuple[int, ima.Entry], ...] = ()
    for _ in range(3):  # to look may be to run something for the first time
        before, values = measured, pcrs(vm)
        text = read_file(vm, f"{SECURITY}/ima/ascii_runtime_measurements").decode()
        measured = ima.parse_ascii(text)
    assert measured == before
    assert {"/usr/bin/tpm2", "/usr/bin/dash"} <= {entry.path for _, entry in measured}
    steps = [(pcr, {Alg.SHA256: entry.digest(Alg.SHA256)}) for pcr, entry in measured]
    assert replay(initial((Alg.SHA256,), 0), steps)[Alg.SHA256][10] == values[10]
    vm.power_off()


def test_it_lives_through_reset_and_power_cycles(make_vm: MakeVm) -> None:
    vm = make_vm("vm")
    vm.start()
    vm.guest.run(
        "cd /run && tpm2_createprimary -Q -c p.ctx && tpm2_evictcontrol -Q -c p.ctx 0x81000001 && "
        "tpm2_nvdefine -Q 0x1500001 -s 4 && printf abcd | tpm2_nvwrite -Q 0x1500001 -i -"
    )
    name = vm.guest.run("tpm2_readpublic -c 0x81000001 | grep ^name:")
    vm.guest.run("tpm2_pcrextend 16:sha256=" + "ab" * 32)
    first, booted = clock(vm), pcrs(vm)
    assert any(booted[16])
    vm.guest.reset()
    second = clock(vm)
    assert int(second["reset_count"]) > int(first["reset_count"])
    assert pcrs(vm) == {**booted, 16: bytes(32)}
    assert vm.guest.run("tpm2_readpublic -c 0x81000001 | grep ^name:") == name
    vm.power_off()
    vm.start()
    third = clock(vm)
    assert int(third["reset_count"]) > int(second["reset_count"])
    assert third["safe"] == "yes"
    assert vm.guest.run("tpm2_readpublic -c 0x81000001 | grep ^name:") == name
    assert vm.guest.run("tpm2_nvread -s 4 0x1500001") == "abcd"
    vm.power_off()


def test_a_tpm_goes_along_when_its_machine_migrates(make_vm: MakeVm) -> None:
    source = make_vm("source")
    source.start()
    source.guest.run(
        "cd /run && tpm2_createprimary -Q -C n -c p.ctx && tpm2_pcrextend 16:sha256="
        + "cd" * 32
        + " && tpm2_nvdefine -Q 0x1500001 -s 4 && printf abcd | tpm2_nvwrite -Q 0x1500001 -i - &&"
        " tpm2_startauthsession --policy-session -S s.ctx &&"
        " tpm2_policypcr -Q -S s.ctx -l sha256:16"
    )
    before, values = clock(source), pcrs(source)
    link = f"unix:{source.directory / 'migration'}"
    target = make_vm("target", incoming=link)
    target.start()  # its TPM is empty: state comes by the machine's migration
    source.guest.monitor("migrate", uri=link)
    deadline = time.monotonic() + 120
    while True:
        status = source.guest.monitor("query-migrate")
        assert isinstance(status, dict)
        assert status["status"] not in ("failed", "cancelled"), status
        if status["status"] == "completed":
            break
        assert time.monotonic() < deadline, status
        time.sleep(0.2)
    source.power_off()
    after = clock(target)
    assert after["reset_count"] == before["reset_count"]
    assert int(after["time"]) >= int(before["time"])
    assert pcrs(target) == values
    # What was loaded and begun goes on; what was stored is there, and is stored here from now on.
    target.guest.run("cd /run && tpm2_create -Q -C p.ctx -u k.pub -r k.priv")
    target.guest.run("cd /run && tpm2_policycommandcode -Q -S s.ctx TPM2_CC_Sign")
    assert target.guest.run("tpm2_nvread -s 4 0x1500001") == "abcd"
    target.guest.run("printf efgh | tpm2_nvwrite -Q 0x1500001 -i -")
    target.power_off()
    again = make_vm("again")
    (again.directory / "state").symlink_to(target.directory / "state")
    again.start()
    assert again.guest.run("tpm2_nvread -s 4 0x1500001") == "efgh"
    again.power_off()


def test_a_machine_without_a_migration_key_does_not_migrate(make_vm: MakeVm) -> None:
    vm = make_vm("vm")
    vm.tpm.start()  # no migration key
    vm.guest.start()
    with pytest.raises(AssertionError, match=r"[Mm]igration"):
        vm.guest.monitor("migrate", uri=f"unix:{vm.directory / 'migration'}")
