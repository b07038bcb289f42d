"""FAPI, by its programs and by tpm2-pytss; and ESAPI."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from cryptography.hazmat.primitives.serialization import load_pem_public_key
from tpm2_pytss import (
    ESAPI,
    ESYS_TR,
    FAPI,
    TPM2_ALG,
    TPM2_SE,
    TPM2B_AUTH,
    TPM2B_DATA,
    TPM2B_DIGEST,
    TPM2B_MAX_NV_BUFFER,
    TPM2B_NV_PUBLIC,
    TPM2B_PUBLIC,
    TPM2B_SENSITIVE_CREATE,
    TPMA_NV,
    TPML_PCR_SELECTION,
    TPMS_NV_PUBLIC,
    TPMS_SENSITIVE_CREATE,
    TPMT_SYM_DEF,
    TSS2_Exception,
)

from .fapi import ECC, RSA, Fapi, configuration
from .tools import POLICY_FAIL, VALUE_P1, Tools, Way

NOT_VERIFIED = 0x60021  # TSS2_FAPI_RC_SIGNATURE_VERIFICATION_FAILED
NO_CERTIFICATE = 0x60025
NO_PROVISION = 0x60034
UNKNOWN_POLICY = 0x6002E
KEY = "HS/SRK/key"
SECRET = b"what is kept"
NO_SIGNATURE = "ignature verification failed|not otherwise specified"  # by RSA, the latter


@pytest.fixture(params=[ECC, RSA])
def profile(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def provisioned(tpm: Tools, way: Way, ran: dict[str, set[str]]) -> Iterator[Callable[[str], Fapi]]:
    """FAPI on the container's vTPM; what it leaves is taken away when the test is over."""
    made: list[Fapi] = []

    def of(profile: str) -> Fapi:
        made.append(Fapi(tpm.directory, tpm.tcti, profile, ran[way]))
        made[0]("provision")
        return made[0]

    yield of
    for fapi in made:
        fapi("delete", path="/")
        fapi.refused(NO_PROVISION, "list")


@pytest.fixture
def fapi(provisioned: Callable[[str], Fapi]) -> Fapi:
    return provisioned(ECC)


def digest(fapi: Fapi, data: bytes, name: str = "digest") -> None:
    fapi.write(name, hashlib.sha256(data).digest())


# --- its programs --------------------------------------------------------------------------------


def test_fapi_signs_and_openssl_verifies(fapi: Fapi) -> None:
    fapi.write("message", SECRET)
    digest(fapi, SECRET)
    digest(fapi, b"something else", "other")
    fapi("createkey", path=KEY, type="sign,noda", authValue="")
    fapi("sign", keyPath=KEY, digest="digest", publicKey="key.pem", signature="signature")
    openssl = ("openssl", "dgst", "-sha256", "-verify", "key.pem", "-signature", "signature")
    assert b"Verified OK" in fapi.out(*openssl, "message")
    fapi("import", path="ext/key", importData="key.pem")
    for path in (KEY, "ext/key"):
        fapi("verifysignature", keyPath=path, digest="digest", signature="signature")
        fapi.refused(
            NOT_VERIFIED, "verifysignature", keyPath=path, digest="other", signature="signature"
        )
    assert KEY in fapi("list", searchPath="HS").decode()


def test_fapi_encrypts_by_rsa(provisioned: Callable[[str], Fapi]) -> None:
    """Elliptic keys do not encrypt in FAPI."""
    fapi = provisioned(RSA)
    fapi.write("plain", SECRET)
    fapi("createkey", path=KEY, type="decrypt,noda", authValue="")
    fapi("encrypt", keyPath=KEY, plainText="plain", cipherText="cipher")
    assert fapi.read("cipher") != SECRET
    assert fapi.result("decrypt", "plainText", keyPath=KEY, cipherText="cipher") == SECRET


