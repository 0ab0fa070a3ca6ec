"""Whole answers that the router makes itself, in aiohttp's terms: JSON, text, errors in the shape of each API."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import msgspec
from aiohttp import hdrs, web

from router.admission.origin_check import Answer
from router.errors import RouterError
from router.llm_api.errors import Api, error_reply

JSON = "application/json; charset=utf-8"


def json_answer(content: Any, extra: Mapping[str, str], status: int = 200) -> web.Response:
    """As Ollama writes JSON on `/api`."""
    return _answer(status, ((hdrs.CONTENT_TYPE, JSON), *extra.items()), msgspec.json.encode(content))


def text_answer(text: str, extra: Mapping[str, str], status: int = 200) -> web.Response:
    return _answer(status, ((hdrs.CONTENT_TYPE, "text/plain; charset=utf-8"), *extra.items()), text.encode())


def error_answer(api: Api, error: RouterError, request_id: str, extra: Mapping[str, str]) -> web.Response:
    """The error in the shape of the API that was called."""
    reply = error_reply(api, error, request_id)
    return _answer(reply.status, (*reply.headers, *extra.items()), reply.body)


def judged_answer(answer: Answer, extra: Mapping[str, str]) -> web.Response:
    """What the check of Host and Origin, or of the path, ends a request with."""
    return _answer(answer.status, (*answer.headers, *extra.items()), answer.body)


def redirect_answer(method: str, path: str, status: int, extra: Mapping[str, str]) -> web.Response:
    """To the clean form of a path, as the server's router does."""
    location = ((hdrs.LOCATION, path), *extra.items())
    if method not in (hdrs.METH_GET, hdrs.METH_HEAD):
        return _answer(status, location, b"")
    body = f'<a href="{path}">{ {301: "Moved Permanently"}.get(status, "Temporary Redirect") }</a>.\n\n'
    return _answer(status, ((hdrs.CONTENT_TYPE, "text/html; charset=utf-8"), *location), body.encode())


def _answer(status: int, headers: Iterable[tuple[str, str]], body: bytes) -> web.Response:
    response = web.Response(status=status, body=body)
    for name in {name for name, _ in headers}:
        response.headers.popall(name, None)
    for name, value in headers:
        response.headers.add(name, value)
    return response
