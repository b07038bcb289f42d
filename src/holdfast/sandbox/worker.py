"""The worker's box: no files, no network, no other process, no new code.

The process is already in namespaces of its own (user, pid, net, mount, ipc, uts, cgroup), in its
own cgroup, and on the empty root file system of the process that forked it (`enclose`). The order
matters and is the list `steps`: what each thread has for itself is shut before there is a second,
and the filter is the last.
"""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Callable, Mapping
from typing import Final, NamedTuple

from holdfast.linux import process, seccomp
from holdfast.linux.mounts import Ms, mount, pivot_root_here
from holdfast.linux.namespaces import Clone, become_mapped_root, leave
from holdfast.linux.seccomp import Match, Op, Rule
from holdfast.tpm2.constants import BUFFER_MAX

OPEN_FILES: Final = 128  # 64 connections, channels, listeners, /dev/fuse, epoll
_PROT_EXEC: Final = 4
_NO_EXEC: Final[Rule] = (Match(2, Op.MASKED_EQ, 0, mask=_PROT_EXEC),)
_ANY: Final[Rule] = ()
_AT_EMPTY_PATH: Final = 0x1000
_F_DUPFD_CLOEXEC: Final = 1030

# What a life needs, seen by running it; the rehearsal of every blank worker runs it again.
ALLOWED: Final[Mapping[str, Rule]] = {
    # waiting and talking, on descriptors that were passed in
    **dict.fromkeys(
        (
            "epoll_wait", "epoll_pwait", "epoll_ctl", "epoll_create1", "poll", "ppoll",
            # no sendmsg: a descriptor that was passed in must not be passed on
            "recvfrom", "recvmsg", "sendto", "accept4", "accept",
            "getsockname", "getsockopt", "setsockopt", "shutdown",
            "read", "readv", "write", "writev", "close", "fstat", "lseek",
        ),
        _ANY,
    ),
    # fstat() as glibc calls it; there is no file to find by a path
    "newfstatat": (Match(3, Op.EQ, _AT_EMPTY_PATH),),
    # memory, never executable
    "brk": _ANY,
    "munmap": _ANY,
    "mremap": _ANY,
    "madvise": _ANY,
    "mmap": _NO_EXEC,
    "mprotect": _NO_EXEC,
    # time, entropy, threads' waiting, signals' return, the end
    **dict.fromkeys(
        (
            "clock_gettime", "clock_nanosleep", "gettimeofday", "getrandom", "getpid", "gettid",
            "futex", "rt_sigreturn", "rt_sigprocmask", "sched_yield", "exit", "exit_group",
            "restart_syscall",
        ),
        _ANY,
    ),
    # blocking or not, of descriptors it has
    "fcntl": (Match(1, Op.EQ, _F_DUPFD_CLOEXEC),),  # mmap.mmap keeps a duplicate
    "ioctl": (Match(1, Op.EQ, 0x5421),),  # FIONBIO
    "socketpair": (Match(0, Op.EQ, 1),),  # AF_UNIX, for the rehearsal: connected to itself
}  # fmt: skip


class Step(NamedTuple):
    """One door: what is shut, and how."""

    describe: str
    run: Callable[[], None]


class WorkerSandbox:
    """Prepared once, entered by every worker."""

    def __init__(self) -> None:
        self._program = seccomp.build(ALLOWED)

    def steps(self, second_thread: Callable[[], None]) -> tuple[Step, ...]:
        return (
            Step("root of its own user namespace, nobody outside", become_mapped_root),
            Step("ended when the spawner ends", lambda: process.set_pdeathsig(signal.SIGKILL)),
            Step("no capabilities", process.drop_capabilities),
            Step("not dumpable", lambda: process.set_dumpable(False)),
            Step("no new privileges", process.set_no_new_privileges),
            Step("a second thread, and no third", second_thread),
            Step("few open files, no core, no new process, no file written", _limits),
            Step("system calls by allow-list", self.confine),
        )

    def confine(self) -> None:
        """Put this thread under the filter."""
        seccomp.load(self._program)

    def enter(self, second_thread: Callable[[], None]) -> None:
        """Shut every door. What fails here is an OSError, and the worker must not go on.

        `second_thread` begins one, whose first act is to `confine` itself.
        """
        process.set_name("holdfast-worker")
        for step in self.steps(second_thread):
            step.run()


def enclose() -> None:
    """An empty tmpfs, read-only, as the only mount of this process and of all that it forks."""
    leave(Clone.NEWNS)
    mount("none", "/", "", Ms.REC | Ms.PRIVATE)
    place = "/tmp"  # noqa: S108 - any directory will do: it is covered, in our namespace only
    flags = Ms.NOSUID | Ms.NODEV | Ms.NOEXEC
    mount("tmpfs", place, "tmpfs", flags, "size=4096,nr_inodes=2,mode=0555")
    mount("none", place, "", Ms.REMOUNT | Ms.BIND | Ms.RDONLY | flags)
    os.chdir(place)
    pivot_root_here()
    os.chdir("/")


def _limits() -> None:
    process.limit(resource.RLIMIT_NOFILE, OPEN_FILES)
    process.limit(resource.RLIMIT_CORE, 0)
    process.limit(resource.RLIMIT_NPROC, 0)
    # A TPM command to a device that is a regular file, as FUSE's are; there is no file to write.
    process.limit(resource.RLIMIT_FSIZE, BUFFER_MAX)
