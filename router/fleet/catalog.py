"""Which models the shared store holds, and the facts of each, asked of one server and remembered.

Facts belong to a manifest's digest: `refresh` forgets those whose digest has changed or whose model is gone. A name
that is not known is always asked for live, so that a model that anybody has pulled is there at once; many who ask at
once share one reading. Fetches run as tasks of the catalog's own: a caller that leaves takes nobody's answer along.

It never guesses: a server that fails makes `facts` raise, and is not taken for one without models.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, TypeVar

from router.core.entities import ModelFacts
from router.core.names import canonical
from router.fleet.model_facts import needs_verbose, read_facts
from router.fleet.ollama import OllamaClient, OllamaError, TagRow

_T = TypeVar("_T")
_Rows = Mapping[str, TagRow]
_NOT_FOUND = 404


class Catalog:
    """`client_of` gives the server to ask at the moment, None while none is ready. `clock` is monotonic, in seconds.

    To be used within one event loop; `close` ends what is under way.
    """

    def __init__(self, client_of: Callable[[], OllamaClient | None], clock: Callable[[], float]) -> None:
        self._client_of = client_of
        self._clock = clock
        self._known: dict[str, ModelFacts] = {}
        self._fetches: dict[str, asyncio.Task[ModelFacts | None]] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._readings = _Readings(self._read_rows, self._start)
        self._read_at: float | None = None

    @property
    def read_at(self) -> float | None:
        """When the last complete reading of `/api/tags` began; None before the first."""
        return self._read_at

    def known(self, name: str) -> ModelFacts | None:
        """Remembered facts of a name in any form; asks nobody."""
        key = _key(name)
        return None if key is None else self._known.get(key)

    async def facts(self, name: str) -> ModelFacts | None:
        """Facts of a name in any form. None: not a name, no such model, a cloud model's stub, or no server to ask.

        Raises:
            OllamaError: the server could not be asked, or could not say.
        """
        key = _key(name)
        if key is None:
            return None
        if key in self._known:
            return self._known[key]
        under_way = self._fetches.get(key)
        if under_way is not None:
            facts = await asyncio.shield(under_way)
            if facts is not None:
                return facts
            # It may have looked before the model came; one that begins after this call cannot have.
        return await asyncio.shield(self._fetches.get(key) or self._start_fetch(key))

    async def refresh(self) -> None:
        """Reads the list of models again and forgets facts that no longer hold.

        Raises:
            OllamaError: the server could not be asked; nothing is forgotten.
        """
        rows = await asyncio.shield(self._readings.begin())
        if rows is None:
            return
        for key, facts in list(self._known.items()):
            row = rows.get(key)
            if row is None or row.digest != facts.digest:
                self._forget(key)

    def forget(self, name: str) -> None:
        """Drops what is remembered of a name in any form; a fetch under way is answered but not remembered."""
        key = _key(name)
        if key is not None:
            self._forget(key)

    def forget_all(self) -> None:
        """Drops everything remembered: the store was changed in ways that a name does not tell (copy, create)."""
        for key in {*self._known, *self._fetches}:
            self._forget(key)

    async def close(self) -> None:
        """Cancels fetches under way; those who wait for them are cancelled too."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _forget(self, key: str) -> None:
        self._known.pop(key, None)
        self._fetches.pop(key, None)

    def _start_fetch(self, key: str) -> asyncio.Task[ModelFacts | None]:
        self._fetches[key] = task = self._start(self._fetch(key))
        return task

    async def _fetch(self, key: str) -> ModelFacts | None:
        me = asyncio.current_task()
        try:
            rows = await asyncio.shield(self._readings.begin())
            row = None if rows is None else rows.get(key)
            facts = None if row is None else await self._ask(row)
            if facts is not None and self._fetches.get(key) is me:
                self._known[key] = facts
            return facts
        finally:
            if self._fetches.get(key) is me:
                del self._fetches[key]

    async def _ask(self, row: TagRow) -> ModelFacts | None:
        client = self._client_of()
        if client is None or row.remote_host:
            return None
        try:
            reply = await client.show(row.name)
            if needs_verbose(reply):
                reply = await client.show(row.name, verbose=True)
        except OllamaError as error:
            if error.status == _NOT_FOUND:  # deleted since it was listed
                return None
            raise
        return read_facts(row, reply)

    async def _read_rows(self) -> _Rows | None:
        client, began_at = self._client_of(), self._clock()
        if client is None:
            return None
        keyed = ((_key(row.name), row) for row in await client.tags())
        self._read_at = began_at
        return {key: row for key, row in keyed if key is not None}

    def _start(self, work: Coroutine[Any, Any, _T]) -> asyncio.Task[_T]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # it was raised to those who waited; nobody may be left


class _Readings:
    """Shares readings of the list so that one runs at a time: each caller gets one that begins after its call."""

    def __init__(
        self,
        read: Callable[[], Coroutine[Any, Any, _Rows | None]],
        start: Callable[[Coroutine[Any, Any, _Rows | None]], asyncio.Task[_Rows | None]],
    ) -> None:
        self._read = read
        self._start = start
        self._running: asyncio.Task[_Rows | None] | None = None
        self._next: asyncio.Task[_Rows | None] | None = None

    def begin(self) -> asyncio.Task[_Rows | None]:
        if self._next is None:
            self._next = self._start(self._run(self._running))
        return self._next

    async def _run(self, before: asyncio.Task[_Rows | None] | None) -> _Rows | None:
        if before is not None and not before.done():
            await asyncio.wait((before,))
        self._running, self._next = self._next, None  # whoever asks from here on needs the one after this
        return await self._read()


def _key(name: str) -> str | None:
    try:
        return canonical(name)
    except ValueError:
        return None
