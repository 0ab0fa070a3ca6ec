"""How single configuration values may be written: bytes, durations, lists, variables. Pure; reads no source."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import cast

from router.domain.keep_alive import parse_go_duration, parse_keep_alive

INSTANCE_NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,62}$"
URL_PATTERN = r"^https?://[^/\s]+$"
LISTEN_PATTERN = r"^(unix:/.+|\[[0-9A-Fa-f:.]+\]:\d{1,5}|[^:/\s]+:\d{1,5})$"
"""Without a path."""
DURATION_PATTERN = r"^\s*\+?(\d+(\.\d+)?|(\d*\.?\d+(ns|us|µs|μs|ms|s|m|h))+)\s*$"
"""A number of seconds, or a duration as Go writes it, as an ECMAScript regular expression for the JSON Schema."""
_UNITS = {"": 1, "k": 1000, "m": 1000**2, "g": 1000**3, "ki": 1024, "mi": 1024**2, "gi": 1024**3}
_DECIMAL = re.compile(r"[+-]?\d+(?:\.\d+)?")
_SECONDS_HINT = "write a number of seconds or a duration such as 90s, 5m or 1h30m"
_KEEP_ALIVE_HINT = "write a duration such as 5m, a number of seconds, or -1 for no limit"
_BYTES_HINT = "write bytes as a number or with a unit, such as 512MiB or 2GB"
_BYTES = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kmg]i?)?b?\s*", re.IGNORECASE)
BYTES_PATTERN = r"^\s*\d+(\.\d+)?\s*([kKmMgG][iI]?)?[bB]?\s*$"
"""The same as an ECMAScript regular expression, which has no flag inside, for the JSON Schema."""


def parse_bytes(value: object) -> object:
    """`512MiB`, `2GB`, `1073741824` -> bytes; numbers are returned unchanged. Raises ValueError for other text."""
    if isinstance(value, bool):
        raise ValueError(_BYTES_HINT)
    if not isinstance(value, str):
        return value
    match = _BYTES.fullmatch(value)
    if match is None:
        raise ValueError(_BYTES_HINT)
    return int(float(match[1]) * _UNITS[(match[2] or "").lower()])


def bytes_text(value: int) -> str:
    """The shortest exact spelling of a number of bytes: `512MiB`, `1000`."""
    for unit, size in (("GiB", 1024**3), ("MiB", 1024**2), ("KiB", 1024)):
        if value and value % size == 0:
            return f"{value // size}{unit}"
    return str(value)


def duration_seconds(value: object) -> object:
    """`5m`, `1h30m`, `300`, `"300"` -> seconds; numbers are returned unchanged. Raises ValueError for other text."""
    if isinstance(value, bool):
        raise ValueError(_SECONDS_HINT)
    if not isinstance(value, str):
        return value
    text = value.strip()
    if _DECIMAL.fullmatch(text):
        return float(text)
    try:
        return parse_go_duration(text)
    except ValueError as error:
        raise ValueError(_SECONDS_HINT) from error


def keep_alive_seconds(value: object) -> object:
    """`5m`, `300`, `-1` -> seconds. Any negative duration means no limit and becomes -1. Raises ValueError."""
    if isinstance(value, str) and _DECIMAL.fullmatch(value.strip()):
        value = float(value)
    try:
        seconds = parse_keep_alive(value)
    except ValueError as error:
        raise ValueError(_KEEP_ALIVE_HINT) from error
    if seconds is None:
        raise ValueError(_KEEP_ALIVE_HINT)
    return seconds


def keys_as_text(value: object) -> object:
    """`{0: x}` -> `{"0": x}`: YAML reads unquoted GPU indices as numbers."""
    if not isinstance(value, Mapping):
        return value
    return {str(key): inner for key, inner in cast("Mapping[object, object]", value).items()}


def parse_list(value: object) -> object:
    """`a, b` -> `("a", "b")`, the format of OLLAMA_ORIGINS; numbers in a list (GPU indices) become text."""
    if isinstance(value, str):
        return tuple(item.strip() for item in value.split(",") if item.strip())
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
