"""A server over several GPUs without forced spread may use one of them alone: both are reserved until it is known."""

from __future__ import annotations

from dataclasses import replace

import pytest

from router.domain.actions import Action, Load, Remember, StartInstance
from router.domain.events import Arrived, GpusRead, InstanceChanged, LoadFinished
from router.domain.footprint import MeasuredFootprint
from router.domain.gpu import Gpu
from router.domain.instance import InstanceSpec, InstanceState, InstanceView
from router.domain.model import ModelFacts
from router.domain.policy import Policy
from router.domain.snapshot import Snapshot
from router.engines.ollama.footprint_estimator import estimate_bytes, footprint_key
from router.scheduler.dispatcher import Dispatcher
from router.scheduler.placement.footprint_prediction import FootprintPredictor
from router.scheduler.placement.measured_footprints import Footprints
from tests.scheduler.builders import GB, MIB, OLLAMA, gpu, gpu_id, instance, model, snapshot, ticket

CONTEXT = 8192
SMALL, LARGE = gpu(0, 8_000, total_mib=8_000), gpu(1, 24_000)
SPLIT_EVENLY = {"LLAMA_ARG_TENSOR_SPLIT": "1,1"}
FILLED = replace(instance("both", 1, 0), environment=SPLIT_EVENLY)
EVEN = replace(FILLED, environment={**SPLIT_EVENLY, "OLLAMA_SCHED_SPREAD": "1"})
ATTACHED = replace(FILLED, attached=True)
MODEL = model("m", 12_000)
NEW, OLD = "0.33.0", "0.24.0"


def facts(version: str = NEW, *gpus: Gpu, spec: InstanceSpec = FILLED) -> Snapshot:
    return snapshot(gpus or (SMALL, LARGE), [InstanceView(spec, InstanceState.READY, version)])


def bytes_of(spec: InstanceSpec, of: ModelFacts, version: str = NEW, *gpus: Gpu) -> tuple[int, ...]:
    return estimate_bytes(of, spec, CONTEXT, facts(version, *gpus, spec=spec))


def whole(of: ModelFacts, version: str = NEW) -> int:
    (size,) = bytes_of(replace(FILLED, gpus=(gpu_id(1),)), of, version)
    return size


@pytest.mark.parametrize("spec", [FILLED, ATTACHED], ids=["spawned", "attached"])
@pytest.mark.parametrize("version", [NEW, OLD])
def test_a_gpu_that_may_be_taken_alone_is_reserved_for_the_whole_model(spec: InstanceSpec, version: str) -> None:
    on_large, on_small = bytes_of(spec, MODEL, version)
    assert on_large == whole(MODEL, version)
    assert on_small == bytes_of(EVEN, MODEL, version)[1] < on_large


@pytest.mark.parametrize("version", [NEW, OLD])
def test_a_server_configured_to_spread_uses_all_gpus(version: str) -> None:
    on_large, on_small = bytes_of(EVEN, MODEL, version)
    assert on_large < 0.6 * whole(MODEL, version)
    assert on_large + on_small > whole(MODEL, version)


@pytest.mark.parametrize(("version", "of"), [(NEW, model("m", 18_000)), (OLD, model("m", 23_600))])
def test_a_model_that_the_server_finds_too_large_for_one_gpu_is_split(version: str, of: ModelFacts) -> None:
    assert bytes_of(FILLED, of, version) == bytes_of(EVEN, of, version)


def test_a_gpu_is_reserved_as_a_whole_at_most() -> None:
    """So that a model that barely exceeds one GPU is not refused if its server splits it after all."""
    of = model("m", 21_450)
    assert whole(of, OLD) > 24_000 * MIB
    assert bytes_of(FILLED, of, OLD) == (24_000 * MIB, bytes_of(EVEN, of, OLD)[1])


def test_memory_in_use_on_a_gpu_may_be_free_at_the_time_of_the_load() -> None:
    """The last reading may be older than the exit of a server that used memory there."""
    assert bytes_of(FILLED, MODEL, NEW, SMALL, gpu(1, 6_000)) == bytes_of(FILLED, MODEL)


