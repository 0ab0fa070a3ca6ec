"""A request is admitted or refused in the same way at both entrances: the raw proxy and aiohttp."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass, replace

import pytest
import zstandard
from aiohttp import web

from router.admission.access import AccessRules
from router.admission.key_ring import KeyRing, KeyStore, digest_of, new_key
from router.admission.origin_check import OriginPolicy, Origins
from router.admission.pipeline import NO_KEYS_NEEDED, AdmissionPipeline, AdmissionRequest, admission_pipeline
from router.api import app
from router.domain.access_key import AccessKey, RouteClass
from router.domain.gpu import Gpu, GpuUuid
from router.domain.request import LayoutKind
from router.http1.parser import RequestHead
from router.llm_api.limits import RequestLimits
from router.llm_api.routes import Kind, RouteTable
from router.observability.access_log import AccessLog
from router.observability.metrics import Metrics
from router.observability.request_record import RequestRecord
from router.proxy.context import admission_request
from router.proxy.server import ProxyServer
from tests.proxy.stage import LIMITS, VIA, staged
from tests.support.rawhttp import Address, Reply, connect

_TABLE = RouteTable()
_LIMITS = replace(LIMITS, max_body_bytes=1000)
_GPUS = {GpuUuid("GPU-aa"): Gpu(GpuUuid("GPU-aa"), 0, "first", 10, 10, 0)}
_BODY = '{"model":"tiny","messages":[{"role":"user","content":"x"}]}'
_ZSTD_BODY = zstandard.ZstdCompressor().compress(_BODY.encode()).decode("latin-1")
_ORIGIN, _FOREIGN = "Origin: http://localhost", "Origin: http://evil.example"
_PREFLIGHT = "Access-Control-Request-Method: POST"


_ANNA, _BEN = (new_key(), new_key())
_KEYS = (
    AccessKey("anna", digest_of(_ANNA), "anna", 0.0, classes=frozenset(RouteClass), priority=1),
    AccessKey("ben", digest_of(_BEN), "ben", 0.0, models=("tiny",), layouts=frozenset({LayoutKind.SINGLE})),
)
_WITH_KEYS = AccessRules(KeyStore(KeyRing(_KEYS, 0.0)))
_AS_ANNA, _AS_BEN = f"Authorization: Bearer {_ANNA}", f"X-Api-Key: {_BEN}"
_AS_NOBODY = f"Authorization: Bearer {_ANNA}x"


def _pipeline(limits: RequestLimits, access: AccessRules = NO_KEYS_NEEDED) -> AdmissionPipeline:
    policy = OriginPolicy(Origins(("http://localhost", "http://*.lab.example")), True, frozenset({"box"}))
    return admission_pipeline(policy, limits, lambda: _GPUS, _TABLE, VIA, access)


def _request(line: str, *headers: str, host: str = "127.0.0.1", body: str = "", length: int | None = None) -> bytes:
    """An HTTP/1.1 request with a fixed id. `length`: pads the body; beyond a megabyte only the header says so."""
    framing = [f"Content-Length: {len(body) if length is None else length}"] if body or length is not None else []
    body = body.ljust(length or 0) if (length or 0) < 1_000_000 else body
    lines = [f"{line} HTTP/1.1", f"Host: {host}", "X-Request-ID: fixed", *headers, *framing, "", body]
    return "\r\n".join(lines).encode("latin-1")


def _chat(*headers: str, path: str = "/api/chat", host: str = "127.0.0.1", length: int | None = None) -> bytes:
    return _request(f"POST {path}", "Content-Type: application/json", *headers, host=host, body=_BODY, length=length)


def _zstd(path: str) -> bytes:
    return _request(f"POST {path}", "Content-Type: application/json", "Content-Encoding: zstd", body=_ZSTD_BODY)


_CASES: dict[str, bytes] = {
    # hosts
    "host: an address": _chat(),
    "host: with a port": _chat(host="127.0.0.1:11434"),
    "host: localhost": _chat(host="localhost:1"),
    "host: of this machine": _chat(host="BOX"),
    "host: local suffix": _chat(host="gpu.internal"),
    "host: private address": _chat(host="10.1.2.3"),
    "host: IPv6": _chat(host="[::1]:11434"),
    "host: foreign": _chat(host="evil.example"),
    "host: foreign, OpenAI": _chat(path="/v1/chat/completions", host="evil.example"),
    "host: foreign address": _chat(host="8.8.8.8"),
    "host: empty": _chat(host=""),
    "host: foreign, unknown path": _request("GET /nope", host="evil.example"),
    "host: foreign, wrong method": _request("GET /api/chat", host="evil.example"),
    # origins
    "origin: allowed": _chat(_ORIGIN),
    "origin: allowed by pattern": _chat("Origin: http://a.lab.example"),
    "origin: same as host": _chat("Origin: http://127.0.0.1"),
    "origin: foreign": _chat(_FOREIGN),
    "origin: foreign and foreign host": _chat(_FOREIGN, host="evil.example"),
    "origin: allowed, foreign host": _chat(_ORIGIN, host="evil.example"),
    "origin: null": _chat("Origin: null"),
    "origin: allowed, unknown path": _request("GET /nope", _ORIGIN),
    "origin: allowed, wrong method": _request("DELETE /api/chat", _ORIGIN),
    "origin: allowed, bad priority": _chat(_ORIGIN, "X-Llamayard-Priority: urgent"),
    "origin: allowed, body too large": _chat(_ORIGIN, length=2000),
    # OPTIONS
    "preflight: allowed": _request("OPTIONS /api/chat", _ORIGIN, _PREFLIGHT),
    "preflight: allowed, OpenAI": _request("OPTIONS /v1/chat/completions", _ORIGIN, _PREFLIGHT),
    "preflight: foreign": _request("OPTIONS /api/chat", _FOREIGN, _PREFLIGHT),
    "preflight: unknown path": _request("OPTIONS /nope", _ORIGIN, _PREFLIGHT),
    "options: without an origin": _request("OPTIONS /api/chat"),
    "options: by name": _request("OPTIONS /api/chat", host="localhost"),
    # bodies
    "body: too large": _chat(length=2000),
    "body: too large, OpenAI": _chat(path="/v1/chat/completions", length=2000),
    "body: too large, Anthropic": _chat(path="/v1/messages", length=2000),
    "body: much too large": _chat(length=10**12),
    "body: too large for show": _request("POST /api/show", body=_BODY, length=2000),
    "body: of a blob": _request("POST /api/blobs/sha256:0", body="x" * 1500),
    "body: none": _request("POST /api/chat", length=0),
    "encoding: zstd, OpenAI": _zstd("/v1/chat/completions"),
    "encoding: zstd, embeddings": _zstd("/v1/embeddings"),
    "encoding: ZSTD among others": _chat("Content-Encoding: gzip, ZSTD", path="/v1/responses"),
    "encoding: zstd, Ollama": _chat("Content-Encoding: zstd"),
    "encoding: zstd, too large": _chat("Content-Encoding: zstd", path="/v1/embeddings", length=2000),
    "encoding: zstd, no body": _request("GET /v1/models", "Content-Encoding: zstd"),
    # paths and methods
    "path: unknown": _request("GET /nope"),
    "path: unknown, POST": _request("POST /debug/pprof", body="x"),
    "path: with a query": _chat(path="/api/chat?x=1"),
    "path: percent-encoded": _chat(path="/api/%63hat"),
    "path: double slash": _chat(path="//api/chat"),
    "path: trailing slash": _chat(path="/api/chat/"),
    "path: trailing slash, GET": _request("GET /api/tags/"),
    "path: with dots": _chat(path="/api/../api/chat"),
    "path: trailing slash, wrong method": _request("POST /api/tags/", body="x"),
    "path: trailing slash, HEAD": _request("HEAD /api/tags/"),
    "path: dot": _request("GET /./"),
    "path: dot within": _chat(path="/api/./chat?x=1"),
    "path: name with slashes": _request("GET /v1/models/a/b"),
    "path: name with slashes, wrong method": _request("DELETE /v1/models/a/b"),
    "target: absolute": _chat(path="http://localhost/api/chat?x=1"),
    "target: absolute, no slot": _request("GET http://127.0.0.1:1/api/tags"),
    "target: absolute, show": _request("POST HTTPS://user@localhost/api/show", body=_BODY),
    "target: absolute, foreign": _chat(path="http://evil.example/api/chat"),
    "target: absolute, foreign, no slot": _request("GET http://evil.example/api/tags"),
    "target: absolute, foreign host": _request("GET http://localhost/api/tags", host="evil.example"),
    "target: absolute, no path": _request("GET http://localhost?x=1"),
    "target: absolute, unclean": _request("GET http://localhost//api/tags"),
    "path: images": _chat(path="/v1/images/generations"),
    "method: GET": _request("GET /api/chat"),
    "method: PUT": _request("PUT /v1/chat/completions", body="x"),
    "method: POST to a GET route": _request("POST /api/tags", body="x"),
    # identity and terms
    "identity: key": _chat("Authorization: Bearer sk-1"),
    "identity: key beyond ASCII": _chat("Authorization: Bearer kl\u00fc\u00e7"),
    "identity: user and session": _chat("X-OpenWebUI-User-Id: anna", "X-Session-Id: s1"),
    "identity: two keys": _chat("Authorization: Bearer sk-1", "Authorization: Bearer sk-2"),
    "priority: high": _chat("X-Llamayard-Priority: High"),
    "priority: unknown": _chat("X-Llamayard-Priority: urgent"),
    "priority: unknown, OpenAI": _chat("X-Llamayard-Priority: 9", path="/v1/chat/completions"),
    "priority: unknown, Anthropic": _chat("X-Llamayard-Priority: 9", path="/v1/messages"),
    "priority: unknown, no slot": _request("GET /api/tags", "X-Llamayard-Priority: 9"),
    "layout: a GPU": _chat("X-Llamayard-Layout: gpu:0"),
    "layout: an absent GPU": _chat("X-Llamayard-Layout: gpu:7"),
    "layout: unknown": _chat("X-Llamayard-Layout: diagonal"),
    "layout: unknown, bad host": _chat("X-Llamayard-Layout: diagonal", host="evil.example"),
    # loops
    "loop: passed here": _chat("Via: 1.1 llamayard-test"),
    "loop: passed here, second line, OpenAI": _chat(
        "Via: 1.0 fred, 1.1 p.example", "via: 1.1 other,1.1 llamayard-test (x)", path="/v1/chat/completions"
    ),
    "loop: passed here, no slot": _request("GET /api/tags", "Via: 1.1 llamayard-test"),
    "loop: passed others": _chat("Via: 1.1 llamayard-0123456789abcdef, 1.1 caddy"),
    "layout: unknown, no slot": _request("GET /health", "X-Llamayard-Layout: diagonal"),
}


async def _admitted(request: web.BaseRequest, record: RequestRecord) -> web.StreamResponse:
    await request.read()
    return web.Response(text="admitted", headers=record.response_headers())


@dataclass(slots=True)
class _Entrances:
    raw: Address
    """The raw proxy, with aiohttp behind it, as in production."""
    aiohttp: Address
    """aiohttp's handler alone, which here also serves routes that take a slot."""
    seen: list[AdmissionRequest]
    """What aiohttp's adapter made of the requests to it alone."""


