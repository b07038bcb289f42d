"""A pytest fixture: `holdfast_tpm`, the TCTI of a TPM 2.0 of the test's own.

def test_seal(holdfast_tpm):
    ESAPI(holdfast_tpm)
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from holdfast.cli.tpm import plain_tpm


@pytest.fixture
def holdfast_tpm() -> Iterator[str]:
    """TCTI string of a throw-away TPM; it needs no root, and is gone with the test."""
    with plain_tpm() as sock:
        yield f"swtpm:path={sock}"
