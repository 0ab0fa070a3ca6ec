"""Endpoints that the router serves for the whole fleet: version, models, and what is loaded.

Clients see one Ollama: each model once, each loaded replica with its true size and with the expiry of the router's own
timers. The servers' rows are passed on field by field, so that fields of newer versions come through; a list that needs
no merging is relayed byte for byte. What only the router knows is in an extra object, `llamayard`, which other clients
ignore. Temporary tags that the router creates to unload with are not listed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime, timedelta
from importlib import metadata
from typing import Any

import aiohttp
import msgspec
from aiohttp import hdrs, web
from multidict import CIMultiDict

from router.api.attached_models import listed_rows, loaded_rows
from router.api.context import ApiContext, lost_by
from router.api.forwarding import onward_headers
from router.api.passthrough import forward
from router.api.responses import json_response, text_response
from router.domain.access_key import AccessKey
from router.domain.instance import InstanceView
from router.domain.residency import Residency, ResidencyState
from router.domain.snapshot import Snapshot
from router.engines.ollama.driver import TEMPORARY_TAG, is_temporary_tag
from router.engines.ollama.model_listing import key_of
from router.engines.ollama.rules import KIND as OLLAMA
from router.errors import UNREADABLE_JSON, InstanceLost, LoopDetected, NoInstance, RouterError
from router.llm_api.errors import JSON
from router.llm_api.heartbeat_format import refusal
from router.observability.request_record import RequestRecord

_QUERY_TIMEOUT_SECONDS = 10.0
_PS_ATTEMPTS = 2
"""0.24 occasionally responds with 500 to `/api/ps`, because of a missing lock."""
_FOR_EVER_YEARS = 292
"""An Ollama server's "for ever": Go's longest duration."""

_Row = dict[str, Any]


class AggregatedHandler:
    """Serves `/`, `/api/version`, `/api/tags`, `/api/ps` and `/v1/models`."""

    def __init__(self, context: ApiContext) -> None:
        self._context = context

    async def __call__(self, request: web.BaseRequest, record: RequestRecord) -> web.StreamResponse:
        extra = record.response_headers()
        match record.route:
            case "/":
                return text_response("Ollama is running", extra)
            case "/api/version":
                return json_response({"version": await self._version(request)}, extra)
            case "/api/ps":
                return json_response({"models": _visible(record.key, await self._ps(request), "name")}, extra)
            case _:
                return await self._models(request, record)

    async def _version(self, request: web.BaseRequest) -> str:
        """Of the primary Ollama instance, which may be waited for; the router's own where there is none to be.

        A router that asks whether this one serves is not made to wait for attached servers: they are asked in its name.
        One of them may lead back to it, so that each would wait for the other.
        """
        if not self._context.has_ollama:
            return metadata.version("llamayard")
        views = [view for view in self._context.instances() if view.spec.engine == OLLAMA]
        is_of_router = hdrs.VIA in request.headers
        if not is_of_router or self._context.ready_instances() or not all(view.spec.attached for view in views):
            return (await self._context.ready_primary()).version or ""
        failure: RouterError | None = None
        for view in views:
            try:
                raw, _ = await self._raw(request, view, "/api/version")
                return str(msgspec.json.decode(raw, type=dict[str, Any]).get("version") or "")
            except UNREADABLE_JSON as error:
                failure = failure or InstanceLost(f"{view.spec.name} did not serve /api/version: {error}")
            except RouterError as error:
                failure = error if failure is None or isinstance(error, LoopDetected) else failure
        raise failure or NoInstance("there is no instance")

    async def _models(self, request: web.BaseRequest, record: RequestRecord) -> web.StreamResponse:
        """The shared store's models, then those that only an attached server has, then aliases."""
        context, primary = self._context, None
        if context.has_ollama or not context.attached.all:
            primary = await context.ready_primary()
        others = [view for view in _ollamas(context.ready_instances()) if view.spec.attached and view is not primary]
        path, field, keys = ("/v1/models", "data", ("id",))
        if record.route == "/api/tags":
            path, field, keys = "/api/tags", "models", ("name", "model")
        is_whole = record.key is None or record.key.sees_all_models
        is_plain = not others and not context.attached.all and not context.rules.substitutes.listed
        if primary is not None and is_plain and is_whole:
            if request.method == hdrs.METH_HEAD:
                return await forward(context, request, b"", record, primary)
            raw, content_type = await self._raw(request, primary, path)
            if TEMPORARY_TAG.encode() not in raw:
                return web.Response(body=raw, headers={hdrs.CONTENT_TYPE: content_type, **record.response_headers()})
        first = await self._rows(request, primary, path, field) if primary is not None else []
        rows = {key_of(str(row.get(keys[0]))): row for row in first}
        further = await asyncio.gather(
            *(self._rows(request, view, path, field) for view in others), return_exceptions=True
        )
        for view, found in zip(others, further, strict=True):
            for row in found if isinstance(found, list) else []:
                _add(rows, row, keys[0], view.spec.name)
        rows |= {key_of(str(row[keys[0]])): row for row in listed_rows(context, field)}
        rows = {key_of(str(row.get(keys[0]))): row for row in _visible(record.key, rows.values(), keys[0])}
        merged = [*rows.values(), *self._aliases(rows, keys)]
        head = {"object": "list"} if field == "data" else {}
        return json_response({**head, field: merged}, record.response_headers())

    def _aliases(self, rows: Mapping[str | None, _Row], keys: tuple[str, ...]) -> list[_Row]:
        """Rows of the aliases whose models exist."""
        substitutes = self._context.rules.substitutes
        targets = {alias: substitutes.target(alias) or "" for alias in substitutes.listed}
        return [
            {**rows[key_of(target)], **dict.fromkeys(keys, alias), "llamayard": {"alias_of": target}}
            for alias, target in targets.items()
            if key_of(target) in rows
        ]

    async def _ps(self, request: web.BaseRequest) -> list[_Row]:
        """Each loaded replica, the latest expiry first; instances that do not respond are left out."""
        views = _ollamas(self._context.ready_instances())
        queries = (self._rows(request, view, "/api/ps", "models", _PS_ATTEMPTS) for view in views)
        results = await asyncio.gather(*queries, return_exceptions=True)
        snapshot = self._context.controller.snapshot()
        rows = [
            self._merged(snapshot, view, row)
            for view, found in zip(views, results, strict=True)
            for row in (found if isinstance(found, list) else [])
        ]
        rows += [self._merged(snapshot, view, row) for view, row in loaded_rows(self._context)]
        return sorted(rows, key=lambda row: str(row.get("expires_at")), reverse=True)

    def _merged(self, snapshot: Snapshot, view: InstanceView, row: _Row) -> _Row:
        """A server's row with the router's expiry and its extra object."""
        residency = self._residency_of(snapshot, view, row)
        extra: dict[str, Any] = {"instance": view.spec.name, "gpus": list(view.spec.gpus)}
        extra |= row.get("llamayard", {})
        if residency is None:
            return {**row, "llamayard": extra}
        extra |= {"slots": residency.slots, "in_flight": residency.in_flight}
        return {**row, "expires_at": _expiry(residency, snapshot.now), "llamayard": extra}

    def _residency_of(self, snapshot: Snapshot, view: InstanceView, row: Mapping[str, Any]) -> Residency | None:
        facts = self._context.catalog.seen(str(row.get("digest")))
        here = (r for r in snapshot.residencies.values() if r.instance == view.spec.name)
        if facts is not None:
            return next((r for r in here if r.blob == facts.blob), None)
        return next((r for r in here if r.model.digest == row.get("digest")), None)

    async def _rows(
        self, request: web.BaseRequest, view: InstanceView, path: str, field: str, attempts: int = 1
    ) -> list[_Row]:
        for _ in range(attempts - 1):
            try:
                return await self._rows_once(request, view, path, field)
            except InstanceLost:
                continue
        return await self._rows_once(request, view, path, field)

    async def _rows_once(self, request: web.BaseRequest, view: InstanceView, path: str, field: str) -> list[_Row]:
        raw, _ = await self._raw(request, view, path)
        try:
            rows: list[_Row] = msgspec.json.decode(raw, type=dict[str, Any]).get(field) or []
        except UNREADABLE_JSON as error:
            raise InstanceLost(f"{view.spec.name} did not serve {path}: {error}") from error
        return [row for row in rows if not is_temporary_tag(str(row.get("name") or row.get("id")))]

    async def _raw(self, request: web.BaseRequest, view: InstanceView, path: str) -> tuple[bytes, str]:
        """The server's reply body and its content type. The query keeps the `Via` of `request`, whose answer it is."""
        session = self._context.session
        passed = CIMultiDict((hdrs.VIA, value) for value in request.headers.getall(hdrs.VIA, ()))
        try:
            timeout = aiohttp.ClientTimeout(total=_QUERY_TIMEOUT_SECONDS)
            url, headers = view.spec.url + path, onward_headers(session, passed)
            async with session.get(url, timeout=timeout, headers=headers, allow_redirects=False) as reply:
                raw = await reply.read()
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise lost_by(error, f"{view.spec.name} did not serve {path}: {error}") from error
        if reply.status == LoopDetected.status:
            raise LoopDetected(refusal(reply.status, raw).message)
        if reply.status != web.HTTPOk.status_code:
            raise InstanceLost(f"{view.spec.name} responded with status {reply.status} to {path}")
        return raw, reply.headers.get(hdrs.CONTENT_TYPE, JSON)


