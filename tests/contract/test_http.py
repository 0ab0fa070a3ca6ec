"""HTTP behaviour independent of models: paths, methods, host check, connections, bodies."""

from __future__ import annotations

import pytest

from tests.support.rawhttp import Address, call, connect, exchange, request_bytes


@pytest.mark.parametrize(
    ("method", "path", "status", "text"),
    [
        ("GET", "/", 200, b"Ollama is running"),
        ("HEAD", "/", 200, b""),
        ("HEAD", "/api/version", 200, b""),
        ("HEAD", "/api/tags", 200, b""),
        ("POST", "/api/nope", 404, b"404 page not found"),
        ("GET", "/v1/nope", 404, b"404 page not found"),
        ("GET", "/debug/pprof/", 404, b"404 page not found"),
        ("GET", "/api/chat", 405, b"405 method not allowed"),
        ("POST", "/api/tags", 405, b"405 method not allowed"),
        ("PUT", "/v1/completions", 405, b"405 method not allowed"),
        ("GET", "/api/delete", 405, b"405 method not allowed"),
    ],
)
async def test_paths_and_methods(address: Address, method: str, path: str, status: int, text: bytes) -> None:
    reply = await call(address, method, path)
    assert (reply.status, reply.body) == (status, text)


async def test_a_wrong_method_gets_an_allow_header(address: Address) -> None:
    tags = await call(address, "POST", "/api/tags", {})
    assert sorted((tags.header("Allow") or "").split(", ")) == ["GET", "HEAD"]
    assert (await call(address, "GET", "/api/chat")).header("Allow") == "POST"


@pytest.mark.parametrize(("path", "status"), [("/api/tags/", 301), ("//api/tags", 307)])
async def test_unclean_paths_are_redirected(address: Address, path: str, status: int) -> None:
    reply = await call(address, "GET", path)
    assert (reply.status, reply.header("Location")) == (status, "/api/tags")


@pytest.mark.parametrize(
    ("method", "path", "status", "location"),
    [
        ("POST", "/api/tags/", 404, None),
        ("HEAD", "/api/tags/", 307, "/api/tags"),
        ("POST", "/api/chat/", 307, "/api/chat"),
        ("GET", "/./", 307, "/"),
        ("GET", "/api/./tags?x=1", 307, "/api/tags?x=1"),
        ("POST", "/v1/models/a/b", 404, None),
        ("GET", "/unknown//", 307, "/unknown/"),
    ],
)
async def test_unclean_paths_depend_on_the_method(
    address: Address, method: str, path: str, status: int, location: str | None
) -> None:
    reply = await call(address, method, path)
    assert (reply.status, reply.header("Location")) == (status, location)


@pytest.mark.parametrize(
    ("target", "host", "status"),
    [
        ("http://localhost/api/version", "localhost", 200),
        ("HTTP://127.0.0.1:1/api/version?x=1", "evil.example", 200),
        ("http://evil.example/api/version", "localhost", 403),
    ],
)
async def test_the_authority_of_an_absolute_target_replaces_the_host(
    address: Address, target: str, host: str, status: int
) -> None:
    reply = await exchange(address, f"GET {target} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
    assert reply.status == status


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1", 200),
        ("localhost", 200),
        ("localhost:1234", 200),
        ("192.168.1.5", 200),
        ("[::1]:80", 200),
        ("0.0.0.0", 200),
        ("box.local", 200),
        ("box.internal", 200),
        ("a.localhost", 200),
        ("evil.example", 403),
        ("somehost", 403),
        ("8.8.8.8", 403),
    ],
)
async def test_only_local_names_pass_the_host_check(address: Address, host: str, status: int) -> None:
    reply = await call(address, "GET", "/api/version", host=host)
    assert reply.status == status
    assert (reply.body == b"") == (status == 403)


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        ("http://localhost", 200),
        ("http://localhost:3000", 200),
        ("https://127.0.0.1:8443", 200),
        ("http://0.0.0.0:1", 200),
        ("app://x", 200),
        ("file://x", 200),
        ("tauri://x", 200),
        ("vscode-webview://x", 200),
        ("http://evil.example", 403),
    ],
)
async def test_only_local_origins_are_allowed(address: Address, origin: str, status: int) -> None:
    reply = await call(address, "GET", "/api/version", headers=(("Origin", origin),))
    assert reply.status == status
    assert reply.header("Access-Control-Allow-Origin") == (origin if status == 200 else None)


async def test_a_connection_serves_several_requests(address: Address) -> None:
    async with connect(address) as connection:
        for _ in range(3):
            assert (await connection.call("GET", "/api/version")).status == 200
        assert (await connection.call("POST", "/api/nope", {})).status == 404
        assert (await connection.call("POST", "/api/chat", b"{bad")).status == 400
        assert (await connection.call("GET", "/api/version")).status == 200


async def test_pipelined_requests_are_answered_in_order(address: Address) -> None:
    async with connect(address) as connection:
        await connection.send(
            request_bytes("GET", "/api/version") + request_bytes("GET", "/") + request_bytes("GET", "/api/nope")
        )
        replies = [await connection.reply() for _ in range(3)]
    assert [reply.status for reply in replies] == [200, 200, 404]
    assert replies[1].body == b"Ollama is running"


async def test_a_request_to_close_is_honoured(address: Address) -> None:
    async with connect(address) as connection:
        reply = await connection.call("GET", "/api/version", headers=(("Connection", "close"),))
        assert reply.header("Connection") == "close"
        assert await connection.at_eof()


async def test_http_1_0_without_a_host_is_served(address: Address) -> None:
    reply = await exchange(address, b"GET /api/version HTTP/1.0\r\n\r\n")
    assert reply.status == 200
    assert reply.json()["version"]


async def test_a_chunked_request_without_a_content_type_is_read(address: Address) -> None:
    body = b'{"model":"tiny"}'
    raw = b"POST /api/generate HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
    raw += b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (body[:5], body[5:])) + b"0\r\n\r\n"
    reply = await exchange(address, raw)
    assert (reply.status, reply.json()["done_reason"]) == (200, "load")


async def test_expect_100_continue_is_answered(address: Address) -> None:
    body = b'{"model":"tiny"}'
    head = b"POST /api/generate HTTP/1.1\r\nHost: localhost\r\nExpect: 100-continue\r\nContent-Length: %d\r\n\r\n"
    async with connect(address) as connection:
        await connection.send(head % len(body))
        assert (await connection.head()).status == 100
        await connection.write(body)
        reply = await connection.reply()
    assert (reply.status, reply.json()["done_reason"]) == (200, "load")
