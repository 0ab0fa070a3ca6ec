"""Servers that an earlier router left: finds them, decides which are adopted, and ends the others.

`router/domain/adoption.py` decides; here its facts are gathered and its verdicts carried out.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import psutil
import structlog

from router.app.hardware import Hardware, instance_plan
from router.config.settings import Settings
from router.domain.adoption import KeptServer, ServerRecord, decide, relevant
from router.domain.gpu import Gpu, GpuUuid
from router.domain.instance import InstanceName, InstanceSpec
from router.engines.base import ProbeFailed
from router.engines.ollama.health_probe import probe_version
from router.engines.ollama.instance_plan import InstancePlan, at_port, on_demand_instance, port_of
from router.gpu.process_owners import own_ports
from router.supervisor.kept_process import Claim, KeptProcess
from router.supervisor.process import program_identity

_PROBE_SECONDS = 5.0
_GRACE_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class PlannedInstance:
    """An instance to run, and the server that it begins with: None to start one."""

    spec: InstanceSpec
    claim: Claim | None = None


@dataclass(frozen=True, slots=True)
class Takeover:
    """What becomes of the servers that were found."""

    instances: tuple[PlannedInstance, ...]
    has_ended_some: bool
    """Whether VRAM was freed."""


async def take_over(
    claims: Sequence[Claim],
    specs: Iterable[InstanceSpec],
    settings: Settings,
    hardware: Hardware,
    gpus: tuple[Gpu, ...],
) -> Takeover:
    """Decides on each claimed server, and ends those that are not adopted. `specs`: of the instances to run."""
    log = structlog.get_logger("router")
    planned = {spec.name: spec for spec in specs}
    plan = instance_plan(settings, hardware.models_directory)
    usable = {gpu.uuid for gpu in gpus if gpu.error is None}
    kept = await asyncio.gather(*map(_look_at, claims))
    wanted = [_wanted(server, planned, settings, plan, hardware, usable) for server in kept]
    adopted = dict[InstanceName, PlannedInstance]()
    refused: list[Claim] = []
    for verdict, claim, record in zip(decide(tuple(zip(kept, wanted, strict=True))), claims, wanted, strict=True):
        if verdict.is_adopted and record is not None:
            adopted[claim.name] = PlannedInstance(record.spec, claim)
            log.info("server_adopted", instance=claim.name, pid=claim.server_pid, url=record.spec.url)
        else:
            refused.append(claim)
            log.warning("server_not_adopted", instance=claim.name, pid=claim.server_pid, reason=verdict.reason)
    await end_all(refused)
    extra = [each for name, each in adopted.items() if name not in planned]
    instances = (*(adopted.get(name, PlannedInstance(spec)) for name, spec in planned.items()), *extra)
    return Takeover(instances, bool(refused))


async def end_all(claims: Iterable[Claim]) -> None:
    """Ends claimed servers and waits until they are gone."""
    processes = [KeptProcess.adopt(claim, lambda _: None) for claim in claims]
    await asyncio.gather(*(process.stop(_GRACE_SECONDS) for process in processes))


async def _look_at(claim: Claim) -> KeptServer:
    record = claim.record
    if record is None:
        return KeptServer(claim.name, claim.server_pid, None, claim.version, "", owns_port=False)
    try:
        answers = await probe_version(record.spec.url, _PROBE_SECONDS, {})
    except ProbeFailed:
        answers = ""
    owns_port = port_of(record.spec) in await asyncio.to_thread(_own_ports, claim.server_pid)
    return KeptServer(claim.name, claim.server_pid, record, claim.version, answers, owns_port)


def _own_ports(pid: int) -> tuple[int, ...]:
    try:
        return own_ports(psutil.Process(pid))
    except psutil.Error:
        return ()


def _wanted(
    server: KeptServer,
    planned: dict[InstanceName, InstanceSpec],
    settings: Settings,
    plan: InstancePlan,
    hardware: Hardware,
    usable: set[GpuUuid],
) -> ServerRecord | None:
    """How this router would start the server, at its present address."""
    if server.record is None:
        return None
    was = server.record.spec
    spec = planned.get(server.name)
    allows = settings.placement.on_demand and settings.discovers
    if was.on_demand and spec is None and allows and usable.issuperset(was.gpus):
        spec = on_demand_instance(was, plan, port_of(was))
    if spec is None or spec.attached:
        return None
    return ServerRecord(
        at_port(spec, port_of(was)),
        hardware.command,
        program_identity(hardware.command[0]),
        relevant(hardware.environment),
    )