def test_fapi_seals_to_a_pcr(fapi: Fapi, tpm: Tools) -> None:
    fapi.write("secret", SECRET)
    tpm("pcrreset 16")
    pcr = {"pcr": 16, "hashAlg": "TPM2_ALG_SHA256", "digest": "00" * 32}
    fapi.policy("pcr", {"type": "POLICYPCR", "pcrs": [pcr]})
    exported = json.loads(fapi.result("exportpolicy", "jsonPolicy", path="/policy/pcr"))
    assert exported["description"] == "pcr"
    path = "HS/SRK/sealed"
    fapi(
        "createseal", path=path, type="noda", authValue="", policyPath="/policy/pcr", data="secret"
    )
    assert fapi.result("unseal", "data", path=path) == SECRET
    fapi("pcrextend", pcr="16", data="secret")
    fapi.refused(VALUE_P1, "unseal", path=path, data="x")
    tpm("pcrreset 16")
    fapi("createseal", path="HS/SRK/random", type="noda", authValue="", size="16")
    assert len(fapi.result("unseal", "data", path="HS/SRK/random")) == 16


def test_fapi_s_policies_are_authorized_by_a_key_and_by_nv(fapi: Fapi, tpm: Tools) -> None:
    fapi.write("secret", SECRET)
    fapi.write("reference", b"\1\2\3")
    tpm("pcrreset 16")
    pcr = {"pcr": 16, "hashAlg": "TPM2_ALG_SHA256", "digest": "00" * 32}
    fapi.policy("pcr", {"type": "POLICYPCR", "pcrs": [pcr]})
    fapi("createkey", path=KEY, type="sign,noda", authValue="")
    key = {"type": "POLICYAUTHORIZE", "keyPath": f"/{ECC}/{KEY}", "policyRef": [1, 2, 3]}
    fapi.policy("signed", key)
    fapi("createnv", path="/nv/Owner/policy", size="34", type="noda", authValue="")
    fapi.policy("stored", {"type": "POLICYAUTHORIZENV", "nvPath": "/nv/Owner/policy"})
    for name in ("signed", "stored"):
        path = f"HS/SRK/{name}"
        fapi(
            "createseal", path=path, type="noda", authValue="", data="secret",
            policyPath=f"/policy/{name}",
        )  # fmt: skip
    fapi.refused(UNKNOWN_POLICY, "unseal", path="HS/SRK/signed", data="x")
    fapi("authorizepolicy", policyPath="/policy/pcr", keyPath=KEY, policyRef="reference")
    assert fapi.result("unseal", "data", path="HS/SRK/signed") == SECRET
    fapi.fails("tss2_unseal", "--path=HS/SRK/stored", "--data=x")
    fapi("writeauthorizenv", nvPath="/nv/Owner/policy", policyPath="/policy/pcr")
    assert fapi.result("unseal", "data", path="HS/SRK/stored") == SECRET
    fapi("delete", path="/nv/Owner/policy")


def test_fapi_s_nv_of_every_kind(fapi: Fapi) -> None:
    fapi.write("data", SECRET)
    made = {
        "plain": {"size": str(len(SECRET)), "type": "noda"},
        "count": {"type": "counter,noda"},
        "bits": {"type": "bitfield,noda"},
        "chain": {"type": "pcr,noda"},
    }
    for name, options in made.items():
        fapi("createnv", path=f"/nv/Owner/{name}", authValue="", **options)

    def value(name: str) -> bytes:
        return fapi.result("nvread", "data", nvPath=f"/nv/Owner/{name}")

    fapi("nvwrite", nvPath="/nv/Owner/plain", data="data")
    assert value("plain") == SECRET
    fapi("nvincrement", nvPath="/nv/Owner/count")
    first = int.from_bytes(value("count"), "big")
    fapi("nvincrement", nvPath="/nv/Owner/count")
    assert int.from_bytes(value("count"), "big") == first + 1
    fapi("nvsetbits", nvPath="/nv/Owner/bits", bitmap="0x0102")
    assert value("bits") == bytes.fromhex("0000000000000102")
    fapi("nvextend", nvPath="/nv/Owner/chain", data="data")
    fapi("nvread", nvPath="/nv/Owner/chain", data="value", logData="log")
    log = json.loads(fapi.read("log"))
    assert log[0]["digests"][0]["digest"] == hashlib.sha256(SECRET).hexdigest()
    assert value("chain") == hashlib.sha256(bytes(32) + SECRET).digest()
    for name in made:
        fapi("delete", path=f"/nv/Owner/{name}")


