"""tpm2-tools: what is sealed under each policy comes back if it holds, and not if it does not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from .tools import AUTH_FAIL, LOCALITY, POLICY_FAIL, VALUE_P1, Tools

SECRET = b"what is sealed"
INDEX = "0x1500100"
WRITTEN = "ownerread|ownerwrite|authread|authwrite"
Steps = Callable[[Tools], object]


@contextmanager
def session(tpm: Tools, kind: str = "--policy-session", more: str = "") -> Iterator[None]:
    tpm(f"startauthsession -Q {kind} -S session {more}")
    try:
        yield
    finally:
        tpm("flushcontext session")


def policy(tpm: Tools, steps: Steps) -> None:
    """`policy`: the digest to which these steps lead a trial session."""
    with session(tpm, ""):
        steps(tpm)
        tpm("getpolicydigest -S session -o policy")


def seal(tpm: Tools, more: str = "") -> None:
    """Seal under `policy`."""
    tpm.write("secret", SECRET)
    tpm("createprimary -Q -C o -G ecc -c primary.ctx")
    tpm(f"create -Q -C primary.ctx -i secret -L policy -u sealed.pub -r sealed.priv {more}")
    tpm("load -Q -C primary.ctx -u sealed.pub -r sealed.priv -c sealed.ctx")


def opens(tpm: Tools, steps: Steps, word: str = "", more: str = "") -> None:
    with session(tpm, more=more):
        steps(tpm)
        assert tpm.data(f"unseal -c sealed.ctx -p session:session{word}") == SECRET


def stays_shut(tpm: Tools, steps: Steps, code: int = POLICY_FAIL, word: str = "") -> None:
    with session(tpm):
        steps(tpm)
        tpm.refused(code, f"unseal -c sealed.ctx -p session:session{word}")
    tpm("dictionarylockout -c")


def nothing(tpm: Tools) -> None:
    """No step."""


def after_failure(tpm: Tools, line: str, code: int) -> Steps:
    return lambda _: tpm.refused(code, line)


# --- PCRs ----------------------------------------------------------------------------------------


def test_what_is_sealed_to_pcrs_opens_until_one_changes(tpm: Tools) -> None:
    tpm("pcrreset 23")
    tpm("pcrread -Q -o values sha256:13,23")
    tpm("createpolicy -Q --policy-pcr -l sha256:13,23 -f values -L policy")
    seal(tpm)
    assert tpm.data("unseal -c sealed.ctx -p pcr:sha256:13,23") == SECRET
    opens(tpm, lambda t: t("policypcr -Q -S session -l sha256:13,23"))
    tpm(f"pcrextend 23:sha256={'11' * 32}")
    tpm.refused(POLICY_FAIL, "unseal -c sealed.ctx -p pcr:sha256:13,23")
    with session(tpm):
        tpm.refused(VALUE_P1, "policypcr -S session -l sha256:13,23 -f values")
    stays_shut(tpm, nothing)
    tpm("pcrreset 23")
    assert tpm.data("unseal -c sealed.ctx -p pcr:sha256:13,23") == SECRET


def test_one_of_several_policies_is_enough(tpm: Tools) -> None:
    policy(tpm, lambda t: t("policyauthvalue -Q -S session"))
    tpm.write("first", tpm.read("policy"))
    policy(tpm, lambda t: t("policycommandcode -Q -S session TPM2_CC_Unseal"))
    tpm.write("second", tpm.read("policy"))
    branches = "policyor -Q -S session -l sha256:first,second"
    policy(tpm, lambda t: t(f"{branches} -L policy"))
    seal(tpm, "-p word")

    def second(t: Tools) -> None:
        t("policycommandcode -Q -S session TPM2_CC_Unseal")
        t(branches)

    def first(t: Tools) -> None:
        t("policyauthvalue -Q -S session")
        t(branches)

    opens(tpm, second)
    opens(tpm, first, "+word")
    stays_shut(tpm, first, AUTH_FAIL, "+wrong")
    stays_shut(tpm, lambda t: t.refused(VALUE_P1, branches))
    stays_shut(tpm, lambda t: (second(t), t("policyrestart -S session")))


# --- passwords and secrets -----------------------------------------------------------------------


def test_a_policy_asks_for_the_password_by_hmac_or_in_clear(tpm: Tools) -> None:
    policy(tpm, lambda t: t("policypassword -Q -S session -L policy"))
    seal(tpm, "-p word")
    opens(tpm, lambda t: t("policypassword -Q -S session"), "+word")
    opens(tpm, lambda t: t("policyauthvalue -Q -S session"), "+word")  # the same policy
    stays_shut(tpm, lambda t: t("policypassword -Q -S session"), AUTH_FAIL, "+wrong")
    stays_shut(tpm, nothing)


def test_a_secret_of_another_object_is_asked_for_and_its_ticket_stands_for_it(tpm: Tools) -> None:
    tpm("changeauth -c o word")
    policy(tpm, lambda t: t("policysecret -Q -S session -c o word"))
    tpm("changeauth -c o -p word")
    seal(tpm)
    opens(tpm, lambda t: t("policysecret -Q -S session -c o"))
    stays_shut(tpm, lambda t: t.refused(0x9A2, "policysecret -S session -c o wrong"))
    with session(tpm):
        tpm("policysecret -Q -S session -c o -t -60 -x --ticket ticket --timeout timeout -q c0ffee")
    tpm.write("name", bytes.fromhex("40000001"))  # the owner's

    ticket = "policyticket -Q -S session -n name --ticket ticket --timeout timeout -q c0ffee"
    policy(tpm, lambda t: t("policysecret -Q -S session -c o -q c0ffee"))
    seal(tpm)
    opens(tpm, lambda t: t(ticket))
    tpm.write("timeout", bytes(len(tpm.read("timeout"))))
    with session(tpm):
        tpm.refused(0x5E0, ticket)  # parameter 5: TPM_RC_TICKET


# --- signatures ----------------------------------------------------------------------------------


def signer(tpm: Tools) -> None:
    tpm.out("openssl", "genrsa", "-out", "signer.private", "2048")
    tpm.out("openssl", "rsa", "-in", "signer.private", "-pubout", "-out", "signer.pem")
    tpm("loadexternal -Q -C o -G rsa -u signer.pem -c signer.ctx -n signer.name")


def signed(tpm: Tools, data: str, signature: str) -> None:
    sign = ("openssl", "dgst", "-sha256", "-sign", "signer.private", "-out", signature, data)
    tpm.out(*sign)


def test_a_signed_authorization_is_asked_for(tpm: Tools) -> None:
    signer(tpm)
    asked = "policysigned -Q -S session -c signer.ctx -g sha256 -s signature -f rsassa"
    with session(tpm, ""):
        tpm("policysigned -S session -c signer.ctx -g sha256 --raw-data to-sign -x")
    with session(tpm, ""):
        tpm("policysigned -Q -S session -c signer.ctx --raw-data to-sign")
        signed(tpm, "to-sign", "signature")
        tpm(f"{asked} -L policy")
    seal(tpm)
    opens(tpm, lambda t: t(asked))
    tpm.write("other", b"something else")
    signed(tpm, "other", "signature")
    stays_shut(tpm, lambda t: t.refused(0x5DB, asked))  # parameter 5: TPM_RC_SIGNATURE


def test_a_policy_is_authorized_after_sealing(tpm: Tools) -> None:
    signer(tpm)
    policy(tpm, lambda t: t("policycommandcode -Q -S session TPM2_CC_Unseal"))
    tpm.write("approved", tpm.read("policy"))
    authorize = "policyauthorize -Q -S session -n signer.name -i approved"
    policy(tpm, lambda t: t(f"{authorize} -L policy"))
    seal(tpm)
    signed(tpm, "approved", "signature")
    tpm("verifysignature -Q -c signer.ctx -g sha256 -m approved -s signature -f rsassa -t ticket")

    def approved(t: Tools) -> None:
        t("policycommandcode -Q -S session TPM2_CC_Unseal")
        t(f"{authorize} -t ticket")

    opens(tpm, approved)
    stays_shut(tpm, lambda t: t.refused(VALUE_P1, f"{authorize} -t ticket"))


# --- NV ------------------------------------------------------------------------------------------


def test_a_policy_compares_what_is_in_nv(tpm: Tools) -> None:
    tpm(f"nvdefine -Q {INDEX} -C o -s 8 -a '{WRITTEN}'")
    try:
        tpm.write("eight", (8).to_bytes(8, "big"))
        tpm.write("nine", (9).to_bytes(8, "big"))
        tpm(f"nvwrite -Q {INDEX} -C o -i eight")
        compare = f"policynv -Q -S session -C o -i nine {INDEX} ult"
        policy(tpm, lambda t: t(f"{compare} -L policy"))
        seal(tpm)
        opens(tpm, lambda t: t(compare))
        tpm(f"nvwrite -Q {INDEX} -C o -i nine")
        stays_shut(tpm, lambda t: t.refused(0x126, compare))  # TPM_RC_POLICY
    finally:
        tpm(f"nvundefine -Q {INDEX} -C o")


def test_a_policy_in_nv_is_followed(tpm: Tools) -> None:
    tpm(f"nvdefine -Q {INDEX} -C o -s 34 -a '{WRITTEN}'")
    try:
        policy(tpm, lambda t: t("policycommandcode -Q -S session TPM2_CC_Unseal"))
        tpm.write("stored", b"\0\x0b" + tpm.read("policy"))
        tpm(f"nvwrite -Q {INDEX} -C o -i stored")
        follow = f"policyauthorizenv -Q -S session -C o {INDEX}"
        policy(tpm, lambda t: t(f"{follow} -L policy"))
        seal(tpm)

        def followed(t: Tools) -> None:
            t("policycommandcode -Q -S session TPM2_CC_Unseal")
            t(follow)

        opens(tpm, followed)
        tpm.write("stored", b"\0\x0b" + b"\xff" * 32)
        tpm(f"nvwrite -Q {INDEX} -C o -i stored")
        stays_shut(tpm, lambda t: t.refused(0x084, follow))
    finally:
        tpm(f"nvundefine -Q {INDEX} -C o")


def test_an_index_may_be_written_once(tpm: Tools) -> None:
    unwritten = "policynvwritten -Q -S session c"
    policy(tpm, lambda t: t(f"{unwritten} -L policy"))
    tpm(f"nvdefine -Q {INDEX} -C o -s 4 -L policy -a 'ownerread|policywrite'")
    try:
        for code in (0, POLICY_FAIL):
            with session(tpm):
                tpm(unwritten)
                line = f"nvwrite {INDEX} -C {INDEX} -P session:session -i -"
                if code:
                    tpm.refused(code, line, b"more")
                else:
                    tpm(line, b"once")
        assert tpm.data(f"nvread {INDEX} -C o") == b"once"
    finally:
        tpm(f"nvundefine -Q {INDEX} -C o")


# --- what may be done, where, when ---------------------------------------------------------------


def test_a_policy_allows_one_command(tpm: Tools) -> None:
    code = "policycommandcode -Q -S session TPM2_CC_Unseal"
    policy(tpm, lambda t: t(f"{code} -L policy"))
    seal(tpm)
    opens(tpm, lambda t: t(code))
    with session(tpm):
        tpm("policycommandcode -Q -S session TPM2_CC_ObjectChangeAuth")
        tpm.refused(POLICY_FAIL, "unseal -c sealed.ctx -p session:session")


def test_a_policy_allows_one_locality_and_a_container_is_at_none_but_zero(tpm: Tools) -> None:
    policy(tpm, lambda t: t("policylocality -Q -S session zero -L policy"))
    seal(tpm)
    opens(tpm, lambda t: t("policylocality -Q -S session zero"))
    policy(tpm, lambda t: t("policylocality -Q -S session three -L policy"))
    seal(tpm)
    stays_shut(tpm, lambda t: t("policylocality -Q -S session three"), LOCALITY)


def test_a_policy_asks_for_the_clock(tpm: Tools) -> None:
    soon = "policycountertimer -Q -S session --ult clock=18446744073709551615"
    late = "policycountertimer -Q -S session --ugt clock=18446744073709551614"
    policy(tpm, lambda t: t(f"{soon} -L policy"))
    seal(tpm)
    opens(tpm, lambda t: t(soon))
    stays_shut(tpm, lambda t: t.refused(0x126, late))


def test_a_policy_allows_one_command_with_its_parameters(tpm: Tools) -> None:
    tpm("createprimary -Q -C o -G ecc -c primary.ctx")
    tpm(f"nvdefine -Q {INDEX} -C o -s 4 --cphash cp -a 'ownerread|policywrite'")
    policy(tpm, lambda t: t("policycphash -Q -S session --cphash-input cp -L policy"))
    tpm("setprimarypolicy -C o -L policy -g sha256")
    define = f"nvdefine -Q {INDEX} -C o -P session:session"
    try:
        with session(tpm):
            tpm("policycphash -Q -S session --cphash-input cp")
            tpm.refused(POLICY_FAIL, f"{define} -s 5 -a 'ownerread|policywrite'")
        with session(tpm):
            tpm("policycphash -Q -S session --cphash-input cp")
            tpm(f"{define} -s 4 -a 'ownerread|policywrite'")
        tpm(f"nvundefine -Q {INDEX} -C o")
    finally:
        tpm("setprimarypolicy -C o")


def test_a_policy_allows_one_object(tpm: Tools) -> None:
    """PolicyNameHash: the primary's parent handle is the owner's, 0x40000001, and its own name."""
    tpm.write("owner", bytes.fromhex("40000001"))
    digest = tpm.out("openssl", "dgst", "-sha256", "-binary", "owner")
    tpm.write("names", digest)
    policy(tpm, lambda t: t("policynamehash -Q -S session -n names -L policy"))
    tpm("setprimarypolicy -C o -L policy -g sha256")
    try:
        with session(tpm):
            tpm("policynamehash -Q -S session -n names")
            tpm("createprimary -Q -C o -P session:session -G ecc -c primary.ctx")
        tpm.write("names", bytes(32))
        with session(tpm):
            tpm("policynamehash -Q -S session -n names")
            tpm.refused(POLICY_FAIL, "createprimary -C o -P session:session -G ecc -c primary.ctx")
    finally:
        tpm("setprimarypolicy -C o")


def test_a_policy_allows_one_template(tpm: Tools) -> None:
    tpm("createprimary -Q -C o -G ecc --template-data template -c primary.ctx")
    digest = tpm.out("openssl", "dgst", "-sha256", "-binary", "template")
    tpm.write("template.hash", digest)
    step = "policytemplate -Q -S session --template-hash template.hash"
    policy(tpm, lambda t: t(f"{step} -L policy"))
    tpm("setprimarypolicy -C o -L policy -g sha256")
    try:
        with session(tpm):
            tpm(step)
            tpm("createprimary -Q -C o -P session:session -G ecc -c primary.ctx")
        with session(tpm):
            tpm(step)
            tpm.refused(POLICY_FAIL, "createprimary -C o -P session:session -G rsa -c other.ctx")
    finally:
        tpm("setprimarypolicy -C o")


def test_a_policy_allows_one_new_parent(tpm: Tools) -> None:
    tpm("createprimary -Q -C o -G ecc -c primary.ctx")
    for name, kind in (("good", "rsa"), ("bad", "ecc384")):
        tpm(f"createprimary -Q -C o -G {kind} -c {name}.ctx")
        tpm(f"readpublic -Q -c {name}.ctx -n {name}.name -o {name}.pub")
    policy(tpm, lambda t: t("policyduplicationselect -Q -S session -N good.name -L policy"))
    tpm(
        "create -Q -C primary.ctx -G ecc -u key.pub -r key.priv -L policy"
        " -a 'sensitivedataorigin|userwithauth|sign'"
    )
    tpm("load -Q -C primary.ctx -u key.pub -r key.priv -c key.ctx -n key.name")
    step = "policyduplicationselect -Q -S session -n key.name -N good.name"
    to = "duplicate -Q -c key.ctx -G null -p session:session -r dup -s seed"
    with session(tpm):
        tpm(step)
        tpm(f"{to} -C good.ctx")
        tpm("import -Q -C good.ctx -u key.pub -i dup -r moved.priv -s seed -L policy")
    with session(tpm):
        tpm(step)
        tpm.refused(POLICY_FAIL, f"{to} -C bad.ctx")


def test_sessions_encrypt_and_are_salted_and_bound(tpm: Tools) -> None:
    policy(tpm, lambda t: t("policyauthvalue -Q -S session"))
    seal(tpm, "-p word")
    tpm("createprimary -Q -C o -G rsa -c salt.ctx")
    with session(tpm, "--hmac-session", "-c salt.ctx"):
        tpm("sessionconfig session --enable-decrypt --enable-encrypt")
        assert "continuesession|decrypt|encrypt" in tpm("sessionconfig session")
        assert len(tpm("getrandom -S session --hex 8")) == 16
    opens(tpm, lambda t: t("policyauthvalue -Q -S session"), "+word", "-c salt.ctx")


def test_a_pcr_that_changes_within_a_session_ends_its_policy(plain: Tools) -> None:
    """A container may not write such a PCR: 16 and 23 do not count (TPM_PT_PCR_NO_INCREMENT)."""
    plain("createpolicy -Q --policy-pcr -l sha256:10 -L policy")
    seal(plain)
    with session(plain):
        plain("policypcr -Q -S session -l sha256:10")
        plain(f"pcrextend 10:sha256={'11' * 32}")
        plain.refused(0x128, "unseal -c sealed.ctx -p session:session")  # TPM_RC_PCR_CHANGED
