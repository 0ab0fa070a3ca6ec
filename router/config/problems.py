"""What is wrong with a configuration, in sentences for its author: the key, the value, its origin and what to write."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from router.config.keys import RENAMED_KEYS, nearest_key

ENVIRONMENT_PREFIX = "LLAMAYARD_"

_PATTERN_HINTS = {
    r"^https?://[^/\s]+$": "write it as http://HOST:PORT, without a path",
    r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,62}$": "use letters, digits, `_`, `.` and `-`, starting with a letter or digit",
}
"""Pattern of a field -> what to write."""


class ConfigError(Exception):
    """The configuration cannot be used; `problems` has one sentence for each wrong key."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


def environment_variable(dotted: str) -> str:
    """`server.port` -> `LLAMAYARD_SERVER__PORT`."""
    return ENVIRONMENT_PREFIX + dotted.upper().replace(".", "__")


def origin_of(dotted: str, origins: Mapping[str, str]) -> str | None:
    """Where the value of a key was set; None where it is the default."""
    found = [origin for key, origin in origins.items() if key == dotted or key.startswith(f"{dotted}.")]
    return ", ".join(dict.fromkeys(found)) or None


def explain(error: ValidationError, settings: type[BaseModel], origins: Mapping[str, str]) -> list[str]:
    """One sentence for each error: unknown and renamed keys first, then wrong values."""
    unknown: list[str] = []
    wrong: list[str] = []
    for detail in error.errors():
        dotted = ".".join(str(part) for part in detail["loc"])
        origin = origin_of(dotted, origins)
        if detail["type"] != "extra_forbidden":
            wrong.append(_wrong_value(dotted, detail, origin))
        elif dotted in RENAMED_KEYS:
            unknown.append(_renamed(dotted, RENAMED_KEYS[dotted], origin))
        else:
            unknown.append(f"{dotted}: unknown key; {nearest_key(detail['loc'], settings)}")
    return [*unknown, *wrong]


def _renamed(dotted: str, new: str, origin: str | None) -> str:
    source = f" ({origin})" if origin else ""
    return f"{dotted}{source}: renamed; use `{new}` (environment: {environment_variable(new)})"


def _wrong_value(dotted: str, detail: ErrorDetails, origin: str | None) -> str:
    """`server.port: '99999' (environment LLAMAYARD_SERVER__PORT) cannot be used: should be …`."""
    source = f" ({origin})" if origin else ""
    value: object = detail["input"]
    if not dotted or (isinstance(value, Mapping) and detail["type"] == "value_error"):
        return f"{dotted or 'configuration'}{source}: {_hint(detail)}"
    return f"{dotted}: {value!r}{source} cannot be used: {_hint(detail)}"


def _hint(detail: ErrorDetails) -> str:
    """What would be right."""
    context: dict[str, Any] = detail.get("ctx", {})
    message = detail["msg"].removeprefix("Value error, ").removeprefix("Input ")
    match detail["type"]:
        case "string_pattern_mismatch":
            return _PATTERN_HINTS.get(str(context.get("pattern")), message)
        case "model_type" | "dict_type" | "model_attributes_type":
            return "must be a mapping of keys"
        case "tuple_type":
            return "must be a list, such as [a, b]"
        case "too_short":
            return f"must have {context['min_length']} or more entries"
        case _:
            return message
