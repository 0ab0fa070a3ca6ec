"""The controller: what it starts, what it reports, and what it cancels at its end."""

from __future__ import annotations

import asyncio

import pytest

from router.domain.actions import Grant, Load, ReadGpus, Reject
from router.domain.events import Arrived, GpusRead, InstanceChanged, LoadFinished, Released, UnloadFinished
from router.domain.instance import InstanceName, InstanceState
from router.domain.policy import Policy, Rest, SchedulerConstants
from router.domain.residency import ResidencyState
from tests.control.stage import OTHER, SMALL, stage, turns
from tests.scheduler.builders import gpu, instance


async def test_a_load_is_sent_once_however_many_wait_for_it() -> None:
    async with stage() as on:
        tasks = [asyncio.ensure_future(on.use()) for _ in range(5)]
        await turns()
        assert [load.model for load in on.driver.loads] == [SMALL]
        on.driver.end_load()
        assert await asyncio.gather(*tasks) == ["gpu0"] * 5
        assert len(on.driver.loads) == 1


async def test_loads_of_different_models_run_at_the_same_time() -> None:
    async with stage() as on:
        tasks = [asyncio.ensure_future(on.use(of)) for of in (SMALL, OTHER)]
        await turns()
        assert len(on.driver.loads) == 2
        on.driver.end_load(at=1)
        assert await tasks[1] == "gpu0"
        assert not tasks[0].done()
        on.driver.end_load(at=0)
        assert await tasks[0] == "gpu0"


async def test_a_driver_that_raises_ends_the_load_and_not_the_controller(capsys: pytest.CaptureFixture[str]) -> None:
    async with stage(Policy(vram_margin_bytes=0, constants=SchedulerConstants(failure_memory_seconds=0.0))) as on:
        tickets: list[Grant | Reject] = []
        on.controller.submit(on.ticket(), tickets.append)
        await turns()
        on.driver.end_load(RuntimeError("a mistake in the driver"))
        await turns()
        (refused,) = tickets
        assert isinstance(refused, Reject)
        assert (refused.code, refused.message) == ("load_failed", "RuntimeError: a mistake in the driver")
        assert "load failed unexpectedly" in capsys.readouterr().out
        task = asyncio.ensure_future(on.use())
        await turns()
        on.driver.end_load()
        assert await task == "gpu0"


async def test_a_driver_that_raises_ends_the_unload_with_its_message(capsys: pytest.CaptureFixture[str]) -> None:
    async with stage(Policy(vram_margin_bytes=0, keep_alive_seconds=0.0)) as on:
        task = asyncio.ensure_future(on.use())
        await turns()
        on.driver.end_load()
        await task
        await turns()
        on.driver.end_unload(RuntimeError("no"))
        await turns()
        events = [event for event, _ in on.observer.seen if isinstance(event, UnloadFinished)]
        assert [event.error for event in events] == ["RuntimeError: no"]
        assert on.state(SMALL) is ResidencyState.UNLOADING
        capsys.readouterr()


async def test_an_observer_sees_every_event_with_its_actions_in_order() -> None:
    async with stage() as on:
        await on.load()
        kinds = [(type(event), [type(action) for action in actions]) for event, actions in on.observer.seen]
        assert kinds == [(Arrived, [Load]), (LoadFinished, [ReadGpus, Grant]), (Released, [])]


async def test_a_decision_is_delivered_once_and_not_after_a_cancel() -> None:
    async with stage() as on:
        told: list[Grant | Reject] = []
        kept, cancelled = on.ticket(), on.ticket()
        on.controller.submit(kept, told.append)
        on.controller.submit(cancelled, told.append)
        on.controller.cancel(cancelled.id)
        on.controller.cancel(cancelled.id)
        await turns()
        on.driver.end_load()
        await turns()
        assert [decision.ticket_id for decision in told] == [kept.id]
        on.controller.cancel(kept.id)
        assert on.taken() == 1
        on.controller.release(kept.id)
        assert on.taken() == 0


async def test_a_decision_may_come_before_submit_returns() -> None:
    async with stage() as on:
        await on.load()
        told: list[Grant | Reject] = []
        ticket = on.ticket()
        on.controller.submit(ticket, told.append)
        assert isinstance(told[0], Grant)
        on.controller.release(ticket.id)


