"""Keeps usage by day, client and model in an SQLite database in the state directory.

Every write is one transaction with a write-ahead log: a router that is killed loses at most what it had not written.
All of it is blocking; a lock makes it safe to call from several threads.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Mapping
from contextlib import closing
from datetime import date, timedelta
from pathlib import Path

from router.domain.usage import UsageRow, UsageTotals

_CLIENTS_MAX = 1_000
"""Clients with rows of their own on one day; further ones are counted as `OTHER`."""
_PENDING_MAX = 10_000
"""Rows that are kept while the database cannot be written."""
_BUSY_SECONDS = 5.0
OTHER = "other"

_SCHEMA = """
CREATE TABLE IF NOT EXISTS usage (
    day TEXT NOT NULL,
    client TEXT NOT NULL,
    model TEXT NOT NULL,
    requests INTEGER NOT NULL,
    prompt_tokens INTEGER NOT NULL,
    output_tokens INTEGER NOT NULL,
    gpu_seconds REAL NOT NULL,
    energy_wh REAL NOT NULL,
    PRIMARY KEY (day, client, model)
) WITHOUT ROWID
"""
_ADD = """
INSERT INTO usage VALUES (?, ?, ?, ?, ?, ?, ?, ?)
ON CONFLICT (day, client, model) DO UPDATE SET
    requests = requests + excluded.requests,
    prompt_tokens = prompt_tokens + excluded.prompt_tokens,
    output_tokens = output_tokens + excluded.output_tokens,
    gpu_seconds = gpu_seconds + excluded.gpu_seconds,
    energy_wh = energy_wh + excluded.energy_wh
"""
_Key = tuple[str, str, str]


class UsageError(Exception):
    """The database cannot be written or read; the text says why."""


class UsageStore:
    """Opens the database with the first write."""

    def __init__(self, path: Path, keep_days: int) -> None:
        self._path = path
        self._keep_days = keep_days
        self._database: sqlite3.Connection | None = None
        self._pending: dict[_Key, UsageTotals] = {}
        self._clients: tuple[str, set[str]] = ("", set())
        """The day, and its clients with rows of their own."""
        self._lock = threading.Lock()

    def add(self, day: str, totals: Mapping[tuple[str, str], UsageTotals]) -> None:
        """Adds what was used on that day, by client and model, and what could not be written before.

        Raises:
            UsageError: it cannot be written; it is kept for the next call.
        """
        with self._lock:
            try:
                self._begin_day(day)
            except (sqlite3.Error, OSError) as error:
                self._keep(day, totals)
                raise UsageError(f"{self._path}: {error}") from error
            self._keep(day, totals)
            try:
                self._write()
            except (sqlite3.Error, OSError) as error:
                self._close()
                raise UsageError(f"{self._path}: {error}") from error

    def close(self) -> None:
        with self._lock:
            self._close()

    def _keep(self, day: str, totals: Mapping[tuple[str, str], UsageTotals]) -> None:
        for (client, model), used in totals.items():
            key = (day, self._bounded(client), model)
            if key in self._pending or len(self._pending) < _PENDING_MAX:
                self._pending[key] = self._pending.get(key, UsageTotals()).plus(used)

    def _bounded(self, client: str) -> str:
        clients = self._clients[1]
        if client in clients or len(clients) < _CLIENTS_MAX:
            clients.add(client)
            return client
        return OTHER

    def _begin_day(self, day: str) -> None:
        """Reads the day's clients and drops days that are too old, once a day."""
        if self._clients[0] == day:
            return
        database = self._open()
        oldest = (date.fromisoformat(day) - timedelta(days=self._keep_days - 1)).isoformat()
        with database:
            database.execute("DELETE FROM usage WHERE day < ?", (oldest,))
        rows = database.execute("SELECT DISTINCT client FROM usage WHERE day = ?", (day,))
        self._clients = (day, {str(client) for (client,) in rows})

    def _write(self) -> None:
        database = self._open()
        with database:
            database.executemany(_ADD, [(*key, *used) for key, used in self._pending.items()])
        self._pending.clear()

    def _open(self) -> sqlite3.Connection:
        if self._database is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._path.touch(mode=0o600)
            database = sqlite3.connect(self._path, timeout=_BUSY_SECONDS, check_same_thread=False)
            try:
                database.execute("PRAGMA journal_mode = WAL")
                database.execute("PRAGMA synchronous = NORMAL")
                database.execute(_SCHEMA)
            except sqlite3.Error:
                database.close()
                raise
            self._database = database
        return self._database

    def _close(self) -> None:
        if self._database is not None:
            self._database.close()
            self._database = None


def read_usage(path: Path, since_day: str) -> list[UsageRow]:
    """Rows of that day and later, oldest first; none if there is no database. A router may be writing it.

    Raises:
        UsageError: it cannot be read.
    """
    if not path.is_file():
        return []
    address = f"{path.absolute().as_uri()}?mode=ro"
    try:
        with closing(sqlite3.connect(address, uri=True, timeout=_BUSY_SECONDS)) as database:
            if database.execute("SELECT 1 FROM sqlite_master WHERE name = 'usage'").fetchone() is None:
                return []  # it is just being made
            rows = database.execute("SELECT * FROM usage WHERE day >= ? ORDER BY day, client, model", (since_day,))
            return [UsageRow(day, client, model, UsageTotals(*totals)) for day, client, model, *totals in rows]
    except sqlite3.Error as error:
        raise UsageError(f"{path}: {error}") from error