def test_fapi_quotes_and_verifies(fapi: Fapi, tpm: Tools) -> None:
    tpm("pcrreset 16")
    fapi.write("nonce", b"nonce")
    fapi.write("other", b"nonc2")
    fapi.write("data", SECRET)
    fapi("createkey", path=KEY, type="sign,restricted,noda", authValue="")
    fapi("pcrextend", pcr="16", data="data")
    log = json.loads(fapi.result("pcrread", "pcrLog", pcrIndex="16"))
    assert bytes.fromhex(log[0]["sub_event"]["data"]) == SECRET
    fapi(
        "quote", keyPath=KEY, pcrList="16", qualifyingData="nonce", signature="signature",
        pcrLog="log", quoteInfo="info",
    )  # fmt: skip
    given = {"publicKeyPath": KEY, "quoteInfo": "info", "signature": "signature"}
    fapi("verifyquote", qualifyingData="nonce", pcrLog="log", **given)
    fapi.refused(NOT_VERIFIED, "verifyquote", qualifyingData="other", pcrLog="log", **given)
    fapi.write("log", fapi.read("log").replace(SECRET.hex().encode(), b"00" * len(SECRET)))
    log = json.loads(fapi.read("log"))
    log[0]["digests"] = [{**entry, "digest": "11" * 32} for entry in log[0]["digests"]]
    fapi.write("log", json.dumps(log).encode())
    fapi.fails(
        "tss2_verifyquote", f"--publicKeyPath={KEY}", "--quoteInfo=info", "--pcrLog=log",
        "--signature=signature", "--qualifyingData=nonce",
    )  # fmt: skip
    tpm("pcrreset 16")


def test_fapi_keeps_what_belongs_to_a_key(fapi: Fapi, tpm: Tools) -> None:
    fapi.write("data", SECRET)
    fapi("createkey", path=KEY, type="sign,noda", authValue="")
    fapi("setdescription", path=KEY, description="a key")
    assert fapi.result("getdescription", "description", path=KEY) == b"a key"
    fapi("setappdata", path=KEY, appData="data")
    assert fapi.result("getappdata", "appData", path=KEY) == SECRET
    fapi.out(
        "openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", "private", "-out",
        "cert.pem", "-subj", "/CN=x", "-days", "2",
    )  # fmt: skip
    fapi("setcertificate", path=KEY, x509certData="cert.pem")
    assert fapi.result("getcertificate", "x509certData", path=KEY) == fapi.read("cert.pem")
    fapi("gettpmblobs", path=KEY, tpm2bPublic="pub", tpm2bPrivate="priv", policy="policy")
    fapi("gettpm2object", path=KEY, context="key.ctx")
    assert tpm("print -t TPM2B_PUBLIC pub").strip() in tpm("readpublic -c key.ctx")


def test_fapi_moves_a_key_under_another_parent(fapi: Fapi, tpm: Tools) -> None:
    fapi("exportkey", pathOfKeyToDuplicate="HS/SRK", exportedData="srk.json")
    fapi("import", path="ext/parent", importData="srk.json")
    fapi.policy("move", {"type": "POLICYDUPLICATIONSELECT", "newParentPath": "ext/parent"})
    fapi(
        "createkey", path=KEY, type="sign,exportable,noda", authValue="", policyPath="/policy/move"
    )
    fapi(
        "exportkey", pathOfKeyToDuplicate=KEY, pathToPublicKeyOfNewParent="ext/parent",
        exportedData="key.json",
    )  # fmt: skip
    fapi("import", path="moved", importData="key.json")  # below its parent
    blobs = {"tpm2bPrivate": "priv", "policy": "policy"}
    fapi("gettpmblobs", path=KEY, tpm2bPublic="before", **blobs)
    (fapi.directory / "priv").unlink()
    (fapi.directory / "policy").unlink()
    fapi("gettpmblobs", path="HS/SRK/moved", tpm2bPublic="after", **blobs)
    assert fapi.read("before") == fapi.read("after")
    tpm("load -Q -C 0x81000001 -u after -r priv -c key.ctx")  # the two belong together


def test_fapi_changes_a_password(fapi: Fapi) -> None:
    digest(fapi, SECRET)
    fapi("createkey", path=KEY, type="sign,noda", authValue="")
    fapi("sign", keyPath=KEY, digest="digest", signature="signature")
    fapi("changeauth", entityPath=KEY, authValue="word")
    said = fapi.fails("tss2_sign", f"--keyPath={KEY}", "--digest=digest", "--signature=again")
    assert f"Authorize {ECC}/{KEY}" in said  # there is no terminal to be asked at


