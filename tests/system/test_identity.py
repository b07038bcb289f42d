"""Who a vTPM is, as unmodified tools and OpenSSL see it; and whose boot its PCRs repeat."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_public_key

from holdfast.cli.tpm import plain_tpm
from holdfast.tpm2.constants import AK_HANDLE

from .conftest import Box
from .running import Running, a_running_vtpm

pytestmark = pytest.mark.skipif(
    not shutil.which("tpm2_createek") or not shutil.which("openssl"),
    reason="tpm2-tools or openssl is not installed",
)


@pytest.fixture(scope="module")
def running(box: Box, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with a_running_vtpm(box, tmp_path_factory.mktemp("identity")) as made:
        yield made


def run(tcti: str, cwd: Path, *command: str, ok: bool = True) -> str:
    done = subprocess.run(
        command, cwd=cwd, env={**os.environ, "TPM2TOOLS_TCTI": tcti}, capture_output=True,
        text=True, timeout=30, check=False,
    )  # fmt: skip
    assert (done.returncode == 0) is ok, (command, done.stdout, done.stderr)
    return done.stdout + done.stderr


def device(running: Running) -> str:
    return f"device:{running.device()}"


def certificate(running: Running, cwd: Path, index: str) -> x509.Certificate:
    run(device(running), cwd, "tpm2_nvread", "-C", "o", "-o", "cert", index)
    return x509.load_der_x509_certificate((cwd / "cert").read_bytes())


@pytest.mark.parametrize(
    ("algorithm", "index", "handle"),
    [("rsa", "0x1c00002", "0x81010001"), ("ecc", "0x1c0000a", "0x8101000a")],
)
def test_the_certified_ek_is_the_one_that_tools_make_by_the_template(
    running: Running, tmp_path: Path, algorithm: str, index: str, handle: str
) -> None:
    tcti = device(running)
    made = ("tpm2_createek", "-G", algorithm, "-c", "ek", "-u", "ek.pem", "-f", "pem")
    run(tcti, tmp_path, *made)
    run(tcti, tmp_path, "tpm2_readpublic", "-c", handle, "-f", "pem", "-o", "kept.pem")
    certified = certificate(running, tmp_path, index).public_key()
    wanted = certified.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    for name in ("ek.pem", "kept.pem"):
        key = load_pem_public_key((tmp_path / name).read_bytes())
        assert key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo) == wanted


@pytest.mark.parametrize("index", ["0x1c00002", "0x1c0000a"])
def test_openssl_leads_an_ek_certificate_by_the_chain_in_nv_to_the_site_root(
    box: Box, running: Running, tmp_path: Path, index: str
) -> None:
    leaf = certificate(running, tmp_path, index)
    (tmp_path / "leaf.pem").write_bytes(leaf.public_bytes(Encoding.PEM))
    run(device(running), tmp_path, "tpm2_nvread", "-C", "o", "-o", "chain", "0x1c00100")
    data = (tmp_path / "chain").read_bytes()
    chain = []
    while data:
        size = 4 + int.from_bytes(data[2:4], "big")
        chain.append(x509.load_der_x509_certificate(data[:size]))
        data = data[size:]
    pem = b"".join(each.public_bytes(Encoding.PEM) for each in chain)
    (tmp_path / "chain.pem").write_bytes(pem)
    root = box.directory / "out" / "site-root-ca.pem"
    verify = ("openssl", "verify", "-x509_strict", "-CAfile", str(root))
    command = (*verify, "-untrusted", "chain.pem", "leaf.pem")
    assert "leaf.pem: OK" in run("", tmp_path, *command)
    other = tmp_path / "other.pem"
    make_root = ("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt",
                 "ec_paramgen_curve:P-256", "-nodes", "-subj", "/CN=Other", "-keyout", "k",
                 "-out", str(other))  # fmt: skip
    run("", tmp_path, *make_root)
    run("", tmp_path, "openssl", "verify", "-CAfile", str(other), "-untrusted", "chain.pem",
        "leaf.pem", ok=False)  # fmt: skip


def enrol(tcti: str, cwd: Path) -> None:
    """An EK and an AK of the tenant's own, by tools."""
    run(tcti, cwd, "tpm2_createek", "-G", "rsa", "-c", "ek", "-u", "ek.pub")
    run(tcti, cwd, "tpm2_createak", "-Q", "-C", "ek", "-c", "ak", "-n", "ak.name", "-u", "ak.pub")


