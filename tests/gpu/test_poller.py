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
    """A reader that waits for leave to answer, and notes who called."""

    def __init__(self) -> None:
        self.leave = threading.Event()
        self.reads = 0
        self.threads: set[int] = set()
        self.closed = False
        self.error: Exception | None = None

    def read(self) -> tuple[Gpu, ...]:
        self.reads += 1
        self.threads.add(threading.get_ident())
        assert self.leave.wait(20)
        if self.error is not None:
            raise self.error
        return (gpu(self.reads),)

    def close(self) -> None:
        self.threads.add(threading.get_ident())
        self.closed = True


async def test_readings_share_one_thread_that_is_not_the_loops() -> None:
    reader = Reader()
    reader.leave.set()
    poller = GpuPoller(reader)
    assert [(await poller.read())[0].memory_used_bytes for _ in range(3)] == [1, 2, 3]
    await poller.close()
    assert reader.closed
    assert len(reader.threads) == 1
    assert threading.get_ident() not in reader.threads


async def test_the_loop_goes_on_while_a_driver_hangs_and_a_late_answer_is_not_taken_for_a_new_one() -> None:
    reader = Reader()
    poller = GpuPoller(reader, timeout_seconds=0.05)
    for _ in range(3):
        with pytest.raises(GpuReadTimeout, match=r"reading the GPUs took longer than 0\.05 s"):
            await poller.read()
    assert reader.reads == 1
    reader.leave.set()
    seen: list[int] = []

    async def answered() -> bool:
        with contextlib.suppress(GpuReadTimeout):
            seen.append((await poller.read())[0].memory_used_bytes)
        return bool(seen)

    await eventually(answered)
    assert seen[0] >= 2
    await poller.close()


async def test_a_late_failure_is_nobodys_and_the_next_reading_is_made() -> None:
    reader = Reader()
    reader.error = RuntimeError("the driver says no")
    poller = GpuPoller(reader, timeout_seconds=1.0)  # the second reading must end within it
    with pytest.raises(GpuReadTimeout):
        await poller.read()
    reader.leave.set()
    with pytest.raises(RuntimeError, match="the driver says no"):
        await poller.read()
    assert reader.reads == 2
    await poller.close()


async def test_two_who_ask_at_once_share_a_reading() -> None:
    reader = Reader()
    poller = GpuPoller(reader)
    async with asyncio.TaskGroup() as tasks:
        asked = [tasks.create_task(poller.read()) for _ in range(2)]
        await eventually(lambda: reader.reads == 1)
        reader.leave.set()
    assert [task.result()[0].memory_used_bytes for task in asked] == [1, 1]
    assert reader.reads == 1
    await poller.close()


async def test_who_leaves_takes_no_reading_from_the_others() -> None:
    reader = Reader()
    poller = GpuPoller(reader)
    async with asyncio.TaskGroup() as tasks:
        leaver, stayer = tasks.create_task(poller.read()), tasks.create_task(poller.read())
        await eventually(lambda: reader.reads == 1)
        leaver.cancel()
        reader.leave.set()
        assert (await stayer)[0].memory_used_bytes == 1
    await poller.close()


async def test_the_readers_error_reaches_whoever_reads_and_the_next_reading_works() -> None:
    reader = Reader()
    reader.leave.set()
    poller = GpuPoller(reader)
    reader.error = RuntimeError("the driver says no")
    with pytest.raises(RuntimeError, match="the driver says no"):
        await poller.read()
    reader.error = None
    assert len(await poller.read()) == 1
    await poller.close()


async def test_closing_waits_for_the_reading_under_way_only_up_to_the_deadline() -> None:
    reader = Reader()
    poller = GpuPoller(reader, timeout_seconds=0.05)
    with pytest.raises(GpuReadTimeout):
        await poller.read()
    with pytest.raises(GpuReadTimeout, match="closing"):
        await poller.close()
    with pytest.raises(RuntimeError, match="closed"):
        await poller.read()
    reader.leave.set()
    await eventually(lambda: reader.closed)
