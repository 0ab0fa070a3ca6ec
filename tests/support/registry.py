"""A minimal model registry on loopback for pulls: manifests, blobs behind a redirect, ranges, and a gate.

The gate blocks blob downloads until it is opened, so that a test can inspect a download in progress.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections import Counter
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from aiohttp import web

_MODEL = "application/vnd.ollama.image.model"
_CONFIG = "application/vnd.docker.container.image.v1+json"
_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"


class Registry:
    """Models by name; `request_counts` counts requests by kind."""

    def __init__(self) -> None:
        self.port = 0
        self.gate = asyncio.Event()
        self.gate.set()
        self.request_counts: Counter[str] = Counter()
        self.download_started = asyncio.Event()
        """Set at the first blob download."""
        self._blobs: dict[str, bytes] = {}
        self._manifests: dict[str, bytes] = {}

    def put(self, name: str, weights: bytes) -> None:
        """Offers a GGUF file as `library/NAME:latest`."""
        config = {"model_format": "gguf", "model_family": "llama", "model_families": ["llama"], "model_type": "1K",
                  "file_type": "F16", "architecture": "amd64", "os": "linux"}  # fmt: skip
        layers = [{"mediaType": _MODEL, **self._add(weights)}]
        config_descriptor = {"mediaType": _CONFIG, **self._add(json.dumps(config).encode())}
        manifest = {"schemaVersion": 2, "mediaType": _MANIFEST, "config": config_descriptor, "layers": layers}
        self._manifests[name] = json.dumps(manifest).encode()

    def name(self, name: str) -> str:
        """The model name to use in a pull."""
        return f"http://127.0.0.1:{self.port}/library/{name}"

    def _add(self, data: bytes) -> dict[str, object]:
        digest = "sha256:" + hashlib.sha256(data).hexdigest()
        self._blobs[digest] = data
        return {"digest": digest, "size": len(data)}

    async def manifest(self, request: web.Request) -> web.Response:
        self.request_counts["manifest"] += 1
        manifest = self._manifests.get(request.match_info["name"])
        return web.Response(status=404) if manifest is None else web.Response(body=manifest, content_type=_MANIFEST)

    async def blob(self, request: web.Request) -> web.Response:
        digest = request.match_info["digest"]
        if request.method == "HEAD":
            return web.Response(headers={"Content-Length": str(len(self._blobs[digest]))})
        # Ollama follows a redirect only to another host, as real registries send it.
        raise web.HTTPTemporaryRedirect(f"http://localhost:{self.port}/data/{digest}")

    async def data(self, request: web.Request) -> web.Response:
        self.request_counts["data"] += 1
        self.download_started.set()
        await self.gate.wait()
        body = self._blobs[request.match_info["digest"]]
        byte_range = request.http_range
        return web.Response(status=206, body=body[byte_range.start : byte_range.stop])


@asynccontextmanager
async def serving() -> AsyncGenerator[Registry]:
    """A registry that serves for the length of the block."""
    registry, app = Registry(), web.Application()
    app.router.add_get("/v2/library/{name}/manifests/latest", registry.manifest, allow_head=False)
    app.router.add_route("*", "/v2/library/{name}/blobs/{digest}", registry.blob)
    app.router.add_get("/data/{digest}", registry.data, allow_head=False)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        registry.port = runner.addresses[0][1]
        yield registry
    finally:
        await runner.cleanup()
