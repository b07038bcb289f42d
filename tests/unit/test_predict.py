"""What is predicted from one boot is what the TPM had in the next."""

from __future__ import annotations

import json
import struct
from dataclasses import replace
from pathlib import Path

import pytest

from holdfast.errors import InvalidInput
from holdfast.eventlog import tcg2
from holdfast.eventlog.authenticode import authenticode
from holdfast.eventlog.predict import Change, application, contradictions, name_of, predict
from holdfast.eventlog.replay import extend, pcr_values
from holdfast.eventlog.tcg2 import Tcg2Event, Tcg2Log
from holdfast.tpm2.algorithms import Alg, digest

from .pe_images import image, signature

BOOT = Path(__file__).parents[1] / "fixtures" / "boot"
OLD_LOG = tcg2.parse((BOOT / "old.bin").read_bytes())
OLD, NEW = (BOOT / "old.efi").read_bytes(), (BOOT / "new.efi").read_bytes()
SEEN = {
    boot: {int(pcr): bytes.fromhex(value) for pcr, value in pcrs.items()}
    for boot, pcrs in json.loads((BOOT / "pcrs.json").read_text()).items()
}
FIRST, RETURNED, UNIFIED = 22, 23, 25  # the old program's event, its end, and Linux'
APPLICATION = 0x80000003
ONES = b"\1" * 32


def log_of(*events: Tcg2Event) -> Tcg2Log:
    return replace(OLD_LOG, events=events)


def event(pcr: int, event_type: int, data: bytes, measured: bytes) -> Tcg2Event:
    return Tcg2Event(pcr, event_type, {Alg.SHA256: measured}, data)


def started(program: bytes) -> Tcg2Event:
    return event(4, APPLICATION, bytes(32), authenticode(program))


def secure_boot() -> Tcg2Event:
    name = "SecureBoot".encode("utf-16-le")
    data = bytes(16) + struct.pack("<QQ", 10, 1) + name + b"\1"
    return event(7, tcg2.EV_EFI_VARIABLE_DRIVER_CONFIG, data, digest(Alg.SHA256, data))


@pytest.mark.parametrize("old", [OLD, FIRST])
def test_a_boot_with_another_program_is_predicted_as_the_tpm_then_had_it(old: bytes | int) -> None:
    changes, warnings = application(OLD_LOG, old, NEW, "new.efi")
    found = predict(OLD_LOG, range(8), changes)
    assert found.values == SEEN["new"]
    assert SEEN["new"][4] != SEEN["old"][4]
    assert warnings == []
    fates = {each.number: each for each in found.events if each.fate != "kept"}
    assert list(fates) == [FIRST]
    assert (fates[FIRST].was, fates[FIRST].digest) == (authenticode(OLD), authenticode(NEW))


def test_a_boot_without_a_change_is_predicted_to_be_the_same() -> None:
    assert predict(OLD_LOG, range(8), ()).values == SEEN["old"]
    assert contradictions(OLD_LOG, SEEN["old"], range(8)) == []
    assert contradictions(OLD_LOG, SEEN["new"], range(8)) == [4]


def test_events_are_replaced_dropped_and_appended_where_they_stand() -> None:
    a, b, c = (digest(Alg.SHA256, text) for text in (b"a", b"b", b"c"))
    log = log_of(*(event(2, 0x80000004, b"", each) for each in (a, b, a, c)))
    changes = [
        Change(2, a, ONES, "all a"), Change(2, 1, None, "no b"), Change(2, None, b, "b at the end"),
    ]  # fmt: skip
    found = predict(log, [2], changes)
    value = bytes(32)
    for each in (ONES, ONES, c, b):
        value = extend(value, each, Alg.SHA256)
    assert found.values == {2: value}
    fates = [each.fate for each in found.events]
    assert fates == ["replaced", "dropped", "replaced", "kept", "appended"]


def test_the_startup_locality_counts() -> None:
    at_three = replace(OLD_LOG, startup_locality=3)
    assert predict(at_three, [0], ()).values[0] == pcr_values(at_three)[Alg.SHA256][0]
    assert predict(at_three, [0], ()).values[0] != SEEN["old"][0]


