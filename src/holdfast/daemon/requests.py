"""What a request says, and who says it: the same for every call of the API.

Not here: who may (`api`, `state_calls`).
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from aiohttp import web

from holdfast.errors import Forbidden, InvalidInput
from holdfast.instance.vtpm import VirtualTpm
from holdfast.linux.channel import peer

BODY_MAX: Final = 1 << 20
BODY_SECONDS: Final = 10.0
_KINDS: Final[Mapping[type, str]] = {
    str: "text",
    int: "a whole number",
    float: "a fraction",
    list: "a list",
    bool: "true or false",
    dict: "an object",
}


@dataclass(frozen=True)
class Caller:
    """Who is calling, as the kernel says."""

    pid: int
    uid: int

    def must_be_root(self, what: str) -> None:
        if self.uid != 0:
            raise Forbidden(f"{what} is for root")

    def must_own(self, vtpm: VirtualTpm) -> None:
        if self.uid not in (0, vtpm.record.owner):
            raise Forbidden(f"{vtpm.record.name} belongs to user {vtpm.record.owner}")


def caller(request: web.Request) -> Caller:
    assert request.transport is not None
    who = peer(request.transport.get_extra_info("socket"))
    return Caller(who.pid, who.uid)


async def body_of(request: web.Request) -> dict[str, Any]:
    try:
        async with asyncio.timeout(BODY_SECONDS):
            data = await request.read()
    except TimeoutError:
        raise InvalidInput(f"the request's body did not arrive in {BODY_SECONDS} s") from None
    try:
        value = json.loads(data.decode())  # of bytes, Python would take UTF-16 as well
    except (ValueError, RecursionError):
        raise InvalidInput("the request's body is not JSON in UTF-8") from None
    if not isinstance(value, dict):
        raise InvalidInput("the request's body is not a JSON object")
    return value


def typed(body: dict[str, Any], members: Mapping[str, type]) -> None:
    """InvalidInput for a member that is not known, or not of its type."""
    for name, value in body.items():
        kind = members.get(name)
        if kind is None:
            raise InvalidInput(f"{name[:64]!a} is not known here")
        if value is not None and type(value) is not kind:
            raise InvalidInput(f"{name} is {_KINDS[kind]}, not {_KINDS.get(type(value), 'that')}")


def hexed(body: dict[str, Any], name: str) -> bytes:
    try:
        return bytes.fromhex(body.get(name) or "")
    except ValueError:
        raise InvalidInput(f"{name} is not hexadecimal") from None
