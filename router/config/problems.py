"""What is wrong with a configuration, in sentences for its author: the key, the value, its origin and what to write."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from router.config.inputs import ENVIRONMENT_PREFIX
from router.config.keys import RENAMED_KEYS, Bounds, bounds_at, nearest_key
from router.config.parsing import INSTANCE_NAME_PATTERN, URL_PATTERN

_PATTERN_HINTS = {
    URL_PATTERN: "write it as http://HOST:PORT, without a path",
    INSTANCE_NAME_PATTERN: "use letters, digits, `_`, `.` and `-`, starting with a letter or digit",
}
"""Pattern of a field -> what to write."""

_KIND_HINTS = {
    "bool_": "must be true or false",
    "dict_": "must be a mapping of keys",
    "mapping_": "must be a mapping of keys",
    "model_": "must be a mapping of keys",
    "path_": "must be a path",
    "string_too_short": "must not be empty",
    "string_": "must be text",
    "tuple_": "must be a list, such as [a, b]",
    "list_": "must be a list, such as [a, b]",
}
"""Beginning of pydantic's type of error -> what to write."""

_UNKNOWN_HINT = "has the wrong type; docs/configuration.md describes the key"
_KEY = "[key]"
"""Where pydantic locates an error in the name of a mapping's entry."""
_VALUE_LENGTH_MAX = 200


def environment_variable(dotted: str) -> str:
    """`server.port` -> `LLAMAYARD_SERVER__PORT`."""
    return ENVIRONMENT_PREFIX + dotted.upper().replace(".", "__")


def origin_of(dotted: str, origins: Mapping[str, str]) -> str | None:
    """Where the value of a key was set; None where it is the default."""
    found = [origin for key, origin in origins.items() if key == dotted or key.startswith(f"{dotted}.")]
    return ", ".join(dict.fromkeys(found)) or None


def _nearest_origin(location: tuple[int | str, ...], origins: Mapping[str, str]) -> str | None:
    """Where the value at a location, or the nearest key that contains it, was set."""
    prefixes = (_dotted(location[:end]) for end in range(len(location), 0, -1))
    return next((origin for prefix in prefixes if (origin := origin_of(prefix, origins))), None)


def explain(error: ValidationError, settings: type[BaseModel], origins: Mapping[str, str]) -> list[str]:
    """One sentence for each error: unknown and renamed keys first, then wrong values."""
    unknown: list[str] = []
    wrong: list[str] = []
    for detail in error.errors():
        location = detail["loc"]
        dotted = _dotted(location)
        origin = _nearest_origin(location, origins)
        if detail["type"] != "extra_forbidden":
            wrong.append(_wrong_value(location, detail, bounds_at(location, settings), origin))
        elif dotted in RENAMED_KEYS:
            unknown.append(_renamed(dotted, RENAMED_KEYS[dotted], origin))
        else:
            unknown.append(f"{dotted}: unknown key; {nearest_key(detail['loc'], settings)}")
    return [*unknown, *wrong]


def _renamed(dotted: str, new: str, origin: str | None) -> str:
    source = f" ({origin})" if origin else ""
    return f"{dotted}{source}: renamed; use `{new}` (environment: {environment_variable(new)})"


def _wrong_value(location: tuple[int | str, ...], detail: ErrorDetails, bounds: Bounds, origin: str | None) -> str:
    """`server.port: '99999' (environment LLAMAYARD_SERVER__PORT) cannot be used: must be …`."""
    dotted = _dotted(location)
    source = f" ({origin})" if origin else ""
    value = cast("object", detail["input"])
    if detail["type"] == "missing":
        return f"{dotted}{source}: is missing and has no default"
    if not dotted or (detail["type"] == "value_error" and isinstance(detail["input"], Mapping)):
        return f"{dotted or 'configuration'}{source}: {_hint(detail, bounds)}"
    return f"{dotted}: {_value_text(value)}{source} cannot be used: {_hint(detail, bounds)}"


def _dotted(location: tuple[int | str, ...]) -> str:
    return ".".join(str(part) for part in location if part != _KEY)


def _value_text(value: object) -> str:
    """The value as in YAML where Python writes it otherwise; long ones are cut."""
    text = {True: "true", False: "false"}[value] if isinstance(value, bool) else repr(value)
    return "null" if value is None else text if len(text) <= _VALUE_LENGTH_MAX else f"{text[:_VALUE_LENGTH_MAX]}…"


def _hint(detail: ErrorDetails, bounds: Bounds) -> str:
    """What would be right. No text of pydantic's own reaches the user."""
    context: dict[str, Any] = detail.get("ctx", {})
    match detail["type"]:
        case "value_error":
            return detail["msg"].removeprefix("Value error, ")
        case "string_pattern_mismatch":
            return _PATTERN_HINTS.get(str(context.get("pattern")), "must be written in another form")
        case "too_short":
            return f"must have {context['min_length']} or more entries"
        case "literal_error":
            return f"must be {context['expected']}"
        case "string_type" if detail["loc"][-1:] == (_KEY,):
            return f'must be text: write "{detail["input"]}" in quotes'
        case "string_type":
            return f'must be text: write "{detail["input"]}" in quotes' if _is_number(detail) else "must be text"
        case kind if kind.startswith(("int_", "float_", "finite_", "greater_", "less_")):
            return f"must be a {bounds.text()}"
        case kind:
            return next((hint for name, hint in _KIND_HINTS.items() if kind.startswith(name)), _UNKNOWN_HINT)


def _is_number(detail: ErrorDetails) -> bool:
    return isinstance(detail["input"], int | float) and not isinstance(detail["input"], bool)
