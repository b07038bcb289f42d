"""What tpm2-tss' ESAPI does in each recorded stream: what tpm2-tools have no command for.

ESAPI computes its HMACs and encrypts parameters itself. The TPM has three slots for objects and
three for sessions, and nobody manages them here: a scenario flushes what it made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from tpm2_pytss import (
    ESAPI,
    ESYS_TR,
    TPM2_ALG,
    TPM2_CC,
    TPM2_ECC_CURVE,
    TPM2_SE,
    TPM2B_DATA,
    TPM2B_DIGEST,
    TPM2B_ECC_PARAMETER,
    TPM2B_ECC_POINT,
    TPM2B_ENCRYPTED_SECRET,
    TPM2B_NAME,
    TPM2B_NV_PUBLIC,
    TPM2B_PRIVATE,
    TPM2B_PUBLIC,
    TPM2B_SENSITIVE_CREATE,
    TPM2B_SENSITIVE_DATA,
    TPM2B_TEMPLATE,
    TPM2B_TIMEOUT,
    TPMA_NV,
    TPMA_OBJECT,
    TPMA_SESSION,
    TPML_ALG,
    TPML_CC,
    TPML_DIGEST_VALUES,
    TPMS_NV_PUBLIC,
    TPMS_SENSITIVE_CREATE,
    TPMT_HA,
    TPMT_PUBLIC,
    TPMT_SIG_SCHEME,
    TPMT_SIGNATURE,
    TPMT_SYM_DEF,
    TPMT_SYM_DEF_OBJECT,
    TPMT_TK_AUTH,
    TPMU_HA,
    TSS2_Exception,
)

NONE = ESYS_TR.NONE
OWN_SCHEME = TPMT_SIG_SCHEME(scheme=TPM2_ALG.NULL)
AES = TPMT_SYM_DEF(
    algorithm=TPM2_ALG.AES, keyBits={"aes": 128}, mode={"aes": TPM2_ALG.CFB}
)  # fmt: skip


@contextmanager
def esapi(tcti: str) -> Iterator[ESAPI]:
    with ESAPI(tcti) as tpm:
        yield tpm


def refused(action: Callable[..., Any], *arguments: Any, **more: Any) -> int:
    try:
        action(*arguments, **more)
    except TSS2_Exception as error:
        return int(error.rc)
    raise AssertionError(f"not refused: {action}")


def tried(action: Callable[..., Any], *arguments: Any, **more: Any) -> None:
    """Whether this TPM has the command or not: what it answers is what is wanted."""
    with suppress(TSS2_Exception):
        action(*arguments, **more)


def secret(auth: bytes = b"", data: bytes = b"") -> TPM2B_SENSITIVE_CREATE:
    return TPM2B_SENSITIVE_CREATE(TPMS_SENSITIVE_CREATE(userAuth=auth, data=data))


def storage(tpm: ESAPI, hierarchy: ESYS_TR = ESYS_TR.OWNER) -> Any:
    return tpm.create_primary(secret(), "ecc", hierarchy)[0]


SIGNING = "ecc:ecdsa-sha256"
OBJECT = TPMA_OBJECT.USERWITHAUTH | TPMA_OBJECT.SENSITIVEDATAORIGIN
FIXED = TPMA_OBJECT.FIXEDTPM | TPMA_OBJECT.FIXEDPARENT


def template(kind: str, attributes: int, **more: Any) -> TPM2B_PUBLIC:
    return TPM2B_PUBLIC(TPMT_PUBLIC.parse(kind, objectAttributes=TPMA_OBJECT(attributes), **more))


def made(
    tpm: ESAPI, parent: Any, public: TPM2B_PUBLIC, auth: bytes = b"", data: bytes = b""
) -> Any:
    private, public, *_ = tpm.create(parent, secret(auth, data), public)
    handle = tpm.load(parent, private, public)
    tpm.tr_set_auth(handle, auth)
    return handle


def session(tpm: ESAPI, kind: TPM2_SE, **more: Any) -> Any:
    options: dict[str, Any] = {"tpm_key": NONE, "bind": NONE, "symmetric": AES}
    options |= {"auth_hash": TPM2_ALG.SHA256, **more}
    return tpm.start_auth_session(session_type=kind, **options)


def hmac_sessions(tcti: str) -> None:
    """Salted, bound, neither and both; encrypting both ways; three hash algorithms; XOR."""
    with esapi(tcti) as tpm:
        tpm.dictionary_attack_parameters(32, 1000, 1000)
        parent = storage(tpm)
        sealed = made(tpm, parent, template("keyedhash", FIXED | TPMA_OBJECT.USERWITHAUTH),
                      b"secret", b"sealed data")  # fmt: skip
        ways: tuple[dict[str, Any], ...] = (
            {},
            {"tpm_key": parent},
            {"bind": sealed},
            {"tpm_key": parent, "bind": sealed},
            {"tpm_key": parent, "auth_hash": TPM2_ALG.SHA1},
            {"bind": parent, "auth_hash": TPM2_ALG.SHA384},
            {"symmetric": TPMT_SYM_DEF(algorithm=TPM2_ALG.XOR, keyBits={"exclusiveOr": 11},
                                       mode={"sym": TPM2_ALG.NULL})},
        )  # fmt: skip
        for way in ways:
            hmac = session(tpm, TPM2_SE.HMAC, **way)
            both = TPMA_SESSION.DECRYPT | TPMA_SESSION.ENCRYPT | TPMA_SESSION.CONTINUESESSION
            for attributes in (TPMA_SESSION.CONTINUESESSION, both):
                tpm.trsess_set_attributes(hmac, attributes)
                tpm.create(parent, secret(b"other", b"x"), template(
                    "keyedhash", FIXED | TPMA_OBJECT.USERWITHAUTH), session1=hmac)  # fmt: skip
                tpm.trsess_set_attributes(hmac, attributes & ~TPMA_SESSION.DECRYPT)
                assert bytes(tpm.unseal(sealed, session1=hmac)) == b"sealed data"
            tpm.tr_set_auth(sealed, b"wrong")
            refused(tpm.unseal, sealed, session1=hmac)
            tpm.tr_set_auth(sealed, b"secret")
            tpm.trsess_set_attributes(hmac, both)
            tpm.flush_context(hmac)
        ends = session(tpm, TPM2_SE.HMAC)
        tpm.trsess_set_attributes(ends, 0, TPMA_SESSION.CONTINUESESSION)
        tpm.unseal(sealed, session1=ends)
        # two authorizations and a third session that encrypts
        one, two, three = (session(tpm, TPM2_SE.HMAC) for _ in range(3))
        tpm.trsess_set_attributes(three, TPMA_SESSION.ENCRYPT | TPMA_SESSION.CONTINUESESSION)
        key = made(tpm, parent, template(SIGNING, FIXED | OBJECT | TPMA_OBJECT.SIGN_ENCRYPT))
        tpm.certify(
            sealed, key, b"qualifying", OWN_SCHEME, session1=one, session2=two, session3=three
        )
        tpm.trsess_set_attributes(two, TPMA_SESSION.ENCRYPT | TPMA_SESSION.CONTINUESESSION)
        refused(
            tpm.certify, sealed, key, b"q", OWN_SCHEME, session1=one, session2=two, session3=three
        )
        refused(session, tpm, TPM2_SE.HMAC)
        refused(session, tpm, TPM2_SE.HMAC, auth_hash=TPM2_ALG.SM3_256)
        for each in (one, two, three, key, sealed, parent):
            tpm.flush_context(each)


def audits(tcti: str) -> None:
    """Audit sessions, exclusive or not; a command audit; digests signed by nobody."""
    with esapi(tcti) as tpm:
        audit = session(tpm, TPM2_SE.HMAC)
        tpm.trsess_set_attributes(audit, TPMA_SESSION.AUDIT | TPMA_SESSION.CONTINUESESSION)
        tpm.get_capability(6, 0x100, 4, session1=audit)
        tpm.pcr_read("sha256:0", session1=audit)
        tpm.get_session_audit_digest(ESYS_TR.RH_NULL, audit, b"q")
        tpm.trsess_set_attributes(
            audit,
            TPMA_SESSION.AUDIT | TPMA_SESSION.AUDITEXCLUSIVE | TPMA_SESSION.CONTINUESESSION,
        )
        tpm.hash(b"data", TPM2_ALG.SHA256, ESYS_TR.OWNER)
        refused(tpm.hash, b"data", TPM2_ALG.SHA256, ESYS_TR.OWNER, session1=audit)
        tpm.trsess_set_attributes(
            audit, TPMA_SESSION.AUDIT | TPMA_SESSION.AUDITRESET | TPMA_SESSION.CONTINUESESSION
        )
        tpm.hash(b"data", TPM2_ALG.SHA256, ESYS_TR.OWNER, session1=audit)
        tpm.get_session_audit_digest(ESYS_TR.RH_NULL, audit, b"q")
        tpm.flush_context(audit)
        lists = TPML_CC([TPM2_CC.GetRandom, TPM2_CC.Hash])
        tpm.set_command_code_audit_status(TPM2_ALG.SHA384, TPML_CC(), TPML_CC())
        tpm.set_command_code_audit_status(TPM2_ALG.NULL, lists, TPML_CC())
        tpm.get_random(8)
        tpm.get_command_audit_digest(ESYS_TR.RH_NULL, b"q")
        tpm.get_random(8)
        tpm.set_command_code_audit_status(TPM2_ALG.NULL, TPML_CC(), lists)


def policies(tcti: str) -> None:
    """Tickets, cpHash, a policy in NV, physical presence, and what is refused of each."""
    with esapi(tcti) as tpm:
        policy = session(tpm, TPM2_SE.POLICY)
        nonce = tpm.trsess_get_nonce_tpm(policy)
        timeout, ticket = tpm.policy_secret(
            ESYS_TR.OWNER, policy, nonce, b"", b"ref", expiration=-2147483647
        )
        tpm.policy_restart(policy)
        owner = tpm.tr_get_name(ESYS_TR.OWNER)
        tpm.policy_ticket(policy, timeout, owner, ticket, b"", b"ref")
        refused(tpm.policy_ticket, policy, timeout, owner, ticket, b"", b"other")
        refused(tpm.policy_ticket, policy, TPM2B_TIMEOUT(bytes(7)), owner, ticket, b"", b"ref")
        refused(tpm.policy_ticket, policy, timeout, owner, TPMT_TK_AUTH(tag=0x8021), b"", b"")
        refused(tpm.policy_secret, ESYS_TR.OWNER, policy, b"\1" * 32, b"", b"", expiration=0)
        tpm.policy_restart(policy)
        tpm.policy_cp_hash(policy, b"\1" * 32)
        refused(tpm.policy_cp_hash, policy, b"\2" * 32)
        refused(tpm.policy_cp_hash, policy, b"\1" * 31)
        tpm.policy_restart(policy)
        tpm.policy_name_hash(policy, b"\1" * 32)
        refused(tpm.policy_cp_hash, policy, b"\2" * 32)
        tpm.policy_restart(policy)
        tpm.policy_template(policy, b"\1" * 32)
        refused(tpm.policy_template, policy, b"\2" * 32)
        tpm.policy_restart(policy)
        tpm.policy_physical_presence(policy)
        tpm.policy_get_digest(policy)
        tpm.policy_restart(policy)
        tpm.policy_auth_value(policy)
        tpm.policy_password(policy)
        tpm.policy_command_code(policy, TPM2_CC.Sign)
        refused(tpm.policy_command_code, policy, TPM2_CC.Quote)
        tpm.policy_get_digest(policy)
        tpm.policy_restart(policy)
        tpm.policy_locality(policy, 1)
        refused(tpm.policy_locality, policy, 2)
        tpm.policy_get_digest(policy)
        tpm.policy_restart(policy)
        tpm.policy_nv_written(policy, True)
        refused(tpm.policy_nv_written, policy, False)
        tpm.policy_restart(policy)
        tpm.policy_duplication_select(policy, b"", owner, False)
        refused(tpm.policy_duplication_select, policy, b"", owner, False)
        attributes = TPMA_NV.OWNERWRITE | TPMA_NV.OWNERREAD | TPMA_NV.AUTHREAD | TPMA_NV.AUTHWRITE
        index = nv(tpm, 0x1500020, attributes, 34)
        tpm.policy_restart(policy)
        refused(tpm.policy_authorize_nv, index, policy)
        digest = bytes(tpm.policy_get_digest(policy))
        tpm.nv_write(index, b"\0\x0b" + digest)
        tpm.policy_authorize_nv(index, policy)
        tpm.policy_get_digest(policy)
        refused(tpm.policy_authorize_nv, index, policy)
        tpm.nv_undefine_space(index)
        tpm.flush_context(policy)
        # which PCRs, and what an entity's own policy lets through
        trial = session(tpm, TPM2_SE.TRIAL)
        tpm.policy_pcr(trial, b"", "sha256:0,7")
        tpm.policy_pcr(trial, b"\1" * 32, "sha256:0,7")
        wanted = tpm.policy_get_digest(trial)
        tpm.flush_context(trial)
        policy = session(tpm, TPM2_SE.POLICY, symmetric=TPMT_SYM_DEF(algorithm=TPM2_ALG.NULL))
        refused(tpm.policy_pcr, policy, b"\1" * 32, "sha256:0,7")
        refused(tpm.policy_or, policy, [wanted])
        tpm.set_primary_policy(ESYS_TR.OWNER, bytes(wanted), TPM2_ALG.SHA256)
        refused(tpm.hierarchy_change_auth, ESYS_TR.OWNER, b"new", session1=policy)
        tpm.flush_context(policy)


def nv(tpm: ESAPI, index: int, attributes: int, size: int, auth: bytes = b"", **more: Any) -> Any:
    hierarchy = more.pop("hierarchy", ESYS_TR.OWNER)
    public = TPM2B_NV_PUBLIC(
        TPMS_NV_PUBLIC(
            nvIndex=index, nameAlg=TPM2_ALG.SHA256, attributes=TPMA_NV(attributes), dataSize=size,
            **more,
        )
    )  # fmt: skip
    handle = tpm.nv_define_space(auth, public, hierarchy)
    tpm.tr_set_auth(handle, auth)
    return handle


def nv_rest(tcti: str) -> None:
    """By policy: another authorization, and an end that only a policy allows; the global lock."""
    with esapi(tcti) as tpm:
        trial = session(tpm, TPM2_SE.TRIAL)
        tpm.policy_command_code(trial, TPM2_CC.NV_ChangeAuth)
        change = bytes(tpm.policy_get_digest(trial))
        tpm.policy_restart(trial)
        tpm.policy_command_code(trial, TPM2_CC.NV_UndefineSpaceSpecial)
        undefine = bytes(tpm.policy_get_digest(trial))
        tpm.flush_context(trial)
        usual = TPMA_NV.AUTHREAD | TPMA_NV.AUTHWRITE | TPMA_NV.OWNERREAD | TPMA_NV.OWNERWRITE
        index = nv(tpm, 0x1500030, usual | TPMA_NV.GLOBALLOCK, 16, b"old", authPolicy=change)
        tpm.nv_write(index, b"x" * 16, auth_handle=index)
        policy = session(tpm, TPM2_SE.POLICY)
        refused(tpm.nv_change_auth, index, b"new", session1=policy)
        tpm.policy_command_code(policy, TPM2_CC.NV_ChangeAuth)
        tpm.nv_change_auth(index, b"new", session1=policy)
        tpm.tr_set_auth(index, b"new")
        tpm.flush_context(policy)
        tpm.nv_read(index, 16, auth_handle=index)
        hmac = session(tpm, TPM2_SE.HMAC)
        tpm.nv_read(index, 16, auth_handle=index, session1=hmac)
        tpm.nv_write(index, b"y" * 8, 4, auth_handle=index, session1=hmac)
        tpm.flush_context(hmac)
        tpm.nv_global_write_lock(ESYS_TR.OWNER)
        refused(tpm.nv_write, index, b"x" * 16)
        tpm.nv_read_public(index)
        tpm.nv_certify(ESYS_TR.RH_NULL, index, b"q", OWN_SCHEME, 16, 0,
                       auth_handle=ESYS_TR.OWNER)  # fmt: skip
        platform = TPMA_NV.PPWRITE | TPMA_NV.PPREAD | TPMA_NV.PLATFORMCREATE | TPMA_NV.POLICY_DELETE
        special = nv(tpm, 0x1500031, platform, 8, authPolicy=undefine, hierarchy=ESYS_TR.PLATFORM)
        refused(tpm.nv_undefine_space, special, ESYS_TR.PLATFORM)
        policy = session(tpm, TPM2_SE.POLICY)
        refused(tpm.nv_undefine_space_special, special, policy)
        tpm.policy_command_code(policy, TPM2_CC.NV_UndefineSpaceSpecial)
        tpm.trsess_set_attributes(policy, 0, TPMA_SESSION.CONTINUESESSION)
        tpm.nv_undefine_space_special(special, policy)
        orderly = nv(tpm, 0x1500032, usual | TPMA_NV.ORDERLY | TPMA_NV.NO_DA | 0x10, 8)
        refused(tpm.nv_read, orderly, 8)
        tpm.nv_increment(orderly)
        tpm.nv_read(orderly, 8)
        refused(nv, tpm, 0x1500033, usual, 4096)
        for each in (index, orderly):
            tpm.nv_undefine_space(each)


def sequences(tcti: str) -> None:
    """Sequences with and without authorization, event sequences, AES by the newer command."""
    with esapi(tcti) as tpm:
        hashing = tpm.hash_sequence_start(b"auth", TPM2_ALG.SHA384)
        tpm.tr_set_auth(hashing, b"wrong")
        refused(tpm.sequence_update, hashing, b"data")
        tpm.tr_set_auth(hashing, b"auth")
        tpm.sequence_update(hashing, b"x" * 1024)
        context = tpm.context_save(hashing)
        tpm.sequence_update(hashing, b"y" * 1000)
        tpm.sequence_complete(hashing, b"end", ESYS_TR.ENDORSEMENT)
        again = tpm.context_load(context)
        tpm.tr_set_auth(again, b"auth")
        refused(tpm.event_sequence_complete, ESYS_TR.PCR16, again, b"")
        tpm.sequence_complete(again, b"", ESYS_TR.RH_NULL)
        refused(tpm.hash_sequence_start, b"", TPM2_ALG.SM3_256)
        event = tpm.hash_sequence_start(b"", TPM2_ALG.NULL)
        tpm.sequence_update(event, b"z" * 100)
        refused(tpm.sequence_complete, event, b"")
        tpm.event_sequence_complete(ESYS_TR.PCR16, event, b"end")
        event = tpm.hash_sequence_start(b"", TPM2_ALG.NULL)
        refused(tpm.event_sequence_complete, ESYS_TR.PCR17, event, b"")
        tpm.event_sequence_complete(ESYS_TR.RH_NULL, event, b"")
        parent = storage(tpm)
        key = made(tpm, parent, template("hmac:sha256", FIXED | OBJECT | TPMA_OBJECT.SIGN_ENCRYPT))
        mac = tpm.hmac_start(key, b"", TPM2_ALG.NULL)
        tpm.sequence_update(mac, b"more")
        tpm.sequence_complete(mac, b"", ESYS_TR.RH_NULL)
        tpm.hmac(key, b"data", TPM2_ALG.NULL)
        refused(tpm.hmac, parent, b"data", TPM2_ALG.SHA256)
        refused(tpm.hmac_start, parent, b"", TPM2_ALG.SHA256)
        tpm.flush_context(key)
        aes = made(tpm, parent, template("aes128cfb", FIXED | OBJECT | TPMA_OBJECT.SIGN_ENCRYPT
                                         | TPMA_OBJECT.DECRYPT))  # fmt: skip
        for way in (tpm.encrypt_decrypt, tpm.encrypt_decrypt_2):
            out, _ = way(aes, False, TPM2_ALG.CFB, bytes(16), b"clear text")
            way(aes, True, TPM2_ALG.CFB, bytes(16), bytes(out))
            refused(way, aes, False, TPM2_ALG.CFB, bytes(15), b"clear text")
            refused(way, aes, False, TPM2_ALG.CBC, bytes(16), b"clear text")
            refused(way, parent, False, TPM2_ALG.CFB, bytes(16), b"clear text")
        tpm.flush_context(aes)
        tpm.flush_context(parent)


def duplication(tcti: str) -> None:
    """Duplicate, rewrap, import, with inner and outer wrapping; what does not fit is refused."""
    with esapi(tcti) as tpm:
        trial = session(tpm, TPM2_SE.TRIAL)
        tpm.policy_command_code(trial, TPM2_CC.Duplicate)
        digest = bytes(tpm.policy_get_digest(trial))
        tpm.flush_context(trial)
        parent, other = storage(tpm), storage(tpm, ESYS_TR.ENDORSEMENT)
        public = template(SIGNING, OBJECT | TPMA_OBJECT.SIGN_ENCRYPT, authPolicy=digest)
        private, public, *_ = tpm.create(parent, secret(), public)
        key = tpm.load(parent, private, public)
        name = tpm.tr_get_name(key)
        null = TPMT_SYM_DEF_OBJECT(algorithm=TPM2_ALG.NULL)
        aes = TPMT_SYM_DEF_OBJECT(algorithm=TPM2_ALG.AES, keyBits={"aes": 128},
                                  mode={"aes": TPM2_ALG.CFB})  # fmt: skip

        def duplicated(new: Any, inner: bytes, symmetric: Any) -> Any:
            policy = session(tpm, TPM2_SE.POLICY)
            tpm.policy_command_code(policy, TPM2_CC.Duplicate)
            tpm.trsess_set_attributes(policy, 0, TPMA_SESSION.CONTINUESESSION)
            return tpm.duplicate(key, new, TPM2B_DATA(inner), symmetric, session1=policy)

        refused(tpm.duplicate, key, other, TPM2B_DATA(), null)
        for inner, symmetric in ((b"", null), (b"k" * 16, aes), (b"", aes)):
            inner_key, duplicate, seed = duplicated(other, inner, symmetric)
            used = TPM2B_DATA(inner or bytes(inner_key))
            back = tpm.import_(other, used, public, duplicate, seed, symmetric)
            refused(tpm.import_, parent, used, public, duplicate, seed, symmetric)
            refused(tpm.import_, other, used, public, TPM2B_PRIVATE(bytes(40)), seed, symmetric)
        bare = duplicated(ESYS_TR.RH_NULL, b"", null)
        tpm.flush_context(key)
        key = tpm.load(other, back, public)
        tpm.flush_context(key)
        refused(tpm.load, parent, back, public)
        tpm.import_(other, TPM2B_DATA(), public, bare[1], TPM2B_ENCRYPTED_SECRET(), null)
        _, duplicate, seed = None, None, None
        key = tpm.load(parent, private, public)
        _, duplicate, seed = duplicated(other, b"", null)
        tpm.flush_context(key)
        wrapped, sealed = tpm.rewrap(other, parent, duplicate, name, seed)
        refused(tpm.rewrap, parent, other, duplicate, name, seed)
        tpm.import_(parent, TPM2B_DATA(), public, wrapped, sealed, null)
        credential, encrypted = tpm.make_credential(parent, TPM2B_DIGEST(b"credential"),
                                                    TPM2B_NAME(bytes(name)))  # fmt: skip
        key = tpm.load(parent, private, public)
        opened = tpm.activate_credential(key, parent, credential, encrypted)
        assert bytes(opened) == b"credential"
        refused(tpm.activate_credential, parent, key, credential, encrypted)
        for each in (key, parent, other):
            tpm.flush_context(each)


def platform(tcti: str) -> None:
    """What belongs to the platform, and what no software TPM has."""
    with esapi(tcti) as tpm:
        tried(tpm.pcr_set_auth_policy, b"\1" * 32, TPM2_ALG.SHA256, ESYS_TR.PCR20)
        tried(tpm.pcr_set_auth_value, ESYS_TR.PCR20, b"auth")
        tried(tpm.pcr_set_auth_value, ESYS_TR.PCR16, b"auth")
        tried(
            tpm.pcr_extend,
            ESYS_TR.PCR20,
            TPML_DIGEST_VALUES(
                [TPMT_HA(hashAlg=TPM2_ALG.SHA256, digest=TPMU_HA(sha256=b"\1" * 32))]
            ),
        )
        tried(tpm.pp_commands, TPML_CC([TPM2_CC.Clear]), TPML_CC(), session1=ESYS_TR.PASSWORD)
        tried(tpm.set_algorithm_set, 0)
        tried(tpm.set_algorithm_set, 1)
        tried(tpm.firmware_read, 0)
        tried(tpm.field_upgrade_data, b"data")
        tried(tpm.incremental_self_test, TPML_ALG([TPM2_ALG.SHA256, TPM2_ALG.AES]))
        tried(tpm.ec_ephemeral, TPM2_ECC_CURVE.NIST_P256)
        parent = storage(tpm)
        tried(tpm.field_upgrade_start, parent, b"\1" * 32, TPMT_SIGNATURE(
            sigAlg=TPM2_ALG.HMAC, signature={"hmac": {"hashAlg": TPM2_ALG.SHA256}}))  # fmt: skip
        tpm.flush_context(parent)


def keys(tcti: str) -> None:
    """Elliptic curves in two phases, commits, derived and loaded-at-once objects, certificates."""
    with esapi(tcti) as tpm:
        parent = storage(tpm)
        agree = made(tpm, parent, template("ecc", FIXED | OBJECT | TPMA_OBJECT.DECRYPT,
                                           ), )  # fmt: skip
        static = tpm.read_public(agree)[0].publicArea.unique.ecc
        point, counter = tpm.ec_ephemeral(TPM2_ECC_CURVE.NIST_P256)
        its = TPM2B_ECC_POINT(static)
        tried(tpm.zgen_2_phase, agree, its, its, TPM2_ALG.ECDH, counter)
        tried(tpm.zgen_2_phase, agree, its, its, TPM2_ALG.ECDH, counter)
        tried(tpm.zgen_2_phase, agree, its, point, TPM2_ALG.SM2, counter)
        tpm.ecdh_zgen(agree, its)
        tpm.flush_context(agree)
        daa = made(tpm, parent, template("ecc:ecdaa4-sha256", FIXED | OBJECT
                                         | TPMA_OBJECT.SIGN_ENCRYPT))  # fmt: skip
        empty = (TPM2B_ECC_POINT(), TPM2B_SENSITIVE_DATA(), TPM2B_ECC_PARAMETER())
        tried(tpm.commit, daa, *empty)
        tried(tpm.commit, daa, its, *empty[1:])
        tpm.flush_context(daa)
        for kind in ("keyedhash", "hmac:sha256"):
            attributes = FIXED | TPMA_OBJECT.USERWITHAUTH
            if kind != "keyedhash":
                attributes |= TPMA_OBJECT.SIGN_ENCRYPT
            data = template(kind, attributes)
            loaded = tpm.create_loaded(parent, secret(b"auth", b"data"),
                                       TPM2B_TEMPLATE(data.publicArea.marshal()))[0]  # fmt: skip
            tpm.tr_set_auth(loaded, b"auth")
            if kind == "keyedhash":
                tpm.unseal(loaded)
            else:
                tpm.hmac(loaded, b"data", TPM2_ALG.SHA256)
            tpm.flush_context(loaded)
        primary = template("ecc", FIXED | OBJECT | TPMA_OBJECT.SIGN_ENCRYPT)
        loaded = tpm.create_loaded(ESYS_TR.OWNER, secret(),
                                   TPM2B_TEMPLATE(primary.publicArea.marshal()))[0]  # fmt: skip
        tried(tpm.certify_x509, loaded, loaded, bytes.fromhex("3003a10100"))
        tpm.certify(loaded, ESYS_TR.RH_NULL, b"q", OWN_SCHEME)
        tpm.flush_context(loaded)
        refused(tpm.create, parent, secret(), template("ecc", FIXED | OBJECT))
        public = template("ecc", FIXED | OBJECT | TPMA_OBJECT.DECRYPT).publicArea
        tpm.flush_context(tpm.create_loaded(parent, secret(), TPM2B_TEMPLATE(public.marshal()))[0])
        tpm.flush_context(parent)


def pressure(tcti: str) -> None:
    """More than a TPM has slots for, by those who do not know."""
    with esapi(tcti) as tpm:
        held = [storage(tpm), storage(tpm, ESYS_TR.ENDORSEMENT), storage(tpm, ESYS_TR.NULL)]
        refused(storage, tpm, ESYS_TR.PLATFORM)
        refused(tpm.hash_sequence_start, b"", TPM2_ALG.SHA256)
        for handle in held:
            tpm.read_public(handle)
        for handle in held:
            tpm.flush_context(handle)
        held = [session(tpm, TPM2_SE.POLICY) for _ in range(3)]
        for handle in held:
            tpm.policy_restart(handle)
        refused(session, tpm, TPM2_SE.POLICY)
        for handle in held:
            tpm.policy_command_code(handle, TPM2_CC.Sign)
            tpm.policy_get_digest(handle)
            tpm.flush_context(handle)


SCENARIOS: dict[str, Callable[[str], None]] = {
    "esapi-sessions": hmac_sessions,
    "esapi-audits": audits,
    "esapi-policies": policies,
    "esapi-nv": nv_rest,
    "esapi-sequences": sequences,
    "esapi-duplication": duplication,
    "esapi-platform": platform,
    "esapi-keys": keys,
    "esapi-pressure": pressure,
}
