"""Values of the configuration as JSON, by dotted key."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

from pydantic import BaseModel

from router.config.settings import Settings


def json_value(settings: Settings, dotted: str) -> object:
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
