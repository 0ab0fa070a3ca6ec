"""Reading GPUs without blocking the event loop: the reader's protocol, and the one thread that readings run in.

Knows neither NVML nor the emulated rig; decides nothing about what was read.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable
from typing import Any, Protocol

from router.domain.gpu import Gpu


class GpuReader(Protocol):
    """Reads all GPUs, blocking. Used from one thread at a time; not used after `close`."""

    def read(self) -> tuple[Gpu, ...]: ...

    def close(self) -> None: ...


class GpuReadTimeout(Exception):
    """The reading did not end by its deadline; it goes on in its thread, and the next `read` begins after that one."""


_Job = tuple[Callable[[], Any], "asyncio.Future[Any]"]


class GpuPoller:
    """Runs a reader in one daemon thread, one reading at a time.

    A driver call that hangs holds back neither the event loop nor the end of the program.
    """

    def __init__(self, reader: GpuReader, *, timeout_seconds: float = 5.0) -> None:
        self._reader = reader
        self._timeout_seconds = timeout_seconds
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._reading: asyncio.Future[Any] | None = None
        self._is_late = False
        """The reading under way outlasted its deadline: its figures will be of a time that nobody knows."""
        self._closed = False
        self._thread: threading.Thread | None = None

    async def read(self) -> tuple[Gpu, ...]:
        """The GPUs as they are now. Raises GpuReadTimeout after `timeout_seconds`, and whatever the reader raises."""
        if self._closed:
            raise RuntimeError("the GPU poller is closed")
        if self._reading is not None and self._is_late:
            await self._ended(self._reading, "reading the GPUs")
            self._reading.exception()  # whoever waited for it is gone
            self._is_late = False
        if self._reading is None or self._reading.done():
            self._reading = self._submit(self._reader.read)
        try:
            return await self._within_deadline(self._reading, "reading the GPUs")
        except GpuReadTimeout:
            self._is_late = True
            raise

    async def close(self) -> None:
        """Closes the reader after the reading under way, or leaves both to the thread at the deadline."""
        if self._closed:
            return
        self._closed = True
        closing = self._submit(self._reader.close)
        self._jobs.put(None)
        await self._within_deadline(closing, "closing the GPU reader")

    def _submit(self, job: Callable[[], Any]) -> asyncio.Future[Any]:
        if self._thread is None:
            self._thread = threading.Thread(target=_serve, args=(self._jobs,), name="gpu-reader", daemon=True)
            self._thread.start()
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._jobs.put((job, future))
        return future

    async def _within_deadline(self, future: asyncio.Future[Any], what: str) -> Any:
        await self._ended(future, what)
        return future.result()

    async def _ended(self, future: asyncio.Future[Any], what: str) -> None:
        done, _ = await asyncio.wait({future}, timeout=self._timeout_seconds)
        if not done:
            raise GpuReadTimeout(f"{what} took longer than {self._timeout_seconds:g} s: the driver may hang")


def _serve(jobs: queue.SimpleQueue[_Job | None]) -> None:
    while (job := jobs.get()) is not None:
        work, future = job
        try:
            _post(future, future.set_result, work())
        except Exception as error:  # the thread's outermost edge: the error goes to whoever awaits the reading
            _post(future, future.set_exception, error)


def _post(future: asyncio.Future[Any], settle: Callable[[Any], None], value: Any) -> None:
    def unless_settled() -> None:
        if not future.done():
            settle(value)

    loop = future.get_loop()
    if not loop.is_closed():
        loop.call_soon_threadsafe(unless_settled)
