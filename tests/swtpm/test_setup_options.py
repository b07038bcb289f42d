"""The command line and configuration of holdfast-swtpm-setup, beside Debian's swtpm_setup's."""

from __future__ import annotations

import json
import re

import pytest
from cryptography import x509

from .program import OURS, SETUP, THEIRS
from .setting_up import CERTIFIED, THEIR_SETUP, Place, boot

BAD: dict[tuple[str, ...], str] = {
    ("--bogus",): "unrecognized arguments: --bogus",
    ("extra",): "unrecognized arguments: extra",
    ("--createe",): "unrecognized arguments: --createe",
    ("--pcr-banks", "foo"): "PCR bank 'foo' is not known",
    ("--pcr-banks", "sha256,foo"): "PCR bank 'foo' is not known",
    ("--pcr-banks", "sha256,"): "PCR bank '' is not known",
    ("--pcr-banks", "sha256,-"): "PCR bank '-' is not known",
    ("--rsa-keysize", "1024"): "Unsupported RSA key size 1024.",
    ("--rsa-keysize", "4096"): "Unsupported RSA key size 4096.",
    ("--rsa-keysize", "2048x"): "Unsupported RSA key size 2048x.",
    ("--rsa-keysize",): "expected one argument",
    ("--config", "/nonexistent"): "User root cannot read config file /nonexistent.",
    ("--keyfile", "/nonexistent"): "User root cannot read keyfile /nonexistent.",
    ("--pwdfile", "/nonexistent"): "User root cannot read pwdfile /nonexistent.",
    ("--keyfile", "k16", "--pwdfile", "password"): "--keyfile and --pwdfile exclude each other.",
    ("--keyfile", "k16", "--keyfile-fd", "5"): "--keyfile and --keyfile-fd exclude each other.",
    ("--keyfile", "k8"): "has 64 bits, its mode wants 128",
    ("--keyfile", "k32"): "has 256 bits, its mode wants 128",
    ("--keyfile", "k16", "--cipher", "aes-256-cbc"): "has 128 bits, its mode wants 256",
    ("--keyfile", "password"): "is not hexadecimal",
    ("--keyfile", "k16", "--cipher", "foo"): "Unsupported cipher foo.",
    ("--cipher", "aes-256-cbc"): "encrypts nothing without",
    ("--pwdfile", "nothing"): "is empty",
    ("--keyfile-fd", "77"): "descriptor 77: Bad file descriptor",
    ("--pwdfile-fd", "abc"): "Invalid file descriptor 'abc'",
    ("--pwdfile-fd", "-1"): "Invalid file descriptor '-1'",
    ("--overwrite", "--not-overwrite"): "exclude each other",
    ("--reconfigure", "--createek"): "Reconfiguration is not supported with creation of EK",
    ("--reconfigure", "--create-spk"): "changes the PCR banks, and nothing else",
    ("--reconfigure", "--overwrite"): "changes the PCR banks, and nothing else",
    ("--runas", "no-such-user"): "User 'no-such-user' does not exist.",
    ("--logfile", "/nonexistent/log"): "Error opening file /nonexistent/log",
    ("--create-ek-cert", "--write-ek-cert-files", "/nonexistent"): "cannot access directory",
    ("--write-ek-cert-files", "."): "needs --create-ek-cert",
    ("--create-ek-cert", "--vmid", ""): "cannot be the name in a certificate",
    ("--create-ek-cert", "--vmid", "a\nb"): "cannot be the name in a certificate",
    ("--take-ownership",): "Taking ownership is not supported for TPM 2",
    ("--ownerpass", "x"): "TPM 1.2 is not offered",
    ("--srk-well-known",): "TPM 1.2 is not offered",
    ("--profile-name", "default-v1"): "--profile needs libtpms 0.10 or newer, and this is 0.9",
    ("--profile", "{}"): "--profile needs libtpms 0.10 or newer, and this is 0.9",
    ("--profile", ""): "--profile is empty",
    ("--profile-name", "../x"): "contains unacceptable characters",
    ("--profile-name", "local:x"): "Could not find or access profile 'local:x'.",
    ("--profile-file-fd", "x"): "Invalid file descriptor 'x'",
    ("--profile", "{}", "--profile-file", "x"): "Only one of --profile, --profile-name",
    ("--profile-remove-disabled", "x"): "Unsupported parameter for --profile-remove-disabled",
    ("--profile-remove-disabled", "check"): "changes a profile, and none is given",
    ("--profile", "{}", "--reconfigure"): "Reconfiguration does not accept a (new) profile.",
    ("--iakkeyalgo", "ecc_nist_p384"): "not offered",
    ("--tpm", "/nonexistent"): "swtpm at /nonexistent is not an executable.",
    ("--tpm", "/usr/bin/swtpm"): "made without another program here",
    ("--tpm", f"{OURS[0]} socket --seccomp action=none"): "made without another program here",
}


