"""Which API a path belongs to, and how an error looks in that API, before and after bytes of a response are out.

Status and message come with the error. Only their form is decided here: Ollama's own for each API (v0.24).
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from enum import Enum

import msgspec

from router.errors import RouterError
from router.http1.response_writer import LocalResponse


class Api(Enum):
    """One of the three APIs that an Ollama server has."""

    OLLAMA = "ollama"
    OPENAI = "openai"
    ANTHROPIC = "anthropic"


JSON = "application/json; charset=utf-8"
"""As Ollama writes it on `/api`."""
NDJSON = "application/x-ndjson"
SSE = "text/event-stream"

CODE_HEADER = "X-Llamayard-Error"
"""Carries the stable error code, for which Ollama's own shape has no field."""

_OPENAI_TYPES: Mapping[int, str] = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    429: "rate_limit_error",
}
_ANTHROPIC_TYPES: Mapping[int, str] = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    503: "overloaded_error",
    529: "overloaded_error",
}
"""As openai.NewError and anthropic.NewError have them, and for 401 and 429 OpenAI; any other status is an
`api_error`."""

_READING_STATUSES = frozenset((400, 413, 415))
"""Statuses of errors from reading the body. For these Ollama's `/v1/*` names a charset and ends without a newline; for
later errors it does the opposite (`error-v1-*-bad-json` and `error-v1-*-unknown-model` in the recordings)."""

_GO_ESCAPES = ((b"<", b"\\u003c"), (b">", b"\\u003e"), (b"&", b"\\u0026"))
_LINE_SEPARATORS = (("\u2028".encode(), b"\\u2028"), ("\u2029".encode(), b"\\u2029"))


def api_of(path: str) -> Api:
    """The API of a path; everything outside `/v1` is Ollama's."""
    if path == "/v1/messages" or path.startswith("/v1/messages/"):
        return Api.ANTHROPIC
    return Api.OPENAI if path.startswith("/v1/") else Api.OLLAMA


def error_reply(api: Api, error: RouterError, request_id: str | None = None) -> LocalResponse:
    """`error` as a whole response. `request_id` appears where the API's shape has a field for it."""
    is_reading_error = api is Api.OLLAMA or error.status in _READING_STATUSES
    content_type = JSON if is_reading_error else "application/json"
    headers = [("Content-Type", content_type), (CODE_HEADER, error.code)]
    if error.retry_after_seconds is not None:
        headers.append(("Retry-After", str(error.retry_after_seconds)))
    headers += error.headers.items()
    body = _json(_content(api, error, request_id))
    return LocalResponse(error.status, tuple(headers), body if is_reading_error else body + b"\n")


def internal_error(request_id: str) -> RouterError:
    """For an exception that nobody expected; it must be logged with its traceback."""
    return RouterError(f"internal router error; see the log (request_id={request_id})")


def stream_error(api: Api, content_type: str, error: RouterError, *, sent: bytes = b"\n\n") -> bytes:
    """Bytes that end a stream with an error. `sent`: the end of what was sent, to close a broken line first.

    NDJSON gets an error line, OpenAI's events a last one with `error` and no `[DONE]`, Anthropic's an `error` event.
    Empty if the response is one JSON object: nothing can be added to that, so its connection must be cut.
    """
    kind = content_type.partition(";")[0].strip().lower()
    if kind == NDJSON:
        line = _json({"error": _message(error)}) + b"\n"
        return line if sent.endswith(b"\n") else b"\n" + line
    if kind != SSE:
        return b""
    content = _content(Api.OPENAI if api is Api.OLLAMA else api, error, None)
    event = b"event: error\n" if api is Api.ANTHROPIC else b""
    return (b"" if sent.endswith(b"\n\n") else b"\n\n") + event + b"data: " + _json(content) + b"\n\n"


def _content(api: Api, error: RouterError, request_id: str | None) -> dict[str, object]:
    if api is Api.OLLAMA:
        return {"error": _message(error)}
    if api is Api.OPENAI:
        kind = _OPENAI_TYPES.get(error.status, "api_error")
        return {"error": {"message": _message(error), "type": kind, "param": None, "code": error.code}}
    kind = _ANTHROPIC_TYPES.get(error.status, "api_error")
    identity = request_id or secrets.token_hex(12)
    return {
        "type": "error",
        "error": {"type": kind, "message": _message(error)},
        "request_id": identity if identity.startswith("req_") else f"req_{identity}",
    }


def _json(content: dict[str, object]) -> bytes:
    """JSON as Go writes it: no spaces, non-ASCII unescaped, characters special to HTML or JavaScript escaped."""
    text = msgspec.json.encode(content)
    for plain, escaped in (*_GO_ESCAPES, *_LINE_SEPARATORS):
        text = text.replace(plain, escaped)
    return text


def _message(error: RouterError) -> str:
    """The message, with lone surrogates from a server's message replaced."""
    return error.message.encode(errors="replace").decode()
