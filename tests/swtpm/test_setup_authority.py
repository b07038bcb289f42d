"""Who certifies a new TPM: the local CA, shared with swtpm_localca, or the configuration's tool."""

from __future__ import annotations

import os
import re
import subprocess

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key

from .program import SECONDS, SETUP
from .setting_up import CERTIFIED, THEIR_SETUP, Place, about, authority_config


def test_the_tool_is_called_as_swtpm_setup_calls_it(place: Place) -> None:
    script = f'printf "%s\\n" "$@" >> {place.path}/called; exec swtpm_localca "$@"'
    path = place.path / "tool"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    text = (place.path / "tool.conf").read_text().replace("swtpm_localca # in PATH", str(path))
    calls = []
    for program in (SETUP, THEIR_SETUP):
        place.made(*CERTIFIED, "--vmid", "a vm", "--logfile", "log", "--overwrite",
                   *place.config(text), program=program)  # fmt: skip
        called = (place.path / "called").read_text()
        (place.path / "called").unlink()
        called = re.sub(r"[0-9a-f]{64,}", "KEY", called)
        calls.append(re.sub(r"swtpm_setup\.certs\.\w+", "DIR", called).splitlines())
    assert calls[0] == calls[1]
    assert calls[0].count("--type") == 3


# --- the local CA --------------------------------------------------------------------------------


def test_two_and_more_at_once_share_one_new_ca(place: Place) -> None:
    commands = []
    for number in range(6):
        state = place.path / f"state{number}"
        state.mkdir()
        certificates = place.path / f"certificates{number}"
        certificates.mkdir()
        program = (SETUP, SETUP, THEIR_SETUP)[number % 3]
        text = (place.path / "tool.conf").read_text().replace("theirs.conf", "ca.conf")
        config = place.path / "setup.conf"
        if program == THEIR_SETUP:
            config = place.path / "their.conf"
            config.write_text(text)
        commands.append(
            [program, "--tpm2", "--tpmstate", state, *CERTIFIED, "--config", config,
             "--write-ek-cert-files", certificates]
        )  # fmt: skip
    processes = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for command in commands
    ]
    said = [process.communicate(timeout=6 * SECONDS)[0] for process in processes]
    for process, text in zip(processes, said, strict=True):
        assert process.returncode == 0, text
    assert sum(text.count("Creating root CA") for text in said) >= 1
    serials = []
    for path in place.path.glob("certificates*/*.crt"):
        place.verify(path.read_bytes(), place.ca)
        serials.append(x509.load_der_x509_certificate(path.read_bytes()).serial_number)
    assert len(set(serials)) == 12
    assert int((place.ca / "certserial").read_text()) == 1 + 6 * 3


def test_each_goes_on_with_the_others_ca(place: Place) -> None:
    theirs = (place.path / "tool.conf").read_text().replace("theirs.conf", "ca.conf")
    for program in (SETUP, THEIR_SETUP, SETUP):
        config = ("--config", str(place.path / "setup.conf"))
        if program == THEIR_SETUP:
            config = place.config(theirs)
        place.made(*CERTIFIED, "--overwrite", "--write-ek-cert-files", ".", *config,
                   program=program)  # fmt: skip
        for name in ("ek-rsa2048.crt", "ek-secp384r1.crt"):
            place.verify((place.path / name).read_bytes(), place.ca)
    assert (place.ca / "certserial").read_text() == "10"


def test_a_ca_of_swtpm_localca_signs_for_us(place: Place) -> None:
    place.made(*CERTIFIED, "--config", str(place.path / "tool.conf"), program=THEIR_SETUP)
    ours = f"create_certs_tool_config = {place.path}/theirs.conf\n"
    place.made("--create-ek-cert", "--overwrite", "--write-ek-cert-files", ".",
               *place.config(ours))  # fmt: skip
    place.verify((place.path / "ek-secp384r1.crt").read_bytes(), place.path / "theirs")


def test_the_ca_is_as_swtpm_localcas_and_its_keys_are_private(place: Place) -> None:
    place.made("--create-ek-cert")
    place.made("--create-ek-cert", "--overwrite", "--config", str(place.path / "tool.conf"))
    for name in ("swtpm-localca-rootca-cert.pem", "issuercert.pem"):
        ours, theirs = (
            about(
                x509.load_pem_x509_certificate((directory / name).read_bytes()).public_bytes(
                    Encoding.DER
                ),
                "2.5.29.14",
            )
            for directory in (place.ca, place.path / "theirs")
        )
        assert ours == theirs
    modes = {path.name: path.stat().st_mode & 0o777 for path in place.ca.iterdir()}
    assert modes["signkey.pem"] == modes["swtpm-localca-rootca-privkey.pem"] == 0o600
    assert modes["issuercert.pem"] == modes["certserial"] == 0o644
    assert place.ca.stat().st_mode & 0o777 == 0o750