def _aiohttp(handler: Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]) -> web.Server:
    return web.Server(handler, access_log=None, auto_decompress=False)


@contextlib.asynccontextmanager
async def _entrances(access: AccessRules = NO_KEYS_NEEDED) -> AsyncGenerator[_Entrances]:
    loop = asyncio.get_running_loop()
    pipeline, seen = _pipeline(_LIMITS, access), list[AdmissionRequest]()
    access_log = AccessLog(Metrics(), loop.time, lambda *_: None)
    api_server = app.ApiServer(pipeline, dict.fromkeys(Kind, _admitted), access_log, loop.time)

    async def observed(request: web.BaseRequest) -> web.StreamResponse:
        seen.append(app.admission_request(request, _TABLE))
        return await api_server.handle(request)

    behind, alone = _aiohttp(api_server.handle), _aiohttp(observed)
    async with staged() as stage:
        context = replace(stage.proxy.context, pipeline=pipeline, limits=_LIMITS, make_handler=behind)
        listeners = [await loop.create_server(each, "127.0.0.1", 0) for each in (ProxyServer(context), alone)]
        raw, direct = (Address("127.0.0.1", each.sockets[0].getsockname()[1]) for each in listeners)
        try:
            yield _Entrances(raw, direct, seen)
        finally:
            for listener in listeners:
                listener.close()
            await behind.shutdown(0.1)
            await alone.shutdown(0.1)


