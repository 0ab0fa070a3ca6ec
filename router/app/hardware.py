"""The machine to run on: real GPUs and a real Ollama, or an emulated rig in place of both.

Read once at startup, blocking: a driver and the file system are read. Starts nothing. Besides the command line and
`llamayard plan` (`plan.py`, `model_sources.py`) the only product code that imports the emulator.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from pathlib import Path

import structlog

from router.config.instance_options import Tuning, tuning
from router.config.settings import ConfigError, Settings, process_environment
from router.domain.gpu import Gpu
from router.domain.model import ModelFacts
from router.domain.model_names import parse_name
from router.engines.ollama.gguf_facts import facts_of
from router.engines.ollama.instance_plan import DeclaredInstance, InstancePlan
from router.engines.ollama.rules import KIND as OLLAMA
from router.engines.openai.servers import KIND as OPENAI
from router.gpu.nvml import NoGpus, open_nvml
from router.gpu.poller import GpuReader
from router.lab.emulator.prepare import VERSION_VARIABLE, PreparedEmulator, prepare_emulator
from router.lab.emulator.spec import EmulatorSpec, SpecError
from router.lab.emulator.store import Store
from router.supervisor.process import BinaryNotFound, find_binary, inheritable_environment


@dataclass(frozen=True, slots=True)
class Hardware:
    """GPUs, and how to start servers on them."""

    reader: GpuReader
    command: tuple[str, ...]
    """Starts a server; unused if all instances are attached."""
    environment: Mapping[str, str]
    """Environment of every server, without its own variables."""
    models_directory: str
    title: str
    """`EMULATED rig 2x3090`, or "" for real GPUs."""
    host_memory_bytes: int | None = None
    """Of an emulated rig; None: this machine's is read."""


class NoGpuReader:
    """For a machine without GPUs."""

    def read(self) -> tuple[Gpu, ...]:
        return ()

    def close(self) -> None:
        """Nothing to close."""


def detect_hardware(settings: Settings) -> Hardware:
    """Blocking.

    Raises:
        ConfigError: the rig's description, its directory or the ollama binary is wrong.
    """
    environment = process_environment()
    if settings.rig is not None:
        return _emulated(settings, settings.rig, environment)
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
        if settings.starts_servers:
            raise ConfigError([f"ollama.binary: {error}"]) from error
        return settings.ollama.binary


def _emulated(settings: Settings, text: str, environment: Mapping[str, str]) -> Hardware:
    rig = _prepared_emulator(text, _emulator_directory(settings), environment)
    structlog.get_logger("router").warning("emulated", rig=rig.title, effect="GPUs, servers and answers are not real")
    inherited = {**inheritable_environment(environment), **rig.environment}
    return Hardware(
        rig.reader, rig.command, inherited, str(rig.models_directory), rig.title, host_memory_bytes=rig.spec.ram_bytes
    )


def _emulator_directory(settings: Settings) -> Path:
    return settings.state_directory / "rig"


def _prepared_emulator(text: str, directory: Path, environment: Mapping[str, str]) -> PreparedEmulator:
    try:
        return prepare_emulator(text, directory, environment)
    except SpecError as error:
        raise ConfigError([str(error)]) from error
    except OSError as error:
        raise ConfigError([f"state_directory: the emulated rig cannot be written there: {error}"]) from error


@dataclass(frozen=True, slots=True)
class EmulatedMachine:
    """An emulated rig as `check-config` needs it."""

    gpus: tuple[Gpu, ...]
    version: str
    """Of the emulated servers."""
    models_directory: Path
    facts: Callable[[str], ModelFacts | None]
    """Facts of a model by its name; None if it is in no emulated store."""
    is_installed: Callable[[str], bool]
    installed: tuple[str, ...]
    """Names of the models in its stores."""
    spec: EmulatorSpec


@contextlib.contextmanager
def temporary_emulator(settings: Settings, text: str, environment: Mapping[str, str]) -> Generator[EmulatedMachine]:
    """The rig in a temporary directory, so that a check changes nothing in the state directory.

    Models that the user has added to the rig in the state directory count too.

    Raises:
        ConfigError: the rig's description is wrong.
    """
    with tempfile.TemporaryDirectory() as directory:
        rig = _prepared_emulator(text, Path(directory), environment)
        user_store = Store(_emulator_directory(settings) / "models", is_written=False)
        stores = (user_store, Store(rig.models_directory, is_written=False))

        def facts(name: str) -> ModelFacts | None:
            return next((found for store in stores if (found := _emulated_facts(store, name)) is not None), None)

        def is_installed(name: str) -> bool:
            return any(store.get(parse_name(name)) is not None for store in stores)

        version = rig.environment[VERSION_VARIABLE]
        installed = tuple(sorted({stored.name.shortest for store in stores for stored in store.all()}))
        yield EmulatedMachine(rig.reader.read(), version, user_store.folder, facts, is_installed, installed, rig.spec)


def _emulated_facts(store: Store, name: str) -> ModelFacts | None:
    stored = store.get(parse_name(name))
    if stored is None:
        return None
    header = store.header(stored.weights.digest)
    return facts_of(stored, header) if header.tensors else None


def instance_plan(settings: Settings, models_directory: str) -> InstancePlan:
    """The configured instances, as the planner's input."""

    def tuning_for(name: str) -> Tuning:
        return tuning(settings, name)

    return InstancePlan(
        models_directory=models_directory,
        tuning_for=tuning_for,
        discover=settings.discovers,
        spread=settings.ollama.spread,
        cloud=settings.ollama.cloud,
        cpu_overflow=settings.placement.cpu == "overflow",
        declared=tuple(
            DeclaredInstance(
                tuning(settings, entry.name or "", entry),
                entry.name,
                entry.url,
                entry.gpus,
                OLLAMA if entry.kind == OLLAMA else OPENAI,
            )
            for entry in settings.instances
        ),
    )
