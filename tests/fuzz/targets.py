"""What is fuzzed inside one process: each target makes an input from a random source, and checks what is read of it.

A check raises AssertionError where the router and Go disagree, and lets every other exception through: both are
findings. Go is asked about each request and body, with the packages that Ollama reads them with.
"""

from __future__ import annotations

import asyncio
import base64
import logging
import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from aiohttp import web

from router.admission.key_ring import KeyRing, digest_of, new_key
from router.admission.pipeline import AdmissionRequest
from router.api.app import admission_request
from router.app.reload import check_reload
from router.config.inputs import ConfigError
from router.config.settings import load_settings
from router.domain.access_key import AccessKey
from router.errors import BadRequest
from router.http1.parser import HeadError, RequestHead, origin_form
from router.llm_api.body_reader import parse_body
from router.llm_api.fast_body_reader import parse_body_fast
from router.llm_api.json_skimmer import JsonSkimmer
from router.llm_api.routes import RouteTable
from router.proxy.client_connection import ClientConnection
from router.storage.key_file import KeyFile, KeyFileError
from tests.fuzz.documents import key_document, odd_configuration
from tests.fuzz.go_http import GoHttp, SeenRequest
from tests.fuzz.mutator import Mutator, cut
from tests.fuzz.requests import BODY_PATHS, LEASED, body, request_with_odd_head
from tests.llm_api.go_oracle import GoOracle
from tests.llm_api.test_body_reader import agree
from tests.proxy.stage import OK
from tests.proxy.wire import Bench, Wire

_CRASHED = re.compile(rb"HTTP/1\.1 50[02346]")
"""501, 505 and 508 say what is wrong with a request."""
_EMPTY_LINES = re.compile(rb"^[\r\n]+|(?:(?<!\n)|(?<=\r\n\r\n))\r\n(?=[A-Z]{3,7} /)")
_BLANKS = re.compile(rb"(?<=[0-9A-Fa-f])[ \t]+(?=;)")
"""What RFC 9112 asks servers to skip and Go does not: empty lines before a request (2.2), and blanks before the
extension of a chunk (7.1.1). Both are gone from what is passed on."""
_TURNS_MAX = 50
"""Rounds of the event loop after which a request that is not answered counts as hanging."""


class Target(Protocol):
    """`verdicts`: what became of the inputs, so that a run shows that it reaches both sides of each check."""

    name: str
    verdicts: Counter[str]

    def make(self, rng: random.Random) -> bytes: ...

    async def check(self, data: bytes, rng: random.Random) -> None: ...

    def problem_of_log(self) -> str:
        """What a process has logged that it should not have; "" if nothing."""
        ...


class _InProcess:
    """What is logged as an error is seen at once."""

    def problem_of_log(self) -> str:
        return ""


@dataclass(slots=True)
class Heads(_InProcess):
    """Heads and framing: what is passed on is what Go's server reads from the same bytes, and ends where it does."""

    go: GoHttp
    name: str = "heads"
    verdicts: Counter[str] = field(default_factory=Counter[str])
    _handed: list[SeenRequest] = field(default_factory=list[SeenRequest])

    def make(self, rng: random.Random) -> bytes:
        return request_with_odd_head(rng)

    async def check(self, data: bytes, rng: random.Random) -> None:
        self._handed.clear()
        forwarded, answer = await through_the_router(cut(rng, data), self._library)
        passed = [_comparable(request) for request in self.go.read(forwarded).requests]
        taken = [_comparable(request) for request in self._handed]
        both = _BLANKS.sub(b"", _EMPTY_LINES.sub(b"", data))
        for lenient in (data, _EMPTY_LINES.sub(b"", data), _BLANKS.sub(b"", data), both):
            known = self._known(lenient)
            if _is_subsequence(passed, known) and _is_subsequence(taken, known):
                break
        else:
            raise AssertionError(f"passed on {passed}, aiohttp reads {taken}, but Go reads {self._known(data)}")
        assert not _CRASHED.search(answer), answer
        self.verdicts["all of them" if len(passed) + len(taken) >= len(known) else "fewer than Go"] += 1

    def _known(self, data: bytes) -> list[tuple[str, str, bytes]]:
        return [_comparable(request) for request in self.go.read(data).requests]

    def _library(self) -> asyncio.Protocol:
        quiet = logging.Logger("quiet")
        quiet.addHandler(logging.NullHandler())
        return web.Server(self._handle, auto_decompress=False, access_log=None, logger=quiet)()

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        whole = await request.read()
        target = request.raw_path.encode("utf-8", "surrogateescape").decode("latin-1")
        self._handed.append(SeenRequest(request.method, target, request.host, whole))
        return web.Response()


