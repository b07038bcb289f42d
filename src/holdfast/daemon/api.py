"""The API: HTTP and JSON on Unix sockets, version 1; errors are problem+json (RFC 9457).

Who may call what is decided here and nowhere else, by the peer's credentials as the kernel gives
them: root everything; the owner of an instance its start, stop, evidence and logs; hooks root only.
Every call that changes something leaves an audit line. On the socket inside a container there is
only that container's own evidence.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any, Final

import structlog
from aiohttp import web
from aiohttp.http_exceptions import PayloadEncodingError
from prometheus_client import CONTENT_TYPE_LATEST

from holdfast import __version__
from holdfast.attest.collector import Collector
from holdfast.daemon import instances
from holdfast.daemon.doctor import examine, overview
from holdfast.daemon.host import Host
from holdfast.daemon.metrics import Metrics, store_of
from holdfast.daemon.requests import BODY_MAX, Caller, body_of, caller, hexed, typed
from holdfast.daemon.state_calls import StateCalls
from holdfast.daemon.wanted import wanted, wanted_like
from holdfast.errors import (
    AppraisalError,
    CallerError,
    Conflict,
    DecodeError,
    Forbidden,
    HoldfastError,
    HostError,
    IntegrityError,
    InvalidInput,
    NotFound,
)
from holdfast.eventlog.cel import decode_seq, to_json
from holdfast.instance.bucket import Bucket
from holdfast.instance.vtpm import VirtualTpm
from holdfast.protocol.oci_state import checked_state

AUDIT: Final = structlog.get_logger("audit")
PATH_SHOWN: Final = 128
WHY_SHOWN: Final = 200
WHY_KEPT: Final = 1000
DEFAULT_AUDIENCE: Final = "holdfast"  # of verifiers that did not say who they are
_STATUS: Final[Mapping[type[HoldfastError], int]] = {
    InvalidInput: 400,
    DecodeError: 400,
    Forbidden: 403,
    NotFound: 404,
    Conflict: 409,
    CallerError: 400,
    AppraisalError: 422,
    IntegrityError: 500,
    HostError: 503,
}
_CREATE: Final[Mapping[str, type]] = {
    "name": str,
    "profile": str,
    "owner": int,
    "banks": list,
    "unsafe_unlinked": bool,
    "start_policy": dict,
    "ports": str,
    "devices": str,
    "mode": str,
    "tpm": str,
}
_CLONE: Final[Mapping[str, type]] = {"name": str, "owner": int}
_EVIDENCE: Final[Mapping[str, type]] = {"nonce": str, "audience": str, "user_data": str}
_HOOK: Final[Mapping[str, type]] = {"vtpm": str, "state": dict}
_REFUSALS: Final = Bucket(rate=10.0, burst=200.0)  # lines in the log
_UNEXPECTED: Final = Bucket(rate=1.0, burst=20.0)  # tracebacks in the log
METRICS: Final = web.AppKey("metrics", Metrics)
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def _refusal(error: web.HTTPException, request: web.Request) -> web.Response:
    """What aiohttp itself refuses, as a problem: no such path, not by this method, too large."""
    if isinstance(error, web.HTTPNotFound):
        return _problem(NotFound(f"there is no {request.path[:PATH_SHOWN]!a} here"), error.status)
    if isinstance(error, web.HTTPRequestEntityTooLarge):
        return _problem(InvalidInput(f"a body has at most {BODY_MAX} bytes"), error.status)
    return _problem(InvalidInput(f"{request.method[:16]!a} here: {error.reason}"), error.status)


def _problem(error: HoldfastError, status: int = 0) -> web.Response:
    status = status or next(
        (code for kind, code in _STATUS.items() if isinstance(error, kind)), 500
    )
    body = {
        "type": f"urn:holdfast:error:{type(error).__name__}",
        "title": type(error).__name__,
        "status": status,
        "detail": str(error),
    }
    return web.json_response(body, status=status, content_type="application/problem+json")


@web.middleware
async def problems(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Turn our errors into problem+json; anything unexpected into a logged 500."""
    try:
        return await handler(request)
    except HoldfastError as error:
        _note_refusal(request, error)
        return _problem(error)
    except web.HTTPException as error:
        if error.status < 400:
            raise
        return _refusal(error, request)
    except (ConnectionError, PayloadEncodingError, web.RequestPayloadError):
        return _problem(InvalidInput("the request's body is cut off, or not in its encoding"))
    except OSError as error:
        why = error.strerror or type(error).__name__
        refused = HostError(f"{error.filename or request.path[:PATH_SHOWN]}: {why}")
        _note_refusal(request, refused)
        return _problem(refused)
    except Exception as error:  # noqa: BLE001 - the edge of a request: log, answer, go on
        # A caller who finds a way here must not fill the log with it.
        if _UNEXPECTED.allow(time.monotonic()):
            structlog.get_logger().exception("request failed", path=request.path)
        name = type(error).__name__
        return _problem(HostError(f"an unexpected {name}; the daemon's log has it"))


