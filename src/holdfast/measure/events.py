"""The contents of the events that facts become: what PCRs 11, 12, 13 and 15 are extended with.

Duty: one JSON-able content for each event, with its type. Not here: records, digests and encodings
(`eventlog`), when and in which order to extend (`daemon`).
Rules: contents are versioned by their type and never change within one, because users seal to
them; digests are `sha256:` and hex; nothing is in them that a predictor cannot know, but in the
identity (PCR 15), which is that of one run.
"""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from holdfast.errors import InvalidInput
from holdfast.eventlog.records import CONFIG, IDENTITY, IMAGE, PROVIDER
from holdfast.ids import InstanceId, InstanceName
from holdfast.measure.config import ConfigFacts
from holdfast.measure.rootfs import ImageFacts
from holdfast.measure.tree import FORMAT, open_tree, read_tree, tree_digest

_LIBRARY_MAX: Final = 256 << 20
# Compiled when first imported. The interpreter that runs the daemon is told not to use them.
_COMPILED: Final = frozenset({b"__pycache__"})


@dataclass(frozen=True)
class Measurement:
    """What an event says; its type knows the PCR (`eventlog.records.PCR_OF`)."""

    content_type: str
    content: Mapping[str, Any]


@dataclass(frozen=True)
class ProviderFacts:
    """The programs that provide a vTPM, and the policy they were told to keep."""

    package: bytes
    libtpms_path: str
    libtpms_version: str
    libtpms: bytes
    python: str
    policy: bytes


def provider_facts(
    package: Path, libtpms: Path, libtpms_version: str, policy: bytes
) -> ProviderFacts:
    """Digest our own source tree and the library; `policy` is the policy's SHA-256 already."""
    fd = open_tree(package)
    try:
        source = tree_digest(read_tree(fd, skip=_COMPILED).entries)
    finally:
        os.close(fd)
    with libtpms.open("rb") as file:
        if os.fstat(file.fileno()).st_size > _LIBRARY_MAX:
            raise InvalidInput(f"{libtpms} has more than {_LIBRARY_MAX} bytes")
        library = hashlib.file_digest(file, "sha256").digest()
    return ProviderFacts(
        source, str(libtpms), libtpms_version, library, platform.python_version(), policy
    )


def provider_content(facts: ProviderFacts) -> Measurement:
    """PCR 11: what provides the vTPM from here on."""
    return Measurement(
        PROVIDER,
        {
            "package": {"format": FORMAT, "digest": _digest(facts.package)},
            "libtpms": {
                "path": facts.libtpms_path,
                "version": facts.libtpms_version,
                "digest": _digest(facts.libtpms),
            },
            "python": facts.python,
            "policy": _digest(facts.policy),
        },
    )


def config_content(facts: ConfigFacts) -> Measurement:
    """PCR 12: the normalised configuration, by its digest; whoever has its text can check it."""
    return Measurement(CONFIG, {"normalised": _digest(facts.normalised_digest)})


def image_contents(facts: ImageFacts) -> tuple[Measurement, ...]:
    """PCR 13: the image as claimed, each layer from the bottom, and the writable layer."""
    claimed = facts.claimed
    claim = None
    if claimed is not None:
        claim = {
            "source": claimed.source,
            "image_id": claimed.image_id,
            "manifest_digest": claimed.manifest_digest,
            "reference": claimed.reference,
        }
    contents: list[dict[str, Any]] = [{"part": "claimed", "kind": facts.kind, "claimed": claim}]
    contents += (
        {"part": "layer", "index": index, "format": FORMAT, "digest": _digest(layer)}
        for index, layer in enumerate(facts.layers)
    )
    upper = facts.upper
    contents.append(
        {
            "part": "upper",
            "format": FORMAT,
            "digest": _digest(upper) if isinstance(upper, bytes) else upper,
        }
    )
    return tuple(Measurement(IMAGE, content) for content in contents)


def identity_content(
    instance_id: InstanceId,
    container_id: str,
    name: InstanceName,
    run: int,
    raw_config_digest: bytes,
) -> Measurement:
    """PCR 15: whose vTPM this is, in which run, with which configuration byte for byte."""
    return Measurement(
        IDENTITY,
        {
            "instance": str(instance_id),
            "container": container_id,
            "name": name,
            "run": run,
            "config": _digest(raw_config_digest),
        },
    )


def _digest(value: bytes) -> str:
    if len(value) != hashlib.sha256().digest_size:
        raise InvalidInput(f"a SHA-256 digest has 32 bytes, not {len(value)}")
    return f"sha256:{value.hex()}"
