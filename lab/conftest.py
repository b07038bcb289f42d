"""The lab: what the kernel at hand cannot show is shown in a guest. Run by `make lab`."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.swtpm.program import OURS, Program

from .guest import Guest, initrd

MakeVm = Callable[..., "Vm"]


class Vm:
    """A guest and the TPM that it is driven with."""

    def __init__(self, directory: Path, archive: Path, **options: object) -> None:
        directory.mkdir()
        self.directory = directory
        (directory / "migration.key").write_text("00112233445566778899aabbccddeeff" * 2)
        self.tpm = Program(directory)
        self.guest = Guest(directory / "vm", self.tpm.control, archive, **options)  # type: ignore[arg-type]

    def start_tpm(self) -> None:
        """As libvirt starts it: control channel alone, ended with it."""
        (self.directory / "state").mkdir(exist_ok=True)
        key = "file=migration.key,mode=aes-256-cbc"
        self.tpm.process = subprocess.Popen(
            [*OURS, "socket", "--tpm2", "--tpmstate", "dir=state,mode=0600",
             "--ctrl", "type=unixio,path=data.ctrl,mode=0600", "--terminate",
             "--migration-key", key, "--log", "file=log"],
            cwd=self.directory, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.tpm.wait_for(self.tpm.control.is_socket)

    def start(self) -> None:
        self.start_tpm()
        self.guest.start()

    def power_off(self) -> None:
        """The machine ends, and its TPM after it, by itself and in order."""
        self.guest.power_off()
        assert self.tpm.ended() == 0

    def end(self) -> None:
        self.guest.kill()
        self.tpm.kill()


@pytest.fixture(scope="session")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return initrd(tmp_path_factory.mktemp("initrd"))


@pytest.fixture
def make_vm(tmp_path: Path, archive: Path) -> Iterator[MakeVm]:
    made: list[Vm] = []

    def make(name: str, **options: object) -> Vm:
        vm = Vm(tmp_path / name, archive, **options)
        made.append(vm)
        return vm

    yield make
    for vm in made:
        vm.end()
