"""Step 12: what was measured against what the policy wants. Errors name the event.

Everything read here has been established before: it is what TPMs have signed. Not here: parsing a
policy (`policy`), or believing a log (`logs`).
"""

from __future__ import annotations

from collections.abc import Sequence

from holdfast.appraise.contents import Contents
from holdfast.appraise.policy import (
    ExecRule,
    HostEvents,
    HostRule,
    IdentityRule,
    ImageRule,
    Policy,
    ProviderRule,
)
from holdfast.errors import IntegrityError
from holdfast.eventlog.replay import PcrValues
from holdfast.eventlog.tcg2 import Tcg2Event, Tcg2Log
from holdfast.evidence.freshness import Anchor
from holdfast.evidence.round import Leaf
from holdfast.tpm2.algorithms import Alg


def check_reference(
    policy: Policy, host_pcrs: PcrValues, log: Tcg2Log | None, contents: Contents
) -> None:
    """IntegrityError names the first measured thing that the policy does not want."""
    if policy.host is not None:
        _check_host(policy.host, host_pcrs, log)
    if policy.provider is not None:
        for provider in contents.provider:
            found = ProviderRule(
                provider.package, provider.libtpms, provider.python, provider.policy
            )
            _check_provider(policy.provider, found, provider.event)
    if policy.image is not None:
        _check_image(policy.image, contents)
    if policy.config is not None and contents.config not in policy.config:
        raise IntegrityError(
            f"{contents.config_event}: the policy does not allow configuration {contents.config}"
        )
    if policy.exec is not None:
        _check_exec(policy.exec, contents)
    if policy.identity is not None:
        _check_identity(policy.identity, contents)


def check_limits(policy: Policy, leaf: Leaf, anchor: Anchor) -> None:
    """IntegrityError names the first thing that happened more often than the policy wants."""
    cleared, unclean, recovered = leaf.clear_count, anchor.unclean, anchor.recoveries
    for count, key, what in (
        (cleared, "max_clears", f"the vTPM was cleared {cleared} times since power-on"),
        (unclean, "max_unclean", f"the host was {unclean} times not put in order before a boot"),
        (recovered, "max_recoveries", f"the host had older state accepted {recovered} times"),
    ):
        limit = getattr(policy, key)
        if limit is not None and count > limit:
            raise IntegrityError(f"{what}, the policy's {key} is {limit}")


def _check_host(rule: HostRule, values: PcrValues, log: Tcg2Log | None) -> None:
    for pcr, events in sorted(rule.events.items()):
        if log is None:
            raise IntegrityError("the policy names events of the host, and there is no host log")
        own = [(n, event) for n, event in enumerate(log.extends()) if event.pcr == pcr]
        _check_events(events, pcr, own)
    for pcr, allowed in sorted(rule.pcrs.items()):
        value = values[Alg.SHA256].get(pcr)
        if value is None:
            raise IntegrityError(f"host PCR {pcr} (sha256) is not in the host's quote")
        if value not in allowed:
            raise IntegrityError(
                f"host PCR {pcr} (sha256) is {value.hex()}, which the policy does not allow"
                f"{_events_of(pcr, log)}"
            )


def _check_events(rule: HostEvents, pcr: int, own: Sequence[tuple[int, Tcg2Event]]) -> None:
    seen = set()
    for number, event in own:
        value = event.digests.get(Alg.SHA256, b"")
        seen.add(value)
        if value not in rule.allowed:
            raise IntegrityError(
                f"event {number} of the host ({event.type_name}) in PCR {pcr}: the policy does "
                f"not allow its digest {value.hex()}"
            )
    missing = sorted(rule.required - seen)
    if missing:
        raise IntegrityError(
            f"PCR {pcr} of the host has no event {missing[0].hex()}, which the policy requires"
        )


def _events_of(pcr: int, log: Tcg2Log | None) -> str:
    """Which events made a PCR, for whoever has to find out what has changed."""
    if log is None:
        return ""
    own = [f"{n} {event.type_name}" for n, event in enumerate(log.extends()) if event.pcr == pcr]
    if not own:
        return "; the log has no event for it"
    shown = ", ".join(own[:8]) + (", …" if len(own) > 8 else "")
    return f"; its events: {shown}"


def _check_provider(allowed: Sequence[ProviderRule], found: ProviderRule, event: str) -> None:
    names = ("package", "libtpms", "python", "policy")
    wrong: list[list[str]] = []
    for rule in allowed:
        wrong.append([n for n in names if getattr(rule, n) not in (None, getattr(found, n))])
    if all(wrong):
        closest = min(wrong, key=len)[0]
        raise IntegrityError(
            f"{event}: the policy does not allow its {closest}, {getattr(found, closest)}"
        )


def _check_image(allowed: Sequence[ImageRule], contents: Contents) -> None:
    image = contents.image
    manifest = image.claimed.get("manifest_digest")
    for rule in allowed:
        if (rule.layers, rule.kind, rule.upper) == (
            image.layers,
            image.kind,
            image.upper,
        ) and rule.manifest in (None, manifest):
            return
    closest = allowed[0]
    for rule in allowed:
        if rule.layers == image.layers:
            closest = rule
    event, what = _differs(closest, contents)
    raise IntegrityError(f"{event}: the policy does not allow {what}")


def _differs(rule: ImageRule, contents: Contents) -> tuple[str, str]:
    """The first part in which an image is not the rule's: its event, and what that says."""
    image = contents.image
    claimed, *_, upper = image.events
    if rule.kind != image.kind:
        return claimed, f"a root file system of kind {image.kind}"
    for index, layer in enumerate(image.layers):
        if index >= len(rule.layers) or rule.layers[index] != layer:
            return image.events[index + 1], f"layer {index}, {layer}"
    if len(rule.layers) != len(image.layers):
        return claimed, f"an image of {len(image.layers)} layers"
    if rule.upper != image.upper:
        hint = "; what a container has written stays over its restart, and not over a new one"
        return upper, f"the writable layer, {image.upper}{hint}"
    return claimed, f"the claimed manifest, {image.claimed.get('manifest_digest', 'none')}"


def _check_exec(rule: ExecRule, contents: Contents) -> None:
    if contents.files is None:
        if not rule.not_measured:
            raise IntegrityError("execution was not measured, and the policy does not allow that")
        return
    for event, entry in contents.files:
        digest = f"{entry.algorithm}:{entry.file_digest.hex()}"
        if digest not in rule.files:
            raise IntegrityError(
                f"{event}: the policy does not allow the file {entry.path!a}, {digest}"
            )


def _check_identity(rule: IdentityRule, contents: Contents) -> None:
    identity = contents.identity
    if rule.names and identity.name not in rule.names:
        raise IntegrityError(f"{identity.event}: the policy does not name {identity.name}")
    if rule.ids and identity.instance not in rule.ids:
        raise IntegrityError(f"{identity.event}: the policy does not name {identity.instance}")