def activated(tcti: str, cwd: Path) -> str:
    """What `tpm2_activatecredential` makes of `cred` here; empty if it refuses."""
    run(tcti, cwd, "tpm2_startauthsession", "--policy-session", "-S", "session")
    run(tcti, cwd, "tpm2_policysecret", "-Q", "-S", "session", "-c", "e")
    (cwd / "opened").unlink(missing_ok=True)
    subprocess.run(
        ["tpm2_activatecredential", "-Q", "-c", "ak", "-C", "ek", "-i", "cred", "-o", "opened",
         "-P", "session:session"],
        cwd=cwd, env={**os.environ, "TPM2TOOLS_TCTI": tcti}, capture_output=True, timeout=30,
        check=False,
    )  # fmt: skip
    run(tcti, cwd, "tpm2_flushcontext", "session")
    return (cwd / "opened").read_text() if (cwd / "opened").exists() else ""


def test_a_credential_opens_in_the_tpm_of_both_ek_and_ak_and_in_no_other(
    running: Running, tmp_path: Path
) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    for place in (here, there):
        place.mkdir()
        (place / "secret").write_text("a secret")
    tcti = device(running)
    with plain_tpm() as sock:
        other = f"swtpm:path={sock}"
        enrol(tcti, here)
        enrol(other, there)

        def challenge(ek: Path, ak: Path) -> None:
            name = (ak / "ak.name").read_bytes().hex()
            run(
                "", here, "tpm2_makecredential", "-Q", "-T", "none", "-u", str(ek / "ek.pub"),
                "-s", "secret", "-n", name, "-o", "cred",
            )  # fmt: skip
            shutil.copyfile(here / "cred", there / "cred")

        challenge(here, here)
        assert activated(tcti, here) == "a secret"
        assert activated(other, there) == ""
        challenge(here, there)  # its EK, another's AK
        assert activated(tcti, here) == ""
        assert activated(other, there) == ""


def test_the_evidence_ak_is_restricted_and_stays_where_it_is(
    running: Running, tmp_path: Path
) -> None:
    tcti = device(running)
    shown = run(tcti, tmp_path, "tpm2_readpublic", "-c", hex(AK_HANDLE))
    assert "restricted" in shown
    assert "sign" in shown
    evict = ("tpm2_evictcontrol", "-C", "o", "-c", hex(AK_HANDLE))
    assert "0x285" in run(tcti, tmp_path, *evict, ok=False)
    assert "0x9A2" in run(tcti, tmp_path, "tpm2_evictcontrol", "-C", "p", *evict[3:], ok=False)
    quote = ("tpm2_quote", "-Q", "-c", hex(AK_HANDLE), "-l", "sha256:0,13", "-q", "abcd")
    run(tcti, tmp_path, *quote, "-m", "m", "-s", "s", "-o", "p")
    run(tcti, tmp_path, "tpm2_readpublic", "-Q", "-c", hex(AK_HANDLE), "-f", "pem", "-o", "ak.pem")
    check = ("tpm2_checkquote", "-u", "ak.pem", "-m", "m", "-s", "s", "-f", "p", "-q", "abcd")
    run("", tmp_path, *check)


def pcrs(tcti: str, cwd: Path) -> dict[str, dict[int, str]]:
    """What `tpm2_pcrread` shows: bank -> PCR -> value."""
    banks: dict[str, dict[int, str]] = {}
    for line in run(tcti, cwd, "tpm2_pcrread").splitlines():
        if found := re.fullmatch(r"  (\w+):", line):
            bank = banks.setdefault(found[1], {})
        elif found := re.fullmatch(r"    (\d+) *: 0x([0-9A-F]+)", line):
            bank[int(found[1])] = found[2]
    return {name: bank for name, bank in banks.items() if bank}


def test_pcrs_of_the_boot_are_the_host_tpms_and_only_the_logs_banks_are_there(
    box: Box, running: Running, tmp_path: Path
) -> None:
    its, hosts = pcrs(device(running), tmp_path), pcrs(box.tcti, tmp_path)
    assert set(its) == {"sha256", "sha384"}
    for bank, values in its.items():
        for number in (*range(10), 14):
            assert values[number] == hosts[bank][number], (bank, number)
        assert len({values[number] for number in range(8)}) > 4  # a real boot's
        assert set(values[13]) != {"0"}
        assert set(values[16]) == {"0"}
        assert set(values[17]) == {"F"}
