"""Every TPM 2.0 command as one row: code, name, handles (Part 3; TPMA_CC, Part 2, 8.9).

The table is the only place that knows how many handles a command takes; filter, resource
manager and tests iterate it. A test compares it with what the engine itself reports.
Vendor commands and reserved bits are not in it: what is not in the table does not exist.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum
from typing import Final, NamedTuple


class Cc(IntEnum):
    """TPM_CC (Part 2, 6.5.2)."""

    NV_UndefineSpaceSpecial = 0x11F
    EvictControl = 0x120
    HierarchyControl = 0x121
    NV_UndefineSpace = 0x122
    ChangeEPS = 0x124
    ChangePPS = 0x125
    Clear = 0x126
    ClearControl = 0x127
    ClockSet = 0x128
    HierarchyChangeAuth = 0x129
    NV_DefineSpace = 0x12A
    PCR_Allocate = 0x12B
    PCR_SetAuthPolicy = 0x12C
    PP_Commands = 0x12D
    SetPrimaryPolicy = 0x12E
    FieldUpgradeStart = 0x12F
    ClockRateAdjust = 0x130
    CreatePrimary = 0x131
    NV_GlobalWriteLock = 0x132
    GetCommandAuditDigest = 0x133
    NV_Increment = 0x134
    NV_SetBits = 0x135
    NV_Extend = 0x136
    NV_Write = 0x137
    NV_WriteLock = 0x138
    DictionaryAttackLockReset = 0x139
    DictionaryAttackParameters = 0x13A
    NV_ChangeAuth = 0x13B
    PCR_Event = 0x13C
    PCR_Reset = 0x13D
    SequenceComplete = 0x13E
    SetAlgorithmSet = 0x13F
    SetCommandCodeAuditStatus = 0x140
    FieldUpgradeData = 0x141
    IncrementalSelfTest = 0x142
    SelfTest = 0x143
    Startup = 0x144
    Shutdown = 0x145
    StirRandom = 0x146
    ActivateCredential = 0x147
    Certify = 0x148
    PolicyNV = 0x149
    CertifyCreation = 0x14A
    Duplicate = 0x14B
    GetTime = 0x14C
    GetSessionAuditDigest = 0x14D
    NV_Read = 0x14E
    NV_ReadLock = 0x14F
    ObjectChangeAuth = 0x150
    PolicySecret = 0x151
    Rewrap = 0x152
    Create = 0x153
    ECDH_ZGen = 0x154
    HMAC = 0x155
    Import = 0x156
    Load = 0x157
    Quote = 0x158
    RSA_Decrypt = 0x159
    HMAC_Start = 0x15B
    SequenceUpdate = 0x15C
    Sign = 0x15D
    Unseal = 0x15E
    PolicySigned = 0x160
    ContextLoad = 0x161
    ContextSave = 0x162
    ECDH_KeyGen = 0x163
    EncryptDecrypt = 0x164
    FlushContext = 0x165
    LoadExternal = 0x167
    MakeCredential = 0x168
    NV_ReadPublic = 0x169
    PolicyAuthorize = 0x16A
    PolicyAuthValue = 0x16B
    PolicyCommandCode = 0x16C
    PolicyCounterTimer = 0x16D
    PolicyCpHash = 0x16E
    PolicyLocality = 0x16F
    PolicyNameHash = 0x170
    PolicyOR = 0x171
    PolicyTicket = 0x172
    ReadPublic = 0x173
    RSA_Encrypt = 0x174
    StartAuthSession = 0x176
    VerifySignature = 0x177
    ECC_Parameters = 0x178
    FirmwareRead = 0x179
    GetCapability = 0x17A
    GetRandom = 0x17B
    GetTestResult = 0x17C
    Hash = 0x17D
    PCR_Read = 0x17E
    PolicyPCR = 0x17F
    PolicyRestart = 0x180
    ReadClock = 0x181
    PCR_Extend = 0x182
    PCR_SetAuthValue = 0x183
    NV_Certify = 0x184
    EventSequenceComplete = 0x185
    HashSequenceStart = 0x186
    PolicyPhysicalPresence = 0x187
    PolicyDuplicationSelect = 0x188
    PolicyGetDigest = 0x189
    TestParms = 0x18A
    Commit = 0x18B
    PolicyPassword = 0x18C
    ZGen_2Phase = 0x18D
    EC_Ephemeral = 0x18E
    PolicyNvWritten = 0x18F
    PolicyTemplate = 0x190
    CreateLoaded = 0x191
    PolicyAuthorizeNV = 0x192
    EncryptDecrypt2 = 0x193
    AC_GetCapability = 0x194
    AC_Send = 0x195
    Policy_AC_SendSelect = 0x196
    CertifyX509 = 0x197
    ACT_SetTimeout = 0x198


class Shape(NamedTuple):
    """How many handles stand in a command's handle area, and whether its response returns one."""

    handles: int
    returns_handle: bool


_NO_HANDLE: Final = (
    Cc.FieldUpgradeData, Cc.IncrementalSelfTest, Cc.SelfTest, Cc.Startup, Cc.Shutdown,
    Cc.StirRandom, Cc.FlushContext, Cc.ECC_Parameters, Cc.FirmwareRead, Cc.GetCapability,
    Cc.GetRandom, Cc.GetTestResult, Cc.Hash, Cc.PCR_Read, Cc.ReadClock, Cc.TestParms,
    Cc.EC_Ephemeral, Cc.ContextLoad, Cc.LoadExternal, Cc.HashSequenceStart,
)  # fmt: skip
_TWO_HANDLES: Final = (
    Cc.NV_UndefineSpaceSpecial, Cc.EvictControl, Cc.NV_UndefineSpace, Cc.FieldUpgradeStart,
    Cc.GetCommandAuditDigest, Cc.NV_Increment, Cc.NV_SetBits, Cc.NV_Extend, Cc.NV_Write,
    Cc.NV_WriteLock, Cc.ActivateCredential, Cc.Certify, Cc.CertifyCreation, Cc.Duplicate,
    Cc.GetTime, Cc.NV_Read, Cc.NV_ReadLock, Cc.ObjectChangeAuth, Cc.PolicySecret, Cc.Rewrap,
    Cc.PolicySigned, Cc.StartAuthSession, Cc.EventSequenceComplete, Cc.CertifyX509,
)  # fmt: skip
_THREE_HANDLES: Final = (
    Cc.PolicyNV, Cc.GetSessionAuditDigest, Cc.NV_Certify, Cc.PolicyAuthorizeNV, Cc.AC_Send,
)  # fmt: skip
_RETURNS_HANDLE: Final = (
    Cc.CreatePrimary, Cc.Load, Cc.HMAC_Start, Cc.ContextLoad, Cc.LoadExternal,
    Cc.StartAuthSession, Cc.HashSequenceStart, Cc.CreateLoaded,
)  # fmt: skip


def _handle_count(code: Cc) -> int:
    if code in _NO_HANDLE:
        return 0
    if code in _TWO_HANDLES:
        return 2
    return 3 if code in _THREE_HANDLES else 1


SHAPES: Final[Mapping[int, Shape]] = {
    int(code): Shape(_handle_count(code), code in _RETURNS_HANDLE) for code in Cc
}
