"""The keeper's box: its own user, no network, locked memory, no new process, no new code.

It keeps the file system as its user sees it, and Unix sockets, because a TCTI may need either.
"""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Mapping
from typing import Final

from holdfast.linux import namespaces, process, seccomp
from holdfast.linux.namespaces import Clone
from holdfast.linux.seccomp import Match, Op, Rule

_PROT_EXEC: Final = 4
_AF_UNIX: Final = 1
_ANY: Final[Rule] = ()
_NO_EXEC: Final[Rule] = (Match(2, Op.MASKED_EQ, 0, mask=_PROT_EXEC),)

ALLOWED: Final[Mapping[str, Rule]] = {
    **dict.fromkeys(
        (
            "read", "readv", "pread64", "write", "writev", "pwrite64", "close", "lseek", "dup",
            "fstat", "stat", "lstat", "newfstatat", "statx", "openat", "open", "access",
            "readlink", "getdents64", "fcntl", "ioctl", "fsync", "fdatasync", "rename", "renameat",
            "flock", "renameat2", "unlink", "unlinkat", "mkdir", "getcwd", "umask", "faccessat2",
            "epoll_wait", "epoll_pwait", "epoll_ctl", "epoll_create1", "poll", "ppoll", "select",
            "pselect6", "recvfrom", "recvmsg", "sendto", "sendmsg", "accept4", "accept",
            "connect", "bind", "listen", "shutdown", "getsockname", "getpeername", "getsockopt",
            "setsockopt", "brk", "munmap", "mremap", "madvise", "clock_gettime",
            "clock_nanosleep", "nanosleep", "gettimeofday", "time", "getrandom", "getpid",
            "gettid", "getuid", "geteuid", "getgid", "getegid", "futex", "rt_sigreturn",
            "rt_sigprocmask", "rt_sigaction", "sigaltstack", "sched_yield", "exit", "exit_group",
            "restart_syscall", "uname", "sysinfo", "prlimit64", "sched_getaffinity", "mlock",
        ),
        _ANY,
    ),
    "mmap": _NO_EXEC,
    "mprotect": _NO_EXEC,
    "socket": (Match(0, Op.EQ, _AF_UNIX),),
    "socketpair": (Match(0, Op.EQ, _AF_UNIX),),
}  # fmt: skip


def enter(uid: int, gid: int) -> tuple[str, ...]:
    """Shut every door; returns what this host would not let us do, in words."""
    lacking = []
    program = seccomp.build(ALLOWED)
    try:
        namespaces.leave(Clone.NEWNET)
    except OSError:
        lacking.append("no network namespace of its own")
    process.limit(resource.RLIMIT_CORE, 0)
    try:
        process.limit(resource.RLIMIT_MEMLOCK, resource.RLIM_INFINITY)
    except (OSError, ValueError):
        lacking.append("memory can be locked only up to the limit it was started with")
    try:
        process.lock_memory()
    except OSError:
        lacking.append("memory is not locked against swap")
    if uid:
        os.setgroups([])
        os.setresgid(gid, gid, gid)
        os.setresuid(uid, uid, uid)
    process.set_pdeathsig(signal.SIGTERM)  # after the change of user, which clears it
    process.set_dumpable(False)
    process.set_no_new_privileges()
    seccomp.load(program)
    return tuple(lacking)
