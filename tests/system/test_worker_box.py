"""The worker's box, door by door; and that no two workers are twins. See test_sandbox as well."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from holdfast.errors import HostError
from holdfast.linux import seccomp
from holdfast.sandbox.worker import ALLOWED, WorkerSandbox
from holdfast.spawner.pool import Blank, Pool
from holdfast.spawner.trial import self_test

from .one_pool import mother, one_pool
from .probes import LIBC, Probe, ending

X32 = 0x40000000
LAST_CALL = 462  # of the kernels this is run on; what is newer is not in the list either
# uretprobe and uprobe, which Linux 6.11 and 6.18 let pass every filter: they are the trap by which
# a probe of root's in a program's code enters the kernel, and do nothing without one.
KERNELS_OWN = (335, 336)
# Whatever the allow-list becomes: with one of these a worker could reach beyond itself.
NEVER = frozenset((
    "open", "openat", "openat2", "creat", "name_to_handle_at", "open_by_handle_at", "socket",
    "connect", "bind", "listen", "sendmsg", "sendmmsg", "fork", "vfork", "clone", "clone3",
    "execve", "execveat", "ptrace", "process_vm_readv", "process_vm_writev", "pidfd_open",
    "pidfd_getfd", "pidfd_send_signal", "kill", "tkill", "tgkill", "mount", "umount2",
    "move_mount", "fsopen", "pivot_root", "chroot", "setns", "unshare", "keyctl", "add_key",
    "request_key", "bpf", "perf_event_open", "userfaultfd", "io_uring_setup", "memfd_create",
    "memfd_secret", "shmget", "shmat", "pkey_mprotect", "personality", "prctl", "arch_prctl",
    "seccomp", "setuid", "setgid", "setresuid", "setresgid", "capset", "prlimit64", "init_module",
    "finit_module", "kexec_load", "iopl", "ioperm", "modify_ldt", "sendfile", "splice", "unlink",
    "rename", "link", "symlink", "chmod", "chown", "ftruncate", "fallocate", "fanotify_init",
    "inotify_init",
))  # fmt: skip


@pytest.fixture(scope="module")
def pool() -> Pool:
    return one_pool()


@pytest.fixture
def blank(pool: Pool) -> Iterator[Blank]:
    made = pool.make()
    yield made
    made.discard()


def number(name: str) -> int:
    """Of a system call on this machine; negative if it has none of that name."""
    library = ctypes.CDLL(seccomp.LIBRARY)
    return int(library.seccomp_syscall_resolve_name(name.encode()))


def test_nothing_that_reaches_beyond_the_worker_is_on_its_list() -> None:
    assert not NEVER & set(ALLOWED)
    assert all(number(name) >= 0 for name in ALLOWED)


def test_every_system_call_that_is_not_on_the_list_is_death() -> None:
    allowed = {number(name) for name in ALLOWED}
    others = [nr for nr in range(LAST_CALL + 1) if nr not in (*allowed, *KERNELS_OWN)]
    # Through the compatibility ABI those on the list are not what they are either.
    others += [X32 | number(name) for name in ("read", "execve", "ptrace")]

    def call(nr: int) -> Probe:
        return lambda: LIBC.syscall(nr, 0, 0, 0, 0, 0, 0)

    lived = [nr for nr in others if ending(call(nr)) != "SIGSYS"]
    assert lived == []


@pytest.mark.parametrize(
    ("what", "probe"),
    [
        ("a socket pair for the network", lambda: LIBC.socketpair(2, 1, 0, 0)),
        ("a terminal's input", lambda: LIBC.ioctl(0, 0x5412, 0)),
        ("another FUSE channel", lambda: LIBC.ioctl(3, 0x8004E500, 0)),
        ("signals from a descriptor", lambda: LIBC.fcntl(3, 8, 1)),
        ("a descriptor's flags", lambda: LIBC.fcntl(3, 4, 0)),
        ("a file's attributes by its name", lambda: os.stat("/")),
        ("executable memory, written before", lambda: LIBC.mprotect(0, 4096, 5)),
        ("executable memory alone", lambda: LIBC.syscall(number("mmap"), 0, 4096, 4, 34, -1, 0)),
    ],
)
def test_of_what_is_allowed_in_part_the_rest_is_death(what: str, probe: Probe) -> None:
    assert ending(probe) == "SIGSYS", what


@pytest.mark.parametrize(
    "missing",
    # Manufacture and sealing; then what serving a client takes, as strace shows it of a worker.
    ["getrandom", "sendto", "recvmsg", "close", "poll", "accept4", "read", "write", "ioctl"],
)
def test_a_system_call_that_is_missing_is_found_at_the_spawners_start(
    pool: Pool, missing: str
) -> None:
    whole = mother().sandbox
    less = WorkerSandbox()
    less._program = seccomp.build({k: v for k, v in ALLOWED.items() if k != missing})
    mother().sandbox = less
    try:
        with pytest.raises(HostError, match="the sandbox forbids a system call it needs"):
            self_test(pool)
    finally:
        mother().sandbox = whole
    self_test(pool)


def test_a_worker_cannot_be_looked_into_by_others_of_its_user(blank: Blank) -> None:
    user = int(re.findall(r"Uid:\t(\d+)", Path(f"/proc/{blank.pid}/status").read_text())[0])
    assert user >= 0x70000000
    for name in ("environ", "mem", "maps", "auxv", "fd"):  # of a dumpable one they are its user's
        assert Path(f"/proc/{blank.pid}/{name}").stat().st_uid == 0, name


def test_two_workers_have_two_users(pool: Pool, blank: Blank) -> None:
    other = pool.make()
    try:
        users = {
            re.findall(r"Uid:\t(\d+)", Path(f"/proc/{each.pid}/status").read_text())[0]
            for each in (blank, other)
        }
        assert len(users) == 2
    finally:
        other.discard()


def test_a_worker_has_no_file_and_nowhere_to_put_one(blank: Blank) -> None:
    proc = Path(f"/proc/{blank.pid}")
    descriptors = {int(p.name): os.readlink(p) for p in (proc / "fd").iterdir()}
    assert sorted(descriptors) == [0, 1, 2, 3, 4]
    assert [(proc / "fd" / str(n)).stat().st_rdev for n in range(3)] == [os.makedev(1, 3)] * 3
    assert descriptors[3].startswith("socket:")
    assert descriptors[4] == "anon_inode:[eventfd]"  # by which its second thread is woken
    (line,) = (proc / "mounts").read_text().splitlines()
    assert line.split()[1:3] == ["/", "tmpfs"]
    assert set(line.split()[3].split(",")) >= {"ro", "nosuid", "nodev", "noexec"}
    assert stat.S_IMODE(os.stat(proc / "root").st_mode) == 0o555


def test_a_worker_is_bounded(blank: Blank) -> None:
    limits = Path(f"/proc/{blank.pid}/limits").read_text()
    for what, most in (
        ("Max open files", 128), ("Max core file size", 0), ("Max processes", 0),
        ("Max file size", 4096),  # one TPM command, to a device
    ):  # fmt: skip
        soft, hard = re.findall(rf"{what} +(\S+) +(\S+)", limits)[0]
        assert soft == hard == str(most), what
    found = {}
    for group in blank.groups:
        assert str(blank.pid) in (group / "cgroup.procs").read_text().split()
        for name in ("memory.limit_in_bytes", "memory.max", "pids.max"):
            if (group / name).exists():
                found[name.partition(".")[0]] = int((group / name).read_text())
    assert 0 < found["memory"] <= 96 << 20
    assert 0 < found["pids"] <= 2


def test_a_worker_is_alone_in_its_groups_and_they_go_with_it(pool: Pool) -> None:
    made = pool.make()
    for group in made.groups:
        assert (group / "cgroup.procs").read_text().split() == [str(made.pid)]
    made.discard()
    assert not [group for group in made.groups if group.exists()]


# --- twins ---------------------------------------------------------------------------------------

needs_unshare = pytest.mark.skipif(not shutil.which("unshare"), reason="unshare is not installed")
UNSHARE = ("unshare", "--pid", "--fork", "--mount-proc")


@needs_unshare
@pytest.mark.parametrize(
    ("command", "spawner", "worker"),
    [
        ((*UNSHARE, sys.executable, "-m", "tests.system.pool_twins"), 1, 1),
        # sh is process 1 and stays, as it has something to do afterwards
        ((*UNSHARE, "sh", "-c", '"$@"; exit $?', "sh", sys.executable, "-m",
          "tests.system.pool_twins"), 2, 1),
        ((*UNSHARE, "sh", "-c", '"$@"; exit $?', "sh", sys.executable, "-m",
          "tests.system.pool_twins", "by-hand"), 2, 2),
    ],
    ids=["1/1", "2/1", "2/2"],
)  # fmt: skip
def test_a_hundred_workers_of_the_same_pid_are_no_twins(
    command: tuple[str, ...], spawner: int, worker: int
) -> None:
    """OpenSSL notices a fork by getpid() alone."""
    done = subprocess.run(
        command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=60,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()]
    assert len(rows) == 100
    assert {(int(row[0]), int(row[1])) for row in rows} == {(spawner, worker)}
    randoms = {text for row in rows for text in row[2:4]}
    assert len(randoms) == 200
    assert len({row[4] for row in rows}) == 100


def test_a_probe_in_a_worker_is_known_to_have_run() -> None:
    """What the tests above rest on: a worker that does nothing wrong says so and ends well."""
    left, right = socket.socketpair()
    with left, right:
        assert ending(lambda: None) == "survived"
        assert ending(lambda: 1 / 0) == "raised"
