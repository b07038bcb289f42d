"""holdfast-swtpm-setup against Debian's swtpm_setup: what it makes, and what it refuses."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key

from holdfast.protocol import linear
from holdfast.tpm2 import requests as rq
from holdfast.tpm2.commands import Cc
from holdfast.tpm2.constants import Cap, Ht, Rh
from holdfast.tpm2.keys import public_key
from holdfast.tpm2.structures import PcrSelection, Public

from .program import OURS, SECONDS, SETUP, STARTED, THEIRS, Program, running

THEIR_SETUP = "swtpm_setup"
CERTIFIED = ("--create-ek-cert", "--create-platform-cert", "--lock-nvram")
EK_INDICES = {0x01C00002: 0x81010001, 0x01C0001C: 0x8101001C, 0x01C00016: 0x81010016}
KEY_USAGE = "2.5.29.15"
AUTHORITY_KEY = "2.5.29.35"


@dataclass(frozen=True)
class Place:
    """A directory with configuration files and two local CAs: ours, and swtpm_localca's."""

    path: Path

    @property
    def state(self) -> Path:
        return self.path / "state"

    @property
    def ca(self) -> Path:
        return self.path / "ca"

    def config(self, text: str, name: str = "given.conf") -> tuple[str, str]:
        (self.path / name).write_text(text)
        return ("--config", str(self.path / name))

    def run(
        self, *options: str, program: str = SETUP, state: str = "", pass_fds: tuple[int, ...] = ()
    ) -> subprocess.CompletedProcess[str]:
        given = ["--tpm2", "--tpmstate", state or str(self.state), *options]
        if "--config" not in options:
            given += ["--config", str(self.path / "setup.conf")]
        return self.call(program, *given, pass_fds=pass_fds)

    def call(
        self, program: str, *options: str, pass_fds: tuple[int, ...] = ()
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [program, *options], cwd=self.path, capture_output=True, text=True,
            timeout=6 * SECONDS, check=False, pass_fds=pass_fds,
        )  # fmt: skip

    def made(self, *options: str, program: str = SETUP, state: str = "") -> str:
        done = self.run(*options, program=program, state=state)
        assert done.returncode == 0, done.stderr + done.stdout
        return done.stdout

    def refused(self, *options: str, state: str = "") -> str:
        """What it says; it must leave every directory as it was, but for lock files."""
        before = self.files()
        done = self.run(*options, state=state)
        assert done.returncode == 1, done
        assert done.stderr
        assert "Traceback" not in done.stderr
        assert self.files() == before
        return done.stderr

    def files(self) -> dict[str, bytes]:
        return {
            str(path): path.read_bytes()
            for path in self.path.rglob("*")
            if path.is_file() and not path.name.startswith(".lock")
        }

    def verify(self, certificate: bytes, ca: Path) -> None:
        (self.path / "one.der").write_bytes(certificate)
        done = subprocess.run(
            ["openssl", "verify", "-x509_strict", "-CAfile", ca / "swtpm-localca-rootca-cert.pem",
             "-untrusted", ca / "issuercert.pem", "one.der"],
            cwd=self.path, capture_output=True, text=True, check=False,
        )  # fmt: skip
        # The names of a TPM's make are critical, and unknown to OpenSSL as extensions they are not.
        assert done.returncode == 0, done.stderr + done.stdout


def authority_config(place: Path, name: str) -> None:
    directory = place / name
    (place / f"{name}.conf").write_text(
        f"statedir = {directory}\nsigningkey = {directory}/signkey.pem\n"
        f"issuercert = {directory}/issuercert.pem\ncertserial = {directory}/certserial\n"
    )


@pytest.fixture
def place(tmp_path: Path) -> Place:
    (tmp_path / "state").mkdir()
    for name in ("ca", "theirs"):
        authority_config(tmp_path, name)
    (tmp_path / "options").write_text(
        "--platform-manufacturer Maker\n--platform-version 3.1 --platform-model Box\n"
    )
    common = f"create_certs_tool_options = {tmp_path}/options\n"
    (tmp_path / "setup.conf").write_text(f"create_certs_tool_config = {tmp_path}/ca.conf\n{common}")
    (tmp_path / "tool.conf").write_text(
        f"create_certs_tool = swtpm_localca # in PATH\n"
        f"create_certs_tool_config = {tmp_path}/theirs.conf\n{common}"
    )
    return Place(tmp_path)


