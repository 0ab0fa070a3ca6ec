"""Endpoints that the router answers for the whole fleet: is it there, which version, which models, what is loaded.

Clients see one Ollama: each model once, each loaded copy with its true size and with the expiry that the router's own
timers give it. What the servers say is passed on field by field, so that fields of newer versions come through; where
there is nothing to merge, a server's list goes on byte for byte. What only the router knows stands in an object of its
own, `llamayard`, which clients that do not know it leave alone; names that it made to unload with are not listed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

import aiohttp
import msgspec
from aiohttp import hdrs, web

from router.api.context import ApiContext
from router.api.passthrough import pass_on
from router.api.responses import JSON, json_answer, text_answer
from router.domain.instance import InstanceView
from router.domain.residency import Residency, ResidencyState
from router.domain.snapshot import Snapshot
from router.engines.ollama.driver import TEMPORARY_TAG, is_temporary_tag
from router.engines.ollama.model_listing import key_of
from router.errors import InstanceLost
from router.observability.request_record import RequestRecord

_ASK_SECONDS = 10.0
_LOOKS = 2
"""0.24 answers 500 to `/api/ps` now and then, for want of a lock."""
_FOR_EVER_YEARS = 292
"""An Ollama server's "for ever": the longest duration that Go can tell."""

_Row = dict[str, Any]


