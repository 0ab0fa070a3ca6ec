"""`/api/pull` and `/api/push` of the EMULATED server, without any network: only models of the catalogue can be pulled.

A pull takes its time by the world's line speed and keeps a `-partial` file in the store, so that a sibling's start-up
pruning can break it as it breaks a real one. Kinder than the truth: it never fails half way by itself, a second pull of
the same model does not share the first one's bytes, and pushing reaches nobody.
"""

from __future__ import annotations

import asyncio
import ipaddress
from collections.abc import Mapping
from typing import Any

from router.domain.model_names import DEFAULT_HOST, Name
from router.lab.emulator.catalogue import CatalogueModel, catalogue
from router.lab.emulator.context import Service
from router.lab.emulator.http_server import Request, Response
from router.lab.emulator.model_management import Progress, asked_name
from router.lab.emulator.response_writer import ApiError
from router.lab.emulator.store import weights_digest
from router.lab.simulator.world import WORLD

_FIELDS = {"model": "string", "name": "string", "stream": "bool", "insecure": "bool", "username": "string",
           "password": "string"}  # fmt: skip
_TICK_SECONDS = 0.25


async def pull(service: Service, request: Request, response: Response) -> None:
    """`/api/pull`."""
    body = await service.read(request, "api.PullRequest", _FIELDS)
    name = service.name(asked_name(body))
    if name is None:
        raise ApiError(400, "invalid model name")
    progress = Progress(service, response, body.get("stream", True))
    await progress.say(status="pulling manifest")
    entry = catalogue().get(name.shortest)
    if entry is None:
        await progress.fail(500, f"pull model manifest: {_unreachable(name, body)}")
        return
    with request.watched():
        problem = await _download(service, entry, progress)
        if problem is not None:
            await progress.fail(500, problem)
            return
    service.store.install(entry)
    await progress.say(status="verifying sha256 digest")
    await progress.say(status="writing manifest")
    await progress.succeed()


async def _download(service: Service, entry: CatalogueModel, progress: Progress) -> str | None:
    """The bytes' time; why it broke, or None."""
    digest = weights_digest(entry)
    line = {"status": f"pulling {digest.removeprefix('sha256:')[:12]}", "digest": digest, "total": entry.size_bytes}
    if service.store.blob(digest).exists():
        await progress.say(**line, completed=entry.size_bytes)
        return None
    partial = service.store.blob(digest).with_name(service.store.blob(digest).name + "-partial")
    partial.touch()
    done, a_tick = 0.0, WORLD.pull_bytes_per_second * service.config.speed * _TICK_SECONDS
    while done < entry.size_bytes:
        await progress.say(**line, **({"completed": int(done)} if done else {}))
        await asyncio.sleep(min(1.0, (entry.size_bytes - done) / a_tick) * _TICK_SECONDS)
        done += a_tick
        if not partial.exists():
            return f"open {partial}: no such file or directory"
    partial.unlink(missing_ok=True)
    await progress.say(**line, completed=entry.size_bytes)
    return None


def _unreachable(name: Name, body: Mapping[str, Any]) -> str:
    if name.host == DEFAULT_HOST:
        return "file does not exist"
    scheme = "http" if body.get("insecure") else "https"
    url = f"{scheme}://{name.host}/v2/{name.namespace}/{name.model}/manifests/{name.tag}"
    return f'Get "{url}": {_dial_error(name.host)}'


def _dial_error(host: str) -> str:
    """What a server without a network says."""
    bare, _, port = host.partition(":")
    try:
        ipaddress.ip_address(bare)
    except ValueError:
        return f"dial tcp: lookup {bare} on 127.0.0.53:53: no such host"
    return f"dial tcp {bare}:{port or 443}: connect: connection refused"


async def push(service: Service, request: Request, response: Response) -> None:
    """`/api/push`, which ends in an error in any case."""
    body = await service.read(request, "api.PushRequest", _FIELDS)
    text = asked_name(body)
    if not text:
        raise ApiError(400, "model is required")
    name = service.name(text)
    if name is None:
        raise ApiError(400, "invalid model name")
    progress = Progress(service, response, body.get("stream", True))
    await progress.say(status="retrieving manifest")
    stored = service.store.get(name)
    if stored is None:
        await progress.say(status="couldn't retrieve manifest")
        await progress.fail(500, f"open {service.store.manifest(name)}: no such file or directory")
        return
    url = f"https://{name.host}/v2/{name.namespace}/{name.model}/blobs/{stored.weights.digest}"
    await progress.fail(500, f'Head "{url}": {_dial_error(name.host)}')
