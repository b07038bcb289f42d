"""What is sealed in a host's TPM, and approving its present boot state."""

from __future__ import annotations

from holdfast.hwtpm.host import Approval, Blob, HostTpm
from holdfast.hwtpm.policy import RecoverySigner, approved_policy
from holdfast.tpm2.algorithms import Alg

UNIQUE = bytes(range(32))
AUTH = b"\x11" * 32
PCRS = (0, 7)
SECRET = bytes(range(32, 64))


def unsealed(tpm: HostTpm, blob: Blob) -> bytes:
    """What is sealed in a blob, of at most 128 bytes."""
    room = bytearray(128 + 15)
    return bytes(room[: tpm.unseal(blob, room)])


def approve_now(tpm: HostTpm, signer: RecoverySigner, version: int) -> Approval:
    bank = tpm.read_pcrs()[Alg.SHA256]
    values = {pcr: bank[pcr] for pcr in PCRS}
    signature = signer.approve(approved_policy(values, version, tpm.index.name))
    return Approval(version, values, signature)
