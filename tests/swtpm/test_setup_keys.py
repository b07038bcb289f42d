"""Keys, templates and NV of a TPM that was set up, against what Debian's swtpm_setup makes."""

from __future__ import annotations

import pytest
from cryptography import x509

from holdfast.tpm2 import requests as rq
from holdfast.tpm2.keys import public_key
from holdfast.tpm2.structures import Public

from .program import OURS, STARTED, THEIRS, Program, running
from .setting_up import CERTIFIED, THEIR_SETUP, Place, about, boot

EK_INDICES = {0x01C00002: 0x81010001, 0x01C0001C: 0x8101001C, 0x01C00016: 0x81010016}
KEY_USAGE = "2.5.29.15"


def shape(public: Public) -> tuple[object, ...]:
    """All of a public area but its key."""
    return (public.kind, public.name_alg, public.attributes, public.policy, public.scheme,
            public.symmetric, public.curve, public.bits, public.exponent,
            [len(part) for part in public.unique])  # fmt: skip


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
