"""Where a model is loaded: on one GPU if it fits, otherwise on several, and never on the CPU by accident."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.domain.gpu import Gpu
from router.domain.instance import InstanceName, InstanceState, InstanceView
from router.domain.model import ModelFacts
from router.domain.policy import Pin, Policy, SchedulerConstants
from router.domain.request import RunnerOptions
from router.domain.residency import Residency, ResidencyState
from router.domain.snapshot import Demand, Failure, Snapshot
from router.domain.vram_ledger import available_bytes, capacity_bytes
from router.scheduler.placement.placement import Decision, MustWait, NoFit, Placed, PlacementRequest, place
from tests.scheduler.builders import (
    MIB,
    by_weight,
    gpu,
    gpu_id,
    instance,
    key,
    model,
    reservation,
    residency,
    snapshot,
    view,
)

SMALL, LARGE, HUGE = model("small", 10_000), model("large", 30_000), model("huge", 60_000)
BUSY, IDLE, OLD = model("busy", 9_000), model("idle", 9_000), model("old", 9_000)
PAIR = (view("gpu0", 0), view("gpu1", 1), view("spread", 0, 1))
LONG: RunnerOptions = (("num_ctx", 2048),)


def _place(facts: Snapshot, of: ModelFacts, options: RunnerOptions = ()) -> Decision:
    return place(facts, by_weight, PlacementRequest(of, options))


def _placed(facts: Snapshot, of: ModelFacts, options: RunnerOptions = ()) -> Placed:
    decision = _place(facts, of, options)
    assert isinstance(decision, Placed), decision
    return decision


def _waits(facts: Snapshot, of: ModelFacts, options: RunnerOptions = ()) -> MustWait:
    decision = _place(facts, of, options)
    assert isinstance(decision, MustWait), decision
    return decision


def _nowhere(facts: Snapshot, of: ModelFacts, options: RunnerOptions = ()) -> NoFit:
    decision = _place(facts, of, options)
    assert isinstance(decision, NoFit), decision
    return decision


# --- one GPU, all GPUs, no GPU -------------------------------------------------------------------------------


def test_a_model_that_fits_one_gpu_goes_to_one_gpu() -> None:
    placed = _placed(snapshot([gpu(0, 12_000), gpu(1, 23_000)], PAIR), SMALL)
    assert placed.instance == "gpu1"
    assert placed.per_gpu_bytes == ((gpu_id(1), 10_000 * MIB),)
    assert placed.evict == ()


def test_the_reason_has_bytes_needed_and_bytes_free() -> None:
    placed = _placed(snapshot([gpu(0, 12_288), gpu(1, 0)], PAIR), model("m", 10_240))
    assert placed.reason == "gpu0: GPU 0 needs 10.0 of 12.0 GiB free"


@pytest.mark.parametrize(("margin", "instance_name"), [(2000, "gpu0"), (2001, "gpu1")])
def test_the_margin_stays_free(margin: int, instance_name: str) -> None:
    fast = gpu(0, 12_000, clock_hertz=10_000)
    facts = snapshot([fast, gpu(1, 23_000)], PAIR, policy=Policy(vram_margin_bytes=margin * MIB))
    assert _placed(facts, SMALL).instance == instance_name


@pytest.mark.parametrize(("reserved", "instance_name"), [(2000, "gpu0"), (2001, "gpu1")])
def test_the_reservation_of_a_running_load_is_not_given_out_again(reserved: int, instance_name: str) -> None:
    fast = gpu(0, 12_000, clock_hertz=10_000)
    booked = [reservation(1, "spread", LARGE, [(0, reserved), (1, 100)], sent_at=1.0)]
    assert _placed(snapshot([fast, gpu(1, 23_000)], PAIR, [], booked), SMALL).instance == instance_name


def test_a_model_too_large_for_any_gpu_goes_over_all_of_them() -> None:
    placed = _placed(snapshot([gpu(0, 23_000), gpu(1, 23_000)], PAIR), LARGE)
    assert placed.instance == "spread"
    assert placed.per_gpu_bytes == ((gpu_id(0), 15_000 * MIB), (gpu_id(1), 15_000 * MIB))


def test_a_model_that_one_gpu_could_hold_waits_for_it_rather_than_be_spread() -> None:
    busy = [residency("gpu0", BUSY, 12_000, in_flight=1), residency("gpu1", OLD, 12_000, in_flight=1)]
    facts = snapshot([gpu(0, 12_000), gpu(1, 12_000)], PAIR, busy)
    assert _waits(facts, model("middle", 20_000)).drain == (key("gpu0", BUSY),)


def test_the_fewest_gpus_that_hold_it_are_taken() -> None:
    views = (*PAIR, view("all", 0, 1, 2, 3), view("gpu2", 2), view("gpu3", 3))
    gpus = [gpu(number, 23_000) for number in range(4)]
    assert _placed(snapshot(gpus, views), LARGE).instance == "spread"
    assert _placed(snapshot(gpus, views), HUGE).instance == "all"


def test_a_model_that_fits_nowhere_is_refused_with_what_each_gpu_lacks() -> None:
    refused = _nowhere(snapshot([gpu(0, 23_000), gpu(1, 4000)], PAIR), HUGE)
    assert (refused.code, refused.status) == ("model_too_large", None)
    assert "model 'huge' fits nowhere" in refused.message
    for number, (needed, there) in enumerate(((30_000, 23_000), (30_000, 4_000))):
        assert f"GPU {number} needs {needed / 1024:.1f} GiB and can give {there / 1024:.1f} GiB" in refused.message
    assert f"gpu0: GPU 0 needs {60_000 / 1024:.1f} GiB" in refused.message


def test_only_the_gpus_that_cannot_give_what_is_needed_are_named_as_too_small() -> None:
    refused = _nowhere(snapshot([gpu(0, 23_000), gpu(1, 4000)], PAIR), model("wide", 40_000))
    spread = refused.message.partition("spread: ")[2]
    assert "GPU 1 needs 19.5 GiB and can give 3.9 GiB" in spread
    assert "GPU 0" not in spread


def test_no_model_is_refused_as_too_large_while_memory_settles() -> None:
    policy = Policy(vram_margin_bytes=0, constants=SchedulerConstants(settle_seconds=3.0))
    soon = snapshot([gpu(0, 4000)], [view("gpu0", 0)], now=12.9, changed_at=10.0, policy=policy)
    assert "last load or unload" in _waits(soon, SMALL).reason
    later = snapshot([gpu(0, 4000)], [view("gpu0", 0)], now=13.0, changed_at=10.0, policy=policy)
    assert _nowhere(later, SMALL).code == "model_too_large"


def test_what_exceeds_an_empty_gpu_does_not_wait_for_memory_to_settle() -> None:
    soon = snapshot([gpu(0, 4000)], [view("gpu0", 0)], now=10.1, changed_at=10.0)
    assert _nowhere(soon, LARGE).code == "model_too_large"


def test_memory_that_settles_on_another_gpu_delays_no_refusal() -> None:
    facts = snapshot([gpu(0, 4000), gpu(1, 4000, total_mib=4000)], PAIR, now=10.1, changed_at=10.0)
    assert "last load or unload" in _waits(facts, SMALL).reason
    assert _nowhere(replace(facts, changed_on={gpu_id(1): 10.0}), SMALL).code == "model_too_large"


def test_external_vram_reduces_capacity_and_our_models_do_not() -> None:
    ours = snapshot([gpu(0, 1000)], [view("gpu0", 0)], [residency("gpu0", IDLE, 23_000)])
    assert _placed(ours, SMALL).evict == (key("gpu0", IDLE),)
    external = snapshot([gpu(0, 1000)], [view("gpu0", 0)])
    assert _nowhere(external, SMALL).code == "model_too_large"


def test_nothing_is_placed_on_a_lost_gpu() -> None:
    lost = replace(gpu(0, 23_000), error="GPU is lost")
    assert _placed(snapshot([lost, gpu(1, 23_000)], PAIR), SMALL).instance == "gpu1"
    assert _nowhere(snapshot([lost, gpu(1, 23_000)], PAIR), LARGE).code == "model_too_large"


def test_with_gpus_in_the_fleet_nothing_ever_runs_on_the_cpu() -> None:
    views = (*PAIR, view("cpu"))
    assert _nowhere(snapshot([gpu(0, 23_000), gpu(1, 23_000)], views), HUGE).code == "model_too_large"
    down = (view("gpu0", 0, state=InstanceState.STARTING), view("cpu"))
    assert isinstance(_place(snapshot([gpu(0, 23_000)], down), SMALL), MustWait)


def test_without_any_gpu_the_cpu_serves_and_says_so() -> None:
    placed = _placed(snapshot([], [view("cpu")]), HUGE)
    assert (placed.instance, placed.per_gpu_bytes) == ("cpu", ())
    assert placed.reason == "cpu: no GPUs, runs on the CPU"


def test_two_servers_without_gpus_share_the_models() -> None:
    views = (view("a"), view("b"))
    assert _placed(snapshot([], views), SMALL).instance == "a"
    assert _placed(snapshot([], views, [residency("a", OLD)]), SMALL).instance == "b"


# --- which of several -------------------------------------------------------------------------------------------


def test_the_least_busy_gpu_is_preferred_then_the_emptiest_then_the_fastest_then_the_roomiest() -> None:
    gpus = [gpu(0, 12_000, clock_hertz=10_000), gpu(1, 12_000, clock_hertz=5_000)]
    working = [residency("gpu0", BUSY, 100, in_flight=1), residency("gpu1", OLD, 100), residency("gpu1", IDLE, 100)]
    assert _placed(snapshot(gpus, PAIR, working), SMALL).instance == "gpu1"
    resting = [residency("gpu0", BUSY, 100), residency("gpu0", OLD, 100), residency("gpu1", IDLE, 100)]
    assert _placed(snapshot(gpus, PAIR, resting), SMALL).instance == "gpu1"
    assert _placed(snapshot(gpus, PAIR), SMALL).instance == "gpu0"
    assert _placed(snapshot([gpu(0, 12_000), gpu(1, 13_000)], PAIR), SMALL).instance == "gpu1"
    assert _placed(snapshot([gpu(0, 12_000), gpu(1, 12_000)], PAIR), SMALL).instance == "gpu0"


def test_of_equal_gpus_the_one_with_the_faster_link_is_preferred() -> None:
    def linked(number: int, width: int) -> Gpu:
        return replace(gpu(number, 20_000), pcie_generation_max=4, pcie_width_max=width)

    assert _placed(snapshot([linked(0, 4), linked(1, 16)], PAIR), SMALL).instance == "gpu1"
    assert _placed(snapshot([linked(0, 16), linked(1, 16)], PAIR), SMALL).instance == "gpu0"


def test_the_requests_of_a_spread_model_count_on_each_of_its_gpus() -> None:
    views = (*PAIR, view("gpu2", 2))
    gpus = [gpu(number, 20_000) for number in range(3)]
    facts = snapshot(gpus, views, [residency("spread", LARGE, 1000, 1000, in_flight=1)])
    assert _placed(facts, SMALL).instance == "gpu2"


# --- as configured ----------------------------------------------------------------------------------------------


def test_a_model_goes_to_its_exclusive_gpu_first_though_another_is_faster_and_roomier() -> None:
    gpus = [gpu(0, 24_000, clock_hertz=10_000), gpu(1, 20_000, clock_hertz=5_000)]
    policy = Policy(vram_margin_bytes=0, exclusive_gpus={gpu_id(1): frozenset({"small", "other"})})
    placed = _placed(snapshot(gpus, PAIR, policy=policy), SMALL)
    assert placed.reason == "gpu1: GPU 1 needs 9.8 of 19.5 GiB free; exclusive to it"


@pytest.mark.parametrize(
    ("state", "instance_name"),
    [(InstanceState.STARTING, None), (InstanceState.BACKOFF, "gpu0"), (InstanceState.FATAL, "gpu0")],
)
def test_a_model_waits_for_the_start_of_the_instance_on_its_exclusive_gpu(
    state: InstanceState, instance_name: str | None
) -> None:
    policy = Policy(vram_margin_bytes=0, exclusive_gpus={gpu_id(1): frozenset({"small"})})
    facts = snapshot([gpu(0, 24_000), gpu(1, 24_000)], (view("gpu0", 0), view("gpu1", 1, state=state)), policy=policy)
    if instance_name is None:
        assert _waits(facts, SMALL).reason.startswith("gpu1: waits for its start")
    else:
        assert _placed(facts, SMALL).instance == instance_name


def test_its_exclusive_gpu_goes_before_a_gpu_that_would_be_packed() -> None:
    policy = Policy(vram_margin_bytes=0, exclusive_gpus={gpu_id(1): frozenset({"small"})})
    facts = replace(snapshot([gpu(0, 12_000), gpu(1, 24_000)], PAIR, policy=policy), large_model_requested=True)
    assert _placed(facts, SMALL).instance == "gpu1"


def test_where_its_exclusive_gpu_is_full_a_model_goes_to_free_room_elsewhere() -> None:
    policy = Policy(vram_margin_bytes=0, exclusive_gpus={gpu_id(1): frozenset({"small", "old"})})
    there = [residency("gpu1", OLD, 20_000)]
    placed = _placed(snapshot([gpu(0, 12_000), gpu(1, 4_000)], PAIR, there, policy=policy), SMALL)
    assert (placed.instance, placed.evict) == ("gpu0", ())


def test_at_the_same_price_models_make_room_on_the_exclusive_gpu() -> None:
    policy = Policy(vram_margin_bytes=0, exclusive_gpus={gpu_id(1): frozenset({"small", "old"})})
    there = [residency("gpu0", IDLE, 20_000), residency("gpu1", OLD, 23_000)]
    placed = _placed(snapshot([gpu(0, 4_000), gpu(1, 1_000)], PAIR, there, policy=policy), SMALL)
    assert (placed.instance, placed.evict) == ("gpu1", (key("gpu1", OLD),))


def test_of_several_sets_the_one_with_most_exclusive_gpus_wins() -> None:
    names = frozenset({"large"})
    policy = Policy(vram_margin_bytes=0, exclusive_gpus={gpu_id(1): names, gpu_id(3): names})
    views = [view(f"gpu{a}+gpu{b}", a, b) for a in range(4) for b in range(a + 1, 4)]
    facts = snapshot([gpu(number, 24_000, clock_hertz=10_000 - number) for number in range(4)], views, policy=policy)
    assert _placed(facts, LARGE).instance == "gpu1+gpu3"


@pytest.mark.parametrize(("is_there", "instance_name"), [(False, "gpu1"), (True, "gpu0")])
def test_a_gpu_is_left_to_the_model_that_is_pinned_to_it_until_that_is_loaded(
    is_there: bool, instance_name: str
) -> None:
    policy = Policy(vram_margin_bytes=0, pins={"old": Pin(gpus=(gpu_id(0),))})
    there = [residency("gpu0", OLD, 1_000), residency("gpu1", IDLE, 1_000)] if is_there else []
    gpus = [gpu(0, 23_000, clock_hertz=10_000), gpu(1, 23_000, clock_hertz=5_000)]
    assert _placed(snapshot(gpus, PAIR, there, policy=policy), SMALL).instance == instance_name


def test_a_gpu_that_another_model_is_pinned_to_is_used_where_no_other_has_room() -> None:
    policy = Policy(vram_margin_bytes=0, pins={"old": Pin(gpus=(gpu_id(0),))})
    there = [residency("gpu1", IDLE, 20_000)]
    assert _placed(snapshot([gpu(0, 24_000), gpu(1, 4_000)], PAIR, there, policy=policy), SMALL).instance == "gpu0"


# --- making room ------------------------------------------------------------------------------------------------


def test_idle_models_leave_and_busy_ones_stay() -> None:
    held = [residency("gpu0", BUSY, 20_000, in_flight=1), residency("gpu1", IDLE, 20_000)]
    placed = _placed(snapshot([gpu(0, 4_000), gpu(1, 4_000)], PAIR, held), SMALL)
    assert (placed.instance, placed.evict) == ("gpu1", (key("gpu1", IDLE),))
    assert placed.reason == "gpu1: fits after unloading idle"


def test_the_fewest_bytes_are_unloaded() -> None:
    held = [residency("gpu0", OLD, 20_000), residency("gpu1", IDLE, 9_000)]
    placed = _placed(snapshot([gpu(0, 4_000), gpu(1, 4_000)], PAIR, held), SMALL)
    assert placed.evict == (key("gpu1", IDLE),)


def test_free_room_is_taken_before_anybody_is_unloaded() -> None:
    held = [residency("gpu0", IDLE, 20_000)]
    placed = _placed(snapshot([gpu(0, 4_000), gpu(1, 11_000)], PAIR, held), SMALL)
    assert (placed.instance, placed.evict) == ("gpu1", ())


def test_a_large_model_clears_all_its_gpus_of_idle_models() -> None:
    held = [residency("gpu0", IDLE, 20_000), residency("gpu1", OLD, 20_000)]
    placed = _placed(snapshot([gpu(0, 4_000), gpu(1, 4_000)], PAIR, held), LARGE)
    assert placed.instance == "spread"
    assert set(placed.evict) == {key("gpu0", IDLE), key("gpu1", OLD)}


def test_memory_being_freed_is_waited_for_without_further_evictions() -> None:
    held = [residency("gpu0", OLD, 12_000, state=ResidencyState.UNLOADING), residency("gpu0", IDLE, 8_000)]
    placed = _placed(snapshot([gpu(0, 4_000)], [view("gpu0", 0)], held), SMALL)
    assert placed.evict == ()
    assert placed.reason == "gpu0: fits once freed memory shows"


def test_memory_already_reported_as_free_is_not_waited_for() -> None:
    held = [residency("gpu0", OLD, 12_000, state=ResidencyState.UNLOADING), residency("gpu0", BUSY, 8_000, in_flight=1)]
    waits = _waits(snapshot([gpu(0, 16_000)], [view("gpu0", 0)], held), model("middle", 18_000))
    assert waits.drain == (key("gpu0", BUSY),)


def test_the_same_weights_with_other_options_leave_first() -> None:
    held = [residency("gpu0", SMALL, 10_000)]
    placed = _placed(snapshot([gpu(0, 4_000)], [view("gpu0", 0)], held), SMALL, LONG)
    assert placed.evict == (key("gpu0", SMALL),)


def test_the_same_weights_with_other_options_are_left_alone_while_they_work() -> None:
    held = [residency("gpu0", SMALL, 10_000, in_flight=1)]
    waits = _waits(snapshot([gpu(0, 14_000)], [view("gpu0", 0)], held), SMALL, LONG)
    assert waits.drain == (key("gpu0", SMALL),)
    elsewhere = _placed(snapshot([gpu(0, 14_000), gpu(1, 14_000)], PAIR, held), SMALL, LONG)
    assert elsewhere.instance == "gpu1"


def test_if_only_busy_models_are_in_the_way_the_fewest_requests_are_waited_for() -> None:
    held = [residency("gpu0", BUSY, 20_000, in_flight=2), residency("gpu1", OLD, 20_000, in_flight=1)]
    waits = _waits(snapshot([gpu(0, 4_000), gpu(1, 4_000)], PAIR, held), SMALL)
    assert waits.drain == (key("gpu1", OLD),)
    assert waits.reason == "gpu1: waits for 1 running requests of 1 models to make room"


def test_busy_models_that_are_too_dear_are_named_with_their_price() -> None:
    held = [residency("gpu0", BUSY, 20_000, in_flight=2)]
    facts = snapshot([gpu(0, 4_000)], [view("gpu0", 0)], held)
    facts = replace(facts, demand={BUSY.blob: Demand(weight=100.0, at=facts.now)})
    for may_drain in (False, True):
        waits = place(facts, by_weight, PlacementRequest(SMALL, price_max=2.0, may_drain=may_drain))
        assert isinstance(waits, MustWait)
        assert waits.drain == (key("gpu0", BUSY),)
        assert waits.reason.startswith("gpu0: waits for 2 running requests of 1 models to make room, which would cost")


@pytest.mark.parametrize(
    ("state", "words"),
    [
        (ResidencyState.LOADING, "waits because busy is being loaded on gpu0"),
        (ResidencyState.PLANNED, "waits because room is being made for busy on gpu0"),
    ],
)
def test_a_model_on_its_way_is_named_by_what_waits_for_it(state: ResidencyState, words: str) -> None:
    held = [residency("gpu0", BUSY, 20_000, state=state, load=1)]
    booked = [reservation(1, "gpu0", BUSY, [(0, 20_000)], sent_at=1.0)]
    assert _waits(snapshot([gpu(0, 24_000)], [view("gpu0", 0)], held, booked), SMALL).reason == words


# --- instances and failures -------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", [InstanceState.STARTING, InstanceState.BACKOFF])
def test_a_starting_instance_is_waited_for(state: InstanceState) -> None:
    waits = _waits(snapshot([gpu(0, 23_000)], [view("gpu0", 0, state=state)]), SMALL)
    assert waits.reason == f"waits for an instance: gpu0 is {state.value}"


def test_a_starting_instance_is_not_waited_for_if_another_is_ready() -> None:
    views = (view("gpu0", 0, state=InstanceState.STARTING), view("gpu1", 1))
    assert _placed(snapshot([gpu(0, 23_000), gpu(1, 11_000)], views), SMALL).instance == "gpu1"


@pytest.mark.parametrize(
    "state", [InstanceState.STOPPED, InstanceState.FATAL, InstanceState.DRAINING, InstanceState.STOPPING]
)
def test_without_a_usable_instance_the_request_fails_with_the_state_of_each(state: InstanceState) -> None:
    gone = InstanceView(instance("gpu0", 0), state, reason="its last words")
    refused = _nowhere(snapshot([gpu(0, 23_000)], [gone]), SMALL)
    assert refused.code == "no_instance"
    assert f"gpu0 is {state.value} (its last words)" in refused.message


def test_without_any_instance_the_error_says_so() -> None:
    assert "none is configured" in _nowhere(snapshot(), SMALL).message


def _failure(on: str, of: ModelFacts, options: RunnerOptions = (), words: str = "no") -> Failure:
    return Failure(InstanceName(on), of.blob, options, 500, words, 999.0)


def test_a_place_that_failed_recently_is_not_tried_again() -> None:
    gpus = [gpu(0, 23_000), gpu(1, 11_000)]
    facts = snapshot(gpus, PAIR, failures=(_failure("gpu0", SMALL),))
    assert _placed(facts, SMALL).instance == "gpu1"
    assert _placed(facts, SMALL, LONG).instance == "gpu0"
    assert _placed(facts, OLD).instance == "gpu0"


def test_if_every_place_failed_the_servers_error_and_status_are_returned() -> None:
    failures = (_failure("gpu0", SMALL, words="first"), _failure("gpu1", SMALL, words="cudaMalloc failed"))
    refused = _nowhere(snapshot([gpu(0, 23_000), gpu(1, 23_000)], PAIR, failures=failures), SMALL)
    assert (refused.code, refused.status, refused.message) == ("load_failed", 500, "cudaMalloc failed")


# --- invariants -------------------------------------------------------------------------------------------------

MODELS = tuple(model(f"m{number}") for number in range(4))


@st.composite
def fleets(draw: st.DrawFn) -> Snapshot:
    """One to three GPUs, an instance on each and one over all, with random residencies and reservations."""
    count = draw(st.integers(1, 3))
    states = st.sampled_from((InstanceState.READY,) * 4 + tuple(InstanceState))
    gpus: list[Gpu] = []
    for number in range(count):
        found = gpu(number, draw(st.integers(0, 24_000)))
        gpus.append(replace(found, error="GPU is lost") if draw(st.integers(0, 9)) == 9 else found)
    views = [view(f"gpu{number}", number, state=draw(states)) for number in range(count)]
    views += [view("spread", *range(count), state=draw(states))] if count > 1 else []
    views += [view("cpu")] if draw(st.booleans()) else []
    held: list[Residency] = []
    for of in draw(st.lists(st.sampled_from(MODELS), max_size=5)):
        on = draw(st.sampled_from(views))
        sizes = [draw(st.integers(0, 12_000)) for _ in on.spec.gpus]
        state, busy, used = draw(st.sampled_from(ResidencyState)), draw(st.integers(0, 2)), draw(st.floats(0, 9))
        held.append(residency(on.spec.name, of, *sizes, state=state, in_flight=busy, used_at=used))
    booked = [
        reservation(
            number, on.spec.name, MODELS[0], [(int(gpu[4:]), draw(st.integers(0, 9000))) for gpu in on.spec.gpus]
        )
        for number, on in enumerate(draw(st.lists(st.sampled_from(views), max_size=2)))
    ]
    failures = tuple(_failure(v.spec.name, MODELS[0]) for v in views if draw(st.integers(0, 4)) == 4)
    return snapshot(gpus, views, held, booked, failures=failures, changed_at=draw(st.sampled_from((0.0, 999.0))))


@given(fleets(), st.integers(1, 60_000), st.sampled_from(((), LONG)))
def test_a_chosen_place_is_ready_and_large_enough(facts: Snapshot, weights: int, options: RunnerOptions) -> None:
    wanted = replace(MODELS[0], weights_bytes=weights * MIB)
    decision = _place(facts, wanted, options)
    assert decision == _place(facts, wanted, options)
    match decision:
        case Placed():
            spec = facts.instances[decision.instance].spec
            assert facts.instances[decision.instance].state is InstanceState.READY
            assert [gpu for gpu, _ in decision.per_gpu_bytes] == list(spec.gpus)
            assert all(facts.residencies[found].is_idle for found in decision.evict)
            for gpu, size in decision.per_gpu_bytes:
                assert size <= capacity_bytes(facts, gpu)
                assert decision.evict or size <= available_bytes(facts, gpu) or "freed memory" in decision.reason
            assert (decision.instance, wanted.blob) not in facts.residencies or (
                (decision.instance, wanted.blob) in decision.evict
            )
            assert spec.gpus or not any(v.spec.gpus for v in facts.instances.values() if v.state in COMING)
            assert not any(
                f.instance == decision.instance and f.options == options and f.blob == wanted.blob
                for f in facts.failures
            )
        case MustWait():
            others = [facts.residencies[found] for found in decision.drain if found[1] != wanted.blob]
            assert all(found.state is ResidencyState.READY for found in others)
            assert decision.reason
        case NoFit():
            assert decision.code in ("model_too_large", "no_instance", "load_failed")
            assert decision.message


COMING = (InstanceState.READY, InstanceState.STARTING, InstanceState.BACKOFF)


@given(fleets(), st.integers(1, 60_000))
def test_a_model_is_refused_for_its_size_only_where_no_instance_could_ever_hold_it(
    facts: Snapshot, weights: int
) -> None:
    wanted = replace(MODELS[1], weights_bytes=weights * MIB)
    decision = _place(facts, wanted)
    if isinstance(decision, NoFit) and decision.code == "model_too_large":
        for found in facts.instances.values():
            if found.state in COMING and found.spec.gpus:
                share = by_weight(wanted, found.spec, 0, facts)
                assert any(capacity_bytes(facts, g) < size for g, size in zip(found.spec.gpus, share, strict=True))
