"""Where the root key is, and where it is not: shown on a real keeper, by root looking into it."""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from uuid import UUID, uuid4

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from holdfast.errors import IntegrityError
from holdfast.keeper.rootkey import SIZE, RootKey
from holdfast.linux.secret import Kind, SecretMemory, fill_random
from holdfast.protocol import ipc
from tests.scanning import Scanner

from .box import Box, Worker

INFO = b"holdfast/data-key/1"
MINE = UUID(int=7)
# A process whose filter refuses the call, as an older kernel or a container's would: BPF that
# compares the number of the system call, then allows everything else.
WITHOUT = """
import ctypes, resource, struct, sys
libc = ctypes.CDLL(None, use_errno=True)
program = b"".join(struct.pack("=HBBI", *step) for step in (
    (0x20, 0, 0, 0), (0x15, 0, 1, 447), (0x06, 0, 0, 0x00050026), (0x06, 0, 0, 0x7FFF0000)))
buffer = ctypes.create_string_buffer(program)
class Program(ctypes.Structure):
    _fields_ = [("size", ctypes.c_ushort), ("steps", ctypes.c_void_p)]
made = Program(4, ctypes.addressof(buffer))
assert libc.prctl(38, 1, 0, 0, 0) == 0
assert libc.prctl(22, 2, ctypes.byref(made), 0, 0) == 0, ctypes.get_errno()
"""
NO_LOCKING = "resource.setrlimit(resource.RLIMIT_MEMLOCK, (0, 0)); os.setresuid(*[65534] * 3)"


@pytest.fixture
def root() -> RootKey:
    made = RootKey(SecretMemory())
    fill_random(made.sealed)
    return made


def granted(root: RootKey, instance: UUID, wrapped: bytes = b"") -> ipc.KeyGrant:
    with root.grant(instance, wrapped, 7, b"d" * 32) as packet:
        answer = ipc.decode(bytes(packet))
    assert isinstance(answer, ipc.KeyGrant)
    return answer


def wrapping_key(root_key: bytes) -> bytes:
    return HKDF(SHA256(), SIZE, None, INFO).derive(root_key)


def test_another_library_opens_what_was_wrapped_and_what_it_wrapped_opens(root: RootKey) -> None:
    cipher = AESGCM(wrapping_key(bytes(root.sealed[:SIZE])))
    grant = granted(root, MINE)
    nonce, hidden = grant.wrapped[:12], grant.wrapped[12:]
    assert cipher.decrypt(nonce, hidden, INFO + MINE.bytes) == grant.data_key
    theirs = os.urandom(12)
    wrapped = theirs + cipher.encrypt(theirs, b"k" * SIZE, INFO + MINE.bytes)
    assert granted(root, MINE, wrapped) == ipc.KeyGrant(b"k" * SIZE, wrapped, 7, b"d" * 32)


@pytest.mark.parametrize("place", [0, 11, 12, 43, 44, 59])
def test_a_wrapped_key_that_was_changed_does_not_open(root: RootKey, place: int) -> None:
    wrapped = bytearray(granted(root, MINE).wrapped)
    wrapped[place] ^= 1
    with pytest.raises(IntegrityError, match="another instance's, or another host's"):
        granted(root, MINE, bytes(wrapped))


def test_a_wrapped_key_of_another_size_or_instance_does_not_open(root: RootKey) -> None:
    wrapped = granted(root, MINE).wrapped
    for other in (wrapped[:-1], wrapped + b"x", b"x"):
        with pytest.raises(IntegrityError):
            granted(root, MINE, other)
    with pytest.raises(IntegrityError):
        granted(root, uuid4(), wrapped)


def test_each_new_key_is_another() -> None:
    root = RootKey(SecretMemory())
    grants = [granted(root, MINE) for _ in range(50)]
    assert len({grant.data_key for grant in grants}) == 50
    assert len({grant.wrapped[:12] for grant in grants}) == 50


def test_what_was_granted_is_overwritten_whether_or_not_it_could_be_sent() -> None:
    shared = SecretMemory()
    made = RootKey(shared)
    fill_random(made.sealed)
    behind = len(made.sealed)
    grant = granted(made, MINE)
    assert not any(shared.view[behind:])
    with (
        contextlib.suppress(BrokenPipeError),
        made.grant(MINE, grant.wrapped, 7, b"d" * 32) as packet,
    ):
        assert grant.data_key in bytes(packet)
        raise BrokenPipeError
    assert not any(shared.view[behind:])
    with pytest.raises(IntegrityError):
        granted(made, uuid4(), grant.wrapped)
    assert not any(shared.view[behind:])
    made.forget()
    assert not any(shared.view)


def with_next(root: RootKey) -> RootKey:
    fill_random(root.next)
    root.has_next = True
    return root


