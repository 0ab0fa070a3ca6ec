"""Which models there are and where, and the facts of each, asked of the servers and remembered.

There is the store that all spawned instances share, and one of its own for each attached server (`Store`). A name means
the shared store's model where that has it, else the first attached server's; which further stores hold the very same
is told with the facts.

Facts belong to a manifest's digest: `refresh` forgets those whose digest has changed or whose model is gone. A name
that is not known is always asked for live, so that a model that anybody has pulled is there at once; many who ask at
once share one reading. Facts of digests that were seen are kept beside that, because a server may still have loaded
what its name no longer means. Fetches run as tasks of the catalog's own: a caller that leaves takes nobody's answer.

It never guesses: a server that fails makes `facts` raise, and is not taken for one without models.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import structlog

from router.domain.model import BlobDigest, ModelFacts
from router.engines.ollama.client import OllamaError, TagRow
from router.engines.ollama.model_listing import Listed, Listing, Store, key_of
from router.engines.ollama.model_metadata import needs_verbose, read_facts

_T = TypeVar("_T")
_NOT_FOUND = 404
_SEEN_DIGESTS_MAX = 4096
_WRITTEN_NAMES_MAX = 1024
_SIDE_BY_SIDE = 8
"""Models whose facts are read at once where all of them are wanted."""


class Catalog:
    """`stores` gives the stores at the moment, the shared one first. `clock` is monotonic, in seconds.

    To be used within one event loop; `close` ends what is under way.
    """

    def __init__(self, stores: Callable[[], Sequence[Store]], clock: Callable[[], float]) -> None:
        self._clock = clock
        self._listing = Listing(stores)
        self._known: dict[str, ModelFacts] = {}
        self._by_written_name: dict[str, ModelFacts] = {}
        """Memo of `known`, so that a name is parsed once; emptied whenever `_known` changes."""
        self._seen: dict[str, ModelFacts] = {}
        """By digest, whatever its name means today."""
        self._without_facts: dict[str, str] = {}
        """Names without facts (a cloud model's stub), each with the digest that was looked at."""
        self._unknown_digests: set[str] = set()
        """Digests that servers have loaded and no name stands for, since the list was last read."""
        self._warned: set[str] = set()
        """Digests of opaque models that were reported."""
        self._log = structlog.get_logger("router.catalog")
        self._fetches: dict[str, asyncio.Task[ModelFacts | None]] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._readings = _Readings(self._read_rows, self._start)
        self._read_at: float | None = None

    @property
    def read_at(self) -> float | None:
        """When the last complete reading of the stores began; None before the first."""
        return self._read_at

    def unheard(self) -> tuple[str, ...]:
        """Attached servers whose models are not known, because they have not answered since the start."""
        return self._listing.unheard()

    def known(self, name: str) -> ModelFacts | None:
        """Remembered facts of a name in any form; asks nobody."""
        facts = self._by_written_name.get(name)
        if facts is not None:
            return facts
        key = key_of(name)
        facts = None if key is None else self._known.get(key)
        if facts is not None and len(self._by_written_name) < _WRITTEN_NAMES_MAX:
            self._by_written_name[name] = facts
        return facts

    async def facts(self, name: str) -> ModelFacts | None:
        """Facts of a name in any form. None: not a name, no such model, a cloud model's stub, or no server to ask.

        Raises:
            OllamaError: the server could not be asked, or could not say.
        """
        key = key_of(name)
        if key is None:
            return None
        if key in self._known:
            return self._known[key]
        if key in self._without_facts:
            return None
        under_way = self._fetches.get(key)
        if under_way is not None:
            facts = await asyncio.shield(under_way)
            if facts is not None:
                return facts
            # It may have looked before the model came; one that begins after this call cannot have.
        return await asyncio.shield(self._fetches.get(key) or self._start_fetch(key))

    async def facts_of(self, name: str, digest: str) -> ModelFacts | None:
        """Facts of what a server has loaded under that name with that digest, though the name may mean another by now.

        Raises:
            OllamaError: the server could not be asked, or could not say.
        """
        seen = self.seen(digest)
        if seen is not None:
            return seen
        if digest in self._unknown_digests:
            return None
        facts = await self.facts(name)
        if facts is not None and facts.digest == digest:
            return facts
        self._unknown_digests.add(digest)
        return None

    def seen(self, digest: str) -> ModelFacts | None:
        """Facts of a digest that was read at any time; asks nobody."""
        return self._seen.get(digest)

    async def names_of(self, blob: BlobDigest) -> tuple[str, ...]:
        """The names in the shared store that stand for these weights, after a live look at all of them.

        Raises:
            OllamaError: the server could not be asked, or could not say.
        """
        rows = await asyncio.shield(self._readings.begin())
        gate = asyncio.Semaphore(_SIDE_BY_SIDE)

        async def looked_up(listed: Listed) -> ModelFacts | None:
            async with gate:
                return await self.facts(listed.row.name)

        found = await asyncio.gather(*(looked_up(each) for each in (rows or {}).values() if each.is_shared))
        return tuple(facts.name for facts in found if facts is not None and facts.blob == blob)

    async def refresh(self) -> None:
        """Reads the list of models again and forgets facts that no longer hold.

        Raises:
            OllamaError: the server could not be asked; nothing is forgotten.
        """
        rows = await asyncio.shield(self._readings.begin())
        if rows is None:
            return
        self._unknown_digests.clear()
        for key, digest in list(self._without_facts.items()):
            if key not in rows or rows[key].row.digest != digest:
                del self._without_facts[key]
        for key, facts in list(self._known.items()):
            listed = rows.get(key)
            if listed is None or listed.row.digest != facts.digest:
                self._forget(key)
            elif (facts.is_shared, facts.attached_on) != (listed.is_shared, listed.attached_on):
                self._known[key] = replace(facts, is_shared=listed.is_shared, attached_on=listed.attached_on)
                self._by_written_name.clear()

    def forget(self, name: str) -> None:
        """Drops what is remembered of a name in any form; a fetch under way is answered but not remembered."""
        key = key_of(name)
        if key is not None:
            self._forget(key)

    def forget_all(self) -> None:
        """Drops everything remembered: the store was changed in ways that a name does not tell (copy, create)."""
        self._unknown_digests.clear()
        for key in {*self._known, *self._without_facts, *self._fetches}:
            self._forget(key)

    async def close(self) -> None:
        """Cancels fetches under way; those who wait for them are cancelled too."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _forget(self, key: str) -> None:
        self._known.pop(key, None)
        self._without_facts.pop(key, None)
        self._by_written_name.clear()
        self._fetches.pop(key, None)

    def _start_fetch(self, key: str) -> asyncio.Task[ModelFacts | None]:
        self._fetches[key] = task = self._start(self._fetch(key))
        return task

    async def _fetch(self, key: str) -> ModelFacts | None:
        me = asyncio.current_task()
        try:
            rows = await asyncio.shield(self._readings.begin())
            listed = None if rows is None else rows.get(key)
            facts = None if listed is None else await self._ask(listed)
            if facts is not None:
                self._warn_of_opaque(facts)
                self._remember_digest(facts)
                if self._fetches.get(key) is me:
                    self._known[key] = facts
                    self._by_written_name.clear()
            return facts
        finally:
            if self._fetches.get(key) is me:
                del self._fetches[key]

    def _warn_of_opaque(self, facts: ModelFacts) -> None:
        if facts.is_opaque and facts.digest not in self._warned:
            self._warned.add(facts.digest)
            why = "its server does not describe its weights; it is placed by their size until it was measured"
            self._log.warning("model_format_unknown", model=facts.name, digest=facts.digest, reason=why)

    def _remember_digest(self, facts: ModelFacts) -> None:
        self._seen[facts.digest] = facts
        while len(self._seen) > _SEEN_DIGESTS_MAX:
            del self._seen[next(iter(self._seen))]

    async def _ask(self, listed: Listed) -> ModelFacts | None:
        client, row = listed.client, listed.row
        if row.remote_host:
            return self._remember_stub(row)
        try:
            reply = await client.show(row.name)
            if needs_verbose(reply):
                reply = await client.show(row.name, verbose=True)
        except OllamaError as error:
            if error.status == _NOT_FOUND:  # deleted since it was listed
                return None
            raise
        facts = read_facts(row, reply)
        if facts is None:
            return self._remember_stub(row)
        return replace(facts, is_shared=listed.is_shared, attached_on=listed.attached_on)

    def _remember_stub(self, row: TagRow) -> None:
        key = key_of(row.name)
        if key is not None:
            self._without_facts[key] = row.digest

    async def _read_rows(self) -> Mapping[str, Listed] | None:
        began_at = self._clock()
        rows = await self._listing.read()
        if rows is not None:
            self._read_at = began_at
        return rows

    def _start(self, work: Coroutine[Any, Any, _T]) -> asyncio.Task[_T]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # it was raised to those who waited; nobody may be left


_Rows = Mapping[str, Listed]


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