def test_passwords_guard_the_cas_keys(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SWTPM_ROOTCA_PASSWORD", "root secret")
    with (place.path / "ca.conf").open("a") as file:
        file.write("signingkey_password = secret\n")
    place.made("--create-ek-cert", "--write-ek-cert-files", ".")
    place.verify((place.path / "ek-rsa2048.crt").read_bytes(), place.ca)
    for name, password in (("signkey.pem", b"secret"),
                           ("swtpm-localca-rootca-privkey.pem", b"root secret")):  # fmt: skip
        load_pem_private_key((place.ca / name).read_bytes(), password)
        with pytest.raises(TypeError):
            load_pem_private_key((place.ca / name).read_bytes(), None)
    place.made("--create-ek-cert", "--overwrite")
    authority_config(place.path, "ca")
    assert "Could not read signing key" in place.refused("--create-ek-cert", "--overwrite")


def test_a_ca_whose_making_was_interrupted_is_gone_on_with(place: Place) -> None:
    place.made("--create-ek-cert")
    names = ("issuercert.pem", "signkey.pem", "swtpm-localca-rootca-cert.pem")
    for number in range(1, 4):
        before = {path.name: path.read_bytes() for path in place.ca.iterdir()}
        for name in names[:number]:
            (place.ca / name).unlink()
        place.made("--create-ek-cert", "--overwrite", "--write-ek-cert-files", ".")
        place.verify((place.path / "ek-rsa2048.crt").read_bytes(), place.ca)
        for name, content in before.items():
            if name not in (*names[:number], "certserial"):
                assert (place.ca / name).read_bytes() == content


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        (("signkey.pem",), "without its signing key"),
        (("issuercert.pem", "swtpm-localca-rootca-privkey.pem"), "root CA's key"),
        (
            ("issuercert.pem", "swtpm-localca-rootca-privkey.pem", "swtpm-localca-rootca-cert.pem"),
            "Need read rights on issuer certificate",
        ),
    ],
)
def test_a_ca_that_lost_its_parts_is_not_made_up(
    place: Place, missing: tuple[str, ...], message: str
) -> None:
    place.made("--create-ek-cert")
    for name in missing:
        (place.ca / name).unlink()
    assert message in place.refused("--create-ek-cert", "--overwrite")


@pytest.mark.parametrize("content", ["", "abc", "-1", "9" * 21, "9" * 20, "1\n2"])
def test_a_serial_number_is_never_guessed(place: Place, content: str) -> None:
    place.made("--create-ek-cert")
    (place.ca / "certserial").write_text(content)
    assert "serial number" in place.refused("--create-ek-cert", "--overwrite")


@pytest.mark.parametrize("name", ["signkey.pem", "issuercert.pem", "certserial"])
def test_a_part_of_the_ca_that_nobody_writes_is_not_waited_for(place: Place, name: str) -> None:
    place.made("--create-ek-cert")
    (place.ca / name).unlink()
    os.mkfifo(place.ca / name)
    assert f"{name}: not a regular file" in place.refused("--create-ek-cert", "--overwrite")


def test_a_signing_key_of_another_ca_is_refused(place: Place) -> None:
    place.made("--create-ek-cert")
    for name in ("signkey.pem", "issuercert.pem"):
        (place.ca / name).rename(place.path / name)
    place.made("--create-ek-cert", "--overwrite")
    (place.path / "signkey.pem").replace(place.ca / "signkey.pem")
    before = (place.ca / "certserial").read_text()
    done = place.run("--create-ek-cert", "--overwrite")
    assert done.returncode == 1
    assert "signing key is not its issuer certificate's" in done.stderr
    assert int((place.ca / "certserial").read_text()) == int(before) + 1  # never given again


def test_a_private_key_is_not_written_through_a_symbolic_link(place: Place) -> None:
    place.ca.mkdir()
    target = place.path / "elsewhere"
    (place.ca / "swtpm-localca-rootca-privkey.pem").symlink_to(target)
    assert "File exists" in place.refused("--create-ek-cert")
    assert not target.exists()


def test_keys_in_tokens_are_refused(place: Place) -> None:
    authority_config(place.path, "ca")
    text = (place.path / "ca.conf").read_text()
    (place.path / "ca.conf").write_text(
        re.sub(r"signingkey = .*", "signingkey = pkcs11:token=x", text)
    )
    assert "name swtpm_localca as create_certs_tool" in place.refused("--create-ek-cert")
