"""A policy from a known-good run: what was measured becomes what is wanted.

The run is appraised with everything but reference values, so a policy is only made of what TPMs
have signed under a pinned site root. Whoever uses it decides that the run was good: nothing here
can know that.

Not here: reading a policy (`policy`).
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterable

from cryptography.hazmat.primitives.serialization import Encoding

from holdfast.appraise.policy import Policy, Trust
from holdfast.appraise.result import SOFTWARE
from holdfast.appraise.verifier import Challenge, Structure, check_structure
from holdfast.tpm2.algorithms import Alg
from holdfast.tpm2.constants import HOST_PCRS


def learn_policy(
    evidence: bytes,
    trust: Trust,
    nonce: bytes,
    audience: str,
    user_data: bytes,
    now: datetime.datetime,
) -> str:
    """The TOML text, with comments, of a policy that this evidence satisfies, and little else.

    Arguments as of `verifier.appraise`, with whom to trust instead of a policy. AppraisalError if
    the evidence does not hold by itself.
    """
    policy = Policy(
        trust,
        host=None,
        provider=None,
        image=None,
        config=None,
        exec=None,
        identity=None,
        unsafe_unlinked=True,
    )
    found = check_structure(evidence, policy, Challenge(nonce, audience, user_data), now)
    sections = (
        _head(found, now), _trust(found, trust), _host(found), _provider(found), _image(found),
        _config(found), _exec(found), _identity(found), _limits(found, audience),
    )  # fmt: skip
    return "\n".join("\n".join(section) + "\n" for section in sections)


def _text(value: str) -> str:
    """A TOML basic string: JSON's escapes are a subset of TOML's, but for U+007F."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _list(key: str, values: Iterable[str]) -> list[str]:
    return [f"{key} = [", *(f"    {_text(value)}," for value in values), "]"]


def _head(found: Structure, now: datetime.datetime) -> list[str]:
    name = found.contents.identity.name
    return [
        f"# Made from run {found.leaf.run} of {name}, on {now.date().isoformat()}.",
        "# Every value below is what was measured then. A section that says `any = true` instead",
        "# constrains nothing. Check it, and keep it under version control.",
        "version = 1",
    ]


def _trust(found: Structure, trust: Trust) -> list[str]:
    lines = ["[trust]", f"# the root of the site {found.identity.site!a}"]
    lines += _list("site_roots", [f"sha256:{found.identity.root_fingerprint.hex()}"])
    if found.tpm == SOFTWARE:
        lines += [
            "# Names of host AKs whose TPM is a software stand-in, and accepted all the same:",
            "# whoever runs such a host can make evidence of anything.",
        ]
        return lines + _list("software_host_tpm", [found.identity.host_ak.name.hex()])
    lines.append("# the CAs that certify hardware TPMs (also: file:NAME)")
    pem = [anchor.public_bytes(Encoding.PEM).decode() for anchor in trust.ek_roots]
    return lines + _list("ek_roots", pem)


def _host(found: Structure) -> list[str]:
    lines = ["[host]"]
    if found.log is None:
        lines.append("# The vTPM is unlinked: these are the host TPM's own PCRs.")
    lines += [
        "# verity_root_in = [4, 9]  # if these PCRs fix a dm-verity root, and so all of user space",
        "",
        "# Values of the host's PCRs (sha256). Update the host: add its new values.",
        "[host.pcrs]",
    ]
    values = found.host.pcrs[Alg.SHA256]
    zero = bytes(32)
    lines += [f'{pcr} = ["{values[pcr].hex()}"]' for pcr in HOST_PCRS if values[pcr] != zero]
    if all(values[pcr] == zero for pcr in HOST_PCRS):
        lines.append(f'0 = ["{zero.hex()}"]  # nothing measures this host\'s boot')
    if found.log is None:
        return lines
    lines += [
        "",
        "# Events of the same PCRs. They let an appraisal name the component that differs; the",
        "# values above decide. Types are not signed: they are there for people.",
    ]
    for pcr in HOST_PCRS:
        own = [
            f'    "{event.digests[Alg.SHA256].hex()}",  # {event.type_name}'
            for event in found.log.extends()
            if event.pcr == pcr and Alg.SHA256 in event.digests
        ]
        if own:
            lines += [f"[host.events.{pcr}]", "allowed = [", *own, "]"]
    return lines


def _provider(found: Structure) -> list[str]:
    lines = []
    for provider in found.contents.provider:
        lines += [
            f'# libtpms {provider.libtpms_version!a}. A field may say "any".',
            "[[provider.allowed]]",
            f"package = {_text(provider.package)}",
            f"libtpms = {_text(provider.libtpms)}",
            f"python = {_text(provider.python)}",
            f"policy = {_text(provider.policy)}  # the instance's start policy",
        ]
    return lines


def _image(found: Structure) -> list[str]:
    image = found.contents.image
    lines = ["[[image.allowed]]"]
    if reference := image.claimed.get("reference"):
        lines.append(f"# claimed to be {reference!a}")
    if manifest := image.claimed.get("manifest_digest"):
        lines.append(f"# manifest = {_text(manifest)}  # claimed by the host; the layers count")
    lines += _list("layers", image.layers)
    return [
        *lines,
        f"upper = {_text(image.upper)}  # the writable layer at start: empty, none or its digest",
        f"kind = {_text(image.kind)}",
    ]


def _config(found: Structure) -> list[str]:
    return ["[config]", *_list("allowed", [found.contents.config])]


def _exec(found: Structure) -> list[str]:
    files = found.contents.files
    if files is None:
        return ["[exec]", "not_measured = true  # nothing says what ran in the container"]
    if not files:
        return ["[exec]", "any = true  # execution is measured, and nothing had run yet"]
    known = sorted({f"{e.algorithm}:{e.file_digest.hex()}": e.path for _, e in files}.items())
    lines = ["[exec]", "files = ["]
    lines += [f'    "{digest}",  # {path!a}' for digest, path in known]
    return [*lines, "]"]


def _identity(found: Structure) -> list[str]:
    lines = ["[identity]", *_list("names", [found.contents.identity.name])]
    return lines + _list("ids", [str(found.leaf.instance)])


def _limits(found: Structure, audience: str) -> list[str]:
    lines = ["[limits]", f"audience = {_text(audience)}"]
    lines.append(f"max_clears = {found.leaf.clear_count}  # TPM2_Clear by the container in a run")
    anchor = found.freshness.anchor
    lines += [
        f"# max_unclean = {anchor.unclean}  # boots before which the host was not put in order",
        f"max_recoveries = {anchor.recoveries}  # times that its administrator had older state "
        "accepted",
    ]
    banks = ", ".join(_text(alg.name.lower()) for alg in found.vtpm.pcrs if alg is not Alg.SHA1)
    lines.append(f"banks = [{banks}]  # that the vTPM has to quote")
    if found.log is None:
        lines.append("unsafe_unlinked = true  # the vTPM says nothing of its host's boot")
    return lines
