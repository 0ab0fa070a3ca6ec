"""What is fuzzed over sockets: the router as users run it, beside the server that it is in front of.

`surface` sends the same bytes to the router and to a plain Ollama, on a connection each, and compares what comes back:
how many requests were answered, the class of each status, and the model that it is about. `admin` sends commands,
questions and configuration files to a router over an EMULATED rig. Neither may hang, crash or answer 5xx.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import re
from collections import Counter
from collections.abc import Generator
from dataclasses import dataclass, field, replace
from pathlib import Path
from urllib.parse import quote

from tests.fuzz.documents import odd_configuration
from tests.fuzz.mutator import NUMBERS, ODD_BYTES, Mutator
from tests.fuzz.requests import LEASED, body, request_with_odd_head
from tests.fuzz.targets import Target
from tests.support.ollama_server import create_from_file, real_server, write_model_files
from tests.support.product import Product, prepare, running
from tests.support.rawhttp import Address
from tests.support.tiny_model import TINY
from tests.support.waiting import eventually_sync

_QUIET_SECONDS = 1.0
"""Without a byte for so long, the client says that it sends no more."""
_END_SECONDS = 60.0
_LAST = b"GET /api/version HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
_ANSWER = re.compile(rb"HTTP/1\.[01] ([0-9]{3}) ")
_MODEL = re.compile(rb'"model":"((?:[^"\\]|\\.)*)"|model \\?[\'"](.*?)\\?[\'"] not found')
_COSTLY = (b"num_predict", b"num_ctx", b"num_batch", b"num_gpu", b"num_thread", b"main_gpu", b"use_mmap", b"max_tokens")
"""Would make the server load its model anew, or generate for long; the others say what these say about reading."""
_PLAIN = (
    *(b"GET /api/tags", b"GET /v1/models", b"GET /api/ps", b"GET /", b"HEAD /", b"GET /api/version", b"GET /nothing"),
    *(
        b"GET /v1/models/tiny",
        b"GET /v1/models/no%2Fsuch",
        b"PUT /api/chat",
        b"GET /api/generate",
        b"OPTIONS /api/chat",
    ),
    *(b"GET //api/tags", b"GET /api/tags/", b"GET /api/../api/tags", b"POST /api/tags", b"GET /api/tags?a=%zz"),
)
_PROTOCOL = (501, 505)
"""For methods and versions that HTTP does not know; Go says 400, 404 or 405."""
_CRASHES = ("Traceback", "_crashed", '"level": "critical"')


async def conversation(address: Address, raw: bytes) -> bytes:
    """All that comes back for these bytes. Raises TimeoutError if the other side does not end it."""
    reader, writer = await asyncio.open_connection(address.host, address.port)
    out = b""
    try:
        async with asyncio.timeout(_END_SECONDS):
            with contextlib.suppress(ConnectionError):
                writer.write(raw)
                await writer.drain()
                while data := await _read(reader, writer):
                    out += data
    finally:
        writer.transport.abort()
    return out


async def _read(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes:
    try:
        async with asyncio.timeout(_QUIET_SECONDS):
            return await reader.read(65536)
    except TimeoutError:
        with contextlib.suppress(OSError):
            writer.write_eof()
    return await reader.read(65536)


@dataclass(slots=True)
class Surface:
    """The same bytes to both."""

    product: Product
    server: Address
    name: str = "surface"
    verdicts: Counter[str] = field(default_factory=Counter[str])

    def make(self, rng: random.Random) -> bytes:
        kind = rng.randrange(4)
        if kind == 0:
            raw = request_with_odd_head(rng).replace(b"/sentinel", b"/api/tags").lstrip(b"\r\n")
        elif kind == 1:
            raw = rng.choice(_PLAIN) + b" HTTP/1.1\r\nHost: localhost\r\n\r\n"
        else:
            whole = body(rng)
            path = rng.choice((*LEASED, "/api/show", "/api/delete", "/api/copy")).encode()
            method = b"DELETE" if path == b"/api/delete" else b"POST"
            length = b"Host: localhost\r\nContent-Length: %d\r\n\r\n" % len(whole)
            raw = method + b" " + path + b" HTTP/1.1\r\n" + length + whole
        if rng.random() < 0.8 or b"/api/delete" in raw:
            raw = raw.replace(b"tiny", b"none")
        for word in _COSTLY:
            raw = raw.replace(word, word[:-1] + b"z")
        return raw + _LAST

    async def check(self, data: bytes, rng: random.Random) -> None:
        del rng
        ours, theirs = await asyncio.gather(conversation(self.product.address, data), conversation(self.server, data))
        mine, plain = _answers(ours), _answers(theirs)
        for (status, about), (wanted, wanted_about) in zip(mine, plain, strict=False):
            if status // 100 != wanted // 100:
                assert 400 <= status < 500 or status in _PROTOCOL, (
                    f"answers {status} where the server answers {wanted}: {ours!r} {theirs!r}"
                )
                self.verdicts[f"refuses with {status} where the server answers {wanted}"] += 1
                return
            both = about is not None and wanted_about is not None
            assert not both or about == wanted_about, f"is about {about!r}, the server's about {wanted_about!r}"
            self.verdicts["the same model" if both else "the same class"] += 1
            if status == 400 and len(mine) != len(plain):
                return  # a head or framing that is refused ends the connection; where it ends a body both may differ
        if b'"version"' not in theirs:
            self.verdicts["the server closes earlier"] += 1  # as after a body that its handler has not read
            return
        assert len(mine) <= len(plain), f"answers {mine}, the server {plain}"

    def problem_of_log(self) -> str:
        return _crash(self.product)


def _answers(raw: bytes) -> list[tuple[int, bytes | None]]:
    """Status and model of each answer, interim ones aside."""
    parts = _ANSWER.split(raw)[1:]
    pairs = [(int(status), _MODEL.search(rest)) for status, rest in zip(parts[::2], parts[1::2], strict=True)]
    return [(status, (found[1] or found[2]) if found else None) for status, found in pairs if status >= 200]


def _crash(product: Product) -> str:
    return next((line for line in product.log_text().splitlines() if any(word in line for word in _CRASHES)), "")


_COMMANDS = (b"/llamayard/drain", b"/llamayard/resume", b"/llamayard/reload", b"/llamayard/explain", b"/llamayard/why")
_FORMS = (
    *(
        b'{"gpu":0}',
        b'{"gpu":"GPU-"}',
        b'{"gpu":"1"}',
        b'{"instance":"gpu0"}',
        b'{"instance":"spread"}',
        b'{"all":true}',
    ),
    *(b"{}", b"", b"null", b"[]", b'{"gpu":0,"all":true}', b'{"timeout_seconds":1e9,"all":true}', b'{"x":1}'),
)
_QUERIES = ("model", "context", "request_id", "priority", "client", "options", "x", "model_", "layout")
_VALUES = (
    "llama3.1:8b",
    "x",
    "",
    "-1",
    "1e999",
    "\x00",
    "a" * 3000,
    "*",
    "../..",
    "ä",
    "{}",
    "0",
    "99999999999999999999",
)


@dataclass(slots=True)
class Admin:
    """Commands and questions of an operator, and reloads of whatever is in the file."""

    product: Product
    name: str = "admin"
    verdicts: Counter[str] = field(default_factory=Counter[str])

    def make(self, rng: random.Random) -> bytes:
        path = rng.choice((*_COMMANDS, b"/llamayard/status", b"/metrics", b"/ready"))
        if path == b"/llamayard/reload" and rng.random() < 0.9:
            path = b"/llamayard/drain"
        pairs = [(rng.choice(_QUERIES), rng.choice(_VALUES)) for _ in range(rng.choice((0, 0, 1, 2, 4)))]
        query = "&".join(f"{name}={quote(value)}" for name, value in pairs).encode()
        whole = rng.choice(_FORMS)
        if rng.random() < 0.5:
            whole = Mutator(rng, (*_FORMS, *NUMBERS, *ODD_BYTES)).mutate(whole)
        if path == b"/llamayard/reload":
            whole = odd_configuration(rng)
        method = rng.choice((b"GET", b"POST")) if rng.random() < 0.1 else b"GET" if query else b"POST"
        head = method + b" " + path + (b"?" + query if query else b"") + b" HTTP/1.1\r\nHost: localhost\r\n"
        return head + b"Content-Length: %d\r\n\r\n" % len(whole) + whole + _LAST

    async def check(self, data: bytes, rng: random.Random) -> None:
        before = self.product.config.read_bytes()
        if data.startswith(b"POST /llamayard/reload"):
            self.product.config.write_bytes(data.partition(b"\r\n\r\n")[2].removesuffix(_LAST))
        try:
            answer = await conversation(self.product.address, data)
        finally:
            self.product.config.write_bytes(before)
        statuses = [status for status, _ in _answers(answer)]
        is_drained = b"/ready" in data.partition(b"\r\n")[0] or b"is draining" in answer
        assert statuses, "no answer"
        assert statuses[0] < 500 or (is_drained and statuses[0] == 503), answer
        self.verdicts[str(statuses[0])] += 1
        if rng.random() < 0.02:
            resume = b'POST /llamayard/resume HTTP/1.1\r\nHost: localhost\r\nContent-Length: 12\r\n\r\n{"all":true}'
            await conversation(self.product.address, resume + _LAST)

    def problem_of_log(self) -> str:
        return _crash(self.product)


@contextlib.contextmanager
def surface(folder: Path) -> Generator[tuple[Target]]:
    """A router in front of a real Ollama, without a GPU; skips a test where there is none."""
    files = write_model_files(folder / "weights", {"tiny": replace(TINY)})
    with real_server(folder) as server:
        create_from_file(
            server, "tiny", files["tiny"].path, files["tiny"].digest, parameters={"num_predict": 2, "num_thread": 1}
        )
        config = {"instances": [{"name": "plain", "url": server.url}], "log": {"format": "json"}}
        with running(prepare(folder, config)) as product:
            unknown = {"model": "none"}
            eventually_sync(lambda: product.call("POST", "/api/show", unknown)[0] == 404, what="the list of models")
            yield (Surface(product, server.address),)


@contextlib.contextmanager
def admin(folder: Path) -> Generator[tuple[Target]]:
    """A router over two EMULATED GPUs."""
    product = prepare(folder, {"log": {"format": "json"}}, {"LLAMAYARD_RIG_SPEED": "20"}, ("--rig", "2x3090"))
    with running(product):
        yield (Admin(product),)