# --- what a TPM has ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Tpm:
    """What a TPM that was booted shows."""

    keys: dict[int, Public]
    indices: dict[int, bytes]  # TPMS_NV_PUBLIC
    contents: dict[int, bytes]
    banks: PcrSelection
    permanent: dict[int, int]  # properties that a set-up can change


def ask(program: Program) -> Tpm:
    def handles(kind: Ht) -> tuple[int, ...]:
        return rq.handles(program.send(rq.get_capability(Cap.HANDLES, kind << 24, 64)))

    keys = {handle: rq.read_public_area(program.send(rq.read_public(handle)))
            for handle in handles(Ht.PERSISTENT)}  # fmt: skip
    indices, contents = {}, {}
    for index in handles(Ht.NV_INDEX):
        answer = program.send(rq.command(Cc.NV_ReadPublic, (index,)))
        indices[index] = rq.response(Cc.NV_ReadPublic, answer).params.sized()
        size = int.from_bytes(indices[index][-2:], "big")
        data = b""
        while len(data) < size:
            command = rq.nv_read(Rh.OWNER, index, min(rq.NV_CHUNK, size - len(data)), len(data))
            data += rq.response(Cc.NV_Read, program.send(command)).params.sized()
        contents[index] = data
    reader = rq.response(Cc.GetCapability, program.send(rq.get_capability(Cap.PCRS, 0, 1))).params
    reader.take(5)
    banks = PcrSelection.read(reader)
    answer = program.send(rq.get_capability(Cap.TPM_PROPERTIES, 0x200, 32))
    reader = rq.response(Cc.GetCapability, answer).params
    reader.take(5)
    properties = {reader.u32(): reader.u32() for _ in range(reader.u32())}
    return Tpm(keys, indices, contents, banks, properties)


def boot(
    place: Place, command: tuple[str, ...] = THEIRS, *options: str, state: tuple[str, ...] = ()
) -> Tpm:
    with running(Program(place.path, command, state), *STARTED, *options) as program:
        tpm = ask(program)
        program.shut_down()
    return tpm


def shape(public: Public) -> tuple[object, ...]:
    """All of a public area but its key."""
    return (public.kind, public.name_alg, public.attributes, public.policy, public.scheme,
            public.symmetric, public.curve, public.bits, public.exponent,
            [len(part) for part in public.unique])  # fmt: skip


def about(certificate: bytes, *without: str) -> tuple[object, ...]:
    """All of a certificate but keys, signature, serial number and time."""
    read = x509.load_der_x509_certificate(certificate)
    extensions = [
        (extension.oid.dotted_string, extension.critical, extension.value.public_bytes())
        for extension in read.extensions
        if extension.oid.dotted_string not in (AUTHORITY_KEY, *without)
    ]
    return (read.version, read.subject, read.issuer, read.not_valid_after_utc,
            read.signature_algorithm_oid, extensions)  # fmt: skip


MADE: tuple[tuple[str, ...], ...] = (
    (),
    ("--createek",),
    ("--create-ek-cert",),
    ("--create-platform-cert", "--lock-nvram"),
    (*CERTIFIED, "--create-spk", "--vmid", "a vm:5e0c9b5e-33b5-4a3c-9d6b-1e2a3f9f5c11"),
    (*CERTIFIED, "--rsa-keysize", "3072", "--pcr-banks", "sha1,sha512"),
    (*CERTIFIED, "--rsa-keysize", "max", "--create-spk", "--pcr-banks", "-"),
    ("--createek", "--decryption", "--ecc", "--create-spk"),
    ("--createek", "--allow-signing", "--decryption", "--create-spk", "--lock-nvram"),
    (*CERTIFIED, "--allow-signing"),
    (*CERTIFIED, "--allow-signing", "--decryption", "--rsa-keysize", "3072"),
)


