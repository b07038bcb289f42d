"""tpm2-openssl: OpenSSL with keys in a vTPM; a TLS server that has no other."""

from __future__ import annotations

import pytest

from .server import free_port, listens, serving
from .tools import Tools

TPM = ("-provider", "tpm2", "-provider", "default", "-propquery", "?provider=tpm2")
KINDS = {"rsa": ("RSA", "bits:2048"), "ecc": ("EC", "group:P-256")}
PAIR = "-----BEGIN TSS2 PRIVATE KEY-----"


@pytest.fixture
def openssl(tpm: Tools) -> Tools:
    tpm.environment["TPM2OPENSSL_TCTI"] = tpm.tcti
    return tpm


def make(openssl: Tools, kind: str) -> None:
    """A key in the vTPM, and its certificate by itself."""
    algorithm, option = KINDS[kind]
    made = ("genpkey", "-provider", "tpm2", "-algorithm", algorithm, "-pkeyopt", option)
    openssl.out("openssl", *made, "-out", "key")
    openssl.out(
        "openssl", "req", *TPM, "-x509", "-new", "-key", "key", "-subj", "/CN=localhost", "-days",
        "2", "-out", "cert",
    )  # fmt: skip


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_tls_server_s_key_is_in_the_vtpm(openssl: Tools, kind: str) -> None:
    make(openssl, kind)
    assert openssl.read("key").decode().startswith(PAIR)
    openssl.fails("openssl", "pkey", "-in", "key")  # nobody has the key but the TPM
    port = free_port()
    server = ("s_server", *TPM, "-key", "key", "-cert", "cert", "-accept", f"127.0.0.1:{port}")
    client = ("openssl", "s_client", "-connect", f"127.0.0.1:{port}", "-verify_return_error")
    client += ("-quiet", "-servername", "localhost", "-verify_hostname", "localhost")
    with serving(openssl, "openssl", *server, "-rev", ready=lambda: listens(port)):
        # tpm2-openssl 1.1 offers elliptic keys to TLS 1.3 alone ("no shared cipher", by any TPM).
        for version in ("-tls1_2", "-tls1_3") if kind == "rsa" else ("-tls1_3",):
            for _ in range(3):
                # The server sends each line back reversed, and ends where one is CLOSE.
                text = openssl.out(
                    *client, version, "-CAfile", "cert", given=b"what is said\nCLOSE\n"
                )
                assert b"dias si tahw\n" in text
        openssl.out("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", "other",
                    "-subj", "/CN=localhost", "-out", "others")  # fmt: skip
        said = openssl.fails(*client, "-CAfile", "others", given=b"what is said\nCLOSE\n")
        assert "verify failed" in said


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_signature_verifies_by_openssl_alone(openssl: Tools, kind: str) -> None:
    make(openssl, kind)
    openssl.write("message", b"what is signed")
    openssl.write("other", b"what is not")
    sign = ("dgst", *TPM, "-sha256", "-sign", "key", "-out", "signature", "message")
    openssl.out("openssl", *sign)
    openssl.out("openssl", "x509", "-in", "cert", "-noout", "-pubkey", "-out", "pem")
    verify = ("openssl", "dgst", "-sha256", "-verify", "pem", "-signature", "signature")
    assert b"Verified OK" in openssl.out(*verify, "message")
    openssl.fails(*verify, "other")


def test_rsa_decrypts_and_elliptic_keys_agree(openssl: Tools) -> None:
    make(openssl, "rsa")
    openssl.write("message", b"what is kept")
    openssl.out("openssl", "pkeyutl", "-encrypt", "-certin", "-inkey", "cert", "-in",
                "message", "-out", "cipher")  # fmt: skip
    decrypt = ("pkeyutl", *TPM, "-decrypt", "-inkey", "key", "-in", "cipher")
    assert openssl.out("openssl", *decrypt) == b"what is kept"
    make(openssl, "ecc")
    openssl.out("openssl", "x509", "-in", "cert", "-noout", "-pubkey", "-out", "ours.pem")
    openssl.out("openssl", "ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", "theirs")
    openssl.out("openssl", "ec", "-in", "theirs", "-pubout", "-out", "theirs.pem")
    ours = ("pkeyutl", *TPM, "-derive", "-inkey", "key", "-peerkey", "theirs.pem")
    theirs = ("pkeyutl", "-derive", "-inkey", "theirs", "-peerkey", "ours.pem")
    assert openssl.out("openssl", *ours) == openssl.out("openssl", *theirs)


def test_keys_that_tpm2_tools_made_are_used(openssl: Tools) -> None:
    """A persistent one by its handle, and one in a file of tpm2_encodeobject."""
    openssl.write("message", b"what is signed")
    openssl("createprimary -Q -C o -G ecc -c primary.ctx")
    openssl("evictcontrol -Q -C o -c primary.ctx 0x81000500")
    openssl("create -Q -C 0x81000500 -G ecc -u key.pub -r key.priv -p word")
    openssl("load -Q -C 0x81000500 -u key.pub -r key.priv -c key.ctx")
    openssl("readpublic -Q -c key.ctx -f pem -o pem")
    openssl("encodeobject -C 0x81000500 -u key.pub -r key.priv -o key.tss")
    openssl("evictcontrol -Q -C o -c key.ctx 0x81000501")
    try:
        for key in ("handle:0x81000501?pass", "key.tss"):
            sign = ("dgst", *TPM, "-sha256", "-passin", "pass:word", "-sign", key)
            openssl.out("openssl", *sign, "-out", "signature", "message")
            verify = ("openssl", "dgst", "-sha256", "-verify", "pem", "-signature", "signature")
            assert b"Verified OK" in openssl.out(*verify, "message")
    finally:
        for handle in ("0x81000500", "0x81000501"):
            openssl(f"evictcontrol -Q -C o -c {handle}")


def test_random_numbers_are_the_tpm_s(openssl: Tools) -> None:
    numbers = {openssl.out("openssl", "rand", "-provider", "tpm2", "-hex", "16") for _ in range(3)}
    assert len(numbers) == 3
    openssl.environment["TPM2OPENSSL_TCTI"] = "device:/dev/null/none"
    openssl.fails("openssl", "rand", "-provider", "tpm2", "-hex", "16")
