"""Records usage while the router runs, and reads it for `llamayard usage`."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Protocol

import structlog

from router.config.settings import Settings
from router.domain.instance import InstanceName
from router.domain.snapshot import Snapshot
from router.domain.usage import UsageRow
from router.observability.usage_log import UsageLog
from router.storage.usage_store import UsageError, UsageStore, read_usage

FLUSH_SECONDS = 5.0
"""A router that is killed loses at most the requests that ended within this time."""


def usage_path(settings: Settings) -> Path:
    """The database."""
    return settings.state_directory / "usage.sqlite"


def recorded_usage(settings: Settings, since: date) -> list[UsageRow]:
    """Usage of that day (UTC) and later. Raises UsageError."""
    return read_usage(usage_path(settings), since.isoformat())


def today() -> date:
    """The day in UTC."""
    return datetime.now(UTC).date()


class RunningRequests(Protocol):
    """The controller."""

    def now(self) -> float: ...

    def snapshot(self) -> Snapshot: ...

    def running(self) -> list[tuple[InstanceName, float]]: ...


class UsageRecorder:
    """Writes what `log` collects, in a thread."""

    def __init__(self, log: UsageLog, store: UsageStore, controller: RunningRequests) -> None:
        self._log = log
        self._store = store
        self._controller = controller
        self._is_failing = False

    async def run(self) -> None:
        """Writes every few seconds, until it is cancelled."""
        while True:
            await asyncio.sleep(FLUSH_SECONDS)
            await self.flush()

    async def flush(self) -> None:
        """Writes what has been collected since the last time."""
        controller = self._controller
        batch = self._log.take(controller.snapshot().instances, controller.running(), controller.now())
        if batch is None:
            return
        day, log = today().isoformat(), structlog.get_logger("router.usage")
        try:
            await asyncio.to_thread(lambda: self._store.add(day, batch.totals()))
        except UsageError as error:
            if not self._is_failing:
                log.warning("usage_not_written", error=str(error))
            self._is_failing = True
        else:
            if self._is_failing:
                log.info("usage_written_again")
            self._is_failing = False


@contextlib.asynccontextmanager
async def recording(settings: Settings, log: UsageLog, controller: RunningRequests) -> AsyncGenerator[None]:
    """Records usage for the length of the block; what is left is written at its end."""
    store = UsageStore(usage_path(settings), settings.usage.keep_days)
    recorder = UsageRecorder(log, store, controller)
    task = asyncio.get_running_loop().create_task(recorder.run(), name="usage")
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        await recorder.flush()
        store.close()
