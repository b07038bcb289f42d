"""Who a program runs as."""

from __future__ import annotations

import grp
import os
import pwd

from holdfast.errors import HostError, InvalidInput


def become(user: str) -> None:
    """Change to this user and its groups, for good. InvalidInput if there is no such user."""
    try:
        entry = pwd.getpwnam(user)
    except KeyError:
        raise InvalidInput(f"Error: User '{user}' does not exist.") from None
    try:
        os.initgroups(user, entry.pw_gid)
        os.setresgid(entry.pw_gid, entry.pw_gid, entry.pw_gid)
        os.setresuid(entry.pw_uid, entry.pw_uid, entry.pw_uid)
    except OSError as error:
        raise HostError(f"Error: cannot become {user}: {error.strerror}") from None


def name() -> str:
    """The name of this user, or its number."""
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return str(os.getuid())


def group() -> str:
    """The name of this group, or its number."""
    try:
        return grp.getgrgid(os.getgid()).gr_name
    except KeyError:
        return str(os.getgid())
