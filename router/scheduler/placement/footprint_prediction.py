"""What a load will take on each GPU: as such a load has shown before, else as estimated, corrected by the nearest one.

A load with another context, number of slots or type of cache differs from a measured one by what the estimate knows
well, the cache; what it knows less well, contexts and buffers and the driver's own, is in the difference between the
measured one and its estimate, and that is taken over GPU by GPU. For another number of GPUs it is not: what a load
holds on its first GPU only, or on its last, is not known apart. It measures nothing.
"""

from __future__ import annotations

from dataclasses import replace

from router.domain.footprint import FootprintKey
from router.domain.instance import InstanceSpec
from router.domain.model import ModelFacts
from router.domain.policy import Policy
from router.domain.snapshot import Snapshot
from router.engines.ollama.footprint_estimator import version_of, worst_case_bytes
from router.engines.ollama.runner_options import sets_num_gpu
from router.scheduler.placement.measured_footprints import Footprints, is_plausible, key_of
from router.scheduler.placement.placement import Estimate


class FootprintPredictor:
    """An `Estimate` that knows what loads have shown."""

    __slots__ = ("_footprints", "_policy", "_unseen")

    def __init__(self, policy: Policy, footprints: Footprints, unseen: Estimate) -> None:
        self._policy = policy
        self._footprints = footprints
        self._unseen = unseen

    def __call__(
        self, model: ModelFacts, spec: InstanceSpec, context_length: int, snapshot: Snapshot
    ) -> tuple[int, ...]:
        return worst_case_bytes(self._split, model, spec, context_length, snapshot)

    def _split(self, model: ModelFacts, spec: InstanceSpec, context_length: int, snapshot: Snapshot) -> tuple[int, ...]:
        key = key_of(model, spec, context_length, self._policy, version_of(spec, snapshot))
        known = self._footprints.known.get(key)
        if known is not None:
            return known
        sizes = self._unseen(model, spec, context_length, snapshot)
        nearest = self._footprints.nearest(key)
        if nearest is not None and not sets_num_gpu(model):
            return self._corrected(model, spec, sizes, nearest, snapshot)
        ratio = 1.0 + self._policy.constants.unseen_margin_ratio
        return tuple(int(size * ratio) for size in sizes)

    def _corrected(
        self, model: ModelFacts, spec: InstanceSpec, sizes: tuple[int, ...], nearest: FootprintKey, snapshot: Snapshot
    ) -> tuple[int, ...]:
        as_then = replace(spec, num_parallel=nearest.slots, kv_cache_type=nearest.kv_cache_type)
        expected = self._unseen(model, as_then, nearest.context_length, snapshot)
        shown = self._footprints.known[nearest]
        found = tuple(size + was - meant for size, was, meant in zip(sizes, shown, expected, strict=True))
        return found if is_plausible(found, sizes) else sizes
