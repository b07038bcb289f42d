"""The digest of an EFI program is the one that firmware measured of it, whatever its odd ends.

`tests/fixtures/boot` has programs that OVMF has started, and its log of that.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.errors import DecodeError
from holdfast.eventlog import tcg2
from holdfast.eventlog.authenticode import authenticode, issuers, section

from .pe_images import CHECKSUM_AT, HEADERS, image, signature

BOOT = Path(__file__).parents[1] / "fixtures" / "boot"
OLD, NEW = (BOOT / "old.efi").read_bytes(), (BOOT / "new.efi").read_bytes()
APPLICATION = 0x80000003
PESIGN = shutil.which("pesign")


@pytest.mark.parametrize("which", ["old", "new"])
def test_firmware_has_measured_the_same_in_all_banks(which: str) -> None:
    log = tcg2.parse((BOOT / f"{which}.bin").read_bytes())
    first = next(event for event in log.extends() if event.event_type == APPLICATION)
    program = (BOOT / f"{which}.efi").read_bytes()
    assert len(first.digests) == 4
    assert {alg: authenticode(program, alg) for alg in first.digests} == first.digests


@pytest.mark.skipif(PESIGN is None, reason="pesign is not installed")
@pytest.mark.parametrize("name", ["old.efi", "new.efi"])
def test_pesign_computes_the_same(name: str) -> None:
    assert PESIGN is not None
    command = [PESIGN, "-h", "-i", str(BOOT / name)]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert authenticode((BOOT / name).read_bytes()).hex() in shown


def test_checksum_and_certificates_are_not_hashed_and_all_else_is() -> None:
    table = len(NEW) - 20  # where WIN_CERTIFICATE and "no signature" begin
    unhashed = {*range(CHECKSUM_AT, CHECKSUM_AT + 4), *range(table, len(NEW))}
    places = [*range(CHECKSUM_AT, CHECKSUM_AT + 6), *range(HEADERS - 8, len(NEW))]
    for at in places:
        other = bytearray(NEW)
        other[at] ^= 1
        assert (authenticode(bytes(other)) == authenticode(NEW)) is (at in unhashed), at


@pytest.mark.parametrize("magic", [0x10B, 0x20B])
@pytest.mark.parametrize("directories", [0, 4, 5, 16])
def test_an_image_of_either_kind_with_fewer_directories_is_hashed(
    magic: int, directories: int
) -> None:
    data = image({".text": b"t" * 512}, tail=b"abc", magic=magic, directories=directories)
    entry = 0x80 + 24 + (112 if magic == 0x20B else 96) + 32
    skipped = data[CHECKSUM_AT + 4 : entry] + data[entry + 8 :]
    rest = skipped if directories > 4 else data[CHECKSUM_AT + 4 :]
    assert authenticode(data) == hashlib.sha256(data[:CHECKSUM_AT] + rest).digest()


def test_signing_changes_no_digest_and_names_the_issuer() -> None:
    plain = image({".text": b"t" * 512})
    signed = image({".text": b"t" * 512}, signature=signature("Debian Secure Boot CA"))
    assert authenticode(signed) == authenticode(plain)
    assert issuers(plain) == frozenset()
    assert issuers(signed) == {"CN=Debian Secure Boot CA"}
    assert issuers(NEW) == {"unreadable"}


def test_a_section_is_what_the_loader_makes_of_it() -> None:
    data = image({".text": b"t" * 512, ".linux": b"kernel" + bytes(506)})
    assert section(data, ".linux") == b"kernel" + bytes(506)
    assert section(data, ".initrd") is None


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "does not begin with MZ"),
        (b"\x7fELF" + bytes(100), "does not begin with MZ"),
        (b"MZ", "ends within its headers"),
        (b"MZ" + bytes(200), "no PE header"),
        (OLD[:0x90], "ends within its headers"),
        (OLD[:0x200], "bytes of headers in"),
        (OLD[:-100], "ends within a section"),
        (OLD[:0x98] + b"\x07\x01" + OLD[0x9A:], "neither PE32 nor PE32"),
        (OLD[:0x86] + b"\xff\xff" + OLD[0x88:], "65535 sections"),
    ],
)
def test_what_is_no_image_is_refused_with_the_reason(data: bytes, why: str) -> None:
    with pytest.raises(DecodeError, match=why):
        authenticode(data)


@given(
    st.binary(max_size=64),
    st.lists(st.tuples(st.integers(0, HEADERS), st.integers(0, 255)), max_size=12),
    st.integers(0, len(NEW)),
)
def test_any_bytes_have_a_digest_or_are_refused_and_nothing_else(
    noise: bytes, flips: list[tuple[int, int]], cut: int
) -> None:
    damaged = bytearray(NEW[:cut] + noise)
    for at, value in flips:
        if at < len(damaged):
            damaged[at] = value
    for read in (authenticode, issuers, lambda data: section(data, ".text")):
        try:
            read(bytes(damaged))
        except DecodeError:
            continue
