"""Supervised servers as real processes: start, failure, restart, drain and stop, without leaving any process behind."""

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
FATAL_AT_FIRST_FAILURE = RestartPolicy(quick_deaths_max=1)


async def test_a_server_is_ready_once_it_answers(make_fleet: MakeFleet) -> None:
    async with make_fleet() as fleet:
        spec = fleet.add()
        ready = await fleet.reaches(S.READY)
        assert fleet.states() == [S.STARTING, S.READY]
        assert (ready.version, ready.reason, ready.spec) == ("1.2.3", "", spec)
        assert fleet.view().version == "1.2.3"
        assert is_alive(fleet.pid())


async def test_gpus_reported_by_uuid_or_by_number_make_a_server_ready(make_fleet: MakeFleet) -> None:
    async with make_fleet() as fleet:
        fleet.add("a", gpus=(GPU, OTHER))
        fleet.add("b", "numbered", gpus=(GPU, OTHER))
        await fleet.reaches(S.READY, "a")
        await fleet.reaches(S.READY, "b")


@pytest.mark.parametrize("play", ["cpu", "onegpu"])
async def test_a_server_that_does_not_see_its_gpus_never_becomes_ready(make_fleet: MakeFleet, play: str) -> None:
    # A server may report its GPUs one by one, so it is given time for the rest: enough on a busy machine.
    async with make_fleet(restart=FATAL_AT_FIRST_FAILURE, start_timeout_seconds=5.0) as fleet:
        fleet.add("a", play, gpus=(GPU, OTHER))
        fatal = await fleet.reaches(S.FATAL)
        missing = f"{GPU}, {OTHER}" if play == "cpu" else OTHER
        reported = "cpu (cpu)" if play == "cpu" else f"{GPU} (CUDA)"
        assert f"does not see its GPUs {missing}: it reports {reported}" in fatal.reason
        assert S.READY not in fleet.states()


async def test_a_server_that_never_listens_fails_at_the_start_timeout(make_fleet: MakeFleet) -> None:
    async with make_fleet(restart=FATAL_AT_FIRST_FAILURE, start_timeout_seconds=0.5) as fleet:
        fleet.add(play="mute")
        fatal = await fleet.reaches(S.FATAL)
        assert "was not ready within 0.5 s" in fatal.reason


async def test_a_killed_server_is_restarted_after_the_wait_that_its_reason_states(make_fleet: MakeFleet) -> None:
    async with make_fleet() as fleet:
        fleet.add(play="runner")
        await fleet.reaches(S.READY)
        runner = fleet.runner()
        os.kill(fleet.pid(), signal.SIGKILL)
        backoff = await fleet.reaches(S.BACKOFF)
        assert "was killed by signal 9; last lines: listening" in backoff.reason
        assert backoff.reason.endswith("restart in 1 s")
        assert backoff.version is None
        await eventually(lambda: fleet.clock.waits)
        assert fleet.supervisor.pid(A) is None
        assert not is_alive(runner)
        fleet.clock.advance(0.9)
        assert fleet.starts() == 1
        fleet.clock.advance(0.1)
        await fleet.reaches(S.READY)
        assert fleet.starts() == 2


async def test_waits_grow_until_repeated_quick_failures_are_fatal_with_the_last_lines(
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
            "failed 4 times in a row and is not restarted; exited with code 3; "
            "last lines: first line | Error: something is wrong"
        )
        assert fleet.clock.waits == []


async def test_a_long_uptime_resets_the_wait(make_fleet: MakeFleet) -> None:
    async with make_fleet(health_interval_seconds=1e9) as fleet:
        fleet.add()
        for uptime, reason_end in ((0.0, "restart in 1 s"), (5.0, "restart in 2 s"), (31.0, "restart in 1 s")):
            await fleet.reaches(S.READY)
            fleet.clock.advance(uptime)
            os.kill(fleet.pid(), signal.SIGKILL)
            assert (await fleet.reaches(S.BACKOFF)).reason.endswith(reason_end)
            await fleet.end_backoff()
            await eventually(lambda: fleet.states()[-1] is S.READY)


async def test_a_missing_program_is_named_in_the_reason(make_fleet: MakeFleet) -> None:
    async with make_fleet(restart=FATAL_AT_FIRST_FAILURE, command=("/nonexistent/ollama", "serve")) as fleet:
        fleet.add()
        fatal = await fleet.reaches(S.FATAL)
        assert "/nonexistent/ollama cannot be executed" in fatal.reason
        assert "No such file or directory" in fatal.reason


