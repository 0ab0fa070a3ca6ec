"""`llamayard check-config`: every key's effective value with where it comes from, or everything that is wrong with it.

It reads the configuration and, for pins, the models and GPUs that are there. It starts and changes nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from pydantic import BaseModel

from router.app.preflight import PreflightResult, check_pins
from router.config.instance_options import tuning_problems
from router.config.keys import dotted_keys
from router.config.problems import origin_of
from router.config.settings import ConfigError, Settings, key_origins, load_settings


def effective(path: Path | None, environment: Mapping[str, str], flags: Mapping[str, object]) -> list[str]:
    """The configuration as it holds, a line a key.

    Raises:
        ConfigError: with every problem that was found, pins that cannot hold among them.
    """
    settings = load_settings(path, environment, flags)
    problems = tuning_problems(settings)
    checked = PreflightResult() if problems else check_pins(settings, environment)
    if problems or checked.problems:
        raise ConfigError([*problems, *checked.problems])
    origins = key_origins(path, environment, flags)
    lines = [f"# file: {path or 'none'}"]
    for key in dotted_keys(Settings):
        value = json.dumps(_plain(settings, key), ensure_ascii=False)
        lines.append(f"{key} = {value}  # {origin_of(key, origins) or 'default'}")
    return [*lines, *(f"# not checked: {words}" for words in checked.unseen)]


def _plain(settings: Settings, dotted: str) -> Any:
    """The JSON-ready value of a key."""
    value: object = settings
    for part in dotted.split("."):
        value = getattr(value, part)
    return _dumped(value)


def _dumped(value: object) -> object:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json", exclude_defaults=True)
    if isinstance(value, Mapping):
        return {str(key): _dumped(item) for key, item in cast("Mapping[object, object]", value).items()}
    if isinstance(value, tuple | list | set | frozenset):
        return [_dumped(item) for item in cast("Sequence[object]", value)]
    return str(value) if isinstance(value, Path) else value
