"""How single configuration values are written and how a wrong one is explained. Pure; reads nothing."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, cast

from pydantic_core import ErrorDetails

from router.domain.keep_alive import parse_keep_alive

_UNITS = {"": 1, "k": 1000, "m": 1000**2, "g": 1000**3, "ki": 1024, "mi": 1024**2, "gi": 1024**3}
_DECIMAL = re.compile(r"[+-]?\d+(?:\.\d+)?")
_KEEP_ALIVE_WORDS = "write a time such as 5m, a number of seconds, or -1 for ever"
_BYTES = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kmg]i?)?b?\s*", re.IGNORECASE)


def parse_bytes(value: object) -> object:
    """`512MiB`, `2GB`, `1073741824` -> bytes. Numbers pass as they are; ValueError for any other text."""
    if not isinstance(value, str):
        return value
    match = _BYTES.fullmatch(value)
    if match is None:
        raise ValueError("write bytes as a number or with a unit, such as 512MiB or 2GB")
    return int(float(match[1]) * _UNITS[(match[2] or "").lower()])


def bytes_text(value: int) -> str:
    """The shortest exact way to write a number of bytes: `512MiB`, `1000`."""
    for unit, size in (("GiB", 1024**3), ("MiB", 1024**2), ("KiB", 1024)):
        if value and value % size == 0:
            return f"{value // size}{unit}"
    return str(value)


def keep_alive_seconds(value: object) -> object:
    """`5m`, `300`, `-1` -> seconds; any negative time is for ever and becomes -1."""
    if isinstance(value, str) and _DECIMAL.fullmatch(value.strip()):
        value = float(value)
    try:
        seconds = parse_keep_alive(value)
    except ValueError as error:
        raise ValueError(_KEEP_ALIVE_WORDS) from error
    if seconds is None:
        raise ValueError(_KEEP_ALIVE_WORDS)
    return seconds


def named_by_text(value: object) -> object:
    """A mapping whose keys YAML has read as numbers, as GPUs by index are, with text for keys."""
    if not isinstance(value, Mapping):
        return value
    return {str(key): inner for key, inner in cast("Mapping[object, object]", value).items()}


def listed(value: object) -> object:
    """`a, b` -> `("a", "b")`, as OLLAMA_ORIGINS is written; numbers in a list (GPU indices) become text."""
    if isinstance(value, str):
        return tuple(word.strip() for word in value.split(",") if word.strip())
    if isinstance(value, list | tuple):
        items = cast("list[object]", value)
        return tuple(str(item) if isinstance(item, int) and not isinstance(item, bool) else item for item in items)
    return value


def scalars_as_text(value: object) -> object:
    """`{OLLAMA_DEBUG: 1}` -> `{"OLLAMA_DEBUG": "1"}`: YAML reads unquoted numbers and booleans as such."""
    if not isinstance(value, Mapping):
        return value
    items = cast("Mapping[object, object]", value)
    return {key: _scalar_text(item) for key, item in items.items()}


def _scalar_text(item: object) -> object:
    if isinstance(item, bool):
        return "true" if item else "false"
    return str(item) if isinstance(item, int | float) else item


def problem_text(dotted: str, detail: ErrorDetails, origin: str | None) -> str:
    """`server.port: 99999 (environment LLAMAYARD_SERVER__PORT) …`: the key, its value, where from, what would do."""
    context: dict[str, Any] = detail.get("ctx", {})
    words = detail["msg"].removeprefix("Value error, ").removeprefix("Input ")
    if detail["type"] == "string_pattern_mismatch":
        words = _PATTERN_WORDS.get(str(context.get("pattern")), words)
    if detail["type"] in ("model_type", "dict_type", "model_attributes_type"):
        words = "must be a mapping of keys"
    if detail["type"] == "tuple_type":
        words = "must be a list, such as [a, b]"
    if detail["type"] == "too_short":
        words = f"must have {context['min_length']} or more entries"
    source = f" ({origin})" if origin else ""
    value: object = detail["input"]
    if not dotted or (isinstance(value, Mapping) and detail["type"] == "value_error"):
        return f"{dotted or 'configuration'}{source}: {words}"
    return f"{dotted}: {value!r}{source} cannot be used: {words}"


_PATTERN_WORDS = {
    r"^https?://[^/\s]+$": "write it as http://HOST:PORT, without a path",
    r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,62}$": "use letters, digits, `_`, `.` and `-`, starting with a letter or digit",
}
