"""tpm2-tss by the ports of a container's network, in swtpm's protocol and in the simulator's."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system.serve import Serve, container

from .conftest import SUFFIX
from .tools import Programs, environment

ACKNOWLEDGED_LATE = 0.04  # seconds: how long Linux may put an acknowledgement off
SCRIPT = """
import json, sys, time
from tpm2_pytss import ESAPI, TPM2B_PUBLIC, TPM2B_SENSITIVE_CREATE
with ESAPI(sys.argv[1]) as esapi:
    times = []
    for _ in range(20):
        began = time.perf_counter()
        esapi.get_random(8)
        times.append(time.perf_counter() - began)
    template = TPM2B_PUBLIC.parse("ecc256", objectAttributes=
        "fixedtpm|fixedparent|sensitivedataorigin|userwithauth|restricted|decrypt")
    made = [esapi.create_primary(TPM2B_SENSITIVE_CREATE(), template)[0] for _ in range(5)]
    names = [esapi.read_public(handle)[1] for handle in made]
    for handle in made:
        esapi.flush_context(handle)
print(json.dumps({"times": times, "names": [bytes(name).hex() for name in names]}))
"""


@pytest.fixture(scope="module", params=["swtpm", "mssim"])
def inside(request: pytest.FixtureRequest, host: Serve) -> Iterator[tuple[str, str]]:
    """The protocol, and the pid of a process in the network."""
    name = f"ports-{SUFFIX}-{request.param}"
    host.create(name, "linked", ports=request.param)
    with container(name) as running:
        command = ["podman", "inspect", "--format", "{{.State.Pid}}", running]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        yield request.param, done.stdout.strip()


def programs(directory: Path, inside: tuple[str, str]) -> tuple[Programs, tuple[str, ...], str]:
    protocol, pid = inside
    tcti = f"{protocol}:host=127.0.0.1,port=2321"
    made = Programs(directory, environment(TPM2TOOLS_TCTI=tcti))
    return made, ("nsenter", "-t", pid, "-n"), tcti


def test_tpm2_tools_seal_and_unseal(inside: tuple[str, str], tmp_path: Path) -> None:
    tools, enter, _ = programs(tmp_path, inside)
    tools.write("secret", b"what is sealed")
    for line in (
        "createprimary -Q -C o -G ecc -c primary.ctx",
        "createpolicy -Q --policy-pcr -l sha256:13 -L policy",
        "create -Q -C primary.ctx -i secret -L policy -u sealed.pub -r sealed.priv",
        "load -Q -C primary.ctx -u sealed.pub -r sealed.priv -c sealed.ctx",
    ):
        tools.out(*enter, *f"tpm2_{line}".split())
    unseal = ["tpm2_unseal", "-c", "sealed.ctx", "-p", "pcr:sha256:13"]
    assert tools.out(*enter, *unseal) == b"what is sealed"
    said = tools.fails(*enter, *["tpm2_unseal", "-c", "sealed.ctx"])
    assert "Esys_Unseal(0x12F)" in said  # TPM_RC_AUTH_UNAVAILABLE


def test_esapi_has_objects_of_its_own_and_does_not_wait(
    inside: tuple[str, str], tmp_path: Path
) -> None:
    """By the simulator's protocol it sends each command in pieces, as IBM's TSS does."""
    tools, enter, tcti = programs(tmp_path, inside)
    said = json.loads(tools.out(*enter, sys.executable, "-c", SCRIPT, tcti))
    assert len(set(said["names"])) == 1
    assert len(said["names"]) == 5
    assert sorted(said["times"])[10] < ACKNOWLEDGED_LATE / 2
