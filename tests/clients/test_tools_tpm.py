"""tpm2-tools: PCRs, quotes, credentials, the TPM itself; and what a container is refused."""

from __future__ import annotations

import hashlib
import re

from tests.system.conftest import HOST_LOG
from tests.system.serve import Serve

from .tools import AUTH_FAIL, BAD_AUTH, LOCALITY, NO_COMMAND, Tools, Way

AK = "fixedtpm|fixedparent|sensitivedataorigin|userwithauth|restricted|sign"
DISABLED = 0x120  # TPM_RC_DISABLED


def attestation_key(tpm: Tools) -> None:
    tpm("createprimary -Q -C o -G ecc -c primary.ctx")
    tpm(
        "create -Q -C primary.ctx -G ecc256:ecdsa-sha256:null -u ak.pub -r ak.priv"
        f" -a '{AK}' --creation-data creation --creation-hash hash -t ticket"
    )
    tpm("load -Q -C primary.ctx -u ak.pub -r ak.priv -c ak.ctx -n ak.name")
    tpm("readpublic -Q -c ak.ctx -f pem -o ak.pem")


def verifies(tpm: Tools, message: str = "message", key: str = "ak.pem") -> None:
    verify = ("openssl", "dgst", "-sha256", "-verify", key, "-signature", "signature")
    assert b"Verified OK" in tpm.out(*verify, message)


# --- PCRs ----------------------------------------------------------------------------------------


def pcr(tpm: Tools, number: int, bank: str = "sha256") -> bytes:
    tpm(f"pcrread -Q -o value {bank}:{number}")
    return tpm.read("value")


def test_the_container_s_own_pcrs_are_extended_and_reset(tpm: Tools) -> None:
    tpm("pcrreset 16 23")
    for number in (16, 23):
        assert pcr(tpm, number) == bytes(32)
        tpm(f"pcrextend {number}:sha256={'11' * 32}")
        value = hashlib.sha256(bytes(32) + b"\x11" * 32).digest()
        assert pcr(tpm, number) == value
        tpm.write("event", b"what happened")
        said = tpm(f"pcrevent {number} event")
        digest = hashlib.sha256(b"what happened").digest()
        assert digest.hex() in said
        assert pcr(tpm, number) == hashlib.sha256(value + digest).digest()
        tpm(f"pcrreset {number}")


def test_the_host_s_pcrs_are_not_the_container_s_to_write(tpm: Tools) -> None:
    tpm("pcrread -Q -o before sha256:all")
    tpm.write("event", b"what did not happen")
    for number in (*range(16), *range(17, 23)):
        tpm.refused(LOCALITY, f"pcrextend {number}:sha256={'11' * 32}")
        tpm.refused(LOCALITY, f"pcrevent {number} event")
        tpm.refused(LOCALITY, f"pcrreset {number}")
    tpm("pcrread -Q -o after sha256:all")
    assert tpm.read("before") == tpm.read("after")
    assert all(pcr(tpm, number) != bytes(32) for number in (0, 2, 4, 7, 10, 11, 12, 13, 15))


def test_a_plain_vtpm_s_pcrs_are_extended_as_any_tpm_s(plain: Tools) -> None:
    for number in range(16):
        value = pcr(plain, number)
        plain(f"pcrextend {number}:sha256={'11' * 32}")
        assert pcr(plain, number) == hashlib.sha256(value + b"\x11" * 32).digest()
    plain.refused(LOCALITY, f"pcrextend 17:sha256={'11' * 32}")


def test_the_host_s_log_explains_the_container_s_pcrs(tpm: Tools) -> None:
    """tpm2_eventlog replays it by itself."""
    said = tpm(f"eventlog {HOST_LOG}")
    bank = said.partition("pcrs:\n")[2].partition("  sha256:\n")[2]
    values = dict(re.findall(r"^    (\d+)\s*: 0x([0-9a-f]{64})$", bank, re.MULTILINE))
    assert len(values) > 7
    for number, value in values.items():
        assert pcr(tpm, int(number)).hex() == value
    tpm.write("cut", HOST_LOG.read_bytes()[:-5])
    tpm.invalid("eventlog cut")


# --- attestation ---------------------------------------------------------------------------------


