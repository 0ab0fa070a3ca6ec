"""Supervised servers as real processes: ready, dead, hung, wrong, drained, stopped, and never left behind."""

from __future__ import annotations

import asyncio
import os
import signal

import pytest

from router.domain.events import InstanceChanged
from router.domain.instance import InstanceName, InstanceState
from router.domain.instance_lifecycle import RestartPolicy
from tests.supervisor.conftest import Fleet, MakeFleet, is_alive
from tests.support.waiting import eventually

S = InstanceState
A = InstanceName("a")
GPU, OTHER = "GPU-11111111-aaaa", "GPU-22222222-bbbb"
GIVES_UP_AT_ONCE = RestartPolicy(quick_deaths_max=1)


async def test_a_server_is_started_and_ready_when_it_answers(make_fleet: MakeFleet) -> None:
    async with make_fleet() as fleet:
        spec = fleet.add()
        ready = await fleet.reaches(S.READY)
        assert fleet.states() == [S.STARTING, S.READY]
        assert (ready.version, ready.reason, ready.spec) == ("1.2.3", "", spec)
        assert fleet.view().version == "1.2.3"
        assert is_alive(fleet.pid())


async def test_a_server_with_its_gpus_is_ready_however_it_names_them(make_fleet: MakeFleet) -> None:
    async with make_fleet() as fleet:
        fleet.add("a", gpus=(GPU, OTHER))
        fleet.add("b", "numbered", gpus=(GPU, OTHER))
        await fleet.reaches(S.READY, "a")
        await fleet.reaches(S.READY, "b")


@pytest.mark.parametrize("play", ["cpu", "onegpu"])
async def test_a_server_that_does_not_see_its_gpus_is_not_used(make_fleet: MakeFleet, play: str) -> None:
    # of some GPUs only the server may still report the others: that is waited for, long enough for a busy machine
    async with make_fleet(restart=GIVES_UP_AT_ONCE, start_timeout_seconds=5.0) as fleet:
        fleet.add("a", play, gpus=(GPU, OTHER))
        fatal = await fleet.reaches(S.FATAL)
        missing = f"{GPU}, {OTHER}" if play == "cpu" else OTHER
        seen = "cpu (cpu)" if play == "cpu" else f"{GPU} (CUDA)"
        assert f"does not see its GPUs {missing}: it reports {seen}" in fatal.reason
        assert S.READY not in fleet.states()


async def test_a_server_that_never_listens_is_given_up_at_the_deadline(make_fleet: MakeFleet) -> None:
    async with make_fleet(restart=GIVES_UP_AT_ONCE, start_timeout_seconds=0.5) as fleet:
        fleet.add(play="mute")
        fatal = await fleet.reaches(S.FATAL)
        assert "was not ready within 0.5 s" in fatal.reason


async def test_a_server_that_dies_is_started_again_after_a_wait_that_is_told(make_fleet: MakeFleet) -> None:
    async with make_fleet() as fleet:
        fleet.add(play="runner")
        await fleet.reaches(S.READY)
        runner = fleet.runner()
        os.kill(fleet.pid(), signal.SIGKILL)
        backoff = await fleet.reaches(S.BACKOFF)
        assert "died by signal 9; its last lines: listening" in backoff.reason
        assert backoff.reason.endswith("again in 1 s")
        assert backoff.version is None
        await eventually(lambda: fleet.clock.waits)
        assert fleet.supervisor.pid(A) is None
        assert not is_alive(runner)
        fleet.clock.advance(0.9)
        assert fleet.starts() == 1
        fleet.clock.advance(0.1)
        await fleet.reaches(S.READY)
        assert fleet.starts() == 2


