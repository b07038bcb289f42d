"""Many programs at once on one device: each a process of its own, with ESAPI, as they come.

    python -m tests.system.many_programs DEVICE COUNT

Each makes a primary key, creates and loads a key, signs and verifies, uses an HMAC session and a
policy session, saves and loads contexts, and flushes; it ends with 0 if all of it came out right.
They begin together. The exit status is 0 if each ended with 0.
"""

from __future__ import annotations

import hashlib
import os
import sys
import traceback

from tpm2_pytss import (
    ESAPI,
    ESYS_TR,
    TPM2_ALG,
    TPM2_CC,
    TPM2_RH,
    TPM2_SE,
    TPM2_ST,
    TPM2B_DIGEST,
    TPM2B_PUBLIC,
    TPM2B_SENSITIVE_CREATE,
    TPMA_OBJECT,
    TPMA_SESSION,
    TPMS_SENSITIVE_CREATE,
    TPMT_PUBLIC,
    TPMT_SIG_SCHEME,
    TPMT_SYM_DEF,
    TPMT_TK_HASHCHECK,
)

AES = TPMT_SYM_DEF.parse("aes128cfb")
SIGNING = TPMT_PUBLIC.parse(
    "ecc:ecdsa-sha256",
    objectAttributes=TPMA_OBJECT.FIXEDTPM
    | TPMA_OBJECT.FIXEDPARENT
    | TPMA_OBJECT.SENSITIVEDATAORIGIN
    | TPMA_OBJECT.USERWITHAUTH
    | TPMA_OBJECT.SIGN_ENCRYPT,
)
BOTH = TPMA_SESSION.DECRYPT | TPMA_SESSION.ENCRYPT | TPMA_SESSION.CONTINUESESSION


def program(device: str, number: int) -> None:
    auth = b"auth %d" % number
    digest = hashlib.sha256(auth).digest()
    with ESAPI(f"device:{device}") as tpm:
        parent = tpm.create_primary(None, "ecc")[0]
        sensitive = TPM2B_SENSITIVE_CREATE(TPMS_SENSITIVE_CREATE(userAuth=auth))
        private, public, *_ = tpm.create(parent, sensitive, TPM2B_PUBLIC(SIGNING))
        key = tpm.load(parent, private, public)
        tpm.tr_set_auth(key, auth)

        hmac = tpm.start_auth_session(parent, ESYS_TR.NONE, TPM2_SE.HMAC, AES, TPM2_ALG.SHA256)
        tpm.trsess_set_attributes(hmac, BOTH)
        scheme = TPMT_SIG_SCHEME(scheme=TPM2_ALG.NULL)
        ticket = TPMT_TK_HASHCHECK(tag=TPM2_ST.HASHCHECK, hierarchy=TPM2_RH.NULL)
        signature = tpm.sign(key, TPM2B_DIGEST(digest), scheme, ticket, session1=hmac)
        signature.verify_signature(public, auth)
        tpm.verify_signature(key, TPM2B_DIGEST(digest), signature)
        tpm.flush_context(hmac)

        saved = tpm.context_save(key)
        tpm.flush_context(key)
        key = tpm.context_load(saved)
        assert bytes(tpm.read_public(key)[1]) == bytes(public.get_name())

        policy = tpm.start_auth_session(
            ESYS_TR.NONE, ESYS_TR.NONE, TPM2_SE.POLICY, AES, TPM2_ALG.SHA256
        )
        tpm.policy_command_code(policy, TPM2_CC.Sign)
        tpm.policy_password(policy)
        before = bytes(tpm.policy_get_digest(policy))
        policy = tpm.context_load(tpm.context_save(policy))
        assert bytes(tpm.policy_get_digest(policy)) == before
        for handle in (policy, key, parent):
            tpm.flush_context(handle)


def main() -> int:
    device, count = sys.argv[1], int(sys.argv[2])
    start, go = os.pipe()
    pids = []
    for number in range(count):
        pid = os.fork()
        if pid == 0:
            os.close(go)
            os.read(start, 1)  # until the parent closes it: everybody is there
            status = 1
            try:
                program(device, number)
                status = 0
            except BaseException:  # noqa: BLE001 - the parent is told by the status
                traceback.print_exc()
            finally:
                os._exit(status)
        pids.append(pid)
    os.close(go)
    failed = [pid for pid in pids if os.waitpid(pid, 0)[1]]
    print(f"{len(failed)} of {count} failed", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