@pytest.mark.parametrize(
    ("pcrs", "changes", "why"),
    [
        ([], [], "some of 0 to 23"),
        ([24], [], "some of 0 to 23"),
        ([0], [Change(4, FIRST, ONES, "x")], "x: PCR 4 is not one of those to predict"),
        ([4], [Change(4, ONES, ONES, "x")], r"x: PCR 4 has no event 0101.*it has 14 \(3d67"),
        ([4], [Change(4, 0, ONES, "x")], "x: PCR 4 has no event 0"),
        ([10], [Change(10, 0, ONES, "x")], "it has none"),
        (
            [4], [Change(4, FIRST, ONES, "x"), Change(4, authenticode(OLD), None, "y")],
            f"x and y both change event {FIRST}",
        ),
    ],
)  # fmt: skip
def test_a_change_of_nothing_is_refused_by_name(
    pcrs: list[int], changes: list[Change], why: str
) -> None:
    with pytest.raises(InvalidInput, match=why):
        predict(OLD_LOG, pcrs, changes)


@pytest.mark.parametrize(
    ("old", "why"),
    [
        (NEW, r"was not started in this boot; event 22: \\EFI\\BOOT\\BOOTX64.EFI, 13ae"),
        (RETURNED, "was not started in this boot"),
        ("\\EFI\\debian\\shimx64.efi", "was not started in this boot"),
        ("\\efi\\boot\\bootx64.efi", "events 22, 25 are of that path: name one by its number"),
    ],
)
def test_a_program_that_was_not_started_is_refused_with_those_that_were(
    old: bytes | int | str, why: str
) -> None:
    with pytest.raises(InvalidInput, match=why):
        application(OLD_LOG, old, NEW, "x")


def test_a_program_is_found_by_its_path_in_the_log() -> None:
    log = replace(
        OLD_LOG,
        events=tuple(e for e in OLD_LOG.events if e.digests != OLD_LOG.extends()[UNIFIED].digests),
    )
    changes, _ = application(log, "\\EFI\\BOOT\\bootx64.efi", NEW, "x")
    assert changes == [Change(4, authenticode(OLD), authenticode(NEW), "x")]


def test_the_kernel_in_a_unified_image_is_replaced_with_it() -> None:
    kernels = [image({".text": text * 512}) for text in (b"1", b"2")]
    unified = [image({".text": b"s" * 512, ".linux": kernel}) for kernel in kernels]
    log = log_of(started(unified[0]), started(kernels[0]))
    changes, warnings = application(log, unified[0], unified[1], "x")
    then = log_of(started(unified[1]), started(kernels[1]))
    assert predict(log, [4], changes).values[4] == pcr_values(then)[Alg.SHA256][4]
    assert warnings == []
    _, warnings = application(log, unified[0], kernels[1], "x")
    assert "the new one has none in it" in warnings[0]
    _, warnings = application(log, 0, unified[1], "x")
    assert "there is a kernel in the new program" in warnings[0]


def test_under_secure_boot_another_signer_is_warned_of() -> None:
    ours, theirs = signature("Ours"), signature("Theirs")
    old, same, other, unsigned = (
        image({".text": text * 512}, signature=by)
        for text, by in ((b"o", ours), (b"s", ours), (b"t", theirs), (b"u", b""))
    )
    log = log_of(secure_boot(), started(old))
    assert application(log, old, same, "x")[1] == []
    assert "now CN=Theirs" in application(log, old, other, "x")[1][0]
    assert "now CN=Ours" in application(log, 1, same, "x")[1][0]
    assert "is not signed, and Secure Boot is on" in application(log, old, unsigned, "x")[1][0]
    assert application(log_of(started(old)), old, unsigned, "x")[1] == []


def test_what_may_be_another_at_every_boot_is_warned_of() -> None:
    warnings = predict(OLD_LOG, [1, 4, 5, 8], ()).warnings
    told = "\n".join(warnings)
    assert "PCR 1: what may be another at the next boot is taken as it was: event" in told
    assert f"PCR 4: event {RETURNED}: a boot option did not start the system" in told
    assert "PCR 8: the log has no event of it" in told
    assert predict(OLD_LOG, [0, 2, 7], ()).warnings == ()


def test_events_are_told_by_what_is_in_them() -> None:
    names = {number: name_of(event) for number, event in enumerate(OLD_LOG.extends())}
    assert names[3] == "SecureBoot"
    assert names[FIRST] == "\\EFI\\BOOT\\BOOTX64.EFI"
    assert names[RETURNED] == "Returning from EFI Application from Boot Option"
    assert names[32] == "from memory"
    for data in (b"", bytes(31), bytes(33), b"\xff" * 200, bytes(32) + b"\4\4\6\0\0\xd8"):
        for kind in tcg2.EVENT_TYPES:
            assert isinstance(name_of(event(4, kind, data, ONES)), str)
