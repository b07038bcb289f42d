"""The verifier: what holds passes, and each attack ends at the step that is there for it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from uuid import UUID

import pytest

from holdfast.appraise import logs
from holdfast.appraise.learn import learn_policy
from holdfast.appraise.policy import parse_policy
from holdfast.appraise.result import HARDWARE, SOFTWARE, Progress
from holdfast.appraise.verifier import STEPS, appraise
from holdfast.errors import AppraisalError, InvalidInput
from holdfast.eventlog import replay, tcg2
from holdfast.evidence.freshness import Status
from holdfast.ids import InstanceId
from holdfast.tpm2.algorithms import Alg
from holdfast.tpm2.constants import NvAttr, ObjectAttr, Rh
from holdfast.tpm2.structures import Public
from holdfast.tpm2.templates import AK_P256, EK_P256
from tests.unit.evidence_judge import (
    DAY,
    DB,
    HOST,
    OTHER_HOST,
    POLICY,
    SITE,
    WEB,
    judge,
    learned,
    refused,
)
from tests.unit.evidence_maker import (
    AUDIENCE,
    INDEX,
    INSTANCE,
    LAYERS,
    NONCE,
    NOW,
    OVMF,
    USER_DATA,
    Given,
    HardwareMaker,
    Host,
    Signer,
    Site,
    Vtpm,
    make,
    policy_for,
    policy_text,
    small_log,
)

# --- what holds --------------------------------------------------------------------------------


def test_good_evidence_passes_in_both_forms_and_says_what_it_establishes() -> None:
    evidence = make(Given(WEB, notes=("hello",)))
    for data in (evidence.encode_json(), evidence.encode_cbor()):
        attested = appraise(data, POLICY, NONCE, AUDIENCE, USER_DATA, NOW)
        assert (attested.name, attested.instance) == ("web", INSTANCE)
        assert attested.host.tpm == SOFTWARE
        assert attested.contents.image.layers == LAYERS
        summary = "\n".join(attested.summary())
        assert "user space of the host: not measured" in summary
        assert "host TPM: software stand-in" in summary
        assert "the host says: hello" in summary


def test_a_real_host_log_passes_and_a_round_of_one_does() -> None:
    host = Host(SITE, "ovmf", OVMF)
    policy = parse_policy(
        learned(vtpm := Vtpm(host, banks=(Alg.SHA256,)), quoted_banks=(Alg.SHA256,))
    )
    attested = judge(Given(vtpm, neighbours=0, place=0, quoted_banks=(Alg.SHA256,)), policy)
    assert attested.host.events == len(tcg2.parse(OVMF).extends())


@pytest.mark.parametrize(
    "given",
    [{}, {"unlinked": True}, {"records": WEB.records(files=[("/bin/sh", bytes(32))])}],
)
def test_a_policy_learned_from_a_run_accepts_that_run(given: dict[str, Any]) -> None:
    policy = parse_policy(learned(WEB, **given))
    assert judge(Given(WEB, **given), policy).name == "web"


def test_a_learned_policy_refuses_evidence_that_does_not_hold_by_itself() -> None:
    data = make(Given(WEB, host_extra=bytes(32))).encode_cbor()
    with pytest.raises(AppraisalError):
        learn_policy(data, POLICY.trust, NONCE, AUDIENCE, USER_DATA, NOW)


def test_an_appraisal_takes_a_time_with_a_zone_and_the_policys_audience() -> None:
    with pytest.raises(InvalidInput, match="time zone"):
        judge(Given(WEB), now=NOW.replace(tzinfo=None))
    with pytest.raises(InvalidInput, match="audience"):
        judge(Given(WEB), audience="else")
    with pytest.raises(InvalidInput, match="nonce"):
        judge(Given(WEB), nonce=b"short")


# --- freshness, and whose it is ----------------------------------------------------------------


def test_evidence_for_another_challenge_is_refused() -> None:
    refused("leaf", "another nonce", Given(WEB), nonce=bytes(32))
    refused("leaf", "other user data", Given(WEB), user_data=b"another channel")
    refused("leaf", "audience", Given(WEB, audience="mallory.example"))


def test_an_old_vtpm_quote_in_a_new_leaf_is_refused() -> None:
    refused("vTPM quote", "this challenge", Given(WEB, extra=bytes(32)))


def test_a_replayed_host_quote_is_refused() -> None:
    old, new = make(Given(WEB, nonce=bytes(32))), make(Given(WEB))
    refused("inclusion", "not quoted over", replace(new, host=old.host))


def test_a_host_quote_over_anything_but_a_round_is_refused() -> None:
    refused("inclusion", "not quoted over", Given(WEB, host_extra=bytes(32)))


def test_another_vtpms_leaf_of_the_same_round_is_refused() -> None:
    web, db = make(Given(WEB)), make(Given(DB))
    refused("members", "not the one", replace(web, leaf=db.leaf, proof=db.proof, host=db.host))


def test_a_leaf_at_another_place_is_refused() -> None:
    evidence = make(Given(WEB))
    moved = replace(evidence, proof=replace(evidence.proof, index=1))
    refused("inclusion", "not quoted over", moved)


def test_another_vtpms_quote_in_the_place_of_its_own_is_refused() -> None:
    web, db = make(Given(WEB)), make(Given(DB))
    refused("leaf", "another quote", replace(web, vtpm=db.vtpm))


def test_a_vtpm_of_another_host_behind_this_one_is_refused() -> None:
    """Relay: a genuine vTPM elsewhere answers, and this host says that it is here."""
    elsewhere = Vtpm(Host(SITE, "host-3"))  # it booted the same, so no log tells them apart
    refused("identity", "is not of the host whose AK has quoted", Given(elsewhere, host=HOST))


def test_another_hosts_ak_is_refused() -> None:
    policy = parse_policy(policy_text(HOST))
    refused("host TPM", "not known to be hardware", Given(Vtpm(OTHER_HOST)), policy)
    evidence = make(Given(WEB))
    quoted = OTHER_HOST.ak.quote(bytes(32), HOST.pcrs)
    refused("host quote", "does not verify", replace(evidence, host=quoted))


def test_the_ak_of_another_vtpm_is_refused() -> None:
    swapped = {"ak": DB.ak.public.encode(), "ak_certificate": DB.ak_certificate}
    refused("identity", "not all of one vTPM", Given(WEB, companions=swapped))
    refused("identity", "AK certificate", Given(WEB, companions={"ak": DB.ak.public.encode()}))
    signed_by_other = Vtpm(HOST)
    signed_by_other.ak_certificate = WEB.ak_certificate
    wrong = {"ak": WEB.ak.public.encode()}
    leaf = {"ak_name": WEB.ak.public.name}
    refused(
        "identity",
        "RSA EK",
        Given(signed_by_other, companions={**wrong, "ek_rsa": DB.ek_rsa.encode()}),
    )
    mixed = Given(
        signed_by_other,
        companions={**wrong, "ek_ecc": signed_by_other.ek.public.encode()},
        leaf=leaf,
    )
    refused("vTPM quote", "does not verify", mixed)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("ak_name", DB.ak.public.name),
        ("ek_name", DB.ek_rsa.name),
        ("instance", UUID("1f0e6f1e-8c3a-4a53-9f0e-6f1e8c3a4a53")),
        ("quote", bytes(32)),
    ],
    ids=["ak_name", "ek_name", "instance", "quote"],
)
def test_a_leaf_about_something_else_is_refused(field: str, value: object) -> None:
    refused("leaf", "it is about", Given(WEB, leaf={field: value}))


# --- members and form --------------------------------------------------------------------------


@pytest.mark.parametrize("label", sorted(make(Given(WEB)).companions.digests()))
def test_a_member_changed_after_the_leaf_was_made_is_named(label: str) -> None:
    digests = {**make(Given(WEB)).companions.digests(), label: bytes(32)}
    refused("members", label, Given(WEB, leaf={"members": digests}))
    digests.pop(label)
    refused("members", label, Given(WEB, leaf={"members": digests}))


def test_a_member_taken_away_is_named() -> None:
    members = {**make(Given(WEB)).companions.digests(), "host-ek": bytes(32)}
    refused("members", "host-ek", Given(WEB, leaf={"members": members}))


def test_junk_is_refused_as_such() -> None:
    for data in (b"", b"{}", b"junk", b"\xa0"):
        with pytest.raises(AppraisalError) as caught:
            appraise(data, POLICY, NONCE, AUDIENCE, USER_DATA, NOW)
        assert caught.value.step == "form"


# --- certificates ------------------------------------------------------------------------------


def test_a_site_root_that_is_not_pinned_is_refused() -> None:
    other = Host(Site())
    refused("identity", "not pinned", Given(Vtpm(other)))


def test_expired_and_future_certificates_are_named() -> None:
    refused("identity", "site root", Given(WEB), now=NOW + 4000 * DAY)
    refused("identity", "not valid before", Given(WEB), now=NOW - 40 * DAY)
    later = Vtpm(HOST)
    later.made = NOW + DAY
    later.__post_init__()
    refused("identity", "the vTPM's RSA EK certificate: is not valid before", Given(later))


def test_certificates_of_another_site_under_a_pinned_root_are_refused() -> None:
    stranger = Host(Site())
    foreign = Vtpm(stranger)
    given = Given(foreign, companions={"root_certificate": SITE.root})
    refused("identity", "the host AK's certificate", given)
    mixed = Given(foreign, host=HOST, companions={"ca_certificate": HOST.ca_certificate})
    refused("identity", "the vTPM's RSA EK certificate: its signature", mixed)


def test_a_certificate_in_anothers_place_is_refused() -> None:
    refused(
        "identity",
        "the host AK's certificate",
        Given(WEB, companions={"host_ak_certificate": HOST.ca_certificate}),
    )
    refused(
        "identity",
        "the issuing CA's certificate",
        Given(WEB, companions={"ca_certificate": HOST.ak_certificate}),
    )
    refused(
        "identity",
        "the vTPM's RSA EK certificate",
        Given(WEB, companions={"ek_rsa_certificate": WEB.ek_ecc_certificate}),
    )
    refused(
        "identity",
        "the vTPM's AK certificate: is not for signatures alone",
        Given(WEB, companions={"ak_certificate": WEB.ek_ecc_certificate}),
    )
    refused("identity", "certificate", Given(WEB, companions={"ak_certificate": b"junk"}))


def test_a_stand_in_that_the_policy_does_not_name_is_refused() -> None:
    text = policy_text(HOST).replace(HOST.ak_name, OTHER_HOST.ak_name)
    refused("host TPM", HOST.ak_name, Given(WEB), parse_policy(text))


def hardware_host(vendor: HardwareMaker, **changed: Any) -> Host:
    return Host(
        SITE,
        **{"ek": vendor.ek.public.encode(), "ek_certificate": vendor.certificate, **changed},
    )


def hardware_policy(host: Host, vendor: HardwareMaker) -> Any:
    text = policy_text(host).replace("software_host_tpm", "ek_roots")
    return parse_policy(text.replace(host.ak_name, vendor.pem.replace("\n", "\\n")))


def test_a_hardware_tpm_is_known_by_its_ek_certificate_and_the_aks() -> None:
    vendor = HardwareMaker()
    host = hardware_host(vendor)
    attested = judge(Given(Vtpm(host)), hardware_policy(host, vendor))
    assert attested.host.tpm == HARDWARE
    assert "host TPM: hardware, certified by CN=TPM Vendor EK CA" in attested.summary()
    learnt = parse_policy(
        learn_policy(
            make(Given(Vtpm(host))).encode_json(),
            hardware_policy(host, vendor).trust,
            NONCE,
            AUDIENCE,
            USER_DATA,
            NOW,
        )
    )
    assert judge(Given(Vtpm(host)), learnt).host.tpm == HARDWARE


def test_an_ek_certificate_from_elsewhere_makes_no_hardware() -> None:
    vendor, other = HardwareMaker(), HardwareMaker()
    borrowed = Host(SITE)  # its AK was activated by another EK than the one it shows
    borrowed.ek, borrowed.ek_certificate = vendor.ek.public.encode(), vendor.certificate
    refused("host TPM", "activated by", Given(Vtpm(borrowed)), hardware_policy(borrowed, vendor))
    host = hardware_host(vendor)
    refused("host TPM", "signature", Given(Vtpm(host)), hardware_policy(host, other))
    named = HardwareMaker("Another CA")
    refused("host TPM", "not among", Given(Vtpm(host)), hardware_policy(host, named))
    swapped = hardware_host(vendor, ek_certificate=other.certificate)
    refused("host TPM", "another key", Given(Vtpm(swapped)), hardware_policy(swapped, vendor))
    bare = hardware_host(vendor, ek_certificate=b"")
    refused("host TPM", "there is none", Given(Vtpm(bare)), hardware_policy(bare, vendor))
    refused(
        "host TPM", "expired", Given(Vtpm(host)), hardware_policy(host, vendor), now=NOW + 500 * DAY
    )


# --- quotes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("signer", "why"),
    [
        (Signer(tag=0x8017), "is not of a quote"),  # TPM_ST_ATTEST_CERTIFY
        (Signer(magic=0x12345678), "TPM_GENERATED_VALUE"),
        (Signer(hierarchy=Rh.OWNER), "platform hierarchy"),
    ],
)
def test_a_vtpm_quote_of_another_kind_is_refused(signer: Signer, why: str) -> None:
    refused("vTPM quote", why, Given(Vtpm(HOST, ak=signer)))


@pytest.mark.parametrize(
    "template",
    [
        EK_P256,
        replace(AK_P256, attributes=AK_P256.attributes & ~ObjectAttr.RESTRICTED),
        replace(AK_P256, attributes=AK_P256.attributes & ~ObjectAttr.FIXED_TPM),
        replace(AK_P256, policy=bytes(32)),
    ],
)
def test_a_key_that_is_not_of_an_aks_template_is_none(template: Public) -> None:
    refused("identity", "AK certificate", Given(Vtpm(HOST, ak=Signer(template))))
    host = Host(SITE, ak=Signer(template))
    refused("identity", "the host AK's certificate", Given(Vtpm(host)), policy_for(host))


def some_pcrs(numbers: range, banks: tuple[Alg, ...] = WEB.banks) -> replay.PcrValues:
    values = replay.pcr_values(small_log(), WEB.records(), banks)
    return {alg: {pcr: values[alg][pcr] for pcr in numbers} for alg in banks}


def test_a_vtpm_quote_covers_pcrs_0_to_15_of_the_wanted_banks() -> None:
    for numbers in (range(15), range(17), range(1, 16)):
        refused("vTPM quote", "other PCRs", Given(WEB, vtpm_pcrs=some_pcrs(numbers)))
    only = some_pcrs(range(16), (Alg.SHA384,))
    refused("vTPM quote", "sha256", Given(WEB, vtpm_pcrs=only))
    wants = parse_policy(policy_text(HOST) + 'banks = ["sha384"]\n')
    assert judge(Given(WEB), wants)
    refused("vTPM quote", "sha384", Given(WEB, quoted_banks=(Alg.SHA256,)), wants)


def test_pcr_values_that_were_not_quoted_are_refused() -> None:
    evidence = make(Given(WEB))
    for side, step in (("vtpm", "vTPM quote"), ("host", "host quote")):
        quote = getattr(evidence, side)
        flipped = replace(quote, pcrs=quote.pcrs[:-1] + bytes((quote.pcrs[-1] ^ 1,)))
        refused(step, "values given", replace(evidence, **{side: flipped}))
        fewer = replace(quote, pcrs=b"")
        with pytest.raises(InvalidInput):
            replace(evidence, **{side: fewer}).encode_json()


def test_a_host_quote_covers_the_boot() -> None:
    pcrs = {Alg.SHA256: {pcr: HOST.pcrs[Alg.SHA256][pcr] for pcr in range(9)}}
    refused("host quote", "PCR 9 (sha256) is not quoted", Given(WEB, host_pcrs=pcrs))


def test_a_clock_that_may_have_gone_back_is_refused_where_the_policy_says_so() -> None:
    vtpm = Vtpm(HOST, ak=Signer(safe=0))
    assert "not shut down in order" in "\n".join(judge(Given(vtpm)).summary())
    policy = parse_policy(policy_text(HOST) + "safe_clock = true\n")
    refused("vTPM quote", "clock", Given(vtpm), policy)


# --- freshness of the state ---------------------------------------------------------------------


def test_the_state_is_the_newest_in_the_map_that_the_host_tpm_remembers() -> None:
    host = judge(Given(WEB, anchor={"sequence": 7, "unclean": 2, "recoveries": 1})).host
    assert (host.sequence, host.unclean, host.recoveries) == (7, 2, 1)
    assert host.index_name == INDEX.name


@pytest.mark.parametrize("field", ["epoch", "run", "lineage"])
def test_what_is_said_of_a_state_is_what_the_map_has_of_it(field: str) -> None:
    """Older state, put back: its host may say so as well, or not; the map is what counts."""
    refused("freshness", f"its {field} is", Given(WEB, newest={field: 12}))


def test_a_vtpm_that_was_destroyed_is_refused() -> None:
    refused("freshness", "destroyed", Given(WEB, newest={"status": Status.DESTROYED}))


@pytest.mark.parametrize(
    ("certified", "why"),
    [
        ({"extra": bytes(32)}, "in another round"),
        ({"contents": bytes(32)}, "not the one that the host TPM remembers"),
        ({"contents": b""}, "not the one that the host TPM remembers"),
        ({"offset": 1}, "not the one that the host TPM remembers"),
        ({"name": HOST.ak.public.name}, "not the one whose value was certified"),
        ({"tag": 0x8018}, "not of an NV index"),
    ],
)
def test_a_value_that_was_certified_otherwise_is_refused(
    certified: dict[str, Any], why: str
) -> None:
    refused("freshness", why, Given(WEB, certified=certified))


def test_an_anchor_of_an_earlier_round_or_of_another_host_is_refused() -> None:
    old, new = make(Given(WEB, nonce=bytes(32))), make(Given(WEB))
    refused("freshness", "another round", replace(new, anchored=old.anchored))
    refused("freshness", "does not verify", Given(WEB, certifier=OTHER_HOST.ak))
    key = Signer(magic=0, key=HOST.ak.key)
    refused("freshness", "TPM_GENERATED_VALUE", Given(WEB, certifier=key))


@pytest.mark.parametrize("count", ["resets", "restarts"])
def test_a_value_that_was_certified_in_another_boot_is_refused(count: str) -> None:
    ak = replace(HOST.ak, **{count: getattr(HOST.ak, count) + 1})
    refused("freshness", "certified in another boot", Given(WEB, certifier=ak))


@pytest.mark.parametrize(
    ("added", "taken", "why"),
    [
        (0, NvAttr.CLEAR_STCLEAR, "lost with each reset"),
        (0, NvAttr.ORDERLY, "lost with each reset"),
        (0, NvAttr.POLICYWRITE, "lost with each reset"),
        (0, NvAttr.WRITTEN, "lost with each reset"),
        (0, NvAttr.EXTEND, "lost with each reset"),
        (1 << 4, 0, "lost with each reset"),
        (NvAttr.AUTHWRITE, 0, "others"),
        (NvAttr.OWNERWRITE, 0, "others"),
        (NvAttr.PPWRITE, 0, "others"),
    ],
)
def test_an_index_that_others_may_set_makes_nothing_fresh(added: int, taken: int, why: str) -> None:
    index = replace(INDEX, attributes=NvAttr((INDEX.attributes | added) & ~taken))
    refused("freshness", why, Given(WEB, index=index))


def test_an_index_of_another_size_or_with_a_weaker_name_is_refused() -> None:
    refused("freshness", "others", Given(WEB, index=replace(INDEX, size=20)))
    refused("freshness", "the index given", Given(WEB, index=replace(INDEX, name_alg=Alg.SHA1)))


def test_an_anchor_of_another_boot_is_refused_and_a_suspended_host_is_not() -> None:
    resets, restarts = HOST.ak.resets, HOST.ak.restarts
    for boot in ((resets - 1, restarts), (resets + 1, 0), (resets, restarts + 1)):
        refused("freshness", "another boot", Given(WEB, anchor={"boot": boot[0] << 32 | boot[1]}))
    assert judge(Given(WEB, anchor={"boot": resets << 32 | restarts - 1}))
    # The counts have a number added, and so begin anew anywhere.
    host = Host(SITE, ak=Signer(resets=0, restarts=1))
    given = Given(Vtpm(host), anchor={"boot": 2**32 - 1})
    assert judge(given, policy_for(host))


def test_another_map_or_another_place_in_it_is_refused() -> None:
    refused("freshness", "not in the map", Given(WEB, anchor={"root": bytes(32)}))
    web, db = make(Given(WEB)), make(Given(DB))
    refused("freshness", "not in the map", replace(web, anchored=replace(
        web.anchored, path=db.anchored.path
    )))  # fmt: skip
    path = web.anchored.path
    for hashes in (path.hashes[1:], (*path.hashes, bytes(32)), path.hashes[::-1]):
        changed = replace(web.anchored, path=replace(path, hashes=hashes))
        refused("freshness", "not in the map", replace(web, anchored=changed))


def test_a_host_that_was_not_put_in_order_shows_and_the_policy_may_refuse_it() -> None:
    given = Given(WEB, anchor={"unclean": 2, "recoveries": 1}, leaf={"lineage": 3})
    limits = "\n".join(judge(given).limits)
    assert "2 times not put in order before a boot" in limits
    assert "administrator had older state accepted once" in limits
    assert "the vTPM itself was set back 3 times" in limits
    assert "order before a boot" not in "\n".join(judge(Given(WEB)).limits)
    for key, count in (("max_unclean", 2), ("max_recoveries", 1)):
        assert judge(given, parse_policy(policy_text(HOST) + f"{key} = {count}\n"))
        policy = parse_policy(policy_text(HOST) + f"{key} = {count - 1}\n")
        refused("reference values", f"the policy's {key} is {count - 1}", given, policy)


def test_a_learned_policy_has_no_recovery_after_it() -> None:
    policy = parse_policy(learned(WEB, anchor={"unclean": 1, "recoveries": 1}))
    assert (policy.max_unclean, policy.max_recoveries) == (None, 1)
    assert judge(Given(WEB, anchor={"unclean": 3, "recoveries": 1}), policy)
    refused("reference values", "max_recoveries", Given(WEB, anchor={"recoveries": 2}), policy)


# --- progress ----------------------------------------------------------------------------------


def test_what_went_on_passes_and_what_went_back_is_refused() -> None:
    before = judge(Given(WEB)).progress
    assert judge(Given(WEB), earlier=before)
    later = replace(before, epoch=12)
    refused("progress", "epoch", Given(WEB), earlier=later)
    refused("progress", "run", Given(WEB), earlier=replace(before, run=4))
    refused("progress", "lineage", Given(WEB), earlier=replace(before, lineage=1))
    refused("progress", "instance", Given(WEB), earlier=replace(before, instance=InstanceId(DB.id)))


@pytest.mark.parametrize("side", ["vtpm_clock", "host_clock"])
@pytest.mark.parametrize("field", ["reset_count", "restart_count", "clock"])
def test_a_tpm_that_went_back_is_refused(side: str, field: str) -> None:
    before = judge(Given(WEB)).progress
    clock = getattr(before, side)
    ahead = replace(before, **{side: replace(clock, **{field: getattr(clock, field) + 1})})
    refused("progress", "went back", Given(WEB), earlier=ahead)


def test_a_log_that_lost_or_changed_an_event_within_a_run_is_refused() -> None:
    before = judge(Given(WEB)).progress
    assert before.log_events == len(WEB.records())
    longer = replace(before, log_events=before.log_events + 1)
    refused("progress", "in the same run", Given(WEB), earlier=longer)
    other = replace(before, log_head=bytes(32))
    refused("progress", "events are not those of before", Given(WEB), earlier=other)
    shorter = WEB.records()[: before.log_events - 1]
    grown = replace(before, log_events=len(shorter), log_head=logs.head(shorter))
    assert judge(Given(WEB), earlier=grown)
    assert judge(Given(WEB), earlier=replace(other, run=before.run - 1))  # another run, another log


def test_another_hosts_clock_is_not_compared() -> None:
    before: Progress = judge(Given(WEB)).progress
    clock = replace(before.host_clock, reset_count=1000)
    moved = replace(before, host_ak_name=OTHER_HOST.ak.public.name, host_clock=clock)
    assert judge(Given(WEB), earlier=moved)


@pytest.mark.parametrize("count", ["sequence", "unclean", "recoveries"])
def test_what_a_host_has_counted_does_not_go_back(count: str) -> None:
    before = judge(Given(WEB, anchor={count: 50})).progress
    assert judge(Given(WEB, anchor={count: 50}), earlier=before)
    refused("progress", "from 50 back to 49", Given(WEB, anchor={count: 49}), earlier=before)
    elsewhere = replace(before, host_ak_name=OTHER_HOST.ak.public.name)
    assert judge(Given(WEB, anchor={count: 49}), earlier=elsewhere)


def test_a_recovery_may_take_the_groups_of_commits_back_and_shows() -> None:
    before = judge(Given(WEB, anchor={"sequence": 50})).progress
    again = judge(Given(WEB, anchor={"sequence": 49, "recoveries": 1}), earlier=before)
    assert again.host.recoveries == 1


def test_a_map_that_is_anchored_in_another_index_is_refused_and_a_first_one_is_not() -> None:
    before = judge(Given(WEB)).progress
    other = Given(WEB, index=replace(INDEX, policy=bytes(32)))
    refused("progress", "another index", other, earlier=before)
    assert judge(other, earlier=replace(before, index_name=b""))


def test_every_error_is_of_a_step_that_is_documented() -> None:
    assert len({name for name, _ in STEPS}) == len(STEPS) == 13