def test_beside_a_next_root_key_keys_open_under_either_and_are_wrapped_under_the_next(
    root: RootKey,
) -> None:
    before = granted(root, MINE)
    with_next(root)
    again = granted(root, MINE, before.wrapped)
    assert again.data_key == before.data_key
    assert again.wrapped != before.wrapped
    assert granted(root, MINE, again.wrapped) == again
    cipher = AESGCM(wrapping_key(bytes(root.next[:SIZE])))
    for grant in (again, granted(root, MINE)):
        nonce, hidden = grant.wrapped[:12], grant.wrapped[12:]
        assert cipher.decrypt(nonce, hidden, INFO + MINE.bytes) == grant.data_key
    root.promote()
    assert not any(root.next)
    assert granted(root, MINE, again.wrapped) == again
    with pytest.raises(IntegrityError, match="before holdfast rekey"):
        granted(root, MINE, before.wrapped)


def test_what_is_wrapped_anew_holds_the_same_key_and_only_once(root: RootKey) -> None:
    before = granted(root, MINE)
    assert root.rewrap(MINE, before.wrapped) == before.wrapped
    with_next(root)
    again = root.rewrap(MINE, before.wrapped)
    assert again != before.wrapped
    assert root.rewrap(MINE, again) == again
    for instance, wrapped in ((uuid4(), before.wrapped), (MINE, before.wrapped[:-1]), (MINE, b"")):
        with pytest.raises(IntegrityError):
            root.rewrap(instance, wrapped)
    root.promote()
    assert granted(root, MINE, again).data_key == before.data_key


def test_a_key_that_is_to_follow_comes_with_the_one_before(root: RootKey) -> None:
    before = granted(root, MINE)
    with root.grant(MINE, before.wrapped, 7, b"d" * 32, successor=True) as packet:
        both = ipc.decode(bytes(packet))
    assert isinstance(both, ipc.KeyGrant)
    assert both.data_key == before.data_key
    assert len(both.successor) == SIZE
    assert both.successor != both.data_key
    assert granted(root, MINE, both.wrapped).data_key == both.successor


def test_a_successor_is_a_new_root_key_with_the_rest_of_what_was_sealed(root: RootKey) -> None:
    auth = b"a" * 32
    made = []
    for _ in range(2):
        with root.successor(SIZE + 32, auth) as sensitive:
            made.append(bytes(sensitive))
        assert not any(sensitive)
    for each in made:
        assert each[:34] == b"\0\x20" + auth
        assert each[34:36] == b"\0\x40"
        assert each[36 + SIZE :] == bytes(root.sealed[SIZE : SIZE + 32])
    assert len({each[36 : 36 + SIZE] for each in made} | {bytes(root.sealed[:SIZE])}) == 3


def test_where_the_kernel_has_it_not_even_root_reads_the_memory() -> None:
    secret = SecretMemory()
    if secret.kind is not Kind.MEMFD_SECRET:
        pytest.skip(f"this kernel gives no memfd_secret: {secret.why_not}")
    fill_random(secret.view[:SIZE])
    text = bytes(secret.view[:SIZE]).hex()
    where = [line for line in Path("/proc/self/maps").read_text().splitlines() if "secret" in line]
    assert where
    with open("/proc/self/mem", "rb", buffering=0) as file:
        for line in where:
            start = int(line.partition("-")[0], 16)
            with pytest.raises(OSError, match="Input/output error"):
                os.pread(file.fileno(), 1, start)
    assert bytes(secret.view[:SIZE]).hex() == text  # and yet it is there
    links = [os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")]
    assert not [link for link in links if "secretmem" in link]


@pytest.mark.parametrize(("limit", "kind"), [("", "LOCKED"), (NO_LOCKING, "UNLOCKED")])
def test_without_the_call_it_is_locked_memory_that_no_core_and_no_child_has(
    limit: str, kind: str
) -> None:
    program = f"""{WITHOUT}
import os
from holdfast.linux.secret import SecretMemory
{limit}
made = SecretMemory()
made.view[:4] = b"here"
assert made.why_not == "memfd_secret: Function not implemented", made.why_not
for line in open("/proc/self/smaps"):
    word = line.split()
    if word[0] == "VmFlags:" and "wf" in word:
        print(made.kind.name, "dd" in word, "lo" in word)
if os.fork() == 0:
    os._exit(made.view[:4] != bytes(4))
print(os.waitstatus_to_exitcode(os.wait()[1]))
"""
    if limit and os.geteuid() != 0:
        pytest.skip("only root can become somebody else")
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
    )
    locked = kind == "LOCKED"
    assert done.stdout.split() == [kind, "True", str(locked), "0"], done.stderr


# --- the keeper, as it runs ----------------------------------------------------------------------


@pytest.fixture
def serving(box: Box) -> Iterator[tuple[Box, dict[str, bytes]]]:
    """A keeper that has given out keys; and what is secret about it."""
    if os.geteuid() != 0:
        pytest.skip("only root may look into the keeper")
    shared = SecretMemory()
    custody = box.custody(shared)
    root_key = bytes(shared.view[:SIZE])
    custody.close()
    box.start()
    instance = uuid4()
    with box.connect() as client:
        with Worker() as worker:
            worker.lease(client, instance, ipc.Done)
            first = worker.key(b"", ipc.KeyGrant)
        with Worker() as worker:
            worker.lease(client, instance, ipc.Done)
            assert worker.key(first.wrapped, ipc.KeyGrant) == first
    secrets = {
        "root key": root_key,
        "pseudorandom key": hmac.digest(bytes(SIZE), root_key, hashlib.sha256),
        "wrapping key": wrapping_key(root_key),
        "data key": first.data_key,
    }
    AESGCM(secrets["wrapping key"]).decrypt(
        first.wrapped[:12], first.wrapped[12:], INFO + instance.bytes
    )  # else it would not be the keeper's root key
    return box, secrets