def test_fapi_tells_of_the_tpm(fapi: Fapi, tpm: Tools) -> None:
    info = json.loads(fapi.result("getinfo", "info"))
    assert info["fapi_config"]["profile_name"] == ECC
    assert len(fapi.result("getrandom", "data", numBytes="20")) == 20
    assert len(fapi.other("tss2", "getrandom", "--numBytes=20", "--data=-")) == 20
    fapi.refused(NO_CERTIFICATE, "getplatformcertificates", certificates="x")
    certificate = tpm.data("nvread 0x1C00002 -C o")
    tpm.write("cert", certificate)
    tpm(
        f"nvdefine -Q 0x1C08000 -C o -s {len(certificate)}"
        " -a 'ownerread|ownerwrite|authread|authwrite|no_da'"
    )
    tpm("nvwrite -Q 0x1C08000 -C o -i cert")
    try:
        assert fapi.result("getplatformcertificates", "certificates") == certificate
    finally:
        tpm("nvundefine -Q 0x1C08000 -C o")


def test_fapi_trusts_no_ek_but_of_the_makers_it_knows(tpm: Tools) -> None:
    """Nothing lets it trust a site's own CA: such TPMs are provisioned `ek_cert_less`."""
    configuration(tpm.directory, tpm.tcti, ECC, ek_cert_less="no")
    tpm.environment["TSS2_FAPICONF"] = str(tpm.directory / "fapi.json")
    assert f"(0x{NO_CERTIFICATE:X})" in tpm.fails("tss2_provision")


# --- tpm2-pytss ----------------------------------------------------------------------------------


