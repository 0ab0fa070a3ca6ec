"""What the doctor's checks look at, as frozen values. A value that could not be read is an `Unread` with the reason."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from router.domain.gpu import Gpu, GpuHealth


@dataclass(frozen=True, slots=True)
class Unread:
    """A fact that could not be read; `reason` says why."""

    reason: str


@dataclass(frozen=True, slots=True)
class GpuFacts:
    """One GPU with what the checks need beyond placement."""

    gpu: Gpu
    health: GpuHealth = field(default_factory=GpuHealth)
    external_bytes: int = 0
    """VRAM that programs other than Ollama's runners hold."""


@dataclass(frozen=True, slots=True)
class StoreFacts:
    """Ollama's folder of models."""

    folder: Path
    exists: bool
    is_readable: bool
    is_writable: bool
    total_bytes: int
    """Of its file system."""
    free_bytes: int
    read_bytes_per_second: float | Unread
    """Measured on the largest file, past the page cache."""


@dataclass(frozen=True, slots=True)
class HostFacts:
    """The machine and the user that the doctor runs as."""

    memory_total_bytes: int
    open_files_max: int
    """The soft limit of this process."""
    open_files_needed: int
    clock_synchronized: bool | Unread
    in_container: bool
    nvidia_devices: int
    """NVIDIA GPUs on the PCI bus, with or without a driver."""
    closed_devices: tuple[str, ...]
    """`/dev/nvidia*` files that this user may not open."""
    power_supply_watts: float | None
    """Rating of the power supply, if the user gave it."""


@dataclass(frozen=True, slots=True)
class OllamaFacts:
    """The installed Ollama, and what else runs one."""

    binary: str | Unread
    version: str | Unread
    stock_service: str
    """What runs a server that the router does not know, such as `ollama.service is active`; "": nothing."""
    environment: Mapping[str, str]
    """Variables of this shell that a server would obey."""
    service_environment: Mapping[str, str] | Unread
    """The same of the stock service's unit."""


@dataclass(frozen=True, slots=True)
class ModelFit:
    """One installed model, placed on the GPUs as if nothing else was loaded."""

    name: str
    weights_bytes: int
    layers: int
    num_gpu: int | None
    """The Modelfile's number of layers on GPUs; None: not set."""
    gpus: int
    """GPUs that it takes by the configuration; 0: it fits nowhere, or is for the CPU."""
    gpus_min: int
    """GPUs that would be enough without its rules; 0: it fits nowhere."""
    reason: str
    """Why it fits nowhere, GPU by GPU; "" if it fits."""
    needed_bytes: int
    """On all GPUs together, without margins."""
    context_length_max: int
    """Tokens of one slot with which it fits; 0: none."""
    is_pinned: bool = False
    """Whether a rule says which GPUs or how many."""


@dataclass(frozen=True, slots=True)
class ConfigurationFacts:
    """What `check-config` found, and which instance uses which GPU."""

    problems: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    unchecked: tuple[str, ...] = ()
    uncovered_gpus: tuple[int, ...] = ()
    """Indexes of GPUs that no instance uses."""
    address: str = ""
    """Host and port of the endpoint."""
    port_holder: str | Unread = ""
    """What listens there instead of the router; "": nothing, or a running router."""


@dataclass(frozen=True, slots=True)
class DoctorFacts:
    """All facts of one examination."""

    gpus: tuple[GpuFacts, ...] | Unread
    driver_version: str | Unread
    kernel_log: tuple[str, ...] | Unread
    host: HostFacts
    ollama: OllamaFacts
    store: StoreFacts
    models: tuple[ModelFit, ...] | Unread
    configuration: ConfigurationFacts = field(default_factory=ConfigurationFacts)
    emulated: str = ""
    """The title of an emulated rig; "": a real machine."""
