"""Routing of the EMULATED server: paths, methods, redirects, `Host` check and CORS rules.

Modelled on server/routes.go with gin and its CORS middleware (v0.24). Each response is logged in gin's format to
stdout. Unsupported paths (images, audio, accounts) are refused as by a server without a cloud and without such models.
"""

from __future__ import annotations

import contextlib
import functools
import ipaddress
import posixpath
import re
import socket
import sys
import time
from collections.abc import Awaitable, Callable, Mapping
from datetime import datetime
from http import HTTPStatus

from router.lab.emulator import anthropic_api, model_management, ollama_api, openai_api, responses_api
from router.lab.emulator.config import Config, log
from router.lab.emulator.context import Service
from router.lab.emulator.go_json import Fields, dump
from router.lab.emulator.http_server import ClientDisconnectedError, Request, Response
from router.lab.emulator.pull import pull, push
from router.lab.emulator.response_writer import JSON, ApiError, Sink, write_error

_Handler = Callable[..., Awaitable[None]]
_ALLOWED_HEADERS = (
    "Authorization,Content-Type,User-Agent,Accept,X-Requested-With,Openai-Beta,X-Stainless-Arch,X-Stainless-Async,"
    "X-Stainless-Custom-Poll-Interval,X-Stainless-Helper-Method,X-Stainless-Lang,X-Stainless-Os,"
    "X-Stainless-Package-Version,X-Stainless-Poll-Helper,X-Stainless-Retry-Count,X-Stainless-Runtime,"
    "X-Stainless-Runtime-Version,X-Stainless-Timeout"
)
_LOCAL_ORIGIN = re.compile(
    r"https?://(localhost|127\.0\.0\.1|0\.0\.0\.0)(:.*)?|(app|file|tauri|vscode-webview|vscode-file)://.*"
)
_LOCAL_NAMES = (".localhost", ".local", ".internal")


def _native_route(handler: openai_api.NativeHandler, type_name: str, fields: Fields) -> _Handler:
    async def handle(service: Service, request: Request, response: Response) -> None:
        body = await service.read(request, type_name, fields)
        sink = Sink(response, service.config.is_pre_0_12)
        try:
            await handler(service, request, sink, body)
        except ApiError as error:
            await sink.fail(error.status, error.message, error.is_late and body.get("stream", True))

    return handle


async def _root(service: Service, request: Request, response: Response) -> None:
    del service, request
    response.send_whole(200, b"Ollama is running", "text/plain; charset=utf-8")


async def _version(service: Service, request: Request, response: Response) -> None:
    del request
    response.send_whole(200, dump({"version": service.config.version_text}), JSON)


async def _status(service: Service, request: Request, response: Response) -> None:
    del request
    source = {"source": "env"} if service.config.no_cloud else {}
    response.send_whole(200, dump({"cloud": {"disabled": service.config.no_cloud, **source}}), JSON)


async def _no_cloud(feature: str, service: Service, request: Request, response: Response) -> None:
    del request
    if service.config.no_cloud:
        raise ApiError(403, f"ollama cloud is disabled: {feature} is unavailable")
    response.send_whole(401, dump({"error": "unauthorized"}), JSON)


async def _no_such_model(service: Service, request: Request, response: Response) -> None:
    del service
    await request.body()
    response.send_whole(400, dump(openai_api.error_body(400, "the model does not support this endpoint")), JSON)


_ROUTES: Mapping[str, Mapping[str, _Handler]] = {
    "/": {"HEAD": _root, "GET": _root},
    "/api/version": {"HEAD": _version, "GET": _version},
    "/api/tags": {"HEAD": model_management.tags, "GET": model_management.tags},
    "/api/ps": {"GET": model_management.ps},
    "/api/status": {"GET": _status},
    "/api/show": {"POST": model_management.show},
    "/api/create": {"POST": model_management.create},
    "/api/copy": {"POST": model_management.copy},
    "/api/delete": {"DELETE": model_management.delete},
    "/api/pull": {"POST": pull},
    "/api/push": {"POST": push},
    "/api/generate": {"POST": _native_route(ollama_api.generate, "api.GenerateRequest", ollama_api.GENERATE)},
    "/api/chat": {"POST": _native_route(ollama_api.chat, "api.ChatRequest", ollama_api.CHAT)},
    "/api/embed": {"POST": _native_route(ollama_api.embed, "api.EmbedRequest", ollama_api.EMBED)},
    "/api/embeddings": {"POST": _native_route(ollama_api.embeddings, "api.EmbeddingRequest", ollama_api.EMBEDDINGS)},
    "/api/me": {"POST": functools.partial(_no_cloud, "account")},
    "/api/signout": {"POST": functools.partial(_no_cloud, "account")},
    "/api/experimental/web_search": {"POST": functools.partial(_no_cloud, "web search")},
    "/api/experimental/web_fetch": {"POST": functools.partial(_no_cloud, "web fetch")},
    "/api/experimental/model-recommendations": {"GET": functools.partial(_no_cloud, "recommendations")},
    "/v1/chat/completions": {"POST": openai_api.chat},
    "/v1/completions": {"POST": openai_api.completions},
    "/v1/embeddings": {"POST": openai_api.embeddings},
    "/v1/models": {"GET": openai_api.models},
    "/v1/responses": {"POST": responses_api.responses},
    "/v1/messages": {"POST": anthropic_api.messages},
    "/v1/audio/transcriptions": {"POST": _no_such_model},
}
_PARAMETER_ROUTES: Mapping[str, Mapping[str, _Handler]] = {
    "/api/blobs/": {"HEAD": model_management.head_blob, "POST": model_management.post_blob},
    "/v1/models/": {"GET": openai_api.model},
}
_NEWER_PATHS = frozenset({"/api/status", "/api/me", "/api/signout", "/v1/responses", "/v1/messages",
                    "/api/experimental/web_search", "/api/experimental/web_fetch", "/v1/audio/transcriptions",
                    "/api/experimental/model-recommendations"})  # fmt: skip
