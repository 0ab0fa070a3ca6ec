"""GPUs are read in one thread, one reading at a time, and a driver that hangs holds nothing up."""

from __future__ import annotations

import asyncio
import contextlib
import threading

import pytest

from router.domain.gpu import Gpu, GpuUuid
from router.gpu.poller import GpuPoller, GpuReadTimeout
from tests.support.waiting import eventually


def gpu(used: int = 0) -> Gpu:
    return Gpu(GpuUuid("GPU-a"), 0, "gpu", 100, 100 - used, used)


class Reader:
    """A reader that blocks until `may_return` is set, and records the calling threads."""

    def __init__(self) -> None:
        self.may_return = threading.Event()
        self.reads = 0
        self.threads: set[int] = set()
        self.closed = False
        self.error: Exception | None = None

    def read(self) -> tuple[Gpu, ...]:
        self.reads += 1
        self.threads.add(threading.get_ident())
        assert self.may_return.wait(20)
        if self.error is not None:
            raise self.error
        return (gpu(self.reads),)

    def close(self) -> None:
        self.threads.add(threading.get_ident())
        self.closed = True


async def test_all_readings_run_in_one_thread_other_than_the_event_loops() -> None:
    reader = Reader()
    reader.may_return.set()
    poller = GpuPoller(reader)
    assert [(await poller.read())[0].memory_used_bytes for _ in range(3)] == [1, 2, 3]
    await poller.close()
    assert reader.closed
    assert len(reader.threads) == 1
    assert threading.get_ident() not in reader.threads


async def test_a_hanging_driver_does_not_block_the_loop_and_a_late_reading_is_discarded() -> None:
    reader = Reader()
    poller = GpuPoller(reader, timeout_seconds=0.05)
    for _ in range(3):
        with pytest.raises(GpuReadTimeout, match=r"reading the GPUs took longer than 0\.05 s"):
            await poller.read()
    assert reader.reads == 1
    reader.may_return.set()
    readings: list[int] = []

    async def answered() -> bool:
        with contextlib.suppress(GpuReadTimeout):
            readings.append((await poller.read())[0].memory_used_bytes)
        return bool(readings)

    await eventually(answered)
    assert readings[0] >= 2
    await poller.close()


async def test_a_late_error_is_discarded_and_the_next_reading_is_made() -> None:
    reader = Reader()
    reader.error = RuntimeError("the driver says no")
    poller = GpuPoller(reader, timeout_seconds=1.0)  # the second reading must end within it
    with pytest.raises(GpuReadTimeout):
        await poller.read()
    reader.may_return.set()
    with pytest.raises(RuntimeError, match="the driver says no"):
        await poller.read()
    assert reader.reads == 2
    await poller.close()


async def test_concurrent_reads_share_a_reading() -> None:
    reader = Reader()
    poller = GpuPoller(reader)
    async with asyncio.TaskGroup() as tasks:
        reads = [tasks.create_task(poller.read()) for _ in range(2)]
        await eventually(lambda: reader.reads == 1)
        reader.may_return.set()
    assert [task.result()[0].memory_used_bytes for task in reads] == [1, 1]
    assert reader.reads == 1
    await poller.close()


async def test_a_cancelled_read_does_not_cancel_the_shared_reading() -> None:
    reader = Reader()
    poller = GpuPoller(reader)
    async with asyncio.TaskGroup() as tasks:
        cancelled, kept = tasks.create_task(poller.read()), tasks.create_task(poller.read())
        await eventually(lambda: reader.reads == 1)
        cancelled.cancel()
        reader.may_return.set()
        assert (await kept)[0].memory_used_bytes == 1
    await poller.close()


async def test_the_readers_error_reaches_the_caller_and_the_next_reading_works() -> None:
    reader = Reader()
    reader.may_return.set()
    poller = GpuPoller(reader)
    reader.error = RuntimeError("the driver says no")
    with pytest.raises(RuntimeError, match="the driver says no"):
        await poller.read()
    reader.error = None
    assert len(await poller.read()) == 1
    await poller.close()


async def test_close_waits_for_the_current_reading_until_the_deadline() -> None:
    reader = Reader()
    poller = GpuPoller(reader, timeout_seconds=0.05)
    with pytest.raises(GpuReadTimeout):
        await poller.read()
    with pytest.raises(GpuReadTimeout, match="closing"):
        await poller.close()
    with pytest.raises(RuntimeError, match="closed"):
        await poller.read()
    reader.may_return.set()
    await eventually(lambda: reader.closed)
