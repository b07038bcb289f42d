"""Logs and reference values: what was edited, and what the policy does not want, is named."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace

import pytest

from holdfast.appraise.policy import parse_policy
from holdfast.eventlog import ima, tcg2
from holdfast.eventlog.records import CONFIG, MOVED, Record, make_record
from holdfast.tpm2.algorithms import Alg, digest
from tests.unit.evidence_judge import (
    DB,
    HOST,
    SITE,
    WEB,
    judge,
    learned,
    refused,
)
from tests.unit.evidence_maker import (
    MANIFEST,
    Given,
    Host,
    Vtpm,
    policy_text,
    small_log,
)

# --- logs --------------------------------------------------------------------------------------


def log_of(change: Callable[[list[tcg2.Tcg2Event]], object]) -> bytes:
    events = list(small_log().events)
    change(events)
    return tcg2.encode(tcg2.build(events, (Alg.SHA256, Alg.SHA384)))


def edit(events: list[tcg2.Tcg2Event]) -> None:
    digests = {**events[1].digests, Alg.SHA256: bytes(32)}
    events[1] = replace(events[1], digests=digests)


@pytest.mark.parametrize(
    ("change", "pcr"),
    [
        (lambda e: e.pop(1), "PCR 4"),
        (edit, "PCR 4"),
        (lambda e: e.insert(2, e.pop(1)) or e.insert(1, e.pop(6)), "PCR 4"),
        (lambda e: e.append(e[0]), "PCR 0"),
        (lambda e: e.clear() or e.append(small_log().events[1]), "PCR 0"),
    ],
)
def test_a_host_log_removed_from_edited_reordered_or_added_to_is_refused(
    change: Callable[[list[tcg2.Tcg2Event]], object], pcr: str
) -> None:
    refused("host log", f"{pcr} (sha256) of the host TPM", Given(WEB, host_log=log_of(change)))


def test_an_event_that_was_never_extended_is_named() -> None:
    log = log_of(lambda events: events.append(events[0]))
    refused("host log", "event 12 of the host (EV_S_CRTM_VERSION)", Given(WEB, host_log=log))


def test_a_vtpm_behind_its_host_is_refused_and_one_ahead() -> None:
    refused("host log", "1 host events behind: event 11", Given(WEB, followed=11))
    refused("host log", "followed 13", Given(WEB, leaf={"host_log_index": 13}))


def test_a_linked_vtpm_has_a_host_log_and_an_unlinked_one_none() -> None:
    refused("host log", "no host log", Given(WEB, host_log=b""))
    refused("host log", "unsafe_unlinked", Given(WEB, unlinked=True))
    policy = parse_policy(policy_text(HOST) + "unsafe_unlinked = true\n")
    attested = judge(Given(WEB, unlinked=True), policy)
    assert "the vTPM is unlinked" in "\n".join(attested.summary())
    refused(
        "host log", "there is a host log",
        Given(WEB, unlinked=True, companions={"host_log": HOST.log}), policy,
    )  # fmt: skip


RECORDS = WEB.records()
OTHER_CONFIG = make_record(2, CONFIG, {"normalised": f"sha256:{0xBAD:064x}"}, WEB.banks)


def renumbered(records: list[Record]) -> tuple[Record, ...]:
    return tuple(replace(record, recnum=n) for n, record in enumerate(records))


@pytest.mark.parametrize(
    ("records", "why"),
    [
        ((), "empty"),
        (RECORDS[:-1], "PCR 15 (sha256) of the vTPM: the log has no event"),
        (RECORDS[:3] + RECORDS[4:], "stands where"),
        (renumbered([*RECORDS[:4], *RECORDS[5:]]), "PCR 13 (sha256)"),
        (renumbered([*RECORDS[:4], RECORDS[5], RECORDS[4], *RECORDS[6:]]), "PCR 13 (sha256)"),
        ((*RECORDS[:2], OTHER_CONFIG, *RECORDS[3:]), "PCR 12 (sha256)"),
        (
            (*RECORDS[:2], replace(RECORDS[2], content=OTHER_CONFIG.content), *RECORDS[3:]),
            "event 2 (holdfast.config/1): its SHA256 digest is not that of its content",
        ),
        (renumbered([*RECORDS, RECORDS[1]]), "event 8 (holdfast.provider/1) is in the log"),
        ((*RECORDS[:2], replace(RECORDS[2], pcr=13), *RECORDS[3:]), "does not belong to PCR 13"),
        (
            (*RECORDS[:2], make_record(2, CONFIG, RECORDS[2].content, (Alg.SHA256,)), *RECORDS[3:]),
            "not in the banks",
        ),
    ],
)
def test_a_container_log_that_is_not_what_was_extended_is_refused(
    records: tuple[Record, ...], why: str
) -> None:
    refused("container log", why, Given(WEB, records=records, measured=RECORDS))


def test_a_bank_without_a_quote_has_to_be_the_ledgers() -> None:
    shorter = {alg: {p: bytes(32) for p in range(24)} for alg in (Alg.SHA256,)}
    ledger = hashlib.sha256(str(shorter).encode()).digest()
    refused("container log", "ledger", Given(WEB, leaf={"ledger": ledger}))


@pytest.mark.parametrize(
    ("records", "why"),
    [
        (renumbered([*RECORDS, RECORDS[2]]), "2 events holdfast.config/1"),
        (renumbered([RECORDS[0], *RECORDS[2:]]), "has no holdfast.provider/1"),
        (renumbered(list(RECORDS[1:])), "PCR 10 has no event"),
        (
            (*RECORDS, ima.ima_record(8, "/bin/sh", bytes(32), WEB.banks)),
            "after execution was not measured",
        ),
        (
            (ima.ima_record(0, "boot_aggregate", bytes(32), WEB.banks), *RECORDS[1:]),
            "boot aggregate",
        ),
        (
            (ima.ima_record(0, "/bin/sh", bytes(32), WEB.banks), *RECORDS[1:]),
            "whether execution is measured",
        ),
        (renumbered([*RECORDS[:3], *RECORDS[4:]]), "(holdfast.image/1): its members"),
        (WEB.records(layers=()), "events holdfast.image/1"),
        (WEB.records(run=4), "run 4"),
        (WEB.records(instance=str(DB.id)), str(DB.id)),
        (WEB.records(name="other"), "names it other"),
        (WEB.records(extra=1), "members"),
        ((*RECORDS, make_record(8, MOVED, {"x": 1}, WEB.banks)), "not of a type"),
    ],
)
def test_a_log_that_leads_to_the_pcrs_and_makes_no_sense_is_refused(
    records: tuple[Record, ...], why: str
) -> None:
    refused("container log", why, Given(WEB, records=records))


def test_a_long_name_is_certified_by_its_beginning() -> None:
    long = Vtpm(HOST, "a" * 40)
    policy = parse_policy(policy_text(HOST).replace('"web"', f'"{"a" * 40}"'))
    assert judge(Given(long), policy).name == "a" * 40
    refused("container log", "names it", Given(long, records=long.records(name="a" * 26)), policy)


# --- reference values --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "why"),
    [
        ('\n0 = ["', '\n0 = ["' + "0" * 64 + '"] #', "host PCR 0 (sha256)"),
        ('\n4 = ["', '\n4 = ["' + "0" * 64 + '"] #', "1 EV_EFI_BOOT_SERVICES_APPLICATION"),
        ('package = "sha256:0', 'package = "sha256:1', "event 1 (holdfast.provider/1)"),
        ('libtpms = "sha256:0', 'libtpms = "sha256:1', "its libtpms"),
        ('python = "3.11.2"', 'python = "3.12.0"', "its python"),
        ("000000a2", "000000a3", "layer 1"),
        ('", "sha256:' + "0" * 62 + "a2", "", "layer 1"),
        ('upper = "empty"', f'upper = "{MANIFEST}"', "writable layer"),
        ('upper = "empty"', 'upper = "empty"\nkind = "plain"', "kind overlay"),
        ('upper = "empty"', f'upper = "empty"\nmanifest = "sha256:{"0" * 64}"', "manifest"),
        ("000000c0", "000000c1", "event 2 (holdfast.config/1)"),
        ("not_measured = true", f'files = ["sha256:{"0" * 64}"]', "execution was not measured"),
        ('names = ["web"]', 'names = ["db"]', "event 7 (holdfast.identity/1)"),
        ('names = ["web"]', f'ids = ["{DB.id}"]', "event 7"),
    ],
)
def test_what_the_policy_does_not_want_is_named(old: str, new: str, why: str) -> None:
    text = policy_text(HOST)
    assert old in text
    refused("reference values", why, Given(WEB), parse_policy(text.replace(old, new)))


def test_the_one_host_event_that_differs_is_named() -> None:
    def change(events: list[tcg2.Tcg2Event]) -> None:
        data = b"another loader"
        digests = {a: digest(a, data) for a in events[1].digests}
        events[1] = replace(events[1], digests=digests, data=data)

    updated = Host(SITE, "host-1", log_of(change), ak=HOST.ak, ca=HOST.ca)
    policy = parse_policy(learned(WEB))
    refused(
        "reference values",
        "event 1 of the host (EV_EFI_BOOT_SERVICES_APPLICATION) in PCR 4",
        Given(Vtpm(updated)),
        policy,
    )


def test_a_host_event_that_the_policy_requires_has_to_be_there() -> None:
    rule = f'[host.events.4]\nrequired = ["{"0" * 64}"]\nallowed = ['
    allowed = ", ".join(
        f'"{e.digests[Alg.SHA256].hex()}"' for e in small_log().events if e.pcr == 4
    )
    text = policy_text(HOST).replace("[host.pcrs]", f"{rule}{allowed}]\n[host.pcrs]")
    refused("reference values", "no event " + "0" * 64, Given(WEB), parse_policy(text))


def test_executed_files_are_measured_against_the_policy_by_name() -> None:
    records = WEB.records(files=[("/bin/sh", bytes(32)), ("/bin/nc", b"\1" * 32)])
    allowed = f'files = ["sha256:{"0" * 64}"]'
    text = policy_text(HOST).replace("not_measured = true", allowed)
    refused("reference values", "'/bin/nc'", Given(WEB, records=records), parse_policy(text))
    both = text.replace(allowed, f'files = ["sha256:{"0" * 64}", "sha256:{"01" * 32}"]')
    assert judge(Given(WEB, records=records), parse_policy(both))
    refused("reference values", "/bin/sh", Given(WEB, records=records))


def test_every_provider_that_took_over_is_judged() -> None:
    records = list(WEB.records())
    content = {**records[1].content, "python": "3.13.0"}
    records.append(make_record(len(records), records[1].content_type, content, WEB.banks))
    refused("reference values", "event 8", Given(WEB, records=tuple(records)))


def test_clears_are_counted() -> None:
    refused("reference values", "cleared 2 times", Given(WEB, leaf={"clear_count": 2}))
    policy = parse_policy(policy_text(HOST) + "max_clears = 2\n")
    assert judge(Given(WEB, leaf={"clear_count": 2}), policy)


def test_unconstrained_sections_are_said() -> None:
    text = policy_text(HOST)
    text = text.replace('allowed = ["', 'any = true\n#"')
    assert "config: not constrained by the policy" in judge(Given(WEB), parse_policy(text)).limits


def test_a_policy_may_say_that_pcrs_fix_the_hosts_user_space() -> None:
    text = policy_text(HOST).replace("[host]\n", "[host]\nverity_root_in = [8]\n")
    summary = "\n".join(judge(Given(WEB), parse_policy(text)).summary())
    assert "user space of the host: fixed by PCRs 8, says the policy" in summary
    assert "not measured" not in summary.replace("execution in the container: not measured", "")