class AggregatedHandler:
    """Answers `/`, `/api/version`, `/api/tags`, `/api/ps` and `/v1/models`."""

    def __init__(self, context: ApiContext) -> None:
        self._context = context

    async def __call__(self, request: web.BaseRequest, info: RequestRecord) -> web.StreamResponse:
        extra = info.reply_headers(None)
        match info.route:
            case "/":
                return text_answer("Ollama is running", extra)
            case "/api/version":
                return json_answer({"version": self._context.primary().version or ""}, extra)
            case "/api/ps":
                return json_answer({"models": await self._ps()}, extra)
            case _:
                return await self._models(request, info)

    async def _models(self, request: web.BaseRequest, info: RequestRecord) -> web.StreamResponse:
        """The shared store's models once, then those that only an attached server has, then aliases."""
        primary = self._context.primary()
        others = [view for view in self._context.ready_instances() if view.spec.attached and view is not primary]
        path, field, keys = ("/v1/models", "data", ("id",))
        if info.route == "/api/tags":
            path, field, keys = "/api/tags", "models", ("name", "model")
        if not others and not self._context.rules.substitutes.listed:
            if request.method == hdrs.METH_HEAD:
                return await pass_on(self._context, request, b"", info, primary)
            raw, kind = await self._raw(primary, path)
            if TEMPORARY_TAG.encode() not in raw:
                return web.Response(body=raw, headers={hdrs.CONTENT_TYPE: kind, **info.reply_headers(None)})
        first = await self._rows(primary, path, field)
        rows = {key_of(str(row.get(keys[0]))): row for row in first}
        further = await asyncio.gather(*(self._rows(view, path, field) for view in others), return_exceptions=True)
        for view, found in zip(others, further, strict=True):
            for row in found if isinstance(found, list) else []:
                _add(rows, row, keys[0], view.spec.name)
        whole = [*rows.values(), *self._aliases(rows, keys)]
        head = {"object": "list"} if field == "data" else {}
        return json_answer({**head, field: whole}, info.reply_headers(None))

    def _aliases(self, rows: Mapping[str | None, _Row], keys: tuple[str, ...]) -> list[_Row]:
        """Rows of the aliases whose models there are."""
        known = self._context.rules.substitutes
        targets = {alias: known.target(alias) or "" for alias in known.listed}
        return [
            {**rows[key_of(target)], **dict.fromkeys(keys, alias), "llamayard": {"alias_of": target}}
            for alias, target in targets.items()
            if key_of(target) in rows
        ]

    async def _ps(self) -> list[_Row]:
        """Each loaded copy on each instance, the one that stays longest first; who cannot say is left out."""
        views = self._context.ready_instances()
        looks = (self._rows(view, "/api/ps", "models", _LOOKS) for view in views)
        answers = await asyncio.gather(*looks, return_exceptions=True)
        snapshot = self._context.controller.snapshot()
        rows = [
            self._merged(snapshot, view, row)
            for view, found in zip(views, answers, strict=True)
            for row in (found if isinstance(found, list) else [])
        ]
        return sorted(rows, key=lambda row: str(row.get("expires_at")), reverse=True)

    def _merged(self, snapshot: Snapshot, view: InstanceView, row: _Row) -> _Row:
        """A server's row with the router's expiry, and what only the router knows."""
        residency = self._residency_of(snapshot, view, row)
        own: dict[str, Any] = {"instance": view.spec.name, "gpus": list(view.spec.gpus)}
        if residency is None:
            return {**row, "llamayard": own}
        own |= {"slots": residency.slots, "in_flight": residency.in_flight}
        return {**row, "expires_at": _expiry(residency, snapshot.now), "llamayard": own}

    def _residency_of(self, snapshot: Snapshot, view: InstanceView, row: Mapping[str, Any]) -> Residency | None:
        facts = self._context.catalog.seen(str(row.get("digest")))
        here = (r for r in snapshot.residencies.values() if r.instance == view.spec.name)
        if facts is not None:
            return next((r for r in here if r.blob == facts.blob), None)
        return next((r for r in here if r.model.digest == row.get("digest")), None)

    async def _rows(self, view: InstanceView, path: str, field: str, looks: int = 1) -> list[_Row]:
        for _ in range(looks - 1):
            try:
                return await self._look(view, path, field)
            except InstanceLost:
                continue
        return await self._look(view, path, field)

    async def _look(self, view: InstanceView, path: str, field: str) -> list[_Row]:
        raw, _ = await self._raw(view, path)
        try:
            rows: list[_Row] = msgspec.json.decode(raw, type=dict[str, Any]).get(field) or []
        except msgspec.MsgspecError as error:
            raise InstanceLost(f"{view.spec.name} cannot tell {path}: {error}") from error
        return [row for row in rows if not is_temporary_tag(str(row.get("name") or row.get("id")))]

    async def _raw(self, view: InstanceView, path: str) -> tuple[bytes, str]:
        """The server's answer and its content type."""
        try:
            timeout = aiohttp.ClientTimeout(total=_ASK_SECONDS)
            async with self._context.session.get(view.spec.url + path, timeout=timeout) as reply:
                raw = await reply.read()
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise InstanceLost(f"{view.spec.name} cannot tell {path}: {error}") from error
        if reply.status != web.HTTPOk.status_code:
            raise InstanceLost(f"{view.spec.name} answers {reply.status} to {path}")
        return raw, reply.headers.get(hdrs.CONTENT_TYPE, JSON)


def _add(rows: dict[str | None, _Row], row: _Row, name_field: str, instance: str) -> None:
    """Adds a model of an attached server, or says that the server has it as well."""
    key = key_of(str(row.get(name_field)))
    there = rows.get(key)
    if there is None:
        rows[key] = {**row, "llamayard": {"instances": [instance]}}
    elif "llamayard" in there:
        there["llamayard"]["instances"].append(instance)


def _expiry(residency: Residency, now: float) -> str:
    """As Ollama prints times; while it is busy, what it would be if it became idle now; past once it is leaving."""
    today = datetime.now(UTC)
    if residency.state is ResidencyState.UNLOADING:
        moment = today  # which `ollama ps` shows as "Stopping..."
    elif residency.expires_at is not None:
        moment = today + timedelta(seconds=residency.expires_at - now)
    elif residency.in_flight and residency.keep_alive_seconds >= 0:
        moment = today + timedelta(seconds=residency.keep_alive_seconds)
    else:
        moment = today + timedelta(days=365.25 * _FOR_EVER_YEARS)
    return moment.isoformat().replace("+00:00", "Z")
