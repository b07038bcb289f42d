"""tpm2-tools: keys, and what is done with them. What the TPM makes, OpenSSL checks."""

from __future__ import annotations

import pytest

from .tools import AUTH_FAIL, BAD_AUTH, Tools

INTEGRITY = 0x3DF  # parameter 3
MESSAGE = b"what is signed"
SIGN = "fixedtpm|fixedparent|sensitivedataorigin|userwithauth|sign"


def primary(tpm: Tools) -> None:
    tpm("createprimary -Q -C o -G ecc -c primary.ctx")


def key(tpm: Tools, kind: str, name: str = "key", more: str = "") -> None:
    """A key below the primary, loaded as `name`.ctx, its public part in `name`.pem."""
    tpm(f"create -Q -C primary.ctx -G {kind} -u {name}.pub -r {name}.priv {more}")
    tpm(f"load -Q -C primary.ctx -u {name}.pub -r {name}.priv -c {name}.ctx -n {name}.name")
    if "keyedhash" not in kind and "aes" not in kind and "hmac" not in kind:
        tpm(f"readpublic -Q -c {name}.ctx -f pem -o {name}.pem")


def verified(tpm: Tools, name: str, digest: str = "sha256", *more: str) -> None:
    """OpenSSL verifies `signature` over `message` by that key, and not over another message."""
    command = ["openssl", "dgst", f"-{digest}", "-verify", f"{name}.pem", *more]
    tpm.write("other", MESSAGE + b"!")
    assert b"Verified OK" in tpm.out(*command, "-signature", "signature", "message")
    tpm.fails(*command, "-signature", "signature", "other")


PSS = ("-sigopt", "rsa_padding_mode:pss", "-sigopt", "rsa_pss_saltlen:-2")


@pytest.mark.parametrize(
    ("kind", "scheme", "digest", "more"),
    [
        ("ecc256", "ecdsa", "sha256", ()),
        ("ecc384", "ecdsa", "sha384", ()),
        ("rsa2048", "rsassa", "sha256", ()),
        ("rsa2048", "rsapss", "sha384", PSS),
    ],
    ids=["p256", "p384", "rsassa", "rsapss"],
)
def test_signatures_verify_by_openssl_and_by_the_tpm(
    tpm: Tools, kind: str, scheme: str, digest: str, more: tuple[str, ...]
) -> None:
    tpm.write("message", MESSAGE)
    primary(tpm)
    key(tpm, kind, more=f"-a '{SIGN}'")
    tpm(f"sign -Q -c key.ctx -g {digest} -s {scheme} -f plain -o signature message")
    verified(tpm, "key", digest, *more)
    tpm(f"sign -Q -c key.ctx -g {digest} -s {scheme} -o signature message")
    tpm(f"verifysignature -Q -c key.ctx -g {digest} -s signature -m message -t ticket")
    tpm.refused(0x2DB, f"verifysignature -c key.ctx -g {digest} -s signature -m other")
    tpm("print -t TPMS_CONTEXT key.ctx")
    assert tpm("print -t TPM2B_PUBLIC key.pub").strip() in tpm("readpublic -c key.ctx")


def test_a_digest_of_the_tpm_is_signed_by_a_restricted_key_and_no_other(tpm: Tools) -> None:
    """The ticket of TPM2_Hash says that the data was not made to look like an attestation."""
    tpm.write("message", MESSAGE)
    tpm.write("forged", b"\xffTCG" + MESSAGE)
    primary(tpm)
    key(tpm, "ecc256:ecdsa-sha256:null", more=f"-a '{SIGN}|restricted'")
    tpm("hash -C o -g sha256 -o digest -t ticket message")
    assert tpm.read("digest") == tpm.out("openssl", "dgst", "-sha256", "-binary", "message")
    tpm("sign -Q -c key.ctx -g sha256 -f plain -o signature -d -t ticket digest")
    verified(tpm, "key")
    tpm("hash -Q -C o -g sha256 -o digest -t ticket forged")
    tpm.refused(0x3E0, "sign -c key.ctx -g sha256 -o signature -d -t ticket digest")
    assert (
        tpm("hash -g sha1 --hex message")
        == tpm.out("openssl", "dgst", "-r", "-sha1", "message").decode().split(" ", maxsplit=1)[0]
    )


def test_rsa_decrypts_what_was_encrypted_outside_and_inside(tpm: Tools) -> None:
    tpm.write("message", MESSAGE)
    primary(tpm)
    key(tpm, "rsa2048", more="-p word")
    for scheme, more in (
        ("rsaes", ()),
        ("oaep", ("-pkeyopt", "rsa_padding_mode:oaep", "-pkeyopt", "rsa_oaep_md:sha256")),
    ):
        public = ("openssl", "pkeyutl", "-encrypt", "-pubin", "-inkey", "key.pem")
        tpm.out(*public, *more, "-in", "message", "-out", "cipher")
        assert tpm.data(f"rsadecrypt -c key.ctx -p word -s {scheme} cipher") == MESSAGE
        tpm(f"rsaencrypt -Q -c key.ctx -s {scheme} -o cipher message")
        assert tpm.data(f"rsadecrypt -c key.ctx -p word -s {scheme} cipher") == MESSAGE
    tpm.refused(AUTH_FAIL, "rsadecrypt -c key.ctx -p wrong cipher")
    tpm("dictionarylockout -c")


