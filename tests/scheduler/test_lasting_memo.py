"""What is remembered across snapshots decides nothing: the same decisions come without it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from bench.scheduling.busy_machine import BusyMachine, make_models
from router.domain.actions import Action
from router.domain.events import Event
from router.domain.footprint import MeasuredFootprint
from router.domain.instance import InstanceName, InstanceSpec
from router.domain.lasting_memo import LastingMemo
from router.domain.policy import Pin, Policy
from router.domain.request import RunnerOptions
from router.domain.snapshot import Snapshot
from router.engines.ollama.rules import KIND, OllamaRules
from router.lab.scenarios import model_facts
from router.scheduler.dispatcher import Dispatcher
from router.scheduler.placement.footprint_prediction import FootprintPredictor
from router.scheduler.placement.measured_footprints import Footprints
from router.scheduler.placement.placement import PlacementRequest, place
from router.scheduler.state import FleetState
from tests.scheduler.builders import gpu, gpu_id, snapshot, view

MODELS = tuple(model_facts(name) for name in ("llama3.2:3b", "qwen2.5-coder:32b", "llama3.3:70b"))
OWN_LAYERS = replace(MODELS[2], name="own", parameters=(("num_gpu", "81"),))
MACHINES = settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@MACHINES
@given(seed=st.integers(0, 10**6), gpus=st.integers(1, 4), waiting=st.integers(5, 40))
def test_a_busy_machine_with_instances_on_demand_decides_the_same_without_memory(
    seed: int, gpus: int, waiting: int
) -> None:
    twins: list[Dispatcher] = []

    def post(dispatcher: Dispatcher, event: Event, now: float) -> list[Action]:
        if not twins:
            engines = {KIND: OllamaRules()}
            twins.append(Dispatcher(machine_policy(), engines))
            fleet = twins[0]._fleet
            twins[0]._fleet = FleetState(machine_policy(), engines, footprints=fleet.footprints, lasting=None)
        actions = dispatcher.handle(event, now)
        assert actions == twins[0].handle(event, now)
        assert dispatcher.waiting == twins[0].waiting  # with the reasons
        assert dispatcher.next_wake() == twins[0].next_wake()
        return actions

    def machine_policy() -> Policy:
        return BusyMachine(0, models, 0, 0, lambda *_: []).policy if not machines else machines[0].policy

    models = make_models([*MODELS, model_facts("nomic-embed-text:latest")], 12)
    machines: list[BusyMachine] = []
    machines.append(BusyMachine(gpus, models, waiting, seed, post))
    machines[0].play(12.0)


class World:
    """What a search depends on, one fact of which changes at a time."""

    def __init__(self) -> None:
        self.like = InstanceSpec(InstanceName(""), (), "", num_parallel=2)
        self.gpus = [gpu(number, 20_000, clock_hertz=10**9) for number in range(3)]
        self.views = [view(f"gpu{number}", number) for number in range(3)]
        self.footprints = Footprints()
        self.pins: dict[str, Pin] = {}
        self.engines: Mapping[str, Any] = {KIND: OllamaRules()}

    def change(self, what: str, at: int, size: int) -> None:
        number = at % 3
        found, there = self.gpus[number], self.views[number]
        match what:
            case "free":
                total = found.memory_free_bytes + found.memory_used_bytes
                self.gpus[number] = replace(found, memory_free_bytes=size, memory_used_bytes=max(0, total - size))
            case "usable":
                self.gpus[number] = replace(found, memory_free_bytes=size)
            case "total":
                self.gpus[number] = replace(found, memory_total_bytes=size)
            case "generation":
                self.gpus[number] = replace(found, compute_capability=(12, 0) if at % 2 else (8, 6))
            case "version":
                self.views[number] = replace(there, version=("0.24.0", "0.34.0", None)[size % 3])
            case "cache":
                self.views[number] = replace(there, spec=replace(there.spec, kv_cache_type=("f16", "q8_0")[size % 2]))
            case "spread":
                self.views[number] = replace(there, spec=replace(there.spec, environment={"OLLAMA_SCHED_SPREAD": "1"}))
            case "slots":
                self.views[number] = replace(there, spec=replace(there.spec, num_parallel=1 + size % 4))
            case "gone":
                self.views.append(replace(there, spec=replace(there.spec, name=InstanceName(f"gpu{number}.2"))))
            case "pin":
                self.pins = {MODELS[number].name: Pin(kv_cache_type="q8_0", num_parallel=1 + size % 2)}
            case "measured":
                key = self.engines[KIND].footprint_key(MODELS[number], self.views[0].spec, 8192, self.facts(None))
                self.footprints.remember(MeasuredFootprint(key, (size,) * key.gpus))
            case _:
                self.footprints.raise_estimate(MODELS[number].blob, 1000.0)

    def facts(self, lasting: LastingMemo | None) -> Snapshot:
        policy = Policy(instances_on_demand=True, on_demand_like=self.like, pins=self.pins)
        made = snapshot(self.gpus, self.views, policy=policy)
        return replace(made, engines=self.engines, lasting=lasting)


CHANGES = st.sampled_from(("free", "usable", "total", "generation", "version", "cache", "spread", "slots", "gone",
                           "pin", "measured", "raised"))  # fmt: skip


@settings(deadline=None)
@example([("free", 0, 15 * 10**9)])
@given(st.lists(st.tuples(CHANGES, st.integers(0, 5), st.integers(0, 30 * 10**9)), max_size=8))
def test_a_search_after_any_change_decides_the_same_without_memory(changes: list[tuple[str, int, int]]) -> None:
    world, lasting = World(), LastingMemo()
    predictor = FootprintPredictor(world.footprints)
    options: tuple[RunnerOptions, ...] = ((), (("num_ctx", 32_768),))
    for change in (None, *changes):
        if change is not None:
            world.change(*change)
        for model in (*MODELS, OWN_LAYERS):
            for wanted in options:
                request = PlacementRequest(model, wanted, may_use_fewer_slots=True)
                remembered = place(world.facts(lasting), predictor, request)
                assert remembered == place(world.facts(None), predictor, request)


def test_an_unchanged_fleet_is_not_sized_again() -> None:
    class Counting(OllamaRules):
        sized = 0

        def worst_case_bytes(self, *given: Any) -> tuple[int, ...]:
            self.sized += 1
            return super().worst_case_bytes(*given)

    world, lasting, engine = World(), LastingMemo(), Counting()
    world.engines = {KIND: engine}
    predictor = FootprintPredictor(world.footprints)
    place(world.facts(lasting), predictor, PlacementRequest(MODELS[0]))
    before = engine.sized
    assert before > 0
    place(world.facts(lasting), predictor, PlacementRequest(MODELS[0]))
    assert engine.sized == before
    world.change("generation", 1, 0)
    place(world.facts(lasting), predictor, PlacementRequest(MODELS[0]))
    assert engine.sized > before


def test_a_value_is_computed_again_only_for_other_facts() -> None:
    memo, computed = LastingMemo(), list[int]()

    def compute() -> int:
        computed.append(0)
        return len(computed)

    assert [memo.get("key", facts, compute) for facts in (1, 1, 2, 2, 1)] == [1, 1, 2, 2, 3]


@pytest.mark.parametrize(("owner", "facts"), [((), 2), ([], 1)])
def test_a_table_belongs_to_one_object_and_its_facts(owner: object, facts: int) -> None:
    memo, first = LastingMemo(), ()
    memo.table("key", first, 1)["a"] = 1
    assert memo.table("key", first, 1) == {"a": 1}
    assert memo.table("key", owner, facts) == {}


def test_equal_values_become_one_object() -> None:
    memo, first, second = LastingMemo(), (gpu_id(1), 1), (gpu_id(1), 1)
    assert memo.same("key", first) is first
    assert memo.same("key", second) is first
