"""The short way to what `router/llm_api/body_reader.py` reads of a body, for bodies as clients usually write them.

It finds the members with one pass of a C decoder and takes only what it is sure that Go reads the same way; for
anything else it gives None, and `peek`, which knows all of Go's ways, must be asked. What it gives equals what `peek`
gives. It never calls a body unreadable.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache

import msgspec

from router.llm_api.body_reader import RUNNER_OPTION_NAMES, ParsedBody
from router.llm_api.body_schema import READINGS, Emptiness, Reading
from router.llm_api.key_folding import fold
from router.llm_api.prompt_size import EXACT_BYTES

_DECODER = msgspec.json.Decoder(dict[str, msgspec.Raw])
_OPTION_NAMES = frozenset((*RUNNER_OPTION_NAMES, "num_predict"))
_MEMBERS_MAX = 100
_INTEGER = re.compile(rb"-?[1-9][0-9]{0,14}|0")
_DECIMAL = re.compile(rb"-?[0-9]{1,9}\.[0-9]{1,9}")
_EMPTY_LIST = re.compile(rb"\[[ \t\n\r]*+\]")
_ORDINARY_KEYS = frozenset(("format", "think", "raw", "images", "temperature", "top_p", "stop", "seed", "tool_choice",
                            "response_format", "stream_options", "user", "n", "truncate", "dimensions"))  # fmt: skip
"""Keys that fold to no name that routing reads, known so that they need not be folded each time."""


def parse_body_fast(body: bytes, path: str) -> ParsedBody | None:
    """What `peek(body, path)` gives, or None where only that can tell."""
    reading = READINGS.get(path)
    if reading is None or len(body) > EXACT_BYTES:  # images may be in it, which are not read as text
        return None
    try:
        return _read(body, reading, _DECODER.decode(body))
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return None


class _Unsure(ValueError):
    """Only `peek` can tell."""


def _read(body: bytes, reading: Reading, members: Mapping[str, msgspec.Raw]) -> ParsedBody:
    """Left to `peek`: a key that only folds to a name, null, and a name that is, or might be, written twice."""
    if len(members) > _MEMBERS_MAX or b"\\u00" in body or len(reading.models) != 1:
        raise _Unsure
    names, texts = reading.names, reading.texts
    given: dict[str, bytes] = {}
    prompt_bytes = 0
    for key, raw in members.items():
        if key in names:
            given[key] = value = bytes(raw)
            if value == b"null" or body.count(_quoted(key)) != 1:
                raise _Unsure
            if key in texts:
                prompt_bytes += len(value)
        elif key not in _ORDINARY_KEYS and fold(key) in names:
            raise _Unsure
    model = _value(given.get("model", b""))
    stream = _value(given["stream"]) if "stream" in given else None
    if not model or not isinstance(model, str) or not (stream is None or isinstance(stream, bool)):
        raise _Unsure
    options: dict[str, object] = {}
    keep_alive = limit = None
    if reading.is_ollama:
        if "options" in given:
            options = _options(given["options"])
            limit = options.pop("num_predict", None)
        if "keep_alive" in given:
            keep_alive = _value(given["keep_alive"])
    elif reading.limits:
        limit = next((_value(given[name]) for name in reading.limits if name in given), None)
    return ParsedBody(
        model=model,
        stream=stream,
        keep_alive=keep_alive,
        options=options,
        output_tokens_max=int(limit) if isinstance(limit, int | float) and not isinstance(limit, bool) else None,
        is_load_only=_is_load_only(reading, given),
        prompt_bytes=prompt_bytes,
    )


@lru_cache(maxsize=256)
def _quoted(key: str) -> bytes:
    return b'"%b"' % key.encode()


def _options(value: bytes) -> dict[str, object]:
    members = _DECODER.decode(value)
    named = {name: bytes(raw) for name, raw in members.items() if name in _OPTION_NAMES}
    return {name: _value(raw) for name, raw in named.items() if raw != b"null"}


def _is_load_only(reading: Reading, given: Mapping[str, bytes]) -> bool:
    if reading.empty is Emptiness.NEVER:
        return False
    value = given.get(reading.prompt)
    if value is None:
        return reading.absent_is_empty
    if value.startswith(b'"'):
        return len(value) == 2 and reading.empty is not Emptiness.LIST
    return reading.empty is not Emptiness.STRING and _EMPTY_LIST.match(value) is not None


def _value(raw: bytes) -> object:
    """A scalar that needs no thought."""
    if raw.startswith(b'"'):
        if b"\\" in raw or not raw.isascii():
            raise _Unsure
        return raw[1:-1].decode("ascii")
    if raw in (b"true", b"false"):
        return raw == b"true"
    if _INTEGER.fullmatch(raw) is not None:
        return int(raw)
    if _DECIMAL.fullmatch(raw) is not None:
        return float(raw)
    raise _Unsure
