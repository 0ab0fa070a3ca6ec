"""Load ids: counted, not random, so that the same events give the same ids."""

from __future__ import annotations

from typing import NewType

LoadId = NewType("LoadId", int)


class LoadIds:
    """Gives out load ids from 1 on. Mutable, owned by the dispatcher."""

    __slots__ = ("_last",)

    def __init__(self) -> None:
        self._last = 0

    def next(self) -> LoadId:
        self._last += 1
        return LoadId(self._last)
