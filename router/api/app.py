"""The front door: one handler for every request, from the checks of Host and Origin to the access log line.

Requests that take a slot are the relay's (`router/relay`) and do not come here.

Which path is answered how stands in `llm_api/routes.py`; who may call from a browser in `admission/origin_check.py`;
how errors look in `llm_api/errors.py`. Foreign exceptions become one of `router.errors` here, and nothing escapes it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from urllib.parse import unquote

import structlog
from aiohttp import hdrs, web

from router.admission.origin_check import OriginPolicy, method_not_allowed, not_found
from router.api.admin import AdminHandler
from router.api.aggregated import AggregatedHandler
from router.api.context import ApiContext
from router.api.model_management import ModelManagementHandler
from router.api.passthrough import PassthroughHandler, ShowHandler
from router.api.responses import error_answer, judged_answer, redirect_answer
from router.engines.ollama.client import OllamaError
from router.errors import Forbidden, InstanceLost, RouterError
from router.http1.headers import request_id
from router.llm_api.body_reader import refuse_encoded
from router.llm_api.errors import api_of
from router.llm_api.routes import Kind, Route, RouteTable
from router.observability.access_log import AccessLog
from router.observability.metrics import Metrics
from router.observability.request_record import RequestRecord

Handler = Callable[[web.BaseRequest, RequestRecord], Awaitable[web.StreamResponse]]

CLIENT_GONE = 499
"""nginx's status for a client that left before its answer; only logs and metrics see it."""


class ApiServer:
    """`handle` is the low-level aiohttp handler. `emulated`: the title of an emulated rig, or ""."""

    def __init__(
        self,
        context: ApiContext,
        origins: OriginPolicy,
        metrics: Metrics,
        access: AccessLog,
        emulated: str = "",
        debug_headers: bool = False,
    ) -> None:
        self._context = context
        self._origins = origins
        self._access = access
        self._debug_headers = debug_headers
        self._table = RouteTable()
        passed = PassthroughHandler(context)
        self._managed = ModelManagementHandler(context)
        self._handlers: Mapping[Kind, Handler] = {
            Kind.SHOW: ShowHandler(context),
            Kind.PASSED: passed,
            Kind.MERGED: AggregatedHandler(context),
            Kind.MANAGED: self._managed,
            Kind.REFUSED: self._refused(passed),
            Kind.ADMIN: AdminHandler(context, metrics, emulated),
        }
        self._log = structlog.get_logger("router.gateway")

    async def drained(self) -> None:
        """Returns when no request is being answered."""
        await self._access.idle.wait()

    async def close(self) -> None:
        """Ends what goes on behind the answers."""
        await self._managed.close()

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """Answers one request."""
        path = unquote(request.raw_path.partition("?")[0], errors="replace")
        route = self._table.find(path)
        info = self._info(request, route)
        self._access.began()
        status = 0
        try:
            response = await self._answer(request, info, path, route)
            status = response.status
            return response
        except asyncio.CancelledError:
            status = CLIENT_GONE
            raise
        finally:
            self._access.ended(info, request.method, path, status)

    def _info(self, request: web.BaseRequest, route: Route | None) -> RequestRecord:
        headers = request.headers
        return RequestRecord(
            request_id=request_id(headers.get("X-Request-ID")),
            client=request.remote or "",
            route=route.path if route is not None else "other",
            arrived_at=self._context.controller.now(),
            wants_reason=self._debug_headers or headers.get("X-Llamayard-Debug", "") not in ("", "0", "false"),
        )

    async def _answer(
        self, request: web.BaseRequest, info: RequestRecord, path: str, route: Route | None
    ) -> web.StreamResponse:
        allow = route.methods if route is not None else ()
        verdict = self._origins.judge(
            request.method, request.headers.get(hdrs.HOST), request.headers.get(hdrs.ORIGIN), allow
        )
        info.cors = verdict.headers
        if verdict.answer is not None:
            return judged_answer(verdict.answer, info.reply_headers(None))
        if route is None:
            return self._unknown(request, info, path)
        if request.method not in allow:
            return judged_answer(method_not_allowed(allow), info.reply_headers(None))
        return await self._guarded(request, info, path, route)

    def _unknown(self, request: web.BaseRequest, info: RequestRecord, path: str) -> web.StreamResponse:
        """404, or a redirect where only slashes are wrong, as the server's own router does."""
        clean = self._table.clean(path)
        if clean is None:
            return judged_answer(not_found(), info.reply_headers(None))
        only_last_slash = path.rstrip("/") == clean and request.method == hdrs.METH_GET
        return redirect_answer(request.method, clean, 301 if only_last_slash else 307, info.reply_headers(None))

    async def _guarded(
        self, request: web.BaseRequest, info: RequestRecord, path: str, route: Route
    ) -> web.StreamResponse:
        """The route's handler, with every error turned into an answer of the API that was called."""
        try:
            refuse_encoded(path, request.headers.get(hdrs.CONTENT_ENCODING))
            await _continue_if_expected(request)
            return await self._handlers[route.kind](request, info)
        except RouterError as error:
            return self._error(info, path, error)
        except OllamaError as error:
            return self._error(info, path, InstanceLost(f"the instance cannot be asked: {error.message}"))
        except ConnectionError:
            raise asyncio.CancelledError from None  # the client is gone
        except Exception:  # the outermost edge of a request
            self._log.exception("request_crashed", request_id=info.request_id, path=path)
            return self._error(info, path, RouterError("the router met an error of its own; its log tells"))

    def _error(self, info: RequestRecord, path: str, error: RouterError) -> web.StreamResponse:
        info.error_code = error.code
        return error_answer(api_of(path), error, info.request_id, info.reply_headers(None))

    def _refused(self, passed: Handler) -> Handler:
        """What acts on the server's own cloud account, unless cloud models are switched on."""

        async def refused(request: web.BaseRequest, info: RequestRecord) -> web.StreamResponse:
            if self._context.rules.cloud:
                return await passed(request, info)
            raise Forbidden(
                f"{info.route} acts on the server's own ollama.com account and is not open to the router's clients "
                "(ollama.cloud)"
            )

        return refused


async def _continue_if_expected(request: web.BaseRequest) -> None:
    if request.headers.get(hdrs.EXPECT, "").lower() == "100-continue" and request.transport is not None:
        request.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