def _note_refusal(request: web.Request, error: HoldfastError) -> None:
    """Who wanted to change what, and may not; rationed, as a refusal costs its caller nothing."""
    request.app[METRICS].refused(error)
    if request.method not in ("GET", "HEAD") and _REFUSALS.allow(time.monotonic()):
        who = caller(request)
        path = request.raw_path[:PATH_SHOWN]
        why = str(error)[:WHY_SHOWN]
        AUDIT.warning(
            "refused", uid=who.uid, pid=who.pid, path=path, error=type(error).__name__, why=why
        )


class Api:
    """The routes, on one host."""

    def __init__(self, host: Host, collector: Collector) -> None:
        self._host = host
        self._collector = collector
        self._metrics = Metrics(host)

    def application(self) -> web.Application:
        """What is served on the API socket."""
        app = web.Application(middlewares=[problems], client_max_size=BODY_MAX)
        app[METRICS] = self._metrics
        app.add_routes(
            [
                web.get("/healthz", self._health),
                web.get("/metrics", self._show_metrics),
                web.get("/v1/version", self._version),
                web.get("/v1/status", self._status),
                web.get("/v1/doctor", self._doctor),
                web.get("/v1/vtpms", self._list),
                web.post("/v1/vtpms", self._create),
                web.get("/v1/vtpms/{name}", self._inspect),
                web.delete("/v1/vtpms/{name}", self._remove),
                web.post("/v1/vtpms/{name}/clones", self._clone),
                web.post("/v1/vtpms/{name}/start", self._start),
                web.post("/v1/vtpms/{name}/stop", self._stop),
                web.post("/v1/vtpms/{name}/sleep", self._sleep),
                web.post("/v1/vtpms/{name}/retry", self._retry),
                web.post("/v1/vtpms/{name}/moves", self._move),
                web.get("/v1/vtpms/{name}/log", self._log),
                web.get("/v1/vtpms/{name}/cdi", self._cdi),
                web.post("/v1/vtpms/{name}/evidence", self._evidence),
                web.post("/v1/hooks/{stage}", self._hook),
                *StateCalls(self._host, self._audit).routes(),
            ]
        )
        return app

    def own_application(self, asked: Callable[[web.Request], VirtualTpm]) -> web.Application:
        """What is served inside containers: evidence of the vTPM that is asked, and no other."""

        async def evidence(request: web.Request) -> web.Response:
            return await self._collect(asked(request), request)

        async def log(request: web.Request) -> web.Response:
            return web.json_response(_log_of(asked(request)))

        app = web.Application(middlewares=[problems], client_max_size=BODY_MAX)
        app[METRICS] = self._metrics
        app.add_routes([web.post("/v1/evidence", evidence), web.get("/v1/log", log)])
        return app

    # --- the daemon itself ---

    async def _health(self, _request: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    async def _version(self, _request: web.Request) -> web.Response:
        return web.json_response({"version": __version__, "api": 1})

    async def _show_metrics(self, request: web.Request) -> web.Response:
        text = self._metrics.text(fresh=caller(request).uid == 0)
        return web.Response(body=text, headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def _status(self, request: web.Request) -> web.Response:
        caller(request).must_be_root("status")
        more = {"counts": self._metrics.short(), "store": store_of(self._host)}
        return web.json_response({**await overview(self._host), **more})

    async def _doctor(self, request: web.Request) -> web.Response:
        caller(request).must_be_root("doctor")
        return web.json_response(await examine(self._host))

    # --- vTPMs ---

    async def _list(self, request: web.Request) -> web.Response:
        who = caller(request)
        vtpms = [v for v in self._host.all() if who.uid in (0, v.record.owner)]
        return web.json_response({"vtpms": [_summary(vtpm) for vtpm in vtpms]})

    async def _create(self, request: web.Request) -> web.Response:
        who = caller(request)
        who.must_be_root("creating a vTPM")
        body = await body_of(request)
        typed(body, _CREATE)
        vtpm = await self._host.create(wanted(body))
        self._audit(who, "create", vtpm.record.name)
        return web.json_response(self._details(vtpm), status=201)

    async def _clone(self, request: web.Request) -> web.Response:
        """A new TPM: of the one that is named, only what was asked for when it was made."""
        who = caller(request)
        who.must_be_root("creating a vTPM")
        there = self._host.find(request.match_info["name"]).record
        body = await body_of(request)
        typed(body, _CLONE)
        vtpm = await self._host.create(wanted_like(body, there))
        self._audit(who, "clone", vtpm.record.name, settings_of=there.name)
        value = {**self._details(vtpm), "settings_of": there.name, "state_copied": False}
        return web.json_response(value, status=201)

    async def _inspect(self, request: web.Request) -> web.Response:
        return web.json_response(self._details(self._owned(request)))

    async def _remove(self, request: web.Request) -> web.Response:
        who = caller(request)
        who.must_be_root("destroying a vTPM")
        name = request.match_info["name"]
        snapshots = await self._host.destroy(name)
        self._audit(who, "destroy", name)
        return web.json_response({"name": name, "state": "destroyed", "snapshots": snapshots})

    async def _start(self, request: web.Request) -> web.Response:
        vtpm = await self._changed_by_owner(request)
        with self._starting(vtpm.record.name):
            await self._host.start_plain(vtpm.record.name)
        self._audit(caller(request), "start", vtpm.record.name)
        return web.json_response(self._details(vtpm))

    async def _stop(self, request: web.Request) -> web.Response:
        vtpm = await self._changed_by_owner(request)
        await self._host.end(vtpm.record.name)
        self._audit(caller(request), "stop", vtpm.record.name)
        return web.json_response(self._details(vtpm))

    async def _sleep(self, request: web.Request) -> web.Response:
        who = caller(request)
        who.must_be_root("putting a vTPM to sleep")
        vtpm = self._host.find(request.match_info["name"])
        await self._host.sleep.put(vtpm)
        self._audit(who, "sleep", vtpm.record.name)
        return web.json_response(self._details(vtpm))

    async def _retry(self, request: web.Request) -> web.Response:
        vtpm = await self._changed_by_owner(request)
        await self._host.retry(vtpm.record.name)
        self._audit(caller(request), "retry", vtpm.record.name)
        return web.json_response(self._details(vtpm))

    async def _move(self, request: web.Request) -> web.Response:
        raise self._owned(request).stays_here("it cannot move to another host")

    async def _log(self, request: web.Request) -> web.Response:
        return web.json_response(_log_of(self._owned(request)))

    async def _cdi(self, request: web.Request) -> web.Response:
        vtpm = self._owned(request)
        return web.json_response(self._host.cdi_of(vtpm))

    async def _evidence(self, request: web.Request) -> web.Response:
        vtpm = self._owned(request)
        response = await self._collect(vtpm, request)
        self._audit(caller(request), "attest", vtpm.record.name)
        return response

    async def _collect(self, vtpm: VirtualTpm, request: web.Request) -> web.Response:
        # First of all: to read a body costs the daemon time too.
        if not vtpm.quotes.allow(time.monotonic()):
            raise Conflict(f"{vtpm.record.name} is asked for evidence too often: wait a second")
        body = await body_of(request)
        typed(body, _EVIDENCE)
        nonce = hexed(body, "nonce")
        audience = body.get("audience") or DEFAULT_AUDIENCE
        evidence = await self._collector.collect(vtpm, nonce, audience, hexed(body, "user_data"))
        return web.Response(body=evidence, content_type="application/json")

    # --- hooks ---

    async def _hook(self, request: web.Request) -> web.Response:
        who = caller(request)
        who.must_be_root("a runtime's hook")
        body = await body_of(request)
        typed(body, _HOOK)
        name = body.get("vtpm") or ""
        state = checked_state(body.get("state"))
        stage = request.match_info["stage"]
        if stage == "createRuntime":
            with self._starting(name):
                await self._host.start_for(name, state)
            self._audit(who, "power on", name, container=state.id)
        elif stage == "poststop":
            # Only hurries what the end of the container's init brings about anyway.
            ended = await self._host.end_of(name, state.id)
            what = "power off" if ended else "nothing to power off"
            self._audit(who, what, name, container=state.id)
        else:
            raise NotFound(f"there is no hook stage {stage!a}")
        return web.json_response({"vtpm": name, "stage": stage})

    # --- parts ---

    def _owned(self, request: web.Request) -> VirtualTpm:
        vtpm = self._host.find(request.match_info["name"])
        caller(request).must_own(vtpm)
        return vtpm

    async def _changed_by_owner(self, request: web.Request) -> VirtualTpm:
        """The vTPM to be changed; in a while if an owner who is not root does so all the time."""
        vtpm = self._owned(request)
        if caller(request).uid:
            await asyncio.sleep(vtpm.changes.wait(time.monotonic()))
        return vtpm

    def _audit(self, who: Caller, what: str, vtpm: str, **more: str) -> None:
        self._metrics.called(what)
        AUDIT.info(what, vtpm=vtpm, uid=who.uid, pid=who.pid, **more)

    @contextmanager
    def _starting(self, name: str) -> Iterator[None]:
        """Remember why a vTPM was not powered on: who asks later gets to know it, too."""
        why = ""
        try:
            yield
        except (HoldfastError, OSError) as error:
            at = datetime.now(UTC).isoformat(timespec="seconds")
            why = f"{str(error)[:WHY_KEPT]} ({at})"
            raise
        finally:
            with suppress(HoldfastError):  # there is none of that name, or no longer
                self._host.refused(self._host.find(name), why)

    def _details(self, vtpm: VirtualTpm) -> dict[str, Any]:
        place = self._host.config.paths.vtpm(vtpm.record.name)
        found = instances.findings_of(self._host.registry, vtpm.record)
        return {
            **_summary(vtpm),
            **instances.settings(vtpm.record),
            "device": f"holdfast.dev/vtpm={vtpm.record.name}",
            "tcti": f"swtpm:path={place / 'run' / 'tpm.sock'}",
            "pcrs": {
                alg.name.lower(): {str(pcr): value.hex() for pcr, value in bank.items()}
                for alg, bank in vtpm.ledger.items()
            },
            "why_not_started": self._host.why_not_started(vtpm),
            "findings": [asdict(finding) for finding in found],
            "daemon": True,
        }


def _summary(vtpm: VirtualTpm) -> dict[str, Any]:
    container = vtpm.run.container if vtpm.run else ""
    return {
        **instances.summary(vtpm.record),
        "state": vtpm.state.value,
        "container": container,
    }


def _log_of(vtpm: VirtualTpm) -> dict[str, Any]:
    """The log of the last run: what was measured, whether or not it still runs."""
    try:
        records, torn = decode_seq(vtpm.log_file(vtpm.record.run).read_bytes())
    except FileNotFoundError:
        records, torn = (), b""
    return {"run": vtpm.record.run, "torn": bool(torn), "events": [to_json(r) for r in records]}
