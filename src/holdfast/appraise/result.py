"""What an appraisal established: `AttestedContainer`, in plain words, as EAR claims, as a JWT.

Only `verifier` can make an `AttestedContainer`: whoever holds one need not check anything again.

EAR is draft-ietf-rats-ear-04 with submodules `host` and `container`; the trustworthiness vectors
are AR4SI's. A claim is made only for what was checked against a reference value; what nobody
constrained is left out, which AR4SI reads as "no claim". Nothing is said of `runtime-opaque`: the
host's kernel can read a container's and a vTPM's memory.
"""

from __future__ import annotations

import base64
import datetime
from collections.abc import Mapping
from dataclasses import InitVar, dataclass
from types import MappingProxyType
from typing import Any, Final

import jwt
from cryptography.hazmat.primitives.asymmetric import ec

from holdfast.appraise.contents import Contents
from holdfast.appraise.policy import Policy
from holdfast.errors import InvalidInput
from holdfast.evidence.round import Leaf
from holdfast.ids import InstanceId, InstanceName
from holdfast.tpm2.algorithms import HASH_NAMES, Alg
from holdfast.tpm2.structures import ClockInfo

EAR_PROFILE: Final = "tag:ietf.org,2026:rats/ear#04"
DEVELOPER: Final = "https://holdfast.dev"
HARDWARE: Final = "hardware"
SOFTWARE: Final = "software stand-in"
AFFIRMING: Final = 2
BOOT_ONLY: Final = 3  # AR4SI, executables: approved during boot; nothing is said of later
WARNING: Final = 32
_TIERS: Final[Mapping[int, str]] = {0: "none", AFFIRMING: "affirming", WARNING: "warning"}
_VERIFIER: Final = object()  # held by `verifier` alone


@dataclass(frozen=True)
class Progress:
    """Where a vTPM and its host have got to: keep it, and give it to the next appraisal.

    `lineage` counts how often its state was set back; the counters of TPMs are those of their
    quotes; `log_head` is over the run's first `log_events` events (`logs.head`). `index_name` and
    what follows speak of the host's map; the name is empty if nothing is known of it.
    """

    instance: InstanceId
    lineage: int
    epoch: int
    run: int
    vtpm_clock: ClockInfo
    host_ak_name: bytes
    host_clock: ClockInfo
    log_events: int
    log_head: bytes
    index_name: bytes = b""
    sequence: int = 0
    unclean: int = 0
    recoveries: int = 0


@dataclass(frozen=True)
class HostFacts:
    """What was established of the host."""

    site: str
    site_root: bytes  # SHA-256 of the root's certificate
    ak_name: bytes
    tpm: str  # HARDWARE or SOFTWARE
    ek_issuer: str  # subject of the CA that issued the host EK's certificate, or empty
    linked: bool
    pcrs: Mapping[int, bytes]  # SHA-256 bank
    events: int
    clock: ClockInfo
    index_name: bytes  # of the index in which its map is anchored
    sequence: int  # groups of commits
    unclean: int  # boots before which it was not put in order
    recoveries: int  # times that its administrator had older state accepted


@dataclass(frozen=True)
class AttestedContainer:
    """A container whose evidence satisfied a policy, at `at`, for this challenge.

    `established` and `limits` are sentences: what holds, and what nobody should read into it.
    `notes` are the host's own words, signed by it and otherwise unverified.
    """

    instance: InstanceId
    name: InstanceName
    container: str
    contents: Contents
    host: HostFacts
    leaf: Leaf
    ak_name: bytes
    ek_name: bytes
    clock: ClockInfo
    pcrs: Mapping[Alg, Mapping[int, bytes]]
    at: datetime.datetime
    policy: Policy
    established: tuple[str, ...]
    limits: tuple[str, ...]
    notes: tuple[str, ...]
    log_events: int
    log_head: bytes
    made_by: InitVar[object] = None

    def __post_init__(self, made_by: object) -> None:
        if made_by is not _VERIFIER:
            raise TypeError("only the verifier makes an AttestedContainer")

    @property
    def progress(self) -> Progress:
        """What the next appraisal of this instance should not fall behind."""
        leaf, host = self.leaf, self.host
        return Progress(
            self.instance, leaf.lineage, leaf.epoch, leaf.run, self.clock,
            host.ak_name, host.clock, self.log_events, self.log_head,
            host.index_name, host.sequence, host.unclean, host.recoveries,
        )  # fmt: skip

    def summary(self) -> tuple[str, ...]:
        """Plain words, a line each: whose vTPM, what holds, what does not follow."""
        head = f"{self.name} ({self.instance}), run {self.leaf.run}, container {self.container}"
        notes = tuple(f"the host says: {note}" for note in self.notes)
        return (head, *self.established, *(f"note: {limit}" for limit in self.limits), *notes)