async def test_ticket_numbers_are_never_given_twice() -> None:
    async with stage() as on:
        numbers = [on.controller.new_ticket_id() for _ in range(100)]
        assert numbers == sorted(set(numbers))


async def test_closing_the_controller_cancels_its_loads_and_unloads() -> None:
    async with stage(Policy(vram_margin_bytes=0, keep_alive_seconds=0.0)) as on:
        await_first = asyncio.ensure_future(on.use())
        await turns()
        on.driver.end_load()
        await await_first
        await turns()
        on.controller.submit(on.ticket(OTHER), lambda _: None)
        await turns()
    assert {type(work).__name__ for work in on.driver.cancelled} == {"Load", "Unload"}


async def test_time_alone_unloads_what_is_idle() -> None:
    async with stage(Policy(vram_margin_bytes=0, keep_alive_seconds=0.02)) as on:
        await on.load()
        assert on.driver.unloads == []
        assert await on.controller.until(lambda _: on.state(SMALL) is ResidencyState.UNLOADING, 10.0)
        await turns()
        on.driver.end_unload()
        await turns()
        assert on.driver.unloads[0].reason == "its keep_alive ended"


async def test_waiting_for_a_state_ends_with_it_or_with_the_deadline() -> None:
    async with stage() as on:
        assert await on.controller.until(lambda _: True, 0.0)
        assert not await on.controller.until(lambda _: False, 0.01)
        name = InstanceName("gpu0")
        waiting = asyncio.ensure_future(
            on.controller.until(lambda facts: facts.instances[name].state is InstanceState.DRAINING, 10.0)
        )
        await turns()
        on.controller.post(InstanceChanged(instance("gpu0", 0), InstanceState.DRAINING))
        assert await waiting


async def test_a_cancelled_wait_for_a_state_is_no_longer_checked() -> None:
    async with stage() as on:
        asked: list[float] = []
        waiting = asyncio.ensure_future(on.controller.until(lambda facts: bool(asked.append(facts.now)), 10.0))
        await turns()
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        before = len(asked)
        on.controller.post(InstanceChanged(instance("gpu0", 0), InstanceState.DRAINING))
        assert len(asked) == before


async def test_each_waiting_ticket_has_a_wait_estimate() -> None:
    async with stage(slots=1) as on:
        await on.load()
        held, first, second = (on.ticket() for _ in range(3))
        for ticket in (held, first, second):
            on.controller.submit(ticket, lambda _: None)
        assert on.controller.wait_estimate(held.id) is None
        assert [each.position for each in on.controller.wait_estimates().values()] == [1, 2]
        last = on.ticket()
        on.controller.submit(last, lambda _: None)
        found = on.controller.wait_estimate(last.id)
        assert found is not None
        assert (found.position, found.reason) == (3, "1 of 1 slots are in use on gpu0")
        on.controller.cancel(first.id)
        assert on.controller.wait_estimate(first.id) is None
        assert [(number, each.position) for number, each in on.controller.wait_estimates().items()] == [
            (second.id, 1),
            (last.id, 2),
        ]
        on.controller.release(held.id)
        assert on.controller.wait_estimate(second.id) is None


async def test_a_load_that_is_broken_off_is_cancelled_and_the_model_unloaded() -> None:
    rest = Rest(bytes_per_hour=1e18, pause_seconds=0.0, weight=0.0)
    slow = SchedulerConstants(load_bytes_per_second=1.0)  # every load takes longer than anybody wants to wait
    async with stage(Policy(vram_margin_bytes=0, rest=rest, constants=slow)) as on:
        await on.load(SMALL)
        for state in (InstanceState.BACKOFF, InstanceState.READY):  # its server loses the model
            on.controller.post(InstanceChanged(instance("gpu0", 0), state))
        on.controller.post(GpusRead((gpu(0, 1_500),), on.controller.now()))
        await turns()
        assert [load.model for load in on.driver.loads] == [SMALL, SMALL]
        task = asyncio.ensure_future(on.use(OTHER))
        await turns()
        assert on.driver.cancelled == [on.driver.loads[1]]
        assert [unload.model for unload in on.driver.unloads] == [SMALL]
        assert on.state(SMALL) is ResidencyState.UNLOADING
        task.cancel()
        await turns()
