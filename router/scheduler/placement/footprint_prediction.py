"""Predicts the bytes that a load takes on each GPU: measured where such a load was measured, else estimated.

An estimate is corrected by the nearest measured load of the same weights on as many GPUs. Loads that differ in
context, slots or cache type differ by what the estimate knows well, the cache. What it knows less well (contexts,
buffers, the driver's own use) is in the difference between the measured load and its estimate, which is added GPU by
GPU. For another number of GPUs it is not: what a load holds only on its first or last GPU is unknown. Measures nothing.
"""

from __future__ import annotations

from dataclasses import replace

from router.domain.footprint import FootprintKey
from router.domain.instance import InstanceSpec
from router.domain.model import ModelFacts
from router.domain.policy import Policy
from router.domain.snapshot import Snapshot
from router.scheduler.placement.measured_footprints import Footprints, is_plausible


def estimate_unmeasured(
    model: ModelFacts, spec: InstanceSpec, context_length: int, snapshot: Snapshot
) -> tuple[int, ...]:
    """An `Estimate` by the engine's rules alone."""
    return snapshot.engines[spec.engine].estimate_bytes(model, spec, context_length, snapshot)


class FootprintPredictor:
    """An `Estimate` that uses measured footprints."""

    __slots__ = ("_footprints", "_policy")

    def __init__(self, policy: Policy, footprints: Footprints) -> None:
        self._policy = policy
        self._footprints = footprints

    def __call__(
        self, model: ModelFacts, spec: InstanceSpec, context_length: int, snapshot: Snapshot
    ) -> tuple[int, ...]:
        engine = snapshot.engines[spec.engine]
        return engine.worst_case_bytes(self._split, model, spec, context_length, snapshot)

    def _split(self, model: ModelFacts, spec: InstanceSpec, context_length: int, snapshot: Snapshot) -> tuple[int, ...]:
        engine = snapshot.engines[spec.engine]
        key = engine.footprint_key(model, spec, context_length, snapshot)
        measured = self._footprints.known.get(key)
        if measured is not None:
            return measured
        sizes = engine.estimate_bytes(model, spec, context_length, snapshot)
        nearest = self._footprints.nearest(key)
        if nearest is not None and not engine.sets_own_layers(model):
            return self._corrected(model, spec, sizes, nearest, snapshot)
        ratio = 1.0 + self._policy.constants.unseen_margin_ratio
        return tuple(int(size * ratio) for size in sizes)

    def _corrected(
        self, model: ModelFacts, spec: InstanceSpec, sizes: tuple[int, ...], nearest: FootprintKey, snapshot: Snapshot
    ) -> tuple[int, ...]:
        measured_spec = replace(spec, num_parallel=nearest.slots, kv_cache_type=nearest.kv_cache_type)
        expected = estimate_unmeasured(model, measured_spec, nearest.context_length, snapshot)
        measured = self._footprints.known[nearest]
        corrected = tuple(
            size + shown - estimated for size, shown, estimated in zip(sizes, measured, expected, strict=True)
        )
        return corrected if is_plausible(corrected, sizes) else sizes
