"""The fast ways to what `router/llm_api/body_reader.py` reads from a body, for bodies as clients usually write them.

They find the members with one pass of a C decoder and accept only what Go certainly reads the same way. For anything
else they return None, and `parse_body` must be called, which implements all of Go's rules. What `parse_body_fast`
returns equals the result of `parse_body`, and is never `unreadable`.

`outline_of` reads even less: two bodies to one path with the same `Outline.settings` give the same result, except for
`prompt_bytes`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from typing import NamedTuple

import msgspec

from router.engines.ollama.runner_options import RUNNER_OPTION_NAMES
from router.llm_api.body_reader import ParsedBody
from router.llm_api.body_schema import ORDINARY_KEYS, SCHEMAS, BodySchema, Kind
from router.llm_api.json_members import blanks_of, decode_members, fold
from router.llm_api.prompt_size import EXACT_BYTES, prompt_size

_DECODER = msgspec.json.Decoder(dict[str, msgspec.Raw])
_OPTION_NAMES = frozenset((*RUNNER_OPTION_NAMES, "num_predict"))
_MEMBERS_MAX = 100
_INTEGER = re.compile(rb"-?[1-9][0-9]{0,14}|0")
_DECIMAL = re.compile(rb"-?[0-9]{1,9}\.[0-9]{1,9}")
_PLAIN_STRING = re.compile(rb'"([\x20\x21\x23-\x5b\x5d-\x7f]*)"')
_NULL = b"null"
_BOOLEANS: Mapping[bytes, bool] = {b"true": True, b"false": False}
_SETTINGS_BYTES_MAX = 1024
"""Larger settings are not worth remembering."""


class Outline(NamedTuple):
    """What `outline_of` sees of a body that asks for more than a load."""

    settings: tuple[str | bytes, ...]
    """Each member that routing reads and that is no text: its key and its JSON, as written."""
    prompt_bytes: int
    """As `ParsedBody.prompt_bytes`."""
    keep_alive: tuple[int, int] | None
    """Where the value of this member is in the body."""


def outline_of(body: bytes, path: str) -> Outline | None:
    """The settings of a body; None if it is written in an unusual way, or its prompt is absent or perhaps empty."""
    schema = SCHEMAS.get(path)
    members = decode_members(body) if schema is not None else None
    if schema is None or members is None or len(members) > _MEMBERS_MAX:
        return None
    blanks = blanks_of(body, members)
    if blanks is None:
        return None
    kinds, around = schema.kinds, 3 + blanks
    settings: list[str | bytes] = []
    keep_alive: tuple[int, int] | None = None
    has_prompt = not schema.prompt
    prompt_bytes, position = 0, 1
    for key, raw in members.items():
        size = len(raw)
        start = position + len(key) + around
        position = start + size + 1 + blanks
        kind = kinds.get(key)
        if kind is Kind.SETTING:
            if size > _SETTINGS_BYTES_MAX:
                return None
            settings += (key, bytes(raw))
            if key == "keep_alive":
                keep_alive = (start, start + size)
        elif kind is Kind.TEXT:
            prompt_bytes += size if size < EXACT_BYTES else prompt_size(body, start, start + size)
            if key == schema.prompt:
                has_prompt = not _may_be_empty(raw, schema)
        elif kind is None and fold(key) in schema.names:
            return None
    return Outline(tuple(settings), prompt_bytes, keep_alive) if has_prompt else None


def _may_be_empty(raw: msgspec.Raw, schema: BodySchema) -> bool:
    """Whether the server might only load the model; null may mean that."""
    empty = schema.empty_prompt
    return empty is not None and (
        empty.fullmatch(memoryview(raw)) is not None or (len(raw) == 4 and bytes(raw) == _NULL)
    )


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
            elif key not in ORDINARY_KEYS and fold(key) in names:
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
