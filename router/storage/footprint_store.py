"""Keeps measured footprints across runs, in one JSON file of the state directory.

A file that cannot be read is as none: what it held is measured again. Written whole or not at all.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import msgspec

from router.domain.footprint import FootprintKey

Entry = tuple[FootprintKey, tuple[int, ...]]


class FootprintStore:
    """`remember` writes; blocking, but a few kilobytes and once a measured load."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._entries: dict[FootprintKey, tuple[int, ...]] = {}

    def read(self) -> tuple[Entry, ...]:
        """What earlier runs have measured."""
        try:
            rows = msgspec.json.decode(self._path.read_bytes(), type=list[tuple[FootprintKey, tuple[int, ...]]])
        except (OSError, msgspec.MsgspecError):
            return ()
        self._entries = dict(rows)
        return tuple(rows)

    def remember(self, key: FootprintKey, per_gpu_bytes: tuple[int, ...]) -> None:
        """A disk that is full is no reason to stop: the next run then measures again."""
        self._entries[key] = per_gpu_bytes
        staging = self._path.with_suffix(f".{os.getpid()}")
        with contextlib.suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            staging.write_bytes(msgspec.json.encode(list(self._entries.items())))
            staging.replace(self._path)
