"""HTTP/1.1 client over plain asyncio streams that exposes what ordinary clients hide.

It keeps HTTP chunks separate and headers in order, and reports how the connection ended. It follows no redirects, adds
no extra headers and retries nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any, Literal, Self

DEADLINE_SECONDS = 300.0
"""Timeout of each wait; on a busy machine a real server may need a minute for 400 short tokens."""

End = Literal["complete", "eof", "reset"]
"""`complete`: the response was complete; `eof`, `reset`: the peer closed or reset the connection before that."""


@dataclass(frozen=True, slots=True)
class Address:
    """Where a server listens."""

    host: str
    port: int

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class Head:
    """Status line and headers; header names as received."""

    status: int
    reason: str
    headers: tuple[tuple[str, str], ...]

    def header(self, name: str) -> str | None:
        """The value of a header, repeated ones joined by `, `; None if missing."""
        values = [value for key, value in self.headers if key.lower() == name.lower()]
        return ", ".join(values) if values else None


@dataclass(frozen=True, slots=True)
class Reply:
    """One whole response. `chunks`: the HTTP chunks, or the body as a single one; none if it is empty."""

    head: Head
    chunks: tuple[bytes, ...]
    end: End

    @property
    def status(self) -> int:
        return self.head.status

    @property
    def body(self) -> bytes:
        return b"".join(self.chunks)

    @property
    def chunked(self) -> bool:
        return (self.head.header("Transfer-Encoding") or "").lower() == "chunked"

    def header(self, name: str) -> str | None:
        return self.head.header(name)

    def json(self) -> Any:
        return json.loads(self.body)

    def lines(self) -> list[Any]:
        """The values of an NDJSON body."""
        return [json.loads(line) for line in self.body.splitlines() if line.strip()]

    def events(self) -> list[Any]:
        """The `data:` values of an event stream; `[DONE]` stays text."""
        data = [line[6:] for line in self.body.decode().splitlines() if line.startswith("data: ")]
        return [text if text == "[DONE]" else json.loads(text) for text in data]


def request_bytes(
    method: str, path: str, body: Any = None, headers: tuple[tuple[str, str], ...] = (), host: str | None = "127.0.0.1"
) -> bytes:
    """Serialises a request; a body that is not bytes becomes JSON, and Content-Length is added if there is a body."""
    payload = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [f"{method} {path} HTTP/1.1"]
    lines += [] if host is None else [f"Host: {host}"]
    lines += [f"{name}: {value}" for name, value in headers]
    if body is not None:
        given_names = {name.lower() for name, _ in headers}
        lines += [] if "content-type" in given_names else ["Content-Type: application/json"]
        lines += [] if given_names & {"content-length", "transfer-encoding"} else [f"Content-Length: {len(payload)}"]
    return ("\r\n".join(lines) + "\r\n\r\n").encode() + payload


class Connection:
    """One connection; every wait has the deadline given to the constructor."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, deadline_seconds: float) -> None:
        self._reader = reader
        self._writer = writer
        self._deadline_seconds = deadline_seconds
        self._method = "GET"
        self._remaining_bytes = 0
        self._chunked = False
        self._last_head: Head | None = None

    async def send(self, raw: bytes) -> Self:
        """Sends raw request bytes; remembers the method to know whether the response has a body."""
        self._method = raw.split(b" ", 1)[0].decode(errors="replace")
        await self.write(raw)
        return self

    async def write(self, raw: bytes) -> None:
        """Sends more bytes of a request."""
        self._writer.write(raw)
        async with asyncio.timeout(self._deadline_seconds):
            await self._writer.drain()

    async def call(self, method: str, path: str, body: Any = None, headers: tuple[tuple[str, str], ...] = ()) -> Reply:
        """Sends one request and reads the whole response; the connection can be reused."""
        await self.send(request_bytes(method, path, body, headers))
        return await self.reply()

    async def head(self) -> Head:
        """Reads the next response head. Raises EOFError if the peer closes before it is complete."""
        async with asyncio.timeout(self._deadline_seconds):
            try:
                text = (await self._reader.readuntil(b"\r\n\r\n")).decode("latin-1")
            except (asyncio.IncompleteReadError, ConnectionResetError) as error:
                raise EOFError(f"closed before a response: {error}") from error
        status_line, *lines = text[:-4].split("\r\n")
        _, status, *reason = status_line.split(" ", 2)
        headers = tuple((name, value.strip()) for name, _, value in (line.partition(":") for line in lines))
        head = Head(int(status), reason[0] if reason else "", headers)
        self._chunked = (head.header("Transfer-Encoding") or "").lower() == "chunked"
        has_no_body = self._method == "HEAD" or head.status in (204, 304) or head.status < 200
        self._last_head = head
        self._remaining_bytes = (
            0 if has_no_body else int(head.header("Content-Length") or (-1 if not self._chunked else 0))
        )
        self._chunked = self._chunked and not has_no_body
        return head

    async def chunk(self) -> bytes | None:
        """Reads the next HTTP chunk; None at the end. Raises EOFError or ConnectionResetError if it is cut off."""
        async with asyncio.timeout(self._deadline_seconds):
            try:
                return await (self._next_chunk() if self._chunked else self._rest())
            except asyncio.IncompleteReadError as error:
                raise EOFError("closed within the body") from error

    async def _next_chunk(self) -> bytes | None:
        size = int((await self._reader.readuntil(b"\r\n")).split(b";")[0], 16)
        data = (await self._reader.readexactly(size + 2))[:-2]
        return data or None

    async def _rest(self) -> bytes | None:
        count, self._remaining_bytes = self._remaining_bytes, 0
        if count < 0:
            return await self._reader.read(-1) or None
        return await self._reader.readexactly(count) if count else None

    async def reply(self) -> Reply:
        """Reads the next whole response, however it ends."""
        return await self.rest(await self.head())

    async def rest(self, head: Head, *chunks_before: bytes) -> Reply:
        """Reads the rest of a response after its head and possibly its first chunks."""
        chunks = list(chunks_before)
        end: End = "complete"
        try:
            while (data := await self.chunk()) is not None:
                chunks.append(data)
        except EOFError:
            end = "eof"
        except ConnectionResetError:
            end = "reset"
        return Reply(head, tuple(chunks), end)

    async def rest_after_head(self) -> Reply:
        """Reads the rest of the response whose head was read last."""
        assert self._last_head is not None, "no head was read yet"
        return await self.rest(self._last_head)

    async def at_eof(self) -> bool:
        """Waits for the peer to close; False if more bytes arrive instead."""
        async with asyncio.timeout(self._deadline_seconds):
            try:
                return await self._reader.read(1) == b""
            except ConnectionResetError:
                return True

    def half_close(self) -> None:
        """Sends FIN but can still read."""
        self._writer.write_eof()

    def abort(self) -> None:
        """Drops the connection immediately (RST if the kernel holds unread data)."""
        self._writer.transport.abort()

    async def close(self) -> None:
        self._writer.close()
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()


@contextlib.asynccontextmanager
async def connect(address: Address, deadline_seconds: float = DEADLINE_SECONDS) -> AsyncGenerator[Connection]:
    """An open connection for the length of the block."""
    reader, writer = await asyncio.open_connection(address.host, address.port, limit=2**24)
    connection = Connection(reader, writer, deadline_seconds)
    try:
        yield connection
    finally:
        await connection.close()


async def exchange(address: Address, raw: bytes, deadline_seconds: float = DEADLINE_SECONDS) -> Reply:
    """Sends raw bytes on a new connection and reads the response."""
    async with connect(address, deadline_seconds) as connection:
        await connection.send(raw)
        return await connection.reply()


async def call(
    address: Address,
    method: str,
    path: str,
    body: Any = None,
    headers: tuple[tuple[str, str], ...] = (),
    host: str | None = "127.0.0.1",
) -> Reply:
    """Sends one request on a new connection."""
    return await exchange(address, request_bytes(method, path, body, headers, host))
