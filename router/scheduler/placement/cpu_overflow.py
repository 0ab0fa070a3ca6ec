"""Small models on the CPU, on purpose: what would be late on the GPUs and is in time on the CPU is served there.

An instance of its own (`InstanceSpec.is_overflow`) holds copies of the requested models that fit on one GPU, as far as
host memory is free. How fast each is there is measured when it is loaded, and corrected by every answer. A copy serves
one request at a time, and only one whose first token would come after the target on the GPUs and before it on the CPU.
To everything else the copies do not exist: a model is loaded on GPUs as if it were nowhere. Pure.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from dataclasses import replace
from typing import NamedTuple

from router.domain.instance import InstanceName, InstanceSpec, InstanceState
from router.domain.measured_speed import MeasuredSpeed
from router.domain.model import BlobDigest, ModelFacts
from router.domain.policy import CpuOverflow
from router.domain.request import Ticket
from router.domain.residency import Residency, ResidencyKey, ResidencyState
from router.domain.snapshot import Estimate, Snapshot
from router.domain.snapshot_index import overflow_instances, residencies_of
from router.scheduler.balancing.replica_choice import suits
from router.scheduler.placement.cost import is_warm_wanted, rate_of
from router.scheduler.placement.placement import Placed

_PROMPT_ERROR = 1.25
"""Prompts may have this many times more tokens than is estimated from their text."""
_NEW_SHARE = 0.3
"""Weight of the newest answer in a measured speed."""


class OnCpu(NamedTuple):
    """A request is to be served by this copy."""

    key: ResidencyKey
    reason: str


def serve(snapshot: Snapshot, ticket: Ticket, wait_seconds: float | None) -> OnCpu | None:
    """The copy that serves the ticket now; None if it should wait for the GPUs.

    `wait_seconds`: until it would have a slot on a GPU; None: unknown, which counts as late.
    """
    found = free_copy(snapshot, ticket.model.blob)
    if found is None or not suits(snapshot, found, ticket) or ticket.avoid == found.instance:
        return None
    speed, target = snapshot.cpu_speeds[found.blob], snapshot.policy.ttft_target_seconds
    first = ticket.prompt_tokens * _PROMPT_ERROR * speed.prompt_seconds + speed.step_seconds
    waited = snapshot.now - ticket.arrived_at
    is_late = wait_seconds is None or waited + wait_seconds > target
    if waited + first > target or not is_late or (wait_seconds is not None and first >= wait_seconds):
        return None
    late = "the GPUs would be late" if wait_seconds is None else f"the GPUs would be late (about {wait_seconds:.0f} s)"
    return OnCpu((found.instance, found.blob), f"on the CPU meanwhile: {late}, the CPU takes about {first:.0f} s")


def free_copy(snapshot: Snapshot, blob: BlobDigest) -> Residency | None:
    """The model's copy on the CPU, if it is fast enough and nothing else runs there."""
    cpu = snapshot.policy.cpu
    if cpu is None:
        return None
    for name in overflow_instances(snapshot):
        copy = snapshot.residencies.get((name, blob))
        is_up = snapshot.instances[name].state is InstanceState.READY and not snapshot.drained.covers(
            snapshot.instances[name].spec
        )
        if copy is None or copy.state is not ResidencyState.READY or not is_up or (name, blob) in snapshot.draining:
            continue
        is_idle = not any(snapshot.residencies[key].in_flight for key in residencies_of(snapshot, name))
        if is_idle and is_fast(cpu, snapshot.cpu_speeds.get(blob)):
            return copy
    return None


def is_fast(cpu: CpuOverflow, speed: MeasuredSpeed | None) -> bool:
    """Whether the measured speed allows to read along."""
    return speed is not None and speed.step_seconds * cpu.tokens_per_second_min <= 1.0


def copy_to_load(
    snapshot: Snapshot, models: Mapping[BlobDigest, ModelFacts], dismissed: Set[BlobDigest], estimate: Estimate
) -> tuple[ModelFacts, Placed] | None:
    """The next model to copy to the CPU, the most requested first; None while there is anything else to do.

    `models`: those that were requested. `dismissed`: those that clients have unloaded since.
    """
    cpu = snapshot.policy.cpu
    if cpu is None or snapshot.wanted or snapshot.reservations:
        return None
    for name in sorted(overflow_instances(snapshot)):
        if not _may_load(snapshot, name):
            continue
        spec = snapshot.instances[name].spec
        wanted = [m for blob, m in models.items() if blob not in dismissed and _is_eligible(snapshot, cpu, m, spec)]
        for model in sorted(wanted, key=lambda m: (-rate_of(snapshot, m), m.name)):
            size = host_bytes(snapshot, estimate, model, spec)
            if size <= room_bytes(snapshot, cpu, models):
                options = snapshot.engines[spec.engine].default_options(model, None, snapshot.policy.context_length)
                return model, Placed(name, (), (), f"{name}: for requests for which the GPUs would be late", options)
    return None


