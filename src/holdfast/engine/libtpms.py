"""The TPM itself: libtpms (API 0.9 and newer) through cffi in ABI mode.

libtpms keeps one TPM in global variables, so there is one `Engine` in a process and every call
comes from one thread (`cancel` excepted). The store callback only notes what is to be stored: an
error from it would put the TPM into failure mode for good. Whoever calls `process` commits what
was noted before the response leaves.

Not here: which commands may reach the engine (`frontend`), and where state is kept (`store`).
"""

from __future__ import annotations

import os
from enum import IntEnum
from typing import Any, Final

from holdfast.engine import libcrypto_abi, libtpms_abi
from holdfast.engine.curves import Curves
from holdfast.engine.origin import refusal
from holdfast.errors import DecodeError, HostError, IntegrityError, InvalidInput, TpmError
from holdfast.tpm2.constants import BUFFER_MAX

LIBRARY: Final = "libtpms.so.0"
LIBCRYPTO: Final = "libcrypto.so.3"  # the one libtpms is linked with
API_MIN: Final = (0, 9, 0)
# Versions with a known fault that a tenant can reach; distributions backport fixes, so a listed
# version is shown by `doctor`, not refused.
KNOWN_BAD: Final = {
    (0, 9, 0): "CVE-2023-1017, CVE-2023-1018, CVE-2025-49133 unless the distribution patched them",
    (0, 9, 1): "CVE-2023-1017, CVE-2023-1018, CVE-2025-49133 unless the distribution patched them",
    (0, 9, 2): "CVE-2023-1017, CVE-2023-1018, CVE-2025-49133 unless the distribution patched them",
    (0, 9, 6): "CVE-2025-49133 unless the distribution patched it",
    (0, 10, 0): "CVE-2025-49133, CVE-2026-21444 unless the distribution patched them",
    (0, 10, 1): "CVE-2026-21444 unless the distribution patched it",
}

_TPM2: Final = 1
_TPM_RETRY: Final = 0x800  # "there is no such state": libtpms then manufactures
_TPM_FAIL: Final = 9
_ENTROPY: Final = 64  # bytes added to the random generator beside its own poll


class StateKind(IntEnum):
    """TPMLIB_STATE_*: the two blobs a TPM 2.0 consists of."""

    PERMANENT = 1
    VOLATILE = 2


