"""Small PE images for tests: what a linker would make, byte by byte."""

from __future__ import annotations

import datetime
import struct

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, pkcs7

HEADERS = 0x400
CHECKSUM_AT = 0x80 + 24 + 64


def image(
    sections: dict[str, bytes], *, tail: bytes = b"", signature: bytes = b"", magic: int = 0x20B,
    directories: int = 16,
) -> bytes:  # fmt: skip
    """A PE32+ (or by `magic` PE32) image with these sections, one after the other."""
    body, table = b"", b""
    for name, content in sections.items():
        table += struct.pack(
            "<8sIIII16x", name.encode(), len(content), 0x1000, len(content), HEADERS + len(body)
        )
        body += content
    body += tail
    certificates = b""
    if signature:
        body += bytes(-(HEADERS + len(body)) % 8)
        whole = struct.pack("<IHH", 8 + len(signature), 0x200, 2) + signature
        certificates = whole + bytes(-len(whole) % 8)
    entries = bytearray(8 * directories)
    if certificates:
        struct.pack_into("<II", entries, 32, HEADERS + len(body), len(certificates))
    before = 112 if magic == 0x20B else 96
    optional = bytearray(before)
    struct.pack_into("<H", optional, 0, magic)
    struct.pack_into("<I", optional, 60, HEADERS)
    struct.pack_into("<I", optional, 64, 0xDEADBEEF)
    struct.pack_into("<I", optional, before - 4, directories)
    coff = struct.pack("<HHIIIHH", 0x8664, len(sections), 0, 0, 0, before + len(entries), 0x22E)
    head = b"MZ".ljust(0x3C, b"\0") + struct.pack("<I", 0x80)
    head = head.ljust(0x80, b"\0") + b"PE\0\0" + coff + optional + entries + table
    return head.ljust(HEADERS, b"\0") + body + certificates


def signature(issuer: str) -> bytes:
    """A PKCS #7 signature, of nothing that matters, by a certificate that `issuer` has issued."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, issuer)])
    now = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "signer")]))
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now)
        .not_valid_after(now + datetime.timedelta(days=1))
        .sign(key, hashes.SHA256())
    )
    builder = pkcs7.PKCS7SignatureBuilder().set_data(b"x").add_signer(made, key, hashes.SHA256())
    return builder.sign(Encoding.DER, [pkcs7.PKCS7Options.Binary])
