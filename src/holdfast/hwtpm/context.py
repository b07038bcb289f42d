"""One ESAPI context on the host TPM: its errors made ours, sessions salted, nothing left behind.

Whatever is transient in the TPM belongs to the context that is open: it starts by flushing what a
killed predecessor left (a TPM without a resource manager has three slots), and ends by flushing
its own. Behind a resource manager a context sees, and flushes, its own objects alone.

Not here: the bytes on the wire (`transport`), and what our objects are (`host`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, Final, TypeVar

from tpm2_pytss import (
    ESAPI,
    ESYS_TR,
    TPM2_ALG,
    TPM2_SE,
    TPM2B_PUBLIC,
    TPMA_SESSION,
    TPMT_SIGNATURE,
    TPMT_SYM_DEF,
    TSS2_Exception,
)

from holdfast.errors import DecodeError, HoldfastError, HostError, TpmError
from holdfast.hwtpm.policy import Signature
from holdfast.hwtpm.transport import Transport
from holdfast.tpm2 import requests as rq
from holdfast.tpm2.algorithms import Alg
from holdfast.tpm2.commands import Cc
from holdfast.tpm2.constants import PCR_COUNT, Cap, Ht
from holdfast.tpm2.structures import Public
from holdfast.tpm2.wire import sized

HANDLES_MAX: Final = 64  # transient objects or sessions looked for at once
ENCRYPT_BOTH: Final = TPMA_SESSION.CONTINUESESSION | TPMA_SESSION.DECRYPT | TPMA_SESSION.ENCRYPT
ENCRYPT_IN: Final = TPMA_SESSION.CONTINUESESSION | TPMA_SESSION.DECRYPT
BANKS: Final = (Alg.SHA1, Alg.SHA256, Alg.SHA384, Alg.SHA512)
_RC_LAYER: Final = 0xFFFF0000
_RC_TPM: Final = 0xFFFF
_READ_AT_ONCE: Final = 8
_READ_TRIES: Final = 5
T = TypeVar("T")


class Context:
    """An open host TPM. Every failure is a TpmError (it answered) or a HostError (it did not)."""

    def __init__(self, transport: Transport, *, alone: bool = True) -> None:
        """Take the TPM; HostError when it does not answer.

        `alone`: nobody else of ours uses it, so what is in it is a dead predecessor's.
        """
        self.tcti = transport.tcti
        self._transport = transport
        self._tcti = transport.attach()
        self._broken = False
        self._salt: Any = ESYS_TR.NONE
        self._session: Any = None
        self._others: frozenset[int] = frozenset()
        try:
            if alone:
                self._flush_all()
            else:
                self._others = frozenset(self._there())
        except TpmError as error:
            raise HostError(
                f"the host TPM at {self.tcti} is not ready (0x{error.rc:x} at {error.command})"
            ) from None
        self.esapi: Any = self.call("Esys_Initialize", lambda: ESAPI(self._tcti))

    def close(self) -> None:
        """Leave nothing of ours in the TPM; never raises. The transport stays open."""
        if not self._broken:
            with suppress(HoldfastError):
                self._flush_all()
        self.esapi.close()

    def call(self, command: str, function: Callable[[], T]) -> T:
        """Run one ESAPI call; name the command in whatever goes wrong."""
        if self._broken:  # a second wait would be as long as the first
            raise HostError(f"the host TPM at {self.tcti} has failed before")
        try:
            return function()
        except TSS2_Exception as error:
            rc = int(error.rc)
            if rc & _RC_LAYER:
                self._broken = True
                why = getattr(self._tcti, "failure", "") or str(error)
                raise HostError(f"the host TPM at {self.tcti} failed at {command}: {why}") from None
            raise TpmError(rc & _RC_TPM, command) from None

    def use_salt(self, handle: Any) -> None:
        """From now on sessions are salted to this decryption key."""
        self._salt = handle
        if self._session is not None:
            session, self._session = self._session, None
            self.flush(session)

    def hmac(self, attributes: TPMA_SESSION = ENCRYPT_BOTH) -> Any:
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

    def flush(self, handle: Any) -> None:
        """Remove a transient object or session from the TPM."""
        self.call("FlushContext", lambda: self.esapi.flush_context(handle))

    @contextmanager
    def flushed(self, handle: Any) -> Iterator[Any]:
        """Flush a transient object or session afterwards, unless the TPM is gone by then."""
        try:
            yield handle
        finally:
            if not self._broken:
                self.flush(handle)

    def read_pcrs(self, banks: Sequence[Alg] = BANKS) -> Mapping[Alg, Mapping[int, bytes]]:
        """All PCRs of those of `banks` that are active, read without a change in between."""
        for _ in range(_READ_TRIES):
            values, counters = self._read_pcrs(banks)
            if len(counters) == 1:
                return values
        raise HostError("the host TPM's PCRs change faster than they can be read")

    def _read_pcrs(self, banks: Sequence[Alg]) -> tuple[dict[Alg, dict[int, bytes]], set[int]]:
        values: dict[Alg, dict[int, bytes]] = {}
        counters = set()
        for alg in banks:
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

    def load_external(self, public: Public) -> Any:
        """Load a public key that is not this TPM's."""
        # In a hierarchy of the TPM's own: a ticket of the NULL hierarchy is an empty one.
        return self.call(
            "LoadExternal",
            lambda: self.esapi.load_external(tss_public(public), hierarchy=ESYS_TR.OWNER),
        )

    def _there(self) -> tuple[int, ...]:
        """Every transient object and loaded session that can be seen."""
        return self.handles(Ht.TRANSIENT << 24) + self.handles(Ht.HMAC_SESSION << 24)

    def _flush_all(self) -> None:
        """Flush all that is there and not others'."""
        for handle in self._there():
            if handle not in self._others:
                with suppress(TpmError):
                    self.raw(Cc.FlushContext, rq.flush_context(handle))

    def handles(self, first: int) -> tuple[int, ...]:
        """Handles of the kind of `first`, from it on (TPML_HANDLE; Part 2, 10.9.3)."""
        query = rq.get_capability(Cap.HANDLES, first, HANDLES_MAX)
        with self.reading():
            params = self.raw(Cc.GetCapability, query).params
            params.take(1 + 4)  # moreData, capability
            count = params.u32()
            if count > HANDLES_MAX:
                raise params.fail(f"{count} handles, at most {HANDLES_MAX} were asked for")
            return tuple(params.u32() for _ in range(count))

    @contextmanager
    def reading(self) -> Iterator[None]:
        """While a response is read: one that does not decode is no TPM's, and a HostError."""
        try:
            yield
        except DecodeError as error:
            self._broken = True
            raise HostError(f"what answers at {self.tcti} is no TPM: {error}") from None

    def raw(self, code: Cc, command: bytes) -> rq.Response:
        """A command past ESAPI."""

        def exchange() -> bytes:
            self._tcti.transmit(command)
            return bytes(self._tcti.receive())

        answer = self.call(code.name, exchange)
        with self.reading():
            return rq.response(code, answer)


def tss_public(public: Public) -> Any:
    """Our Public as tpm2-pytss' TPM2B_PUBLIC."""
    made, _ = TPM2B_PUBLIC.unmarshal(sized(public.encode()))
    return made


def own_public(made: Any) -> Public:
    """tpm2-pytss' TPM2B_PUBLIC as our Public."""
    return Public.decode(made.marshal()[2:])


def tss_signature(signature: Signature) -> Any:
    """Our signature as tpm2-pytss' TPMT_SIGNATURE."""
    return TPMT_SIGNATURE.unmarshal(signature.encode())[0]
