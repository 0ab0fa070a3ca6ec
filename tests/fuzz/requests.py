"""Generates requests as bytes: heads with every framing that parsers disagree about, and bodies of every route."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from router.llm_api.body_schema import SCHEMAS
from router.llm_api.routes import ROUTES
from tests.fuzz.mutator import NUMBERS, Mutator

SENTINEL = b"GET /sentinel HTTP/1.1\r\nHost: localhost\r\n\r\n"
"""Behind every request: whoever reads past its end swallows it, whoever stops short sees more than this."""

MODELS = (
    b"tiny",
    b"other",
    b"TINY:latest",
    b"library/tiny",
    b" tiny",
    b"a/../b",
    b"hf.co/x/y:z",
    b"tiny:",
    b"",
    b"x" * 400,
)
PATHS = tuple(route.path.replace("*", "x") for route in ROUTES)
LEASED = tuple(route.path for route in ROUTES if route.kind.value == "leased" and "*" not in route.path)

_BODY = b'{"model":"tiny"}'
_LINES = (
    *(b"POST /api/generate HTTP/1.1",) * 6,
    *(b"GET /api/tags HTTP/1.1", b"HEAD / HTTP/1.1", b"OPTIONS * HTTP/1.1", b"CONNECT a:1 HTTP/1.1"),
    *(b"POST  /api/generate HTTP/1.1", b"POST /api/generate  HTTP/1.1", b"POST /api/generate HTTP/1.1 "),
    *(b"POST /api/generate HTTP/1.0", b"POST /api/generate http/1.1", b"POST /api/generate HTTP/2.0"),
    *(b"POST /api/generate", b"post /api/generate HTTP/1.1", b"BREW /api/generate HTTP/1.1", b"PRI * HTTP/2.0"),
    *(b"POST http://localhost/api/generate HTTP/1.1", b"\r\nPOST /api/generate HTTP/1.1", b"POST //api/chat HTTP/1.1"),
    *(b"POST /api/gen erate HTTP/1.1", b"POST /api/chat?a=b&c=%zz HTTP/1.1", b"POST /api/%67enerate HTTP/1.1"),
    *(b"POST http://u:p@h:1 HTTP/1.1", b"POST /api/chat#x HTTP/1.1", b"\tPOST / HTTP/1.1", b"POST /\xff HTTP/1.1"),
)
_HOSTS = (
    *(b"Host: localhost",) * 6,
    *(b"Host:localhost", b"hOST:  localhost ", b"", b"Host:", b"Host : localhost", b"Host: a, b", b"Host: [::1]:80"),
    *(b"Host: localhost\r\nHost: localhost", b"Host: localhost\r\nhost: other", b"Host: a\x00b", b"Host: a/b"),
)
_FRAMINGS = (
    *(b"Content-Length: 16",) * 4,
    *(b"Transfer-Encoding: chunked",) * 4,
    *(b"content-length:16", b"Content-Length: 16 ", b"Content-Length: 016", b"Content-Length: +16"),
    *(b"Content-Length: 1_6", b"Content-Length: 0x10", b"Content-Length: 16,16", b"Content-Length: 16, 16"),
    *(b"Content-Length: 16\r\nContent-Length: 16", b"Content-Length: 16\r\nContent-Length: 0", b"Content-Length:"),
    *(b"Content-Length : 16", b" Content-Length: 16", b"Content-Length: 16\r\n ", b"Content_Length: 16", b""),
    *(b"Content-Length:\t16", b"Content-Length: 1 6", b"Content-Length: -16", b"Content-Length: 16;x"),
    *(b"transfer-encoding:chunked", b"Transfer-Encoding: Chunked ", b"Transfer-Encoding: xchunked"),
    *(b"Transfer-Encoding: chunked, identity", b"Transfer-Encoding: identity", b"Transfer-Encoding: gzip, chunked"),
    *(b"Transfer-Encoding: chunked\r\nContent-Length: 16", b"Content-Length: 16\r\nTransfer-Encoding: chunked"),
    *(b"Transfer-Encoding : chunked", b"Transfer-Encoding:\x0bchunked", b"Transfer-Encoding:\tchunked"),
    *(b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked", b'Transfer-Encoding: "chunked"', b"TE: chunked"),
    *(b"Transfer-Encoding: chunked,", b"Transfer-Encoding: ,chunked", b"Transfer-Encoding:\r\n chunked"),
    *(b"Transfer-Encoding:", b"Transfer-Encoding: chunked;q=1", b"X: y\rTransfer-Encoding: chunked"),
)
_FIELDS = (
    *(
        b"X: y",
        b"X:",
        b"X: \xe4",
        b"X: a\tb",
        b"X_Y: z",
        b"X",
        b": y",
        b"X: a\r\n b",
        b"X: \x00",
        b"X: a\rb",
        b"X\t: y",
    ),
    *(b"Accept: */*", b"Connection: close", b"Connection: keep-alive", b"Connection: X, close", b"Connection: upgrade"),
    *(b"Upgrade: websocket", b"Upgrade: h2c", b"HTTP2-Settings: AAMAAABkAAQAAP__", b"Expect: 100-continue"),
    *(b"Expect: 100-Continue", b"Expect: x", b"Expect:", b"Content-Type: application/json", b"Content-Encoding: gzip"),
    *(b"Content-Encoding: zstd", b"Trailer: X", b"Keep-Alive: 5", b"Proxy-Connection: close", b"X-Forwarded-For: 1"),
    *(b"Via: 1.1 llamayard-test", b"Max-Forwards: 0", b"Cookie: a=b", b"X-Request-ID: \xff", b"Origin: null"),
    *(b"X-Llamayard-Priority: high", b"X-Llamayard-Timeout: 1e999", b"X-Llamayard-Layout: spread", b"\x00: y"),
)
_CHUNKS = (
    *(b"10\r\n" + _BODY + b"\r\n0\r\n\r\n",) * 5,
    b"8;a=b\r\n" + _BODY[:8] + b"\r\n8\r\n" + _BODY[8:] + b"\r\n000\r\nX: y\r\n\r\n",
    b"10\n" + _BODY + b"\n0\n\n",
    b"10 \r\n" + _BODY + b"\r\n0\r\n\r\n",
    b"10\t;a\r\n" + _BODY + b"\r\n0\r\n\r\n",
    b" 10\r\n" + _BODY + b"\r\n0\r\n\r\n",
    b"0x10\r\n" + _BODY + b"\r\n0\r\n\r\n",
    b"10\r\n" + _BODY + b"XX0\r\n\r\n",
    b"10\r\n" + _BODY + b"\r\n0\r\nX\r\n\r\n",
    b"10\r\n" + _BODY + b"\r\n0\r\n X: y\r\n\r\n",
    b"10\r\n" + _BODY + b"\r\n0\r\nContent-Length: 5\r\n\r\n",
    b"-1\r\n\r\n0\r\n\r\n",
    b"fffffffffffffffff\r\n",
    b"0000000000000000010\r\n" + _BODY + b"\r\n0\r\n\r\n",
    b"10\r\r\n" + _BODY + b"\r\n0\r\n\r\n",
    b'10;a="b\r\nc"\r\n' + _BODY + b"\r\n0\r\n\r\n",
    b"10;" + b"a" * 5000 + b"\r\n" + _BODY + b"\r\n0\r\n\r\n",
    b"0\r\n\r\n",
    b"0\r\n",
    _BODY,
    b"",
)
_HEAD_WORDS = (*_LINES, *(b"\r\n" + field for field in (*_FRAMINGS, *_FIELDS, *_HOSTS)), *_CHUNKS, SENTINEL)


def request_with_odd_head(rng: random.Random) -> bytes:
    """One to three requests, ordinary or odd, and the sentinel."""
    return b"".join(_one(rng) for _ in range(rng.choice((1, 1, 1, 2, 3)))) + SENTINEL


def _one(rng: random.Random) -> bytes:
    fields = [rng.choice(_HOSTS), rng.choice(_FRAMINGS), *rng.choices(_FIELDS, k=rng.choice((0, 0, 1, 1, 2, 3)))]
    rng.shuffle(fields)
    head = b"\r\n".join((rng.choice(_LINES), *(field for field in fields if field), b"", b""))
    body = rng.choice(_CHUNKS) if b"hunked" in head else _BODY if rng.random() < 0.9 else rng.choice(_CHUNKS)
    raw = head + body
    return Mutator(rng, _HEAD_WORDS).mutate(raw) if rng.random() < 0.4 else raw


# --- bodies --------------------------------------------------------------------------------------------------------

_KEYS = (
    *("model", "model", "model", "name", "source", "destination", "stream", "keep_alive", "options", "prompt"),
    *("messages", "input", "max_tokens", "max_completion_tokens", "max_output_tokens", "suffix", "system", "tools"),
    *("temperature", "images", "format", "files", "adapters", "insecure", "context", "template"),
)
_OPTIONS = ("num_ctx", "num_batch", "num_gpu", "main_gpu", "num_thread", "use_mmap", "num_predict", "seed", "stop")
_FOLDS = {"s": "\u017f", "k": "\u212a", "i": "\u0130"}
_SPELLINGS: tuple[Callable[[str], str], ...] = (
    *(str, str.upper),
    *(lambda letter: f"\\u{ord(letter):04x}", lambda letter: _FOLDS.get(letter, letter)),
)
_STRINGS = (
    *(b'""', b'"a"', b'"tiny"', b'"llama3:8b"', b'"\\u0061"', b'"\\ud800"', b'"\\udc00x"', b'"\\ud83d\\ude00"'),
    *(b'"\xff"', b'"\xe2\x82"', b'"\xed\xa0\x80"', b'"\xf0\x9f\x98\x80"', b'"\xc0\x80"', b'"a\\"b"', b'"\\\\"'),
    *(b'"\\/\\b\\f\\n\\r\\t"', b'" a "', b'"5m"', b'"}"', b'"]{"', b'"\x7f"', b'"\x01"', b'"\\x"', b'"open', b'"-1"'),
    *(b'"1h30m"', b'"0"', b'"' + b"p" * 3000 + b'"', b'"99999999999h"', b'"\\u0000"', b'"\xef\xbb\xbf"'),
)
_WORDS = (
    b"null",
    b"true",
    b"false",
    b"nul",
    b"True",
    b"None",
    b"{}",
    b"[]",
    b"[ ]",
    b"[{}]",
    b'[""]',
    b'{"model":"z"}',
)
_BLANKS = (*(b"",) * 6, b" ", b"\n", b"\t", b"\r\n", b"\x0b", b"\xc2\xa0", b"/**/")
_BODY_WORDS = (
    *_STRINGS,
    *_WORDS,
    *NUMBERS,
    b'"model":"z"',
    b',"model":"z"',
    b"[" * 200,
    b"{" * 3,
    b'{"a":',
    *_BLANKS[6:],
)


def body(rng: random.Random) -> bytes:
    """A body, ordinary or odd; half of them with members that fit."""
    raw = _object(rng, _KEYS, 0)
    kind = rng.randrange(8)
    if kind < 2:
        return Mutator(rng, _BODY_WORDS).mutate(raw)
    if kind == 2:
        return raw + rng.choice((b" ", b"\n", b"x", b"{}", b'{"model":"z"}', b"\x00", b"]", b"\xff"))
    if kind == 3:
        return rng.choice((b" ", b"\n", b"\xef\xbb\xbf", b"[", b"x", b"\x00", b"null", b'"', b"\xff\xfe")) + raw
    return raw


def _object(rng: random.Random, keys: Sequence[str], depth: int) -> bytes:
    members: list[bytes] = []
    for _ in range(rng.randint(0, 6) if depth else rng.randint(1, 7)):
        name = rng.choice(keys)
        blank = rng.choice(_BLANKS) if rng.random() < 0.3 else b""
        members.append(blank + _key(rng, name) + blank + b":" + blank + _value(rng, name, depth) + blank)
    return b"{" + b",".join(members) + b"}"


def _key(rng: random.Random, name: str) -> bytes:
    if rng.random() < 0.75:
        return b'"' + name.encode() + b'"'
    tail = rng.choice((b"", b"", b"", b"\xff", b"\\ud800", b" ", b"\xcc\x87"))
    return b'"' + "".join(rng.choice(_SPELLINGS)(letter) for letter in name).encode() + tail + b'"'


def _value(rng: random.Random, name: str, depth: int) -> bytes:
    if rng.random() < 0.2:
        return rng.choice((*_STRINGS, *_WORDS, *NUMBERS))
    if name in ("model", "name", "source", "destination"):
        return rng.choice((b'"tiny"', b'"other"', b'"b"', b'"\\u0074iny"', b'"\xff"', b'""', b"null"))
    if name == "options":
        return _object(rng, _OPTIONS, depth + 1) if depth < 3 else b"null"
    if name in ("stream", "insecure", "use_mmap"):
        return rng.choice((b"true", b"false", b"null"))
    if name == "keep_alive":
        return rng.choice((b"0", b"-1", b'"5m"', b'"-1s"', b"0.5", b"null", b"1e3", b'"x"'))
    if name in ("messages", "tools", "images", "files", "adapters"):
        return rng.choice((b"[]", b"[ ]", b"[{}]", b"null", b'[{"role":"user","content":"model"}]', b"{}"))
    if name.startswith(("max_", "num_", "main_", "seed")):
        return rng.choice((b"1", b"-1", b"0", b"4096", b"1.5", b"null", *NUMBERS))
    return rng.choice(_STRINGS[:20])


BODY_PATHS = tuple(SCHEMAS)
