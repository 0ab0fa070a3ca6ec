"""Responses that the router makes itself, as aiohttp responses: JSON, text, and errors in the shape of each API."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import msgspec
from aiohttp import hdrs, web

from router.errors import RouterError
from router.http1.response_writer import LocalResponse
from router.llm_api.errors import JSON, Api, error_reply
from router.observability.request_record import RequestRecord


def json_response(content: Any, extra: Mapping[str, str], status: int = 200) -> web.Response:
    """JSON as Ollama writes it on `/api`."""
    return _response(status, ((hdrs.CONTENT_TYPE, JSON), *extra.items()), msgspec.json.encode(content))


def text_response(text: str, extra: Mapping[str, str], status: int = 200) -> web.Response:
    return _response(status, ((hdrs.CONTENT_TYPE, "text/plain; charset=utf-8"), *extra.items()), text.encode())


def error_response(api: Api, error: RouterError, record: RequestRecord) -> web.Response:
    """The error in the shape of the API that was called."""
    return aiohttp_response(error_reply(api, error, record.request_id), record.response_headers())


def aiohttp_response(response: LocalResponse, extra: Mapping[str, str]) -> web.Response:
    return _response(response.status, (*response.headers, *extra.items()), response.body)


def _response(status: int, headers: Iterable[tuple[str, str]], body: bytes) -> web.Response:
    response = web.Response(status=status, body=body)
    for name in {name for name, _ in headers}:
        response.headers.popall(name, None)
    for name, value in headers:
        response.headers.add(name, value)
    return response