async def _reply(address: Address, raw: bytes) -> Reply:
    async with connect(address, 5.0) as connection:
        await connection.send(raw)
        return await connection.reply()


_OF_THE_CONNECTION = {"date", "connection", "keep-alive", "content-length", "transfer-encoding"}
_OF_THE_REPLY = {"content-type", "x-llamayard-instance"}


def _compared(reply: Reply) -> tuple[int, list[tuple[str, str]], bytes]:
    """Status, headers and body; of an admitted request without what only its handler decides."""
    is_admitted = reply.status == 200
    ignored = _OF_THE_CONNECTION | (_OF_THE_REPLY if is_admitted else set())
    headers = sorted(pair for pair in reply.head.headers if pair[0].lower() not in ignored)
    return reply.status, headers, b"" if is_admitted else reply.body


async def test_both_entrances_give_the_same_response() -> None:
    async with _entrances() as entrances:
        differences = [
            (name, raw, direct)
            for name, request in _CASES.items()
            if (raw := _compared(await _reply(entrances.raw, request)))
            != (direct := _compared(await _reply(entrances.aiohttp, request)))
        ]
    assert len(_CASES) >= 60
    assert not differences


async def test_both_adapters_make_the_same_of_a_head() -> None:
    names = ("host", "origin", "authorization", "content-encoding", "x-llamayard-layout", "x-session-id")
    async with _entrances() as entrances:
        compared = 0
        async with staged() as stage:
            for name, request in _CASES.items():
                head = RequestHead()
                head.feed(request[: request.index(b"\r\n\r\n") + 4])
                facts = stage.proxy.context.leased_head(head)
                if facts is None:
                    continue
                raw = admission_request(head, facts, "127.0.0.1")
                entrances.seen.clear()
                await _reply(entrances.aiohttp, request)
                (direct,) = entrances.seen
                assert replace(raw, header=_no_header) == replace(direct, header=_no_header), name
                assert [raw.header(one) for one in names] == [direct.header(one) for one in names], name
                pipeline = _pipeline(_LIMITS)
                assert pipeline.admit(raw).client_identity == pipeline.admit(direct).client_identity, name
                compared += 1
    assert compared > 40