@pytest.mark.parametrize(
    ("options", "tool"),
    [pytest.param(options, False, id=f"{' '.join(options)} own CA") for options in MADE]
    + [
        pytest.param(options, True, id=f"{' '.join(options)} swtpm_localca")
        for options in MADE
        if any("cert" in option for option in options)
    ],
)
def test_it_makes_what_debians_makes(place: Place, options: tuple[str, ...], tool: bool) -> None:
    config = ("--config", str(place.path / ("tool.conf" if tool else "setup.conf")))
    place.made(*options, *config)
    ours = boot(place)
    place.made(*options, "--config", str(place.path / "tool.conf"), "--overwrite",
               program=THEIR_SETUP)  # fmt: skip
    theirs = boot(place)
    assert {h: shape(key) for h, key in ours.keys.items()} == {
        h: shape(key) for h, key in theirs.keys.items()
    }
    assert ours.banks == theirs.banks
    assert ours.permanent == theirs.permanent
    assert ours.indices.keys() == theirs.indices.keys()
    for index, public in theirs.indices.items():
        content, other = ours.contents[index], theirs.contents[index]
        if other[:1] != b"\x30":
            assert (ours.indices[index], content) == (public, other)  # a template
            continue
        assert ours.indices[index][:-2] == public[:-2]  # but for its size
        # Debian's does not tell its tool that an EK signs, and its certificate denies it.
        kept = (KEY_USAGE,) if "--allow-signing" in options else ()
        assert about(content, *kept) == about(other, *kept)
        serials = [x509.load_der_x509_certificate(data).serial_number for data in (content, other)]
        assert min(serials) >= 2


@pytest.mark.parametrize("command", [OURS, THEIRS], ids=["in ours", "in Debian's"])
@pytest.mark.parametrize("bits", ["2048", "3072"])
@pytest.mark.parametrize("signing", [(), ("--allow-signing",), ("--allow-signing", "--decryption")],
                         ids=["decrypts", "signs", "both"])  # fmt: skip
def test_certificates_in_nv_verify_and_are_of_the_keys(
    place: Place, command: tuple[str, ...], bits: str, signing: tuple[str, ...]
) -> None:
    place.made(*CERTIFIED, "--rsa-keysize", bits, *signing)
    tpm = boot(place, command)
    found = [index for index in EK_INDICES if index in tpm.contents]
    assert len(found) == 2
    for index in found:
        place.verify(tpm.contents[index], place.ca)
        read = x509.load_der_x509_certificate(tpm.contents[index])
        ek = tpm.keys[EK_INDICES[index]]
        assert read.public_key() == public_key(ek)
        usage = read.extensions.get_extension_for_class(x509.KeyUsage).value
        assert usage.digital_signature == bool(signing)
        decrypts = usage.key_agreement if index == 0x01C00016 else usage.key_encipherment
        assert decrypts == (signing != ("--allow-signing",))
    platform = tpm.contents[0x01C08000]
    place.verify(platform, place.ca)
    assert x509.load_der_x509_certificate(platform).public_key() == public_key(
        tpm.keys[EK_INDICES[found[0]]]
    )


def test_tpm2_tools_make_the_same_endorsement_keys_again(place: Place) -> None:
    place.made(*CERTIFIED)
    with running(Program(place.path, OURS), *STARTED) as program:
        for algorithm, handle in (("rsa", "0x81010001"), ("ecc384", "0x81010016")):
            program.tool("tpm2_createek", "-Q", "-G", algorithm, "-c", "ek.ctx", "-u", "ek.pub")
            again = Public.decode((place.path / "ek.pub").read_bytes()[2:])
            kept = rq.read_public_area(program.send(rq.read_public(int(handle, 16))))
            assert again.unique == kept.unique
            program.tool("tpm2_flushcontext", "-t")
        program.tool("tpm2_getekcertificate", "-o", "rsa.der", "-o", "ecc.der")
        program.shut_down()
    place.verify((place.path / "rsa.der").read_bytes(), place.ca)


def test_two_tpms_have_different_keys(place: Place) -> None:
    place.made("--createek")
    one = boot(place)
    place.made("--createek", "--overwrite")
    other = boot(place)
    assert all(one.keys[handle].unique != other.keys[handle].unique for handle in one.keys)


# --- where the state is -----------------------------------------------------------------------

