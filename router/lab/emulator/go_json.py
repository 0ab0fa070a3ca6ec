"""Reads and writes JSON as the real server does, which is Go's way.

Keys match without regard to case and the last one wins, `null` is as if absent, the first value is read and what
follows it is ignored; errors have the texts of Go's encoding/json. It knows types of fields, no meaning.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, cast

Fields = Mapping[str, str]
"""Field -> Go's type: string, bool, map, slice, number, any."""


class BodyError(ValueError):
    """The body is not what the endpoint reads; the text is the server's."""


class EmptyBodyError(BodyError):
    """There is no body at all."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if value is None and key in found:
            continue
        found.pop(key, None)  # the last one also counts as written last
        found[key] = value
    return found


def _refuse(word: str) -> Any:
    raise BodyError(f"invalid character '{word[0]}' looking for beginning of value")


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_refuse, strict=True)


def read_struct(data: bytes, type_name: str, fields: Fields) -> dict[str, Any]:
    """The known fields of the first value, under their own names; unknown ones are left out.

    Raises:
        EmptyBodyError: nothing but blanks.
        BodyError: not JSON, not an object, or a field of another type.
    """
    value = _first_value(data)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise BodyError(f"json: cannot unmarshal {_kind(value)} into Go value of type {type_name}")
    short = type_name.rpartition(".")[2]
    found: dict[str, Any] = {}
    for key, inner in cast("dict[str, Any]", value).items():
        name = key.lower()
        if name not in fields or inner is None:
            continue
        if not _fits(inner, fields[name]):
            kind = _go_type(fields[name])
            raise BodyError(f"json: cannot unmarshal {_kind(inner)} into Go struct field {short}.{name} of type {kind}")
        found[name] = inner
    return found


def _first_value(data: bytes) -> Any:
    text = data.decode("utf-8", errors="replace").lstrip(" \t\r\n")
    if not text:
        raise EmptyBodyError("EOF")
    try:
        value, _ = _DECODER.raw_decode(text)
    except json.JSONDecodeError as error:
        raise BodyError(_go_words(text, error)) from error
    except RecursionError as error:
        raise BodyError("exceeded max depth") from error
    return value


def _go_words(text: str, error: json.JSONDecodeError) -> str:
    if error.pos >= len(text) or "Unterminated" in error.msg:
        return "unexpected EOF"
    where = {
        "Expecting property name enclosed in double quotes": "looking for beginning of object key string",
        "Illegal trailing comma before end of object": "looking for beginning of object key string",
        "Expecting ':' delimiter": "after object key",
        "Expecting ',' delimiter": "after object key:value pair",
        "Expecting value": "looking for beginning of value",
    }.get(error.msg, "in string literal" if "control character" in error.msg else "looking for beginning of value")
    return f"invalid character '{text[error.pos]}' {where}"


def _kind(value: Any) -> str:
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, int | float):
        return "number"
    kinds = (("string", str), ("object", dict), ("array", list))
    return next((name for name, kind in kinds if isinstance(value, kind)), "null")


def _fits(value: Any, kind: str) -> bool:
    wanted = {"string": str, "bool": bool, "map": dict, "slice": list, "any": object}
    if kind == "number":
        return isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(value, wanted[kind])


def _go_type(kind: str) -> str:
    return {"map": "map[string]interface {}", "slice": "[]interface {}", "number": "int"}.get(kind, kind)


def dump(value: Any) -> bytes:
    """As Go marshals: no blanks, `<`, `>` and `&` escaped."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026").encode()