async def test_waits_grow_and_after_quick_deaths_in_a_row_it_is_left_down_with_its_last_words(
    make_fleet: MakeFleet,
) -> None:
    async with make_fleet(restart=RestartPolicy(quick_deaths_max=4)) as fleet:
        fleet.add(play="exit3")
        waits: list[float] = []
        for _ in range(3):
            before = len(fleet.states())
            await eventually(lambda: fleet.clock.waits)
            waits += fleet.clock.waits
            fleet.clock.advance(waits[-1])
            await eventually(lambda length=before: len(fleet.states()) > length)
        fatal = await fleet.reaches(S.FATAL)
        assert waits == [1.0, 2.0, 4.0]
        assert fleet.states() == [S.STARTING, S.BACKOFF] * 3 + [S.STARTING, S.FATAL]
        assert fatal.reason == (
            "failed 4 times in a row and is left down; ended with exit code 3; "
            "its last lines: first line | Error: something is wrong"
        )
        assert fleet.clock.waits == []


async def test_a_long_life_makes_the_next_wait_short_again(make_fleet: MakeFleet) -> None:
    async with make_fleet(health_interval_seconds=1e9) as fleet:
        fleet.add()
        for lived, words in ((0.0, "again in 1 s"), (5.0, "again in 2 s"), (31.0, "again in 1 s")):
            await fleet.reaches(S.READY)
            fleet.clock.advance(lived)
            os.kill(fleet.pid(), signal.SIGKILL)
            assert (await fleet.reaches(S.BACKOFF)).reason.endswith(words)
            await fleet.end_backoff()
            await eventually(lambda: fleet.states()[-1] is S.READY)


async def test_a_program_that_is_not_there_is_told_plainly(make_fleet: MakeFleet) -> None:
    async with make_fleet(restart=GIVES_UP_AT_ONCE, command=("/nonexistent/ollama", "serve")) as fleet:
        fleet.add()
        fatal = await fleet.reaches(S.FATAL)
        assert "/nonexistent/ollama does not run" in fatal.reason
        assert "No such file or directory" in fatal.reason


async def test_a_line_without_an_end_is_among_the_last_words(make_fleet: MakeFleet) -> None:
    async with make_fleet(restart=GIVES_UP_AT_ONCE) as fleet:
        fleet.add(play="half")
        assert "an end without a newline" in (await fleet.reaches(S.FATAL)).reason


async def test_a_server_that_hangs_is_killed_and_started_again(make_fleet: MakeFleet) -> None:
    async with make_fleet(health_timeout_seconds=0.3, health_misses_max=2, health_interval_seconds=5.0) as fleet:
        fleet.add(play="runner")
        await fleet.reaches(S.READY)
        hung = (fleet.pid(), fleet.runner())
        (fleet.folder / "a" / "hang").touch()
        for _ in range(2):
            await eventually(lambda: fleet.clock.waits)
            fleet.clock.advance(5.0)
        backoff = await fleet.reaches(S.BACKOFF)
        assert "hangs: 2 health checks in a row failed, the last with:" in backoff.reason
        assert "does not answer within 0.3 s" in backoff.reason
        await eventually(lambda: fleet.supervisor.pid(A) is None)
        assert not any(is_alive(pid) for pid in hung)
        (fleet.folder / "a" / "hang").unlink()
        await fleet.end_backoff()
        await fleet.reaches(S.READY)


async def test_one_missed_health_check_is_no_failure(make_fleet: MakeFleet) -> None:
    async with make_fleet(health_misses_max=2, health_interval_seconds=5.0) as fleet:
        fleet.add()
        await fleet.reaches(S.READY)
        ill = fleet.folder / "a" / "ill"
        for _ in range(3):
            await eventually(lambda: fleet.clock.waits)
            ill.touch()
            fleet.clock.advance(5.0)
            await eventually(lambda: fleet.clock.waits)
            ill.unlink()
            fleet.clock.advance(5.0)
        await eventually(lambda: fleet.clock.waits)
        assert fleet.states() == [S.STARTING, S.READY]


# --- stopping ---------------------------------------------------------------------------------------------------


async def test_a_draining_server_keeps_running_until_it_is_stopped(make_fleet: MakeFleet) -> None:
    async with make_fleet() as fleet:
        fleet.add(play="runner")
        await fleet.reaches(S.READY)
        pids = (fleet.pid(), fleet.runner())
        fleet.supervisor.drain_all()
        await fleet.reaches(S.DRAINING)
        assert is_alive(pids[0])
        assert fleet.view().version == "1.2.3"
        await fleet.supervisor.stop_all()
        assert fleet.states()[-3:] == [S.DRAINING, S.STOPPING, S.STOPPED]
        assert not any(is_alive(pid) for pid in pids)


