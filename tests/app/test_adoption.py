"""What is looked at before a server of an earlier router is adopted: real processes."""

from __future__ import annotations

import os
import sys
import uuid
from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from router.app.adoption import Takeover, take_over
from router.app.hardware import Hardware, NoGpuReader
from router.app.wiring import planned_instances
from router.config.settings import Settings
from router.domain.adoption import ServerRecord, relevant
from router.domain.instance import InstanceName, InstanceSpec
from router.engines.ollama.instance_plan import at_port
from router.supervisor.kept_process import Claim, KeepRules, KeptProcess, claim_kept_servers
from router.supervisor.process import program_identity
from tests.support.scripted_server import scripted
from tests.support.waiting import eventually

_SILENT = (sys.executable, "-c", "import signal; signal.pause()")


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings.model_validate({"state_directory": str(tmp_path), "ollama": {"adopt": True}})


def _hardware(environment: Mapping[str, str] | None = None) -> Hardware:
    inherited = {"PATH": os.environ["PATH"], "HOME": "/home/x", **(environment or {})}
    return Hardware(NoGpuReader(), _SILENT, inherited, "/models", "")


def _spec(settings: Settings, port: int) -> InstanceSpec:
    (spec,) = planned_instances(settings, _hardware(), ())
    return at_port(spec, port)


@asynccontextmanager
async def _left(settings: Settings, spec: InstanceSpec) -> AsyncGenerator[tuple[Claim, ...]]:
    """A server that only sleeps, left by a router that ran it as this instance."""
    hardware = _hardware()
    record = ServerRecord(spec, _SILENT, program_identity(_SILENT[0]), relevant(hardware.environment))
    rules = KeepRules(str(settings.state_directory), 600.0, 1.0)
    environment = {**hardware.environment, "TEST_OF_ADOPTION": uuid.uuid4().hex}
    process = KeptProcess.spawn(record, environment, rules, lambda _: None)
    await eventually(lambda: process.pid is not None, what="its pid")
    process.ready("0.34.0")
    process.leave()
    yield claim_kept_servers(str(settings.state_directory))
    for claim in claim_kept_servers(str(settings.state_directory)):
        await KeptProcess.adopt(claim, lambda _: None).stop(1.0)


async def _taken_over(settings: Settings, claims: tuple[Claim, ...], hardware: Hardware) -> tuple[Takeover, str]:
    """What becomes of one claimed server, and why it was not adopted."""
    with capture_logs() as logs:
        takeover = await take_over(claims, planned_instances(settings, hardware, ()), settings, hardware, ())
    (line,) = logs
    return takeover, line.get("reason", "")


async def test_another_program_on_the_port_is_not_taken_for_the_server(settings: Settings) -> None:
    async with scripted({"/api/version": {"version": "0.34.0"}}) as foreign:
        port = int(foreign.url.rpartition(":")[2])
        async with _left(settings, _spec(settings, port)) as claims:
            takeover, reason = await _taken_over(settings, claims, _hardware())
        assert reason == "it does not listen on its port"
        assert takeover.has_ended_some
        (planned,) = takeover.instances
        assert (planned.claim, planned.spec.url == foreign.url) == (None, False)
        assert foreign.paths() == ["/api/version"]
    assert claim_kept_servers(str(settings.state_directory)) == ()


async def test_a_variable_that_matters_to_servers_and_differs_is_named(settings: Settings) -> None:
    async with _left(settings, _spec(settings, 9)) as claims:
        _, reason = await _taken_over(settings, claims, _hardware({"CUDA_CACHE_PATH": "/c", "SHLVL": "3"}))
    assert reason == "configured differently: CUDA_CACHE_PATH"


async def test_an_instance_that_is_no_longer_configured_is_ended(settings: Settings) -> None:
    spec = replace(_spec(settings, 9), name=InstanceName("gpu7"))
    async with _left(settings, spec) as claims:
        takeover, reason = await _taken_over(settings, claims, _hardware())
    assert reason == "no such instance is configured"
    assert [each.spec.name for each in takeover.instances] == ["cpu"]
