"""aiohttp's entrance: one handler for every request, from admission to the access-log line.

Requests that take a slot are served by the raw proxy (`router/proxy`) and do not reach this handler. The checks are
those of `admission/pipeline.py`, which both run. Exceptions of other libraries become errors of `router.errors` here,
and none escapes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from urllib.parse import unquote

import structlog
from aiohttp import hdrs, web

from router.admission.access import HeaderValues, begin_charge
from router.admission.key_budgets import KeyBudgets
from router.admission.key_ring import KeyStore
from router.admission.pipeline import AdmissionPipeline, AdmissionRequest
from router.api.admin import AdminHandler
from router.api.aggregated import AggregatedHandler
from router.api.context import ApiContext
from router.api.dashboard.handler import DashboardHandler
from router.api.model_management import ModelManagementHandler
from router.api.operator_actions import OperatorActions
from router.api.passthrough import PassthroughHandler, ShowHandler
from router.api.responses import aiohttp_response, error_response
from router.engines.ollama.client import OllamaError, not_queried
from router.errors import Forbidden, RateLimited, RouterError
from router.http1.headers import HeaderLookup, request_id
from router.http1.parser import origin_form
from router.http1.response_writer import CONTINUE
from router.llm_api.errors import api_of, internal_error
from router.llm_api.routes import Kind, RouteTable
from router.observability.access_log import AccessLog
from router.observability.last_hour import LastHour
from router.observability.metrics import Metrics
from router.observability.request_history import RequestHistory
from router.observability.request_record import CLIENT_GONE, DEBUG_HEADER, RequestRecord, asks_for_reason

Handler = Callable[[web.BaseRequest, RequestRecord], Awaitable[web.StreamResponse]]


class ApiHandlers:
    """The handlers of each kind of route. `close` ends their background work."""

    def __init__(
        self,
        context: ApiContext,
        metrics: Metrics,
        history: RequestHistory,
        actions: OperatorActions,
        keys: KeyStore,
        emulated: str = "",
        last_hour: LastHour | None = None,
    ) -> None:
        """`emulated`: the title of an emulated rig, "" for real GPUs. `last_hour`: None if the dashboard is off."""
        passthrough = PassthroughHandler(context)
        self._management = ModelManagementHandler(context)
        admin = AdminHandler(context, metrics, history, emulated, self._management.pulls.progress, actions, keys)
        self._dashboard = DashboardHandler(context, admin.status, history, last_hour)
        self.by_kind: Mapping[Kind, Handler] = {
            Kind.SHOW: ShowHandler(context),
            Kind.PASSED: passthrough,
            Kind.MERGED: AggregatedHandler(context),
            Kind.MANAGED: self._management,
            Kind.REFUSED: passthrough if context.rules.cloud else _refuse_account_route,
            Kind.ADMIN: admin,
            Kind.DASHBOARD: self._dashboard,
        }

    async def close(self) -> None:
        await self._dashboard.close()
        await self._management.close()


class ApiServer:
    """`handle` is the low-level aiohttp handler."""

    def __init__(
        self,
        pipeline: AdmissionPipeline,
        handlers: Mapping[Kind, Handler],
        access_log: AccessLog,
        now: Callable[[], float],
        *,
        budgets: KeyBudgets | None = None,
        debug_headers: bool = False,
    ) -> None:
        """`budgets`: what keys have used of their limits, shared with the proxy."""
        self._pipeline = pipeline
        self._budgets = KeyBudgets(now) if budgets is None else budgets
        self._handlers = handlers
        self._access_log = access_log
        self._now = now
        self._debug_headers = debug_headers
        self._table = RouteTable()
        self._log = structlog.get_logger("router.api")

    async def drained(self) -> None:
        """Returns once no request is in progress."""
        await self._access_log.idle.wait()

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """Serves one request."""
        head = admission_request(request, self._table)
        admission = self._pipeline.admit(head)
        record = RequestRecord(
            request_id=request_id(head.header("x-request-id")),
            client=admission.client_identity.client,
            route=head.route.path if head.route is not None else "other",
            arrived_at=self._now(),
            wants_reason=self._debug_headers or asks_for_reason(head.header(DEBUG_HEADER)),
            cors_headers=admission.cors_headers,
            key=admission.client_identity.key,
            hides_details=admission.hides_details,
        )
        self._access_log.began()
        status = 0
        try:
            if admission.refusal:
                record.refuse(admission.refusal)
            if admission.response is not None:
                response = aiohttp_response(admission.response, record.response_headers())
            elif admission.error is not None:
                response = self._error(record, head.path, admission.error)
            else:
                assert head.route is not None
                record.charge = begin_charge(self._budgets, admission.client_identity, head.route)
                response = await self._guarded(request, record, head.path, self._handlers[head.route.kind])
            status = response.status
            return response
        except RateLimited as error:
            response = self._error(record, head.path, error)
            status = response.status
            return response
        except asyncio.CancelledError:
            status = CLIENT_GONE
            raise
        finally:
            self._access_log.ended(record, request.method, head.path, status)

    async def _guarded(
        self, request: web.BaseRequest, record: RequestRecord, path: str, handler: Handler
    ) -> web.StreamResponse:
        """Runs the handler, and turns every exception into an error of the API that was called."""
        try:
            _continue_if_expected(request)
            return await handler(request, record)
        except RouterError as error:
            return self._error(record, path, error)
        except OllamaError as error:
            return self._error(record, path, not_queried(error))
        except ConnectionError:
            raise asyncio.CancelledError from None  # the client is gone
        except Exception:  # the outermost edge of a request
            self._log.exception("request_crashed", request_id=record.request_id, path=path)
            return self._error(record, path, internal_error(record.request_id))

    def _error(self, record: RequestRecord, path: str, error: RouterError) -> web.StreamResponse:
        record.error_code = error.code
        return error_response(api_of(path), error, record)


def admission_request(request: web.BaseRequest, table: RouteTable) -> AdmissionRequest:
    """The request's head as admission sees it."""
    target, authority = origin_form(request.raw_path.encode("utf-8", "surrogateescape"))
    path = unquote(target.partition(b"?")[0], errors="replace")
    return AdmissionRequest(
        method=request.method,
        path=path,
        route=table.find(path),
        header=_header_lookup(request, authority.decode("latin-1")),
        client_address=request.remote or "",
        body_bytes=request.content_length,
        target=target.decode("latin-1"),
        via=", ".join(request.headers.getall(hdrs.VIA, ())),
        header_values=_header_values(request),
    )


def _header_lookup(request: web.BaseRequest, authority: str) -> HeaderLookup:
    """aiohttp decodes headers as UTF-8; both entrances must read the same text, so this decodes them as Latin-1.

    `authority`, of a target in absolute form, takes precedence over Host.
    """
    headers = request.headers

    def lookup(name: str) -> str | None:
        if authority and name == "host":
            return authority
        value = headers.get(name)
        if value is None or value.isascii():
            return value
        return value.encode("utf-8", "surrogateescape").decode("latin-1")

    return lookup


def _header_values(request: web.BaseRequest) -> HeaderValues:
    headers = request.headers

    def values(name: str) -> list[str]:
        return [value.encode("utf-8", "surrogateescape").decode("latin-1") for value in headers.getall(name, [])]

    return values


async def _refuse_account_route(request: web.BaseRequest, record: RequestRecord) -> web.StreamResponse:
    del request
    raise Forbidden(
        f"{record.route} acts on the server's own ollama.com account, which clients of the router may not do "
        "(ollama.cloud)"
    )


def _continue_if_expected(request: web.BaseRequest) -> None:
    if request.headers.get(hdrs.EXPECT, "").lower() == "100-continue" and request.transport is not None:
        request.transport.write(CONTINUE)
