"""Predicts the bytes that a load takes on each GPU: measured where such a load was measured, else estimated.

One measured load carries to all others of the same weights on such a server. Where its parts are known (weights, cache,
buffers), each part of the estimate is scaled by what that part measured, for any context, slots and number of GPUs.
Where only totals are known, the difference between the measured load and its own estimate is added, GPU by GPU, for as
many GPUs. Without either, the engine's margin is added to the estimate. Measures nothing.
"""

from __future__ import annotations

from dataclasses import replace

from router.domain.engine_rules import EngineRules
from router.domain.footprint import Footprint, FootprintKey, GpuFootprint, MeasuredFootprint
from router.domain.instance import InstanceSpec
from router.domain.model import ModelFacts
from router.domain.snapshot import Snapshot
from router.scheduler.placement.measured_footprints import RAISE_RATIO, Footprints


def estimate_unmeasured(
    model: ModelFacts, spec: InstanceSpec, context_length: int, snapshot: Snapshot
) -> tuple[int, ...]:
    """An `Estimate` by the engine's rules alone."""
    return snapshot.engines[spec.engine].estimate_bytes(model, spec, context_length, snapshot)


class FootprintPredictor:
    """An `Estimate` that uses measured footprints."""

    __slots__ = ("_footprints",)

    def __init__(self, footprints: Footprints) -> None:
        self._footprints = footprints

    def revision(self, model: ModelFacts) -> int:
        """Grows with every change of what was measured of the model."""
        return self._footprints.revision(model.blob)

    def __call__(
        self, model: ModelFacts, spec: InstanceSpec, context_length: int, snapshot: Snapshot
    ) -> tuple[int, ...]:
        engine = snapshot.engines[spec.engine]
        sizes = engine.worst_case_bytes(self._split, model, spec, context_length, snapshot)
        if model.blob not in self._footprints.raised_at:
            return sizes
        return tuple(int(size * RAISE_RATIO) for size in sizes)

    def _split(self, model: ModelFacts, spec: InstanceSpec, context_length: int, snapshot: Snapshot) -> tuple[int, ...]:
        engine = snapshot.engines[spec.engine]
        key = engine.footprint_key(model, spec, context_length, snapshot)
        measured = self._footprints.known.get(key)
        if measured is not None:
            return measured.per_gpu_bytes
        if not engine.sets_own_layers(model):
            by_parts = self._footprints.with_parts(key)
            if by_parts is not None:
                return _scaled(engine, model, spec, context_length, by_parts, snapshot)
            nearest = self._footprints.nearest(key)
            if nearest is not None:
                return self._shifted(model, spec, context_length, nearest, snapshot)
        sizes = engine.estimate_bytes(model, spec, context_length, snapshot)
        ratio = 1.0 + _margin_ratio(engine, model, snapshot)
        return tuple(int(size * ratio) for size in sizes)

    def _shifted(
        self,
        model: ModelFacts,
        spec: InstanceSpec,
        context_length: int,
        nearest: FootprintKey,
        snapshot: Snapshot,
    ) -> tuple[int, ...]:
        sizes = estimate_unmeasured(model, spec, context_length, snapshot)
        expected = estimate_unmeasured(model, _as_measured(spec, nearest), nearest.context_length, snapshot)
        measured = self._footprints.known[nearest].per_gpu_bytes
        return tuple(
            max(0, size + shown - estimated) for size, shown, estimated in zip(sizes, measured, expected, strict=True)
        )


def _margin_ratio(engine: EngineRules[Snapshot], model: ModelFacts, snapshot: Snapshot) -> float:
    """The engine's own margin counts where margins are in use at all: tests of sums go without."""
    ratio = snapshot.policy.constants.unseen_margin_ratio
    return max(ratio, engine.margin_ratio(model)) if ratio else 0.0


def _as_measured(spec: InstanceSpec, key: FootprintKey) -> InstanceSpec:
    return replace(spec, num_parallel=key.slots, kv_cache_type=key.kv_cache_type)


def _scaled(
    engine: EngineRules[Snapshot],
    model: ModelFacts,
    spec: InstanceSpec,
    context_length: int,
    measured: MeasuredFootprint,
    snapshot: Snapshot,
) -> tuple[int, ...]:
    """The estimate with each part scaled by what the same part of a measured load came to, against its estimate."""
    gpus = (*spec.gpus, *(uuid for uuid in snapshot.gpus if uuid not in spec.gpus))[: measured.key.gpus]
    like = replace(_as_measured(spec, measured.key), gpus=gpus)
    expected = engine.estimate_footprint(model, like, measured.key.context_length, snapshot)
    wanted = engine.estimate_footprint(model, spec, context_length, snapshot)
    seen = Footprint.of(measured.parts)
    weights = _ratio(seen.weights_bytes + seen.projector_bytes, expected.weights_bytes + expected.projector_bytes)
    cache = _ratio(
        seen.kv_cache_bytes + seen.recurrent_state_bytes, expected.kv_cache_bytes + expected.recurrent_state_bytes
    )
    buffers = _ratio(seen.compute_buffer_bytes, expected.compute_buffer_bytes)
    contexts = [part.cuda_context_bytes for part in measured.parts if part.cuda_context_bytes]
    context = max(contexts, default=0)
    return tuple(_scaled_gpu(gpu, weights, cache, buffers, context) for gpu in wanted.gpus)


def _scaled_gpu(gpu: GpuFootprint, weights: float, cache: float, buffers: float, context: int) -> int:
    if not gpu.total_bytes:
        return 0
    return int(
        (gpu.weights_bytes + gpu.projector_bytes) * weights
        + (gpu.kv_cache_bytes + gpu.recurrent_state_bytes) * cache
        + gpu.compute_buffer_bytes * buffers
        + (context or gpu.cuda_context_bytes)
    )


def _ratio(seen: int, expected: int) -> float:
    return seen / expected if expected else 1.0
