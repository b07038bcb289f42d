"""One host for all clients, and a container for each of the three ways to a vTPM.

The programs are those of the distribution, run on the host with the container's own device files
and sockets: what a program in the container sees is what they see.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.system.serve import Serve, a_host, build_images, container

from .tools import WAYS, Tools, Way

SUFFIX = os.getpid()
PROGRAMS = (
    "podman", "runc", "tpm2", "tss2", "openssl", "tpm2_ptool", "pkcs11-tool", "ssh", "sshd",
    "tsssign", "tpm2-abrmd", "dbus-daemon", "dbus-send", "swtpm", "swtpm_ioctl", "nsenter",
)  # fmt: skip


def why_not() -> str:
    """Why this machine cannot run them; empty if it can."""
    if os.geteuid() != 0:
        return "containers need root: run make test as root"
    missing = [name for name in PROGRAMS if not shutil.which(name)]
    return f"not installed: {missing}: scripts/setup installs it" if missing else ""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    why = why_not()
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.needs_root)
            if why:
                item.add_marker(pytest.mark.skip(reason=why))


@pytest.fixture(scope="session")
def host() -> Iterator[Serve]:
    """One Holdfast for all; podman looks for CDI devices in /run/cdi."""
    build_images()
    with a_host(cdi=Path("/run/cdi")) as made:
        yield made
    assert made.left_over() == []


@pytest.fixture(scope="session")
def containers(host: Serve) -> Iterator[Callable[[str], Path]]:
    """Where the vTPM of a running container is, made when it is first asked for by that name."""
    with ExitStack() as stack:
        places: dict[str, Path] = {}

        def of(name: str) -> Path:
            if name not in places:
                vtpm = f"client-{SUFFIX}-{name}"
                host.create(vtpm, "linked")
                stack.enter_context(container(vtpm))
                places[name] = host.place(vtpm)
            return places[name]

        yield of


@pytest.fixture(scope="session")
def unlinked(host: Serve) -> dict[str, str]:
    """Names of plain vTPMs, which nothing filters, for each way."""
    names = {}
    for way in WAYS:
        names[way] = f"plain-{SUFFIX}-{way}"
        host.create(names[way], "plain")
        host.power_on(names[way])
    return names


@pytest.fixture(scope="session")
def ran() -> dict[str, set[str]]:
    """The programs that did what a test wanted of them, by way."""
    return {way: set() for way in WAYS}


@pytest.fixture(params=list(WAYS))
def way(request: pytest.FixtureRequest) -> Way:
    return str(request.param)


def until_the_end(tools: Tools) -> Iterator[Tools]:
    """The tools; at the end their TPM has what it had before."""
    before = tools.inventory()
    yield tools
    assert tools.inventory() == before


@pytest.fixture
def tpm(
    containers: Callable[[str], Path], way: Way, ran: dict[str, set[str]], tmp_path: Path
) -> Iterator[Tools]:
    """tpm2-tools on a container's vTPM."""
    yield from until_the_end(Tools(tmp_path, WAYS[way].format(place=containers(way)), ran[way]))


@pytest.fixture
def spare(
    containers: Callable[[str], Path], way: Way, ran: dict[str, set[str]], tmp_path: Path
) -> Tools:
    """tpm2-tools on a container's vTPM that nobody needs afterwards."""
    place = containers(f"spare-{way}")
    return Tools(tmp_path, WAYS[way].format(place=place), ran[way])


@pytest.fixture
def plain(
    host: Serve, unlinked: dict[str, str], way: Way, ran: dict[str, set[str]], tmp_path: Path
) -> Tools:
    """tpm2-tools on a plain vTPM: for what a container is refused."""
    place = host.place(unlinked[way])
    return Tools(tmp_path, WAYS[way].format(place=place), ran[way])
