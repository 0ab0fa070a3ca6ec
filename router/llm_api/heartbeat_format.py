"""Bytes that keep a waiting client's stream alive: what the parsers of each protocol ignore.

Many clients give up after 15 to 60 s of silence, and loading a model takes longer. Tested with the clients themselves
(docs/clients.md): spaces *without* a line end before the first line of NDJSON (ollama-python, ollama-js and the Go
client fail or complain about an empty line), comments in an event stream, `ping` events in Anthropic's.

A client that asks for it (`X-Llamayard-Progress`) gets its place in the queue, in comments of its event stream. NDJSON
has no room for that: spaces are the only bytes that all its clients ignore.

The first heartbeat commits the response to status 200, so later errors must be reported within the stream
(`late_error`). Therefore only streams get heartbeats, never a request for one JSON object.

How to use it: call `heartbeat_for` once a request is read. After `seconds` without a byte to the client send a head
with `headers` and then `piece`, and `piece` again every `seconds`, until the server's reply begins. If
`reports_progress`, begin as soon as the request waits, and send `progress_piece(wait_estimate)` instead. A reply with
status 200 is then relayed without its head; of any other reply the body is read whole and `late_error(refusal(status,
body))` ends the stream. Pure: it measures no time and sends nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import msgspec

from router.errors import UNREADABLE_JSON, RouterError, ServerRefused
from router.http1.headers import HeaderLookup
from router.llm_api.body_reader import ParsedBody
from router.llm_api.errors import JSON, NDJSON, SSE, Api, api_of, error_reply, stream_error
from router.scheduler.queue.wait_estimate import WaitEstimate

HEARTBEAT_HEADER = "X-Llamayard-Heartbeat"
PROGRESS_HEADER = "X-Llamayard-Progress"
PROGRESS_SECONDS = 2.0
"""Interval of progress reports to a client that asks for them."""

_OFF = frozenset({"off", "0", "no", "false"})
_NDJSON_PATHS = frozenset({"/api/generate", "/api/chat"})
_SSE_PATHS = frozenset({"/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"})
_UNCACHED = frozenset({"/v1/responses", "/v1/messages"})
"""Their streams forbid caching, like a server's own."""

_SPACE = b" "
_COMMENT = b": waiting\n\n"
_PING = b'event: ping\ndata: {"type": "ping"}\n\n'


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """How one request is kept waiting."""

    api: Api
    content_type: str
    piece: bytes
    seconds: float
    headers: tuple[tuple[str, str], ...]
    """Of the head to send before the first piece."""
    reports_progress: bool = False
    """Whether the client asks for its place in the queue."""

    def progress_piece(self, wait_estimate: WaitEstimate) -> bytes:
        """The piece, preceded by a comment with the request's place in the queue."""
        comment = f": llamayard position={wait_estimate.position}"
        if wait_estimate.expected_wait_seconds is not None:
            comment += f" expected_wait_seconds={math.ceil(wait_estimate.expected_wait_seconds)}"
        if wait_estimate.reason:
            comment += f" reason={' '.join(wait_estimate.reason.split())}"
        return comment.encode(errors="replace") + b"\n" + (b"\n" if self.piece == _COMMENT else self.piece)

    def late_error(self, error: RouterError) -> bytes:
        """Bytes that end the stream with an error, after its status 200."""
        if self.content_type == JSON:
            return error_reply(self.api, error).body
        sent = self.piece if self.content_type == SSE else b"\n"  # spaces may precede a line
        return stream_error(self.api, self.content_type, error, sent=sent)


def heartbeat_for(path: str, parsed: ParsedBody, header: HeaderLookup, seconds: float | None) -> Heartbeat | None:
    """How the client is kept waiting; None if it gets no heartbeats.

    `seconds`: `stream.heartbeat_seconds`; None if heartbeats are off.
    """
    if seconds is None or (header(HEARTBEAT_HEADER.lower()) or "").strip().lower() in _OFF:
        return None
    if path in _NDJSON_PATHS and parsed.stream is not False:
        # The reply to a load alone is one JSON object, which spaces may precede.
        content_type, piece = (JSON if parsed.is_load_only else NDJSON), _SPACE
    elif path in _SSE_PATHS and parsed.stream:
        content_type, piece = SSE, _PING if api_of(path) is Api.ANTHROPIC else _COMMENT
    else:
        return None
    headers = [("Content-Type", content_type)]
    if path in _UNCACHED:
        headers.append(("Cache-Control", "no-cache"))
    reports_progress = content_type == SSE and (header(PROGRESS_HEADER.lower()) or "off").strip().lower() not in _OFF
    seconds = min(seconds, PROGRESS_SECONDS) if reports_progress else seconds
    return Heartbeat(api_of(path), content_type, piece, seconds, tuple(headers), reports_progress)


class _ErrorBody(msgspec.Struct):
    error: msgspec.Raw = msgspec.Raw(b"")


class _ErrorObject(msgspec.Struct):
    message: str = ""


def refusal(status: int, body: bytes) -> ServerRefused:
    """A server's error reply, too late to be relayed with its status, as an error with its message."""
    return ServerRefused(_message_of(body) or f"the server responded with status {status}", status=status)


def _message_of(body: bytes) -> str:
    """The message of `{"error":"…"}` or `{"error":{"message":"…"}}`; else the body as text."""
    try:
        raw = msgspec.json.decode(body, type=_ErrorBody).error
        if bytes(raw).lstrip().startswith(b'"'):
            return msgspec.json.decode(raw, type=str)
        return msgspec.json.decode(raw, type=_ErrorObject).message
    except UNREADABLE_JSON:
        return body.decode(errors="replace").strip()