@pytest.mark.parametrize("options", BAD, ids=" ".join)
def test_bad_input_is_a_clear_error_and_leaves_nothing(
    keyed: Place, options: tuple[str, ...]
) -> None:
    (keyed.path / "k8").write_text("0011223344556677")
    (keyed.path / "nothing").touch()
    assert BAD[options] in keyed.refused(*options)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ("/nonexistent", "cannot access directory /nonexistent."),
        ("dir:///nonexistent", "cannot access directory /nonexistent."),
        ("file:///nonexistent/one", "cannot access directory /nonexistent."),
        ("file:///etc", "/etc is neither a file nor a block device."),
        ("file:///dev/null", "/dev/null is neither a file nor a block device."),
        ("http://x", "Unsupported TPM state scheme 'http'"),
        ("dir://", "names no path"),
    ],
)
def test_a_place_that_cannot_be_is_refused(place: Place, state: str, message: str) -> None:
    assert message in place.refused(state=state)


def test_tpm_1_2_and_no_place_are_refused(place: Place) -> None:
    for options, message in (
        (("--tpmstate", "state"), "TPM 1.2 is not offered: give --tpm2."),
        (("--tpm2",), "--tpm-state must be provided"),
        ((), "--tpm-state must be provided"),
    ):
        done = place.call(SETUP, *options)
        assert (done.returncode, done.stdout) == (1, "")
        assert message in done.stderr
    assert not list(place.state.iterdir())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bogus = 1\n", "line 1: 'bogus' is not known"),
        ("\nactive_pcr_banks\n", "line 2: 'active_pcr_banks' is not known"),
        ("active_pcr_banks = md5\n", "PCR bank 'md5' is not known"),
        ("rsa_keysize = 512\n", "Unsupported RSA key size 512"),
        ("rsa_keysize = 2048\nrsa_keysize = 3072\n", "line 2: 'rsa_keysize' is given twice"),
        ("profile = {}\n", "--profile needs libtpms 0.10 or newer"),
        ("profile_file = x\n", "--profile needs libtpms 0.10 or newer"),
        ("create_certs_tool = ${NO_SUCH_NAME}/x\n", "NO_SUCH_NAME is not set"),
        ("create_certs_tool_seconds = 0\n", "is no number of seconds"),
        ("create_certs_tool = /nonexistent\n", "Could not find /nonexistent in PATH."),
        ("create_certs_tool_config = /nonexistent\n", "Cannot read /nonexistent"),
        ("create_certs_tool_options = /nonexistent\n", "Cannot read /nonexistent"),
    ],
)
def test_a_bad_configuration_is_refused(place: Place, text: str, message: str) -> None:
    assert message in place.refused("--create-ek-cert", *place.config(text))


def test_capabilities_are_among_debians(place: Place) -> None:
    ours, theirs = (
        json.loads(place.call(program, "--tpm2", "--print-capabilities").stdout)
        for program in (SETUP, THEIR_SETUP)
    )
    assert ours.keys() == theirs.keys()
    assert ours["type"] == "swtpm_setup"
    assert set(theirs["features"]) - set(ours["features"]) == {"tpm-1.2", "tpm12-not-need-root"}
    assert set(ours["features"]) < set(theirs["features"])


