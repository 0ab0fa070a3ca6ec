"""The scheduler of the EMULATED server: one loop places one request at a time, loads, evicts and waits.

After server/sched.go (v0.24, v0.33). Requests for a loaded model with the same runner options pass the queue by (not
on 0.11.4). Whoever is being placed blocks all others that need a load. A client that leaves while it waits in the queue
leaks its handler, as there; one that leaves during its load aborts it. How a model is loaded is
`router.lab.emulator.loader`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

from router.lab.emulator.config import Config, log
from router.lab.emulator.http_server import ClientLeftError, Request
from router.lab.emulator.loaded_model import Loaded, expiry_after
from router.lab.emulator.loader import Loader, LoadError, MustEvictError
from router.lab.emulator.options import Options, needs_reload
from router.lab.emulator.store import Stored

_PING_SECONDS = 10.0
"""How long a runner may take to answer its health check before it is used again."""
_LEAST_PING_SECONDS = 3.0
"""Real seconds: a busy machine delays a real process, however fast the emulated time runs."""


class BusyError(Exception):
    """The queue is full."""


@dataclass(slots=True, eq=False)
class Pending:
    """A request that wants a model."""

    request: Request
    stored: Stored
    options: Options
    session_seconds: float | None
    """None: the model keeps the value it has, or gets the server's."""
    placed: asyncio.Future[Loaded] = field(default_factory=lambda: asyncio.get_running_loop().create_future())

    def give(self, loaded: Loaded) -> None:
        if not self.placed.done():
            self.placed.set_result(loaded)

    def fail(self, error: Exception) -> None:
        if not self.placed.done():
            self.placed.set_exception(error)