def _no_header(_: str) -> str | None:
    return None


_STATUSES = {
    "host: foreign": 403, "origin: foreign": 403, "preflight: allowed": 204, "options: without an origin": 405,
    "body: too large": 413, "encoding: zstd, OpenAI": 200, "path: unknown": 404, "path: trailing slash": 307,
    "path: trailing slash, GET": 301, "method: GET": 405, "priority: unknown": 400, "layout: an absent GPU": 409,
    "layout: unknown": 400, "layout: unknown, bad host": 403, "priority: unknown, no slot": 200, "body: of a blob": 200,
    "path: trailing slash, wrong method": 404, "path: dot": 307, "path: name with slashes, wrong method": 404,
    "target: absolute": 200, "target: absolute, no slot": 200, "target: absolute, foreign": 403,
    "target: absolute, foreign, no slot": 403, "target: absolute, foreign host": 200, "target: absolute, no path": 200,
    "loop: passed here": 508, "loop: passed here, second line, OpenAI": 508, "loop: passed here, no slot": 508,
    "loop: passed others": 200, "host: an address": 200, "origin: allowed": 200, "encoding: zstd, no body": 200,
}  # fmt: skip


@pytest.mark.parametrize(("name", "status"), _STATUSES.items())
async def test_each_check_refuses_with_its_status(name: str, status: int) -> None:
    async with _entrances() as entrances:
        assert (await _reply(entrances.raw, _CASES[name])).status == status


