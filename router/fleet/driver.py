"""Carries the engine's loads and unloads out on the servers, and tells what came of them.

A load is asked for with all layers on the cards, so that it comes out whole where it was planned or fails visibly; what
the server then lists is the proof. An unload is done when the server no longer lists the model. It plans nothing and
retries nothing but the listing, which a server now and then fails to give.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from router.core.entities import ModelFacts
from router.core.events import Load, LoadedModel, LoadFailed, LoadFinished, Unload, UnloadFinished
from router.core.options import has_own_layers
from router.fleet.ollama import TIMED_OUT, OllamaClient, OllamaError

ClientFor = Callable[[str], OllamaClient]
"""URL of an instance -> a client of it."""

_POLL_SECONDS = 0.1
_LISTING_TRIES = 3


class OllamaDriver:
    """Satisfies the engine's `InstanceDriver`. `unload_timeout_seconds`: how long a model may stay listed."""

    def __init__(self, client_for: ClientFor, unload_timeout_seconds: float = 60.0) -> None:
        self._client_for = client_for
        self._unload_timeout_seconds = unload_timeout_seconds

    async def load(self, load: Load) -> LoadFinished | LoadFailed:
        client = self._client_for(load.url)
        try:
            await client.load(
                load.model.name,
                dict(load.options),
                embedding=load.model.is_embedding,
                timeout_seconds=load.timeout_seconds,
                num_gpu=_layers(load),
            )
            row = _row_of(load.model, await _listed(client))
        except OllamaError as error:
            return LoadFailed(load.load_id, error.status, error.message)
        if row is None:
            return LoadFailed(load.load_id, 502, f"{load.instance} loaded '{load.model.name}' but does not list it")
        return LoadFinished(load.load_id, row.size_bytes, row.size_vram_bytes)

    async def unload(self, unload: Unload) -> UnloadFinished:
        client = self._client_for(unload.url)
        try:
            async with asyncio.timeout(self._unload_timeout_seconds):
                await client.unload(unload.model.name)
                while _row_of(unload.model, await _listed(client)) is not None:  # noqa: ASYNC110 - it is another program
                    await asyncio.sleep(_POLL_SECONDS)
        except TimeoutError:
            words = f"still listed {self._unload_timeout_seconds:g} s after it was to be unloaded"
            return UnloadFinished(unload.instance, unload.blob, words)
        except OllamaError as error:
            return UnloadFinished(unload.instance, unload.blob, error.message)
        return UnloadFinished(unload.instance, unload.blob)


def _layers(load: Load) -> int | None:
    """All layers and the output, unless the model's own file says how many."""
    if not load.expects_gpu or has_own_layers(load.model):
        return None
    return load.model.layers + 1


async def _listed(client: OllamaClient) -> tuple[LoadedModel, ...]:
    for _ in range(_LISTING_TRIES - 1):
        try:
            return await client.ps()
        except OllamaError as error:
            if error.status == TIMED_OUT:
                raise
            await asyncio.sleep(_POLL_SECONDS)
    return await client.ps()


def _row_of(model: ModelFacts, rows: tuple[LoadedModel, ...]) -> LoadedModel | None:
    """The model's row; a runner that another name of the same weights started is listed under that name."""
    named = [row for row in rows if row.name == model.name and row.digest == model.digest]
    shared = [row for row in rows if row.model is not None and row.model.blob == model.blob]
    return next(iter(named or shared), None)