KEYS = {
    "keyfile": (("--keyfile", "k16"), ("--key", "file=k16")),
    "keyfile of 256 bits": (
        ("--keyfile", "k32", "--cipher", "aes-256-cbc"), ("--key", "file=k32,mode=aes-256-cbc"),
    ),
    "pwdfile": (
        ("--pwdfile", "password", "--cipher", "aes-cbc"), ("--key", "pwdfile=password"),
    ),
    "pwdfile of 256 bits": (
        ("--pwdfile", "password", "--cipher", "aes-256-cbc"),
        ("--key", "pwdfile=password,mode=aes-256-cbc"),
    ),
}  # fmt: skip


@pytest.fixture
def keyed(place: Place) -> Place:
    (place.path / "k16").write_text("00112233445566778899aabbccddeeff")
    (place.path / "k32").write_text("00112233445566778899aabbccddeeff" * 2)
    (place.path / "password").write_text("correct horse")
    return place


@pytest.mark.parametrize("command", [OURS, THEIRS], ids=["in ours", "in Debian's"])
@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("form", ["directory", "dir://", "file://"])
def test_a_state_boots_under_its_key(
    keyed: Place, command: tuple[str, ...], key: str, form: str
) -> None:
    given, booted = KEYS[key]
    where: tuple[str, ...] = ()
    state = f"dir://{keyed.state}" if form == "dir://" else str(keyed.state)
    if form == "file://":
        state = f"file://{keyed.path / 'one'}"
        where = ("--tpmstate", f"backend-uri={state}")
    keyed.made("--createek", *given, state=state)
    assert set(boot(keyed, command, *booted, state=where).keys) == {0x81010001, 0x81010016}
    assert b"\x01\xc0\x00\x02" not in b"".join(keyed.files().values())


@pytest.mark.parametrize("kind", ["keyfile", "pwdfile"])
def test_a_key_comes_by_a_descriptor(keyed: Place, kind: str) -> None:
    source = "k16" if kind == "keyfile" else "password"
    with (keyed.path / source).open("rb") as file:
        number = file.fileno()
        done = keyed.run(f"--{kind}-fd", str(number), pass_fds=(number,))
    assert done.returncode == 0, done.stderr
    name = "file" if kind == "keyfile" else "pwdfile"
    boot(keyed, THEIRS, "--key", f"{name}={source}")


@pytest.mark.parametrize("command", [OURS, THEIRS], ids=["in ours", "in Debian's"])
def test_a_linear_file_boots(place: Place, command: tuple[str, ...]) -> None:
    state = f"file://{place.path / 'one'}"
    place.made(*CERTIFIED, state=state)
    stored = linear.decode((place.path / "one").read_bytes())
    assert list(stored.states) == ["permall"]
    assert (place.path / "one").stat().st_mode & 0o777 == 0o640
    assert len(boot(place, command, state=("--tpmstate", f"backend-uri={state}")).contents) == 3
    assert "Found existing TPM state 'permall'." in place.refused(state=state)
    place.made("--overwrite", "--createek", state=state)
    tpm = boot(place, command, state=("--tpmstate", f"backend-uri={state}"))
    assert (len(tpm.keys), tpm.contents) == (2, {})


def test_an_empty_file_takes_a_state_and_another_file_is_left_alone(place: Place) -> None:
    (place.path / "empty").touch()
    place.made(state=f"file://{place.path / 'empty'}")
    assert linear.decode((place.path / "empty").read_bytes()).states
    (place.path / "other").write_bytes(b"something that is no store" * 99)
    for options in ((), ("--overwrite",)):
        assert "linear TPM store" in place.refused(*options, state=f"file://{place.path / 'other'}")


def test_what_is_written_is_the_users_of_runas(place: Place) -> None:
    directory = place.path / "nobodys"
    directory.mkdir()
    os.chown(directory, 65534, 65534)
    with opened_to_nobody(place.path):
        conf = place.config(f"create_certs_tool_config = {directory}/localca.conf\n")
        (directory / "localca.conf").write_text(
            f"statedir = {directory}/ca\nsigningkey = {directory}/ca/k.pem\n"
            f"issuercert = {directory}/ca/c.pem\n"
        )
        log = directory / "log"
        options = ("--create-ek-cert", "--write-ek-cert-files", str(directory), *conf)
        place.made("--runas", "nobody", "--logfile", str(log), *options, state=str(directory))
    made = [path for path in directory.rglob("*") if path.name != "localca.conf"]
    assert len(made) >= 10
    assert {path.stat().st_uid for path in made} == {65534}
    assert "as nobody:nogroup @" in log.read_text()


