"""The floor: a lower bound on waiting that no placement of single replicas can beat.

Every model is resident from the start, with one replica on the fastest GPU that holds it, else on the smallest set of
fastest GPUs. Memory is not counted, as if each model had its own machine, so requests wait only for slots.
"""

from __future__ import annotations

from collections.abc import Mapping

from router.domain.gpu import GpuUuid
from router.domain.model import BlobDigest, ModelFacts
from router.lab.simulator.batching import OnFinished
from router.lab.simulator.gpus import SimGpu
from router.lab.simulator.loaded_model import ModelRunner, Phase, ServerConfig, shape_of
from router.lab.simulator.machine import Machine
from router.lab.simulator.requests import Request
from router.lab.simulator.true_footprint import true_gpu_bytes


class Floor:
    """All models of the mix, loaded before the first request."""

    def __init__(self, machine: Machine, models: Mapping[str, ModelFacts], config: ServerConfig) -> None:
        self._loaded: dict[BlobDigest, ModelRunner] = {}
        for model in models.values():
            gpus, layers = _best_layout(machine, model, config)
            loaded = ModelRunner.plan(machine, "floor", model, config, gpus, layers, shape_of(model, config))
            loaded.phase = Phase.READY
            self._loaded[model.blob] = loaded

    def start(self) -> None:
        """All models are loaded already."""

    def submit(self, request: Request, done: OnFinished) -> None:
        request.where = "floor"
        self._loaded[request.model.blob].serve(request, done)

    def cancel(self, request: Request) -> None:
        self._loaded[request.model.blob].cancel(request)

    def server_died(self, index: int) -> None:
        """Faults do not affect the floor."""

    def unloads_fail(self, index: int, *, is_failing: bool) -> None:
        """Faults do not affect the floor."""

    def gpu_lost(self, uuid: GpuUuid) -> None:
        """Faults do not affect the floor."""

    def drain(self, uuid: GpuUuid, *, is_resumed: bool) -> None:
        """Faults do not affect the floor."""

    def restart_all(self) -> None:
        """Faults do not affect the floor."""


def _best_layout(
    machine: Machine, model: ModelFacts, config: ServerConfig
) -> tuple[tuple[GpuUuid, ...], tuple[int, ...]]:
    """An even split over the fewest GPUs that hold it, fastest first; over all GPUs if none does."""
    order = sorted(machine.ledger.gpus, key=_by_speed)
    for count in range(1, len(order) + 1):
        chosen = order[:count]
        layers = even_units(model.layers + 1, count)
        sizes = true_gpu_bytes(model, shape_of(model, config), layers)
        if all(size <= gpu.usable_bytes for size, gpu in zip(sizes, chosen, strict=True)):
            return tuple(gpu.uuid for gpu in chosen), layers
    return tuple(gpu.uuid for gpu in order), even_units(model.layers + 1, len(order))


def _by_speed(gpu: SimGpu) -> tuple[float, int]:
    return (-gpu.facts.bandwidth_bytes_per_second, gpu.index)


def even_units(units: int, parts: int) -> tuple[int, ...]:
    """As even as possible; the first parts get the remainder."""
    each, rest = divmod(units, parts)
    return tuple(each + (index < rest) for index in range(parts))
