"""Reads GPUs in a thread of its own, so that a slow driver does not block the event loop."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable
from typing import Any, Protocol

from router.domain.gpu import Gpu


class GpuReader(Protocol):
    """Reads all GPUs, blocking. Called from one thread at a time, and not after `close`."""

    def read(self) -> tuple[Gpu, ...]: ...

    def close(self) -> None: ...


class GpuReadTimeout(TimeoutError):
    """A reading missed its deadline. It continues in its thread, and the next `read` starts after it."""


_Job = tuple[Callable[[], Any], "asyncio.Future[Any]"]


class GpuPoller:
    """Runs a reader in one daemon thread, one reading at a time. Concurrent calls of `read` share a reading.

    A driver call that hangs blocks neither the event loop nor the exit of the program.
    """

    def __init__(self, reader: GpuReader, *, timeout_seconds: float = 5.0) -> None:
        self._reader = reader
        self._timeout_seconds = timeout_seconds
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._reading: asyncio.Future[Any] | None = None
        self._is_late = False
        """The current reading missed its deadline, so its result is of unknown age and is discarded."""
        self._closed = False
        self._thread: threading.Thread | None = None

    async def read(self) -> tuple[Gpu, ...]:
        """Returns the current state of all GPUs.

        Raises:
            GpuReadTimeout: the reading took longer than `timeout_seconds`.
            Exception: any error of the reader.
        """
        if self._closed:
            raise RuntimeError("the GPU poller is closed")
        if self._reading is not None and self._is_late:
            await self._wait_within_deadline(self._reading, "reading the GPUs")
            self._reading.exception()  # marks the error as retrieved; its caller already got a timeout
            self._is_late = False
        if self._reading is None or self._reading.done():
            self._reading = self._submit(self._reader.read)
        try:
            return await self._result_within_deadline(self._reading, "reading the GPUs")
        except GpuReadTimeout:
            self._is_late = True
            raise

    async def close(self) -> None:
        """Closes the reader once the current reading has ended.

        Raises:
            GpuReadTimeout: the deadline passed; the thread closes the reader later.
        """
        if self._closed:
            return
        self._closed = True
        closing = self._submit(self._reader.close)
        self._jobs.put(None)
        await self._result_within_deadline(closing, "closing the GPU reader")

    def _submit(self, job: Callable[[], Any]) -> asyncio.Future[Any]:
        if self._thread is None:
            self._thread = threading.Thread(target=_run_jobs, args=(self._jobs,), name="gpu-reader", daemon=True)
            self._thread.start()
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._jobs.put((job, future))
        return future

    async def _result_within_deadline(self, future: asyncio.Future[Any], operation: str) -> Any:
        await self._wait_within_deadline(future, operation)
        return future.result()

    async def _wait_within_deadline(self, future: asyncio.Future[Any], operation: str) -> None:
        done, _ = await asyncio.wait({future}, timeout=self._timeout_seconds)
        if not done:
            raise GpuReadTimeout(f"{operation} took longer than {self._timeout_seconds:g} s: the driver may be hanging")


def _run_jobs(jobs: queue.SimpleQueue[_Job | None]) -> None:
    while (job := jobs.get()) is not None:
        work, future = job
        try:
            _post(future, future.set_result, work())
        except Exception as error:  # nothing above this thread: the error goes to the waiting caller
            _post(future, future.set_exception, error)


def _post(future: asyncio.Future[Any], set_outcome: Callable[[Any], None], value: Any) -> None:
    def set_if_pending() -> None:
        if not future.done():
            set_outcome(value)

    loop = future.get_loop()
    if not loop.is_closed():
        loop.call_soon_threadsafe(set_if_pending)