_KEY_CASES: dict[str, tuple[int, bytes]] = {
    "none": (401, _chat()),
    "none, OpenAI": (401, _chat(path="/v1/chat/completions")),
    "none, Anthropic": (401, _chat(path="/v1/messages")),
    "none, unknown path": (404, _request("GET /nope")),
    "none, public": (200, _request("GET /health")),
    "none, root": (200, _request("HEAD /")),
    "none, list": (401, _request("GET /api/tags")),
    "none, preflight": (204, _request("OPTIONS /api/chat", _ORIGIN, _PREFLIGHT)),
    "none, page": (401, _chat(_ORIGIN)),
    "none, body too large": (401, _chat(length=2000)),
    "placeholder": (401, _chat("Authorization: Bearer ollama")),
    "wrong": (401, _chat(_AS_NOBODY)),
    "bearer": (200, _chat(_AS_ANNA)),
    "X-Api-Key": (200, _chat(_AS_BEN, path="/v1/chat/completions")),
    "of inference for management": (403, _request("POST /api/pull", _AS_BEN, body="{}")),
    "of inference for admin": (403, _request("GET /metrics", _AS_BEN)),
    "of all classes for management": (200, _request("POST /api/pull", _AS_ANNA, body="{}")),
    "of all classes for admin": (200, _request("GET /llamayard/status", _AS_ANNA)),
    "foreign host": (403, _chat(_AS_ANNA, host="evil.example")),
    "priority": (200, _chat(_AS_BEN, "X-Llamayard-Priority: high")),
    "bad priority": (400, _chat(_AS_BEN, "X-Llamayard-Priority: urgent")),
    "layout": (200, _chat(_AS_ANNA, "X-Llamayard-Layout: gpu:0")),
    "layout of another key": (403, _chat(_AS_BEN, "X-Llamayard-Layout: gpu:0")),
}


async def test_both_entrances_hold_a_request_to_its_key() -> None:
    async with _entrances(_WITH_KEYS) as entrances:
        for name, (status, request) in _KEY_CASES.items():
            raw = _compared(await _reply(entrances.raw, request))
            assert raw == _compared(await _reply(entrances.aiohttp, request)), name
            assert raw[0] == status, name
            assert _ANNA.encode() not in raw[2], name


_BAD_FRAMING = {
    "negative length": ["Content-Length: -1"],
    "two lengths": ["Content-Length: 5", "Content-Length: 6"],
    "length that is no number": ["Content-Length: five"],
    "length and chunks": ["Content-Length: 5", "Transfer-Encoding: chunked"],
    "unknown transfer encoding": ["Transfer-Encoding: gzip"],
    "two hosts": ["Host: localhost", "Content-Length: 0"],
    "expectation": ["Expect: 200-ok", "Content-Length: 5"],
}


@pytest.mark.parametrize("lines", _BAD_FRAMING.values(), ids=_BAD_FRAMING)
async def test_bad_framing_is_refused_alike_on_every_kind_of_route(lines: list[str]) -> None:
    async with _entrances() as entrances:
        replies = [
            _compared(await _reply(entrances.raw, _request(f"POST {path}", *lines)))
            for path in ("/api/chat", "/v1/messages", "/api/show", "/api/pull", "/nope")
        ]
    assert replies[0][0] in (400, 417, 501)
    assert replies == [replies[0]] * len(replies)
