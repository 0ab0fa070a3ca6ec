"""Reads and writes JSON as Go's encoding/json does in the real server.

Keys are case-insensitive and the last duplicate wins; `null` counts as absent; anything after the first value is
ignored; error messages are Go's. Knows field types, not their meaning.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, cast

Fields = Mapping[str, str]
"""Field name -> type: string, bool, map, slice, number, any."""


class BodyError(ValueError):
    """The body is invalid for the endpoint; the message is the server's."""


class EmptyBodyError(BodyError):
    """The body is empty."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    parsed: dict[str, Any] = {}
    for key, value in pairs:
        if value is None and key in parsed:
            continue
        parsed.pop(key, None)  # a duplicate key moves to the end
        parsed[key] = value
    return parsed


def _reject_constant(text: str) -> Any:
    raise BodyError(f"invalid character '{text[0]}' looking for beginning of value")


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_reject_constant, strict=True)


def read_struct(data: bytes, type_name: str, fields: Fields) -> dict[str, Any]:
    """Reads the known fields of the first value, under their canonical names; drops unknown ones.

    Raises:
        EmptyBodyError: only whitespace.
        BodyError: not JSON, not an object, or a field of the wrong type.
    """
    value = _first_value(data)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise BodyError(f"json: cannot unmarshal {_kind(value)} into Go value of type {type_name}")
    short = type_name.rpartition(".")[2]
    parsed: dict[str, Any] = {}
    for key, inner in cast("dict[str, Any]", value).items():
        name = key.lower()
        if name not in fields or inner is None:
            continue
        if not _fits(inner, fields[name]):
            kind = _go_type(fields[name])
            raise BodyError(f"json: cannot unmarshal {_kind(inner)} into Go struct field {short}.{name} of type {kind}")
        parsed[name] = inner
    return parsed


def _first_value(data: bytes) -> Any:
    text = data.decode("utf-8", errors="replace").lstrip(" \t\r\n")
    if not text:
        raise EmptyBodyError("EOF")
    try:
        value, _ = _DECODER.raw_decode(text)
    except json.JSONDecodeError as error:
        raise BodyError(_go_error_message(text, error)) from error
    except RecursionError as error:
        raise BodyError("exceeded max depth") from error
    return value


def _go_error_message(text: str, error: json.JSONDecodeError) -> str:
    if error.pos >= len(text) or "Unterminated" in error.msg:
        return "unexpected EOF"
    context = {
        "Expecting property name enclosed in double quotes": "looking for beginning of object key string",
        "Illegal trailing comma before end of object": "looking for beginning of object key string",
        "Expecting ':' delimiter": "after object key",
        "Expecting ',' delimiter": "after object key:value pair",
        "Expecting value": "looking for beginning of value",
    }.get(error.msg, "in string literal" if "control character" in error.msg else "looking for beginning of value")
    return f"invalid character '{text[error.pos]}' {context}"


def _kind(value: Any) -> str:
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, int | float):
        return "number"
    kinds = (("string", str), ("object", dict), ("array", list))
    return next((name for name, kind in kinds if isinstance(value, kind)), "null")


def _fits(value: Any, kind: str) -> bool:
    types = {"string": str, "bool": bool, "map": dict, "slice": list, "any": object}
    if kind == "number":
        return isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(value, types[kind])


def _go_type(kind: str) -> str:
    return {"map": "map[string]interface {}", "slice": "[]interface {}", "number": "int"}.get(kind, kind)


def dump(value: Any) -> bytes:
    """Serialises as Go does: no whitespace; `<`, `>` and `&` escaped."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026").encode()
