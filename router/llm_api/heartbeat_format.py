"""Bytes that keep a client waiting while its stream has none of its own: what each protocol's parsers ignore.

Many clients give up after 15 to 60 s of silence, and a model loads for longer. What is safe was tried on the clients
themselves (docs/clients.md): spaces *without* a line's end before the first line of NDJSON (ollama-python, ollama-js
and the Go client all fail or complain about an empty line), comments in an event stream, `ping` events for Anthropic's.

A client that asks for it (`X-Llamayard-Progress`) is told meanwhile where it stands, in comments of its event stream. A
stream of NDJSON has no place for that: spaces are all that every client of it ignores.

Whoever sends the first of these has answered 200: the reply's head is out, and what goes wrong later has to be told
within the stream (`late_error`). So only streams get them, never a request for one JSON object.

How to use it: `heartbeat_for` once a request is read; after `seconds` without a byte to the client send a head with
`headers` and then `piece`, and `piece` again each `seconds`, until the server's reply begins. Where it `tells`, begin
as soon as the request waits, and send `telling(outlook)` instead. A reply with status 200 is then relayed without its
head; of any other the body is read whole and `late_error(refusal(status, body))` ends the stream. Pure: it measures no
time and sends nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import msgspec

from router.admission.client_identity import Header
from router.errors import RouterError, ServerRefused
from router.llm_api.body_reader import ParsedBody
from router.llm_api.errors import NDJSON, SSE, Api, api_of, error_reply, stream_error
from router.scheduler.queue.wait_estimate import WaitEstimate

HEARTBEAT_HEADER = "X-Llamayard-Heartbeat"
PROGRESS_HEADER = "X-Llamayard-Progress"
PROGRESS_SECONDS = 2.0
"""So often a client that asks for it is told where it stands."""
REFUSAL_BYTES_MAX = 65536
"""So much of a late refusal is read; a server's errors are a line."""

_OFF = frozenset({"off", "0", "no", "false"})
_JSON = "application/json; charset=utf-8"
_NDJSON_PATHS = frozenset({"/api/generate", "/api/chat"})
_SSE_PATHS = frozenset({"/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"})
_UNCACHED = frozenset({"/v1/responses", "/v1/messages"})
"""Their streams forbid caching, as a server's own do."""

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
    """Of the head that has to be sent before the first piece."""
    tells: bool = False
    """Whether the client wants to know where it stands."""

    def telling(self, wait_estimate: WaitEstimate) -> bytes:
        """The piece with where the request stands in a comment, before what else is in it."""
        words = f": llamayard position={wait_estimate.position}"
        if wait_estimate.expected_wait_seconds is not None:
            words += f" expected_wait_seconds={math.ceil(wait_estimate.expected_wait_seconds)}"
        if wait_estimate.reason:
            words += f" reason={' '.join(wait_estimate.reason.split())}"
        return words.encode(errors="replace") + b"\n" + (b"\n" if self.piece == _COMMENT else self.piece)

    def late_error(self, error: RouterError) -> bytes:
        """What ends the stream visibly, now that its status is out."""
        if self.content_type == _JSON:
            return error_reply(self.api, error).body
        sent = self.piece if self.content_type == SSE else b"\n"  # spaces may stand before a line
        return stream_error(self.api, self.content_type, error, sent=sent)


def heartbeat_for(path: str, seen: ParsedBody, header: Header, seconds: float | None) -> Heartbeat | None:
    """How the request is kept waiting; None where it must not be, or does not want it.

    `seconds`: `stream.heartbeat_seconds`, None where they are off for all.
    """
    if seconds is None or (header(HEARTBEAT_HEADER.lower()) or "").strip().lower() in _OFF:
        return None
    if path in _NDJSON_PATHS and seen.stream is not False:
        # A load alone is answered by one object, before which blanks are JSON too.
        content_type, piece = (_JSON if seen.is_load_only else NDJSON), _SPACE
    elif path in _SSE_PATHS and seen.stream:
        content_type, piece = SSE, _PING if api_of(path) is Api.ANTHROPIC else _COMMENT
    else:
        return None
    headers = [("Content-Type", content_type)]
    if path in _UNCACHED:
        headers.append(("Cache-Control", "no-cache"))
    tells = content_type == SSE and (header(PROGRESS_HEADER.lower()) or "off").strip().lower() not in _OFF
    seconds = min(seconds, PROGRESS_SECONDS) if tells else seconds
    return Heartbeat(api_of(path), content_type, piece, seconds, tuple(headers), tells)


class _Words(msgspec.Struct):
    error: msgspec.Raw = msgspec.Raw(b"")


class _Message(msgspec.Struct):
    message: str = ""


def refusal(status: int, body: bytes) -> ServerRefused:
    """A server's answer that came too late to be passed on with its status, as an error with its words."""
    return ServerRefused(_words(body) or f"the server answered with status {status}", status=status)


def _words(body: bytes) -> str:
    """What `{"error":"…"}` or `{"error":{"message":"…"}}` says; else the text itself."""
    try:
        raw = msgspec.json.decode(body, type=_Words).error
        if bytes(raw).lstrip().startswith(b'"'):
            return msgspec.json.decode(raw, type=str)
        return msgspec.json.decode(raw, type=_Message).message
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return body.decode(errors="replace").strip()
