"""The short way to what `router/gateway/peek.py` reads of a body, for bodies as clients usually write them.

It finds the members with one pass of a C decoder and takes only what it is sure that Go reads the same way; for
anything else it gives None, and `peek`, which knows all of Go's ways, must be asked. What it gives equals what `peek`
gives. It never calls a body unreadable.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import msgspec

from router.gateway.fold import fold
from router.gateway.peek import RUNNER_OPTION_NAMES, Peek
from router.gateway.prompt_size import EXACT_BYTES
from router.gateway.readings import READINGS, Emptiness, Reading, Streaming

_DECODER = msgspec.json.Decoder(dict[str, msgspec.Raw])
_OPTION_NAMES = frozenset((*RUNNER_OPTION_NAMES, "num_predict"))
_MEMBERS_MAX = 100
_INTEGER = re.compile(rb"-?[1-9][0-9]{0,14}|0")
_DECIMAL = re.compile(rb"-?[0-9]{1,9}\.[0-9]{1,9}")
_EMPTY_LIST = re.compile(rb"\[[ \t\n\r]*+\]")
_ORDINARY_KEYS = frozenset(("format", "think", "raw", "images", "temperature", "top_p", "stop", "seed", "tool_choice",
                            "response_format", "stream_options", "user", "n", "truncate", "dimensions"))  # fmt: skip
"""Keys that fold to no name that routing reads, known so that they need not be folded each time."""


def glance(body: bytes, path: str) -> Peek | None:
    """What `peek(body, path)` gives, or None where only that can tell."""
    reading = READINGS.get(path)
    if reading is None:
        return None
    try:
        return _read(body, reading, _DECODER.decode(body))
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return None


class _Unsure(ValueError):
    """Only `peek` can tell."""


def _read(body: bytes, reading: Reading, members: Mapping[str, msgspec.Raw]) -> Peek:
    """Left to `peek`: a key that only folds to a name, null, and a name that is, or might be, written twice."""
    if len(members) > _MEMBERS_MAX or b"\\u00" in body:
        raise _Unsure
    names = reading.names
    given: dict[str, bytes] = {}
    prompt_bytes = 0
    for key, raw in members.items():
        if key not in names:
            if key not in _ORDINARY_KEYS and fold(key) in names:
                raise _Unsure
            continue
        view = memoryview(raw)
        size = view.nbytes
        if key in reading.texts:
            if size >= EXACT_BYTES:
                raise _Unsure
            prompt_bytes += size
        given[key] = value = bytes(view[:EXACT_BYTES])
        if value == b"null" or body.count(b'"%s"' % key.encode()) != 1:
            raise _Unsure
    options = _options(given.get("options")) if reading.is_ollama else {}
    limit = options.pop("num_predict", None) if reading.is_ollama else _limit(reading, given)
    return Peek(
        model=_model(reading, given),
        stream=_stream(reading, given.get("stream")),
        keep_alive=_value(given["keep_alive"]) if reading.is_ollama and "keep_alive" in given else None,
        options=options,
        output_tokens_max=int(limit) if isinstance(limit, int | float) and not isinstance(limit, bool) else None,
        is_load_only=_is_load_only(reading, given),
        prompt_bytes=prompt_bytes,
    )


def _model(reading: Reading, given: Mapping[str, bytes]) -> str:
    if len(reading.models) != 1:
        raise _Unsure
    text = _value(given.get("model", b""))
    if not isinstance(text, str) or not text:
        raise _Unsure
    return text


def _stream(reading: Reading, value: bytes | None) -> bool | None:
    if value is None or reading.stream is Streaming.NONE:
        return None
    stream = _value(value)
    if not isinstance(stream, bool):
        raise _Unsure
    return stream


def _options(value: bytes | None) -> dict[str, object]:
    if value is None:
        return {}
    if len(value) >= EXACT_BYTES:
        raise _Unsure
    members = _DECODER.decode(value)
    named = {name: bytes(raw) for name, raw in members.items() if name in _OPTION_NAMES}
    return {name: _value(raw) for name, raw in named.items() if raw != b"null"}


def _limit(reading: Reading, given: Mapping[str, bytes]) -> object:
    return next((_value(given[name]) for name in reading.limits if name in given), None)


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
