"""`serve`: binds the port, looks at the machine, builds the router and runs it."""

from __future__ import annotations

import asyncio
import contextlib
import time

import structlog

from router.app.fleet_checks import check_fleet
from router.app.hardware import Hardware, detect_hardware, instance_plan
from router.app.listening import listen, listen_for_admin
from router.app.reload import ReadSettings
from router.app.resource_limits import apply_limits
from router.app.startup_checks import tls_context
from router.app.wiring import build
from router.config.settings import ConfigError, Settings, process_environment
from router.domain.events import GpusRead
from router.domain.gpu import Gpu
from router.observability.logging import configure_logs
from router.proxy.memory_trim import keep_freed_memory
from router.supervisor import orphan_reaper


async def serve(settings: Settings, read_settings: ReadSettings) -> None:
    """Runs the router until a signal stops it. `read_settings` reads the configuration again, for a reload.

    Raises:
        ConfigError: a value cannot be used on this machine: a port in use, a bad certificate, a GPU that is not there.
    """
    configure_logs(settings.log.format, settings.log.level)
    log = structlog.get_logger("router")
    apply_limits()
    tls = tls_context(settings)
    with contextlib.ExitStack() as listeners:
        listener = listeners.enter_context(contextlib.closing(listen(settings)))
        admin = listen_for_admin(settings)
        if admin is not None:
            listeners.enter_context(contextlib.closing(admin))
        hardware = await asyncio.to_thread(detect_hardware, settings)
        for orphan in await asyncio.to_thread(orphan_reaper.reap_orphans, str(settings.state_directory)):
            log.warning("swept", pid=orphan.pid, instance=orphan.instance, command=orphan.command)
        # Only now: what orphans held is free. Everything below works with this one reading.
        reading = await asyncio.to_thread(_read_gpus, hardware)
        _refuse_contradictions(settings, hardware, reading.gpus)
        keep_freed_memory()
        async with build(settings, hardware, reading, tls, read_settings, process_environment()) as router:
            await router.run(listener, admin)


def _read_gpus(hardware: Hardware) -> GpusRead:
    """Blocking: a driver is asked."""
    read_at = time.monotonic()
    return GpusRead(hardware.reader.read(), read_at)


def _refuse_contradictions(settings: Settings, hardware: Hardware, gpus: tuple[Gpu, ...]) -> None:
    """Raises ConfigError: rules that the GPUs and instances of this machine cannot satisfy."""
    problems = check_fleet(settings, gpus, instance_plan(settings, hardware.models_directory)).problems
    if problems:
        raise ConfigError(list(problems))