@pytest.mark.parametrize("mode", ["cfb", "cbc", "ofb", "ctr"])
def test_aes_in_the_tpm_is_aes(tpm: Tools, mode: str) -> None:
    secret, iv = bytes(range(16)), bytes(range(16, 32))
    tpm.write("secret", secret)
    tpm.write("iv", iv)
    tpm.write("message", MESSAGE + bytes(18))
    primary(tpm)
    tpm(f"import -Q -C primary.ctx -G aes128{mode} -i secret -u key.pub -r key.priv")
    tpm("load -Q -C primary.ctx -u key.pub -r key.priv -c key.ctx")
    tpm(f"encryptdecrypt -Q -c key.ctx -G {mode} -t iv -o cipher message")
    openssl = ("openssl", "enc", f"-aes-128-{mode}", "-K", secret.hex(), "-iv", iv.hex())
    theirs = tpm.out(*openssl, "-nopad", "-in", "message")
    assert tpm.read("cipher") == theirs
    tpm(f"encryptdecrypt -Q -d -c key.ctx -G {mode} -t iv -o plain cipher")
    assert tpm.read("plain") == tpm.read("message")


def test_an_hmac_of_the_tpm_is_openssl_s(tpm: Tools) -> None:
    tpm.write("secret", b"k" * 32)
    tpm.write("message", MESSAGE * 200)  # a sequence: more than one buffer
    primary(tpm)
    tpm("import -Q -C primary.ctx -G hmac -g sha256 -i secret -u key.pub -r key.priv")
    tpm("load -Q -C primary.ctx -u key.pub -r key.priv -c key.ctx")
    openssl = ("openssl", "dgst", "-sha256", "-mac", "HMAC", "-macopt", f"key:{'k' * 32}", "-r")
    assert (
        tpm("hmac -c key.ctx --hex message")
        == (tpm.out(*openssl, "message").decode().split(" ", maxsplit=1)[0])
    )


def test_a_shared_secret_is_the_same_on_both_sides(tpm: Tools) -> None:
    primary(tpm)
    key(tpm, "ecc256:ecdh", "ours")
    tpm("ecdhkeygen -u point -o secret -c ours.ctx")
    tpm("ecdhzgen -c ours.ctx -u point -o again")
    assert tpm.read("secret") == tpm.read("again")
    # With a key of OpenSSL's: its derivation is the x coordinate of ours.
    tpm.out("openssl", "ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", "theirs")
    text = tpm.out("openssl", "ec", "-in", "theirs", "-pubout", "-outform", "DER")
    x, y = text[-64:-32], text[-32:]
    tpm.write("point", b"\0\x44\0\x20" + x + b"\0\x20" + y)
    tpm("ecdhzgen -c ours.ctx -u point -o secret")
    derive = ("openssl", "pkeyutl", "-derive", "-inkey", "theirs", "-peerkey", "ours.pem")
    assert tpm.read("secret")[4:36] == tpm.out(*derive)


def test_two_phase_key_exchange_and_commitments(tpm: Tools) -> None:
    primary(tpm)
    key(tpm, "ecc256:ecdh", more="-p word")
    tpm("ecdhkeygen -u static.point -o static.secret -c key.ctx")
    tpm("ecephemeral -u own.point -t counter ecc256")
    tpm("ecdhkeygen -u peer.point -o peer.secret -c key.ctx")
    counter = int.from_bytes(tpm.read("counter"), "big")
    tpm(
        "zgen2phase -c key.ctx -p word --static-public static.point --ephemeral-public peer.point"
        f" --output-Z1 z1 --output-Z2 z2 -t {counter}"
    )
    assert tpm.read("z1") == tpm.read("static.secret")  # the static part, with the same key
    assert tpm.read("z2") != tpm.read("z1")
    tpm("create -Q -C primary.ctx -G ecc:ecdaa -u da.pub -r da.priv")
    tpm("load -Q -C primary.ctx -u da.pub -r da.priv -c da.ctx")
    tpm("commit -Q -c da.ctx -u E -t counter")
    assert len(tpm.read("E")) > 60
    tpm.write("message", MESSAGE)
    index = int.from_bytes(tpm.read("counter"), "big")
    sign = f"sign -Q -c da.ctx -g sha256 -s ecdaa --commit-index {index} -o signature message"
    tpm(sign)
    tpm.refused(0x084, sign)  # a commitment is used once
    tpm("geteccparameters -o parameters ecc256")
    assert bytes.fromhex("5ac635d8aa3a93e7b3ebbd55769886bc") in tpm.read("parameters")  # its b