def test_a_quote_is_checked_by_tpm2_checkquote(tpm: Tools) -> None:
    attestation_key(tpm)
    tpm("quote -Q -c ak.ctx -l sha256:0,13,23 -q c0ffee -m message -s signature -o pcrs -g sha256")
    check = "checkquote -Q -u ak.pem -m message -s signature -f pcrs -g sha256"
    tpm(f"{check} -q c0ffee")
    tpm.invalid(f"{check} -q c0ffed")
    measured = pcr(tpm, 13)
    assert measured in tpm.read("pcrs")
    tpm.write("pcrs", tpm.read("pcrs").replace(measured, measured[::-1]))
    tpm.invalid(f"{check} -q c0ffee")
    assert "magic: ff544347" in tpm("print -t TPMS_ATTEST message")


def test_keys_and_their_creation_are_certified(tpm: Tools) -> None:
    attestation_key(tpm)
    tpm("create -Q -C primary.ctx -G ecc -u key.pub -r key.priv -p word")
    tpm("load -Q -C primary.ctx -u key.pub -r key.priv -c key.ctx -n key.name")
    certify = "certify -Q -c key.ctx -C ak.ctx -g sha256 -f plain -o message -s signature"
    tpm(f"{certify} -P word")
    assert tpm.read("key.name") in tpm.read("message")
    verifies(tpm)
    tpm.refused(AUTH_FAIL, f"{certify} -P wrong")
    creation = (
        "certifycreation -C ak.ctx -c ak.ctx -d hash -t ticket -g sha256 -f plain"
        " -o signature --attestation message -q c0ffee"
    )
    tpm(creation)
    assert tpm.read("hash") in tpm.read("message")
    verifies(tpm)
    tpm.write("hash", b"\0\x20" + bytes(32))
    tpm.refused(0x4E0, creation)  # parameter 4: TPM_RC_TICKET
    tpm("dictionarylockout -c")


def test_the_time_is_attested(tpm: Tools) -> None:
    attestation_key(tpm)
    tpm("gettime -Q -c ak.ctx -g sha256 -f plain -q c0ffee -o signature --attestation message")
    verifies(tpm)
    assert b"\x00\x03\xc0\xff\xee" in tpm.read("message")


def test_commands_and_sessions_are_audited(tpm: Tools) -> None:
    attestation_key(tpm)
    tpm("setcommandauditstatus -C o -g sha256")
    tpm("setcommandauditstatus -C o TPM2_CC_GetRandom")
    get = "getcommandauditdigest -c ak.ctx -g sha256 -f plain -q c0ffee -s signature -m message"
    digests = []
    for _ in range(2):
        tpm("getrandom --hex 8")
        tpm(get)
        verifies(tpm)
        digests.append(tpm.read("message")[-34 * 2 - 2 :])
    assert digests[0] != digests[1]
    tpm("setcommandauditstatus -C o -c TPM2_CC_GetRandom")
    tpm("startauthsession -Q --audit-session -S session")
    tpm("getrandom -S session --hex 8")
    tpm(
        "getsessionauditdigest -c ak.ctx -g sha256 -f plain -q c0ffee -s signature -m message"
        " -S session"
    )
    verifies(tpm)
    tpm("flushcontext session")


def test_a_credential_is_activated_by_ek_and_ak_together(tpm: Tools) -> None:
    for kind in ("rsa", "ecc"):
        tpm(f"createek -Q -c ek.ctx -G {kind} -u ek.pub")
        tpm(f"createak -Q -C ek.ctx -c ak.ctx -G {kind} -g sha256 -u ak.pub -n ak.name")
        tpm.write("secret", b"for this AK alone")
        name = tpm.read("ak.name").hex()
        make = "makecredential -Q -s secret -o credential"
        if kind == "rsa":  # without a TPM, as the one who gives the credential does it
            tpm("readpublic -Q -c ek.ctx -f pem -o ek.pem")
            tpm(f"{make} -T none -G rsa -u ek.pem -n {name}")
        else:
            tpm(f"{make} -e ek.pub -n {name}")
        tpm("startauthsession --policy-session -S session")
        tpm("policysecret -Q -S session -c e")
        activate = "activatecredential -Q -c ak.ctx -C ek.ctx -i credential -P session:session"
        tpm(f"{activate} -o opened")
        tpm("flushcontext session")
        assert tpm.read("opened") == b"for this AK alone"
        other = name[:-2] + ("00" if name[-2:] != "00" else "01")
        tpm(f"{make} -e ek.pub -n {other}")
        tpm("startauthsession --policy-session -S session")
        tpm("policysecret -Q -S session -c e")
        tpm.refused(0x1DF, f"{activate} -o other")  # parameter 1: TPM_RC_INTEGRITY
        tpm("flushcontext session")


