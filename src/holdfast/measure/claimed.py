"""Which image a container claims to be of: what the host's tools noted, checked by nobody.

Duty: find the image's id and manifest digest in containers-storage or in annotations. Not here:
any check; the layers' own digests (`rootfs`) are what counts, and events mark this as claimed.
Rules: nothing found is no error, and neither are notes that do not parse: a claim is then absent.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from holdfast.linux.opening import open_in_root

_FILE_MAX: Final = 16 << 20
_TEXT_MAX: Final = 512
_ID: Final = re.compile(r"[0-9a-f]{64}")
_DIGEST: Final = re.compile(r"sha256:[0-9a-f]{64}")
# containers-storage keeps containers that do not outlive a boot in a file of their own.
_CONTAINERS: Final = ("containers.json", "volatile-containers.json")
# annotation -> the field it fills: CRI-O, containerd's CRI plug-in
_ANNOTATIONS: Final[Mapping[str, str]] = {
    "io.kubernetes.cri-o.ImageRef": "image_id",
    "io.kubernetes.cri-o.ImageName": "reference",
    "io.kubernetes.cri.image-name": "reference",
}


@dataclass(frozen=True)
class ClaimedImage:
    """An image as the host's tools name it; an OCI image's id is its configuration's digest."""

    source: str
    image_id: str | None = None
    manifest_digest: str | None = None
    reference: str | None = None


def from_storage(root: int, upper: bytes, container_id: str) -> ClaimedImage | None:
    """The claim of containers-storage, whose overlay driver keeps the upper layer at `upper`.

    That is GRAPHROOT/DRIVER/LAYER/diff; the notes are in GRAPHROOT/DRIVER-containers and -images.
    """
    home, _, _ = upper.rpartition(b"/")[0].rpartition(b"/")
    graph, _, driver = home.rpartition(b"/")
    if not graph or not driver:
        return None
    for name in _CONTAINERS:
        path = b"%b/%b-containers/%b" % (graph, driver, name.encode())
        container = _find(_read_list(root, path), container_id)
        image_id = container.get("image")
        if isinstance(image_id, str) and _ID.fullmatch(image_id):
            image = _find(_read_list(root, b"%b/%b-images/images.json" % (graph, driver)), image_id)
            digest = image.get("digest")
            manifest = digest if isinstance(digest, str) and _DIGEST.fullmatch(digest) else None
            return ClaimedImage("containers-storage", f"sha256:{image_id}", manifest)
    return None


def from_annotations(annotations: Mapping[str, str]) -> ClaimedImage | None:
    """The claim of a Kubernetes runtime's annotations."""
    fields = {
        field: annotations[name]
        for name, field in _ANNOTATIONS.items()
        if 0 < len(annotations.get(name, "")) <= _TEXT_MAX
    }
    if not fields:
        return None
    image_id = fields.get("image_id")
    if image_id is not None and _ID.fullmatch(image_id):
        image_id = f"sha256:{image_id}"
    return ClaimedImage("annotations", image_id, reference=fields.get("reference"))


def _find(entries: list[Any], name: str) -> dict[str, Any]:
    for entry in entries:
        if isinstance(entry, dict) and entry.get("id") == name:
            return entry
    return {}


def _read_list(root: int, path: bytes) -> list[Any]:
    try:
        with open(open_in_root(root, path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as f:
            data = f.read(_FILE_MAX + 1)
        value = json.loads(data) if len(data) <= _FILE_MAX else []
    except (OSError, ValueError, RecursionError):
        return []
    return value if isinstance(value, list) else []