def test_help_names_every_option_of_debians_that_is_there(place: Place) -> None:
    ours, theirs = (place.call(program, "--help").stdout for program in (SETUP, THEIR_SETUP))
    named = [set(re.findall(r"(?<!\S)--[a-z0-9_-]+", text)) for text in (ours, theirs)]
    assert named[1] - named[0] == {
        "--take-ownership", "--ownerpass", "--owner-well-known", "--srkpass", "--srk-well-known"
    }  # fmt: skip
    assert "TPM emulator setup tool version" in place.call(SETUP, "--version").stdout


def test_errors_are_in_the_log_and_on_standard_error(place: Place) -> None:
    done = place.run("--createek", "--rsa-keysize", "512", "--logfile", "log")
    assert done.returncode == 1
    assert "Unsupported RSA key size 512." in done.stderr
    assert "Unsupported RSA key size 512." in (place.path / "log").read_text()


def test_a_users_configuration_files_are_made_and_found(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(place.path))
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    refused = place.call(SETUP, "--create-config-files")
    assert refused.returncode == 1
    assert "Requiring the 'root' flag" in refused.stderr
    made = place.call(SETUP, "--create-config-files", "root")
    assert made.returncode == 0, made.stderr
    names = ("swtpm_setup.conf", "swtpm-localca.conf", "swtpm-localca.options")
    assert made.stdout == "".join(f"Writing {place.path}/.config/{name}.\n" for name in names)
    again = place.call(SETUP, "--create-config-files", "root")
    assert again.returncode == 1
    assert "already exists. Refusing to overwrite." in again.stderr
    for flags in ("root,skip-if-exist", "overwrite,root"):
        assert place.call(SETUP, f"--create-config-files={flags}").returncode == 0
    assert "Unsupported" in place.call(SETUP, "--create-config-files", "root,x").stderr
    done = place.call(SETUP, "--tpm2", "--tpmstate", str(place.state), *CERTIFIED,
                      "--write-ek-cert-files", ".")  # fmt: skip
    assert done.returncode == 0, done.stderr
    ca = place.path / ".config/var/lib/swtpm-localca"
    place.verify((place.path / "ek-rsa2048.crt").read_bytes(), ca)


def test_it_is_called_as_libvirt_calls_it(place: Place) -> None:
    """With a secret by a descriptor, and again to change the banks (libvirt 9, qemu_tpm.c)."""
    uuid = "5e0c9b5e-33b5-4a3c-9d6b-1e2a3f9f5c11"
    vmid = f"a-machine-of-a-long-long-name:{uuid}"
    config = ("--config", str(place.path / "setup.conf"))
    common = ("--tpm-state", str(place.state), "--logfile", str(place.path / "vm.log"), *config)
    made = ("--vmid", vmid, "--createek", *CERTIFIED, "--not-overwrite")
    (place.path / "secret").write_text("s" * 24)
    for options in (made, ("--pcr-banks", "sha1,sha256", "--reconfigure"), made):
        with (place.path / "secret").open("rb") as secret:
            key = ("--pwdfile-fd", str(secret.fileno()), "--cipher", "aes-256-cbc")
            done = place.call(SETUP, "--tpm2", *key, *common, *options, pass_fds=(secret.fileno(),))
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    tpm = boot(place, THEIRS, "--key", "pwdfile=secret,mode=aes-256-cbc")
    assert [len(pcrs) for _, pcrs in tpm.banks.banks] == [24, 24, 0, 0]
    subject = x509.load_der_x509_certificate(tpm.contents[0x01C00002]).subject
    assert subject.rfc4514_string() == f"CN={vmid[:27]}:{uuid}"
    assert "Not overwriting existing state file." in (place.path / "vm.log").read_text()


def test_our_emulator_may_be_named_and_deprecated_options_warn(place: Place) -> None:
    (place.path / "swtpm").symlink_to(OURS[0])
    done = place.run("--tpm", f"{place.path}/swtpm socket", "--swtpm_ioctl", "x",
                     "--tcsd-system-ps-file", "y")  # fmt: skip
    assert done.returncode == 0
    assert done.stderr == (
        "Warning: --swtpm_ioctl is deprecated and has no effect.\n"
        "Warning: --tcsd-system-ps-file is deprecated and has no effect.\n"
    )