def test_one_split_load_does_not_mean_that_the_next_is_split() -> None:
    seen = Footprints()
    seen.remember(MeasuredFootprint(footprint_key(MODEL, FILLED, CONTEXT, NEW), (7 * GB, 7 * GB)))
    predict = FootprintPredictor(seen)
    assert predict(MODEL, FILLED, CONTEXT, facts()) == (whole(MODEL), 7 * GB)
    assert predict(MODEL, EVEN, CONTEXT, facts()) == (7 * GB, 7 * GB)


def loaded(on_large: int, on_small: int, external: tuple[int, int] = (0, 0)) -> tuple[Dispatcher, list[Action]]:
    """A finished load with these sizes, the next reading, and memory that another program allocated meanwhile."""
    dispatcher = Dispatcher(Policy(vram_margin_bytes=0), OLLAMA)
    dispatcher.handle(GpusRead((SMALL, LARGE), 1.0), 1.0)
    dispatcher.handle(InstanceChanged(FILLED, InstanceState.READY, version=NEW), 1.0)
    (sent,) = dispatcher.handle(Arrived(ticket(1, MODEL)), 2.0)
    assert isinstance(sent, Load)
    total = on_large + on_small
    dispatcher.handle(LoadFinished(sent.load_id, total, total), 3.0)
    after = tuple(
        replace(each, memory_free_bytes=each.memory_free_bytes - size, memory_used_bytes=size)
        for each, size in ((SMALL, on_small + external[1]), (LARGE, on_large + external[0]))
    )
    return dispatcher, dispatcher.handle(GpusRead(after, 4.0), 4.0)


def test_a_model_loaded_on_one_gpu_is_accounted_only_there() -> None:
    dispatcher, told = loaded(whole(MODEL), 0)
    (copy,) = dispatcher.snapshot(5.0).residencies.values()
    assert copy.per_gpu_bytes == (whole(MODEL), 0)
    assert not [action for action in told if isinstance(action, Remember)]


def test_a_split_model_is_accounted_on_both_gpus() -> None:
    split = on_large, on_small = bytes_of(EVEN, MODEL)
    dispatcher, told = loaded(on_large, on_small)
    (copy,) = dispatcher.snapshot(5.0).residencies.values()
    assert copy.per_gpu_bytes == split
    assert not [action for action in told if isinstance(action, Remember)]


def test_memory_taken_by_another_program_is_not_attributed_to_the_model() -> None:
    dispatcher, told = loaded(whole(MODEL), 0, external=(0, 6_000 * MIB))
    (copy,) = dispatcher.snapshot(5.0).residencies.values()
    assert copy.per_gpu_bytes == (bytes_of(FILLED, MODEL)[0], 6_000 * MIB)  # as reserved, but no more than is in use
    assert not [action for action in told if isinstance(action, Remember)]


def test_a_plan_made_before_the_version_was_known_is_made_again() -> None:
    """A server from 0.30 on uses the configured shares; an older one splits evenly."""
    policy = Policy(vram_margin_bytes=0, instances_on_demand=True, on_demand_like=instance("", slots=1))
    dispatcher = Dispatcher(policy, OLLAMA)

    def reserved() -> tuple[int, ...]:
        (one,) = dispatcher.snapshot(9.0).reservations.values()
        return tuple(size for _, size in one.per_gpu_bytes)

    dispatcher.handle(GpusRead((gpu(0, 24_000), gpu(1, 14_000, total_mib=14_000)), 1.0), 1.0)
    for number in (0, 1):
        dispatcher.handle(InstanceChanged(instance(f"gpu{number}", number), InstanceState.STARTING), 1.0)
    (start,) = dispatcher.handle(Arrived(ticket(1, model("m", 22_000))), 2.0)
    assert isinstance(start, StartInstance)
    by_memory = reserved()
    dispatcher.handle(InstanceChanged(instance("gpu0", 0), InstanceState.READY, version=OLD), 3.0)
    evenly = reserved()
    assert by_memory[0] > 1.5 * by_memory[1]
    assert evenly[0] < 1.2 * evenly[1]
    (load,) = dispatcher.handle(InstanceChanged(start.spec, InstanceState.READY, version=OLD), 4.0)
    assert isinstance(load, Load)
    assert reserved() == evenly