def host_vector(attested: AttestedContainer) -> dict[str, int]:
    """AR4SI trustworthiness vector of the host."""
    hardware = AFFIRMING if attested.host.tpm == HARDWARE else WARNING
    vector = {"instance-identity": AFFIRMING, "hardware": hardware}
    rule = attested.policy.host
    if rule is not None:
        vector["executables"] = AFFIRMING if rule.verity_root_in else BOOT_ONLY
    if not attested.host.linked:
        vector["configuration"] = WARNING
    return vector


def container_vector(attested: AttestedContainer) -> dict[str, int]:
    """AR4SI trustworthiness vector of the container."""
    policy, vector = attested.policy, {}
    if policy.identity is not None:
        vector["instance-identity"] = AFFIRMING
    if policy.config is not None:
        vector["configuration"] = AFFIRMING
    if policy.image is not None:
        vector["file-system"] = AFFIRMING
    if policy.exec is not None:
        measured = attested.contents.files is not None
        vector["executables"] = AFFIRMING if measured else WARNING
    if not attested.host.linked:
        vector["hardware"] = WARNING
    return vector


def _tier(vector: Mapping[str, int]) -> int:
    """The tier of a vector: no better than its worst claim; 0 without any."""
    worst = max(vector.values(), default=0)
    return WARNING if worst >= WARNING else AFFIRMING if worst else 0


def ear_claims(
    attested: AttestedContainer, build: str, lifetime: int | None = None
) -> dict[str, Any]:
    """The EAR claims set. `build` names this verifier's build; `lifetime` in seconds gives `exp`.

    `eat_nonce` is the challenge's nonce, base64url without padding.
    """
    vectors = {"host": host_vector(attested), "container": container_vector(attested)}
    policy_id = f"urn:holdfast:policy:sha256:{attested.policy.digest.hex()}"
    claims = {"host": _host_claims(attested), "container": _container_claims(attested)}
    issued = int(attested.at.timestamp())
    result: dict[str, Any] = {
        "eat_profile": EAR_PROFILE,
        "iat": issued,
        "ear_verifier_id": {"developer": DEVELOPER, "build": build},
        "ear_status": _TIERS[max(map(_tier, vectors.values()))],
        "eat_nonce": base64.urlsafe_b64encode(attested.leaf.nonce).rstrip(b"=").decode(),
        "submods": {
            name: {
                "ear_status": _TIERS[_tier(vector)],
                "ear_trustworthiness_vector": vector,
                "ear_appraisal_policy_ids": [policy_id],
                **claims[name],
            }
            for name, vector in vectors.items()
        },
    }
    if lifetime is not None:
        result["exp"] = issued + lifetime
    return result


def _host_claims(attested: AttestedContainer) -> dict[str, Any]:
    host = attested.host
    return {
        "ear_verifier_claims": {
            "tpm": host.tpm,
            "tpm_issuer": host.ek_issuer,
            "site": host.site,
            "site_root": f"sha256:{host.site_root.hex()}",
            "ak_name": host.ak_name.hex(),
            "linked": host.linked,
            "anchor_name": host.index_name.hex(),
            "anchor_sequence": host.sequence,
            "unclean_boots": host.unclean,
            "recoveries": host.recoveries,
            "pcrs": {"sha256": {str(pcr): value.hex() for pcr, value in host.pcrs.items()}},
            "limits": list(attested.limits),
        }
    }


def _container_claims(attested: AttestedContainer) -> dict[str, Any]:
    """What was measured; image names as Confidential Space has them, and these only claimed."""
    contents, leaf = attested.contents, attested.leaf
    names = {
        "reference": "image_reference",
        "manifest_digest": "image_digest",
        "image_id": "image_id",
    }
    claimed = contents.image.claimed
    return {
        "ear_verifier_claims": {
            "instance": str(attested.instance),
            "name": attested.name,
            "container_id": attested.container,
            "run": leaf.run,
            "epoch": leaf.epoch,
            "lineage": leaf.lineage,
            "clear_count": leaf.clear_count,
            "ak_name": attested.ak_name.hex(),
            "ek_name": attested.ek_name.hex(),
            "user_data_sha256": leaf.user_data.hex(),
            "audience": leaf.audience,
            "image": {"layers": list(contents.image.layers), "upper": contents.image.upper},
            "config": contents.config,
            "execution": "measured" if contents.files is not None else "not measured",
            "pcrs": {
                HASH_NAMES[alg]: {str(pcr): value.hex() for pcr, value in bank.items()}
                for alg, bank in attested.pcrs.items()
            },
        },
        "ear_attester_claims": {
            name: claimed[source] for source, name in names.items() if source in claimed
        },
    }


def sign_ear(claims: Mapping[str, Any], key: ec.EllipticCurvePrivateKey, key_id: str = "") -> str:
    """The claims as a JWT with ES256; InvalidInput for a key of another curve than P-256."""
    if not isinstance(key.curve, ec.SECP256R1):
        raise InvalidInput("a result is signed by a P-256 key")
    headers = {"kid": key_id} if key_id else None
    return jwt.encode(dict(claims), key, algorithm="ES256", headers=headers)


def frozen(values: Mapping[Any, Any]) -> Mapping[Any, Any]:
    """A read-only copy."""
    return MappingProxyType(dict(values))
