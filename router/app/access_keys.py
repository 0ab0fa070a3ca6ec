"""The access keys of a running router, and what the command `llamayard keys` does with their file.

The running router looks at the file once a second, at the cost of one `stat`, and takes over changes whole or not at
all. A file that became unreadable or was removed changes nothing: taking the file away must not open the router.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import structlog

from router.admission.key_budgets import KeyBudgets
from router.admission.key_ring import KeyRing, KeyStore, digest_of, new_key
from router.config.settings import ConfigError, Settings
from router.domain.access_key import AccessKey
from router.storage.key_file import KeyFile, KeyFileError, Stamp

CHECK_SECONDS = 1.0
_FILE_NAME = "keys.json"

Keys = tuple[AccessKey, ...]


def wall_seconds() -> float:
    """Seconds since 1970: keys expire by the calendar."""
    return datetime.now(UTC).timestamp()


def keys_path(settings: Settings) -> Path:
    return settings.server.keys_file or settings.state_directory / _FILE_NAME


def has_keys(settings: Settings) -> bool:
    """Whether there is a file of keys, be it without a valid one: then requests need a key.

    Raises:
        ConfigError: this cannot be told.
    """
    try:
        return KeyFile(keys_path(settings)).stamp() is not None
    except KeyFileError as error:
        raise ConfigError([f"server.keys_file: {error}"]) from error


def read_keys(settings: Settings) -> Keys | None:
    """All keys in the file; None if there is no file.

    Raises:
        ConfigError: it cannot be used.
    """
    try:
        return KeyFile(keys_path(settings)).read()
    except KeyFileError as error:
        raise ConfigError([f"server.keys_file: {error}"]) from error


def change_keys(settings: Settings, change: Callable[[Keys], Keys]) -> None:
    """
    Raises:
        ConfigError: the file cannot be used or written, or `change` refuses.
    """
    try:
        KeyFile(keys_path(settings)).change(change)
    except KeyFileError as error:
        raise ConfigError([f"server.keys_file: {error}"]) from error


def with_new_secret(key: AccessKey) -> tuple[AccessKey, str]:
    """The key's entry, and the key itself, which nothing keeps."""
    secret = new_key()
    return replace(key, sha256=digest_of(secret)), secret


class KeyWatcher:
    """Keeps a `KeyStore` equal to the file.

    Args:
        wall_clock: seconds since 1970.
        on_change: called after the valid keys have changed.
    """

    def __init__(
        self,
        path: Path,
        store: KeyStore,
        budgets: KeyBudgets,
        wall_clock: Callable[[], float],
        on_change: Callable[[], None],
    ) -> None:
        self._file = KeyFile(path)
        self._store = store
        self._budgets = budgets
        self._wall_clock = wall_clock
        self._on_change = on_change
        self._stamp: Stamp | None = None
        self._keys: Keys = ()
        self._log = structlog.get_logger("router.keys")

    def load(self) -> None:
        """The first reading.

        Raises:
            ConfigError: the file cannot be used.
        """
        try:
            self._read()
        except KeyFileError as error:
            raise ConfigError([f"server.keys_file: {error}"]) from error

    async def run(self) -> None:
        """Looks at the file until it is cancelled."""
        while True:
            await asyncio.sleep(CHECK_SECONDS)
            self.check()

    def check(self) -> None:
        """Takes over what has changed: the file, or a key that has expired."""
        try:
            self._read()
            self._store.problem = ""
        except KeyFileError as error:
            problem = f"server.keys_file: {error}; the keys stay as they were"
            if problem != self._store.problem:
                self._store.problem = problem
                self._log.error("keys_unreadable", error=str(error), consequence="the keys stay as they were")
        ring = self._store.ring
        if ring is not None and ring.next_expiry <= self._wall_clock():
            self._take_over()

    def _read(self) -> None:
        stamp = self._file.stamp()
        if stamp == self._stamp:
            return
        keys = self._file.read()
        if keys is None:
            if self._store.ring is None:
                return
            raise KeyFileError(f"{self._file.path}: is gone")
        self._keys, self._stamp = keys, stamp
        self._take_over()

    def _take_over(self) -> None:
        self._store.ring = ring = KeyRing(self._keys, self._wall_clock())
        self._budgets.forget_others(ring.names)
        self._log.info("keys", valid=len(ring), expired=len(self._keys) - len(ring))
        if not len(ring):
            self._log.warning("no_valid_key", consequence="requests are refused with 401; `llamayard keys create NAME`")
        self._on_change()
