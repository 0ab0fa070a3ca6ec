"""Keeps measured footprints across restarts, in a JSON file in the state directory.

Writes are atomic. An unreadable file counts as empty: its footprints are measured again.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import msgspec
import structlog

from router.domain.footprint import FootprintKey, MeasuredFootprint
from router.errors import UNREADABLE_JSON


class FootprintStore:
    """Blocking: a write takes a few kilobytes, once per measured load."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._entries: dict[FootprintKey, MeasuredFootprint] = {}
        self._is_failing = False

    def read(self) -> tuple[MeasuredFootprint, ...]:
        """Returns the stored footprints; none if the file is missing or unreadable."""
        try:
            entries = msgspec.json.decode(self._path.read_bytes(), type=list[MeasuredFootprint])
        except (OSError, *UNREADABLE_JSON):
            return ()
        self._entries = {entry.key: entry for entry in entries}
        return tuple(entries)

    def remember(self, footprint: MeasuredFootprint) -> None:
        """Adds or replaces a footprint and writes the file. Logs write errors once: the next run measures again."""
        self._entries[footprint.key] = footprint
        temporary = self._path.with_suffix(f".{os.getpid()}")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(msgspec.json.encode(list(self._entries.values())))
            temporary.replace(self._path)
            self._is_failing = False
        except OSError as error:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)  # a part of it, where the disk is full
            if not self._is_failing:
                log = structlog.get_logger("router.storage")
                log.warning("footprint_not_stored", path=str(self._path), error=error.strerror or str(error))
            self._is_failing = True
