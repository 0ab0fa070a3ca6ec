"""A memory that forgets what was put in longest ago: a plain dictionary, and the one way to write to it."""

from __future__ import annotations

from typing import TypeVar

_Key = TypeVar("_Key")
_Value = TypeVar("_Value")


def put(known: dict[_Key, _Value], key: _Key, value: _Value, most: int) -> None:
    """Makes it the newest, and forgets the oldest of more than `most`."""
    known.pop(key, None)
    known[key] = value
    if len(known) > most:
        del known[next(iter(known))]
