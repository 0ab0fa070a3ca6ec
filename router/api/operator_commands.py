"""Commands of an operator: drain, resume and restart. They are checked here and posted to the controller as events."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import msgspec
from aiohttp import web

from router.control.controller import Controller
from router.domain.drained import DrainTarget
from router.domain.events import DrainRequested, RestartRequested
from router.domain.gpu import GpuUuid
from router.domain.instance import InstanceName
from router.domain.snapshot import Snapshot
from router.engines.ollama.rules import KIND as OLLAMA
from router.engines.openai.servers import KIND as ATTACHED
from router.errors import UNREADABLE_JSON, BadRequest, ShuttingDown

DRAIN, RESUME, RESTART = "/llamayard/drain", "/llamayard/resume", "/llamayard/restart"
RELOAD = "/llamayard/reload"
Reload = Callable[[], Awaitable[Mapping[str, Any]]]
"""Reloads the configuration and returns the answer as JSON. Raises BadRequest if it cannot be used."""
_BODY_BYTES_MAX = 65_536
_DRAIN_TIMEOUT_SECONDS = 300.0
_DRAIN_TIMEOUT_SECONDS_MAX = 86_400.0
_FORMS = 'send {"gpu": 1}, {"instance": "gpu0"} or {"all": true}'


class _Command(msgspec.Struct, forbid_unknown_fields=True):
    """The body of a command."""

    gpu: int | str | None = None
    """Index or UUID, or the beginning of one."""
    instance: str | None = None
    all: bool = False
    timeout_seconds: float = _DRAIN_TIMEOUT_SECONDS


async def run_command(request: web.BaseRequest, route: str, controller: Controller) -> Mapping[str, Any]:
    """Carries out the command that the request's body describes, and returns the answer as JSON.

    Raises:
        BadRequest: the body names nothing that there is.
        ShuttingDown: the router is draining already.
    """
    command = _parsed(await command_body(request))
    if controller.is_closing:
        raise ShuttingDown("the router is shutting down")
    if route == RESTART:
        names = _to_restart(controller.snapshot(), command)
        controller.post(RestartRequested(names, command.timeout_seconds))
    else:
        target = _target(controller.snapshot(), command)
        _refuse_partial_resume(controller.snapshot(), target, is_resumed=route == RESUME)
        controller.post(DrainRequested(target, is_resumed=route == RESUME))
    snapshot = controller.snapshot()
    return {"drained": drained_document(snapshot), "restart": restart_document(snapshot)}


def drained_document(snapshot: Snapshot) -> dict[str, Any]:
    """What is drained, as JSON: GPUs by index."""
    gpus = [gpu.index for gpu in snapshot.gpus.values() if gpu.uuid in snapshot.drained.gpus]
    return {
        "all": snapshot.drained.everything,
        "gpus": sorted(gpus),
        "instances": sorted(snapshot.drained.instances),
    }


def restart_document(snapshot: Snapshot) -> dict[str, Any] | None:
    """The restart in progress, as JSON; None if there is none."""
    rolling = snapshot.rolling
    if rolling is None:
        return None
    return {"instance": rolling.current, "phase": rolling.phase.value, "pending": list(rolling.pending)}


async def command_body(request: web.BaseRequest) -> bytes:
    """The body of a command. Raises BadRequest if it is too long."""
    body = bytearray()
    async for part in request.content.iter_any():
        body += part
        if len(body) > _BODY_BYTES_MAX:
            raise BadRequest(f"the body of a command has at most {_BODY_BYTES_MAX} bytes")
    return bytes(body)


def _parsed(body: bytes) -> _Command:
    try:
        command = msgspec.json.decode(body.strip() or b"{}", type=_Command)
    except UNREADABLE_JSON as error:
        raise BadRequest(f"the body is no command: {error}; {_FORMS}") from error
    if sum((command.gpu is not None, command.instance is not None, command.all)) > 1:
        raise BadRequest(f"the body names more than one of gpu, instance and all; {_FORMS}")
    if not 0.0 <= command.timeout_seconds <= _DRAIN_TIMEOUT_SECONDS_MAX:
        raise BadRequest(f"timeout_seconds: must be from 0 to {_DRAIN_TIMEOUT_SECONDS_MAX:g}")
    return command


def _target(snapshot: Snapshot, command: _Command) -> DrainTarget:
    if command.gpu is not None:
        return DrainTarget(gpu=gpu_named(snapshot, str(command.gpu)))
    if command.instance is not None:
        return DrainTarget(instance=_instance(snapshot, command.instance))
    if not command.all:
        raise BadRequest(f"the body does not say what; {_FORMS}")
    return DrainTarget()


def _refuse_partial_resume(snapshot: Snapshot, target: DrainTarget, *, is_resumed: bool) -> None:
    if is_resumed and snapshot.drained.everything and target != DrainTarget():
        raise BadRequest('everything is drained; resume {"all": true}, then drain what is to stay drained')


def _to_restart(snapshot: Snapshot, command: _Command) -> tuple[InstanceName, ...]:
    if command.gpu is not None:
        raise BadRequest("gpu: instances are restarted, not GPUs; name an instance, or all")
    if command.instance is None:
        return tuple(view.spec.name for view in snapshot.instances.values() if not view.spec.attached)
    name = _instance(snapshot, command.instance)
    if snapshot.instances[name].spec.engine not in (OLLAMA, ATTACHED):
        raise BadRequest(f"instance: {name} is a place for one model: unload the model, and the next request starts it")
    if snapshot.instances[name].spec.attached:
        raise BadRequest(f"instance: {name} is attached: restart it where it is run")
    return (name,)


def gpu_named(snapshot: Snapshot, text: str) -> GpuUuid:
    """The GPU with that index, UUID, or beginning of a UUID. Raises BadRequest."""
    gpus = sorted(snapshot.gpus.values(), key=lambda gpu: gpu.index)
    if text.isdecimal():
        found = [gpu for gpu in gpus if str(gpu.index) == text.lstrip("0").rjust(1, "0")]
    else:
        found = [gpu for gpu in gpus if text and gpu.uuid.lower().startswith(text.lower())]
    if len(found) != 1:
        problem = "is no GPU of this machine" if not found else "fits several GPUs"
        there = ", ".join(f"{gpu.index} ({gpu.uuid})" for gpu in gpus) or "none"
        raise BadRequest(f"gpu: '{text}' {problem}; there are: {there}")
    return found[0].uuid


def _instance(snapshot: Snapshot, name: str) -> InstanceName:
    if name not in snapshot.instances:
        there = ", ".join(snapshot.instances) or "none"
        raise BadRequest(f"instance: there is no instance '{name}'; there are: {there}")
    return InstanceName(name)
