"""Gathers the facts that `llamayard doctor` examines: of this machine, or of an emulated rig.

Blocking, for some seconds. Changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from router.app import host_reader
from router.app.fleet_checks import FleetCheck, check_fleet
from router.app.hardware import EmulatedMachine, instance_plan, temporary_emulator
from router.app.model_fits import model_fits, unplaced_models
from router.app.preflight import check_machine
from router.app.startup_checks import startup_problems
from router.config.instance_options import tuning_problems
from router.config.settings import Settings
from router.doctor.facts import (
    ConfigurationFacts,
    DoctorFacts,
    GpuFacts,
    HostFacts,
    ModelFit,
    OllamaFacts,
    StoreFacts,
    Unread,
)
from router.domain.gpu import Gpu, GpuHealth
from router.domain.model import ModelFacts
from router.engines.ollama.blob_store import BlobStore
from router.engines.ollama.gguf_facts import read_facts
from router.gpu.nvml import NoGpus, open_nvml
from router.lab.emulator.spec import EmulatorSpec, GpuSpec
from router.supervisor.process import BinaryNotFound, find_binary

_FILES_OF_THE_ROUTER = 256
"""Logs, servers' pipes, idle connections."""
_HIDDEN = "the emulated driver is not visible here"


@dataclass(frozen=True, slots=True)
class _Models:
    """The installed models."""

    names: Sequence[str]
    facts_of: Callable[[str], ModelFacts | None]
    version: str | None


def gather(settings: Settings, environment: Mapping[str, str], power_supply_watts: float | None = None) -> DoctorFacts:
    """All facts; takes some seconds, most of them to measure the disk. `power_supply_watts`: its rating, if known.

    Raises:
        ConfigError: the rig's description is wrong.
    """
    if settings.rig is not None:
        with temporary_emulator(settings, settings.rig, environment) as rig:
            return _of_rig(settings, environment, rig, power_supply_watts)
    return _of_machine(settings, environment, power_supply_watts)


def _of_machine(settings: Settings, environment: Mapping[str, str], power_supply_watts: float | None) -> DoctorFacts:
    gpus, driver = _read_gpus()
    ollama = _ollama(settings, environment)
    store = BlobStore(settings.ollama.models)
    models = _Models(
        [stored.name.shortest for stored in store.all()],
        lambda name: read_facts(store, name),
        ollama.version if isinstance(ollama.version, str) else None,
    )
    plain = tuple(each.gpu for each in gpus) if not isinstance(gpus, Unread) else None
    fleet = None if plain is None else check_fleet(settings, plain, instance_plan(settings, str(store.folder)))
    return DoctorFacts(
        gpus=gpus,
        driver_version=driver,
        kernel_log=host_reader.kernel_log(environment),
        host=host_reader.host_facts(environment, _open_files_needed(settings), power_supply_watts),
        ollama=ollama,
        store=host_reader.store_facts(store.folder),
        models=_fits(settings, plain, fleet, models),
        configuration=_configuration(settings, environment, plain, fleet, _port_holder(settings)),
    )


def _read_gpus() -> tuple[tuple[GpuFacts, ...] | Unread, str | Unread]:
    reader = open_nvml()
    if isinstance(reader, NoGpus):
        return Unread(reader.reason), Unread(reader.reason)
    try:
        gpus, health = reader.read(), reader.health()
        driver = reader.driver_version() or Unread("the driver does not tell its version")
    finally:
        reader.close()
    return tuple(GpuFacts(gpu, health.get(gpu.uuid, GpuHealth()), _external_bytes(gpu)) for gpu in gpus), driver


def _external_bytes(gpu: Gpu) -> int:
    return sum(process.used_bytes or 0 for process in gpu.processes if not host_reader.is_runner(process.pid))


def _ollama(settings: Settings, environment: Mapping[str, str]) -> OllamaFacts:
    binary: str | Unread
    version: str | Unread
    try:
        binary = find_binary(settings.ollama.binary, environment.get("PATH"))
        version = host_reader.ollama_version(binary, environment)
    except BinaryNotFound as error:
        unneeded = "not needed: the router starts no server"
        binary, version = (Unread(str(error)) if settings.starts_servers else unneeded), Unread(str(error))
    has_attached = any(instance.url is not None for instance in settings.instances)
    return OllamaFacts(
        binary,
        version,
        "" if has_attached else host_reader.stock_service(environment),
        host_reader.server_variables(environment),
        {} if has_attached else host_reader.service_environment(environment),
    )


def _port_holder(settings: Settings) -> str | Unread:
    server = settings.server
    return host_reader.port_holder(server.host, server.port, is_tls=server.tls_certificate is not None)


