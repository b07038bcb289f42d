"""Numbers of TPM 2.0 Part 2 that we name: tags, handles, response codes, attributes."""

from __future__ import annotations

from enum import IntEnum, IntFlag
from typing import Final

ST_RSP_COMMAND: Final = 0x00C4
ST_NO_SESSIONS: Final = 0x8001
ST_SESSIONS: Final = 0x8002
ST_ATTEST_NV: Final = 0x8014
ST_ATTEST_QUOTE: Final = 0x8018
ST_HASHCHECK: Final = 0x8024
GENERATED_VALUE: Final = 0xFF544347  # TPM_GENERATED_VALUE, "\xffTCG"

HEADER_SIZE: Final = 10
BUFFER_MAX: Final = 4096  # libtpms' command and response buffer

PCR_COUNT: Final = 24


class Rh(IntEnum):
    """TPM_RH: permanent handles (Part 2, 7.4)."""

    OWNER = 0x40000001
    NULL = 0x40000007
    PW = 0x40000009  # TPM_RS_PW
    LOCKOUT = 0x4000000A
    ENDORSEMENT = 0x4000000B
    PLATFORM = 0x4000000C
    PLATFORM_NV = 0x4000000D


class Ht(IntEnum):
    """TPM_HT: the most significant byte of a handle (Part 2, 7.2)."""

    PCR = 0x00
    NV_INDEX = 0x01
    HMAC_SESSION = 0x02  # also "loaded session" in GetCapability
    POLICY_SESSION = 0x03  # also "saved session" in GetCapability
    PERMANENT = 0x40
    TRANSIENT = 0x80
    PERSISTENT = 0x81


class Rc(IntEnum):
    """TPM_RC (Part 2, 6.6), those we answer with or look for."""

    SUCCESS = 0x000
    BAD_TAG = 0x01E
    INITIALIZE = 0x100
    FAILURE = 0x101
    PCR_CHANGED = 0x128
    COMMAND_SIZE = 0x142
    COMMAND_CODE = 0x143
    AUTHSIZE = 0x144
    CONTEXT_GAP = 0x901
    OBJECT_MEMORY = 0x902
    SESSION_MEMORY = 0x903
    MEMORY = 0x904
    SESSION_HANDLES = 0x905
    OBJECT_HANDLES = 0x906
    LOCALITY = 0x907
    YIELDED = 0x908
    CANCELED = 0x909
    REFERENCE_H0 = 0x910
    REFERENCE_S0 = 0x918
    LOCKOUT = 0x921
    RETRY = 0x922
    NV_UNAVAILABLE = 0x923
    BAD_AUTH_1 = 0x9A2  # TPM_RC_BAD_AUTH + TPM_RC_S + TPM_RC_1: the first session's authorization
    HANDLE_P1 = 0x1CB  # TPM_RC_HANDLE + TPM_RC_P + TPM_RC_1
    SIZE_P1 = 0x1D5  # TPM_RC_SIZE + TPM_RC_P + TPM_RC_1


class Cap(IntEnum):
    """TPM_CAP (Part 2, 6.12)."""

    ALGS = 0
    HANDLES = 1
    COMMANDS = 2
    PCRS = 5
    TPM_PROPERTIES = 6


class ObjectAttr(IntFlag):
    """TPMA_OBJECT (Part 2, 8.3)."""

    FIXED_TPM = 1 << 1
    ST_CLEAR = 1 << 2
    FIXED_PARENT = 1 << 4
    SENSITIVE_DATA_ORIGIN = 1 << 5
    USER_WITH_AUTH = 1 << 6
    ADMIN_WITH_POLICY = 1 << 7
    NO_DA = 1 << 10
    ENCRYPTED_DUPLICATION = 1 << 11
    RESTRICTED = 1 << 16
    DECRYPT = 1 << 17
    SIGN = 1 << 18


class NvAttr(IntFlag):
    """TPMA_NV (Part 2, 13.4); of the index types in bits 4..7 the one that has a name here."""

    PPWRITE = 1 << 0
    OWNERWRITE = 1 << 1
    AUTHWRITE = 1 << 2
    POLICYWRITE = 1 << 3
    EXTEND = 4 << 4  # TPM_NT_EXTEND
    POLICY_DELETE = 1 << 10
    WRITELOCKED = 1 << 11
    WRITEALL = 1 << 12
    WRITEDEFINE = 1 << 13
    PPREAD = 1 << 16
    OWNERREAD = 1 << 17
    AUTHREAD = 1 << 18
    POLICYREAD = 1 << 19
    NO_DA = 1 << 25
    ORDERLY = 1 << 26
    CLEAR_STCLEAR = 1 << 27
    WRITTEN = 1 << 29
    PLATFORMCREATE = 1 << 30


MEASURED_PCRS: Final = tuple(range(16))  # of a vTPM, written by the host alone
HOST_PCRS: Final = (*range(10), 14)  # those of them that speak of the host's boot

# Where our vTPMs keep what they are made with (TCG EK Credential Profile 2.5, 2.2.1.4).
EK_RSA_HANDLE: Final = 0x81010001
EK_ECC_HANDLE: Final = 0x8101000A
AK_HANDLE: Final = 0x81800002  # in the platform half: the tenant can use it, not evict it
EK_RSA_CERT_INDEX: Final = 0x01C00002
EK_ECC_CERT_INDEX: Final = 0x01C0000A
EK_CHAIN_INDEX: Final = 0x01C00100  # first of the range for the EK certificate chain
