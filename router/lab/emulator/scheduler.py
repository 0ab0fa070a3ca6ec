"""Scheduler of the EMULATED server: one loop that places one request at a time, and loads, evicts and waits for it.

Modelled on server/sched.go (v0.24, v0.33). Requests for a loaded model with the same runner options bypass the queue
(not in 0.11.4). The request being placed blocks all others that need a load. As in real Ollama, a client that
disconnects while queued leaks its handler; one that disconnects during its load aborts the load. Loading itself is in
`router.lab.emulator.loader`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

from router.engines.ollama.blob_store import StoredModel
from router.lab.emulator.config import Config, log
from router.lab.emulator.http_server import ClientDisconnectedError, Request
from router.lab.emulator.loaded_model import LoadedModel, expiry_after
from router.lab.emulator.loader import Loader, LoadError, MustEvictError
from router.lab.emulator.options import Options, needs_reload

_PING_SECONDS = 10.0
"""Deadline for the health check of a runner before it is reused."""
_MIN_PING_SECONDS = 3.0
"""Lower bound in real seconds: a busy machine delays a real process whatever the emulated speed."""


class BusyError(Exception):
    """The queue is full."""


@dataclass(slots=True, eq=False)
class PendingRequest:
    """A request waiting for a model."""

    request: Request
    stored: StoredModel
    options: Options
    session_seconds: float | None
    """Keep-alive; None: keep the model's value, or use the server's default."""
    future: asyncio.Future[LoadedModel] = field(default_factory=lambda: asyncio.get_running_loop().create_future())

    def resolve(self, loaded: LoadedModel) -> None:
        if not self.future.done():
            self.future.set_result(loaded)

    def fail(self, error: Exception) -> None:
        if not self.future.done():
            self.future.set_exception(error)


class Scheduler:
    """Owns the loaded models. `spawn` starts tasks that end with the server."""

    def __init__(
        self, config: Config, loader: Loader, spawn: Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]]
    ) -> None:
        self.loaded: dict[str, LoadedModel] = {}
        self._config = config
        self._loader = loader
        self._spawn = spawn
        self._queue: asyncio.Queue[PendingRequest] = asyncio.Queue(config.max_queue)

    async def acquire(self, pending: PendingRequest) -> LoadedModel:
        """Returns a loaded model with one user more; call `release` afterwards.

        Raises:
            BusyError: the queue is full.
            LoadError: the model cannot be loaded.
            ClientDisconnectedError: the client disconnected during the load.
        """
        if not self._config.is_pre_0_12:
            loaded = self.loaded.get(pending.stored.weights.digest)
            if loaded is not None and (acquired := await self._acquire_loaded(loaded, pending)) is not None:
                return acquired
        try:
            self._queue.put_nowait(pending)
        except asyncio.QueueFull:
            raise BusyError from None
        return await pending.future

    def release(self, loaded: LoadedModel) -> None:
        """Removes one user; the last one starts the keep-alive timer."""
        loaded.users -= 1
        if loaded.users > 0:
            return
        if loaded.session_seconds == 0:
            self._start_unload(loaded)
            return
        loaded.stop_timer()
        loaded.expires_at = expiry_after(loaded.session_seconds)
        if loaded.session_seconds > 0:
            loop = asyncio.get_running_loop()
            loaded.timer = loop.call_later(loaded.session_seconds, self._start_unload, loaded)

    def expire(self, digest: str) -> None:
        """Unloads a model now, or once its users are done."""
        loaded = self.loaded.get(digest)
        if loaded is not None:
            loaded.expires_at = expiry_after(0)
            self._expire(loaded)

    def kill_all(self) -> None:
        """Kills all runners when the server ends."""
        for loaded in self.loaded.values():
            loaded.process.kill()

    async def run(self) -> None:
        """Places queued requests one at a time, forever."""
        while True:
            pending = await self._queue.get()
            if pending.request.disconnected.is_set():
                continue  # never answered: its handler leaks until the server ends
            try:
                pending.resolve(await self._place(pending))
            except (LoadError, ClientDisconnectedError) as error:
                pending.fail(error)

    # --- placing ---

    async def _place(self, pending: PendingRequest) -> LoadedModel:
        digest = pending.stored.weights.digest
        while True:
            loaded = self.loaded.get(digest)
            if loaded is not None:
                if (acquired := await self._acquire_loaded(loaded, pending)) is not None:
                    return acquired
                await self._evict(loaded)
            elif len(self.loaded) >= self._config.loaded_limit:
                await self._evict(self._choose_victim())
            else:
                try:
                    return await self._load(pending)
                except MustEvictError as error:
                    for victim in list(self.loaded.values()) if error.all_others else [self._choose_victim()]:
                        await self._evict(victim)

    async def _load(self, pending: PendingRequest) -> LoadedModel:
        keep_alive_seconds = pending.session_seconds
        seconds = self._config.keep_alive_seconds if keep_alive_seconds is None else keep_alive_seconds
        loaded = await self._loader.start(pending.stored, pending.options, list(self.loaded.values()), seconds)
        self.loaded[loaded.key] = loaded
        try:
            await self._loader.wait_until_loaded(loaded, pending.options, list(self.loaded.values()), pending.request)
        except BaseException:
            loaded.process.kill()
            self.loaded.pop(loaded.key, None)
            await loaded.process.exited
            loaded.unloaded.set()
            raise
        finally:
            loaded.load_ended.set()
        self._spawn(self._log_runner_exit(loaded))
        return loaded

    async def _acquire_loaded(self, loaded: LoadedModel, pending: PendingRequest) -> LoadedModel | None:
        """Adds a user and returns the model; None if it must be reloaded."""
        async with loaded.use_lock:
            if await self._must_reload(loaded, pending):
                return None
            return self._add_user(loaded, pending)

    def _add_user(self, loaded: LoadedModel, pending: PendingRequest) -> LoadedModel:
        loaded.users += 1
        loaded.stop_timer()
        if pending.session_seconds is not None:
            loaded.session_seconds = pending.session_seconds
            loaded.expires_at = None
        return loaded

    async def _must_reload(self, loaded: LoadedModel, pending: PendingRequest) -> bool:
        """Waits for a load in progress first, as the real scheduler does on its lock."""
        await loaded.load_ended.wait()
        trained_context = loaded.facts.context_length
        if needs_reload(loaded.options, pending.options, trained_context, self._config.is_0_30):
            return True
        responds = await loaded.process.responds(max(_MIN_PING_SECONDS, _PING_SECONDS / self._config.speed))
        return not responds or self.loaded.get(loaded.key) is not loaded or loaded.is_unloading

    def _choose_victim(self) -> LoadedModel:
        """The idle model with the shortest keep-alive; if none is idle, the shortest of all."""
        ordered = sorted(self.loaded.values(), key=lambda loaded: (_sort_key(loaded.session_seconds), str(loaded.blob)))
        return next((loaded for loaded in ordered if loaded.users <= 0), ordered[0])

    async def _evict(self, victim: LoadedModel) -> None:
        self._expire(victim)
        name, users = victim.stored.name.shortest, victim.users
        log("DEBUG", "waiting for pending requests to complete and unload to occur", model=name, users=users)
        await victim.unloaded.wait()

    def _expire(self, loaded: LoadedModel) -> None:
        loaded.stop_timer()
        loaded.session_seconds = 0
        if loaded.users <= 0:
            self._start_unload(loaded)

    # --- unloading ---

    def _start_unload(self, loaded: LoadedModel) -> None:
        if not loaded.is_unloading:
            loaded.is_unloading = True
            self._spawn(self._unload(loaded))

    async def _unload(self, loaded: LoadedModel) -> None:
        loaded.stop_timer()
        loaded.process.kill()
        if self.loaded.get(loaded.key) is loaded:
            del self.loaded[loaded.key]
        await loaded.process.exited
        log("INFO", "runner unloaded", model=loaded.stored.name.shortest, pid=loaded.process.pid)
        await self._loader.wait_for_memory_release(loaded)
        loaded.unloaded.set()

    async def _log_runner_exit(self, loaded: LoadedModel) -> None:
        """Logs that a runner died; the model stays listed until the next request for it."""
        await loaded.process.exited
        if not loaded.is_unloading:
            log("ERROR", "llama runner terminated", model=loaded.stored.name.shortest, pid=loaded.process.pid)


def _sort_key(session_seconds: float) -> float:
    return float("inf") if session_seconds < 0 else session_seconds
