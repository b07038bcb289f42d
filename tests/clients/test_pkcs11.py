"""tpm2-pkcs11: tokens of a vTPM, and ssh that logs in by a key in one."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from .server import free_port, listens, serving
from .tools import Tools

MODULE = next(iter(Path("/usr/lib").glob("*/libtpm2_pkcs11.so.1")), Path("not installed"))
PIN = "users-pin"
SEPARATED = Path("/run/sshd")  # sshd has that path compiled in


def persistent(tpm: Tools) -> set[str]:
    return set(re.findall(r"0x[0-9A-F]+", tpm("getcap handles-persistent")))


@pytest.fixture
def stored(tpm: Tools) -> Iterator[Tools]:
    """A store with one token; the primary key that it makes persistent is taken away again."""
    before = persistent(tpm)
    (tpm.directory / "store").mkdir()
    tpm.environment |= {
        "TPM2_PKCS11_TCTI": tpm.tcti,
        "TPM2_PKCS11_STORE": str(tpm.directory / "store"),
        "TSS2_LOG": "all+NONE",
    }
    tpm.out("tpm2_ptool", "init", "--path", "store")
    add = ("--pid", "1", "--label", "token", "--sopin", "so-pin", "--userpin", PIN)
    tpm.out("tpm2_ptool", "addtoken", *add, "--path", "store")
    yield tpm
    for handle in persistent(tpm) - before:
        tpm(f"evictcontrol -Q -C o -c {handle}")


shared = pytest.mark.parametrize("way", ["socket", "tpmrm0"], indirect=True)


@pytest.mark.parametrize("way", ["tpm0"], indirect=True)
def test_it_opens_its_tpm_more_than_once_which_tpm0_does_not_allow(stored: Tools) -> None:
    """As with the kernel's /dev/tpm0: one opener, and EBUSY for another."""
    said = stored.fails("pkcs11-tool", "--module", MODULE, "--list-slots")
    assert "CKR_GENERAL_ERROR" in said


def tool(stored: Tools, *options: str) -> bytes:
    login = ("--token-label", "token", "--login", "--pin", PIN)
    return stored.out("pkcs11-tool", "--module", MODULE, *login, *options)


def generate(stored: Tools, kind: str, number: str) -> None:
    """A key pair by that ID; `NUMBER.pem` is its public key."""
    tool(stored, "--keypairgen", "--key-type", kind, "--label", f"key{number}", "--id", number)
    read = ("--read-object", "--type", "pubkey", "--id", number, "--output-file", "der")
    tool(stored, *read)
    convert = ("pkey", "-pubin", "-inform", "DER", "-in", "der", "-out", f"{number}.pem")
    stored.out("openssl", *convert)


def verified(stored: Tools, number: str, *more: str) -> None:
    stored.write("other", b"something else")
    verify = ("openssl", "dgst", "-sha256", "-verify", f"{number}.pem", *more)
    assert b"Verified OK" in stored.out(*verify, "-signature", "signature", "message")
    stored.fails(*verify, "-signature", "signature", "other")


@shared
def test_keys_of_a_token_sign_and_openssl_verifies(stored: Tools) -> None:
    stored.write("message", b"what is signed")
    stored.write("digest", stored.out("openssl", "dgst", "-sha256", "-binary", "message"))
    generate(stored, "EC:prime256v1", "01")
    generate(stored, "rsa:2048", "02")
    sign = ("--sign", "--output-file", "signature", "--signature-format", "openssl")
    tool(stored, *sign, "--mechanism", "ECDSA", "--id", "01", "--input-file", "digest")
    verified(stored, "01")
    tool(stored, *sign, "--mechanism", "SHA256-RSA-PKCS", "--id", "02", "--input-file", "message")
    verified(stored, "02")
    pss = ("--mechanism", "SHA256-RSA-PKCS-PSS", "--id", "02", "--input-file", "message")
    tool(stored, *sign, *pss)
    verified(stored, "02", "-sigopt", "rsa_padding_mode:pss")
    listed = tool(stored, "--list-objects").decode()
    assert listed.count("never extractable") == 2


@shared
def test_a_key_of_a_token_decrypts(stored: Tools) -> None:
    generate(stored, "rsa:2048", "02")
    stored.write("message", b"what is kept")
    encrypt = (
        "pkeyutl",
        "-encrypt",
        "-pubin",
        "-inkey",
        "02.pem",
        "-in",
        "message",
        "-out",
        "cipher",
    )
    stored.out("openssl", *encrypt)
    decrypt = ("--decrypt", "--mechanism", "RSA-PKCS", "--id", "02", "--input-file", "cipher")
    tool(stored, *decrypt, "--output-file", "plain")
    assert stored.read("plain") == b"what is kept"


