"""What no scheduler can beat by moving models: all of them resident, each with its slots, and nothing to wait for else.

Each model stands alone on the fastest GPU that holds it, else on the smallest set of fastest GPUs that does; memory
is not counted, as if each had a machine of its own. It has one copy of each model.
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
from router.lab.simulator.world import true_bytes


class Floor:
    """Every model of the mix, loaded before the first request."""

    def __init__(self, machine: Machine, models: Mapping[str, ModelFacts], config: ServerConfig) -> None:
        self._loaded: dict[BlobDigest, ModelRunner] = {}
        for model in models.values():
            gpus, layers = _best_layout(machine, model, config)
            loaded = ModelRunner.plan(machine, "floor", model, config, gpus, layers, shape_of(model, config))
            loaded.phase = Phase.READY
            self._loaded[model.blob] = loaded

    def start(self) -> None:
        """All is there."""

    def submit(self, request: Request, done: OnFinished) -> None:
        request.where = "floor"
        self._loaded[request.model.blob].serve(request, done)

    def cancel(self, request: Request) -> None:
        self._loaded[request.model.blob].cancel(request)

    def server_died(self, index: int) -> None:
        """Nothing goes wrong for the floor."""

    def gpu_lost(self, uuid: GpuUuid) -> None:
        """Nor this."""


def _best_layout(
    machine: Machine, model: ModelFacts, config: ServerConfig
) -> tuple[tuple[GpuUuid, ...], tuple[int, ...]]:
    """The fewest GPUs that hold all layers in even parts, fastest first; all GPUs where even those do not."""
    order = sorted(machine.ledger.gpus, key=_by_speed)
    for count in range(1, len(order) + 1):
        chosen = order[:count]
        layers = even_units(model.layers + 1, count)
        sizes = true_bytes(machine.world, model, shape_of(model, config), layers)
        if all(size <= gpu.usable_bytes for size, gpu in zip(sizes, chosen, strict=True)):
            return tuple(gpu.uuid for gpu in chosen), layers
    return tuple(gpu.uuid for gpu in order), even_units(model.layers + 1, len(order))


def _by_speed(gpu: SimGpu) -> tuple[float, int]:
    return (-gpu.facts.bandwidth_bytes_per_second, gpu.index)


def even_units(units: int, parts: int) -> tuple[int, ...]:
    """As even as whole units can be, more in the first parts."""
    each, rest = divmod(units, parts)
    return tuple(each + (index < rest) for index in range(parts))