async def test_a_server_that_dies_while_it_drains_stays_down(make_fleet: MakeFleet) -> None:
    async with make_fleet() as fleet:
        fleet.add()
        await fleet.reaches(S.READY)
        fleet.supervisor.drain_all()
        await fleet.reaches(S.DRAINING)
        os.kill(fleet.pid(), signal.SIGKILL)
        await fleet.reaches(S.STOPPED)
        assert fleet.states()[-2:] == [S.DRAINING, S.STOPPED]
        assert fleet.starts() == 1


async def test_a_server_that_is_not_ready_yet_is_stopped_instead_of_drained(make_fleet: MakeFleet) -> None:
    async with make_fleet() as fleet:
        fleet.add(play="mute")
        await eventually(lambda: fleet.starts() == 1)
        fleet.supervisor.drain_all()
        await fleet.reaches(S.STOPPED)
        assert S.DRAINING not in fleet.states()


async def test_a_server_in_backoff_is_stopped_without_another_start(make_fleet: MakeFleet) -> None:
    async with make_fleet() as fleet:
        fleet.add(play="exit3")
        await fleet.reaches(S.BACKOFF)
        await fleet.supervisor.stop_all()
        assert fleet.states()[-1] is S.STOPPED
        assert fleet.starts() == 1


async def test_a_deaf_server_and_its_runner_are_killed_at_the_deadline(make_fleet: MakeFleet) -> None:
    async with make_fleet(stop_timeout_seconds=0.2) as fleet:
        fleet.add(play="deaf,runner")
        await fleet.reaches(S.READY)
        pids = (fleet.pid(), fleet.runner())
        await fleet.supervisor.stop_all()
        assert fleet.states()[-1] is S.STOPPED
        assert not any(is_alive(pid) for pid in pids)


async def test_a_second_signal_kills_without_waiting(make_fleet: MakeFleet) -> None:
    async with make_fleet(stop_timeout_seconds=60.0) as fleet:
        fleet.add(play="deaf,runner")
        await fleet.reaches(S.READY)
        pids = (fleet.pid(), fleet.runner())
        stopping = asyncio.ensure_future(fleet.supervisor.stop_all())
        await fleet.reaches(S.STOPPING)
        fleet.supervisor.kill_all()
        await stopping
        assert not any(is_alive(pid) for pid in pids)


async def test_a_cancelled_supervisor_leaves_no_process(make_fleet: MakeFleet) -> None:
    """As when the router fails elsewhere: the block ends by an error, not by a stop."""
    pids: list[int] = []
    with pytest.raises(ExceptionGroup) as failure:
        async with make_fleet() as fleet:
            fleet.add("a", "runner")
            fleet.add("b", "mute,runner")
            await fleet.reaches(S.READY)
            pids += [fleet.pid(), fleet.runner("a"), fleet.runner("b")]
            raise LookupError("elsewhere")
    assert failure.group_contains(LookupError)
    assert not any(is_alive(pid) for pid in pids)


# --- several and attached ---------------------------------------------------------------------------------------


async def test_one_servers_death_does_not_concern_the_others(make_fleet: MakeFleet) -> None:
    async with make_fleet() as fleet:
        fleet.add("a")
        fleet.add("b")
        await fleet.reaches(S.READY, "a")
        await fleet.reaches(S.READY, "b")
        os.kill(fleet.pid("a"), signal.SIGKILL)
        await fleet.reaches(S.BACKOFF, "a")
        assert fleet.states("b") == [S.STARTING, S.READY]
        assert is_alive(fleet.pid("b"))
        assert {view.spec.name: view.state for view in fleet.supervisor.views} == {"a": S.BACKOFF, "b": S.READY}


