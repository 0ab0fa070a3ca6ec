"""What a model takes on each candidate. Sizes of an unchanged candidate are remembered beyond the snapshot."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from router.domain.gpu import GpuUuid
from router.domain.instance import InstanceName
from router.domain.model import ModelFacts
from router.domain.request import RunnerOptions
from router.domain.snapshot import Estimate, Snapshot
from router.domain.snapshot_index import memoise
from router.domain.vram_ledger import available_bytes, capacity_bytes
from router.scheduler.placement.candidates import Candidate
from router.scheduler.placement.footprint_prediction import FootprintPredictor

Need = tuple[tuple[GpuUuid, int], ...]
"""Bytes on each GPU."""


@dataclass(frozen=True, slots=True)
class SizedCandidate:
    """A candidate, and the bytes that the load takes on each of its GPUs."""

    candidate: Candidate
    need: Need

    @property
    def name(self) -> InstanceName:
        return self.candidate.spec.name


class Sizer:
    """Sizes one model with one set of options on candidates of one snapshot."""

    __slots__ = ("_estimate", "_known", "_model", "_options", "_snapshot")

    def __init__(self, snapshot: Snapshot, estimate: Estimate, model: ModelFacts, options: RunnerOptions) -> None:
        self._snapshot, self._estimate, self._model, self._options = snapshot, estimate, model, options
        self._known = _known_sizes(snapshot, estimate, model, options)

    def sized(self, candidate: Candidate, slots: int) -> SizedCandidate:
        """The candidate with so many slots, which only an instance that has to be started may get."""
        known = self._known
        if known is None:
            return self._size(candidate, slots)
        key = (id(candidate), slots)
        found = known.get(key)
        if found is None:
            # The candidate is kept with its size, so that no other one gets its id.
            found = known[key] = (candidate, self._size(candidate, slots))
        return found[1]

    def _size(self, candidate: Candidate, slots: int) -> SizedCandidate:
        if slots != candidate.spec.num_parallel:
            candidate = replace(candidate, spec=replace(candidate.spec, num_parallel=slots))
        spec, snapshot = candidate.spec, self._snapshot
        context = snapshot.engines[spec.engine].context_length(self._options, self._model, spec)
        needed = self._estimate(self._model, spec, context, snapshot)
        return SizedCandidate(candidate, tuple(zip(spec.gpus, needed, strict=True)))


def _known_sizes(
    snapshot: Snapshot, estimate: Estimate, model: ModelFacts, options: RunnerOptions
) -> dict[tuple[int, int], tuple[Candidate, SizedCandidate]] | None:
    """Sizes by candidate and slots. A candidate is another object once anything changes that its size depends on."""
    lasting = snapshot.lasting
    if lasting is None or not isinstance(estimate, FootprintPredictor):
        return None
    if snapshot.engines[model.engine].sets_own_layers(model):
        return None  # its size may depend on anything
    table: dict[Any, Any] = lasting.table((Sizer, id(model), options), model, estimate.revision(model))
    return table


def capacities(snapshot: Snapshot) -> Mapping[GpuUuid, int]:
    """Bytes that each GPU could hold if it were empty."""
    return memoise(snapshot, capacities, lambda: {gpu: capacity_bytes(snapshot, gpu) for gpu in snapshot.gpus})


def free_room(snapshot: Snapshot) -> Mapping[GpuUuid, int]:
    """Bytes of each GPU that a load may use now."""
    return memoise(snapshot, free_room, lambda: {gpu: available_bytes(snapshot, gpu) for gpu in snapshot.gpus})


def fits(need: Need, room: Mapping[GpuUuid, int]) -> bool:
    """Whether each GPU has room for its part; a GPU that is not known has none."""
    for gpu, size in need:  # noqa: SIM110 - half the cost of a generator, thousands of times in a search
        if room.get(gpu, 0) < size:
            return False
    return True
