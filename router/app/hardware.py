"""What there is to run on: real GPUs and a real Ollama, or an emulated rig that stands in for both.

Looks once, before anything is started; blocking, because a driver and a file system are asked. Starts nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import structlog

from router.config.instance_options import Tuning, tuning
from router.config.settings import ConfigError, Settings, process_environment
from router.domain.gpu import Gpu
from router.engines.ollama.instance_plan import DeclaredInstance, InstancePlan
from router.gpu.nvml import NoGpus, open_nvml
from router.gpu.poller import GpuReader
from router.lab.emulator.prepare import prepare_emulator
from router.lab.emulator.spec import SpecError
from router.supervisor.process import BinaryNotFound, find_binary, inheritable_environment


@dataclass(frozen=True, slots=True)
class Hardware:
    """Where the router finds itself."""

    reader: GpuReader
    command: tuple[str, ...]
    """Starts a server; of no use where all instances are attached."""
    environment: Mapping[str, str]
    """What each server is given beside its own variables."""
    models_directory: str
    title: str
    """`EMULATED rig 2x3090`, or "" for real GPUs."""


class NoGpuReader:
    """Reads no GPU, on a machine that has none."""

    def read(self) -> tuple[Gpu, ...]:
        return ()

    def close(self) -> None:
        """Nothing is held open."""


def detect_hardware(settings: Settings) -> Hardware:
    """Blocking. ConfigError where the rig's text, its folder or the binary is wrong."""
    environment = process_environment()
    if settings.rig is not None:
        return _rig(settings, settings.rig, environment)
    log = structlog.get_logger("router")
    nvml = open_nvml()
    if isinstance(nvml, NoGpus):
        log.warning("cpu_mode", reason=nvml.reason, effect="no GPU is used: models run on the CPU")
    reader = NoGpuReader() if isinstance(nvml, NoGpus) else nvml
    command = (_binary(settings, environment), "serve")
    return Hardware(reader, command, inheritable_environment(environment), str(settings.ollama.models), "")


def _binary(settings: Settings, environment: Mapping[str, str]) -> str:
    try:
        return find_binary(settings.ollama.binary, environment.get("PATH"))
    except BinaryNotFound as error:
        if settings.discovers or any(one.url is None for one in settings.instances):
            raise ConfigError([f"ollama.binary: {error}"]) from error
        return settings.ollama.binary


def _rig(settings: Settings, text: str, environment: Mapping[str, str]) -> Hardware:
    try:
        rig = prepare_emulator(text, settings.state_directory / "rig", environment)
    except SpecError as error:
        raise ConfigError([str(error)]) from error
    except OSError as error:
        raise ConfigError([f"state_directory: the emulated rig cannot be written there: {error}"]) from error
    structlog.get_logger("router").warning(
        "emulated", rig=rig.title, effect="GPUs, servers and answers are made up; nothing here is real"
    )
    inherited = {**inheritable_environment(environment), **rig.environment}
    return Hardware(rig.reader, rig.command, inherited, str(rig.models_directory), rig.title)


def instance_plan(settings: Settings, models_directory: str) -> InstancePlan:
    """What instances are asked for, in the planner's terms."""

    def tuning_for(name: str) -> Tuning:
        return tuning(settings, name)

    return InstancePlan(
        models_directory=models_directory,
        tuning_for=tuning_for,
        discover=settings.discovers,
        spread=settings.ollama.spread,
        cloud=settings.ollama.cloud,
        declared=tuple(
            DeclaredInstance(tuning(settings, one.name or "", one), one.name, one.url, one.gpus)
            for one in settings.instances
        ),
    )