def keeper_of(box: Box) -> int:
    assert box.process is not None
    return box.process.pid


def smaps(pid: int) -> str:
    return Path(f"/proc/{pid}/smaps").read_text()


def state_of(box: Box) -> ipc.KeeperState:
    with box.connect() as client:
        return client.ask(ipc.KeeperStatus(), ipc.KeeperState)


def test_no_key_is_in_what_root_can_read_of_the_keeper(
    serving: tuple[Box, dict[str, bytes]],
) -> None:
    box, secrets = serving
    if state_of(box).root_key_memory != Kind.MEMFD_SECRET.value:
        pytest.skip("this kernel gives no memfd_secret")
    assert Scanner(secrets).in_memory(keeper_of(box)) == set()
    # Nor would it be overlooked: what the keeper is known to have is found the same way.
    known = {"authorization of a blob": box.vault().root_key.auth}
    assert Scanner(known).in_memory(keeper_of(box)) == set(known)


def test_a_root_key_that_follows_another_is_not_in_it_either(box: Box) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root may look into the keeper")
    box.start()
    if state_of(box).root_key_memory != Kind.MEMFD_SECRET.value:
        pytest.skip("this kernel gives no memfd_secret")
    known: dict[str, bytes] = {}

    def note(name: str) -> None:
        """Look at what is sealed, by a TPM that the keeper does not use meanwhile."""
        shared = SecretMemory()
        custody = box.custody(shared)
        known[name] = bytes(shared.view[:SIZE])
        room = len(RootKey(SecretMemory()).sealed)
        known[f"{name}, next"] = bytes(shared.view[room : room + SIZE])
        custody.close()

    with box.connect() as client:
        client.ask(ipc.BeginRekey(), ipc.Done)
        note("before")
        assert Scanner(known).in_memory(keeper_of(box)) == set()
    box.stop()
    box.start()
    with box.connect() as client:
        client.ask(ipc.EndRekey(), ipc.Done)
        note("after")
        del known["after, next"]  # there is none
        assert known["after"] == known["before, next"] != known["before"]
        assert Scanner(known).in_memory(keeper_of(box)) == set()


def test_the_keepers_memory_is_locked_and_none_of_it_is_swapped(
    serving: tuple[Box, dict[str, bytes]],
) -> None:
    box, _ = serving
    parts = re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", smaps(keeper_of(box)), flags=re.MULTILINE)[1:]
    assert all(re.search(r"^Swap: +0 kB$", part, re.MULTILINE) for part in parts)
    unlocked = [part for part in parts if " lo" not in part.splitlines()[-1]]
    assert not [part for part in unlocked if "/secretmem" in part]
    if "memory can be locked only up to the limit" in box.log:  # then all that there was by then
        assert len(unlocked) < len(parts) / 2
    else:
        assert not [part for part in unlocked if "[v" not in part.splitlines()[0]]


def test_nobody_of_its_own_user_may_look_into_the_keeper(
    serving: tuple[Box, dict[str, bytes]],
) -> None:
    box, _ = serving
    pid = keeper_of(box)
    status = dict(
        line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines()
    )
    user = int(status["Uid"].split()[0])
    assert user != 0
    assert os.stat(f"/proc/{pid}/mem").st_uid == 0  # so it is not dumpable
    looked = (
        f"import os; os.setgroups([]); os.setresgid({user}, {user}, {user}); "
        f"os.setresuid({user}, {user}, {user}); open('/proc/{pid}/mem', 'rb')"
    )
    done = subprocess.run(
        [sys.executable, "-c", looked], capture_output=True, text=True, timeout=60, check=False
    )
    assert "PermissionError" in done.stderr


def test_a_keeper_may_write_no_core(serving: tuple[Box, dict[str, bytes]]) -> None:
    pid = keeper_of(serving[0])
    limits = Path(f"/proc/{pid}/limits").read_text()
    assert re.search(r"^Max core file size +0 +0 ", limits, re.MULTILINE)


def test_where_the_root_key_is_is_said(serving: tuple[Box, dict[str, bytes]]) -> None:
    box, _ = serving
    said = state_of(box).root_key_memory
    assert said in {kind.value for kind in Kind}
    assert (said == Kind.MEMFD_SECRET.value) is ("the root key will be in" not in box.log)
    mapped = Path(f"/proc/{keeper_of(box)}/maps").read_text()
    assert (said == Kind.MEMFD_SECRET.value) is ("/secretmem" in mapped)
    links = [os.readlink(link) for link in Path(f"/proc/{keeper_of(box)}/fd").iterdir()]
    assert not [link for link in links if "secretmem" in link]