async def through_the_router(pieces: Sequence[bytes], library: object = asyncio.Protocol) -> tuple[bytes, bytes]:
    """What a server gets of these bytes, and what the client gets; the server answers every request alike."""
    bench = Bench()
    context = replace(bench.proxy.context, make_handler=library)  # type: ignore[arg-type]
    bench.client = ClientConnection(context, bench.proxy)
    bench.to_client = Ending()
    bench.client.connection_made(bench.to_client)
    answered = 0
    for piece in pieces:
        if not bench.to_client.closed:
            bench.client.data_received(piece)
    for _ in range(_TURNS_MAX):
        if bench.controller.held and len(bench.controller.tickets) > answered:
            answered = len(bench.controller.tickets)
            bench.answer([OK])
        await asyncio.sleep(0)
        if not bench.controller.held and not bench.controller.waiting and bench.to_client.is_idle():
            break
    bench.client.connection_lost(None)
    assert not bench.controller.held, "a slot is still held after the client has gone"
    assert bench.request_log.running == 0, "a request is still counted as running"
    return bytes(bench.to_server.out), bytes(bench.to_client.out)


class Ending(Wire):
    """Notes when nothing has been written for some rounds of the loop."""

    _seen, _rounds = -1, 0

    def is_idle(self) -> bool:
        self._rounds = self._rounds + 1 if len(self.out) == self._seen else 0
        self._seen = len(self.out)
        return self._rounds > 6


def _comparable(request: SeenRequest) -> tuple[str, str, bytes]:
    target, _ = origin_form(request.target.encode("latin-1", "replace"))
    return request.method, target.decode("latin-1"), request.body


def _is_subsequence(part: Sequence[object], whole: Sequence[object]) -> bool:
    rest = iter(whole)
    return all(one in rest for one in part)


@dataclass(slots=True)
class Bodies(_InProcess):
    """Members of bodies: every way of reading them says what Go says, and a server is asked for that model."""

    go: GoOracle
    name: str = "bodies"
    verdicts: Counter[str] = field(default_factory=Counter[str])

    def make(self, rng: random.Random) -> bytes:
        return rng.choice(BODY_PATHS).encode() + b" " + body(rng)

    async def check(self, data: bytes, rng: random.Random) -> None:
        raw_path, _, whole = data.partition(b" ")
        path = raw_path.decode("latin-1")
        if path not in BODY_PATHS:
            return
        try:
            self.verdicts[agree(self.go, path, whole)] += 1
        except BadRequest:
            self.verdicts["too complex"] += 1
            return
        seen, fast = parse_body(whole, path), parse_body_fast(whole, path)
        assert fast is None or fast == seen, f"the fast way reads {fast}, the long one {seen}"
        self._check_skimmer(whole, path, rng)
        if path in LEASED:
            await self._check_forwarded(whole, path, rng)

    def _check_skimmer(self, whole: bytes, path: str, rng: random.Random) -> None:
        skimmer = JsonSkimmer()
        for piece in cut(rng, whole):
            skimmer.feed(piece)
        text = skimmer.text()
        if text is None:
            return
        skimmed, seen = parse_body(text, path), parse_body(whole, path)
        assert (skimmed.model, skimmed.stream, skimmed.unreadable) == (seen.model, seen.stream, seen.unreadable), text

    async def _check_forwarded(self, whole: bytes, path: str, rng: random.Random) -> None:
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(whole)}\r\n\r\n".encode()
        forwarded, answer = await through_the_router(cut(rng, head + whole))
        assert not _CRASHED.search(answer), answer
        asked = forwarded.partition(b"\r\n\r\n")[2]
        if forwarded and asked != whole:
            before, after = self.go.decode(path, whole), self.go.decode(path, asked)
            assert (after["ok"], after["model"]) == (before["ok"], before["model"]), (whole, asked)
            self.verdicts["edited"] += 1