def _ollamas(views: Iterable[InstanceView]) -> list[InstanceView]:
    return [view for view in views if view.spec.engine == OLLAMA]


def _visible(key: AccessKey | None, rows: Iterable[_Row], name_field: str) -> list[_Row]:
    """The rows of models that the access key may use."""
    return [row for row in rows if key is None or key.allows_model(str(row.get(name_field)))]


def _add(rows: dict[str | None, _Row], row: _Row, name_field: str, instance: str) -> None:
    """Adds a model of an attached server, or adds the server to the instances that have it."""
    key = key_of(str(row.get(name_field)))
    row_before = rows.get(key)
    if row_before is None:
        rows[key] = {**row, "llamayard": {"instances": [instance]}}
    elif "llamayard" in row_before:
        row_before["llamayard"]["instances"].append(instance)


def _expiry(residency: Residency, now: float) -> str:
    """As Ollama prints times. Busy: as if it became idle now; unloading: the present."""
    now_utc = datetime.now(UTC)
    if residency.state is ResidencyState.UNLOADING:
        moment = now_utc  # shown by `ollama ps` as "Stopping..."
    elif residency.expires_at is not None:
        moment = now_utc + timedelta(seconds=residency.expires_at - now)
    elif residency.in_flight and residency.keep_alive_seconds >= 0:
        moment = now_utc + timedelta(seconds=residency.keep_alive_seconds)
    else:
        moment = now_utc + timedelta(days=365.25 * _FOR_EVER_YEARS)
    return moment.isoformat().replace("+00:00", "Z")
