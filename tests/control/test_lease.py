"""A slot is released exactly once, however its request ends."""

from __future__ import annotations

import asyncio
import contextlib

import pytest

from router.domain.events import LoadFailed
from router.domain.policy import Policy, SchedulerConstants
from router.errors import InstanceLost, ModelTooLarge, QueueFull, WaitTimeout
from router.errors import LoadFailed as LoadFailedError
from tests.control.stage import OTHER, SMALL, Stage, stage, turns
from tests.scheduler.builders import model


async def _hold(on: Stage, until: asyncio.Event) -> None:
    async with on.slot():
        await until.wait()


async def test_a_slot_is_held_inside_the_block_and_released_after_it() -> None:
    async with stage() as on:
        await on.load()
        async with on.slot() as grant:
            assert (grant.instance, grant.url, on.taken()) == ("gpu0", "http://127.0.0.1/gpu0", 1)
        assert on.taken() == 0


async def test_an_error_inside_the_block_releases_the_slot_and_propagates() -> None:
    async with stage() as on:
        await on.load()
        with pytest.raises(InstanceLost, match="gone"):
            async with on.slot():
                raise InstanceLost("gone")
        assert on.taken() == 0


async def test_a_rejection_raises_the_error_for_the_client() -> None:
    async with stage(Policy(vram_margin_bytes=0, constants=SchedulerConstants(settle_seconds=0.0))) as on:
        with pytest.raises(ModelTooLarge, match="fits nowhere") as refusal:
            await on.use(model("huge", 100_000))
        assert refusal.value.status == 422
        assert on.controller.waiting() == ()


async def test_a_failed_load_has_the_servers_status() -> None:
    async with stage() as on:
        task = asyncio.ensure_future(on.use())
        await turns()
        on.driver.end_load(LoadFailed(on.driver.loads[0].load_id, 500, "cudaMalloc failed"))
        with pytest.raises(LoadFailedError, match="cudaMalloc failed") as refusal:
            await task
        assert refusal.value.status == 500


async def test_a_full_queue_error_has_a_retry_time() -> None:
    async with stage(Policy(vram_margin_bytes=0, queue_limit=1)) as on:
        waiting = asyncio.ensure_future(on.use())
        await turns()
        with pytest.raises(QueueFull) as refusal:
            await on.use()
        assert refusal.value.retry_after_seconds == 1
        on.driver.end_load()
        assert await waiting == "gpu0"


async def test_a_deadline_ends_the_wait_by_itself() -> None:
    async with stage() as on:
        with pytest.raises(WaitTimeout, match="for model 'small': gpu0"):
            async with on.slot(ttft_target_seconds=0.02):
                raise AssertionError("it was granted")
        assert on.controller.waiting() == ()


async def test_a_runner_that_died_under_a_request_is_reported_with_the_slot() -> None:
    async with stage() as on:
        await on.load()
        async with on.slot(runner_lost=True):
            pass
        await turns()
        assert [unload.reason for unload in on.driver.unloads] == ["its runner died or hangs"]


async def test_a_client_that_disconnects_leaves_the_queue_and_the_load_continues() -> None:
    async with stage() as on:
        task = asyncio.ensure_future(on.use())
        await turns()
        assert len(on.controller.waiting()) == 1
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert on.controller.waiting() == ()
        assert on.driver.cancelled == []
        on.driver.end_load()
        await turns()
        assert await on.use() == "gpu0"
        assert len(on.driver.loads) == 1


async def test_a_grant_after_the_disconnect_in_the_same_turn_is_released() -> None:
    async with stage(slots=1) as on:
        await on.load()
        done = asyncio.Event()
        first = asyncio.ensure_future(_hold(on, done))
        await turns()
        second = asyncio.ensure_future(_hold(on, done))
        await turns()
        assert (on.taken(), len(on.controller.waiting())) == (1, 1)
        second.cancel()
        first.cancel()
        # Nothing has run since: both learn of it in the next turn, the first of them gives its slot to the second.
        await asyncio.gather(first, second, return_exceptions=True)
        assert (on.taken(), on.controller.waiting()) == (0, ())
        assert await on.use() == "gpu0"


async def test_a_grant_before_the_disconnect_in_the_same_turn_is_released() -> None:
    async with stage(slots=1) as on:
        await on.load()
        ticket = on.ticket()
        on.controller.submit(ticket, lambda _: None)
        second = asyncio.ensure_future(on.use())
        await turns()
        assert len(on.controller.waiting()) == 1
        on.controller.release(ticket.id)
        second.cancel()
        with pytest.raises(asyncio.CancelledError):
            await second
        assert (on.taken(), on.controller.waiting()) == (0, ())


async def test_a_grant_before_the_disconnect_is_noticed_is_released() -> None:
    async with stage(slots=1) as on:
        await on.load()
        ticket = on.ticket()
        on.controller.submit(ticket, lambda _: None)
        second = asyncio.ensure_future(on.use())
        await turns()
        second.cancel()
        on.controller.release(ticket.id)
        with pytest.raises(asyncio.CancelledError):
            await second
        assert (on.taken(), on.controller.waiting()) == (0, ())
        assert await on.use() == "gpu0"


async def test_a_rejection_before_the_disconnect_is_noticed_is_harmless() -> None:
    async with stage() as on:
        task = asyncio.ensure_future(on.use())
        await turns()
        task.cancel()
        on.controller.begin_shutdown()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert on.controller.waiting() == ()


@pytest.mark.parametrize("loaded_after", range(9))
@pytest.mark.parametrize("cancelled_after", range(12))
async def test_cancelled_at_any_moment_nothing_stays_taken(cancelled_after: int, loaded_after: int) -> None:
    """The load ends in one turn of the event loop, the client leaves in another, before or after."""
    async with stage(slots=1) as on:
        tasks = [asyncio.ensure_future(on.use()), asyncio.ensure_future(on.use(OTHER)), asyncio.ensure_future(on.use())]
        for turn in range(14):
            if turn == loaded_after + 2:
                on.driver.end_load(at=0)
            if turn == cancelled_after:
                for task in tasks[:2]:
                    task.cancel()
            await asyncio.sleep(0)
        for task in tasks[:2]:
            with contextlib.suppress(asyncio.CancelledError):
                await task
        assert await tasks[2] == "gpu0"
        assert (on.taken(), on.controller.waiting()) == (0, ())
        assert len([load for load in on.driver.loads if load.model == SMALL]) == 1
