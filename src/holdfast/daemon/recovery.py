"""`recover`: what on disk is not as the host TPM or the registry remembers it, and the way on.

Two ways, each with a reason that is journalled: to have all that is on disk accepted, which the
recovery key must sign and every later evidence shows; and to give up one thing that is gone.
Nothing is mended by itself.

Not here: whether it is the newest (`keeper.freshness`), and the signature (`keeper.signing`).
"""

from __future__ import annotations

import contextlib
from dataclasses import asdict, dataclass
from typing import Any, Final
from uuid import UUID

from holdfast.daemon import instances
from holdfast.daemon.host import Host
from holdfast.errors import Conflict, IntegrityError, NotFound
from holdfast.instance.worker_link import WRAPPED_MAX
from holdfast.protocol import ipc

KEYS_AT_ONCE: Final = 256  # of at most WRAPPED_MAX, in one message
_ORPHAN: Final = "it is of no vTPM that the registry has: it is left as it is"


@dataclass(frozen=True)
class Wrong:
    """One vTPM, row or state that cannot be used; `id` is empty where that is not known."""

    name: str
    id: str
    why: str


async def found(host: Host) -> dict[str, Any]:
    """What there is to recover; nothing is changed. HostError while the keeper is not open."""
    wrong = _wrong(host)
    link, why = b"", ""
    try:
        await host.committer.ready()
        refused = bool(host.registry.states.set_back())
    except IntegrityError:
        refused = True
    if refused:
        try:
            with contextlib.suppress(Conflict):  # it has become the newest meanwhile
                link, why = await host.committer.recovery()
        except IntegrityError as error:  # not even the leaves can be read
            why = str(error)
    return {
        "needed": bool(why or wrong),
        "why": why,
        "link": link.hex(),
        "vtpms": [asdict(each) for each in wrong],
        "accepted": [],
    }


def _wrong(host: Host) -> list[Wrong]:
    states = host.registry.states
    wrong = [Wrong(name, "", f"its row is damaged: {why}") for name, why in host.left.items()]
    names: dict[str, str] = {}
    for vtpm in host.all():
        record = vtpm.record
        names[str(record.id)] = record.name
        wrong += [
            Wrong(record.name, str(record.id), finding.says)
            for finding in instances.findings_of(host.registry, record)
            if finding.level == "problem"
        ]
    orphans = states.orphans()
    wrong += [Wrong("", own, _ORPHAN) for own in orphans]
    told = {each.id for each in wrong}
    wrong += [
        Wrong(names.get(own, ""), own, "the host TPM remembers it, and there is no state of it")
        for own in states.missing()
        if own not in told
    ]
    return wrong


async def accept(host: Host, link: bytes, reason: str, signature: bytes) -> dict[str, Any]:
    """Have what is on disk accepted, as the recovery key's signature says.

    Conflict if it is not what was signed any more, or of no use to this keeper; Forbidden if that
    is not the recovery key's.
    """
    if not await _of_this_keeper(host):
        raise Conflict(
            "no data key on disk opens under this keeper's root key: the registry and the keeper's "
            "file are of two copies, as from before and after a holdfast rekey. Nothing was "
            "changed: put both back from one"
        )
    changed = await host.committer.recover(link, reason, signature)
    for vtpm in host.all():
        host.refused(vtpm, "")  # whatever the reason was, it was of before
    names = {str(vtpm.record.id): vtpm.record.name for vtpm in host.all()}
    return {
        "needed": False,
        "why": "",
        "vtpms": [],
        "accepted": [names.get(own, own) for own in map(str, changed)],
        "recoveries": host.committer.anchor.recoveries,
    }


async def _of_this_keeper(host: Host) -> bool:
    """Whether some vTPM's data key opens, or there is none."""
    keys = []
    for vtpm in host.all():
        with contextlib.suppress(NotFound):
            wrapped = host.registry.states.wrapped(vtpm.record.id)
            keys.append(ipc.WrappedKey(vtpm.record.id, wrapped[:WRAPPED_MAX]))
    for start in range(0, len(keys), KEYS_AT_ONCE):
        asked = ipc.Rewrap(tuple(keys[start : start + KEYS_AT_ONCE]))
        answer, _ = await host.keeper.ask(asked, ipc.Rewrapped)
        if any(key.wrapped for key in answer.keys):
            return True
    return not keys


async def forget(host: Host, name: str, reason: str) -> dict[str, Any]:
    """Give up a row that is no instance, a state of no vTPM, or a vTPM whose state is gone.

    The map remembers that it was destroyed. Conflict for what is well, NotFound for what is not.
    """
    try:
        await host.committer.ready()
    except IntegrityError as error:
        raise IntegrityError(
            f"first what is on disk has to be accepted (holdfast recover --accept-older), then "
            f"{name} can be given up: {error}"
        ) from None
    if name not in host.left and name not in host.registry.states.orphans():
        record = host.find(name).record
        found = instances.findings_of(host.registry, record)
        if not any(finding.level == "problem" for finding in found):
            raise Conflict(f"nothing is wrong with the state of {name}: holdfast rm destroys it")
        host.registry.states.journal(str(record.id), "forget", f"{name}: {reason}")
        await host.destroy(name)
        return {"forgotten": name}
    host.registry.states.journal("", "forget", f"{name}: {reason}")
    if name in host.left:
        await _forget_row(host, name)
    else:
        await host.forget_state(_id(name))
        host.registry.database.empty_log()
    await host.committer.anchor_durably()
    return {"forgotten": name}


async def _forget_row(host: Host, name: str) -> None:
    rows = host.registry.rows_shown_as(name)
    if len(rows) != 1:
        raise Conflict(f"{len(rows)} rows of the registry look like {name}: nothing was changed")
    try:
        own = UUID(rows[0].decode())
    except ValueError:
        pass  # a row with such an id has no state
    else:
        await host.forget_state(own)
    host.registry.remove_row(rows[0])
    del host.left[name]


def _id(name: str) -> UUID:
    try:
        return UUID(name)
    except ValueError:
        raise NotFound(f"there is no state of {name}") from None