def test_the_ek_is_the_one_of_the_certificate(tpm: Tools) -> None:
    tpm("getekcertificate -o rsa.der -o ecc.der")
    for kind in ("rsa", "ecc"):
        tpm(f"createek -Q -c ek.ctx -G {kind} -f pem -u ek.pem")
        show = ("openssl", "x509", "-inform", "DER", "-in", f"{kind}.der", "-noout")
        assert tpm.out(*show, "-pubkey") == tpm.read("ek.pem")
        assert "Holdfast issuing CA" in tpm.out(*show, "-issuer").decode()


# --- the TPM itself ------------------------------------------------------------------------------


def test_random_numbers_come_and_are_stirred(tpm: Tools) -> None:
    numbers = {tpm("getrandom --hex 32") for _ in range(5)}
    assert len(numbers) == 5
    tpm("stirrandom", b"stir")
    assert len(tpm.data("getrandom 32")) == 32
    assert len(tpm.other("tpm2", "getrandom", "8")) == 8  # the program behind all names


def test_it_says_what_it_is_and_can(tpm: Tools) -> None:
    assert 'value: "IBM"' in tpm("getcap properties-fixed")
    assert "TPM2_PT_PERMANENT" in tpm("getcap properties-variable")
    assert "sha256" in tpm("getcap algorithms")
    assert "TPM2_CC_Unseal" in tpm("getcap commands")
    assert "sha256: [ 0, 1, 2" in tpm("getcap pcrs")
    assert "TPM2_ECC_NIST_P256" in tpm("getcap ecc-curves")
    tpm("testparms rsa2048")
    tpm("testparms ecc384")
    tpm.fails("tpm2_testparms", "rsa512")


def test_it_tests_itself(tpm: Tools) -> None:
    tpm("selftest -f")
    tpm("incrementalselftest rsa ecc")
    assert "success" in tpm("gettestresult")


def test_any_command_is_sent_and_errors_are_explained(tpm: Tools) -> None:
    tpm.write("command", bytes.fromhex("80010000000c0000017b0008"))
    tpm("send -o response command")
    assert len(tpm.read("response")) == 20
    assert "locality" in tpm("rc_decode 0x907")


def test_startup_and_shutdown_are_the_host_s_and_look_done(tpm: Tools) -> None:
    before = re.findall(r"(reset_count|restart_count): (\d+)", tpm("readclock"))
    value = pcr(tpm, 13)
    tpm("shutdown")
    tpm("shutdown -c")
    tpm("startup")
    tpm("startup -c")
    assert re.findall(r"(reset_count|restart_count): (\d+)", tpm("readclock")) == before
    assert len(before) == 2
    assert pcr(tpm, 13) == value


def test_the_clock_is_set_forward_and_its_rate_adjusted(tpm: Tools) -> None:
    def clock() -> int:
        found = re.search(r"clock: (\d+)", tpm("readclock"))
        assert found
        return int(found[1])

    to = clock() + 1_000_000
    tpm(f"setclock {to}")
    assert clock() >= to
    tpm.refused(0x1C4, f"setclock {to - 500_000}")
    tpm("clockrateadjust f")
    tpm("clockrateadjust s")


def test_wrong_passwords_lock_it_and_the_owner_unlocks_it(tpm: Tools) -> None:
    tpm("dictionarylockout -c -s -n 2 -t 1000 -l 1000")
    tpm("createprimary -Q -C o -G ecc -c primary.ctx")
    tpm("create -Q -C primary.ctx -G ecc -u key.pub -r key.priv -p word")
    tpm("load -Q -C primary.ctx -u key.pub -r key.priv -c key.ctx")
    tpm.write("message", b"message")
    sign = "sign -Q -c key.ctx -g sha256 -o signature message"
    for _ in range(2):
        tpm.refused(AUTH_FAIL, f"{sign} -p wrong")
    tpm.refused(0x921, f"{sign} -p word")  # TPM_RC_LOCKOUT
    tpm("dictionarylockout -c")
    tpm(f"{sign} -p word")
    tpm("dictionarylockout -s -n 3 -t 1000 -l 1000")


