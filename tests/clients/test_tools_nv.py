"""tpm2-tools: NV indices of every kind."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

from .tools import AUTH_FAIL, Tools

INDEX = "0x1500200"
OPEN = "ownerread|ownerwrite|authread|authwrite"
LOCKED = 0x148  # TPM_RC_NV_LOCKED
ATTRIBUTES = 0x082  # TPM_RC_ATTRIBUTES
AUTHORIZATION = 0x149  # TPM_RC_NV_AUTHORIZATION
UNINITIALIZED = 0x14A  # TPM_RC_NV_UNINITIALIZED


@contextmanager
def index(tpm: Tools, more: str) -> Iterator[None]:
    tpm(f"nvdefine -Q {INDEX} -C o {more}")
    try:
        yield
    finally:
        tpm(f"nvundefine -Q {INDEX} -C o")
        assert INDEX not in tpm("getcap handles-nv-index")


def test_what_is_written_comes_back(tpm: Tools) -> None:
    data = bytes(range(256)) * 8  # more than one command takes
    with index(tpm, f"-s 2048 -a '{OPEN}' -p word"):
        tpm.refused(UNINITIALIZED, f"nvread {INDEX} -C o")
        tpm(f"nvwrite -Q {INDEX} -C o -i -", data)
        assert tpm.data(f"nvread {INDEX} -C o") == data
        assert tpm.data(f"nvread {INDEX} -C {INDEX} -P word -s 3 --offset 100") == data[100:103]
        tpm(f"nvwrite -Q {INDEX} -C {INDEX} -P word --offset 2046 -i -", b"!!")
        assert tpm.data(f"nvread {INDEX} -C o") == data[:-2] + b"!!"
        tpm.refused(AUTH_FAIL, f"nvread {INDEX} -C {INDEX} -P wrong")
        assert "size: 2048" in tpm(f"nvreadpublic {INDEX}")
        assert INDEX in tpm("getcap handles-nv-index")
    tpm("dictionarylockout -c")


def test_a_counter_counts_up_only(tpm: Tools) -> None:
    with index(tpm, f"-a 'nt=counter|{OPEN}'"):
        tpm(f"nvincrement -Q {INDEX} -C o")
        first = int.from_bytes(tpm.data(f"nvread {INDEX} -C o"), "big")
        for _ in range(3):
            tpm(f"nvincrement -Q {INDEX} -C o")
        assert int.from_bytes(tpm.data(f"nvread {INDEX} -C o"), "big") == first + 3
        tpm.refused(ATTRIBUTES, f"nvwrite {INDEX} -C o -i -", bytes(8))


def test_bits_are_set_and_stay(tpm: Tools) -> None:
    with index(tpm, f"-a 'nt=bits|{OPEN}'"):
        tpm(f"nvsetbits -Q {INDEX} -C o -i 0x0101")
        tpm(f"nvsetbits -Q {INDEX} -C o -i 0x8000000000000000")
        assert tpm.data(f"nvread {INDEX} -C o") == bytes.fromhex("8000000000000101")


def test_an_extend_index_is_a_hash_chain(tpm: Tools) -> None:
    with index(tpm, f"-g sha256 -a 'nt=extend|{OPEN}'"):
        value = bytes(32)
        for data in (b"one", b"two"):
            tpm(f"nvextend -Q {INDEX} -C o -i -", data)
            value = hashlib.sha256(value + data).digest()
            assert tpm.data(f"nvread {INDEX} -C o") == value


def test_locks_hold(tpm: Tools) -> None:
    with index(tpm, f"-s 4 -a '{OPEN}|writedefine|read_stclear'"):
        tpm(f"nvwrite -Q {INDEX} -C o -i -", b"last")
        tpm(f"nvwritelock -Q {INDEX} -C o")
        tpm.refused(LOCKED, f"nvwrite {INDEX} -C o -i -", b"more")
        assert tpm.data(f"nvread {INDEX} -C o") == b"last"
        tpm(f"nvreadlock -Q {INDEX} -C o")
        tpm.refused(LOCKED, f"nvread {INDEX} -C o")


def test_the_contents_of_an_index_are_certified(tpm: Tools) -> None:
    tpm("createprimary -Q -C o -G ecc -c primary.ctx")
    tpm(
        "create -Q -C primary.ctx -G ecc256:ecdsa-sha256:null -u ak.pub -r ak.priv"
        " -a 'fixedtpm|fixedparent|sensitivedataorigin|userwithauth|restricted|sign'"
    )
    tpm("load -Q -C primary.ctx -u ak.pub -r ak.priv -c ak.ctx")
    tpm("readpublic -Q -c ak.ctx -f pem -o ak.pem")
    with index(tpm, f"-s 9 -a '{OPEN}'"):
        tpm(f"nvwrite -Q {INDEX} -C o -i -", b"certified")
        tpm(
            f"nvcertify -C ak.ctx -c o -g sha256 -f plain -o signature -q c0ffee --size 9"
            f" --offset 0 --attestation message {INDEX}"
        )
    message = tpm.read("message")
    assert message.endswith(b"certified")
    assert b"\x00\x03\xc0\xff\xee" in message
    verify = ("openssl", "dgst", "-sha256", "-verify", "ak.pem", "-signature", "signature")
    assert b"Verified OK" in tpm.out(*verify, "message")


def test_the_certificates_in_nv_are_a_tenant_s_to_read_and_not_to_change(tpm: Tools) -> None:
    for handle, kind in (("0x1C00002", b"rsaEncryption"), ("0x1C0000A", b"id-ecPublicKey")):
        tpm.write("cert", tpm.data(f"nvread {handle} -C o"))
        text = tpm.out("openssl", "x509", "-inform", "DER", "-in", "cert", "-noout", "-text")
        assert kind in text
        tpm.refused(AUTHORIZATION, f"nvundefine {handle} -C o")
        tpm.refused(LOCKED, f"nvwrite {handle} -C o -i cert")
