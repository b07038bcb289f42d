"""The tree digest: what it covers, what it leaves out, and that a second reading of its
specification comes to the same bytes."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from holdfast.errors import Conflict, InvalidInput
from holdfast.measure import tree as tree_module
from holdfast.measure.cache import FileTreeCache, MemoryTreeCache, TreeKey, layer_digest
from holdfast.measure.tree import (
    DEPTH_MAX,
    FORMAT,
    Entry,
    fingerprint,
    open_tree,
    read_tree,
    tree_digest,
    walk,
)


def digest_of(path: Path) -> bytes:
    fd = open_tree(path)
    try:
        return tree_digest(read_tree(fd).entries)
    finally:
        os.close(fd)


@pytest.fixture
def layer(tmp_path: Path) -> Path:
    root = tmp_path / "layer"
    (root / "usr/bin").mkdir(parents=True)
    (root / "usr/bin/tool").write_bytes(b"#!/bin/sh\n")
    (root / "usr/bin/tool").chmod(0o755)
    (root / "usr/big").write_bytes(bytes(range(256)) * 10_000)
    (root / "usr/empty").touch()
    (root / "usr-local").write_bytes(b"sorts between usr and usr/bin")
    (root / "link").symlink_to("usr/bin")
    os.link(root / "usr/bin/tool", root / "usr/bin/again")
    os.mkfifo(root / "fifo", 0o600)
    return root


def data(value: bytes) -> bytes:
    return len(value).to_bytes(4, "big") + value


def second_reading(root: Path) -> bytes:
    """docs/measuring.md, "The tree digest", read again: for trees without attributes or devices."""
    below = sorted(
        os.path.relpath(os.path.join(where, name), os.fsencode(root))
        for where, directories, files in os.walk(os.fsencode(root))
        for name in directories + files
    )
    paths = [b"", *below]
    out = b"holdfast.tree/1\0"
    first: dict[int, bytes] = {}
    for path in paths:
        full = os.path.join(os.fsencode(root), path)
        status = os.lstat(full)
        link = b""
        if not stat.S_ISDIR(status.st_mode):
            link = first.setdefault(status.st_ino, path)
            link = b"" if link == path else link
        if stat.S_ISREG(status.st_mode):
            content = Path(os.fsdecode(full)).read_bytes()
            kind, body = b"f", status.st_size.to_bytes(8, "big") + hashlib.sha256(content).digest()
        elif stat.S_ISLNK(status.st_mode):
            kind, body = b"l", data(os.readlink(full))
        elif stat.S_ISFIFO(status.st_mode):
            kind, body = b"p", b""
        else:
            kind, body = b"d", b""
        out += data(path) + kind + (status.st_mode & 0o7777).to_bytes(2, "big")
        out += status.st_uid.to_bytes(4, "big") + status.st_gid.to_bytes(4, "big") + body
        out += (b"" if kind == b"d" else data(link)) + bytes(4)
    return hashlib.sha256(out + len(paths).to_bytes(8, "big")).digest()


def test_a_second_reading_of_the_specification_comes_to_the_same_digest(layer: Path) -> None:
    assert digest_of(layer) == second_reading(layer)


def test_the_digest_of_a_known_tree_never_changes() -> None:
    entries = (
        Entry(b"", b"d", 0o755, 0, 0, xattrs=((b"trusted.overlay.opaque", b"y"),)),
        Entry(b"a", b"f", 0o4755, 0, 0, size=1, sha256=hashlib.sha256(b"x").digest()),
        Entry(b"b", b"l", 0o777, 1, 2, target=b"a"),
        Entry(b"c", b"c", 0o600, 0, 0, device=(1, 3)),
        Entry(b"d", b"w", 0, 0, 0),
        Entry(b"e", b"f", 0o644, 0, 0, sha256=hashlib.sha256(b"").digest(), link=b"a"),
    )
    assert FORMAT == "holdfast.tree/1"
    assert tree_digest(entries).hex() == (
        "660664b8197cd2caee33c6ea4c130f664532b97dbe43f9e7646bb35f93c7fd42"
    )


def test_times_do_not_count(layer: Path) -> None:
    before = digest_of(layer)
    for path in [layer, *layer.rglob("*")]:
        os.utime(path, (1, 1), follow_symlinks=False)
    assert digest_of(layer) == before


def retarget(layer: Path) -> None:
    (layer / "link").unlink()
    (layer / "link").symlink_to("usr")


def copy_of_link(layer: Path) -> None:
    (layer / "usr/bin/again").unlink()
    (layer / "usr/bin/again").write_bytes((layer / "usr/bin/tool").read_bytes())
    (layer / "usr/bin/again").chmod(0o755)


CHANGES: dict[str, Callable[[Path], object]] = {
    "a byte of a file": lambda layer: (layer / "usr/bin/tool").write_bytes(b"#!/bin/zh\n"),
    "a byte more": lambda layer: (layer / "usr/empty").write_bytes(b"\0"),
    "a name": lambda layer: (layer / "usr/empty").rename(layer / "usr/Empty"),
    "a mode": lambda layer: (layer / "usr/empty").chmod(0o600),
    "set-user-id": lambda layer: (layer / "usr/bin/tool").chmod(0o4755),
    "a directory's mode": lambda layer: (layer / "usr").chmod(0o700),
    "the root's mode": lambda layer: layer.chmod(0o700),
    "a link's target": retarget,
    "a copy for a hard link": copy_of_link,
    "an empty directory": lambda layer: (layer / "usr/new").mkdir(),
    "a file gone": lambda layer: (layer / "fifo").unlink(),
    "a fifo's mode": lambda layer: (layer / "fifo").chmod(0o640),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_every_change_that_means_something_is_another_digest(
    layer: Path, change: Callable[[Path], object]
) -> None:
    before = digest_of(layer)
    change(layer)
    assert digest_of(layer) != before


def test_overlays_marks_count_and_its_notes_do_not(layer: Path) -> None:
    before = digest_of(layer)
    for name, counts in (
        ("user.other", False),
        ("user.overlay.origin", False),
        ("user.overlay.impure", False),
        ("user.overlay.opaque", True),
        ("user.overlay.redirect", True),
        ("user.overlay.metacopy", True),
    ):
        try:
            os.setxattr(layer / "usr", name, b"y")
        except OSError:
            pytest.skip("this file system has no user attributes")
        assert (digest_of(layer) != before) is counts, name
        os.removexattr(layer / "usr", name)


def test_no_symbolic_link_is_followed(layer: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (layer / "away").symlink_to(outside)
    before = digest_of(layer)
    (outside / "file").write_text("not of the layer")
    assert digest_of(layer) == before


def test_names_that_are_not_utf8_are_names(tmp_path: Path) -> None:
    Path(os.fsdecode(bytes(tmp_path) + b"/\xff\n")).touch()
    assert digest_of(tmp_path) == second_reading(tmp_path)


def test_a_skipped_name_is_left_out_wherever_it_is(layer: Path) -> None:
    fd = open_tree(layer)
    before = read_tree(fd).entries
    (layer / "usr/__pycache__").mkdir()
    (layer / "usr/__pycache__/x.pyc").touch()
    assert read_tree(fd, frozenset({b"__pycache__"})).entries == before
    os.close(fd)


def test_a_directory_that_changes_on_the_walk_raises(layer: Path) -> None:
    fd = open_tree(layer)
    found = walk(fd)
    for item in found:
        if item.path == b"usr/bin":
            (layer / "usr/new").touch()
            break
    with pytest.raises(Conflict, match="'usr' changed"):
        list(found)
    os.close(fd)


def test_a_file_replaced_by_a_directory_on_the_walk_raises(layer: Path) -> None:
    fd = open_tree(layer)
    found = walk(fd)
    next(found)
    (layer / "usr").rename(layer / "usr2")
    with pytest.raises(Conflict):
        list(found)
    os.close(fd)


def test_a_file_written_while_it_is_read_raises(layer: Path) -> None:
    stop = threading.Event()

    def write() -> None:
        with (layer / "usr/big").open("r+b") as file:
            while not stop.is_set():
                os.pwrite(file.fileno(), os.urandom(8), 1000)

    thread = threading.Thread(target=write)
    thread.start()
    try:
        with pytest.raises(Conflict, match="usr/big"):
            all(digest_of(layer) for _ in range(10_000))
    finally:
        stop.set()
        thread.join()


def test_the_number_of_entries_is_bounded(layer: Path) -> None:
    fd = open_tree(layer)
    assert len(list(walk(fd, limit=9))) == 10  # and the tree itself
    with pytest.raises(InvalidInput, match="more entries"):
        list(walk(fd, limit=8))
    os.close(fd)


def test_the_depth_is_bounded(tmp_path: Path) -> None:
    deep = tmp_path
    for _ in range(DEPTH_MAX):
        deep = deep / "d"
        deep.mkdir()
    with pytest.raises(InvalidInput, match="directories deep"):
        digest_of(tmp_path)


def test_a_sparse_file_of_exabytes_is_refused_at_once(tmp_path: Path) -> None:
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(tree_module.BYTES_MAX + 1)
    with pytest.raises(InvalidInput, match="bytes of content"):
        digest_of(tmp_path)


def test_hard_links_to_a_file_with_large_attributes_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tree_module, "NOTES_MAX", 64 << 10)
    first = tmp_path / "0"
    first.touch()
    os.setxattr(first, "user.overlay.x", bytes(3900))
    digest_of(tmp_path)
    for number in range(1, 20):
        os.link(first, tmp_path / str(number))
    with pytest.raises(InvalidInput, match="names and attributes"):
        digest_of(tmp_path)


def test_a_file_is_no_tree(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError):
        open_tree(tmp_path / "file")


# A layer at rest for more than cache.REST_NS: the standard library's own `json`.
AT_REST = Path(json.__file__).parent


@pytest.fixture
def rest() -> Iterator[int]:
    fd = open_tree(AT_REST)
    yield fd
    os.close(fd)


def key_of(fd: int) -> TreeKey:
    status = os.fstat(fd)
    return TreeKey(status.st_dev, status.st_ino, fingerprint(fd))


def test_a_layer_at_rest_is_remembered_and_believed(rest: int) -> None:
    cache = MemoryTreeCache()
    digest = layer_digest(rest, cache)
    assert digest == tree_digest(read_tree(rest).entries)
    assert cache.get(key_of(rest)) == digest
    cache.put(key_of(rest), bytes(32))
    assert layer_digest(rest, cache) == bytes(32)  # so it was not read again


def test_a_layer_that_changed_is_read_again(layer: Path) -> None:
    fd = open_tree(layer)
    cache = MemoryTreeCache()
    cache.put(key_of(fd), bytes(32))
    assert layer_digest(fd, cache) == bytes(32)
    times = (layer / "usr/empty").stat()
    (layer / "usr/empty").chmod(0o600)
    (layer / "usr/empty").chmod(stat.S_IMODE(times.st_mode))
    os.utime(layer / "usr/empty", ns=(times.st_atime_ns, times.st_mtime_ns))
    # all is as before but the change time, which nobody can set
    assert layer_digest(fd, cache) == digest_of(layer)
    os.close(fd)


def test_a_layer_not_yet_at_rest_is_not_remembered(layer: Path) -> None:
    fd = open_tree(layer)
    (layer / "usr/empty").write_bytes(b"just now")
    cache = MemoryTreeCache()
    layer_digest(fd, cache)
    assert cache.get(key_of(fd)) is None
    os.close(fd)


def test_a_file_cache_is_private_and_holds_within_its_boot_only(tmp_path: Path, rest: int) -> None:
    path = tmp_path / "trees.json"
    digest = layer_digest(rest, FileTreeCache(path, "boot one"))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert FileTreeCache(path, "boot one").get(key_of(rest)) == digest
    assert FileTreeCache(path, "boot two").get(key_of(rest)) is None
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("spoil", ["mode", "link", "truncated", "nested", "length"])
def test_a_file_cache_that_cannot_be_believed_counts_as_empty(
    tmp_path: Path, rest: int, spoil: str
) -> None:
    path = tmp_path / "trees.json"
    layer_digest(rest, FileTreeCache(path, "boot"))
    text = path.read_text()
    if spoil == "mode":
        path.chmod(0o620)
    elif spoil == "link":
        path.rename(tmp_path / "moved")
        path.symlink_to("moved")
    elif spoil == "truncated":
        path.write_text(text[:-3])
    elif spoil == "nested":
        path.write_text("[" * 100_000)
    else:
        path.write_text(text.replace('"]}}', '00"]}}'))
    assert FileTreeCache(path, "boot").get(key_of(rest)) is None


def test_a_file_cache_that_cannot_be_written_stops_nobody(tmp_path: Path, rest: int) -> None:
    cache = FileTreeCache(tmp_path / "gone" / "trees.json", "boot")
    digest = layer_digest(rest, cache)
    assert digest == tree_digest(read_tree(rest).entries)
    assert cache.get(key_of(rest)) == digest


@pytest.fixture
def restless() -> Iterator[None]:
    """Threads take turns as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("restless")
def test_a_file_cache_serves_those_who_measure_at_once(tmp_path: Path) -> None:
    cache = FileTreeCache(tmp_path / "trees.json", "boot")
    keys = [TreeKey(1, inode, bytes(32)) for inode in range(400)]
    errors = []

    def remember(mine: list[TreeKey]) -> None:
        try:
            for key in mine:
                cache.put(key, bytes(32))
        except RuntimeError as error:
            errors.append(error)

    threads = [threading.Thread(target=remember, args=(keys[n::4],)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    again = FileTreeCache(tmp_path / "trees.json", "boot")
    assert all(again.get(key) for key in keys)
