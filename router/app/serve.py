"""`serve`: binds the port, looks at the machine, builds the router and runs it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time

import structlog

from router.app.adoption import end_all, take_over
from router.app.fleet_checks import check_fleet
from router.app.hardware import Hardware, detect_hardware, instance_plan
from router.app.inherited_sockets import InheritedSockets
from router.app.listening import listen, listen_for_admin
from router.app.reload import ReadSettings
from router.app.resource_limits import apply_limits
from router.app.startup_checks import tls_context
from router.app.wiring import build, planned_instances
from router.config.settings import ConfigError, Settings, process_environment
from router.domain.events import GpusRead
from router.domain.gpu import Gpu
from router.observability.logging import configure_logs
from router.proxy.memory_trim import keep_freed_memory
from router.supervisor import orphan_reaper
from router.supervisor.kept_process import Claim, claim_kept_servers


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
        inherited = InheritedSockets.from_environment(process_environment(), os.getpid())
        listener = listen(settings, inherited)
        listeners.enter_context(contextlib.closing(listener.socket))
        admin = listen_for_admin(settings, inherited)
        if admin is not None:
            listeners.enter_context(contextlib.closing(admin))
        inherited.refuse_rest()
        hardware = await asyncio.to_thread(detect_hardware, settings)
        claims = await _claims(settings)
        for orphan in await asyncio.to_thread(orphan_reaper.reap_orphans, str(settings.state_directory)):
            log.warning("swept", pid=orphan.pid, instance=orphan.instance, command=orphan.command)
        # Only now: what orphans held is free. Everything below works with this one reading.
        reading = await asyncio.to_thread(_read_gpus, hardware)
        _refuse_contradictions(settings, hardware, reading.gpus)
        specs = planned_instances(settings, hardware, reading.gpus)
        takeover = await take_over(claims, specs, settings, hardware, reading.gpus)
        if takeover.has_ended_some:
            reading = await asyncio.to_thread(_read_gpus, hardware)
        keep_freed_memory()
        instances, environment = takeover.instances, process_environment()
        async with build(settings, hardware, reading, tls, read_settings, environment, instances) as router:
            await router.run(listener, admin)


async def _claims(settings: Settings) -> tuple[Claim, ...]:
    """Servers of an earlier router that may be adopted; ends them if none may."""
    claims = await asyncio.to_thread(claim_kept_servers, str(settings.state_directory))
    if settings.ollama.adopt or not claims:
        return claims
    log = structlog.get_logger("router")
    for claim in claims:
        log.warning("server_not_adopted", instance=claim.name, pid=claim.server_pid, reason="ollama.adopt is off")
    await end_all(claims)
    return ()


def _read_gpus(hardware: Hardware) -> GpusRead:
    """Blocking: a driver is asked."""
    read_at = time.monotonic()
    return GpusRead(hardware.reader.read(), read_at)


def _refuse_contradictions(settings: Settings, hardware: Hardware, gpus: tuple[Gpu, ...]) -> None:
    """Raises ConfigError: rules that the GPUs and instances of this machine cannot satisfy."""
    problems = check_fleet(settings, gpus, instance_plan(settings, hardware.models_directory)).problems
    if problems:
        raise ConfigError(list(problems))