@contextlib.contextmanager
def opened_to_nobody(path: Path) -> Iterator[None]:
    """pytest's directories are for one user; others may pass through until this ends."""
    parents = [one for one in (path, *path.parents) if not one.stat().st_mode & 0o001]
    modes = {one: one.stat().st_mode for one in parents}
    try:
        for one in parents:
            one.chmod(0o755)
        yield
    finally:
        for one, mode in modes.items():
            one.chmod(mode)


# --- what is there is not touched without being told -------------------------------------------


def test_a_state_that_is_there_is_an_error_is_kept_or_is_replaced(place: Place) -> None:
    place.made()
    first = (place.state / "tpm2-00.permall").read_bytes()
    assert "Found existing TPM state 'permall'." in place.refused("--createek")
    assert "Not overwriting existing state file." in place.made("--createek", "--not-overwrite")
    assert (place.state / "tpm2-00.permall").read_bytes() == first
    (place.state / "tpm2-00.volatilestate").write_bytes(b"of the old TPM")
    place.made("--createek", "--overwrite")
    assert (place.state / "tpm2-00.permall").read_bytes() != first
    assert sorted(path.name for path in place.state.iterdir()) == [".lock", "tpm2-00.permall"]


def test_a_suspended_state_alone_is_a_state(place: Place) -> None:
    (place.state / "tpm2-00.volatilestate").write_bytes(b"of some TPM")
    assert "Found existing TPM state 'volatilestate'." in place.refused()


@pytest.mark.parametrize("command", [OURS, THEIRS], ids=["ours", "Debian's"])
def test_a_running_tpm_is_not_set_up(place: Place, command: tuple[str, ...]) -> None:
    with running(Program(place.path, command), *STARTED):
        for options in (("--overwrite",), ("--reconfigure",)):
            done = place.run(*options)
            assert done.returncode == 1
            assert "another TPM runs on it" in done.stderr


def test_reconfiguration_changes_the_banks_and_nothing_else(keyed: Place) -> None:
    key = ("--keyfile", "k16")
    keyed.made(*CERTIFIED, "--create-spk", *key)
    before = boot(keyed, THEIRS, "--key", "file=k16")
    said = keyed.made("--reconfigure", "--pcr-banks", "sha384,sha1", *key)
    assert "Starting vTPM reconfiguration as root:root @" in said
    after = boot(keyed, OURS, "--key", "file=k16")
    assert [(alg.name, len(pcrs)) for alg, pcrs in after.banks.banks] == [
        ("SHA1", 24), ("SHA256", 0), ("SHA384", 24), ("SHA512", 0)
    ]  # fmt: skip
    assert (after.keys, after.indices, after.contents) == (
        before.keys, before.indices, before.contents
    )  # fmt: skip


def test_reconfiguration_needs_a_tpm_its_key_and_that_it_is_off(keyed: Place) -> None:
    assert "There is no TPM state in" in keyed.refused("--reconfigure")
    keyed.made("--keyfile", "k16")
    assert "no key was given" in keyed.refused("--reconfigure")
    assert "HMAC failed" in keyed.refused("--reconfigure", "--pwdfile", "password")
    (keyed.state / "tpm2-00.volatilestate").write_bytes(b"suspended")
    assert "is suspended" in keyed.refused("--reconfigure", "--keyfile", "k16")


