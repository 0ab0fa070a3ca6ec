"""Requests that one server handles unchanged: facts of a model, and what only a server knows.

A query about a model goes to a server that has it; an alias is replaced by its model's name.
"""

from __future__ import annotations

import json
from urllib.parse import quote, unquote

from aiohttp import web

from router.api.attached_models import shown
from router.api.context import ApiContext
from router.api.forwarding import Body, open_upstream, read_body, relay
from router.api.responses import json_response
from router.domain.instance import InstanceView
from router.errors import InstanceLost, InstanceUnreachable
from router.llm_api.body_reader import ParsedBody, parse_body
from router.llm_api.errors import api_of
from router.llm_api.inference_request import MODEL_HEADER, refuse_cloud, refuse_conflict, refuse_model
from router.llm_api.json_edit import set_member
from router.observability.request_record import RequestRecord

_MODELS = "/v1/models/"


class PassthroughHandler:
    """Forwards to the primary instance."""

    def __init__(self, context: ApiContext) -> None:
        self._context = context

    async def __call__(self, request: web.BaseRequest, record: RequestRecord) -> web.StreamResponse:
        body = await read_body(request, self._context.limits)
        return await forward(self._context, request, body, record)


class ShowHandler:
    """Queries about one model: `/api/show` and `/v1/models/NAME`."""

    def __init__(self, context: ApiContext) -> None:
        self._context = context

    async def __call__(self, request: web.BaseRequest, record: RequestRecord) -> web.StreamResponse:
        body = await read_body(request, self._context.limits)
        in_path = request.path.startswith(_MODELS)
        raw_name, mark, query = request.raw_path.removeprefix(_MODELS).partition("?")
        parsed = ParsedBody(model=unquote(raw_name)) if in_path else parse_body(body, request.path)
        refuse_conflict(parsed)
        name = parsed.model
        if not name:
            refuse_model(record.key, "")
            record.is_unrouted = True
            return await forward(self._context, request, body, record)
        target = self._context.rules.substitutes.target(name)
        raw_path = None
        if target is not None:
            record.substitution_headers = {MODEL_HEADER: target}
            name = target
            if in_path:
                raw_path = _MODELS + quote(target, safe="/:") + mark + query
            else:
                body = set_member(body, "model", json.dumps(target).encode())
        refuse_cloud(name, cloud=self._context.rules.cloud)
        refuse_model(record.key, name)
        declared = self._context.attached.known(name)
        if declared is not None:
            return json_response(shown(self._context, declared, in_path=in_path), record.response_headers())
        facts = await self._context.find_model(name)
        record.is_unrouted = facts is None
        view = await self._context.holder(facts)
        others = self._context.ready_instances() if facts is not None else []
        failure = ""
        for each in (view, *(other for other in others if other is not view and facts and facts.is_on(other.spec))):
            try:
                return await forward(self._context, request, body, record, each, raw_path)
            except InstanceLost as error:  # before the answer began
                failure = error.message
        raise InstanceUnreachable(failure)


async def forward(
    context: ApiContext,
    request: web.BaseRequest,
    body: Body,
    record: RequestRecord,
    view: InstanceView | None = None,
    raw_path: str | None = None,
) -> web.StreamResponse:
    """Forwards the request to an instance, by default the primary, and streams its reply back.

    `raw_path`, including a query, replaces the request's own.
    """
    url = (view or await context.ready_primary()).spec.url
    upstream = await open_upstream(context.session, request, url, body, context.limits, raw_path)
    async with upstream:
        api, now = api_of(request.path), context.controller.now
        return await relay(request, upstream, context.limits, api, record, now, context.cutoff.lost)
