"""Results that outlive a snapshot, each kept with the facts that it was computed from.

Most of what a search for a place asks has the same answer as at the search before: what a model takes on a GPU, which
instances could be started. A result is given again only for equal facts, so that nothing is decided otherwise than
without this memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

_Value = TypeVar("_Value")

_ENTRIES_MAX = 20_000
_TABLES_MAX = 2_000


class LastingMemo:
    """Mutable, owned by the state that snapshots are made of."""

    __slots__ = ("_entries", "_tables")

    def __init__(self) -> None:
        self._entries: dict[object, tuple[object, object]] = {}
        self._tables: dict[object, tuple[object, object, dict[Any, Any]]] = {}

    def get(self, key: object, facts: object, compute: Callable[[], _Value]) -> _Value:
        """The value under `key`, computed anew unless it was computed from equal facts."""
        found = self._entries.get(key)
        if found is not None and found[0] == facts:
            return cast("_Value", found[1])
        if len(self._entries) >= _ENTRIES_MAX:
            self._entries.clear()
        value = compute()
        self._entries[key] = (facts, value)
        return value

    def same(self, key: object, value: _Value) -> _Value:
        """The earlier object under `key` if it is equal to `value`: equal values can then be told by identity."""
        return self.get(key, value, lambda: value)

    def table(self, key: object, owner: object, facts: object) -> dict[Any, Any]:
        """A table under `key` for results about this very `owner`; empty once the facts differ."""
        found = self._tables.get(key)
        if found is not None and found[0] is owner and found[1] == facts:
            return found[2]
        if len(self._tables) >= _TABLES_MAX:
            self._tables.clear()
        table: dict[Any, Any] = {}
        self._tables[key] = (owner, facts, table)
        return table
