"""The TCG2 log: the fixture made by firmware, logs of our own making, and bytes of nobody's."""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
from importlib.resources import files
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.errors import DecodeError, InvalidInput
from holdfast.eventlog import ima, records, replay, tcg2
from holdfast.eventlog.tcg2 import Tcg2Event
from holdfast.tpm2.algorithms import HASH_SIZES, HASHES_BY_NAME, Alg, digest

FIXTURE = (files("holdfast.data") / "hostlog" / "ovmf-qemu.bin").read_bytes()
BANKS = (Alg.SHA256, Alg.SHA1)
ORACLE = shutil.which("tpm2_eventlog")
needs_oracle = pytest.mark.skipif(ORACLE is None, reason="tpm2_eventlog (tpm2-tools) is missing")


def oracle_version() -> tuple[int, ...]:
    """Version of tpm2-tools, or (0,)."""
    if ORACLE is None:
        return (0,)
    shown = subprocess.run([ORACLE, "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r'version="(\d+(?:\.\d+)*)', shown)
    return tuple(map(int, found[1].split("."))) if found else (0,)


# Before, it extends EV_NO_ACTION and knows no StartupLocality (tpm2-tools #3224, #3146).
needs_newer_oracle = pytest.mark.skipif(
    oracle_version() < (5, 6),
    reason=f"tpm2-tools {'.'.join(map(str, oracle_version()))} replays no StartupLocality: this "
    "runs with 5.6 and newer; libtpms is asked in tests/engine/test_startup_locality.py",
)


def event(pcr: int, event_type: int, data: bytes, measured: bytes | None = None) -> Tcg2Event:
    hashed = data if measured is None else measured
    return Tcg2Event(pcr, event_type, {alg: digest(alg, hashed) for alg in BANKS}, data)


def no_action(data: bytes, pcr: int = 0) -> Tcg2Event:
    digests = {alg: bytes(HASH_SIZES[alg]) for alg in BANKS}
    return Tcg2Event(pcr, tcg2.EV_NO_ACTION, digests, data)


def locality(value: int, pcr: int = 0) -> Tcg2Event:
    return no_action(b"StartupLocality\0" + bytes((value,)), pcr)


def variable(name: str, value: bytes) -> bytes:
    text = name.encode("utf-16-le")
    return bytes(16) + struct.pack("<QQ", len(name), len(value)) + text + value


def oracle_pcrs(log: bytes, where: Path) -> dict[Alg, dict[int, bytes]]:
    """PCR values as tpm2_eventlog replays them: those it saw extended."""
    assert ORACLE is not None
    where.write_bytes(log)
    run = subprocess.run([ORACLE, where], capture_output=True, text=True, check=True)
    found: dict[Alg, dict[int, bytes]] = {}
    bank = Alg.NULL
    for line in run.stdout.partition("\npcrs:\n")[2].splitlines():
        if match := re.fullmatch(r"  (\w+):", line):
            bank = HASHES_BY_NAME[match[1]]
        elif match := re.fullmatch(r"    (\d+) *: 0x([0-9a-f]+)", line):
            found.setdefault(bank, {})[int(match[1])] = bytes.fromhex(match[2])
    return found


def assert_agrees(values: replay.PcrValues, oracle: dict[Alg, dict[int, bytes]]) -> None:
    assert set(oracle) == set(values)
    for bank, pcrs in oracle.items():
        assert pcrs == {pcr: values[bank][pcr] for pcr in pcrs}


def test_the_fixture_is_encoded_as_it_was_read() -> None:
    log = tcg2.parse(FIXTURE)
    assert tcg2.encode(log) == FIXTURE
    assert log.algorithms == (Alg.SHA1, Alg.SHA256, Alg.SHA384, Alg.SHA512)
    assert (len(log.events), log.startup_locality, log.padding) == (24, 0, b"")


def test_of_the_fixture_only_hashed_data_is_believed() -> None:
    log = tcg2.parse(FIXTURE)
    believed = {event.type_name for event in log.events if event.content_verified}
    others = {event.type_name for event in log.events if not event.content_verified}
    assert believed == {
        "EV_S_CRTM_VERSION", "EV_SEPARATOR", "EV_EFI_ACTION", "EV_EFI_VARIABLE_BOOT",
        "EV_EFI_VARIABLE_DRIVER_CONFIG",
    }  # fmt: skip
    assert others == {
        "EV_EFI_PLATFORM_FIRMWARE_BLOB", "EV_EFI_BOOT_SERVICES_APPLICATION", "EV_EVENT_TAG",
    }  # fmt: skip


@needs_oracle
def test_tpm2_eventlog_replays_the_fixture_as_we_do(tmp_path: Path) -> None:
    oracle = oracle_pcrs(FIXTURE, tmp_path / "log")
    assert set(oracle[Alg.SHA256]) == {0, 1, 2, 3, 4, 5, 6, 7, 9}
    assert_agrees(replay.pcr_values(tcg2.parse(FIXTURE)), oracle)


@needs_newer_oracle
@pytest.mark.parametrize("start", [0, 3, 4])
def test_tpm2_eventlog_agrees_on_where_pcr_0_starts(start: int, tmp_path: Path) -> None:
    log = tcg2.build([locality(start), event(0, tcg2.EV_S_CRTM_VERSION, b"v\0")], BANKS)
    assert log.startup_locality == start
    assert_agrees(replay.pcr_values(log), oracle_pcrs(tcg2.encode(log), tmp_path / "log"))


@needs_oracle
def test_tpm2_eventlog_replays_our_own_log_exported_as_tcg2(tmp_path: Path) -> None:
    host = tcg2.parse(FIXTURE)
    values = replay.pcr_values(host)
    own = [
        ima.boot_aggregate_record(0, values, host.algorithms),
        *(
            records.make_record(n, kind, {"n": n, "text": "é"}, host.algorithms)
            for n, kind in enumerate(records.PCR_OF, 1)
            if kind != records.IMA
        ),
    ]
    events = [*host.events, *map(records.event_of_record, own)]
    log = tcg2.build(events, host.algorithms)
    oracle = oracle_pcrs(tcg2.encode(log), tmp_path / "log")
    assert set(oracle[Alg.SHA1]) >= {10, 11, 12, 13, 14, 15}
    assert_agrees(replay.pcr_values(host, own), oracle)


@given(st.binary(max_size=400))
def test_any_bytes_are_a_log_or_a_decode_error(data: bytes) -> None:
    for candidate in (data, FIXTURE[:69] + data):
        try:
            log = tcg2.parse(candidate)
        except DecodeError:
            continue
        assert tcg2.encode(log) == candidate


@given(st.data())
def test_a_damaged_fixture_is_a_log_or_a_decode_error(data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(FIXTURE)))
    end = data.draw(st.integers(start, min(len(FIXTURE), start + 64)))
    damaged = FIXTURE[:start] + data.draw(st.binary(max_size=64)) + FIXTURE[end:]
    try:
        log = tcg2.parse(damaged)
    except DecodeError:
        return
    assert tcg2.encode(log) == damaged
    for item in log.events:
        assert item.verified_data is None or item.verified_data in item.data


def test_every_cut_of_the_fixture_but_between_events_is_refused() -> None:
    whole = 0
    for size in range(len(FIXTURE)):
        try:
            log = tcg2.parse(FIXTURE[:size])
        except DecodeError:
            continue
        # What is left of a next header may be zeros, which look like padding.
        whole += not log.padding
    assert whole == 24


@st.composite
def events(draw: st.DrawFn) -> Tcg2Event:
    data = draw(st.binary(max_size=80))
    # Not all zeros: such a header ends a log.
    kinds = st.integers(1, 0xFFFFFFFE).filter(lambda kind: kind != tcg2.EV_NO_ACTION)
    kind = draw(st.sampled_from(sorted(set(tcg2.EVENT_TYPES) - {0, 3})) | kinds)
    digests = {alg: draw(st.binary(min_size=size, max_size=size)) for alg, size in SIZES.items()}
    return Tcg2Event(draw(st.integers(0, 23)), kind, digests, data)


SIZES = {alg: HASH_SIZES[alg] for alg in BANKS}


@given(st.lists(events(), max_size=8))
def test_what_is_built_reads_back(listed: list[Tcg2Event]) -> None:
    log = tcg2.build(listed, BANKS)
    assert log.events == tuple(listed)
    assert log.algorithms == BANKS
    assert tcg2.parse(tcg2.encode(log)) == log


@pytest.mark.parametrize("filler", [b"\0", b"\xff"])
@pytest.mark.parametrize("size", [1, 11, 12, 13, 5000])
def test_padding_is_passed_over_and_kept(filler: bytes, size: int) -> None:
    log = tcg2.parse(FIXTURE + filler * size)
    assert log.events == tcg2.parse(FIXTURE).events
    assert log.padding == filler * size


@pytest.mark.parametrize("tail", [bytes(40) + b"\1", b"\xff" * 40 + b"\0", bytes(12) + b"\xff"])
def test_padding_with_something_after_it_is_refused(tail: bytes) -> None:
    with pytest.raises(DecodeError, match="padding"):
        tcg2.parse(FIXTURE + tail)


def test_digests_of_algorithms_we_do_not_know_are_carried_in_place() -> None:
    sm3 = 0x12
    body = b"Spec ID Event03\0" + struct.pack("<IBBBBI", 0, 0, 2, 0, 2, 3)
    body += struct.pack("<HHHHHH", Alg.SHA1, 20, sm3, 32, Alg.SHA256, 32) + b"\3abc"
    head = struct.pack("<II20sI", 0, tcg2.EV_NO_ACTION, bytes(20), len(body)) + body
    one = struct.pack("<III", 7, tcg2.EV_SEPARATOR, 3) + struct.pack("<H20s", Alg.SHA1, b"s" * 20)
    one += struct.pack("<H32s", sm3, b"m" * 32) + struct.pack("<H32s", Alg.SHA256, b"t" * 32)
    one += struct.pack("<I", 4) + bytes(4)
    log = tcg2.parse(head + one)
    assert tcg2.encode(log) == head + one
    assert log.algorithms == (Alg.SHA1, Alg.SHA256)
    assert log.events[0].digests == {Alg.SHA1: b"s" * 20, Alg.SHA256: b"t" * 32}
    assert log.events[0].other_digests == ((1, sm3, b"m" * 32),)


def test_two_digests_for_one_bank_are_refused() -> None:
    head = tcg2.encode(tcg2.build([], BANKS))
    digest_twice = struct.pack("<H20s", Alg.SHA1, bytes(20)) * 2
    with pytest.raises(DecodeError, match="0x0004"):
        tcg2.parse(head + struct.pack("<III", 7, 4, 2) + digest_twice + struct.pack("<I", 0))


@pytest.mark.parametrize("start", [0, 3, 4])
def test_the_startup_locality_is_where_pcr_0_starts(start: int) -> None:
    log = tcg2.build([locality(start), event(0, tcg2.EV_S_CRTM_VERSION, b"v\0")], BANKS)
    assert log.startup_locality == start
    values = replay.pcr_values(log)
    for alg in BANKS:
        before = bytes(HASH_SIZES[alg] - 1) + bytes((start,))
        assert values[alg][0] == digest(alg, before + digest(alg, b"v\0"))


def test_the_startup_locality_is_that_of_the_h_crtm_without_an_event_saying_so() -> None:
    log = tcg2.build([event(0, tcg2.EV_EFI_HCRTM_EVENT, b"HCRTM", b"firmware")], BANKS)
    assert log.startup_locality == 4
    size = HASH_SIZES[Alg.SHA256]
    start = bytes(size - 1) + b"\4"
    expected = digest(Alg.SHA256, start + digest(Alg.SHA256, b"firmware"))
    assert replay.pcr_values(log)[Alg.SHA256][0] == expected


@pytest.mark.parametrize(
    "listed",
    [
        [locality(1)],
        [locality(2)],
        [locality(5)],
        [locality(3, pcr=1)],
        [locality(3), locality(3)],
        [event(0, tcg2.EV_S_CRTM_VERSION, b"v"), locality(3)],
        [no_action(b"StartupLocality\0")],
        [no_action(b"StartupLocality\0\3\0")],
    ],
)
def test_a_startup_locality_that_could_be_read_two_ways_is_refused(listed: list[Tcg2Event]) -> None:
    with pytest.raises(InvalidInput, match="StartupLocality"):
        tcg2.build(listed, BANKS)


def test_no_action_is_not_extended() -> None:
    log = tcg2.build([no_action(b"whatever", pcr=0xFFFFFFFF)], BANKS)
    assert log.extends() == ()
    assert replay.pcr_values(log) == replay.initial(BANKS)


@pytest.mark.parametrize(
    ("one", "believed"),
    [
        (event(4, tcg2.EV_SEPARATOR, bytes(4)), bytes(4)),
        (event(4, tcg2.EV_SEPARATOR, b"an error of the firmware", b"\1\0\0\0"), None),
        (event(0, tcg2.EV_S_CRTM_VERSION, b"1\0"), b"1\0"),
        (event(0, tcg2.EV_S_CRTM_VERSION, b"1\0", b"2\0"), None),
        (event(1, tcg2.EV_EFI_VARIABLE_BOOT, variable("Boot0000", b"disk"), b"disk"), b"disk"),
        (event(1, tcg2.EV_EFI_VARIABLE_BOOT2, variable("Boot0000", b"disk"), b"disk"), None),
        (
            event(8, tcg2.EV_IPL, b"grub_cmd: linux /vmlinuz\0", b"linux /vmlinuz"),
            b"linux /vmlinuz",
        ),
        (event(9, tcg2.EV_IPL, b"/vmlinuz\0", b"a kernel"), None),
        (event(8, tcg2.EV_IPL, b"(hd0,gpt2)/grub.cfg\0", b"a file"), None),
        # Relabelled: a file measured by grub passed off as a Secure Boot variable.
        (event(9, tcg2.EV_EFI_VARIABLE_DRIVER_CONFIG, variable("SecureBoot", b"\1")), None),
        (event(4, 0x80000003, b"Authenticode is never the hash of the data"), None),
        (Tcg2Event(4, tcg2.EV_SEPARATOR, {}, bytes(4)), None),
    ],
)
def test_only_what_the_digests_hash_is_believed(one: Tcg2Event, believed: bytes | None) -> None:
    assert one.verified_data == believed
    assert one.content_verified == (believed is not None)


def test_one_bank_that_disagrees_is_enough_for_disbelief() -> None:
    good = event(4, tcg2.EV_SEPARATOR, bytes(4))
    bad = Tcg2Event(4, tcg2.EV_SEPARATOR, {**good.digests, Alg.SHA256: bytes(32)}, bytes(4))
    assert not bad.content_verified


def test_more_events_than_allowed_are_refused() -> None:
    head = tcg2.encode(tcg2.build([], [Alg.SHA1]))
    one = struct.pack("<IIIH20sI", 1, 5, 1, Alg.SHA1, bytes(20), 0)
    assert len(tcg2.parse(head + one * tcg2.EVENTS_MAX).events) == tcg2.EVENTS_MAX
    with pytest.raises(DecodeError, match="events"):
        tcg2.parse(head + one * (tcg2.EVENTS_MAX + 1))


def test_a_log_longer_than_allowed_is_refused() -> None:
    with pytest.raises(DecodeError, match="at most"):
        tcg2.parse(FIXTURE + bytes(tcg2.LOG_MAX))


@pytest.mark.parametrize(
    "listed",
    [
        [Tcg2Event(1, 5, {Alg.SHA512: bytes(64)}, b"")],
        [Tcg2Event(1, 5, {Alg.SHA1: bytes(19)}, b"")],
        [Tcg2Event(24, 5, {}, b"")],
        [Tcg2Event(-1, 5, {}, b"")],
        [Tcg2Event(0, 0, {}, b"")],
        [Tcg2Event(1, 5, {}, bytes(tcg2.EVENT_DATA_MAX + 1))],
    ],
)
def test_events_that_would_not_read_back_are_not_built(listed: list[Tcg2Event]) -> None:
    with pytest.raises(InvalidInput):
        tcg2.build(listed, BANKS)


@pytest.mark.parametrize("banks", [(), (Alg.SHA1, Alg.SHA1), (Alg.SM3_256,), (Alg.RSA,)])
def test_a_log_has_banks_we_know_each_once(banks: tuple[Alg, ...]) -> None:
    with pytest.raises(InvalidInput):
        tcg2.build([], banks)
