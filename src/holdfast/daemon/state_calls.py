"""The API's calls about states: snapshots, backups, recovery, other keys.

To take a snapshot and to list them is an owner's too; all that sets something back, takes it away
or lets it out of the registry is root's alone.

Not here: other calls, and what an error is to a caller (`api`).
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping
from typing import Any, Final
from uuid import UUID

from aiohttp import web

from holdfast.daemon import recovery
from holdfast.daemon.host import Host
from holdfast.daemon.keeping import Keeping, reason_of
from holdfast.daemon.requests import Caller, body_of, caller, hexed, typed
from holdfast.errors import Conflict, InvalidInput
from holdfast.ids import instance_id
from holdfast.instance.rekeying import PARTS, Progress
from holdfast.instance.snapshots import Restored
from holdfast.instance.vtpm import VirtualTpm
from holdfast.store.snapshots import Listed, Snapshot

_CREATE: Final[Mapping[str, type]] = {"name": str}
_REASON: Final[Mapping[str, type]] = {"reason": str}
_BACKUP: Final[Mapping[str, type]] = {
    "id": str, "instance": str, "epoch": int, "created": str, "sealed": str, "wrapped": str,
    "reason": str,
}  # fmt: skip
_RECOVER: Final[Mapping[str, type]] = {"link": str, "reason": str, "signature": str}
_FORGET: Final[Mapping[str, type]] = {"name": str, "reason": str}
_REKEY: Final[Mapping[str, type]] = dict.fromkeys(PARTS, bool)
Audit = Callable[..., None]


class StateCalls:
    """These routes, on one host; `audit` is told of each call that changed something."""

    def __init__(self, host: Host, audit: Audit) -> None:
        self._host = host
        self._keeping = Keeping(host)
        self._audit = audit

    def routes(self) -> list[web.RouteDef]:
        one = "/v1/vtpms/{name}"
        return [
            web.get("/v1/snapshots", self._list),
            web.get(f"{one}/snapshots", self._list),
            web.post(f"{one}/snapshots", self._create),
            web.delete(f"{one}/snapshots/{{snapshot}}", self._remove),
            web.post(f"{one}/snapshots/{{snapshot}}/restore", self._restore),
            web.post(f"{one}/backups", self._back_up),
            web.post(f"{one}/restore", self._restore_backup),
            web.get("/v1/recovery", self._recovery),
            web.post("/v1/recovery", self._recover),
            web.post("/v1/recovery/forget", self._forget),
            web.get("/v1/rekey", self._rekeying),
            web.post("/v1/rekey", self._rekey),
        ]

    # --- snapshots ---

    async def _list(self, request: web.Request) -> web.Response:
        who, name = caller(request), request.match_info.get("name")
        if name is None:
            vtpms = [v for v in self._host.all() if who.uid in (0, v.record.owner)]
        else:
            vtpms = [self._host.find(name)]
            who.must_own(vtpms[0])
        rows = [_snapshot(vtpm, each) for vtpm in vtpms for each in self._keeping.of(vtpm)]
        rows.sort(key=lambda row: str(row["created"]))  # of one second: as they were taken
        return web.json_response({"snapshots": rows})

    async def _create(self, request: web.Request) -> web.Response:
        who, vtpm = caller(request), self._host.find(request.match_info["name"])
        who.must_own(vtpm)
        body = await body_of(request)
        typed(body, _CREATE)
        made = await self._keeping.take(vtpm.record.name, body.get("name") or "")
        self._audit(who, "snapshot", vtpm.record.name, snapshot=made.name)
        return web.json_response(_snapshot(vtpm, made), status=201)

    async def _remove(self, request: web.Request) -> web.Response:
        who, name = _root(request, "removing a snapshot"), request.match_info["name"]
        snapshot = request.match_info["snapshot"]
        await self._keeping.remove(name, snapshot)
        self._audit(who, "remove snapshot", name, snapshot=snapshot)
        return web.json_response({"vtpm": name, "snapshot": snapshot, "removed": True})

    async def _restore(self, request: web.Request) -> web.Response:
        who, name = _root(request, "setting a vTPM back"), request.match_info["name"]
        body = await body_of(request)
        typed(body, _REASON)
        snapshot, reason = request.match_info["snapshot"], reason_of(body.get("reason"))
        restored = await self._keeping.restore(name, snapshot, reason)
        self._audit(who, "restore", name, snapshot=snapshot, reason=reason)
        return web.json_response(_restored(name, restored, reason))

    # --- backups ---

    async def _back_up(self, request: web.Request) -> web.Response:
        who, name = _root(request, "a backup"), request.match_info["name"]
        typed(await body_of(request), {})
        made = await self._keeping.back_up(name)
        self._audit(who, "backup", name)
        value = {
            "id": str(made.id), "instance": str(made.instance), "name": name,
            "created": made.created, "epoch": made.epoch,
            "sealed": base64.b64encode(made.sealed).decode(),
            "wrapped": base64.b64encode(made.wrapped).decode(),
        }  # fmt: skip
        return web.json_response(value, status=201)

    async def _restore_backup(self, request: web.Request) -> web.Response:
        who, name = _root(request, "setting a vTPM back"), request.match_info["name"]
        body = await body_of(request)
        typed(body, _BACKUP)
        backup, reason = _backup(body), reason_of(body.get("reason"))
        restored = await self._keeping.restore_backup(name, backup, reason)
        self._audit(who, "restore", name, backup=str(backup.id), reason=reason)
        return web.json_response(_restored(name, restored, reason))

    # --- recovery ---

    async def _recovery(self, request: web.Request) -> web.Response:
        _root(request, "recover")
        return web.json_response(await recovery.found(self._host))

    async def _recover(self, request: web.Request) -> web.Response:
        who = _root(request, "recover")
        body = await body_of(request)
        typed(body, _RECOVER)
        reason = reason_of(body.get("reason"))
        link, signature = hexed(body, "link"), hexed(body, "signature")
        value = await recovery.accept(self._host, link, reason, signature)
        self._audit(who, "accept older", "", reason=reason)
        return web.json_response(value)

    async def _forget(self, request: web.Request) -> web.Response:
        who = _root(request, "recover")
        body = await body_of(request)
        typed(body, _FORGET)
        name, reason = body.get("name") or "", reason_of(body.get("reason"))
        value = await recovery.forget(self._host, name, reason)
        self._audit(who, "forget", name, reason=reason)
        return web.json_response(value)

    # --- other keys ---

    async def _rekey(self, request: web.Request) -> web.Response:
        who = _root(request, "rekey")
        body = await body_of(request)
        typed(body, _REKEY)
        parts = [part for part in PARTS if body.get(part)]
        if not parts:
            raise InvalidInput(f"which keys? some of {', '.join(PARTS)}")
        progress = self._host.rekeying.begin(parts)
        self._audit(who, "rekey", "", parts=", ".join(progress.parts))
        return web.json_response(_progress(progress), status=202)

    async def _rekeying(self, request: web.Request) -> web.Response:
        """How far it is; the error that it ended with, if it did."""
        _root(request, "rekey")
        progress = self._host.rekeying.progress
        if progress.error is not None:
            raise progress.error
        if not (progress.done or self._host.rekeying.running):
            raise Conflict(
                "no keys are being changed: if that was begun, and something ended meanwhile, run "
                "holdfast rekey again"
            )
        return web.json_response(_progress(progress))


def _progress(progress: Progress) -> dict[str, Any]:
    return {
        "keys": list(progress.parts), "vtpms": progress.vtpms, "of": progress.of,
        "left": progress.left, "anchored": progress.anchored, "done": progress.done,
    }  # fmt: skip


def _root(request: web.Request, what: str) -> Caller:
    who = caller(request)
    who.must_be_root(what)
    return who


def _snapshot(vtpm: VirtualTpm, snapshot: Snapshot | Listed) -> dict[str, Any]:
    return {
        "vtpm": vtpm.record.name, "name": snapshot.name, "created": snapshot.created,
        "epoch": snapshot.epoch, "bytes": snapshot.size,
    }  # fmt: skip


def _restored(name: str, restored: Restored, reason: str) -> dict[str, Any]:
    return {
        "vtpm": name, "snapshot": restored.snapshot.name, "of_epoch": restored.snapshot.epoch,
        "epoch": dict(zip(("was", "is"), restored.epochs, strict=True)),
        "lineage": dict(zip(("was", "is"), restored.lineages, strict=True)),
        "reason": reason, "anchored": restored.anchored,
    }  # fmt: skip


def _backup(body: dict[str, Any]) -> Snapshot:
    try:
        own, instance = UUID(body["id"]), instance_id(body["instance"])
        sealed, wrapped = (
            base64.b64decode(body[name], validate=True) for name in ("sealed", "wrapped")
        )
        epoch = int(body["epoch"])
    except (KeyError, ValueError, TypeError, AttributeError):
        raise InvalidInput("this is no backup as holdfast backup writes it") from None
    return Snapshot(own, instance, "backup", body.get("created") or "", epoch, sealed, wrapped)
