"""Remembers request heads and what was derived from them, so that a similar request skips most of the work.

Requests of one client usually differ in little but the length of their bodies. A head matches a cached one if it comes
from the same address and has the same bytes except for the digits of its Content-Length. What llhttp reported for the
one then holds for the other: the header is the same and occurs once. Only complete, valid heads are cached, and of
those the most recently used.

With a head go its `HeadFacts`: route, admission, the head as forwarded, and the plans of requests by the settings in
their bodies, which clients write alike again and again. Everything that can change in the meantime (the model's facts,
its deletion) is checked for each request.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from msgspec import structs

from router.admission.pipeline import Admission
from router.engines.ollama.endpoint_support import is_young
from router.http1.headers import request_lines, sanitized_request_id
from router.http1.parser import RequestHead
from router.http1.via import Via
from router.llm_api.body_reader import ParsedBody
from router.llm_api.content_encoding import is_zstd
from router.llm_api.form_data import is_form
from router.llm_api.heartbeat_format import Heartbeat
from router.llm_api.inference_request import RoutingPlan
from router.llm_api.routes import Route
from router.observability.request_record import DEBUG_HEADER, asks_for_reason
from router.scheduler.lru import put

HEAD_BYTES_MAX = 2048
"""Longer heads are not cached."""
HEADS_MAX = 512
PLANS_MAX = 16
"""Plans kept for one head, the most recently added."""
_SERVERS_MAX = 64

_LENGTH = re.compile(rb"\r\n[Cc]ontent-[Ll]ength: ([0-9]{1,15})\r\n")

_Key = tuple[str, bytes, bytes]
"""The client's address, and the bytes before and after the digits of the length."""

PlanKey = tuple[str | bytes, ...]
"""`Outline.settings`."""


class CachedPlan(NamedTuple):
    plan: RoutingPlan
    heartbeat: Heartbeat | None
    parsed: ParsedBody
    """Of another body with the same settings."""
    rules_version: int
    """Of the rules that it was derived from."""


class HeadFacts:
    """Derived from one head of a request that takes a slot."""

    __slots__ = (
        "admission", "is_form", "is_young", "is_zstd", "long_bodies", "path", "plans", "request_id", "route",
        "upstream_lines", "wants_reason",
    )  # fmt: skip

    def __init__(self, route: Route, path: str, head: RequestHead, *, debug_headers: bool) -> None:
        self.route = route
        self.path = path
        """Decoded, without the query."""
        self.is_young = is_young(path)
        self.is_form = is_form(path, head.text("content-type"))
        self.is_zstd = is_zstd(path, head.text("content-encoding"))
        """Whether the body is compressed. It is forwarded decompressed."""
        self.request_id = sanitized_request_id(head.text("x-request-id"))
        """The client's; "" if it sent none."""
        self.wants_reason = debug_headers or asks_for_reason(head.text(DEBUG_HEADER))
        self.admission: Admission | None = None
        """Set if the next request with this head is admitted in the same way."""
        self.upstream_lines: dict[str, bytes] = {}
        """The head as forwarded, without framing, by the server's URL."""
        self.plans: dict[PlanKey, CachedPlan] = {}
        self.long_bodies: dict[str, ParsedBody] = {}
        """By model, as written: what the last long body said, except for its prompt."""

    def add_upstream_lines(self, head: RequestHead, url: str, authority: bytes, via: Via) -> bytes:
        """The head as forwarded to that server, without framing; cached for the next request."""
        headers = head.headers
        if self.is_zstd:
            headers = [pair for pair in headers if pair[0].lower() != b"content-encoding"]
        lines = request_lines(head.method, head.target, headers, authority, (via.header(),))
        put(self.upstream_lines, url, lines, _SERVERS_MAX)
        return lines

    def add_plan(self, key: PlanKey, plan: CachedPlan) -> None:
        put(self.plans, key, plan, PLANS_MAX)

    def add_long_body(self, parsed: ParsedBody) -> None:
        if parsed.model:
            put(self.long_bodies, parsed.model, structs.replace(parsed, prompt_bytes=0), PLANS_MAX)


class HeadCache:
    """Shared by all connections of a listener."""

    __slots__ = ("_heads",)

    def __init__(self) -> None:
        self._heads: dict[_Key, RequestHead] = {}

    def find(self, peer: str, data: bytes) -> RequestHead | None:
        """The head at the start of `data`, if a matching one came from `peer` before. Its `raw` is its bytes."""
        end = data.find(b"\r\n\r\n", 0, HEAD_BYTES_MAX) + 4
        if end < 4:
            return None
        raw = data[:end]
        length = _LENGTH.search(raw)
        key = (peer, raw, b"") if length is None else (peer, raw[: length.start(1)], raw[length.end(1) :])
        head = self._heads.pop(key, None)
        if head is None:
            return None
        self._heads[key] = head  # now the most recently used
        if length is None or head.raw == raw:
            return head
        return head.resized(int(length[1]), raw)

    def clear(self) -> None:
        self._heads.clear()

    def remember(self, peer: str, head: RequestHead, raw: bytes) -> None:
        """`head` was parsed from `raw`, all of it."""
        head.raw = raw
        if len(raw) <= HEAD_BYTES_MAX:
            length = _LENGTH.search(raw)
            key = (peer, raw, b"") if length is None else (peer, raw[: length.start(1)], raw[length.end(1) :])
            put(self._heads, key, head, HEADS_MAX)
