"""Plans which servers to run on which GPUs, and with what environment. Pure: ports are passed in.

One instance per GPU, and, with two or more whole GPUs, one spread over all of them. Without GPUs, one on the CPU.
Instances declared in the configuration are added, or replace these if discovery is off.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol
from urllib.parse import urlsplit

from router.domain.gpu import Gpu, GpuUuid
from router.domain.instance import InstanceName, InstanceSpec
from router.engines.ollama.tensor_split import TENSOR_SPLIT, Shares, memory_shares, parsed_split, split_text

SPREAD = InstanceName("spread")
CPU = InstanceName("cpu")
CPU_OVERFLOW = InstanceName("cpu-overflow")
"""Serves on the CPU what would be late on the GPUs."""
_UNREACHABLE_MODEL_COUNT = "100000"

HIDDEN_DEVICES: Mapping[str, str] = {
    "ROCR_VISIBLE_DEVICES": "-1",
    "HIP_VISIBLE_DEVICES": "-1",
    "GGML_VK_VISIBLE_DEVICES": "-1",
    "OLLAMA_VULKAN": "0",
}
"""Limits a server to its CUDA GPUs. From 0.30 on Ollama also finds GPUs through Vulkan, which `CUDA_VISIBLE_DEVICES`
does not hide: an instance for one GPU would use the others too. "-1" is the value in Ollama's GPU documentation for
hiding devices."""

SpreadMode = Literal["auto", "even", "fill_first", "off"]


class PlanError(ValueError):
    """The configuration cannot be applied to these GPUs; the text names the instance and what to change."""


class Tuning(Protocol):
    """Effective settings of one instance, and its configured environment variables."""

    @property
    def num_parallel(self) -> int: ...
    @property
    def context_length(self) -> int: ...
    @property
    def kv_cache_type(self) -> str: ...
    @property
    def flash_attention(self) -> bool | None: ...
    @property
    def environment(self) -> Mapping[str, str]: ...


class TuningFor(Protocol):
    """Returns the tuning of a discovered instance by name."""

    def __call__(self, name: str) -> Tuning: ...


@dataclass(frozen=True, slots=True)
class DeclaredInstance:
    """One instance of the configuration: attached if it has a url, otherwise spawned."""

    tuning: Tuning
    name: str | None = None
    url: str | None = None
    gpus: tuple[str, ...] = ()
    """UUIDs, unique prefixes of UUIDs, or indices, in order of preference."""
    engine: str = "ollama"
    """Kind of the engine of an attached server."""


@dataclass(frozen=True, slots=True)
class InstancePlan:
    """The configured part of a plan, independent of the GPUs."""

    models_directory: str
    tuning_for: TuningFor
    discover: bool = True
    spread: SpreadMode = "auto"
    cloud: bool = False
    declared: tuple[DeclaredInstance, ...] = ()
    cpu_overflow: bool = False
    """Whether there is an instance for CPU overflow beside those on GPUs."""


def plan_instances(gpus: Sequence[Gpu], plan: InstancePlan, ports: Iterable[int]) -> tuple[InstanceSpec, ...]:
    """The instances, discovered ones first. Each spawned one uses the next port; see `ports_needed`.

    GPUs that could not be read (`error` is set) get no instance, because a server cannot start on them.

    Raises:
        PlanError: an unknown GPU, a duplicate name, or too few ports.
    """
    usable = sorted((gpu for gpu in gpus if gpu.error is None), key=lambda gpu: gpu.index)
    free_ports = iter(ports)
    specs = [
        *_discovered(usable, plan, free_ports),
        *(_declared(declared, usable, plan, free_ports) for declared in plan.declared),
    ]
    names: set[InstanceName] = set()
    for spec in specs:
        if spec.name in names:
            raise PlanError(f"two instances are called {spec.name!r}: give the declared one another name")
        names.add(spec.name)
    return tuple(specs)


ON_DEMAND = "on-demand"
"""Name for which the tuning of instances started on demand is configured."""


def on_demand_like(plan: InstancePlan) -> InstanceSpec:
    """Template of instances started on demand, without GPUs, name, address and most of the environment."""
    tuning = plan.tuning_for(ON_DEMAND)
    environment = {"OLLAMA_SCHED_SPREAD": tuning.environment.get("OLLAMA_SCHED_SPREAD", "1")}
    if TENSOR_SPLIT in tuning.environment:
        environment[TENSOR_SPLIT] = tuning.environment[TENSOR_SPLIT]
    return _spec(InstanceName(""), (), "", tuning, environment, attached=False)


def on_demand_instance(spec: InstanceSpec, plan: InstancePlan, port: int) -> InstanceSpec:
    """Completes an instance that the dispatcher requested: adds the address and the whole environment."""
    tuning = _Tuned(
        spec.num_parallel,
        spec.context_length,
        spec.kv_cache_type,
        spec.flash_attention,
        plan.tuning_for(ON_DEMAND).environment,
    )
    shares = parsed_split(spec.environment.get(TENSOR_SPLIT, ""))
    complete = _spawned(spec.name, spec.gpus, tuning, plan, iter((port,)), even=len(spec.gpus) > 1, shares=shares)
    return replace(complete, on_demand=True)


def port_of(spec: InstanceSpec) -> int:
    """The port of its address; 0 if that names none."""
    return urlsplit(spec.url).port or 0


def at_port(spec: InstanceSpec, port: int) -> InstanceSpec:
    """The same spawned instance at another port."""
    address = f"127.0.0.1:{port}"
    return replace(spec, url=f"http://{address}", environment={**spec.environment, "OLLAMA_HOST": address})


@dataclass(frozen=True, slots=True)
class _Tuned:
    """A `Tuning` with the values of an `InstanceSpec`."""

    num_parallel: int
    context_length: int
    kv_cache_type: str
    flash_attention: bool | None
    environment: Mapping[str, str]


def ports_needed(gpus: Sequence[Gpu], plan: InstancePlan) -> int:
    """An upper bound on the number of ports that `plan_instances` uses."""
    discovered = max(1, len(gpus) + 1 + plan.cpu_overflow) if plan.discover else 0
    return discovered + sum(declared.url is None for declared in plan.declared)


def are_equal(gpus: Sequence[Gpu]) -> bool:
    """Returns True if all GPUs have the same name and memory size."""
    return len({(gpu.name, gpu.memory_total_bytes) for gpu in gpus}) <= 1


def fill_order(gpus: Sequence[Gpu]) -> tuple[Gpu, ...]:
    """GPUs, fastest first: by memory bandwidth, which limits decoding, then by memory, then by index."""
    return tuple(sorted(gpus, key=lambda c: (-(c.bandwidth_bytes_per_second or 0.0), -c.memory_total_bytes, c.index)))


def _discovered(gpus: Sequence[Gpu], plan: InstancePlan, ports: Iterator[int]) -> list[InstanceSpec]:
    if not plan.discover:
        return []
    if not gpus:
        return [_spawned(CPU, (), plan.tuning_for(CPU), plan, ports)]
    specs = [_single(gpu, plan, ports) for gpu in gpus]
    if plan.cpu_overflow:
        specs.append(replace(_spawned(CPU_OVERFLOW, (), plan.tuning_for(CPU_OVERFLOW), plan, ports), is_overflow=True))
    # CUDA gives a process at most one MIG device (NVIDIA MIG user guide), so no instance is spread over them.
    whole = [gpu for gpu in gpus if not gpu.uuid.startswith("MIG-")]
    if len(whole) < 2 or plan.spread == "off":
        return specs
    even = are_equal(whole) if plan.spread == "auto" else plan.spread == "even"
    ordered = tuple(whole) if even else fill_order(whole)
    uuids = tuple(gpu.uuid for gpu in ordered)
    shares = memory_shares(tuple(gpu.memory_total_bytes for gpu in ordered))
    return [*specs, _spawned(SPREAD, uuids, plan.tuning_for(SPREAD), plan, ports, even=even, shares=shares)]


def _single(gpu: Gpu, plan: InstancePlan, ports: Iterator[int]) -> InstanceSpec:
    name = InstanceName(f"gpu{gpu.index}")
    return _spawned(name, (gpu.uuid,), plan.tuning_for(name), plan, ports)


def _declared(
    declared: DeclaredInstance, gpus: Sequence[Gpu], plan: InstancePlan, ports: Iterator[int]
) -> InstanceSpec:
    name = declared_name(declared.name, declared.url)
    if not name:
        raise PlanError("a declared instance has neither a name nor a url: give it one of them")
    chosen = [_gpu(reference, name, gpus) for reference in declared.gpus]
    uuids = tuple(gpu.uuid for gpu in chosen)
    if len(set(uuids)) != len(uuids):
        raise PlanError(f"instance {name}: gpus names one GPU twice")
    if declared.url is not None:
        attached = _spec(name, uuids, declared.url.rstrip("/"), declared.tuning, {}, attached=True)
        return replace(attached, engine=declared.engine)
    even = len(uuids) > 1 and (are_equal(chosen) if plan.spread == "auto" else plan.spread == "even")
    shares = memory_shares(tuple(gpu.memory_total_bytes for gpu in chosen))
    return _spawned(name, uuids, declared.tuning, plan, ports, even=even, shares=shares)


def declared_name(name: str | None, url: str | None) -> InstanceName:
    """A declared instance without a name is called by its address."""
    return InstanceName(name or (url or "").partition("://")[2].rstrip("/"))


def _gpu(reference: str, name: str, gpus: Sequence[Gpu]) -> Gpu:
    if reference.isdecimal():
        matches = [gpu for gpu in gpus if gpu.index == int(reference)]
    else:
        matches = [gpu for gpu in gpus if gpu.uuid.lower().startswith(reference.lower())]
    if len(matches) == 1:
        return matches[0]
    available = ", ".join(f"{gpu.index}: {gpu.uuid} ({gpu.name})" for gpu in gpus) or "none"
    problem = "is no GPU" if not matches else "fits several GPUs"
    raise PlanError(f"instance {name}: gpus: {reference!r} {problem} of this machine; there are: {available}")


def _spawned(
    name: InstanceName,
    gpus: tuple[GpuUuid, ...],
    tuning: Tuning,
    plan: InstancePlan,
    ports: Iterator[int],
    *,
    even: bool = False,
    shares: Shares = (),
) -> InstanceSpec:
    """`shares`: of the GPUs; empty for equal ones."""
    port = next(ports, None)
    if port is None:
        raise PlanError(f"instance {name}: no free port is left for it")
    address = f"127.0.0.1:{port}"
    environment = {
        **_defaults(even, shares or (1.0,) * len(gpus)),
        **tuning.environment,
        **_values(tuning),
        **_fixed(gpus, plan),
        "OLLAMA_HOST": address,
    }
    return _spec(name, gpus, f"http://{address}", tuning, environment, attached=False)


def _spec(
    name: InstanceName,
    gpus: tuple[GpuUuid, ...],
    url: str,
    tuning: Tuning,
    environment: Mapping[str, str],
    *,
    attached: bool,
) -> InstanceSpec:
    return InstanceSpec(
        name=name,
        gpus=gpus,
        url=url,
        num_parallel=tuning.num_parallel,
        context_length=tuning.context_length,
        kv_cache_type=tuning.kv_cache_type,
        flash_attention=tuning.flash_attention,
        environment=environment,
        attached=attached,
    )


def _defaults(even: bool, shares: Shares) -> dict[str, str]:
    """Variables that the configuration may override."""
    # From 0.30 on a server splits a load with all layers on GPUs by free memory, which other instances distort.
    split = {TENSOR_SPLIT: split_text(shares)} if len(shares) > 1 else {}
    return {
        **HIDDEN_DEVICES,
        **split,
        "OLLAMA_SCHED_SPREAD": "1" if even else "0",
        # 0 would mean three models per GPU (server/sched.go); then Ollama evicts by count, even if memory is free.
        # The router decides about evictions, so the limit is set too high to be reached.
        "OLLAMA_MAX_LOADED_MODELS": _UNREACHABLE_MODEL_COUNT,
    }


def _values(tuning: Tuning) -> dict[str, str]:
    values = {
        "OLLAMA_NUM_PARALLEL": str(tuning.num_parallel),
        "OLLAMA_CONTEXT_LENGTH": str(tuning.context_length),
        "OLLAMA_KV_CACHE_TYPE": tuning.kv_cache_type,
    }
    if tuning.flash_attention is not None:
        values["OLLAMA_FLASH_ATTENTION"] = "1" if tuning.flash_attention else "0"
    return values


def _fixed(gpus: tuple[GpuUuid, ...], plan: InstancePlan) -> dict[str, str]:
    """Variables that the router's accounting depends on; they cannot be overridden."""
    fixed = {
        # "-1" is the value in Ollama's GPU documentation to force the CPU.
        "CUDA_VISIBLE_DEVICES": ",".join(gpus) or "-1",
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        "OLLAMA_MODELS": plan.models_directory,
        "OLLAMA_KEEP_ALIVE": "-1",
        "OLLAMA_NOPRUNE": "1",
    }
    return fixed if plan.cloud else {**fixed, "OLLAMA_NO_CLOUD": "1"}