async def test_an_unterminated_line_is_among_the_last_lines(make_fleet: MakeFleet) -> None:
    async with make_fleet(restart=FATAL_AT_FIRST_FAILURE) as fleet:
        fleet.add(play="half")
        assert "an end without a newline" in (await fleet.reaches(S.FATAL)).reason


async def test_a_hanging_server_is_killed_and_restarted(make_fleet: MakeFleet) -> None:
    async with make_fleet(health_timeout_seconds=0.3, health_misses_max=2, health_interval_seconds=5.0) as fleet:
        fleet.add(play="runner")
        await fleet.reaches(S.READY)
        hung_pids = (fleet.pid(), fleet.runner())
        (fleet.folder / "a" / "hang").touch()
        for _ in range(2):
            await eventually(lambda: fleet.clock.waits)
            fleet.clock.advance(5.0)
        backoff = await fleet.reaches(S.BACKOFF)
        assert "hangs: 2 health checks in a row failed; the last one:" in backoff.reason
        assert "does not answer within 0.3 s" in backoff.reason
        await eventually(lambda: fleet.supervisor.pid(A) is None)
        assert not any(is_alive(pid) for pid in hung_pids)
        (fleet.folder / "a" / "hang").unlink()
        await fleet.end_backoff()
        await fleet.reaches(S.READY)


async def test_a_server_that_loads_a_model_is_not_killed_by_a_probe(make_fleet: MakeFleet) -> None:
    loading = {"a"}
    async with make_fleet(
        is_loading=loading.__contains__, health_timeout_seconds=0.3, health_misses_max=2, health_interval_seconds=5.0
    ) as fleet:
        fleet.add()
        await fleet.reaches(S.READY)
        (fleet.folder / "a" / "hang").touch()
        for _ in range(4):
            await eventually(lambda: fleet.clock.waits)
            fleet.clock.advance(5.0)
        await eventually(lambda: fleet.clock.waits)
        assert fleet.states() == [S.STARTING, S.READY]
        loading.clear()
        fleet.clock.advance(5.0)
        await fleet.reaches(S.BACKOFF)


async def test_a_single_failed_health_check_is_not_a_failure(make_fleet: MakeFleet) -> None:
    async with make_fleet(health_misses_max=2, health_interval_seconds=5.0) as fleet:
        fleet.add()
        await fleet.reaches(S.READY)
        fail_marker = fleet.folder / "a" / "ill"
        for _ in range(3):
            await eventually(lambda: fleet.clock.waits)
            fail_marker.touch()
            fleet.clock.advance(5.0)
            await eventually(lambda: fleet.clock.waits)
            fail_marker.unlink()
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


async def test_a_server_that_dies_while_draining_is_not_restarted(make_fleet: MakeFleet) -> None:
    async with make_fleet() as fleet:
        fleet.add()
        await fleet.reaches(S.READY)
        fleet.supervisor.drain_all()
        await fleet.reaches(S.DRAINING)
        os.kill(fleet.pid(), signal.SIGKILL)
        await fleet.reaches(S.STOPPED)
        assert fleet.states()[-2:] == [S.DRAINING, S.STOPPED]
        assert fleet.starts() == 1


async def test_draining_a_server_that_is_not_ready_stops_it(make_fleet: MakeFleet) -> None:
    async with make_fleet() as fleet:
        fleet.add(play="mute")
        await eventually(lambda: fleet.starts() == 1)
        fleet.supervisor.drain_all()
        await fleet.reaches(S.STOPPED)
        assert S.DRAINING not in fleet.states()


async def test_a_server_in_backoff_stops_without_another_start(make_fleet: MakeFleet) -> None:
    async with make_fleet() as fleet:
        fleet.add(play="exit3")
        await fleet.reaches(S.BACKOFF)
        await fleet.supervisor.stop_all()
        assert fleet.states()[-1] is S.STOPPED
        assert fleet.starts() == 1


async def test_a_server_that_ignores_sigterm_is_killed_with_its_runner_at_the_stop_timeout(
    make_fleet: MakeFleet,
) -> None:
    async with make_fleet(stop_timeout_seconds=0.2) as fleet:
        fleet.add(play="deaf,runner")
        await fleet.reaches(S.READY)
        pids = (fleet.pid(), fleet.runner())
        await fleet.supervisor.stop_all()
        assert fleet.states()[-1] is S.STOPPED
        assert not any(is_alive(pid) for pid in pids)


