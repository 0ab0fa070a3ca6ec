"""Requests that go to one server as they are: facts of a model, and what only a server knows.

A model that only an attached server has is asked about there; an alias is asked about under its model's name.
"""

from __future__ import annotations

import json
from urllib.parse import quote, unquote

from aiohttp import web

from router.api.context import ApiContext
from router.api.forwarding import Body, Exchange, open_upstream, relay
from router.domain.instance import InstanceView
from router.llm_api.body_reader import parse_body
from router.llm_api.errors import api_of
from router.llm_api.inference_request import MODEL_HEADER, refuse_cloud
from router.llm_api.json_edit import set_member
from router.observability.request_record import RequestRecord, read_body

_MODELS = "/v1/models/"


class PassthroughHandler:
    """Answers by asking the primary instance."""

    def __init__(self, context: ApiContext) -> None:
        self._context = context

    async def __call__(self, request: web.BaseRequest, info: RequestRecord) -> web.StreamResponse:
        body = await read_body(request, self._context.limits.max_body_bytes) if request.body_exists else b""
        return await pass_on(self._context, request, body, info)


class ShowHandler:
    """Answers what is asked about one model: `/api/show` and `/v1/models/NAME`."""

    def __init__(self, context: ApiContext) -> None:
        self._context = context

    async def __call__(self, request: web.BaseRequest, info: RequestRecord) -> web.StreamResponse:
        body = await read_body(request, self._context.limits.max_body_bytes) if request.body_exists else b""
        in_path = request.path.startswith(_MODELS)
        raw_name, mark, query = request.raw_path.removeprefix(_MODELS).partition("?")
        name = unquote(raw_name) if in_path else parse_body(body, request.path).model
        if not name:
            return await pass_on(self._context, request, body, info)
        target = self._context.rules.substitutes.target(name)
        raw_path = None
        if target is not None:
            info.notes = {MODEL_HEADER: target}
            name = target
            if in_path:
                raw_path = _MODELS + quote(target, safe="/:") + mark + query
            else:
                body = set_member(body, "model", json.dumps(target).encode())
        refuse_cloud(name, cloud=self._context.rules.cloud)
        view = self._context.holder(await self._context.catalog.facts(name))
        return await pass_on(self._context, request, body, info, view, raw_path)


async def pass_on(
    context: ApiContext,
    request: web.BaseRequest,
    body: Body,
    info: RequestRecord,
    view: InstanceView | None = None,
    raw_path: str | None = None,
) -> web.StreamResponse:
    """Sends the request to an instance, by default the primary, and streams its answer back.

    `raw_path` with its query takes the place of the request's own.
    """
    url = (view or context.primary()).spec.url
    upstream = await open_upstream(context.session, request, url, body, context.limits, raw_path)
    async with upstream:
        exchange = Exchange(started=context.controller.now, extra_headers=info.reply_headers(None))
        info.exchange = exchange
        return await relay(request, upstream, context.limits, api_of(request.path), exchange)
