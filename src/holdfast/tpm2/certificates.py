"""What X.509 certificates of TPMs have in common, whoever issues them."""

from __future__ import annotations

import datetime
from typing import Final

from cryptography import x509

FOREVER: Final = datetime.datetime(9999, 12, 31, 23, 59, 59, tzinfo=datetime.UTC)  # RFC 5280
CN_MAX: Final = 64  # ub-common-name, ub-organization-name (RFC 5280, appendix A.1)


def key_usage(**wanted: bool) -> x509.KeyUsage:
    """These usages, by `x509.KeyUsage`'s names, and no others."""
    names = (
        "digital_signature", "content_commitment", "key_encipherment", "data_encipherment",
        "key_agreement", "key_cert_sign", "crl_sign", "encipher_only", "decipher_only",
    )  # fmt: skip
    return x509.KeyUsage(**{name: wanted.get(name, False) for name in names})