@shared
def test_tpm2_ptool_makes_keys_and_a_wrong_pin_opens_none(stored: Tools) -> None:
    for algorithm in ("ecc256", "rsa2048"):
        add = ("--algorithm", algorithm, "--label", "token", "--userpin", PIN)
        stored.out("tpm2_ptool", "addkey", *add, "--key-label", algorithm, "--path", "store")
    assert b"ecc256" in tool(stored, "--list-objects")
    login = ("--token-label", "token", "--login", "--pin", "wrong")
    command = ("pkcs11-tool", "--module", MODULE, *login, "--list-objects")
    assert "CKR_PIN_INCORRECT" in stored.fails(*command)
    stored("dictionarylockout -c")
    assert len(tool(stored, "--generate-random", "16")) == 16


# --- ssh -----------------------------------------------------------------------------------------


@pytest.fixture
def privilege_separation() -> Iterator[None]:
    made = not SEPARATED.exists()
    if made:
        SEPARATED.mkdir(mode=0o755)
    yield
    if made:
        SEPARATED.rmdir()


def sshd(stored: Tools, port: int) -> tuple[str, ...]:
    """sshd's command line; it lets in who has a key of `authorized`."""
    stored.out("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", "host")
    stored.write("known", f"[127.0.0.1]:{port} {stored.read('host.pub').decode()}".encode())
    settings = {
        "Port": port,
        "ListenAddress": "127.0.0.1",
        "HostKey": stored.directory / "host",
        "AuthorizedKeysFile": stored.directory / "authorized",
        "StrictModes": "no",  # of /tmp, above it
        "PidFile": "none",
        "UsePAM": "no",
        "PasswordAuthentication": "no",
        "PermitRootLogin": "prohibit-password",
    }
    text = "".join(f"{key} {value}\n" for key, value in settings.items())
    stored.write("sshd_config", text.encode())
    return ("/usr/sbin/sshd", "-D", "-e", "-f", str(stored.directory / "sshd_config"))


@shared
def test_ssh_logs_in_by_a_key_in_the_vtpm(stored: Tools, privilege_separation: None) -> None:
    generate(stored, "EC:prime256v1", "01")
    generate(stored, "rsa:2048", "02")
    keys = stored.out("ssh-keygen", "-D", MODULE).decode().splitlines()
    assert sorted(key.split()[0] for key in keys) == ["ecdsa-sha2-nistp256", "ssh-rsa"]
    asked = stored.write("pin", f"#!/bin/sh\necho {PIN}\n".encode())
    asked.chmod(0o700)
    stored.environment |= {"SSH_ASKPASS": str(asked), "SSH_ASKPASS_REQUIRE": "force"}
    port = free_port()
    known = stored.directory / "known"
    ssh: tuple[str | Path, ...] = (
        "ssh", "-F", "none", "-p", str(port), "-o", f"UserKnownHostsFile={known}", "-o",
        "IdentityFile=none", "-o", "GlobalKnownHostsFile=none",
    )  # fmt: skip
    by_module = ("-o", f"PKCS11Provider={MODULE}")
    target = ("root@127.0.0.1", "echo logged in from $SSH_CONNECTION")
    with serving(stored, *sshd(stored, port), ready=lambda: listens(port)) as log:
        for key in keys:  # elliptic, and RSA
            stored.write("authorized", key.encode() + b"\n")
            assert b"logged in from 127.0.0.1" in stored.out(*ssh, *by_module, *target)
        assert log.read_text().count("Accepted publickey for root") == 2
        stored.write("authorized", stored.read("host.pub"))
        assert "Permission denied" in stored.fails(*ssh, *by_module, *target)
        stored.write("authorized", "\n".join(keys).encode() + b"\n")
        assert "Permission denied" in stored.fails(*ssh, *target)
        by_agent(stored, (*ssh, *target))


def by_agent(stored: Tools, ssh: tuple[str | Path, ...]) -> None:
    """The same with the token in an agent."""
    path = stored.directory / "agent"
    with serving(stored, "ssh-agent", "-D", "-a", path, ready=path.is_socket):
        stored.environment["SSH_AUTH_SOCK"] = str(path)
        stored.out("ssh-add", "-s", MODULE)
        assert len(stored.out("ssh-add", "-L").splitlines()) == 2
        assert b"logged in from 127.0.0.1" in stored.out(*ssh)
        stored.out("ssh-add", "-e", MODULE)
        assert "Permission denied" in stored.fails(*ssh)
        del stored.environment["SSH_AUTH_SOCK"]
