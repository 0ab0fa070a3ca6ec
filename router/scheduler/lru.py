"""A bounded dictionary that drops the oldest entries: a plain `dict`, written only with `put`."""

from __future__ import annotations

from typing import TypeVar

_Key = TypeVar("_Key")
_Value = TypeVar("_Value")


def put(table: dict[_Key, _Value], key: _Key, value: _Value, size_max: int) -> None:
    """Writes an entry as the newest one, and drops the oldest one if there are more than `size_max`."""
    table.pop(key, None)
    table[key] = value
    if len(table) > size_max:
        del table[next(iter(table))]
