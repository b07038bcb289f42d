"""A host in a box: a stand-in host TPM, keeper and spawner, real, and ended with the session."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TypeVar

import pyrage
import pytest

from holdfast.cli.tpm import plain_tpm

T = TypeVar("T")
NEEDS_ROOT = os.geteuid() != 0
PYTHON = [sys.executable, "-P", "-m"]
HOST_LOG = Path(str(resources.files("holdfast.data"))) / "hostlog" / "ovmf-qemu.bin"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if NEEDS_ROOT and Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.skip(reason="needs root: run make test as root"))


@dataclass
class Box:
    """Paths and processes of one host."""

    directory: Path
    tcti: str
    identity: Path
    processes: dict[str, subprocess.Popen[bytes]]

    @property
    def keeper_socket(self) -> Path:
        return self.directory / "keeper.sock"

    @property
    def spawner_socket(self) -> Path:
        return self.directory / "spawner.sock"

    def start(self, name: str) -> None:
        commands = {
            "keeper": [
                "holdfast.keeper", "serve", "--dir", str(self.directory / "keeper"),
                "--tcti", self.tcti, "--socket", str(self.keeper_socket),
            ],
            "spawner": [
                "holdfast.spawner", "--socket", str(self.spawner_socket),
                "--keeper", str(self.keeper_socket), "--blank", "2",
            ],
        }  # fmt: skip
        path = self.directory / f"{name}.sock"
        path.unlink(missing_ok=True)
        self.processes[name] = subprocess.Popen([*PYTHON, *commands[name]])
        deadline = time.monotonic() + 20
        while not path.exists():
            assert self.processes[name].poll() is None, f"the {name} ended"
            assert time.monotonic() < deadline, f"the {name} does not listen"
            time.sleep(0.02)

    def stop(self, name: str) -> int:
        process = self.processes.pop(name)
        process.terminate()
        return process.wait(20)


def provision(directory: Path, tcti: str) -> Path:
    """Set the host up; returns the file with the recovery recipient's private key."""
    identity = pyrage.x25519.Identity.generate()
    key = directory / "identity"
    key.write_text(str(identity))
    done = subprocess.run(
        [
            *PYTHON, "holdfast.keeper", "provision", "--dir", str(directory / "keeper"),
            "--tcti", tcti, "--recovery-recipient", str(identity.to_public()),
            "--out", str(directory / "out"), "--stand-in", "--site", "Test site",
        ],
        stdout=subprocess.PIPE, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert json.loads(done.stdout)["stand_in"] is True
    return key


@pytest.fixture(scope="session")
def box() -> Iterator[Box]:
    directory = Path(tempfile.mkdtemp(prefix="hf-"))
    with plain_tpm(directory / "host-tpm", HOST_LOG) as sock:
        tcti = f"swtpm:path={sock}"
        made = Box(directory, tcti, provision(directory, tcti), {})
        try:
            made.start("keeper")
            made.start("spawner")
            yield made
        finally:
            for name in list(made.processes)[::-1]:
                made.stop(name)
            shutil.rmtree(directory)


@pytest.fixture
def run() -> Callable[[Callable[[], Awaitable[T]]], T]:
    """Run an async test body."""

    def runner(body: Callable[[], Awaitable[T]]) -> T:
        async def bounded() -> T:
            return await asyncio.wait_for(body(), 120)

        return asyncio.run(bounded())

    return runner
