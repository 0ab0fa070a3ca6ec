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
KEY_VARIABLE = f"{ENVIRONMENT_PREFIX}API_KEY"
"""The environment variable with the access key for commands that ask the router."""
LOCAL_ORIGINS = (
    *(f"{scheme}://{host}{port}" for host in ("localhost", "127.0.0.1", "0.0.0.0")
      for port in ("", ":*") for scheme in ("http", "https")),
    "app://*", "file://*", "tauri://*", "vscode-webview://*", "vscode-file://*",
)  # fmt: skip
"""Origins that Ollama allows by default (`envconfig.AllowedOrigins`, v0.24)."""
_UNIX_PREFIX = "unix:"
_KEYS = ("host", "port", "tls_certificate")


@dataclass(frozen=True, slots=True)
class TcpAddress:
    host: str
    port: int


@dataclass(frozen=True, slots=True)
class UnixAddress:
    path: Path


def listen_address(text: str | None) -> TcpAddress | UnixAddress | None:
    """`127.0.0.1:9000`, `[::1]:9000` and `unix:/run/x.sock`, as `admin.listen` accepts them."""
    if text is None:
        return None
    if text.startswith(_UNIX_PREFIX):
        return UnixAddress(Path(text.removeprefix(_UNIX_PREFIX)))
    host, _, port = text.rpartition(":")
    return TcpAddress(host.strip("[]"), int(port))


@dataclass(frozen=True, slots=True)
class Endpoint:
    """How to reach the running router."""

    host: str
    port: int
    tls_certificate: Path | None
    admin: TcpAddress | UnixAddress | None = None
    """Where metrics and status have a listener of their own."""
    key: str | None = None
    """The access key to use."""


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
        tree = read_yaml(config) if config is not None else {}
    except ConfigError:
        return None
    section: object = tree.get("server") or {}
    if tree.get("admin"):
        return None
    if not isinstance(section, dict) or flags.keys() - {f"server.{key}" for key in _KEYS}:
        return None
    in_file = cast("dict[Any, object]", section)
    values_by_variable: dict[str, object] = {}
    values = {key: in_file[key] for key in _KEYS if in_file.get(key) is not None}
    for name, text in environment.items():
        key = _key_of(name)
        if key == "server" or key in values_by_variable or key.partition(".")[0] == "admin":
            return None  # all at once, in two spellings, or on a listener of its own
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