class Engine:
    """The one TPM of this process: off until `manufacture` or `restore`, and after `power_off`."""

    def __init__(self) -> None:
        self._ffi: Any = libtpms_abi.ffi
        try:
            self._lib: Any = self._ffi.dlopen(LIBRARY)
        except OSError:
            raise HostError(f"{LIBRARY} is not installed (Debian: apt install libtpms0)") from None
        version = int(self._lib.TPMLIB_GetVersion())
        self.version: Final = (version >> 16, version >> 8 & 0xFF, version & 0xFF)
        if self.version < API_MIN:
            raise HostError(f"libtpms {self.version_text} is older than 0.9.0")
        self._locality = 0
        self._noted: bytes | None = None
        self._command = self._ffi.new("unsigned char[]", BUFFER_MAX)
        self._input = self._ffi.buffer(self._command)
        self._buffer: Any = self._ffi.buffer
        self._process = self._lib.TPMLIB_Process
        self._response = self._ffi.new("unsigned char **")
        self._size = self._ffi.new("uint32_t *")
        self._capacity = self._ffi.new("uint32_t *")
        # The same three words as plain numbers: to look through cffi costs 0.1 us each.
        self._address_now = memoryview(self._ffi.buffer(self._response)).cast("B").cast("P")
        self._size_now = memoryview(self._ffi.buffer(self._size)).cast("B").cast("I")
        self._address = 0  # of libtpms' response buffer when `_output` was made
        self._output: Any = b""
        self._check(self._lib.TPMLIB_ChooseTPMVersion(_TPM2), "ChooseTPMVersion")
        self._callbacks = self._register()
        self._curves = Curves(LIBRARY.partition(".")[0])

    @property
    def version_text(self) -> str:
        return ".".join(map(str, self.version))

    @property
    def offers_profiles(self) -> bool:
        """Whether libtpms can leave out algorithms and commands of a new TPM: from 0.10 on."""
        try:
            return bool(self._lib.TPMLIB_SetProfile)
        except self._ffi.error:
            return False

    def manufacture(self, profile: str | None = None) -> None:
        """Make a new TPM with fresh seeds; its state is noted for storing.

        InvalidInput if libtpms does not take this profile (JSON), HostError if it takes none.
        """
        self._noted = None
        if self.offers_profiles:
            # NULL, so that a profile is not the next TPM's too.
            text = self._ffi.NULL if profile is None else profile.encode()
            # SAFETY: libtpms copies the NUL-terminated text before it returns.
            if self._lib.TPMLIB_SetProfile(text):
                raise InvalidInput(f"Error: Could not set profile for TPM2: '{profile}'")
        elif profile is not None:
            raise self.too_old("a profile")
        self._check(self._lib.TPMLIB_MainInit(), "MainInit")

    def restore(self, permanent: bytes, volatile: bytes | None = None) -> None:
        """Bring a TPM back: without `volatile` it is powered on and wants a Startup.

        IntegrityError if libtpms does not recognise the blobs.
        """
        blobs = [(StateKind.PERMANENT, permanent)]
        if volatile is not None:
            blobs.append((StateKind.VOLATILE, volatile))
        for kind, blob in blobs:
            self.look_at(kind, blob)
        if self._lib.TPMLIB_MainInit():
            raise IntegrityError("libtpms does not start on this state")
        self._noted = None  # MainInit stores back what it was given

    def too_old(self, what: str) -> HostError:
        """The error of who asks for what came with libtpms 0.10."""
        return HostError(f"{what} needs libtpms 0.10 or newer, and this is {self.version_text}")

    def power_off(self) -> None:
        """Forget the TPM, without a Shutdown."""
        self._lib.TPMLIB_Terminate()
        self._noted = None

    def process(self, command: bytes, locality: int = 0) -> bytes:
        """Run one command at `locality` and return the response (at most 4096 bytes).

        What the command changed durably waits in `take_noted`.
        """
        size = len(command)
        if size > BUFFER_MAX:
            raise DecodeError("TPM command", f"{size} bytes, at most {BUFFER_MAX}")
        self._locality = locality
        # libtpms decrypts parameters in the command's own buffer, so it gets a copy: whoever
        # sends a command again must send what the client authorized.
        self._input[:size] = command
        # SAFETY: the copy is BUFFER_MAX long and lives as long as we do; the response buffer is
        # libtpms' own (malloc), grown and reused between calls, copied out here.
        rc = self._process(self._response, self._size, self._capacity, self._command, size)
        if locality:
            self._locality = 0
        if rc:
            raise TpmError(rc, "TPMLIB_Process")
        if self._address != self._address_now[0]:
            self._address = self._address_now[0]
            self._output = self._buffer(self._response[0], BUFFER_MAX)
        response: bytes = self._output[: self._size_now[0]]
        return response

    def take_noted(self) -> bytes | None:
        """The permanent state that was last to be stored, once; None if nothing changed."""
        noted, self._noted = self._noted, None
        return noted

    def look_at(self, kind: StateKind, blob: bytes) -> None:
        """While off: IntegrityError, with the reason, if libtpms does not recognise a state."""
        try:
            self.set_state(kind, blob)
        except TpmError:
            raise IntegrityError(refusal(kind.name.lower(), blob, self.version)) from None

    def dump(self, kind: StateKind) -> bytes:
        """The state of the running TPM as libtpms marshals it."""
        data, length = self._ffi.new("unsigned char **"), self._ffi.new("uint32_t *")
        self._check(self._lib.TPMLIB_GetState(kind, data, length), "GetState")
        # SAFETY: the buffer is malloc'ed for us and freed once, after the copy.
        blob = bytes(self._ffi.buffer(data[0], length[0]))
        self._lib.free(data[0])
        return blob

    def late_launch(self, bundle: bytes) -> None:
        """The D-RTM sequence (Part 1, 34.3): PCR 17 becomes H(0 ‖ H(bundle)), 18-22 zero."""
        self.hash_start()
        self.hash_data(bundle)
        self.hash_end()

    def hash_start(self) -> None:
        """_TPM_Hash_Start; before TPM2_Startup it begins an H-CRTM sequence instead."""
        self._check(self._lib.TPM_IO_Hash_Start(), "Hash_Start")

    def hash_data(self, data: bytes) -> None:
        self._check(self._lib.TPM_IO_Hash_Data(data, len(data)), "Hash_Data")

    def hash_end(self) -> None:
        self._check(self._lib.TPM_IO_Hash_End(), "Hash_End")

    def established(self) -> bool:
        """TPM_ESTABLISHMENT: whether a D-RTM sequence ever ran."""
        bit = self._ffi.new("unsigned char *")
        self._check(self._lib.TPM_IO_TpmEstablished_Get(bit), "TpmEstablished_Get")
        return bool(bit[0])

    def reset_established(self, locality: int) -> None:
        """Clear TPM_ESTABLISHMENT. TpmError at a locality other than 3 and 4."""
        self._locality = locality
        try:
            self._check(self._lib.TPM_IO_TpmEstablished_Reset(), "TpmEstablished_Reset")
        finally:
            self._locality = 0

    def set_buffer_size(self, wanted: int) -> tuple[int, int, int]:
        """While off: the size set, the least and the most, in bytes; 0 only asks."""
        least, most = self._ffi.new("uint32_t *"), self._ffi.new("uint32_t *")
        return int(self._lib.TPMLIB_SetBufferSize(wanted, least, most)), least[0], most[0]

    def set_state(self, kind: StateKind, blob: bytes) -> None:
        """While off: have libtpms look at a state. TpmError if it would not go on from it."""
        # SAFETY: libtpms copies the blob before it returns.
        self._check(self._lib.TPMLIB_SetState(kind, blob, len(blob)), "SetState")

    def info(self, flags: int) -> str:
        """libtpms' JSON about itself; `flags` of TPMLIB_GetInfo."""
        text = self._lib.TPMLIB_GetInfo(flags)
        if text == self._ffi.NULL:
            return "{}"
        # SAFETY: a NUL-terminated string, malloc'ed for us and freed once, after the copy.
        copied = bytes(self._ffi.string(text)).decode("ascii", "replace")
        self._lib.free(text)
        return copied

    def cancel(self) -> None:
        """Make the running command end early; the one call meant for another thread."""
        self._lib.TPMLIB_CancelCommand()

    def _register(self) -> Any:
        """Give libtpms its callbacks; the returned objects must live as long as the library."""
        ffi = self._ffi

        def loaddata(data: Any, length: Any, _tpm: int, name: Any) -> int:
            # State comes by SetState; but manufacture reads back what it has just stored.
            if self._noted is None or ffi.string(name) != b"permall":
                return _TPM_RETRY
            # SAFETY: libtpms takes the buffer over and frees it.
            buffer = self._lib.malloc(len(self._noted))
            if buffer == ffi.NULL:
                return _TPM_FAIL
            ffi.memmove(buffer, self._noted, len(self._noted))
            data[0], length[0] = buffer, len(self._noted)
            return 0

        def storedata(data: Any, length: int, _tpm: int, name: Any) -> int:
            if ffi.string(name) == b"permall":
                self._noted = bytes(ffi.buffer(data, length))
            return 0

        def io_getlocality(locality: Any, _tpm: int) -> int:
            locality[0] = self._locality
            return 0

        def io_getphysicalpresence(presence: Any, _tpm: int) -> int:
            presence[0] = 0
            return 0

        functions = {
            "nvram_init": lambda: 0,
            "loaddata": loaddata,
            "storedata": storedata,
            "deletename": lambda _tpm, _name, _must: 0,
            "io_init": lambda: 0,
            "io_getlocality": io_getlocality,
            "io_getphysicalpresence": io_getphysicalpresence,
        }
        table = ffi.new("struct libtpms_callbacks *")
        table.sizeOfStruct = ffi.sizeof("struct libtpms_callbacks")
        keep = [table]
        fields = dict(ffi.typeof("struct libtpms_callbacks").fields)
        for name, function in functions.items():
            # A Python exception in a callback answers TPM_FAIL: failure mode, never silence.
            callback = ffi.callback(fields[name].type, function, error=_TPM_FAIL)
            setattr(table, name, callback)
            keep.append(callback)
        # SAFETY: libtpms copies the table; `keep` holds the closures it points to.
        self._check(self._lib.TPMLIB_RegisterCallbacks(table), "RegisterCallbacks")
        return keep

    @staticmethod
    def _check(rc: int, what: str) -> None:
        if rc:
            raise TpmError(int(rc), f"TPMLIB_{what}")


class Entropy:
    """The random generator of the libcrypto that libtpms uses."""

    def __init__(self) -> None:
        self._lib: Any = libcrypto_abi.ffi.dlopen(LIBCRYPTO)

    def reseed(self) -> None:
        """Seed afresh. The first act of every worker, before libtpms runs anything.

        OpenSSL notices a fork by getpid() alone, and workers that are all PID 1 of their own
        namespaces would otherwise share one random stream (measured: identical EKs).
        """
        if self._lib.RAND_poll() != 1:
            raise HostError("libcrypto cannot gather entropy")
        # SAFETY: libcrypto mixes in the bytes and keeps no pointer.
        self._lib.RAND_add(os.urandom(_ENTROPY), _ENTROPY, float(_ENTROPY))
