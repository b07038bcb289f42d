"""IMA: against the list a kernel made, and against the templates' definition."""

from __future__ import annotations

import hashlib
import struct
from importlib.resources import files
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.errors import DecodeError, InvalidInput
from holdfast.eventlog import ima, records, replay, tcg2
from holdfast.eventlog.ima import Entry
from holdfast.eventlog.records import Record
from holdfast.tpm2.algorithms import HASH_SIZES, Alg

BANKS = (Alg.SHA1, Alg.SHA256)
KERNELS = (
    Path(__file__).parent.parent / "fixtures" / "hostlog" / "ovmf-qemu.ima"
).read_text()  # fmt: skip
LOG = tcg2.parse((files("holdfast.data") / "hostlog" / "ovmf-qemu.bin").read_bytes())
FILE = hashlib.sha256(b"a program").digest()

paths = st.text(max_size=40) | st.binary(max_size=40)
surrogate_free = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=40), st.binary(max_size=40)
)


def listed(record: Record) -> tuple[int, Entry]:
    (line,) = ima.parse_ascii(ima.to_ascii([record]))
    return line


def test_the_kernels_list_reads_and_writes_as_it_was() -> None:
    ((pcr, entry),) = ima.parse_ascii(KERNELS)
    assert (pcr, entry.template_name, entry.path) == (10, "ima-sig", "boot_aggregate")
    assert entry.ascii_line(pcr) + "\n" == KERNELS


def test_the_kernels_boot_aggregate_is_ours() -> None:
    ((_, entry),) = ima.parse_ascii(KERNELS)
    values = replay.pcr_values(LOG)
    assert ima.boot_aggregate(values) == entry.file_digest
    record = ima.boot_aggregate_record(0, values, BANKS)
    assert ima.entry_of(record) == Entry("ima-ng", "sha256", entry.file_digest, "boot_aggregate")


def test_template_data_of_ima_ng_is_length_and_value_twice() -> None:
    record = ima.ima_record(4, "/bin/true", FILE, BANKS)
    data = struct.pack("<I", 40) + b"sha256:\0" + FILE + struct.pack("<I", 10) + b"/bin/true\0"
    assert records.verify_record(record) == data
    assert record.pcr == 10
    assert record.content == {"template_name": "ima-ng", "template_data": data.hex()}
    assert record.digests[Alg.SHA1] == hashlib.sha1(data).digest()
    assert record.digests[Alg.SHA256] == hashlib.sha256(data).digest()
    sha1 = hashlib.sha1(data).hexdigest()
    assert ima.to_ascii([record]) == f"10 {sha1} ima-ng sha256:{FILE.hex()} /bin/true\n"


def test_execution_not_measured_is_said_and_is_no_files_digest() -> None:
    record = ima.not_measured_record(0, BANKS)
    assert ima.entry_of(record) == Entry("ima-ng", "sha256", bytes(32), "execution not measured")
    values = replay.pcr_values(None, [record], BANKS)
    assert all(values[alg][10] != bytes(HASH_SIZES[alg]) for alg in BANKS)


def test_the_old_template_is_a_digest_and_a_padded_name() -> None:
    digest = hashlib.sha1(b"x").digest()
    shown = hashlib.sha1(digest + b"/bin/sh".ljust(256, b"\0")).hexdigest()
    ((pcr, entry),) = ima.parse_ascii(f"10 {shown} ima {digest.hex()} /bin/sh\n")
    assert (pcr, entry) == (10, Entry("ima", "sha1", digest, "/bin/sh"))
    assert entry.ascii_line() == f"10 {shown} ima {digest.hex()} /bin/sh"


def test_a_signature_is_the_third_field() -> None:
    entry = Entry("ima-sig", "sha512", bytes(64), "/bin/sh", b"\3\2signature")
    data = entry.template_data()
    assert data.endswith(
        struct.pack("<I", 8) + b"/bin/sh\0" + struct.pack("<I", 11) + b"\3\2signature"
    )
    assert ima.parse_ascii(entry.ascii_line() + "\n") == ((10, entry),)
    content = {"template_name": "ima-sig", "template_data": data.hex()}
    assert ima.entry_of(records.make_record(0, records.IMA, content, BANKS)) == entry


def test_a_violation_is_shown_as_zeros_and_extended_as_ones() -> None:
    line = f"10 {'0' * 40} ima-ng sha256:{'0' * 64} /tmp/f\n"
    ((pcr, entry),) = ima.parse_ascii(line)
    assert entry.violation
    assert entry.digest(Alg.SHA256) == b"\xff" * 32
    assert entry.ascii_line(pcr) + "\n" == line


@given(surrogate_free)
def test_any_path_is_one_line_that_reads_back(path: str | bytes) -> None:
    record = ima.ima_record(0, path, FILE, BANKS)
    assert len(ima.to_ascii([record]).splitlines()) == 1
    assert listed(record) == (10, Entry("ima-ng", "sha256", FILE, ima.escape(path)))
    assert ima.entry_of(record) == listed(record)[1]


@given(st.binary(max_size=12), st.binary(max_size=12))
def test_two_paths_never_look_alike(one: bytes, other: bytes) -> None:
    assert (ima.escape(one) == ima.escape(other)) == (one == other)


