"""`llamayard check-config`: prints every key's effective value and origin, or every problem.

Reads the configuration and, to check pins, the installed models and the GPUs. Starts and changes nothing.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from pydantic import BaseModel

from router.app.preflight import PreflightResult, check_pins
from router.cli.configuration import ConfigurationInputs, inputs_of, print_problems
from router.cli.exit_codes import EXIT_MISUSED, EXIT_OK
from router.config.instance_options import tuning_problems
from router.config.keys import dotted_keys
from router.config.problems import origin_of
from router.config.settings import ConfigError, Settings, key_origins


def run(arguments: argparse.Namespace, environment: Mapping[str, str] | None) -> int:
    """The exit code; EXIT_MISUSED if the configuration cannot be used."""
    try:
        lines = effective_lines(inputs_of(arguments, environment))
    except ConfigError as error:
        print_problems(error.problems)
        return EXIT_MISUSED
    print("\n".join(lines))
    return EXIT_OK


def effective_lines(inputs: ConfigurationInputs) -> list[str]:
    """One line for each key of the effective configuration.

    Raises:
        ConfigError: with all problems, including pins that cannot be satisfied.
    """
    settings = inputs.settings()
    problems = tuning_problems(settings)
    preflight = PreflightResult() if problems else check_pins(settings, inputs.environment)
    if problems or preflight.problems:
        raise ConfigError([*problems, *preflight.problems])
    origins = key_origins(inputs.path, inputs.environment, inputs.flags)
    lines = [f"# file: {inputs.path or 'none'}"]
    for key in dotted_keys(Settings):
        value = json.dumps(_json_value(settings, key), ensure_ascii=False)
        lines.append(f"{key} = {value}  # {origin_of(key, origins) or 'default'}")
    return [*lines, *(f"# not checked: {subject}" for subject in preflight.unchecked)]


def _json_value(settings: Settings, dotted: str) -> Any:
    """The JSON-ready value of a key."""
    value: object = settings
    for part in dotted.split("."):
        value = getattr(value, part)
    return _as_json(value)


def _as_json(value: object) -> object:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json", exclude_defaults=True)
    if isinstance(value, Mapping):
        return {str(key): _as_json(item) for key, item in cast("Mapping[object, object]", value).items()}
    if isinstance(value, tuple | list | set | frozenset):
        return [_as_json(item) for item in cast("Sequence[object]", value)]
    return str(value) if isinstance(value, Path) else value
