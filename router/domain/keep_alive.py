"""Ollama's `keep_alive`: a number of seconds, or a duration in Go's notation; negative means for ever.

Source: `api.Duration.UnmarshalJSON` and Go's `time.ParseDuration` (time/format.go), with the same error texts.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

FOR_EVER = -1.0
"""The value of every negative duration."""

_NANOSECONDS: Mapping[str, int] = {
    "ns": 1,
    "us": 1_000,
    "µs": 1_000,  # U+00B5, the micro sign
    "μs": 1_000,  # U+03BC, the Greek letter
    "ms": 1_000_000,
    "s": 1_000_000_000,
    "m": 60_000_000_000,
    "h": 3_600_000_000_000,
}
_LIMIT = 2**63
_PART = re.compile(r"([0-9]*)(\.?)([0-9]*)([^.0-9]*)")
_PLAIN = re.compile(r"[+-]?[0-9]+")


def parse_keep_alive(value: object, *, plain_seconds: bool = True) -> float | None:
    """Seconds; -1.0 for ever; None if `value` is None.

    `value` comes from JSON, YAML or an environment variable. `plain_seconds`: text like "300" or "-1" means seconds, as
    in `OLLAMA_KEEP_ALIVE`. Pass False for the JSON of a request, where the server refuses this text except "0".

    Raises:
        ValueError: not a duration, with the text of the server, e.g. `time: invalid duration "soon"`.
    """
    if value is None:
        return None
    if isinstance(value, str):
        plain = plain_seconds and _PLAIN.fullmatch(value) is not None
        seconds = float(value) if plain else parse_go_duration(value)
    elif isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        seconds = float(value)
    else:
        raise ValueError(f"Unsupported type: '{_go_type(value)}'")
    return seconds if seconds >= 0 else FOR_EVER


def merged_keep_alive(current: float, requested: float | None, *, others_hold: bool) -> float:
    """The `keep_alive` of a loaded model after another request for it, in seconds; negative means for ever.

    While other requests use the model, the longest value wins, so that no client shortens it for another. Otherwise the
    newest request decides, as in Ollama. None leaves the value as it is. Pins are applied by the caller.
    """
    if requested is None:
        return current
    if not others_hold:
        return requested
    return FOR_EVER if current < 0 or requested < 0 else max(current, requested)


def parse_go_duration(text: str) -> float:
    """Seconds of a duration like `1h30m`, `-1.5s`, `300ms` or `0`, parsed like Go's `time.ParseDuration`.

    Raises:
        ValueError: with Go's text: invalid duration, missing unit or unknown unit.
    """
    rest = text[1:] if text[:1] in ("-", "+") else text
    if rest == "0":
        return 0.0
    if not rest:
        raise _invalid(text)
    total = 0
    while rest:
        part = _PART.match(rest)
        if part is None or not (part[1] or part[3]):
            raise _invalid(text)
        total += _part_nanoseconds(text, part)
        if total > _LIMIT:
            raise _invalid(text)
        rest = rest[part.end() :]
    if text.startswith("-"):
        return -total / 1e9
    if total == _LIMIT:
        raise _invalid(text)
    return total / 1e9


def _part_nanoseconds(text: str, part: re.Match[str]) -> int:
    whole, fraction, unit = part[1], part[3], part[4]
    if int(whole or "0") > _LIMIT:
        raise _invalid(text)
    if not unit:
        raise ValueError(f"time: missing unit in duration {_quoted(text)}")
    if unit not in _NANOSECONDS:
        raise ValueError(f"time: unknown unit {_quoted(unit)} in duration {_quoted(text)}")
    size = _NANOSECONDS[unit]
    return int(whole or "0") * size + int(float(f"0.{fraction or 0}") * size)


def _invalid(text: str) -> ValueError:
    return ValueError(f"time: invalid duration {_quoted(text)}")


def _quoted(text: str) -> str:
    """Quoted like in Go's time package: control and non-ASCII bytes as `\\xNN`."""
    escaped = "".join(_escaped(character) for character in text)
    return f'"{escaped}"'


def _escaped(character: str) -> str:
    if character in '"\\':
        return "\\" + character
    if " " <= character < "\x80":
        return character
    return "".join(f"\\x{byte:02x}" for byte in character.encode(errors="surrogatepass"))


def _go_type(value: object) -> str:
    """Go's name for the type of a decoded JSON value. Lists and objects may also be given as JSON bytes."""
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, Mapping) or (isinstance(value, bytes) and value.startswith(b"{")):
        return "map[string]interface {}"
    return "[]interface {}" if isinstance(value, list | bytes) else "unknown"
