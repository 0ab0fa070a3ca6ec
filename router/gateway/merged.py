"""Endpoints that the router answers for the whole fleet: is it there, which version, which models, what is loaded.

Clients see one Ollama: each model once, each loaded copy with its true size and with the expiry that the router's own
timers give it. What the servers say is passed on field by field, so that fields of newer versions come through.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

import aiohttp
import msgspec
from aiohttp import web

from router.core.entities import InstanceView, Residency, Snapshot
from router.errors import InstanceLost
from router.gateway.answers import json_answer, text_answer
from router.gateway.context import GatewayContext
from router.gateway.requests import RequestInfo

_ASK_SECONDS = 10.0
_FOR_EVER_YEARS = 292
"""An Ollama server's "for ever": the longest duration that Go can tell."""

_Row = dict[str, Any]


class MergedHandler:
    """Answers `/`, `/api/version`, `/api/tags` and `/api/ps`."""

    def __init__(self, context: GatewayContext) -> None:
        self._context = context

    async def __call__(self, request: web.BaseRequest, info: RequestInfo) -> web.StreamResponse:
        del request
        extra = info.reply_headers(None)
        match info.route:
            case "/":
                return text_answer("Ollama is running", extra)
            case "/api/version":
                return json_answer({"version": self._context.primary().version or ""}, extra)
            case "/api/tags":
                return json_answer({"models": await self._tags()}, extra)
            case _:
                return json_answer({"models": await self._ps()}, extra)

    async def _tags(self) -> list[_Row]:
        """The shared store's models once, then those that only an attached server has."""
        primary = self._context.primary()
        others = [view for view in self._context.ready_instances() if view.spec.attached and view is not primary]
        first = await self._rows(primary, "/api/tags")
        found = {str(row.get("name")): row for row in first}
        further = await asyncio.gather(*(self._rows(view, "/api/tags") for view in others), return_exceptions=True)
        for view, rows in zip(others, further, strict=True):
            for row in rows if isinstance(rows, list) else []:
                found.setdefault(str(row.get("name")), {**row, "llamayard": {"instances": [view.spec.name]}})
        return list(found.values())

    async def _ps(self) -> list[_Row]:
        """Each loaded copy on each instance, the one that stays longest first; who cannot say is left out."""
        views = self._context.ready_instances()
        answers = await asyncio.gather(*(self._rows(view, "/api/ps") for view in views), return_exceptions=True)
        snapshot = self._context.engine.snapshot()
        rows = [
            _merged(snapshot, view, row)
            for view, found in zip(views, answers, strict=True)
            for row in (found if isinstance(found, list) else [])
        ]
        return sorted(rows, key=lambda row: str(row.get("expires_at")), reverse=True)

    async def _rows(self, view: InstanceView, path: str) -> list[_Row]:
        url = view.spec.url + path
        try:
            timeout = aiohttp.ClientTimeout(total=_ASK_SECONDS)
            async with self._context.session.get(url, timeout=timeout) as reply:
                raw = await reply.read()
                if reply.status != web.HTTPOk.status_code:
                    raise InstanceLost(f"{view.spec.name} answers {reply.status} to {path}")
            return msgspec.json.decode(raw, type=dict[str, list[_Row] | None]).get("models") or []
        except (aiohttp.ClientError, OSError, msgspec.MsgspecError, TimeoutError) as error:
            raise InstanceLost(f"{view.spec.name} cannot tell {path}: {error}") from error


def _merged(snapshot: Snapshot, view: InstanceView, row: _Row) -> _Row:
    """A server's row with the router's expiry, and what only the router knows."""
    residency = _residency_of(snapshot, view, row)
    own: dict[str, Any] = {"instance": view.spec.name, "gpus": list(view.spec.gpus)}
    if residency is None:
        return {**row, "llamayard": own}
    own |= {"slots": residency.slots, "in_flight": residency.in_flight}
    return {**row, "expires_at": _expiry(residency, snapshot.now), "llamayard": own}


def _residency_of(snapshot: Snapshot, view: InstanceView, row: Mapping[str, Any]) -> Residency | None:
    here = (r for r in snapshot.residencies.values() if r.instance == view.spec.name)
    return next((r for r in here if r.name == row.get("name") or r.model.digest == row.get("digest")), None)


def _expiry(residency: Residency, now: float) -> str:
    """As Ollama prints times; while it is busy, what it would be if it became idle now."""
    today = datetime.now(UTC)
    if residency.expires_at is not None:
        moment = today + timedelta(seconds=residency.expires_at - now)
    elif residency.in_flight and residency.keep_alive_seconds >= 0:
        moment = today + timedelta(seconds=residency.keep_alive_seconds)
    else:
        moment = today + timedelta(days=365.25 * _FOR_EVER_YEARS)
    return moment.isoformat().replace("+00:00", "Z")
