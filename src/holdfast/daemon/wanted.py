"""A vTPM as somebody asks for it: read once, from what the API was sent.

Not here: whether there can be one like that beside those there are (`host`).
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from holdfast.daemon.starting import check_policy
from holdfast.errors import Conflict, InvalidInput
from holdfast.frontend.filter import Profile
from holdfast.frontend.nodes import Asked, chosen
from holdfast.ids import InstanceId, InstanceName, instance_name
from holdfast.instance.lifecycle import State
from holdfast.protocol.mssim import Dialect
from holdfast.store.registry import Instance
from holdfast.tpm2.algorithms import HASHES_BY_NAME

DEFAULT_BANKS: Final = ("sha256", "sha384")
OWNER_MAX: Final = (1 << 32) - 2  # the last number is nobody's: (uid_t)-1
_JUDGED: Final = "sha256"  # the bank that every verifier looks at


@dataclass(frozen=True)
class Wanted:
    """What was asked for, each part by itself as it should be."""

    name: InstanceName
    profile: Profile
    owner: int
    banks: tuple[str, ...]
    unlinked: bool
    ports: str
    nodes: str
    device: str
    start_policy: dict[str, Any]

    def defined(self, own: InstanceId, banks: tuple[str, ...]) -> Instance:
        """As the registry first has it: named, and not made yet."""
        return Instance(
            id=own,
            name=self.name,
            state=State.DEFINED.value,
            profile=self.profile.value,
            owner=self.owner,
            banks=banks,
            created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            unlinked=self.unlinked,
            start_policy=self.start_policy,
            ports=self.ports,
            nodes=self.nodes,
            device=self.device,
        )


def wanted(body: Mapping[str, Any]) -> Wanted:
    """Read a request whose members have the right types; InvalidInput says what is wrong."""
    name = instance_name(body.get("name") or "")
    profile = _profile(body.get("profile") or Profile.LINKED.value)
    owner = _owner(body)
    policy = body.get("start_policy")
    if policy is not None:
        check_policy(policy)
    device = _device(body)
    if device:
        profile = Profile.PLAIN
    return Wanted(
        name, profile, owner, _banks(body.get("banks"), profile),
        body.get("unsafe_unlinked") is True, _ports(body.get("ports"), profile),
        _nodes(body.get("devices"), profile, device), device, policy or {},
    )  # fmt: skip


def wanted_like(body: Mapping[str, Any], there: Instance) -> Wanted:
    """A new vTPM with the settings of one that is there: its name and owner are of the request.

    Conflict where there can be no second one.
    """
    name = instance_name(body.get("name") or "")
    if there.device:
        raise Conflict(
            f"{there.name} is {there.device}, passed through: it has no settings that a new vTPM "
            "could have, and there is no second one of it"
        )
    if there.nodes:
        chosen(Asked(there.nodes))  # what was to be had when that one was made may be gone
    return Wanted(
        name, Profile(there.profile), _owner(body), there.banks, there.unlinked, there.ports,
        there.nodes, "", there.start_policy,
    )  # fmt: skip


def _owner(body: Mapping[str, Any]) -> int:
    owner: int = body.get("owner") or 0
    if not 0 <= owner <= OWNER_MAX:
        raise InvalidInput(f"an owner is a user's number from 0 to {OWNER_MAX}")
    return owner


def _profile(text: Any) -> Profile:
    try:
        return Profile(text)
    except ValueError:
        raise InvalidInput(f"a profile is linked or plain, not {text!a}") from None


def _device(body: Mapping[str, Any]) -> str:
    """The TPM that is passed through; empty in mode vtpm."""
    mode, device = body.get("mode") or "vtpm", body.get("tpm") or ""
    if mode not in ("vtpm", "passthrough"):
        raise InvalidInput(f"a mode is vtpm or passthrough, not {mode!a}")
    if (mode == "passthrough") != bool(device):
        raise InvalidInput("mode passthrough and the TPM that is passed through go together")
    refused = [
        name for name in ("profile", "banks", "start_policy", "unsafe_unlinked", "ports")
        if body.get(name)
    ]  # fmt: skip
    if device and refused:
        raise InvalidInput(
            f"{refused[0]} is of a vTPM of ours: a TPM that is passed through is as it is"
        )
    return str(device)


def _ports(asked: Any, profile: Profile) -> str:
    if not asked:
        return ""
    try:
        dialect = Dialect(asked)
    except ValueError:
        raise InvalidInput(f"on ports is spoken swtpm or mssim, not {asked!a}") from None
    if profile is not Profile.LINKED:
        raise InvalidInput("ports are in a container's network: a plain vTPM has no container")
    return dialect.value


def _nodes(asked: Any, profile: Profile, device: str) -> str:
    try:
        found = Asked(asked or Asked.AUTO.value)
    except ValueError:
        words = ", ".join(each.value for each in Asked)
        raise InvalidInput(f"devices are one of {words}, not {asked!a}") from None
    if profile is Profile.LINKED or device:
        chosen(found)  # or what was asked for is not to be had here
        return found.value
    if asked:
        raise InvalidInput("devices are a container's: a plain vTPM has none")
    return ""


def _banks(asked: Any, profile: Profile) -> tuple[str, ...]:
    if asked is None:
        return DEFAULT_BANKS
    if not asked or not all(isinstance(bank, str) and bank in HASHES_BY_NAME for bank in asked):
        raise InvalidInput(f"banks are some of {', '.join(HASHES_BY_NAME)}")
    if len(set(asked)) != len(asked):
        raise InvalidInput("banks names one of them twice")
    if profile is Profile.LINKED and _JUDGED not in asked:
        raise InvalidInput(f"verifiers look at {_JUDGED}: a linked vTPM has that bank too")
    return tuple(asked)