def test_fapi_of_tpm2_pytss(tpm: Tools, profile: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = configuration(tpm.directory, tpm.tcti, profile)
    monkeypatch.setenv("TSS2_FAPICONF", str(path))
    tpm("pcrreset 16")
    with FAPI() as fapi:
        fapi.provision(is_provisioned_ok=False)
        try:
            assert fapi.create_key(KEY, type_="sign,noda", exists_ok=False)
            signature, public, _ = fapi.sign(KEY, hashlib.sha256(SECRET).digest())
            fapi.verify_signature(KEY, hashlib.sha256(SECRET).digest(), signature)
            with pytest.raises(TSS2_Exception, match=NO_SIGNATURE):
                fapi.verify_signature(KEY, bytes(32), signature)
            if profile == ECC:
                loaded = load_pem_public_key(public.encode() if isinstance(public, str) else public)
                assert isinstance(loaded, ec.EllipticCurvePublicKey)
                loaded.verify(signature, SECRET, ec.ECDSA(hashes.SHA256()))
            pcr = {"pcr": 16, "hashAlg": "TPM2_ALG_SHA256", "digest": "00" * 32}
            policy = {"description": "pcr", "policy": [{"type": "POLICYPCR", "pcrs": [pcr]}]}
            fapi.import_object("/policy/pcr", json.dumps(policy))
            fapi.create_seal("HS/SRK/sealed", data=SECRET, policy_path="/policy/pcr", type_="noda")
            assert fapi.unseal("HS/SRK/sealed") == SECRET
            fapi.create_nv("/nv/Owner/data", len(SECRET), type_="noda")
            fapi.nv_write("/nv/Owner/data", SECRET)
            assert fapi.nv_read("/nv/Owner/data")[0] == SECRET
            fapi.create_key("HS/SRK/ak", type_="sign,restricted,noda")
            info, signature, log, _ = fapi.quote("HS/SRK/ak", [16], qualifying_data=b"nonce")
            fapi.verify_quote("HS/SRK/ak", signature, info, b"nonce", pcr_log=log)
            with pytest.raises(TSS2_Exception, match=NO_SIGNATURE):
                fapi.verify_quote("HS/SRK/ak", signature, info, b"nonc2", pcr_log=log)
            fapi.pcr_extend(16, SECRET)
            with pytest.raises(TSS2_Exception):
                fapi.unseal("HS/SRK/sealed")
        finally:
            fapi.delete("/")
    tpm("pcrreset 16")


def test_esapi_of_tpm2_pytss(tpm: Tools) -> None:
    """One connection with objects and sessions of its own, salted and encrypted."""
    with ESAPI(tpm.tcti) as esapi:
        assert len(bytes(esapi.get_random(20))) == 20
        template = TPM2B_PUBLIC.parse("ecc256", objectAttributes=STORAGE)
        primary, public, _, _, _ = esapi.create_primary(TPM2B_SENSITIVE_CREATE(), template)
        assert b"BEGIN PUBLIC KEY" in public.to_pem()
        session = esapi.start_auth_session(
            primary, ESYS_TR.NONE, TPM2_SE.HMAC, TPMT_SYM_DEF.parse("aes128cfb"), TPM2_ALG.SHA256
        )
        assert session
        trial = esapi.start_auth_session(
            ESYS_TR.NONE, ESYS_TR.NONE, TPM2_SE.TRIAL, TPMT_SYM_DEF(algorithm=TPM2_ALG.NULL),
            TPM2_ALG.SHA256,
        )  # fmt: skip
        esapi.policy_pcr(trial, TPM2B_DIGEST(), TPML_PCR_SELECTION.parse("sha256:13"))
        policy = esapi.policy_get_digest(trial)
        esapi.flush_context(trial)
        sealed = TPM2B_PUBLIC.parse("keyedhash", objectAttributes="fixedtpm|fixedparent")
        sealed.publicArea.authPolicy = policy
        secret = TPM2B_SENSITIVE_CREATE(TPMS_SENSITIVE_CREATE(data=SECRET))
        private, public, _, _, _ = esapi.create(primary, secret, sealed, session1=session)
        loaded = esapi.load(primary, private, public)
        real = esapi.start_auth_session(
            primary, ESYS_TR.NONE, TPM2_SE.POLICY, TPMT_SYM_DEF.parse("aes128cfb"), TPM2_ALG.SHA256
        )
        with pytest.raises(TSS2_Exception) as refusal:
            esapi.unseal(loaded, session1=real)
        assert refusal.value.rc == POLICY_FAIL
        esapi.policy_pcr(real, TPM2B_DIGEST(), TPML_PCR_SELECTION.parse("sha256:13"))
        assert bytes(esapi.unseal(loaded, session1=real)) == SECRET
        for handle in (loaded, real, session, primary):
            esapi.flush_context(handle)


def test_esapi_s_nv_and_quotes(tpm: Tools) -> None:
    with ESAPI(tpm.tcti) as esapi:
        attributes = TPMA_NV.parse("ownerread|ownerwrite|authread|authwrite")
        public = TPMS_NV_PUBLIC(
            nvIndex=0x1500400, nameAlg=TPM2_ALG.SHA256, attributes=attributes, dataSize=len(SECRET)
        )
        index = esapi.nv_define_space(TPM2B_AUTH(b"word"), TPM2B_NV_PUBLIC(nvPublic=public))
        try:
            esapi.nv_write(index, TPM2B_MAX_NV_BUFFER(SECRET), auth_handle=ESYS_TR.OWNER)
            assert bytes(esapi.nv_read(index, len(SECRET), auth_handle=ESYS_TR.OWNER)) == SECRET
            assert bytes(esapi.nv_read(index, 4)) == SECRET[:4]  # by its own password
        finally:
            esapi.nv_undefine_space(index)
        template = TPM2B_PUBLIC.parse("ecc256:ecdsa-sha256:null", objectAttributes=RESTRICTED)
        key, public_key, _, _, _ = esapi.create_primary(TPM2B_SENSITIVE_CREATE(), template)
        quoted, signature = esapi.quote(
            key, TPML_PCR_SELECTION.parse("sha256:0,13"), TPM2B_DATA(b"nonce")
        )
        attest = bytes(quoted)
        loaded = load_pem_public_key(public_key.to_pem())
        assert isinstance(loaded, ec.EllipticCurvePublicKey)
        # pytss gives both numbers; OpenSSL wants them in DER.
        loaded.verify(bytes_of(signature), attest, ec.ECDSA(hashes.SHA256()))
        assert b"nonce" in attest
        esapi.flush_context(key)


def bytes_of(signature: object) -> bytes:
    """The DER of an ECDSA signature."""
    both = signature.signature.ecdsa  # type: ignore[attr-defined]
    return encode_dss_signature(
        int.from_bytes(bytes(both.signatureR), "big"), int.from_bytes(bytes(both.signatureS), "big")
    )


STORAGE = "fixedtpm|fixedparent|sensitivedataorigin|userwithauth|restricted|decrypt"
RESTRICTED = "fixedtpm|fixedparent|sensitivedataorigin|userwithauth|restricted|sign"