def _open_files_needed(settings: Settings) -> int:
    """A waiting request has one connection, a running one two; as many may run as wait."""
    return 2 * settings.queue.limit + _FILES_OF_THE_ROUTER


def _fits(
    settings: Settings, gpus: Sequence[Gpu] | None, fleet: FleetCheck | None, models: _Models
) -> tuple[ModelFit, ...] | Unread:
    if not models.names:
        return Unread("no model is installed")
    if gpus is None or fleet is None:
        return tuple(unplaced_models(models.names, models.facts_of))
    if fleet.policy is None:
        return Unread("the configuration contradicts itself")
    return tuple(model_fits(settings, gpus, fleet, models.names, models.facts_of, models.version))


def _configuration(
    settings: Settings,
    environment: Mapping[str, str],
    gpus: Sequence[Gpu] | None,
    fleet: FleetCheck | None,
    port_holder: str | Unread,
) -> ConfigurationFacts:
    problems = (*tuning_problems(settings), *startup_problems(settings))
    found = check_machine(settings, environment)
    used = {uuid for spec in fleet.specs for uuid in spec.gpus} if fleet is not None else set[str]()
    return ConfigurationFacts(
        (*problems, *found.problems),
        found.warnings,
        found.unchecked,
        tuple(gpu.index for gpu in gpus or () if gpu.error is None and gpu.uuid not in used),
        f"{settings.server.host}:{settings.server.port}",
        port_holder,
    )


# --- an emulated rig --------------------------------------------------------------------------------------------


def _of_rig(
    settings: Settings, environment: Mapping[str, str], rig: EmulatedMachine, power_supply_watts: float | None
) -> DoctorFacts:
    spec, host = rig.spec, rig.spec.host
    gpus = tuple(GpuFacts(gpu, _health(of), of.external_bytes) for gpu, of in zip(rig.gpus, spec.gpus, strict=True))
    visible = gpus if host.has_visible_gpus else Unread(_HIDDEN)
    models = _Models(rig.installed, rig.facts, host.ollama_version or rig.version)
    plain = rig.gpus if host.has_visible_gpus else None
    fleet = None if plain is None else check_fleet(settings, plain, instance_plan(settings, str(rig.models_directory)))
    return DoctorFacts(
        gpus=visible,
        driver_version=host.driver_version or Unread(_HIDDEN),
        kernel_log=Unread("this user may not read it") if host.kernel_log is None else host.kernel_log,
        host=_emulated_host(settings, spec, power_supply_watts),
        ollama=OllamaFacts(
            "the emulated server" if host.has_ollama else Unread("there is no program `ollama` on PATH"),
            host.ollama_version or rig.version,
            host.stock_service,
            host.environment,
            host.service_environment,
        ),
        store=_emulated_store(spec, rig.models_directory),
        models=_fits(settings, plain, fleet, replace(models, version=rig.version)),
        configuration=_configuration(settings, environment, plain, fleet, host.port_holder or _port_holder(settings)),
        emulated=f"EMULATED rig {settings.rig}",
    )


def _health(gpu: GpuSpec) -> GpuHealth:
    pending = gpu.ecc_mode if gpu.ecc_mode_pending is None else gpu.ecc_mode_pending
    return GpuHealth(gpu.persistence_mode, gpu.ecc_mode, pending, gpu.ecc_uncorrected_errors, gpu.row_remap_failed)


def _emulated_host(settings: Settings, spec: EmulatorSpec, power_supply_watts: float | None) -> HostFacts:
    host = spec.host
    return HostFacts(
        memory_total_bytes=host.memory_total_bytes or spec.ram_bytes,
        open_files_max=host.open_files_max,
        open_files_needed=_open_files_needed(settings),
        clock_synchronized=(
            Unread("the emulated clock does not tell") if host.clock_synchronized is None else host.clock_synchronized
        ),
        in_container=host.in_container,
        nvidia_devices=len(spec.gpus) if host.nvidia_devices is None else host.nvidia_devices,
        closed_devices=host.closed_devices,
        power_supply_watts=power_supply_watts or host.power_supply_watts,
    )


def _emulated_store(spec: EmulatorSpec, folder: Path) -> StoreFacts:
    host = spec.host
    rate = host.store_bytes_per_second
    return StoreFacts(
        folder=folder,
        exists=True,
        is_readable=host.store_readable,
        is_writable=host.store_writable,
        total_bytes=host.store_total_bytes,
        free_bytes=host.store_free_bytes,
        read_bytes_per_second=Unread("the emulated disk is not measured") if rate is None else rate,
    )
