"""What the commands that read the configuration share: the file, the flags, and how problems are printed.

The library that checks a configuration is imported with the first check: `status` rarely needs it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

from router.config.endpoint import KEY_VARIABLE, Endpoint, listen_address, plain_endpoint
from router.config.inputs import ConfigError, find_config, process_environment

if TYPE_CHECKING:
    from router.config.settings import Settings


@dataclass(frozen=True, slots=True)
class ConfigurationInputs:
    """What the configuration is read from."""

    path: Path | None
    environment: Mapping[str, str]
    flags: Mapping[str, object]
    """By dotted key."""

    def settings(self, *, may_be_blank: bool = True) -> Settings:
        """Raises ConfigError; BlankFile for a file without keys, which may not be so."""
        from router.config.settings import load_settings

        return load_settings(self.path, self.environment, self.flags, may_be_blank=may_be_blank)

    def endpoint(self) -> Endpoint:
        """How to reach the running router. Raises ConfigError."""
        found = plain_endpoint(self.path, self.environment, self.flags)
        if found is None:
            settings = self.settings()
            server, admin = settings.server, listen_address(settings.admin.listen)
            found = Endpoint(server.host, server.port, server.tls_certificate, admin)
        return replace(found, key=self.environment.get(KEY_VARIABLE))


def inputs_of(arguments: argparse.Namespace, environment: Mapping[str, str] | None) -> ConfigurationInputs:
    """The inputs that the parsed arguments name; `environment` defaults to that of the process.

    Raises:
        ConfigError: a `--set` has no value.
    """
    return ConfigurationInputs(
        find_config(arguments.config, Path.cwd()),
        process_environment() if environment is None else environment,
        _flags(arguments),
    )


def set_flags(pairs: Iterable[str]) -> dict[str, object]:
    """`["queue.limit=64"]` -> `{"queue.limit": "64"}`.

    Raises:
        ConfigError: one has no value.
    """
    flags: dict[str, object] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key.strip():
            raise ConfigError([f"--set {pair}: write KEY=VALUE, such as queue.limit=64"])
        flags[key.strip()] = value
    return flags


def _flags(arguments: argparse.Namespace) -> dict[str, object]:
    flags = set_flags(cast("list[str]", arguments.set))
    named = {"server.host": arguments.host, "server.port": arguments.port, "rig": arguments.rig}
    return {**flags, **{key: value for key, value in named.items() if value is not None}}


def print_problems(problems: Iterable[str]) -> None:
    """One line each, on standard error."""
    for problem in problems:
        print(f"llamayard: {problem}", file=sys.stderr)
