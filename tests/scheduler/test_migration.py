"""Models move to other GPUs instead of only being unloaded: for a plan, or because of external VRAM."""

from __future__ import annotations

from dataclasses import replace

from router.domain.actions import UnloadCause
from router.domain.gpu import GpuUuid
from router.domain.policy import Pin, Policy, SchedulerConstants
from router.domain.request import TicketId
from router.domain.residency import ResidencyState
from router.scheduler.placement.migration import short_gpus
from tests.scheduler.builders import gpu, gpu_id, instance, snapshot, view
from tests.scheduler.play import Play, sized

PAIR, MUCH, LITTLE, SMALL = sized("pair", 40), sized("much", 10), sized("little", 10), sized("small", 6)
POLICY = Policy(vram_margin_bytes=0, instances_on_demand=True, on_demand_like=instance("", slots=2))
CAREFUL = replace(POLICY, vram_margin_bytes=2)


def _served(play: Play, ticket: TicketId) -> TicketId:
    for _ in range(3):
        play.bring_up()
        play.work_through()
    play.release(ticket)
    return ticket


def _ask(play: Play, model: object, times: int) -> None:
    for _ in range(times):
        _served(play, play.arrive(model))  # type: ignore[arg-type]


def _go_on(play: Play, times: int) -> None:
    """Reads the GPUs every five seconds and carries out all actions."""
    for _ in range(times):
        play.now += 5.0
        play.read_gpus()
        play.bring_up()
        play.work_through()


def _homes(play: Play, model: object) -> set[GpuUuid]:
    facts = play.snapshot()
    found = [r for r in facts.residencies.values() if r.model == model and r.state is ResidencyState.READY]
    return {gpu for r in found for gpu in facts.instances[r.instance].spec.gpus}


def test_a_model_evicted_by_a_large_one_moves_to_a_gpu_with_room() -> None:
    three = Play(3, POLICY).begin()
    for model in (MUCH, LITTLE, SMALL):
        _ask(three, model, 3)
    before = _homes(three, SMALL) | _homes(three, LITTLE) | _homes(three, MUCH)
    assert before == {gpu_id(0), gpu_id(1), gpu_id(2)}
    three.advance(1.0)
    ticket = three.arrive(PAIR)
    three.advance(61.0)
    for _ in range(4):
        three.bring_up()
        three.work_through()
    pair = set(three.snapshot().instances[three.grant(ticket).instance].spec.gpus)
    (left,) = {gpu_id(0), gpu_id(1), gpu_id(2)} - pair
    moved = [model for model in (MUCH, LITTLE, SMALL) if _homes(three, model) == {left}]
    assert len(moved) >= 2
    assert sorted(three.unload_causes) == [UnloadCause.EVICTED, UnloadCause.MOVED]  # one had room beside the third


def test_a_model_without_demand_is_unloaded_without_another_replica() -> None:
    three = Play(3, replace(POLICY, constants=SchedulerConstants(demand_half_life_seconds=1.0))).begin()
    for model in (MUCH, LITTLE, SMALL):
        _ask(three, model, 1)
    three.advance(600.0)
    sent = three.loads_sent
    ticket = three.arrive(PAIR)
    for _ in range(4):
        three.bring_up()
        three.work_through()
    three.grant(ticket)
    assert three.loads_sent == sent + 1
    assert three.unload_causes[-2:] == [UnloadCause.EVICTED, UnloadCause.EVICTED]


def test_external_vram_moves_a_model_without_interrupting_its_service() -> None:
    two = Play(2, CAREFUL).begin()
    _ask(two, MUCH, 3)
    (home,) = _homes(two, MUCH)
    two.external[home] = 14
    two.advance(5.0)
    for _ in range(4):
        two.read_gpus()
        two.bring_up()
        for load in list(two.loads):
            two.finish_load(load)
        assert _homes(two, MUCH)
        two.now += 2.0
    two.now += 5.0
    two.read_gpus()
    two.work_through()
    assert _homes(two, MUCH) == {gpu_id(0), gpu_id(1)} - {home}


def test_a_busy_model_moves_when_its_request_has_ended() -> None:
    two = Play(2, CAREFUL).begin()
    _ask(two, MUCH, 3)
    running = two.arrive(MUCH)
    (home,) = _homes(two, MUCH)
    two.external[home] = 14
    _go_on(two, 4)
    assert _homes(two, MUCH) == {gpu_id(0), gpu_id(1)}
    two.release(running)
    _go_on(two, 1)
    assert _homes(two, MUCH) == {gpu_id(0), gpu_id(1)} - {home}
    assert two.unload_causes == [UnloadCause.MOVED]


def test_without_room_a_model_in_demand_stays_and_others_are_unloaded() -> None:
    one = Play(1, CAREFUL).begin()
    _ask(one, MUCH, 3)
    one.external[gpu_id(0)] = 14
    one.now += 5.0
    one.read_gpus()
    assert _homes(one, MUCH) == {gpu_id(0)}
    one.now += 100_000.0
    one.read_gpus()
    one.work_through()
    assert not _homes(one, MUCH)
    assert one.unload_causes == [UnloadCause.EVICTED]


def test_a_model_that_is_pinned_stays_where_it_is() -> None:
    pins = {MUCH.name: Pin(keep_warm=True)}
    two = Play(2, replace(CAREFUL, pins=pins)).begin()
    _ask(two, MUCH, 1)
    before = _homes(two, MUCH)
    two.external[next(iter(before))] = 14  # type: ignore[index]
    _go_on(two, 3)
    assert _homes(two, MUCH) == before


def test_small_external_use_moves_nothing() -> None:
    two = Play(2, CAREFUL).begin()
    _ask(two, sized("brim", 21), 3)
    sent = two.loads_sent
    two.external = dict.fromkeys(two.external, 3)
    two.now += 5.0
    two.read_gpus()
    assert two.loads_sent == sent
    assert two.starting == []


def test_what_changes_on_other_gpus_does_not_keep_a_gpu_short() -> None:
    facts = snapshot([gpu(0, 100), gpu(1, 23_000)], [view("gpu0", 0), view("gpu1", 1)], now=10.1, policy=Policy())
    assert short_gpus(replace(facts, changed_on={gpu_id(1): 10.0})) == [gpu_id(0)]
    assert short_gpus(replace(facts, changed_on={gpu_id(0): 10.0})) == []