class Scheduler:
    """Owns the loaded models. `spawn` starts tasks that live no longer than the server."""

    def __init__(
        self, config: Config, loader: Loader, spawn: Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]]
    ) -> None:
        self.loaded: dict[str, Loaded] = {}
        self._config = config
        self._loader = loader
        self._spawn = spawn
        self._queue: asyncio.Queue[Pending] = asyncio.Queue(config.max_queue)

    async def acquire(self, pending: Pending) -> Loaded:
        """A loaded model, counted as used; `release` gives it back.

        Raises:
            BusyError: the queue is full.
            LoadError: it cannot be loaded.
            ClientLeftError: the client has left where that is noticed.
        """
        if not self._config.is_old:
            loaded = self.loaded.get(pending.stored.weights.digest)
            if loaded is not None and (used := await self._used(loaded, pending)) is not None:
                return used
        try:
            self._queue.put_nowait(pending)
        except asyncio.QueueFull:
            raise BusyError from None
        return await pending.placed

    def release(self, loaded: Loaded) -> None:
        """One user less; the last one starts the clock."""
        loaded.users -= 1
        if loaded.users > 0:
            return
        if loaded.session_seconds == 0:
            self._unload_soon(loaded)
            return
        loaded.stop_timer()
        loaded.expires_at = expiry_after(loaded.session_seconds)
        if loaded.session_seconds > 0:
            loop = asyncio.get_running_loop()
            loaded.timer = loop.call_later(loaded.session_seconds, self._unload_soon, loaded)

    def expire(self, digest: str) -> None:
        """Unloads a model now, or as soon as its users are done."""
        loaded = self.loaded.get(digest)
        if loaded is not None:
            loaded.expires_at = expiry_after(0)
            self._retire(loaded)

    def drop_all(self) -> None:
        """The server ends: its runners are killed."""
        for loaded in self.loaded.values():
            loaded.process.kill()

    async def run(self) -> None:
        """Places one request after another, for ever."""
        while True:
            pending = await self._queue.get()
            if pending.request.left.is_set():
                continue  # nobody answers it any more: its handler waits for the life of the server
            try:
                pending.give(await self._place(pending))
            except (LoadError, ClientLeftError) as error:
                pending.fail(error)

    # --- placing ---

    async def _place(self, pending: Pending) -> Loaded:
        digest = pending.stored.weights.digest
        while True:
            loaded = self.loaded.get(digest)
            if loaded is not None:
                if (used := await self._used(loaded, pending)) is not None:
                    return used
                await self._evict(loaded)
            elif len(self.loaded) >= self._config.most_loaded:
                await self._evict(self._victim())
            else:
                try:
                    return await self._load(pending)
                except MustEvictError as error:
                    for victim in list(self.loaded.values()) if error.all_others else [self._victim()]:
                        await self._evict(victim)

    async def _load(self, pending: Pending) -> Loaded:
        session = pending.session_seconds
        seconds = self._config.keep_alive_seconds if session is None else session
        loaded = await self._loader.start(pending.stored, pending.options, list(self.loaded.values()), seconds)
        self.loaded[loaded.key] = loaded
        try:
            await self._loader.finish(loaded, pending.options, list(self.loaded.values()), pending.request)
        except BaseException:
            loaded.process.kill()
            self.loaded.pop(loaded.key, None)
            await loaded.process.gone
            loaded.unloaded.set()
            raise
        finally:
            loaded.settled.set()
        self._spawn(self._watch(loaded))
        return loaded

    async def _used(self, loaded: Loaded, pending: Pending) -> Loaded | None:
        """The model with one user more; None where it has to be loaded anew."""
        async with loaded.guard:
            if await self._must_reload(loaded, pending):
                return None
            return self._use(loaded, pending)

    def _use(self, loaded: Loaded, pending: Pending) -> Loaded:
        loaded.users += 1
        loaded.stop_timer()
        if pending.session_seconds is not None:
            loaded.session_seconds = pending.session_seconds
            loaded.expires_at = None
        return loaded

    async def _must_reload(self, loaded: Loaded, pending: Pending) -> bool:
        """Waits for a load under way, as the real one does behind its lock."""
        await loaded.settled.wait()
        trained = loaded.facts.context_length
        if needs_reload(loaded.options, pending.options, trained, self._config.is_0_30):
            return True
        alive = await loaded.process.answers(max(_LEAST_PING_SECONDS, _PING_SECONDS / self._config.speed))
        return not alive or self.loaded.get(loaded.key) is not loaded or loaded.is_leaving

    def _victim(self) -> Loaded:
        """The idle model with the shortest keep-alive; none idle: the shortest of all."""
        ordered = sorted(self.loaded.values(), key=lambda one: (_order(one.session_seconds), str(one.blob)))
        return next((one for one in ordered if one.users <= 0), ordered[0])

    async def _evict(self, victim: Loaded) -> None:
        self._retire(victim)
        name, users = victim.stored.name.shortest, victim.users
        log("DEBUG", "waiting for pending requests to complete and unload to occur", model=name, users=users)
        await victim.unloaded.wait()

    def _retire(self, loaded: Loaded) -> None:
        loaded.stop_timer()
        loaded.session_seconds = 0
        if loaded.users <= 0:
            self._unload_soon(loaded)

    # --- unloading ---

    def _unload_soon(self, loaded: Loaded) -> None:
        if not loaded.is_leaving:
            loaded.is_leaving = True
            self._spawn(self._unload(loaded))

    async def _unload(self, loaded: Loaded) -> None:
        loaded.stop_timer()
        loaded.process.kill()
        if self.loaded.get(loaded.key) is loaded:
            del self.loaded[loaded.key]
        await loaded.process.gone
        log("INFO", "runner unloaded", model=loaded.stored.name.shortest, pid=loaded.process.pid)
        await self._loader.recovered(loaded)
        loaded.unloaded.set()

    async def _watch(self, loaded: Loaded) -> None:
        """Says when a runner dies by itself; the model stays listed until somebody asks for it."""
        await loaded.process.gone
        if not loaded.is_leaving:
            log("ERROR", "llama runner terminated", model=loaded.stored.name.shortest, pid=loaded.process.pid)


def _order(session_seconds: float) -> float:
    return float("inf") if session_seconds < 0 else session_seconds