def _may_load(snapshot: Snapshot, name: InstanceName) -> bool:
    """Whether nothing runs or changes there, and the host's memory was read since the last change."""
    view = snapshot.instances[name]
    if view.state is not InstanceState.READY or snapshot.drained.covers(view.spec) or name in snapshot.ejected:
        return False
    copies = [snapshot.residencies[key] for key in residencies_of(snapshot, name)]
    return not any(
        c.in_flight or c.state is not ResidencyState.READY or c.loaded_at >= snapshot.gpus_read_at for c in copies
    )


def _is_eligible(snapshot: Snapshot, cpu: CpuOverflow, model: ModelFacts, spec: InstanceSpec) -> bool:
    if (spec.name, model.blob) in snapshot.residencies or model.engine != spec.engine or not model.is_on(spec):
        return False
    pin, known = snapshot.policy.pins.get(model.name), snapshot.cpu_speeds.get(model.blob)
    if pin is not None and (pin.gpus or pin.spread or pin.cpu):
        return False
    largest = max((gpu.memory_total_bytes for gpu in snapshot.gpus.values()), default=0)
    is_small = not (model.is_embedding or model.is_opaque) and model.weights_bytes < largest
    return is_small and is_warm_wanted(snapshot, model) and (known is None or is_fast(cpu, known))


def host_bytes(snapshot: Snapshot, estimate: Estimate, model: ModelFacts, spec: InstanceSpec) -> int:
    """Host memory that a copy takes at most: what it would take on a GPU, and its input table."""
    gpu = next(iter(snapshot.gpus), None)
    if gpu is None:
        return model.weights_bytes
    context = snapshot.engines[spec.engine].context_length((), model, spec)
    on_gpu = sum(estimate(model, replace(spec, gpus=(gpu,)), context, snapshot))
    return max(on_gpu, model.weights_bytes) + (model.input_bytes or 0)


def room_bytes(snapshot: Snapshot, cpu: CpuOverflow, models: Mapping[BlobDigest, ModelFacts]) -> int:
    """Host memory for one more copy. The files of all requested models must still fit into the page cache, or their
    loads would be slower than before."""
    if snapshot.host_free_bytes is None:
        return 0
    cached = sum(model.weights_bytes for model in models.values() if is_warm_wanted(snapshot, model))
    return snapshot.host_free_bytes - cpu.memory_margin_bytes - cached


def to_unload(snapshot: Snapshot) -> Iterator[tuple[ResidencyKey, str]]:
    """Idle copies that are too slow, no longer wanted, or in the way of other programs, with the reason."""
    cpu = snapshot.policy.cpu
    for name in overflow_instances(snapshot):
        idle = [key for key in residencies_of(snapshot, name) if snapshot.residencies[key].is_idle]
        is_short = cpu is not None and (snapshot.host_free_bytes or 0) < cpu.memory_margin_bytes
        if is_short:
            idle.sort(key=lambda key: snapshot.residencies[key].used_at)
        for key in idle:
            if cpu is None:
                yield key, "placement.cpu is never"
            elif key[1] not in snapshot.cpu_speeds:
                yield key, "its speed on the CPU was not measured"
            elif not is_fast(cpu, snapshot.cpu_speeds[key[1]]):
                yield key, "it is too slow on the CPU"
            elif not is_warm_wanted(snapshot, snapshot.residencies[key].model):
                yield key, "it is no longer requested often"
            elif is_short:
                yield key, "the host's memory is short"
                return


def corrected(
    known: MeasuredSpeed, prompt_tokens: int, output_tokens: int, times: tuple[float, float, float]
) -> MeasuredSpeed:
    """The speed after one more answer. `times`: of its grant, its first byte and its end."""
    granted_at, first_at, ended_at = times
    prompt, step = known
    if prompt_tokens > 0 and first_at > granted_at:
        # A prompt that was cached in part says nothing of slower ones: only longer times count at once.
        seen = (first_at - granted_at) / prompt_tokens
        prompt += _NEW_SHARE * (seen - prompt) if seen > prompt else 0.0
    if output_tokens > 1 and ended_at > first_at:
        step += _NEW_SHARE * ((ended_at - first_at) / (output_tokens - 1) - step)
    return MeasuredSpeed(prompt, step)
