"""The instances that the simulated router has: which servers over which GPUs, and how far each has come.

It mirrors what `router/engines/ollama/instance_plan.py` plans from discovery. It starts nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import combinations

from router.domain.events import LoadedModel
from router.domain.gpu import GpuUuid
from router.domain.instance import InstanceName, InstanceSpec, InstanceState
from router.domain.policy import Policy
from router.engines.ollama.tensor_split import TENSOR_SPLIT, Shares, memory_shares, parsed_split, split_text
from router.lab.simulator.loaded_model import ServerConfig
from router.lab.simulator.machine import Machine
from router.lab.simulator.server import SimServer


@dataclass(slots=True)
class SimInstance:
    """One instance."""

    spec: InstanceSpec
    server: SimServer
    state: InstanceState = InstanceState.STOPPED
    lives: int = 0
    deaths: list[float] = field(default_factory=list[float])
    listed: tuple[LoadedModel, ...] = ()
    """As last told, and when."""
    listed_at: float = 0.0


def instances_over(machine: Machine, config: ServerConfig, *, pairs: bool) -> list[SimInstance]:
    """One instance a GPU and one over all: even on equal GPUs, else filled first, the fastest GPU first."""
    gpus = machine.ledger.gpus
    units = [_unit(machine, f"gpu{gpu.index}", (gpu.uuid,), config, even=False) for gpu in gpus]
    if len(gpus) > 1:
        even = len({(gpu.name, gpu.memory_total_bytes) for gpu in gpus}) == 1
        order = sorted(gpus, key=lambda c: (-c.facts.bandwidth_bytes_per_second, -c.memory_total_bytes, c.index))
        uuids = tuple(gpu.uuid for gpu in (gpus if even else order))
        units.append(_unit(machine, "spread", uuids, config, even=even))
    for one, other in combinations(gpus, 2) if pairs and len(gpus) > 2 else ():
        units.append(_unit(machine, f"pair{one.index}{other.index}", (one.uuid, other.uuid), config, even=True))
    return units


def _unit(machine: Machine, name: str, gpus: tuple[GpuUuid, ...], config: ServerConfig, *, even: bool) -> SimInstance:
    totals = {gpu.uuid: gpu.memory_total_bytes for gpu in machine.ledger.gpus}
    shares = memory_shares(tuple(totals[uuid] for uuid in gpus))
    own = _own(config, shares, even=even)
    spec = InstanceSpec(
        name=InstanceName(name),
        gpus=gpus,
        url=f"sim://{name}",
        num_parallel=config.slots,
        context_length=config.context_length,
        kv_cache_type=config.kv_cache_type,
        flash_attention=config.flash_attention,
        environment=_variables(shares, even=even),
    )
    return SimInstance(spec, SimServer(machine, name, gpus, own))


def on_demand_instance(machine: Machine, spec: InstanceSpec, config: ServerConfig) -> SimInstance:
    """One that the dispatcher asked for."""
    even = len(spec.gpus) > 1
    shares = parsed_split(spec.environment.get(TENSOR_SPLIT, "")) or (1.0,) * len(spec.gpus)
    named = replace(spec, url=f"sim://{spec.name}", environment=_variables(shares, even=even))
    tuned = replace(config, slots=spec.num_parallel, kv_cache_type=spec.kv_cache_type)
    return SimInstance(named, SimServer(machine, spec.name, spec.gpus, _own(tuned, shares, even=even)))


def _variables(shares: Shares, *, even: bool) -> dict[str, str]:
    spread = {"OLLAMA_SCHED_SPREAD": "1" if even else "0"}
    return {**spread, TENSOR_SPLIT: split_text(shares)} if len(shares) > 1 else spread


def _own(config: ServerConfig, shares: Shares, *, even: bool) -> ServerConfig:
    """As `router/engines/ollama/instance_plan.py` has it: an instance over several GPUs shares layers by their
    memory."""
    return replace(config, spread=even, tensor_split=shares if len(shares) > 1 else ())


def on_demand_policy(policy: Policy, config: ServerConfig) -> Policy:
    """The policy with instances on demand, tuned like the others, as the product has it over GPUs."""
    like = InstanceSpec(
        name=InstanceName(""),
        gpus=(),
        url="",
        num_parallel=config.slots,
        context_length=config.context_length,
        kv_cache_type=config.kv_cache_type,
        flash_attention=config.flash_attention,
        environment={"OLLAMA_SCHED_SPREAD": "1"},
    )
    return replace(
        policy,
        constants=replace(policy.constants, unseen_margin_ratio=0.02),
        instances_on_demand=True,
        on_demand_like=like,
        context_length=config.context_length,
    )
