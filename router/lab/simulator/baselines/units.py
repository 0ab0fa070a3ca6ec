"""The instances of the simulated router: a simulated server, its GPUs and its state.

Mirrors the instances that `router/engines/ollama/instance_plan.py` plans for discovered GPUs.
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
    """One instance of the simulated router."""

    spec: InstanceSpec
    server: SimServer
    state: InstanceState = InstanceState.STOPPED
    generation: int = 0
    fails_unloads: bool = False
    """While a fault makes every unload fail."""
    crash_times: list[float] = field(default_factory=list[float])
    last_list: tuple[LoadedModel, ...] = ()
    """The model list posted last."""
    last_list_at: float = 0.0


def overflow_instance(machine: Machine, config: ServerConfig) -> SimInstance:
    """The instance for CPU overflow."""
    instance = _instance(machine, "cpu-overflow", (), config, even=False)
    return replace(instance, spec=replace(instance.spec, is_overflow=True))


def instances_over(machine: Machine, config: ServerConfig, *, pairs: bool) -> list[SimInstance]:
    """One instance per GPU and one over all: split evenly over equal GPUs, else filled fastest GPU first."""
    gpus = machine.ledger.gpus
    instances = [_instance(machine, f"gpu{gpu.index}", (gpu.uuid,), config, even=False) for gpu in gpus]
    if len(gpus) > 1:
        even = len({(gpu.name, gpu.memory_total_bytes) for gpu in gpus}) == 1
        order = sorted(gpus, key=lambda c: (-c.facts.bandwidth_bytes_per_second, -c.memory_total_bytes, c.index))
        uuids = tuple(gpu.uuid for gpu in (gpus if even else order))
        instances.append(_instance(machine, "spread", uuids, config, even=even))
    for first, second in combinations(gpus, 2) if pairs and len(gpus) > 2 else ():
        instances.append(
            _instance(machine, f"pair{first.index}{second.index}", (first.uuid, second.uuid), config, even=True)
        )
    return instances


def _instance(
    machine: Machine, name: str, gpus: tuple[GpuUuid, ...], config: ServerConfig, *, even: bool
) -> SimInstance:
    totals = {gpu.uuid: gpu.memory_total_bytes for gpu in machine.ledger.gpus}
    shares = memory_shares(tuple(totals[uuid] for uuid in gpus))
    server_config = _server_config(config, shares, even=even)
    spec = InstanceSpec(
        name=InstanceName(name),
        gpus=gpus,
        url=f"sim://{name}",
        num_parallel=config.slots,
        context_length=config.context_length,
        kv_cache_type=config.kv_cache_type,
        flash_attention=config.flash_attention,
        environment=_environment(shares, even=even),
    )
    return SimInstance(spec, SimServer(machine, name, gpus, server_config))


def on_demand_instance(machine: Machine, spec: InstanceSpec, config: ServerConfig) -> SimInstance:
    """An instance that the scheduler starts on demand."""
    even = len(spec.gpus) > 1
    shares = parsed_split(spec.environment.get(TENSOR_SPLIT, "")) or (1.0,) * len(spec.gpus)
    named_spec = replace(spec, url=f"sim://{spec.name}", environment=_environment(shares, even=even))
    tuned_config = replace(config, slots=spec.num_parallel, kv_cache_type=spec.kv_cache_type)
    return SimInstance(
        named_spec, SimServer(machine, spec.name, spec.gpus, _server_config(tuned_config, shares, even=even))
    )


def _environment(shares: Shares, *, even: bool) -> dict[str, str]:
    spread = {"OLLAMA_SCHED_SPREAD": "1" if even else "0"}
    return {**spread, TENSOR_SPLIT: split_text(shares)} if len(shares) > 1 else spread


def _server_config(config: ServerConfig, shares: Shares, *, even: bool) -> ServerConfig:
    """As in `router/engines/ollama/instance_plan.py`: an instance over several GPUs splits layers by their memory."""
    return replace(config, spread=even, tensor_split=shares if len(shares) > 1 else ())


def on_demand_policy(policy: Policy, config: ServerConfig) -> Policy:
    """The policy with on-demand instances enabled, with the same settings as the fixed ones."""
    template = InstanceSpec(
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
        on_demand_like=template,
        context_length=config.context_length,
    )
