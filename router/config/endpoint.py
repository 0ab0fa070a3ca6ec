"""Where the running router listens, read without the library that checks the whole configuration.

Only for values that are plainly right. Whatever is not is left to `load_settings`, which says what is wrong.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from router.config.inputs import ENVIRONMENT_PREFIX, ConfigError, absolute, home_of, read_yaml

DEFAULT_HOST = "127.0.0.1"
DEFAULT_PORT = 11434
_KEYS = ("host", "port", "tls_certificate")


@dataclass(frozen=True, slots=True)
class Endpoint:
    """The address and certificate of the router's listener."""

    host: str
    port: int
    tls_certificate: Path | None


def plain_endpoint(config: Path | None, environment: Mapping[str, str], flags: Mapping[str, object]) -> Endpoint | None:
    """The endpoint by file, environment and flags by dotted key; None if anything needs the full check."""
    values = _values(config, environment, flags)
    if values is None:
        return None
    host, port = values.get("host", DEFAULT_HOST), _port(values.get("port", DEFAULT_PORT))
    certificate = values.get("tls_certificate")
    if not isinstance(host, str) or not host or port is None or not isinstance(certificate, str | None):
        return None
    home = home_of(environment)
    return Endpoint(host, port, None if certificate is None else absolute(Path(certificate), home))


def _values(
    config: Path | None, environment: Mapping[str, str], flags: Mapping[str, object]
) -> dict[str, object] | None:
    """The keys of `server` that are set, by their last part."""
    try:
        section: object = (read_yaml(config) if config is not None else {}).get("server") or {}
    except ConfigError:
        return None
    if not isinstance(section, dict) or flags.keys() - {f"server.{key}" for key in _KEYS}:
        return None
    in_file = cast("dict[Any, object]", section)
    values_by_variable: dict[str, object] = {}
    values = {key: in_file[key] for key in _KEYS if in_file.get(key) is not None}
    for name, text in environment.items():
        key = _key_of(name)
        if key == "server" or key in values_by_variable:
            return None  # all at once, or in two spellings
        if key.startswith("server.") and key[7:] in _KEYS:
            values_by_variable[key] = text
    values |= {key.removeprefix("server."): value for key, value in values_by_variable.items()}
    values |= {key.removeprefix("server."): value for key, value in flags.items()}
    return None if any(_is_special(value) for value in values.values()) else values


def _key_of(variable: str) -> str:
    """`LLAMAYARD_SERVER__PORT` -> `server.port`; "" for a variable that is no key."""
    is_key = variable.upper().startswith(ENVIRONMENT_PREFIX)
    return variable[len(ENVIRONMENT_PREFIX) :].lower().replace("__", ".") if is_key else ""


def _is_special(value: object) -> bool:
    """Whether text is more than text: a list, a mapping or null."""
    return isinstance(value, str) and (value.strip() in ("", "null") or value.lstrip()[:1] in ("[", "{"))


def _port(value: object) -> int | None:
    if isinstance(value, str) and value.isascii() and value.isdigit():
        value = int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= 65535 else None