async def test_kill_all_kills_without_waiting_for_the_stop_timeout(make_fleet: MakeFleet) -> None:
    async with make_fleet(stop_timeout_seconds=60.0) as fleet:
        fleet.add(play="deaf,runner")
        await fleet.reaches(S.READY)
        pids = (fleet.pid(), fleet.runner())
        stopping = asyncio.ensure_future(fleet.supervisor.stop_all())
        await fleet.reaches(S.STOPPING)
        fleet.supervisor.kill_all()
        await stopping
        assert not any(is_alive(pid) for pid in pids)


async def test_a_cancelled_supervisor_leaves_no_process_behind(make_fleet: MakeFleet) -> None:
    """As when another part of the router fails: the block ends by an error, not by `stop_all`."""
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


async def test_one_servers_death_does_not_affect_the_others(make_fleet: MakeFleet) -> None:
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


async def test_a_second_instance_of_the_same_name_is_an_error(make_fleet: MakeFleet) -> None:
    async with make_fleet() as fleet:
        fleet.add()
        with pytest.raises(ValueError, match="there is an instance 'a' already"):
            fleet.add()
        with pytest.raises(KeyError):
            fleet.supervisor.retire(InstanceName("unknown"))


async def test_an_attached_server_is_watched_but_never_started_or_stopped(make_fleet: MakeFleet) -> None:
    async with make_fleet(health_misses_max=2, health_interval_seconds=5.0) as fleet:
        theirs = fleet.add("theirs")
        await fleet.reaches(S.READY, "theirs")
        attached = fleet.attach("ours", theirs.url)
        ready = await fleet.reaches(S.READY, "ours")
        assert (ready.version, ready.spec) == ("1.2.3", attached)
        assert fleet.supervisor.pid(InstanceName("ours")) is None
        (fleet.folder / "theirs" / "version").write_text("1.2.4")
        await fleet.advance_until(5.0, lambda: fleet.view("ours").version == "1.2.4")
        fleet.supervisor.kill_all()
        await fleet.reaches(S.STOPPED, "ours")
        assert fleet.states("ours")[:3] == [S.STARTING, S.READY, S.READY]


async def test_an_attached_server_that_goes_away_and_returns_is_used_again(
    make_fleet: MakeFleet,
) -> None:
    async with make_fleet(health_misses_max=2, health_interval_seconds=5.0) as fleet:
        theirs = fleet.add("theirs")
        await fleet.reaches(S.READY, "theirs")
        fleet.attach("ours", theirs.url)
        await fleet.reaches(S.READY, "ours")
        fleet.supervisor.retire(InstanceName("theirs"))
        await eventually(lambda: fleet.states("theirs")[-1] is S.STOPPED)
        await fleet.advance_until(5.0, lambda: fleet.states("ours")[-1] is S.BACKOFF)
        assert "the attached server does not answer" in (await fleet.reaches(S.BACKOFF, "ours")).reason
        fleet.supervisor.add(theirs)
        await fleet.reaches(S.READY, "theirs")
        await fleet.advance_until(5.0, lambda: fleet.states("ours")[-1] is S.READY)
        assert list(dict.fromkeys(fleet.states("ours")[1:-1])) == [S.READY, S.BACKOFF]  # its reason may change


async def test_the_reason_of_an_attached_server_that_is_away_is_the_latest(make_fleet: MakeFleet) -> None:
    async with make_fleet(health_misses_max=1, health_interval_seconds=5.0) as fleet:
        theirs = fleet.add("theirs")
        await fleet.reaches(S.READY, "theirs")
        fleet.attach("ours", theirs.url)
        await fleet.reaches(S.READY, "ours")
        ill = fleet.folder / "theirs" / "ill"
        ill.touch()
        await fleet.advance_until(5.0, lambda: "answers 500" in fleet.view("ours").reason)
        fleet.supervisor.retire(InstanceName("theirs"))
        await eventually(lambda: fleet.states("theirs")[-1] is S.STOPPED)
        await fleet.advance_until(5.0, lambda: "answers 500" not in fleet.view("ours").reason)
        assert fleet.view("ours").state is S.BACKOFF


async def test_a_retired_instance_can_be_added_again_from_its_stopped_notification(make_fleet: MakeFleet) -> None:
    """As the controller does, which may need the same GPUs again at once."""
    fleets: list[Fleet] = []
    remaining_adds = 1

    def add_again(change: InstanceChanged) -> None:
        nonlocal remaining_adds
        if change.state is S.STOPPED and remaining_adds:
            remaining_adds -= 1
            fleets[0].supervisor.add(change.spec)

    async with make_fleet(also=add_again) as fleet:
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


async def test_a_refused_instance_is_fatal_until_it_is_retired(make_fleet: MakeFleet) -> None:
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