def test_a_key_is_made_persistent_and_its_password_is_changed(tpm: Tools) -> None:
    primary(tpm)
    key(tpm, "ecc256", more="-p before")
    tpm("changeauth -Q -C primary.ctx -c key.ctx -p before -r new.priv after")
    tpm("load -Q -C primary.ctx -u key.pub -r new.priv -c new.ctx")
    tpm("evictcontrol -Q -C o -c new.ctx 0x81000123")
    tpm.write("message", MESSAGE)
    tpm.refused(AUTH_FAIL, "sign -c 0x81000123 -p before -o signature message")
    tpm("sign -Q -c 0x81000123 -p after -g sha256 -f plain -o signature message")
    verified(tpm, "key")
    tpm("evictcontrol -Q -C o -c 0x81000123")
    tpm.refused(0x18B, "readpublic -c 0x81000123")
    tpm("dictionarylockout -c")


def test_the_owner_s_password_is_changed_and_asked_for(tpm: Tools) -> None:
    tpm("changeauth -c o word")
    tpm.refused(BAD_AUTH, "createprimary -C o -G ecc -c primary.ctx")
    tpm("createprimary -Q -C o -P word -G ecc -c primary.ctx")
    tpm("changeauth -c o -p word")
    primary(tpm)


def test_a_key_of_outside_is_loaded_and_imported(tpm: Tools) -> None:
    tpm.write("message", MESSAGE)
    tpm.out("openssl", "genrsa", "-out", "key.private", "2048")
    tpm.out("openssl", "rsa", "-in", "key.private", "-pubout", "-out", "key.pem")
    sign = ("openssl", "dgst", "-sha256", "-sign", "key.private", "-out", "signature", "message")
    tpm.out(*sign)
    tpm("loadexternal -Q -C n -G rsa -u key.pem -c external.ctx")
    tpm("verifysignature -c external.ctx -g sha256 -f rsassa -s signature -m message")
    tpm("loadexternal -Q -C n -G rsa -r key.private -c external.ctx")
    tpm("sign -Q -c external.ctx -g sha256 -s rsassa -f plain -o signature message")
    verified(tpm, "key")
    primary(tpm)
    tpm("import -Q -C primary.ctx -G rsa -i key.private -u key.pub -r key.priv -p word")
    tpm("load -Q -C primary.ctx -u key.pub -r key.priv -c key.ctx")
    tpm("sign -Q -c key.ctx -p word -g sha256 -s rsassa -f plain -o signature message")
    verified(tpm, "key")


@pytest.mark.parametrize("wrapper", ["null", "aes"])
def test_a_key_is_duplicated_to_another_parent(tpm: Tools, wrapper: str) -> None:
    primary(tpm)
    tpm("createprimary -Q -C o -G rsa -c other.ctx")
    tpm("readpublic -Q -c other.ctx -o other.pub")
    tpm("startauthsession -Q -S session")
    tpm("policycommandcode -Q -S session -L policy TPM2_CC_Duplicate")
    tpm("flushcontext session")
    key(tpm, "ecc256", more="-L policy -a 'sensitivedataorigin|userwithauth|sign'")
    tpm("startauthsession -Q --policy-session -S session")
    tpm("policycommandcode -Q -S session TPM2_CC_Duplicate")
    keys = "-G null" if wrapper == "null" else "-G aes -o inner"
    tpm(f"duplicate -Q -C other.ctx -c key.ctx {keys} -p session:session -r dup.priv -s dup.seed")
    tpm("flushcontext session")
    inner = "" if wrapper == "null" else "-k inner"
    tpm(
        f"import -Q -C other.ctx -u key.pub -i dup.priv -r moved.priv -s dup.seed {inner} -L policy"
    )
    tpm("load -Q -C other.ctx -u key.pub -r moved.priv -c moved.ctx")
    tpm.write("message", MESSAGE)
    tpm("sign -Q -c moved.ctx -g sha256 -f plain -o signature message")
    verified(tpm, "key")
    changed = bytearray(tpm.read("dup.priv"))
    changed[-1] ^= 1
    tpm.write("dup.priv", bytes(changed))
    tpm.refused(
        INTEGRITY,
        f"import -C other.ctx -u key.pub -i dup.priv -r m.priv -s dup.seed {inner} -L policy",
    )


def test_a_key_as_pem_file_is_written_for_openssl(tpm: Tools) -> None:
    primary(tpm)
    tpm("evictcontrol -Q -C o -c primary.ctx 0x81000124")
    tpm("create -Q -C 0x81000124 -G ecc -u key.pub -r key.priv")
    tpm("encodeobject -C 0x81000124 -u key.pub -r key.priv -o key.tss")
    tpm("evictcontrol -Q -C o -c 0x81000124")
    assert tpm.read("key.tss").startswith(b"-----BEGIN TSS2 PRIVATE KEY-----")
    tree = tpm.out("openssl", "asn1parse", "-in", "key.tss").decode()
    assert "2.23.133.10.1.3" in tree  # TCG's loadable key
    private = tpm.read("key.priv").hex().upper()
    assert private in tree
