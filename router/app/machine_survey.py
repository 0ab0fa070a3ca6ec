"""What `llamayard init` needs to know of the machine: GPUs, a stock Ollama, model stores, who has the port.

Blocking, for a few seconds. Changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from router.app import host_reader
from router.app.hardware import temporary_emulator
from router.config.settings import Settings
from router.doctor.facts import Unread
from router.domain.gpu import Gpu
from router.engines.ollama.blob_store import BlobStore
from router.gpu.nvml import NoGpus, open_nvml
from router.supervisor.process import BinaryNotFound, find_binary

STOCK_STORE = Path("/usr/share/ollama/.ollama/models")
"""Of the service that Ollama's installer makes."""
_STORE_VARIABLE = "OLLAMA_MODELS"
_PORTS_TRIED = 20


@dataclass(frozen=True, slots=True)
class MachineSurvey:
    """What was found."""

    gpus: tuple[Gpu, ...]
    no_gpus_reason: str
    """Why there are none; "" if there are."""
    ollama_problem: str
    """"" if the program is there."""
    stock_service: str
    """What runs a stock Ollama; "" if nothing does."""
    port_holder: str
    """What else listens on the default port; "" if nothing does."""
    free_port: int
    """The default port, or the next one that is free."""
    store: Path
    models: tuple[str, ...]
    """Names of the models in the store."""


def survey(settings: Settings, environment: Mapping[str, str]) -> MachineSurvey:
    """`settings`: the defaults, with a rig if one is to be emulated.

    Raises:
        ConfigError: the rig's description is wrong.
    """
    host, port = settings.server.host, settings.server.port
    if settings.rig is not None:
        with temporary_emulator(settings, settings.rig, environment) as rig:
            held = rig.spec.host.port_holder or _holder(host, port)
            first = port + 1 if held else port
            return MachineSurvey(
                rig.gpus, "", "", rig.spec.host.stock_service, held, _free_port(host, first),
                settings.ollama.models, rig.installed,
            )  # fmt: skip
    gpus, reason = _gpus()
    held = _holder(host, port)
    store, models = _store(settings, environment)
    return MachineSurvey(
        gpus,
        reason,
        _ollama_problem(settings, environment),
        host_reader.stock_service(environment),
        held,
        _free_port(host, port),
        store,
        models,
    )


def _gpus() -> tuple[tuple[Gpu, ...], str]:
    reader = open_nvml()
    if isinstance(reader, NoGpus):
        return (), reader.reason
    try:
        return reader.read(), ""
    finally:
        reader.close()


def _ollama_problem(settings: Settings, environment: Mapping[str, str]) -> str:
    try:
        find_binary(settings.ollama.binary, environment.get("PATH"))
    except BinaryNotFound as error:
        return str(error)
    return ""


def _holder(host: str, port: int) -> str:
    holder = host_reader.port_holder(host, port)
    return holder.reason if isinstance(holder, Unread) else holder


def _free_port(host: str, first: int) -> int:
    ports = range(first, min(first + _PORTS_TRIED, 65536))
    return next((port for port in ports if not _holder(host, port)), first)


def _store(settings: Settings, environment: Mapping[str, str]) -> tuple[Path, tuple[str, ...]]:
    """The first store with models, and their names; the default store if none has any."""
    for folder in (*_named_stores(environment), settings.ollama.models, STOCK_STORE):
        models = models_in(folder)
        if models:
            return folder, tuple(models)
    return settings.ollama.models, ()


def _named_stores(environment: Mapping[str, str]) -> Iterator[Path]:
    service = host_reader.service_environment(environment)
    for variables in (environment, {} if isinstance(service, Unread) else service):
        if variables.get(_STORE_VARIABLE):
            yield Path(variables[_STORE_VARIABLE])


def models_in(folder: Path) -> Sequence[str]:
    """Names of the models in a store that this user can read."""
    try:
        return sorted(stored.name.shortest for stored in BlobStore(folder).all())
    except OSError:
        return []
