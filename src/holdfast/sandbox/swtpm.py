"""The box of the program that stands for swtpm: no new process, no new code, no privileges.

It keeps the file system as its user sees it, because its state is there and its caller's choice.
"""

from __future__ import annotations

import resource
from collections.abc import Callable, Mapping
from typing import Final

from holdfast.linux import process, seccomp
from holdfast.linux.seccomp import Rule
from holdfast.sandbox import worker

_ANY: Final[Rule] = ()
ALLOWED: Final[Mapping[str, Rule]] = {
    **worker.ALLOWED,
    # files of state, sockets to be taken away, descriptors that are handed over
    **dict.fromkeys(
        (
            "openat", "stat", "lstat", "newfstatat", "pread64", "pwrite64", "ftruncate", "fsync",
            "fchmod", "rename", "renameat", "renameat2", "unlink", "unlinkat", "fcntl", "ioctl",
            "dup2", "dup3", "sched_yield", "clock_nanosleep", "select", "pselect6", "getuid",
            "geteuid", "getgid", "getegid", "rt_sigaction", "sigaltstack", "getpeername", "getcwd",
            "readlink", "getdents64", "fadvise64",
        ),
        _ANY,
    ),
}  # fmt: skip


def enter(action: int, second_thread: Callable[[Callable[[], None]], None]) -> None:
    """Shut the doors; `action` is what a system call that is not on the list brings.

    `second_thread` begins one, whose first act is what it is given.
    """
    program = seccomp.build(ALLOWED, otherwise=action)
    process.limit(resource.RLIMIT_CORE, 0)
    process.set_no_new_privileges()
    second_thread(lambda: seccomp.load(program))
    seccomp.load(program)