@pytest.mark.parametrize("form", ["", "file://"])
def test_of_many_at_once_on_one_state_one_makes_it(place: Place, form: str) -> None:
    state = f"{form}{place.state}{'/one' if form else ''}"
    command = [SETUP, "--tpm2", "--tpmstate", state, "--createek", "--config",
               str(place.path / "setup.conf"), "--write-ek-cert-files", "."]  # fmt: skip
    processes = [
        subprocess.Popen([*command, "--create-ek-cert"], cwd=place.path, text=True,
                         stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        for _ in range(5)
    ]  # fmt: skip
    said = [process.communicate(timeout=6 * SECONDS)[1] for process in processes]
    assert sorted(process.returncode for process in processes) == [0, 1, 1, 1, 1], said
    for process, text in zip(processes, said, strict=True):
        if process.returncode:
            assert re.search("Found existing TPM state|another TPM runs on it|File exists", text)
    where = ("--tpmstate", f"backend-uri={state}") if form else ()
    tpm = boot(place, state=where)
    assert (place.path / "ek-rsa2048.crt").read_bytes() == tpm.contents[0x01C00002]
    assert not list(place.path.glob(".ek-*"))


# --- what is refused ---------------------------------------------------------------------------

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


def test_what_a_user_may_not_write_is_refused(place: Place) -> None:
    nobody = ("--runas", "nobody")
    place.ca.mkdir(0o700)
    with opened_to_nobody(place.path):
        said = place.refused(*nobody)
        assert f"Need read/write rights on directory {place.state} for user nobody." in said
        said = place.refused(*nobody, state=f"file://{place.path}/one")
        assert f"Need write rights on directory {place.path} for user nobody." in said
        os.chown(place.state, 65534, 65534)
        assert f"{place.ca}" in (said := place.refused(*nobody, "--create-ek-cert"))
        assert "Permission denied" in said
        said = place.refused(*nobody, "--create-ek-cert", "--write-ek-cert-files", ".")
        assert "User nobody cannot access directory ." in said


@pytest.mark.parametrize("form", ["", "file://"])
@pytest.mark.parametrize("free", [0, 4096])
def test_a_full_disk_is_an_error_and_leaves_nothing(place: Place, form: str, free: int) -> None:
    small = place.path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", small], check=True)
    try:
        (small / "filling").write_bytes(bytes(16384 - free))
        done = place.run(*CERTIFIED, state=f"{form}{small}{'/one' if form else ''}")
        assert (done.returncode, "No space left on device" in done.stderr) == (1, True)
        assert {path.name for path in small.iterdir()} <= {"filling", ".lock"}
    finally:
        subprocess.run(["umount", small], check=True)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ((), "ek-rsa2048.crt"),
        ((), "ek-secp384r1.crt"),
        (("--rsa-keysize", "3072"), "ek-rsa3072.crt"),
    ],
)
def test_a_directory_in_a_certificates_place_is_refused_before_anything_is_made(
    place: Place, options: tuple[str, ...], name: str
) -> None:
    (place.path / name).mkdir()
    before = sorted(place.path.rglob("*"))
    said = place.refused("--create-ek-cert", "--write-ek-cert-files", ".", *options)
    assert f"{name} is a directory" in said
    assert sorted(place.path.rglob("*")) == before  # not even a lock, or a CA


def test_certificate_files_that_cannot_have_their_names_are_not_left_under_others(
    place: Place,
) -> None:
    target = place.path / "ek-secp384r1.crt"
    target.touch()
    subprocess.run(["mount", "--bind", target, target], check=True)
    try:
        done = place.run("--create-ek-cert", "--write-ek-cert-files", ".")
    finally:
        subprocess.run(["umount", target], check=True)
    assert done.returncode == 1
    assert "ek-secp384r1.crt: Device or resource busy" in done.stderr
    assert target.read_bytes() == b""
    assert not list(place.path.glob(".ek-*"))


# --- the program that makes certificates -------------------------------------------------------


def tool(place: Place, script: str, seconds: int = 30) -> tuple[str, str]:
    path = place.path / "tool"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return place.config(f"create_certs_tool = {path}\ncreate_certs_tool_seconds = {seconds}\n")


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("echo no such luck >&2; exit 3", "tool exit with status 3: no such luck"),
        ("kill -9 $$", "tool exit with status -9"),
        ("exit 0", "tool left no ek.cert"),
        ('touch "$6"/ek.cert', "tool left ek.cert of 0 bytes"),
        ('mkfifo "$6"/ek.cert', "tool left no ek.cert: not a regular file"),
        ('ln -s /dev/zero "$6"/ek.cert', "tool left no ek.cert: not a regular file"),
        ('head -c 2049 /dev/zero > "$6"/ek.cert', "tool left ek.cert of 2049 bytes"),
        ('echo certificate > "$6"/ek.cert', "tool made no certificate"),
        ('cp "$(dirname "$0")"/another.der "$6"/ek.cert', "of another key than the EK's"),
    ],
)
def test_a_tool_that_fails_is_an_error_and_leaves_nothing(
    place: Place, script: str, message: str
) -> None:
    place.made("--create-ek-cert", "--write-ek-cert-files", str(place.path))
    (place.path / "ek-rsa2048.crt").rename(place.path / "another.der")
    for name in ("tpm2-00.permall", ".lock"):
        (place.state / name).unlink()
    before = set(Path("/tmp").glob("swtpm_setup.certs.*"))
    said = place.refused("--create-ek-cert", *tool(place, script))
    assert message in said
    assert "Authoring the TPM state failed." in said
    assert set(Path("/tmp").glob("swtpm_setup.certs.*")) <= before


