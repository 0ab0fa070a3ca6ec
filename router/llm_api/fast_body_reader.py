"""The fast way to what `router/llm_api/body_reader.py` reads from a body, for bodies as clients usually write them.

It finds the members with one pass of a C decoder and accepts only what Go certainly reads the same way. For anything
else it returns None, and `parse_body` must be called, which implements all of Go's rules. A result equals that of
`parse_body`, and is never `unreadable`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache

import msgspec

from router.engines.ollama.runner_options import RUNNER_OPTION_NAMES
from router.llm_api.body_reader import ParsedBody
from router.llm_api.body_schema import SCHEMAS, BodySchema
from router.llm_api.json_members import fold
from router.llm_api.prompt_size import EXACT_BYTES

_DECODER = msgspec.json.Decoder(dict[str, msgspec.Raw])
_OPTION_NAMES = frozenset((*RUNNER_OPTION_NAMES, "num_predict"))
_MEMBERS_MAX = 100
_INTEGER = re.compile(rb"-?[1-9][0-9]{0,14}|0")
_DECIMAL = re.compile(rb"-?[0-9]{1,9}\.[0-9]{1,9}")
_PLAIN_STRING = re.compile(rb'"([\x20\x21\x23-\x5b\x5d-\x7f]*)"')
_BOOLEANS: Mapping[bytes, bool] = {b"true": True, b"false": False}
_ORDINARY_KEYS = frozenset(("format", "think", "raw", "images", "temperature", "top_p", "stop", "seed", "tool_choice",
                            "response_format", "stream_options", "user", "n", "truncate", "dimensions"))  # fmt: skip
"""Keys that fold to no name that routing reads; listed so that they need not be folded each time."""


class _Unsure(ValueError):
    """Only `parse_body` can decide."""


def parse_body_fast(body: bytes, path: str) -> ParsedBody | None:
    """What `parse_body(body, path)` returns; None if only that can decide.

    Left to `parse_body`: a key that only folds to a name, null, and a name that is, or might be, written twice.
    """
    schema = SCHEMAS.get(path)
    # A longer body may contain images, which do not count as text.
    if schema is None or len(body) > EXACT_BYTES or b"\\u00" in body or len(schema.models) != 1:
        return None
    try:
        members = _DECODER.decode(body)
        if len(members) > _MEMBERS_MAX:
            return None
        names, texts = schema.names, schema.texts
        values: dict[str, bytes] = {}
        prompt_bytes = 0
        for key, raw in members.items():
            if key in names:
                values[key] = value = bytes(raw)
                if value == b"null" or body.count(_quoted(key)) != 1:
                    return None
                if key in texts:
                    prompt_bytes += len(value)
            elif key not in _ORDINARY_KEYS and fold(key) in names:
                return None
        model = _PLAIN_STRING.fullmatch(values.get(schema.models[0], b""))
        stream = _BOOLEANS.get(values["stream"]) if "stream" in values else None
        if model is None or not model[1] or (stream is None and "stream" in values):
            return None
        options: dict[str, object] = {}
        keep_alive = limit = None
        if not schema.settings.isdisjoint(values):
            options, keep_alive, limit = _settings(schema, values)
        prompt, empty_prompt = values.get(schema.prompt), schema.empty_prompt
        if prompt is None or empty_prompt is None:
            is_load_only = empty_prompt is not None and schema.absent_is_empty
        else:
            is_load_only = empty_prompt.fullmatch(prompt) is not None
        return ParsedBody(
            model=model[1].decode("ascii"),
            stream=stream,
            keep_alive=keep_alive,
            options=options,
            output_tokens_max=int(limit) if isinstance(limit, int | float) and not isinstance(limit, bool) else None,
            is_load_only=is_load_only,
            prompt_bytes=prompt_bytes,
        )
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return None


@lru_cache(maxsize=256)
def _quoted(key: str) -> bytes:
    return b'"%b"' % key.encode()


def _settings(schema: BodySchema, values: Mapping[str, bytes]) -> tuple[dict[str, object], object, object]:
    """Options, `keep_alive`, and the limit on output tokens."""
    if not schema.is_ollama:
        return {}, None, next((_scalar(values[name]) for name in schema.limits if name in values), None)
    options = _options(values["options"]) if "options" in values else {}
    limit = options.pop("num_predict", None)
    return options, _scalar(values["keep_alive"]) if "keep_alive" in values else None, limit


def _options(value: bytes) -> dict[str, object]:
    members = _DECODER.decode(value)
    relevant = {name: bytes(raw) for name, raw in members.items() if name in _OPTION_NAMES}
    return {name: _scalar(raw) for name, raw in relevant.items() if raw != b"null"}


def _scalar(raw: bytes) -> object:
    """A scalar without escapes or unusual numbers.

    Raises:
        _Unsure: anything else.
    """
    text = _PLAIN_STRING.fullmatch(raw)
    if text is not None:
        return text[1].decode("ascii")
    if raw in _BOOLEANS:
        return _BOOLEANS[raw]
    if _INTEGER.fullmatch(raw) is not None:
        return int(raw)
    if _DECIMAL.fullmatch(raw) is not None:
        return float(raw)
    raise _Unsure
