"""A connection to the host TPM: ESAPI over any TCTI, its errors made ours, its sessions salted."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, Final, TypeVar

os.environ.setdefault("TSS2_LOG", "all+NONE")  # read once, when the library is loaded

from tpm2_pytss import (
    ESAPI,
    ESYS_TR,
    TPM2_ALG,
    TPM2_SE,
    TPM2B_PUBLIC,
    TPMA_SESSION,
    TPMT_SYM_DEF,
    TCTILdr,
    TSS2_Exception,
)

from holdfast.errors import HostError, TpmError
from holdfast.tpm2.algorithms import Alg
from holdfast.tpm2.constants import PCR_COUNT
from holdfast.tpm2.structures import Public
from holdfast.tpm2.wire import sized

_RC_LAYER: Final = 0xFFFF0000
_RC_TPM: Final = 0xFFFF
_READ_AT_ONCE: Final = 8
_READ_TRIES: Final = 5
T = TypeVar("T")
_BOTH: Final = TPMA_SESSION.CONTINUESESSION | TPMA_SESSION.DECRYPT | TPMA_SESSION.ENCRYPT
_IN: Final = TPMA_SESSION.CONTINUESESSION | TPMA_SESSION.DECRYPT
_OUT: Final = TPMA_SESSION.CONTINUESESSION | TPMA_SESSION.ENCRYPT


class Context:
    """An open host TPM. Every failure is a TpmError (it answered) or a HostError (it did not)."""

    def __init__(self, tcti: str) -> None:
        name, _, config = tcti.partition(":")
        self.tcti = tcti
        try:
            self.esapi: Any = ESAPI(TCTILdr(name, config or None))
        except (TSS2_Exception, RuntimeError) as error:
            raise HostError(f"the host TPM cannot be reached at {tcti}: {error}") from None
        self._salt: Any = ESYS_TR.NONE
        self._session: Any = None

    def close(self) -> None:
        self.esapi.close()

    def call(self, command: str, function: Callable[[], T]) -> T:
        """Run one ESAPI call; name the command in whatever goes wrong."""
        try:
            return function()
        except TSS2_Exception as error:
            rc = int(error.rc)
            if rc & _RC_LAYER:
                raise HostError(f"the host TPM failed at {command}: {error}") from None
            raise TpmError(rc & _RC_TPM, command) from None

    def use_salt(self, handle: Any) -> None:
        """From now on sessions are salted to this decryption key."""
        self._salt = handle

    def hmac(self, attributes: TPMA_SESSION = _BOTH) -> Any:
        """The one salted, encrypting HMAC session, with these attributes."""
        if self._session is None:
            self._session = self.start(TPM2_SE.HMAC)
        self.esapi.trsess_set_attributes(self._session, attributes)
        return self._session

    def start(self, kind: TPM2_SE) -> Any:
        """Start a salted session that can encrypt parameters with AES-128-CFB."""
        symmetric = TPMT_SYM_DEF.parse("aes128cfb")
        return self.call(
            "StartAuthSession",
            lambda: self.esapi.start_auth_session(
                self._salt, ESYS_TR.NONE, kind, symmetric, TPM2_ALG.SHA256
            ),
        )

    @contextmanager
    def flushed(self, handle: Any) -> Iterator[Any]:
        """Flush a transient object or session afterwards, whatever happened."""
        try:
            yield handle
        finally:
            self.call("FlushContext", lambda: self.esapi.flush_context(handle))

    def read_pcrs(self) -> Mapping[Alg, Mapping[int, bytes]]:
        """All PCRs of all active banks, read without a change in between."""
        for _ in range(_READ_TRIES):
            values, counters = self._read_pcrs()
            if len(counters) == 1:
                return values
        raise HostError("the host TPM's PCRs change faster than they can be read")

    def _read_pcrs(self) -> tuple[dict[Alg, dict[int, bytes]], set[int]]:
        values: dict[Alg, dict[int, bytes]] = {}
        counters = set()
        for alg in (Alg.SHA1, Alg.SHA256, Alg.SHA384, Alg.SHA512):
            for start in range(0, PCR_COUNT, _READ_AT_ONCE):
                pcrs = range(start, start + _READ_AT_ONCE)
                selection = f"{alg.name.lower()}:{','.join(map(str, pcrs))}"
                counter, _, digests = self.call("PCR_Read", partial(self.esapi.pcr_read, selection))
                read = [bytes(digest) for digest in digests]
                if len(read) != _READ_AT_ONCE:
                    break  # a bank that this TPM does not have
                counters.add(counter)
                values.setdefault(alg, {}).update(zip(pcrs, read, strict=True))
        return values, counters


def preload(tcti: str) -> None:
    """Map the TCTI's library now: a process that may map no new code cannot do it later."""
    name = tcti.partition(":")[0]
    try:
        ctypes.CDLL(f"libtss2-tcti-{name}.so.0")
    except OSError:
        raise HostError(f"there is no TCTI library for {name!a} on this host") from None


def tss_public(public: Public) -> Any:
    """Our Public as tpm2-pytss' TPM2B_PUBLIC."""
    made, _ = TPM2B_PUBLIC.unmarshal(sized(public.encode()))
    return made


def own_public(made: Any) -> Public:
    """tpm2-pytss' TPM2B_PUBLIC as our Public."""
    return Public.decode(made.marshal()[2:])


ENCRYPT_BOTH: Final = _BOTH
ENCRYPT_IN: Final = _IN
ENCRYPT_OUT: Final = _OUT
