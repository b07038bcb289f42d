"""tpm2-abrmd on top of a vTPM, on a D-Bus of the test's own: many clients of a daemon of ours."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tpm2_pytss import ESAPI, TPM2B_PUBLIC, TPM2B_SENSITIVE_CREATE

from .server import serving
from .tools import Programs, Tools, environment

NAME = "com.intel.tss2.Tabrmd"
TABRMD = f"tabrmd:bus_type=session,bus_name={NAME}"
STORAGE = "fixedtpm|fixedparent|sensitivedataorigin|userwithauth|restricted|decrypt"
AT_ONCE = 6


@pytest.fixture
def managed(tpm: Tools, monkeypatch: pytest.MonkeyPatch) -> Iterator[Tools]:
    """tpm2-tools whose TPM is the resource manager on the container's vTPM."""
    bus = tpm.directory / "bus"
    address = f"unix:path={bus}"
    programs = Programs(tpm.directory, environment(DBUS_SESSION_BUS_ADDRESS=address))
    daemon = ("dbus-daemon", "--session", "--nofork", "--nopidfile", f"--address={address}")

    def owned() -> bool:
        done = programs.run(
            "dbus-send", "--session", "--print-reply", "--dest=org.freedesktop.DBus", "/",
            "org.freedesktop.DBus.NameHasOwner", f"string:{NAME}",
        )  # fmt: skip
        return b"boolean true" in done.stdout

    manager = ("tpm2-abrmd", "--session", "--allow-root", f"--tcti={tpm.tcti}")
    with serving(programs, *daemon, ready=bus.is_socket):
        with serving(programs, *manager, ready=owned) as log:
            tools = Tools(tpm.directory, TABRMD)
            tools.environment["DBUS_SESSION_BUS_ADDRESS"] = address
            monkeypatch.setenv("DBUS_SESSION_BUS_ADDRESS", address)
            yield tools
        assert "CRITICAL" not in log.read_text()


def one(directory: Path, like: Tools) -> bytes:
    """A program's work, in a directory of its own; what it unsealed."""
    directory.mkdir()
    tools = Tools(directory, like.tcti)
    tools.environment |= like.environment
    tools.write("secret", directory.name.encode())
    tools("createprimary -Q -C o -G ecc -c primary.ctx")
    tools("create -Q -C primary.ctx -G ecc -u key.pub -r key.priv")
    tools("load -Q -C primary.ctx -u key.pub -r key.priv -c key.ctx")
    tools("readpublic -Q -c key.ctx -f pem -o key.pem")
    tools("sign -Q -c key.ctx -g sha256 -f plain -o signature secret")
    verify = ("openssl", "dgst", "-sha256", "-verify", "key.pem", "-signature", "signature")
    assert b"Verified OK" in tools.out(*verify, "secret")
    tools("createpolicy -Q --policy-pcr -l sha256:13 -L policy")
    tools("create -Q -C primary.ctx -i secret -L policy -u sealed.pub -r sealed.priv")
    tools("load -Q -C primary.ctx -u sealed.pub -r sealed.priv -c sealed.ctx")
    return tools.data("unseal -c sealed.ctx -p pcr:sha256:13")


def test_several_programs_at_once(managed: Tools) -> None:
    places = [managed.directory / f"program{number}" for number in range(AT_ONCE)]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        unsealed = list(pool.map(one, places, [managed] * AT_ONCE))
    assert unsealed == [place.name.encode() for place in places]


def test_a_session_goes_from_program_to_program(managed: Tools) -> None:
    managed("startauthsession -Q --policy-session -S session")
    managed("policypcr -Q -S session -l sha256:13")
    managed("getpolicydigest -S session -o digest")
    managed("createpolicy -Q --policy-pcr -l sha256:13 -L policy")
    assert managed.read("digest") == managed.read("policy")
    managed("flushcontext session")


def test_one_program_has_more_objects_than_a_tpm_has_slots(managed: Tools) -> None:
    template = TPM2B_PUBLIC.parse("ecc256", objectAttributes=STORAGE)
    with ESAPI(TABRMD) as esapi, ESAPI(TABRMD) as other:
        made = [esapi.create_primary(TPM2B_SENSITIVE_CREATE(), template)[0] for _ in range(6)]
        names = {bytes(esapi.read_public(handle)[1]) for handle in made}
        assert len(names) == 1  # the same primary, six times
        mine = other.create_primary(TPM2B_SENSITIVE_CREATE(), template)[0]
        assert {bytes(other.read_public(mine)[1])} == names
        for handle in made:
            esapi.flush_context(handle)
        other.flush_context(mine)