def test_a_path_cannot_forge_a_line() -> None:
    forged = f"x\n10 {'0' * 40} ima-ng sha256:{FILE.hex()} /bin/true"
    assert len(ima.parse_ascii(ima.to_ascii([ima.ima_record(0, forged, FILE, BANKS)]))) == 1
    assert ima.escape("a\nb\\c d") == "a\\012b\\134c d"
    assert ima.escape(b"\xff") == ima.escape("\udcff") == "\\377"


@given(paths)
def test_a_path_is_escaped_or_refused(path: str | bytes) -> None:
    try:
        ima.escape(path).encode()
    except InvalidInput:
        assert isinstance(path, str)


def test_the_longest_path_fits() -> None:
    record = ima.ima_record(0, b"\n" * 4095, FILE, BANKS)
    assert listed(record)[1].path == "\\012" * 4095
    with pytest.raises(InvalidInput):
        ima.ima_record(0, b"\n" * 4096, FILE, BANKS)


@given(st.text(max_size=200))
def test_any_text_is_a_list_or_a_decode_error(text: str) -> None:
    for candidate in (text, KERNELS + text + "\n", f"10 {'0' * 40} ima-ng {text}\n"):
        try:
            entries = ima.parse_ascii(candidate)
        except DecodeError:
            continue
        assert "".join(e.ascii_line(pcr) + "\n" for pcr, e in entries) == candidate


@given(st.data())
def test_a_damaged_list_is_a_list_or_a_decode_error(draw: st.DataObject) -> None:
    where = draw.draw(st.integers(0, len(KERNELS)))
    other = draw.draw(st.text(st.sampled_from("0f: \n-aimnsg"), max_size=3))
    try:
        ima.parse_ascii(KERNELS[:where] + other + KERNELS[where + len(other) :])
    except DecodeError:
        return


after_digest = st.binary(max_size=40).map(
    lambda tail: struct.pack("<I", 40) + b"sha256:\0" + FILE + tail
)


@given(st.binary(max_size=120) | after_digest)
def test_any_template_data_is_an_entry_or_a_decode_error(data: bytes) -> None:
    for name in ("ima-ng", "ima-sig", "ima", "ima-modsig"):
        content = {"template_name": name, "template_data": data.hex()}
        try:
            entry = ima.entry_of(Record(0, 10, {}, records.IMA, content))
        except DecodeError:
            continue
        assert entry.template_data() == data


@pytest.mark.parametrize(
    "line",
    [
        f"24 {'0' * 40} ima-ng sha256:00 /x",
        f"010 {'0' * 40} ima-ng sha256:00 /x",
        f"10 {'0' * 39}1 ima-ng sha256:00 /x",
        f"10 {'0' * 40} ima-ng sha256:0 /x",
        f"10 {'0' * 40} ima-ng sha256: /x",
        f"10 {'0' * 40} ima-ng 0000 /x",
        f"10 {'0' * 40} ima-sig sha256:00 /x",
        f"10 {'0' * 40} ima-sig sha256:00 /x zz",
        f"10 {'0' * 40} ima-ngv2 verity:sha256:00 /x",
        f"10 {'0' * 40} ima 0000 /x",
        f"10 {'0' * 40} ima sha1:{'0' * 40} /x",
        "10",
        "",
    ],
)
def test_a_line_that_is_not_of_its_template_is_refused(line: str) -> None:
    with pytest.raises(DecodeError, match="line 1"):
        ima.parse_ascii(line + "\n")


def field(value: bytes) -> bytes:
    return struct.pack("<I", len(value)) + value


@pytest.mark.parametrize(
    "data",
    [
        field(b"sha256:\0" + FILE) + field(b"/x"),
        field(b"sha256:\0" + FILE) + field(b"/x\0\0"),
        field(b"sha256:" + FILE) + field(b"/x\0"),
        field(b"SHA256:\0" + FILE) + field(b"/x\0"),
        field(b"sha256:\0") + field(b"/x\0"),
        field(b"sha256:\0" + FILE) + field(b"/x\n\0"),
        field(b"sha256:\0" + FILE) + field(b"/x\0") + b"\0",
        field(b"sha256:\0" + FILE) + field(b"/x\0") + field(b""),
        field(b"sha256:\0" + FILE),
    ],
)
def test_template_data_in_another_form_is_refused(data: bytes) -> None:
    content = {"template_name": "ima-ng", "template_data": data.hex()}
    with pytest.raises(DecodeError):
        ima.entry_of(Record(0, 10, {}, records.IMA, content))


def test_a_list_without_its_last_line_feed_is_refused() -> None:
    with pytest.raises(DecodeError):
        ima.parse_ascii(KERNELS[:-1])
    assert ima.parse_ascii("") == ()


@pytest.mark.parametrize("size", [0, 20, 31, 33])
def test_a_file_digest_is_sha_256(size: int) -> None:
    with pytest.raises(InvalidInput):
        ima.ima_record(0, "/x", bytes(size), BANKS)


def test_only_ima_records_are_entries_and_only_they_are_exported() -> None:
    other = records.make_record(0, records.CONFIG, {}, BANKS)
    assert ima.to_ascii([other]) == ""
    with pytest.raises(DecodeError):
        ima.entry_of(other)