"""Paths that 0.11.4 does not have."""


class Router:
    """Handles all requests."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._config = service.config
        self._host_check = _HostCheck(service.config)

    async def __call__(self, request: Request, response: Response) -> None:
        started_at = time.monotonic()
        try:
            await self._serve(request, response)
        except ApiError as error:
            await write_error(response, error.status, error.message)
        except ClientDisconnectedError:
            raise
        except Exception as error:
            log("ERROR", "panic", path=request.path, error=repr(error))
            if not response.started:
                response.send_whole(500)
        finally:
            _log_request(request, response, time.monotonic() - started_at)

    async def _serve(self, request: Request, response: Response) -> None:
        methods, parameter = self._route(request.path)
        handler = methods.get(request.method) if methods else None
        if methods and handler is None:
            response.headers["Allow"] = ", ".join(methods)
        if not self._check_origin(request, response) or not self._check_host(request, response):
            return
        if handler is not None:
            await handler(self._service, request, response, *parameter)
        elif methods:
            response.send_whole(405, b"405 method not allowed", "text/plain")
        elif not self._redirect(request, response):
            response.send_whole(404, b"404 page not found", "text/plain")

    def _route(self, path: str) -> tuple[Mapping[str, _Handler] | None, tuple[str, ...]]:
        """The methods of a path, and its path parameter if any."""
        if self._config.is_pre_0_12 and path in _NEWER_PATHS:
            return None, ()
        if path in _ROUTES:
            return _ROUTES[path], ()
        for prefix, methods in _PARAMETER_ROUTES.items():
            rest = path.removeprefix(prefix)
            if rest != path and rest and "/" not in rest:
                return methods, (rest,)
        return None, ()

    def _redirect(self, request: Request, response: Response) -> bool:
        """Redirects an unclean path, and a path with a slash at its end if it has the method without it."""
        path, mark, query = request.target.partition("?")
        location, status = posixpath.normpath("/" + path.lstrip("/")), 307
        location += "/" if path.endswith("/") and location != "/" else ""
        if location == path:
            location = path.removesuffix("/")
            if request.method not in (self._route(location)[0] or ()) or location == path:
                return False
            status = 301 if request.method == "GET" else 307
        location += mark + query
        response.headers["Location"] = location
        body = f'<a href="{location}">{HTTPStatus(status).phrase}</a>.\n\n' if request.method == "GET" else ""
        response.send_whole(status, body.encode(), "text/html; charset=utf-8" if body else None)
        return True

    def _check_origin(self, request: Request, response: Response) -> bool:
        """Sets the CORS headers; answers preflights and refused origins. True if the request may proceed."""
        origin = request.headers.get("origin")
        if not origin or origin.partition("://")[2] == request.host:
            return True
        if not (_LOCAL_ORIGIN.fullmatch(origin) or any(_matches(pattern, origin) for pattern in self._config.origins)):
            response.send_whole(403)
            return False
        response.headers["Access-Control-Allow-Origin"] = origin
        response.headers["Vary"] = "Origin"
        if request.method != "OPTIONS":
            return True
        response.headers |= {
            "Access-Control-Allow-Headers": _ALLOWED_HEADERS,
            "Access-Control-Allow-Methods": "GET,POST,PUT,PATCH,DELETE,HEAD,OPTIONS",
            "Access-Control-Max-Age": "43200",
            "Vary": "Origin\nAccess-Control-Request-Method\nAccess-Control-Request-Headers",
        }
        response.send_whole(204)
        return False

    def _check_host(self, request: Request, response: Response) -> bool:
        """Refuses foreign host names on a server that listens on loopback. True if the request may proceed."""
        if self._host_check.is_allowed(request.host):
            return True
        response.send_whole(403)
        return False


class _HostCheck:
    """Decides which values of `Host` are allowed."""

    def __init__(self, config: Config) -> None:
        self._hostname = socket.gethostname().lower()
        self._is_checked = config.host == "localhost" or _is_loopback(config.host)

    def is_allowed(self, host: str) -> bool:
        if not self._is_checked:
            return True
        hostname = _without_port(host).lower()
        with contextlib.suppress(ValueError):
            address = ipaddress.ip_address(hostname)
            return address.is_loopback or address.is_private or address.is_unspecified
        return hostname in ("", "localhost", self._hostname) or hostname.endswith(_LOCAL_NAMES)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _without_port(host: str) -> str:
    if host.startswith("["):
        return host[1:].partition("]")[0]
    hostname, colon, port = host.rpartition(":")
    return hostname if colon and port.isdigit() else host


def _matches(pattern: str, origin: str) -> bool:
    return re.fullmatch(".*".join(re.escape(part) for part in pattern.split("*")), origin) is not None


def _log_request(request: Request, response: Response, seconds: float) -> None:
    now = datetime.now().astimezone().strftime("%Y/%m/%d - %H:%M:%S")
    duration = f"{seconds:.6f}s" if seconds >= 1 else f"{seconds * 1e3:.3f}ms"
    line = (
        f'[GIN] {now} | {response.status} | {duration:>13} | {request.peer:>15} | {request.method:<7} "{request.path}"'
    )
    sys.stdout.write(line + " (emulated)\n")
    sys.stdout.flush()