@dataclass(slots=True)
class Keys(_InProcess):
    """Headers that present keys: only the key itself lets in, and both ways in agree on who that is."""

    name: str = "keys"
    verdicts: Counter[str] = field(default_factory=Counter[str])
    key: str = field(default_factory=new_key)
    table: RouteTable = field(default_factory=RouteTable)

    def make(self, rng: random.Random) -> bytes:
        key, other = self.key.encode(), new_key().encode()
        words = (key, other, b"Bearer ", b"Basic ", b"bearer", b"Digest ", b"=", b"==", _basic(b"x:" + key), key[:-1])
        forms = (
            *(b"Authorization: Bearer " + key, b"Authorization: " + key, b"X-Api-Key: " + key, b"authorization:" + key),
            *(b"Authorization: Basic " + _basic(b"x:" + key), b"Authorization: Basic " + _basic(key)),
            *(b"Authorization: bEARER  " + key + b" ", b"Authorization: Bearer " + other, b"Authorization: Bearer"),
            *(b"X-API-KEY: " + key + b"\r\nX-Api-Key: " + other, b"X-Api-Key:", b"X_Api_Key: " + key),
            *(b"Authorization: Bearer " + other + b"\r\nX-Api-Key: " + key, b"Proxy-Authorization: Bearer " + key),
        )
        fields = rng.choices(forms, k=rng.choice((1, 1, 2)))
        lines = [Mutator(rng, words).mutate(one) if rng.random() < 0.6 else one for one in fields]
        return b"\r\n".join((b"GET /api/tags HTTP/1.1", b"Host: localhost", *lines, b"", b""))

    async def check(self, data: bytes, rng: random.Random) -> None:
        del rng
        ring = KeyRing([AccessKey("a", digest_of(self.key), "u", 0.0)], 1.0)
        head = RequestHead()
        try:
            end = head.feed(data)
        except HeadError:
            self.verdicts["refused"] += 1
            return
        if end < 0:
            return
        found = ring.find(head.text)
        assert found is None or self._is_presented(head), "a key was found that no header has"
        other = await _by_the_library(data[:end], self.table)
        theirs = None if other is None else ring.find(other.header)
        assert other is None or theirs is found, f"the proxy finds {found}, aiohttp {theirs}"
        self.verdicts["key" if found else "no key"] += 1

    def _is_presented(self, head: RequestHead) -> bool:
        key = self.key.encode()
        values = [value for name, value in head.headers if name.lower() in (b"authorization", b"x-api-key")]
        return any(key in value or _unbasic(value).endswith(key) for value in values)


def _basic(text: bytes) -> bytes:
    return base64.b64encode(text)


def _unbasic(value: bytes) -> bytes:
    try:
        return base64.b64decode(value.strip().rpartition(b" ")[2], validate=True).strip()
    except ValueError:
        return b""


async def _by_the_library(raw: bytes, table: RouteTable) -> AdmissionRequest | None:
    """The head as aiohttp's handler sees it; None where aiohttp refuses it."""
    found: list[AdmissionRequest] = []

    async def handle(request: web.BaseRequest) -> web.StreamResponse:
        found.append(admission_request(request, table))
        return web.Response()

    protocol = web.Server(handle, auto_decompress=False, access_log=None)()
    protocol.connection_made(Wire())
    protocol.data_received(raw)
    for _ in range(5):
        await asyncio.sleep(0)
    protocol.connection_lost(None)
    return found[0] if found else None


@dataclass(slots=True)
class KeyFiles(_InProcess):
    """Files of keys: read as a whole, or refused with a sentence."""

    folder: Path
    name: str = "key_files"
    verdicts: Counter[str] = field(default_factory=Counter[str])

    def make(self, rng: random.Random) -> bytes:
        return key_document(rng)

    async def check(self, data: bytes, rng: random.Random) -> None:
        del rng
        path = self.folder / "keys.json"
        path.write_bytes(data)
        path.chmod(0o600)
        try:
            keys = KeyFile(path).read()
        except KeyFileError:
            self.verdicts["refused"] += 1
            return
        assert keys is not None
        ring = KeyRing(keys, 1.0)
        for key in keys:
            assert key.allows_model("tiny") in (True, False)
            assert key.bounded_priority(1) <= max(1, key.priority)
            assert len(ring.names) <= len(keys)
        self.verdicts["read"] += 1


@dataclass(slots=True)
class Configurations(_InProcess):
    """Documents for a start or a reload: settings, or problems that name the key. No exception of a library."""

    folder: Path
    name: str = "reloads"
    verdicts: Counter[str] = field(default_factory=Counter[str])

    def make(self, rng: random.Random) -> bytes:
        return odd_configuration(rng)

    async def check(self, data: bytes, rng: random.Random) -> None:
        del rng
        path = self.folder / "llamayard.yaml"
        path.write_bytes(data)
        environment = {"HOME": str(self.folder), "PATH": "/nonexistent"}
        try:
            settings = load_settings(path, environment)
        except ConfigError as error:
            assert error.problems
            assert all(problem.strip() for problem in error.problems)
            self.verdicts["refused"] += 1
            return
        try:
            check_reload(settings, environment)
        except ConfigError as error:
            assert error.problems
            self.verdicts["refused by the machine"] += 1
            return
        self.verdicts["read"] += 1
