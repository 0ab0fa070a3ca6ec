"""Bytes a load would take on each GPU of an instance: what placement asks for every candidate.

Puts the instance's tuning (slots, cache type, flash attention, version) and the way it splits layers together with the
figures of `engines/ollama/memory_estimate.py`. The router loads with all layers asked for, which are shared out by the
GPUs' memory: evenly on equal GPUs, and before 0.30 on all (`engines/ollama/tensor_split.py`). Only a model whose own
file says how many layers go to the GPUs is split as its server likes. And a server over several GPUs that is not
told to spread puts a model that one of them holds wholly there, all the same: each GPU it may choose is to hold all.
"""

from __future__ import annotations

from dataclasses import replace

from router.domain.footprint import Footprint, FootprintKey
from router.domain.instance import InstanceSpec
from router.domain.model import ModelFacts
from router.domain.snapshot import Estimate, Snapshot
from router.domain.snapshot_index import memoise
from router.domain.vram_ledger import capacity_bytes
from router.engines.ollama.memory_estimate import (
    LoadParameters,
    batch_tokens,
    cuda_context_bytes,
    fill_first_split,
    footprint,
    split_by,
)
from router.engines.ollama.offload_rules import FORCE_SPREAD, forces_spread, may_take_one_gpu
from router.engines.ollama.runner_options import sets_num_gpu, slots_of
from router.engines.ollama.server_version import parse_version
from router.engines.ollama.tensor_split import shares_of, unequal_text


def estimate_bytes(model: ModelFacts, spec: InstanceSpec, context_length: int, snapshot: Snapshot) -> tuple[int, ...]:
    """Bytes on each GPU of the instance, in its GPU order, at most; empty for one without GPUs."""
    return worst_case_bytes(_shares, model, spec, context_length, snapshot)


def _shares(model: ModelFacts, spec: InstanceSpec, context_length: int, snapshot: Snapshot) -> tuple[int, ...]:
    return estimated_footprint(model, spec, context_length, snapshot).per_gpu_bytes


def worst_case_bytes(
    estimate: Estimate, model: ModelFacts, spec: InstanceSpec, context_length: int, snapshot: Snapshot
) -> tuple[int, ...]:
    """What `estimate` says of each GPU's share, or of the whole model on that GPU alone where the server may put it
    there and that is more; but no more than a GPU that is empty can give, which leaves room for nothing beside it."""
    alone = may_use_single_gpu(model, spec, context_length, snapshot)
    if not any(alone):
        return estimate(model, spec, context_length, snapshot)
    told = spec if sets_num_gpu(model) else replace(spec, environment={**spec.environment, **FORCE_SPREAD})
    found = list(estimate(model, told, context_length, snapshot))
    for index, uuid in enumerate(spec.gpus):
        if alone[index]:
            (whole,) = estimate(model, replace(spec, gpus=(uuid,)), context_length, snapshot)
            gpu = snapshot.gpus[uuid]
            most = gpu.memory_free_bytes + gpu.memory_used_bytes - snapshot.policy.vram_margin_bytes
            found[index] = max(found[index], min(whole, most))
    return tuple(found)


def may_use_single_gpu(
    model: ModelFacts, spec: InstanceSpec, context_length: int, snapshot: Snapshot
) -> tuple[bool, ...]:
    """For each GPU of the instance: whether its server could put the whole model there, others being left empty; ()
    where it surely does not."""
    if len(spec.gpus) < 2 or forces_spread(spec):
        return ()
    gpus = [snapshot.gpus[gpu].memory_total_bytes if gpu in snapshot.gpus else 0 for gpu in spec.gpus]
    slots = slots_of(model, spec)
    return may_take_one_gpu(model, spec, version_of(spec, snapshot), context_length, slots, gpus)


def estimated_footprint(model: ModelFacts, spec: InstanceSpec, context_length: int, snapshot: Snapshot) -> Footprint:
    """The whole footprint with its parts, shared out over all GPUs. `context_length`: tokens of one slot, cut to the
    trained context."""
    load = load_parameters(model, spec, context_length, snapshot)
    split = split_by(model.layers, shares_of(spec, load.version))
    if sets_num_gpu(model) and _fills_first(spec):
        free = [capacity_bytes(snapshot, gpu) for gpu in spec.gpus]
        split = fill_first_split(model, free, load) or split
    return footprint(model, split, load)


def load_parameters(model: ModelFacts, spec: InstanceSpec, context_length: int, snapshot: Snapshot) -> LoadParameters:
    """How the instance's server would load the model. The batch is the largest that it may choose: what is
    on its GPUs now may be gone when it looks."""
    slots, version = slots_of(model, spec), version_of(spec, snapshot)
    gpus = [snapshot.gpus[uuid] for uuid in spec.gpus if uuid in snapshot.gpus]
    room = [gpu.memory_total_bytes for gpu in gpus]
    return LoadParameters(
        context_length=context_length,
        slots=slots,
        kv_cache_type=spec.kv_cache_type,
        flash_attention=spec.flash_attention,
        batch=batch_tokens(model, context_length, slots, version, spec.flash_attention, room),
        version=version,
        cuda_context_bytes=cuda_context_bytes(gpus),
    )


def estimate_facts(spec: InstanceSpec, snapshot: Snapshot) -> object:
    """All of the snapshot that the functions above read for models that do not set `num_gpu`."""
    return version_of(spec, snapshot), memoise(snapshot, estimate_facts, lambda: _gpu_facts(snapshot))


def _gpu_facts(snapshot: Snapshot) -> object:
    facts = (
        snapshot.policy.vram_margin_bytes,
        *(
            (uuid, gpu.memory_total_bytes, gpu.memory_free_bytes + gpu.memory_used_bytes, gpu.compute_capability)
            for uuid, gpu in snapshot.gpus.items()
        ),
    )
    return facts if snapshot.lasting is None else snapshot.lasting.same(estimate_facts, facts)


def version_of(spec: InstanceSpec, snapshot: Snapshot) -> str | None:
    """The version of the instance's server; of one that is not started yet, the version of the others."""
    view = snapshot.instances.get(spec.name)
    if view is not None and view.version is not None:
        return view.version
    others = (v for v in snapshot.instances.values() if v.spec.engine == spec.engine)
    return next((v.version for v in others if v.version is not None), None)


def footprint_key(
    model: ModelFacts, spec: InstanceSpec, context_length: int, version: str | None = None
) -> FootprintKey:
    """What a load's size depends on. Of the server's version, only major and minor count."""
    slots, cache, number = slots_of(model, spec), spec.kv_cache_type or "f16", parse_version(version)
    release = "" if number is None else f"{number[0]}.{number[1]}"
    gpus, split = len(spec.gpus), unequal_text(spec)
    return FootprintKey(model.blob, gpus, context_length, slots, cache, split, spec.flash_attention, release)


def _fills_first(spec: InstanceSpec) -> bool:
    """Whether the server fills a GPU before it begins the next: over several GPUs, without `OLLAMA_SCHED_SPREAD`."""
    return len(spec.gpus) > 1 and not spec.attached and not forces_spread(spec)
