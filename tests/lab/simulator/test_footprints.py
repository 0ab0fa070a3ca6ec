"""After one measured load the router predicts the next one to 3 % on each GPU, for the whole catalogue.

The true sizes come from `router/lab/simulator/true_footprint.py`, which uses other terms than the router's estimate.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest

from router.domain.actions import Load, Remember
from router.domain.events import Arrived, FootprintsLoaded, GpusRead, InstanceChanged, LoadFinished
from router.domain.footprint import MeasuredFootprint
from router.domain.gpu import Gpu, GpuUuid
from router.domain.instance import InstanceName, InstanceSpec, InstanceState
from router.domain.model import ModelFacts
from router.domain.policy import Policy, SchedulerConstants
from router.domain.request import Ticket, TicketId
from router.engines.ollama.memory_estimate import even_split
from router.lab.emulator.catalogue import catalogue
from router.lab.scenarios import model_facts
from router.lab.simulator.loaded_model import ServerConfig, shape_of
from router.lab.simulator.true_footprint import true_gpu_bytes
from router.scheduler.dispatcher import Dispatcher
from tests.scheduler.builders import OLLAMA

GIB = 1024**3
OLD, NEW = (0, 24, 0), (0, 33, 0)
MODELS = tuple(catalogue())
Footprints = tuple[MeasuredFootprint, ...]


@dataclass(frozen=True)
class Server:
    """A server over `gpus` GPUs, each large enough for any model of the catalogue."""

    gpus: int
    config: ServerConfig

    @property
    def spec(self) -> InstanceSpec:
        return InstanceSpec(
            InstanceName("all"),
            tuple(GpuUuid(f"GPU-{number}") for number in range(self.gpus)),
            "http://127.0.0.1:1",
            num_parallel=self.config.slots,
            context_length=self.config.context_length,
            kv_cache_type=self.config.kv_cache_type,
            flash_attention=True,
            environment={"OLLAMA_SCHED_SPREAD": "1"},
        )

    def true_bytes_of(self, model: ModelFacts) -> tuple[int, ...]:
        split = even_split(model.layers, self.gpus)
        units = tuple(count + (gpu == split.output_gpu) for gpu, count in enumerate(split.layers))
        return true_gpu_bytes(model, shape_of(model, self.config), units)

    def reading(self, at: float, used: tuple[int, ...]) -> GpusRead:
        size = 160 * GIB
        gpus = zip(self.spec.gpus, used, strict=True)
        return GpusRead(tuple(Gpu(uuid, n, "large", size, size - u, u) for n, (uuid, u) in enumerate(gpus)), at)


def load(
    server: Server, model: ModelFacts, stored_footprints: Footprints = (), external_bytes: int = 0
) -> tuple[tuple[int, ...], Footprints]:
    """Returns the bytes reserved for a load and the footprints remembered afterwards. `external_bytes`: allocated
    on each GPU by another program meanwhile."""
    policy = Policy(context_length=server.config.context_length, constants=SchedulerConstants(unseen_margin_ratio=0.02))
    dispatcher = Dispatcher(policy, OLLAMA)
    version = ".".join(map(str, server.config.version))
    dispatcher.handle(FootprintsLoaded(stored_footprints), 0.0)
    dispatcher.handle(server.reading(0.0, (0,) * server.gpus), 0.0)
    dispatcher.handle(InstanceChanged(server.spec, InstanceState.READY, version=version), 0.0)
    (sent,) = dispatcher.handle(Arrived(Ticket(TicketId(1), model, (), 0, None, 1.0, 300.0)), 1.0)
    assert isinstance(sent, Load)
    reserved = tuple(size for _, size in dispatcher.snapshot(1.0).reservations[sent.load_id].per_gpu_bytes)
    taken = server.true_bytes_of(model)
    dispatcher.handle(LoadFinished(sent.load_id, sum(taken), sum(taken)), 9.0)
    actions = dispatcher.handle(server.reading(10.0, tuple(size + external_bytes for size in taken)), 10.1)
    return reserved, tuple(one.footprint for one in actions if isinstance(one, Remember))


def worst(predicted: tuple[int, ...], taken: tuple[int, ...]) -> float:
    return max(abs(estimate - truth) / truth for estimate, truth in zip(predicted, taken, strict=True))


def make_server(gpus: int, version: tuple[int, ...] = OLD) -> Server:
    return Server(gpus, ServerConfig(version=version))


@pytest.mark.parametrize("gpus", [1, 2, 4])
@pytest.mark.parametrize("version", [OLD, NEW])
def test_the_same_load_again_is_predicted_to_the_byte(gpus: int, version: tuple[int, ...]) -> None:
    server = make_server(gpus, version)
    first = {name: load(server, model_facts(name)) for name in MODELS}
    again = {name: load(server, model_facts(name), learned)[0] for name, (_, learned) in first.items()}
    assert again == {name: server.true_bytes_of(model_facts(name)) for name in MODELS}
    assert max(worst(reserved, server.true_bytes_of(model_facts(name))) for name, (reserved, _) in first.items()) > 0.03


CHANGES: tuple[dict[str, object], ...] = (
    {"context_length": 16384},
    {"slots": 1},
    {"slots": 4},
    {"kv_cache_type": "f16"},
)
FAR: tuple[dict[str, object], ...] = ({"context_length": 2048}, {"context_length": 32768})
"""From 0.30 these change the batch and so the compute buffer: the error for a small model on two GPUs is up to 11 %."""


@pytest.mark.parametrize("gpus", [1, 2])
@pytest.mark.parametrize(
    ("version", "change"), [*((OLD, one) for one in (*CHANGES, *FAR)), *((NEW, one) for one in CHANGES)], ids=str
)
def test_another_context_slots_or_cache_is_predicted_to_3_percent_of_each_gpu(
    gpus: int, version: tuple[int, ...], change: dict[str, object]
) -> None:
    server = make_server(gpus, version)
    other = Server(gpus, replace(server.config, **change))  # type: ignore[arg-type]
    off: dict[str, float] = {}
    for name in MODELS:
        model = model_facts(name)
        _, learned = load(server, model)
        predicted, _ = load(other, model, learned)
        off[name] = worst(predicted, other.true_bytes_of(model))
    assert {name: error for name, error in off.items() if error > 0.03} == {}


def test_a_measurement_on_one_gpu_does_not_change_the_estimate_for_more_gpus() -> None:
    """The first GPU's extra bytes cannot be separated, so the estimate for more GPUs is unchanged."""
    one, two = make_server(1), make_server(2)
    for name in MODELS:
        model = model_facts(name)
        _, learned = load(one, model)
        assert load(two, model, learned)[0] == load(two, model)[0]


def test_external_memory_allocated_during_a_load_is_not_attributed_to_the_model() -> None:
    server, model = make_server(1), model_facts("qwen2.5-coder:32b")
    assert load(server, model, external_bytes=GIB // 2)[1]
    assert load(server, model, external_bytes=6 * GIB)[1] == ()