def test_clear_forgets_what_the_owner_had_and_not_what_the_host_measured(
    spare: Tools,
) -> None:
    tpm = spare
    tpm("createprimary -Q -C o -G ecc -c primary.ctx")
    tpm("evictcontrol -Q -C o -c primary.ctx 0x81000200")
    tpm("changeauth -c o word")
    measured = pcr(tpm, 13)
    tpm.refused(BAD_AUTH, "clear -c p")
    tpm("clear -c l")
    tpm.refused(0x18B, "readpublic -c 0x81000200")
    tpm("readpublic -Q -c 0x81800002")  # the evidence AK
    tpm("createprimary -Q -C o -G ecc -c again.ctx")  # no password
    assert pcr(tpm, 13) == measured
    tpm.refused(BAD_AUTH, "clearcontrol -C p c")
    tpm("clearcontrol -C l s")
    tpm.refused(DISABLED, "clear -c l")
    tpm("hierarchycontrol -C e ehEnable clear")
    tpm.refused(0x185, "createprimary -C e -G ecc -c e.ctx")  # TPM_RC_HIERARCHY
    tpm.refused(BAD_AUTH, "hierarchycontrol -C p ehEnable set")


def test_the_platform_is_not_the_container_s(tpm: Tools) -> None:
    """As of any TPM whose platform hierarchy has a password: the host's, which nobody keeps."""
    before = tpm("getcap pcrs")
    for line in (
        "changeeps", "changepps", "pcrallocate sha1:none", "createprimary -C p -G ecc -c p.ctx",
        "clear -c p", "clearcontrol -C p s", "hierarchycontrol -C p shEnable clear",
        "changeauth -c p word", "setprimarypolicy -C p", "evictcontrol -C p -c 0x81800002",
        "nvdefine 0x1500300 -C p -s 4", "setclock -c p 99999999999", "clockrateadjust -c p f",
        "setcommandauditstatus -C p TPM2_CC_GetRandom", "nvundefine 0x1C00002 -C p",
    ):  # fmt: skip
        tpm.refused(BAD_AUTH, line)
    assert tpm("getcap pcrs") == before


def test_certifyx509_does_not_exist_for_a_container(tpm: Tools) -> None:
    tpm("certifyX509certutil -o partial -d 30 -s 'CN=x;O=y' -i 'CN=i;O=j'")
    tree = tpm.out("openssl", "asn1parse", "-inform", "DER", "-in", "partial").decode()
    assert "commonName" in tree
    handles = "80000000" * 2
    tpm.write("command", bytes.fromhex("80020000001200000197" + handles))
    tpm("send -o response command")
    assert tpm.read("response")[6:] == NO_COMMAND.to_bytes(4, "big")


# --- what only an unlinked one allows ------------------------------------------------------------


def test_the_seeds_of_a_plain_vtpm_are_changed(plain: Tools) -> None:
    names = []
    for change in ("", "changeeps", "changepps"):
        if change:
            plain(change)
        found = []
        for hierarchy in "oep":
            plain(f"createprimary -Q -C {hierarchy} -G ecc -c {hierarchy}.ctx")
            plain(f"readpublic -Q -c {hierarchy}.ctx -n name")
            found.append(plain.read("name"))
            plain("flushcontext -t")
        names.append(found)
    assert [old == new for old, new in zip(names[0], names[1], strict=True)] == [True, False, True]
    assert [old == new for old, new in zip(names[1], names[2], strict=True)] == [True, True, False]


def test_a_plain_vtpm_s_platform_clears_and_controls_it(plain: Tools) -> None:
    plain("clearcontrol -C l s")
    plain.refused(DISABLED, "clear -c l")
    plain("clearcontrol -C p c")
    plain("clear -c p")
    plain("hierarchycontrol -C e ehEnable clear")
    plain.refused(0x185, "createprimary -C e -G ecc -c e.ctx")
    plain("hierarchycontrol -C p ehEnable set")
    plain("createprimary -Q -C e -G ecc -c e.ctx")


def test_a_plain_vtpm_s_banks_are_allocated_from_the_next_start_on(
    plain: Tools, host: Serve, way: Way, unlinked: dict[str, str]
) -> None:
    def sizes() -> list[str]:
        return re.findall(r"(sha\d+): \[( 0)?", plain("getcap pcrs"))

    before = sizes()
    plain("pcrallocate -Q sha1:all+sha256:all+sha384:none")
    name = unlinked[way]
    host.call("POST", f"/v1/vtpms/{name}/stop", {})
    host.power_on(name)
    after = sizes()
    assert ("sha1", " 0") in after
    assert ("sha384", "") in after
    assert after != before
    plain("pcrread -Q sha1:0")
