"""Carries out loads and unloads on the servers and reports their results.

A load requests all layers on the GPUs, so that it either succeeds as planned or fails visibly; the server's list of
loaded models confirms it. An unload is done when the server no longer lists the model. Only listing is retried, because
it fails now and then.

A server unloads by name. The name may mean other weights now, because it was pulled or created again, or deleted. Then
another name of the same weights is used, or a temporary one is created. Deleting it also deletes the weights, if no
other name uses them.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable
from typing import Protocol

from router.domain.actions import Load, Unload
from router.domain.events import LoadedModel, LoadFailed, LoadFinished, UnloadFinished
from router.domain.instance import InstanceName, InstanceState
from router.domain.measured_speed import MeasuredSpeed
from router.domain.model import BlobDigest, ModelFacts
from router.domain.snapshot import Snapshot
from router.engines.ollama.client import TIMED_OUT, UNREACHABLE, OllamaClient, OllamaError
from router.engines.ollama.rules import KIND
from router.engines.ollama.runner_options import sets_num_gpu

ClientFor = Callable[[str], OllamaClient]
"""URL of an instance -> its client."""

_POLL_SECONDS = 0.1
_LISTING_TRIES = 3
_STORE_SECONDS = 60.0
_MEMORY_SHORT = ("out of memory", "unable to allocate", "failed to allocate", "memory layout cannot be allocated")
TEMPORARY_TAG = "llamayard-unload:"
"""Prefix of the temporary names for unloading weights that no longer have a name."""


def is_memory_short(message: str) -> bool:
    """Whether a server's error says that the GPUs had too little memory for a load.

    Sources: Ollama v0.11 to v0.34, `llm/server.go`, `ml/backend/ggml/ggml.go`; llama.cpp's `ggml-cuda.cu`.
    """
    return any(words in message.lower() for words in _MEMORY_SHORT)


class Names(Protocol):
    """What the driver needs of the catalog; see `Catalog`."""

    async def facts_of(self, name: str, digest: str) -> ModelFacts | None: ...

    async def facts(self, name: str) -> ModelFacts | None: ...

    async def names_of(self, blob: BlobDigest) -> tuple[str, ...]: ...


class OllamaDriver:
    """Satisfies `Loader` (`engines/base.py`)."""

    def __init__(
        self,
        client_for: ClientFor,
        names: Names,
        snapshot: Callable[[], Snapshot],
        writing: asyncio.Lock,
        unload_timeout_seconds: float = 30.0,
    ) -> None:
        """`writing` is held during changes of the shared store. `unload_timeout_seconds`: limit for one unload."""
        self._client_for = client_for
        self._names = names
        self._snapshot = snapshot
        self._writing = writing
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
            speed = await _measured(client, load) if load.measures_speed else None
            row = await self._row_of(load.model, await _listed(client))
        except OllamaError as error:
            return LoadFailed(
                load.load_id,
                error.status,
                error.message,
                is_lost=error.status == UNREACHABLE,
                is_memory_short=is_memory_short(error.message),
            )
        if row is None:
            return LoadFailed(load.load_id, 502, f"{load.instance} loaded '{load.model.name}' but does not list it")
        return LoadFinished(load.load_id, row.size_bytes, row.size_vram_bytes, speed)

    async def unload(self, unload: Unload) -> UnloadFinished:
        client = self._client_for(unload.url)
        try:
            async with asyncio.timeout(self._unload_timeout_seconds), self._named(unload, client) as name:
                await client.unload(name)
                while await self._row_of(unload.model, await _listed(client)) is not None:  # noqa: ASYNC110 - another program
                    await asyncio.sleep(_POLL_SECONDS)
        except TimeoutError:
            message = f"still loaded {self._unload_timeout_seconds:g} s after the unload was requested"
            return UnloadFinished(unload.instance, unload.blob, message)
        except OllamaError as error:
            return UnloadFinished(unload.instance, unload.blob, error.message)
        return UnloadFinished(unload.instance, unload.blob)

    async def clear_leftovers(self) -> bool:
        """Removes temporary names, and their weights, that a router left behind when it was killed during an unload.

        To be called at startup. Returns False if no server is ready, or if the store is being changed.

        Raises:
            OllamaError: the server could not be reached or refused.
        """
        instances = self._snapshot().instances.values()
        spawned = (v for v in instances if v.spec.engine == KIND and not v.spec.attached)
        view = next((v for v in spawned if v.state is InstanceState.READY), None)
        if view is None or self._writing.locked():
            return False
        client = self._client_for(view.spec.url)
        async with self._writing:
            needed = {temporary_tag_for(blob) for _, blob in self._snapshot().residencies}
            for row in await client.tags():
                if is_temporary_tag(row.name) and row.name not in needed:
                    await client.delete(row.name)
        return True

    @contextlib.asynccontextmanager
    async def _named(self, unload: Unload, client: OllamaClient) -> AsyncGenerator[str]:
        """A name that means the loaded weights until the block ends."""
        model = unload.model
        current = await self._names.facts(model.name)
        if (current is not None and current.blob == model.blob) or self._is_attached(unload.instance):
            yield model.name
            return
        temporary_tag, names = temporary_tag_for(model.blob), await self._names.names_of(model.blob)
        other_name = next((name for name in names if name != temporary_tag), None)
        if other_name is not None:
            yield other_name
            return
        async with self._writing:
            if not names:
                await client.create(temporary_tag, model.blob, _STORE_SECONDS)
            try:
                yield temporary_tag
            finally:
                if not self._held_elsewhere(unload):
                    await client.delete(temporary_tag)

    def _is_attached(self, name: InstanceName) -> bool:
        view = self._snapshot().instances.get(name)
        return view is not None and view.spec.attached

    def _held_elsewhere(self, unload: Unload) -> bool:
        """Returns True if another instance has the weights, and so will need the temporary name too."""
        return any(blob == unload.blob and name != unload.instance for name, blob in self._snapshot().residencies)

    async def _row_of(self, model: ModelFacts, rows: tuple[LoadedModel, ...]) -> LoadedModel | None:
        """The row of the model's weights, which may be listed under another of their names."""
        for row in rows:
            if row.name == model.name and row.digest == model.digest:
                return row
        for row in rows:
            facts = await self._names.facts_of(row.name, row.digest)
            if facts is not None and facts.blob == model.blob:
                return row
        return None


def temporary_tag_for(blob: BlobDigest) -> str:
    """The temporary name for weights that no longer have a name."""
    return TEMPORARY_TAG + blob.removeprefix("sha256:")[:12]


def is_temporary_tag(name: str) -> bool:
    """Returns True for a temporary name; it is not a model of any user."""
    return name.startswith(TEMPORARY_TAG)


def _layers(load: Load) -> int | None:
    """All layers and the output layer; None on the CPU, if the Modelfile sets `num_gpu`, or if they are unknown."""
    if not load.expects_gpu or load.model.is_opaque or sets_num_gpu(load.model):
        return None
    return load.model.layers + 1


async def _measured(client: OllamaClient, load: Load) -> MeasuredSpeed | None:
    """The speed of the loaded model; None if its answer failed, which does not undo the load."""
    try:
        return await client.measured_speed(load.model.name, dict(load.options), load.timeout_seconds)
    except OllamaError:
        return None


async def _listed(client: OllamaClient) -> tuple[LoadedModel, ...]:
    for _ in range(_LISTING_TRIES - 1):
        try:
            return await client.ps()
        except OllamaError as error:
            if error.status == TIMED_OUT:
                raise
            await asyncio.sleep(_POLL_SECONDS)
    return await client.ps()