async def test_two_instances_of_one_name_are_refused(make_fleet: MakeFleet) -> None:
    async with make_fleet() as fleet:
        fleet.add()
        with pytest.raises(ValueError, match="there is an instance 'a' already"):
            fleet.add()
        with pytest.raises(KeyError):
            fleet.supervisor.retire(InstanceName("unknown"))


async def test_an_attached_server_is_followed_and_never_started_or_stopped(make_fleet: MakeFleet) -> None:
    async with make_fleet(health_misses_max=2, health_interval_seconds=5.0) as fleet:
        theirs = fleet.add("theirs")
        await fleet.reaches(S.READY, "theirs")
        attached = fleet.attach("ours", theirs.url)
        ready = await fleet.reaches(S.READY, "ours")
        assert (ready.version, ready.spec) == ("1.2.3", attached)
        assert fleet.supervisor.pid(InstanceName("ours")) is None
        (fleet.folder / "theirs" / "version").write_text("1.2.4")
        await fleet.beat(5.0, lambda: fleet.view("ours").version == "1.2.4")
        fleet.supervisor.kill_all()
        await fleet.reaches(S.STOPPED, "ours")
        assert fleet.states("ours")[:3] == [S.STARTING, S.READY, S.READY]


async def test_an_attached_server_that_goes_and_comes_back_is_used_again_and_never_given_up(
    make_fleet: MakeFleet,
) -> None:
    async with make_fleet(health_misses_max=2, health_interval_seconds=5.0) as fleet:
        theirs = fleet.add("theirs")
        await fleet.reaches(S.READY, "theirs")
        fleet.attach("ours", theirs.url)
        await fleet.reaches(S.READY, "ours")
        fleet.supervisor.retire(InstanceName("theirs"))
        await eventually(lambda: fleet.states("theirs")[-1] is S.STOPPED)
        await fleet.beat(5.0, lambda: fleet.states("ours")[-1] is S.BACKOFF)
        assert "the attached server does not answer" in (await fleet.reaches(S.BACKOFF, "ours")).reason
        fleet.supervisor.add(theirs)
        await fleet.reaches(S.READY, "theirs")
        await fleet.beat(5.0, lambda: fleet.states("ours")[-1] is S.READY)
        assert fleet.states("ours") == [S.STARTING, S.READY, S.BACKOFF, S.READY]


async def test_a_retired_server_may_be_asked_for_again_by_whoever_is_told_of_its_end(make_fleet: MakeFleet) -> None:
    """As the engine does, which may need the very same GPUs again in the moment in which it hears of it."""
    fleets: list[Fleet] = []
    wanted = 1

    def again(change: InstanceChanged) -> None:
        nonlocal wanted
        if change.state is S.STOPPED and wanted:
            wanted -= 1
            fleets[0].supervisor.add(change.spec)

    async with make_fleet(also=again) as fleet:
        fleets.append(fleet)
        spec = fleet.add()
        await fleet.reaches(S.READY)
        first = fleet.pid()
        with pytest.raises(ValueError, match="there is an instance 'a' already"):
            fleet.supervisor.add(spec)
        fleet.supervisor.retire(A)
        fleet.supervisor.retire(A)
        await eventually(lambda: fleet.states().count(S.READY) == 2)
        assert fleet.states() == [S.STARTING, S.READY, S.STOPPING, S.STOPPED, S.STARTING, S.READY]
        assert fleet.pid() != first
        fleet.supervisor.retire(A)
        await eventually(lambda: not fleet.supervisor.views)


async def test_what_cannot_be_tried_is_told_as_fatal_until_it_is_retired(make_fleet: MakeFleet) -> None:
    async with make_fleet() as fleet:
        spec = fleet.spec()
        fleet.supervisor.refuse(spec, "no port for it")
        assert fleet.changes == []
        await eventually(lambda: bool(fleet.changes))
        assert fleet.changes == [InstanceChanged(spec, S.FATAL, "no port for it")]
        fleet.supervisor.retire(A)
        await eventually(lambda: len(fleet.changes) == 2)
        assert fleet.states() == [S.FATAL, S.STOPPED]
        fleet.supervisor.add(spec)
        await fleet.reaches(S.READY)
