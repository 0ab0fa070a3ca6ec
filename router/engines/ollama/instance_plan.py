"""Which servers to run on which GPUs, and with what environment. Pure: facts in, `InstanceSpec` values out.

One instance a GPU, and with two or more whole GPUs one spread over all of them; without a GPU one on the CPU; those
declared by hand beside them or instead. Starts nothing, reads no environment and picks no port: ports are passed in.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

from router.domain.gpu import Gpu, GpuUuid
from router.domain.instance import InstanceName, InstanceSpec
from router.engines.ollama.tensor_split import TENSOR_SPLIT, Shares, memory_shares, parsed_split, split_text

SPREAD = InstanceName("spread")
CPU = InstanceName("cpu")
_UNREACHABLE_MODEL_COUNT = "100000"

HIDDEN_DEVICES: Mapping[str, str] = {
    "ROCR_VISIBLE_DEVICES": "-1",
    "HIP_VISIBLE_DEVICES": "-1",
    "GGML_VK_VISIBLE_DEVICES": "-1",
    "OLLAMA_VULKAN": "0",
}
"""What keeps a server to its CUDA GPUs. From 0.30 Ollama also finds GPUs through Vulkan, which
`CUDA_VISIBLE_DEVICES` does not hide: an instance for one GPU would take its siblings' too. "-1" is what Ollama's own
GPU documentation names for hiding a device."""

SpreadMode = Literal["auto", "even", "fill_first", "off"]


class PlanError(ValueError):
    """The configuration asks for instances that the GPUs do not allow; the text names the instance and the way out."""


class Tuning(Protocol):
    """Effective values of one instance and the variables that say so to a server."""

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
    """The tuning of the instance of that name, of one made from discovery."""

    def __call__(self, name: str) -> Tuning: ...


@dataclass(frozen=True, slots=True)
class DeclaredInstance:
    """One instance from the configuration: attached where it has a url, else spawned."""

    tuning: Tuning
    name: str | None = None
    url: str | None = None
    gpus: tuple[str, ...] = ()
    """UUIDs, unmistakable beginnings of them, or indices, in order of preference."""


@dataclass(frozen=True, slots=True)
class InstancePlan:
    """What is asked for, whatever the GPUs."""

    models_directory: str
    tuning_for: TuningFor
    discover: bool = True
    spread: SpreadMode = "auto"
    cloud: bool = False
    declared: tuple[DeclaredInstance, ...] = ()


def plan_instances(gpus: Sequence[Gpu], plan: InstancePlan, ports: Iterable[int]) -> tuple[InstanceSpec, ...]:
    """The instances, discovered ones first. Spawned ones take ports in turn; `ports_needed` says how many.

    GPUs that could not be read (`error` set) get no instance: a server cannot start on them.

    Raises:
        PlanError: an unknown GPU, a name that is given twice, or too few ports.
    """
    usable = sorted((gpu for gpu in gpus if gpu.error is None), key=lambda gpu: gpu.index)
    free = iter(ports)
    specs = [*_discovered(usable, plan, free), *(_declared(one, usable, plan, free) for one in plan.declared)]
    seen: set[InstanceName] = set()
    for spec in specs:
        if spec.name in seen:
            raise PlanError(f"two instances are called {spec.name!r}: give the declared one another name")
        seen.add(spec.name)
    return tuple(specs)


ON_DEMAND = "on-demand"
"""What stands for the name of an instance that is not there yet, where its tuning is asked for."""


def on_demand_like(plan: InstancePlan) -> InstanceSpec:
    """How instances are tuned that are started on demand; GPUs, name, address and all other variables come later."""
    tuning = plan.tuning_for(ON_DEMAND)
    known = {"OLLAMA_SCHED_SPREAD": tuning.environment.get("OLLAMA_SCHED_SPREAD", "1")}
    if TENSOR_SPLIT in tuning.environment:
        known[TENSOR_SPLIT] = tuning.environment[TENSOR_SPLIT]
    return _spec(InstanceName(""), (), "", tuning, known, attached=False)


def on_demand_instance(spec: InstanceSpec, plan: InstancePlan, port: int) -> InstanceSpec:
    """The instance that the dispatcher asked for, whole: with an address, and an environment that says what it is."""
    tuning = _Tuned(
        spec.num_parallel,
        spec.context_length,
        spec.kv_cache_type,
        spec.flash_attention,
        plan.tuning_for(ON_DEMAND).environment,
    )
    shares = parsed_split(spec.environment.get(TENSOR_SPLIT, ""))
    whole = _spawned(spec.name, spec.gpus, tuning, plan, iter((port,)), even=len(spec.gpus) > 1, shares=shares)
    return replace(whole, on_demand=True)


@dataclass(frozen=True, slots=True)
class _Tuned:
    """Values that were decided."""

    num_parallel: int
    context_length: int
    kv_cache_type: str
    flash_attention: bool | None
    environment: Mapping[str, str]


def ports_needed(gpus: Sequence[Gpu], plan: InstancePlan) -> int:
    """An upper bound on the ports that `plan_instances` takes."""
    discovered = max(1, len(gpus) + 1) if plan.discover else 0
    return discovered + sum(one.url is None for one in plan.declared)


def are_equal(gpus: Sequence[Gpu]) -> bool:
    """Whether the GPUs have one name and one size of memory."""
    return len({(gpu.name, gpu.memory_total_bytes) for gpu in gpus}) <= 1


def fill_order(gpus: Sequence[Gpu]) -> tuple[Gpu, ...]:
    """Fastest first: by memory bandwidth, which bounds decoding, then by memory, then by index."""
    return tuple(sorted(gpus, key=lambda c: (-(c.bandwidth_bytes_per_second or 0.0), -c.memory_total_bytes, c.index)))


def _discovered(gpus: Sequence[Gpu], plan: InstancePlan, ports: Iterator[int]) -> list[InstanceSpec]:
    if not plan.discover:
        return []
    if not gpus:
        return [_spawned(CPU, (), plan.tuning_for(CPU), plan, ports)]
    specs = [_single(gpu, plan, ports) for gpu in gpus]
    # CUDA gives a process one MIG device at most (NVIDIA MIG user guide), so nothing spreads over them.
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


def _declared(one: DeclaredInstance, gpus: Sequence[Gpu], plan: InstancePlan, ports: Iterator[int]) -> InstanceSpec:
    name = InstanceName(one.name or (one.url or "").partition("://")[2].rstrip("/"))
    if not name:
        raise PlanError("a declared instance has neither a name nor a url: give it one of them")
    chosen = [_gpu(wanted, name, gpus) for wanted in one.gpus]
    uuids = tuple(gpu.uuid for gpu in chosen)
    if len(set(uuids)) != len(uuids):
        raise PlanError(f"instance {name}: gpus names one GPU twice")
    if one.url is not None:
        return _spec(name, uuids, one.url.rstrip("/"), one.tuning, {}, attached=True)
    even = len(uuids) > 1 and (are_equal(chosen) if plan.spread == "auto" else plan.spread == "even")
    shares = memory_shares(tuple(gpu.memory_total_bytes for gpu in chosen))
    return _spawned(name, uuids, one.tuning, plan, ports, even=even, shares=shares)


def _gpu(wanted: str, name: str, gpus: Sequence[Gpu]) -> Gpu:
    if wanted.isdecimal():
        found = [gpu for gpu in gpus if gpu.index == int(wanted)]
    else:
        found = [gpu for gpu in gpus if gpu.uuid.lower().startswith(wanted.lower())]
    if len(found) == 1:
        return found[0]
    there = ", ".join(f"{gpu.index}: {gpu.uuid} ({gpu.name})" for gpu in gpus) or "none"
    problem = "is no GPU" if not found else "fits several GPUs"
    raise PlanError(f"instance {name}: gpus: {wanted!r} {problem} of this machine; there are: {there}")


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
    """`shares`: of the GPUs; even ones where there are none."""
    port = next(ports, None)
    if port is None:
        raise PlanError(f"instance {name}: no free port is left for it")
    address = f"127.0.0.1:{port}"
    environment = {
        **_defaults(even, shares or (1.0,) * len(gpus)),
        **tuning.environment,
        **_values(tuning),
        **_books(gpus, plan),
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
    """What configuration may override."""
    # From 0.30 a load with all layers asked for is split by free memory, which a sibling's use would skew.
    split = {TENSOR_SPLIT: split_text(shares)} if len(shares) > 1 else {}
    return {
        **HIDDEN_DEVICES,
        **split,
        "OLLAMA_SCHED_SPREAD": "1" if even else "0",
        # 0 would mean three models a GPU (server/sched.go), after which Ollama evicts by count whatever the memory
        # says. Eviction is the router's, so the count is put out of reach.
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


def _books(gpus: tuple[GpuUuid, ...], plan: InstancePlan) -> dict[str, str]:
    """Variables on which the router's own books stand; nothing overrides them."""
    fixed = {
        # "-1" is what Ollama's GPU documentation names to force the CPU.
        "CUDA_VISIBLE_DEVICES": ",".join(gpus) or "-1",
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        "OLLAMA_MODELS": plan.models_directory,
        "OLLAMA_KEEP_ALIVE": "-1",
        "OLLAMA_NOPRUNE": "1",
    }
    return fixed if plan.cloud else {**fixed, "OLLAMA_NO_CLOUD": "1"}
