"""Mount tables and overlay options, the rule for fresh uppers, claims, and event contents."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import uuid
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.errors import DecodeError, InvalidInput
from holdfast.eventlog.records import PCR_OF
from holdfast.ids import InstanceId, instance_name
from holdfast.measure.claimed import ClaimedImage, from_annotations, from_storage
from holdfast.measure.config import ConfigFacts, IdMap, Provision
from holdfast.measure.events import (
    config_content,
    identity_content,
    image_contents,
    provider_content,
    provider_facts,
)
from holdfast.measure.fresh import without_provision
from holdfast.measure.mountinfo import Mount, Overlay, parse_mountinfo, parse_overlay
from holdfast.measure.rootfs import EMPTY, ImageFacts, rootfs_path
from holdfast.measure.tree import Entry

# As Linux 6.18 shows layers with a colon, a comma, a space and a backslash in their names.
AWKWARD = (
    rb"68 43 0:39 / /o/m rw,relatime - overlay overlay rw,lowerdir=/o/a\134:b:/o/c\134\054d:"
    rb"/o/e\040f:/o/g\134\134h,upperdir=/o/up\134:x,workdir=/o/w,uuid=on" + b"\n"
)
ONE_BY_ONE = (
    rb"66 43 0:39 / /o/m rw,relatime - overlay none rw,lowerdir+=/o/a:b,lowerdir+=/o/e\040f,"
    rb"upperdir=/o/up:x,workdir=/o/w" + b"\n"
)
TAGGED = b"36 35 98:0 /m\\0401 /mnt2 rw,noatime shared:1 master:2 - ext3 /dev/root rw,errors=x\n"


def test_a_line_is_read_with_its_optional_fields_and_escapes() -> None:
    (mount,) = parse_mountinfo(TAGGED)
    options = (b"rw", b"noatime")
    assert mount == Mount(
        36, 35, (98, 0), b"/m 1", b"/mnt2", options, b"ext3", b"/dev/root", b"rw,errors=x"
    )


def test_layers_with_awkward_names_are_told_apart() -> None:
    (mount,) = parse_mountinfo(AWKWARD)
    assert parse_overlay(mount) == Overlay(
        (rb"/o/g\h", b"/o/e f", b"/o/c,d", b"/o/a:b"), b"/o/up:x"
    )


def test_layers_given_one_by_one_are_told_apart() -> None:
    (mount,) = parse_mountinfo(ONE_BY_ONE)
    assert parse_overlay(mount) == Overlay((b"/o/e f", b"/o/a:b"), b"/o/up:x")


@pytest.mark.parametrize(
    "options", [b"rw", b"rw,lowerdir=/a::/data", b"rw,lowerdir=/a,datadir+=/b", b"lowerdir=/a\\134"]
)
def test_layers_that_cannot_be_measured_are_refused(options: bytes) -> None:
    (mount,) = parse_mountinfo(b"1 0 0:1 / /m rw - overlay o " + options + b"\n")
    with pytest.raises(DecodeError):
        parse_overlay(mount)


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"1 0 0:1 / /m rw",
        b"1 0 0:1 / /m rw - ext4 dev\n"[:-1],
        b"1 0 0:1 / /m rw ext4 dev rw\n",
        b"1 0 0:1 / /m rw - ext4 dev\n",
        b"x 0 0:1 / /m rw - ext4 dev rw\n",
        b"1 0 01 / /m rw - ext4 dev rw\n",
        b"1 0 0:1 / m rw - ext4 dev rw\n",
        b"1 0 0:1 / /m\\777 rw - ext4 dev rw\n",
        b"\n",
    ],
)
def test_a_malformed_table_is_refused(line: bytes) -> None:
    if not line:
        assert parse_mountinfo(line) == ()
        return
    with pytest.raises(DecodeError):
        parse_mountinfo(line)


pieces = st.sampled_from([AWKWARD, ONE_BY_ONE, TAGGED, b"-", b" ", b"\n", b"\\134", b"0:1", b"rw"])


@given(st.lists(pieces | st.binary(max_size=8), max_size=12).map(b"".join))
def test_a_table_is_read_or_refused(data: bytes) -> None:
    with contextlib.suppress(DecodeError):
        for mount in parse_mountinfo(data):
            parse_overlay(mount)


def test_our_own_table_is_read() -> None:
    mounts = parse_mountinfo(Path("/proc/self/mountinfo").read_bytes())
    assert any(mount.point == b"/proc" for mount in mounts)


PROVISION = Provision(frozenset({b"etc/hosts", b"a/b/c", b"run/.containerenv"}))
MTAB = Entry(b"etc/mtab", b"l", 0o777, 0, 0, target=b"/proc/mounts")
LOWER = {
    b"": Entry(b"", b"d", 0o555, 0, 0),
    b"etc": Entry(b"etc", b"d", 0o755, 0, 0),
    b"srv": Entry(b"srv", b"d", 0o750, 5, 5),
}
FRESH = (
    Entry(b"", b"d", 0o555, 0, 0),
    Entry(b"a", b"d", 0o755, 0, 0),
    Entry(b"a/b", b"d", 0o755, 0, 0, xattrs=((b"trusted.overlay.opaque", b"y"),)),
    Entry(b"a/b/c", b"d", 0o700, 0, 0),
    Entry(b"etc", b"d", 0o755, 0, 0),
    Entry(b"etc/hosts", b"f", 0o755, 0, 0),
    MTAB,
    Entry(b"run", b"d", 0o755, 0, 0),
    Entry(b"run/.containerenv", b"f", 0o755, 0, 0),
    Entry(b"srv", b"d", 0o750, 5, 5),
)


def left(*more: Entry, provision: Provision = PROVISION) -> set[bytes]:
    entries = {entry.path: entry for entry in (*FRESH, *more)}
    kept = without_provision(entries.values(), provision, LOWER.get)
    assert [entry.path for entry in kept] == sorted(entry.path for entry in kept)
    return {entry.path for entry in kept}


def test_nothing_is_left_of_what_podman_and_runc_make() -> None:
    assert left() == set()


@pytest.mark.parametrize(
    "entry",
    [
        Entry(b"etc/hosts", b"f", 0o644, 0, 0, size=1),
        Entry(b"etc/hosts", b"f", 0o4755, 0, 0),
        Entry(b"etc/hosts", b"f", 0o755, 7, 0),
        Entry(b"etc/hosts", b"f", 0o755, 0, 0, link=b"a"),
        Entry(b"etc/hosts", b"f", 0o755, 0, 0, xattrs=((b"security.capability", b""),)),
        Entry(b"etc/hosts", b"l", 0o777, 0, 0, target=b"/proc/mounts"),
        Entry(b"etc/hosts", b"w", 0, 0, 0),
        Entry(b"etc/other", b"f", 0o755, 0, 0),
        MTAB._replace(target=b"/etc/shadow"),
        Entry(b"etc", b"d", 0o777, 0, 0),
        Entry(b"etc", b"d", 0o755, 1, 0),
        Entry(b"etc", b"d", 0o755, 0, 0, xattrs=((b"trusted.overlay.opaque", b"y"),)),
        Entry(b"a", b"d", 0o777, 0, 0),
        Entry(b"a/b", b"d", 0o755, 0, 0, xattrs=((b"trusted.overlay.redirect", b"/x"),)),
        Entry(b"made", b"d", 0o755, 0, 0),
        Entry(b"", b"d", 0o777, 0, 0),
    ],
    ids=lambda entry: f"{entry.path!r} {entry.kind!r} {entry.mode:o}",
)
def test_whatever_else_is_left_and_the_directories_that_lead_to_it(entry: Entry) -> None:
    parts = entry.path.split(b"/") if entry.path else []
    assert left(entry) == {b"/".join(parts[:count]) for count in range(len(parts) + 1)}


def test_in_a_user_namespace_the_containers_root_makes_them() -> None:
    provision = Provision(PROVISION.mountpoints, IdMap(((0, 9, 100),)), IdMap(((0, 9, 100),)))
    shifted = [entry._replace(uid=entry.uid + 9, gid=entry.gid + 9) for entry in FRESH]
    assert left(*shifted, provision=provision) == set()
    assert left(Entry(b"etc/hosts", b"f", 0o755, 10, 10), provision=provision)


def test_a_root_file_system_may_be_named_relative_to_its_bundle() -> None:
    assert rootfs_path("/bundle", "rootfs") == "/bundle/rootfs"
    assert rootfs_path("/bundle", "/elsewhere") == "/elsewhere"


IMAGE_ID = "35" * 32


def storage(root: Path, image: object, container: object) -> int:
    (root / "graph/overlay-containers").mkdir(parents=True)
    (root / "graph/overlay-images").mkdir()
    (root / "graph/overlay-containers/containers.json").write_text(json.dumps(container))
    (root / "graph/overlay-images/images.json").write_text(json.dumps(image))
    return os.open(root, os.O_PATH | os.O_DIRECTORY)


def test_the_claim_is_found_beside_the_upper_layer(tmp_path: Path) -> None:
    image = [{"id": IMAGE_ID, "digest": "sha256:" + "ab" * 32}]
    root = storage(tmp_path, image, [{"id": "other"}, {"id": "me", "image": IMAGE_ID}])
    upper = b"/graph/overlay/layer/diff"
    assert from_storage(root, upper, "me") == ClaimedImage(
        "containers-storage", f"sha256:{IMAGE_ID}", "sha256:" + "ab" * 32
    )
    assert from_storage(root, upper, "unknown") is None
    assert from_storage(root, b"/elsewhere/x/y", "me") is None
    os.close(root)


@pytest.mark.parametrize("spoilt", [{}, [1], [{"id": "me", "image": "../x"}], [{"id": "me"}], "x"])
def test_notes_that_do_not_parse_are_no_claim(tmp_path: Path, spoilt: object) -> None:
    root = storage(tmp_path, spoilt, spoilt)
    assert from_storage(root, b"/graph/overlay/layer/diff", "me") is None
    os.close(root)


def test_a_claim_may_be_in_annotations() -> None:
    assert from_annotations({}) is None
    assert from_annotations({"io.kubernetes.cri-o.ImageRef": IMAGE_ID}) == ClaimedImage(
        "annotations", f"sha256:{IMAGE_ID}"
    )
    claim = from_annotations({"io.kubernetes.cri.image-name": "localhost/app:1"})
    assert claim == ClaimedImage("annotations", reference="localhost/app:1")


def sha(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def test_an_image_is_its_claim_its_layers_from_the_bottom_and_its_upper() -> None:
    layers = (sha("one"), sha("two"))
    events = image_contents(ImageFacts("overlay", layers, EMPTY, None))
    assert [event.content for event in events] == [
        {"part": "claimed", "kind": "overlay", "claimed": None},
        {
            "part": "layer",
            "index": 0,
            "format": "holdfast.tree/1",
            "digest": f"sha256:{sha('one').hex()}",
        },
        {
            "part": "layer",
            "index": 1,
            "format": "holdfast.tree/1",
            "digest": f"sha256:{sha('two').hex()}",
        },
        {"part": "upper", "format": "holdfast.tree/1", "digest": "empty"},
    ]
    written = image_contents(ImageFacts("overlay", layers, sha("up"), None))[-1]
    assert written.content["digest"] == f"sha256:{sha('up').hex()}"


def test_every_content_goes_to_the_pcr_of_its_type(tmp_path: Path) -> None:
    library = tmp_path / "libtpms.so.0"
    library.write_bytes(b"library")
    provider = provider_facts(tmp_path, library, "0.9.2", sha("policy"))
    config = ConfigFacts(sha("raw"), b"{}", sha("{}"), "/", {}, Provision())
    events = [
        provider_content(provider),
        config_content(config),
        *image_contents(ImageFacts("plain", (), None, None)),
        identity_content(
            InstanceId(uuid.UUID(int=4)), "container", instance_name("web"), 3, config.raw_digest
        ),
    ]
    for event in events:
        json.dumps(event.content)
    assert {PCR_OF[event.content_type] for event in events} == {11, 12, 13, 15}
    assert events[0].content["libtpms"]["digest"] == f"sha256:{sha('library').hex()}"
    assert events[-1].content["run"] == 3


def test_compiled_files_are_no_part_of_the_provider(tmp_path: Path) -> None:
    library = tmp_path / "library"
    library.touch()
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").touch()
    before = provider_facts(package, library, "1", sha(""))
    (package / "__pycache__").mkdir()
    assert provider_facts(package, library, "1", sha("")).package == before.package
    (package / "more.py").touch()
    assert provider_facts(package, library, "1", sha("")).package != before.package


def test_a_digest_of_another_length_is_refused() -> None:
    facts = ConfigFacts(b"", b"", b"short", "/", {}, Provision())
    with pytest.raises(InvalidInput):
        config_content(facts)
