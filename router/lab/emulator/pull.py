"""`/api/pull` and `/api/push` of the EMULATED server, without a network: only catalogue models can be pulled.

A pull takes as long as the simulated download speed needs and keeps a `-partial` file in the store, so that pruning by
a starting sibling server can break it as it breaks a real one. Limitations: a pull never fails midway by itself,
concurrent pulls of one model do not share progress, and a push always fails.
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
from router.lab.emulator.model_management import Progress, requested_name
from router.lab.emulator.response_writer import ApiError
from router.lab.emulator.store import weights_digest
from router.lab.simulator.world import WORLD

_FIELDS = {"model": "string", "name": "string", "stream": "bool", "insecure": "bool", "username": "string",
           "password": "string"}  # fmt: skip
_TICK_SECONDS = 0.25


async def pull(service: Service, request: Request, response: Response) -> None:
    """`/api/pull`."""
    body = await service.read(request, "api.PullRequest", _FIELDS)
    name = service.name(requested_name(body))
    if name is None:
        raise ApiError(400, "invalid model name")
    progress = Progress(service, response, body.get("stream", True))
    await progress.send(status="pulling manifest")
    entry = catalogue().get(name.shortest)
    if entry is None:
        await progress.fail(500, f"pull model manifest: {_manifest_error(name, body)}")
        return
    with request.cancel_on_disconnect():
        error_text = await _download(service, entry, progress)
        if error_text is not None:
            await progress.fail(500, error_text)
            return
    service.store.install(entry)
    await progress.send(status="verifying sha256 digest")
    await progress.send(status="writing manifest")
    await progress.succeed()


async def _download(service: Service, entry: CatalogueModel, progress: Progress) -> str | None:
    """Waits as long as the download takes; returns the error, or None."""
    digest = weights_digest(entry)
    line = {"status": f"pulling {digest.removeprefix('sha256:')[:12]}", "digest": digest, "total": entry.size_bytes}
    if service.store.blob(digest).exists():
        await progress.send(**line, completed=entry.size_bytes)
        return None
    partial = service.store.blob(digest).with_name(service.store.blob(digest).name + "-partial")
    partial.touch()
    completed_bytes, bytes_per_tick = 0.0, WORLD.pull_bytes_per_second * service.config.speed * _TICK_SECONDS
    while completed_bytes < entry.size_bytes:
        await progress.send(**line, **({"completed": int(completed_bytes)} if completed_bytes else {}))
        await asyncio.sleep(min(1.0, (entry.size_bytes - completed_bytes) / bytes_per_tick) * _TICK_SECONDS)
        completed_bytes += bytes_per_tick
        if not partial.exists():
            return f"open {partial}: no such file or directory"
    partial.unlink(missing_ok=True)
    await progress.send(**line, completed=entry.size_bytes)
    return None


def _manifest_error(name: Name, body: Mapping[str, Any]) -> str:
    if name.host == DEFAULT_HOST:
        return "file does not exist"
    scheme = "http" if body.get("insecure") else "https"
    url = f"{scheme}://{name.host}/v2/{name.namespace}/{name.model}/manifests/{name.tag}"
    return f'Get "{url}": {_dial_error(name.host)}'


def _dial_error(host: str) -> str:
    """Error message of a server without a network."""
    hostname, _, port = host.partition(":")
    try:
        ipaddress.ip_address(hostname)
    except ValueError:
        return f"dial tcp: lookup {hostname} on 127.0.0.53:53: no such host"
    return f"dial tcp {hostname}:{port or 443}: connect: connection refused"


async def push(service: Service, request: Request, response: Response) -> None:
    """`/api/push`, which always ends in an error."""
    body = await service.read(request, "api.PushRequest", _FIELDS)
    text = requested_name(body)
    if not text:
        raise ApiError(400, "model is required")
    name = service.name(text)
    if name is None:
        raise ApiError(400, "invalid model name")
    progress = Progress(service, response, body.get("stream", True))
    await progress.send(status="retrieving manifest")
    stored = service.store.get(name)
    if stored is None:
        await progress.send(status="couldn't retrieve manifest")
        await progress.fail(500, f"open {service.store.manifest(name)}: no such file or directory")
        return
    url = f"https://{name.host}/v2/{name.namespace}/{name.model}/blobs/{stored.weights.digest}"
    await progress.fail(500, f'Head "{url}": {_dial_error(name.host)}')