def test_a_tool_that_hangs_is_killed_with_what_it_started(place: Place) -> None:
    config = tool(place, f"sleep 1000 & echo $! > {place.path}/pid; wait", seconds=1)
    before = place.files()
    done = place.run("--create-ek-cert", *config)
    assert done.returncode == 1
    assert "tool did not end within 1 s and was killed" in done.stderr
    pid = int((place.path / "pid").read_text())
    (place.path / "pid").unlink()
    assert place.files() == before
    assert gone(pid)


def test_a_signal_ends_it_and_the_tool_and_leaves_nothing(place: Place) -> None:
    config = tool(place, f"echo $$ > {place.path}/pid; exec sleep 1000")
    command = [SETUP, "--tpm2", "--tpmstate", str(place.state), "--create-ek-cert", *config]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=place.path)
    assert process.stdout is not None
    deadline = time.monotonic() + SECONDS
    while not (place.path / "pid").exists() or not (place.path / "pid").read_text():
        assert time.monotonic() < deadline
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(SECONDS) == 128 + signal.SIGTERM
    process.stdout.close()
    assert gone(int((place.path / "pid").read_text()))
    assert [path.name for path in place.state.iterdir()] == [".lock"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=lambda one: one.name)
def test_whenever_it_is_ended_the_state_is_whole_or_none(
    place: Place, number: signal.Signals
) -> None:
    place.made("--create-ek-cert")  # the CA is there then
    command = [SETUP, "--tpm2", *CERTIFIED, "--config", str(place.path / "setup.conf")]
    ends = []
    for turn in range(24):
        state = place.path / f"state{turn}"
        state.mkdir()
        process = subprocess.Popen(
            [*command, "--tpmstate", state], stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        assert process.stdout is not None
        assert process.stderr is not None
        for _ in range(turn % 13):  # as far as it has said this many lines
            process.stdout.readline()
        process.send_signal(number)
        process.communicate(timeout=SECONDS)
        ends.append(process.returncode)
        left = {path.name for path in state.iterdir()} - {".lock"}
        if number is signal.SIGTERM:
            assert left in (set(), {"tpm2-00.permall"})
        if "tpm2-00.permall" in left:
            where = ("--tpmstate", f"dir={state}")
            assert len(boot(place, state=where).contents) == 3
    assert set(ends) != {0}


def gone(pid: int) -> bool:
    """Whether a process ended; one that nobody waits for is there as a zombie."""
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state == "Z":
            return True
    return False


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


# --- the local CA ------------------------------------------------------------------------------


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


# --- the rest of the command line --------------------------------------------------------------


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


def test_certificate_files_are_what_nv_has(place: Place) -> None:
    place.made(*CERTIFIED, "--write-ek-cert-files", ".", "--logfile", "log", "--display")
    contents = boot(place).contents
    assert (place.path / "ek-rsa2048.crt").read_bytes() == contents[0x01C00002]
    assert (place.path / "ek-secp384r1.crt").read_bytes() == contents[0x01C00016]
    log = (place.path / "log").read_text()
    assert "Successfully authored TPM state." in log
    assert "NV indices: 0x1c00002 0x1c00016 0x1c08000" in log
    assert (place.path / "log").stat().st_mode & 0o777 == 0o600
    (place.path / "link").symlink_to("log")
    assert "Too many levels of symbolic links" in place.refused("--logfile", "link", "--overwrite")


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


def test_a_reader_that_goes_stops_nothing(place: Place) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [SETUP, "--tpm2", "--tpmstate", str(place.state), "--createek"]
    done = subprocess.run(command, stdout=writer, stderr=writer, check=False)
    os.close(writer)
    assert done.returncode == 0
    assert len(boot(place).keys) == 2


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
