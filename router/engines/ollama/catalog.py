"""Caches which models exist, in which store, and their facts, as read from the servers.

All spawned instances share one store; each attached server has its own (`Store`). A name means the model in the shared
store, else that of the first attached server that has it. Its facts say which other stores have the same model.

Cached facts belong to the digest of a manifest: `refresh` drops them if the digest of the name has changed or the model
is gone. An unknown name is always looked up live, so that a newly pulled model is available at once; concurrent
lookups share one reading. Facts of older digests are kept separately, because a server may still have loaded what a
name meant before. Lookups run as separate tasks, so that a cancelled caller does not affect others.

If a server fails, `facts` raises; this is never taken as an empty store.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import structlog

from router.domain.model import BlobDigest, ModelFacts
from router.engines.ollama.client import UNREACHABLE, OllamaError, TagRow
from router.engines.ollama.model_listing import Listed, Listing, Store, key_of
from router.engines.ollama.model_metadata import needs_verbose, read_facts
from router.engines.ollama.unreadable_facts import UnreadableFacts

_T = TypeVar("_T")
_NOT_FOUND = 404
_SEEN_DIGESTS_MAX = 4096
_WRITTEN_NAMES_MAX = 1024
_CONCURRENT_READS_MAX = 8
"""Models whose facts are read at the same time when all are needed."""


class Catalog:
    """`stores` returns the current stores, the shared one first. `clock` is monotonic, in seconds.

    Use it in one event loop only; `close` cancels running lookups.
    """

    def __init__(self, stores: Callable[[], Sequence[Store]], clock: Callable[[], float]) -> None:
        self._clock = clock
        self._listing = Listing(stores)
        self._known: dict[str, ModelFacts] = {}
        self._by_written_name: dict[str, ModelFacts] = {}
        """Memo of `known`, so that a name is parsed once; emptied whenever `_known` changes."""
        self._seen: dict[str, ModelFacts] = {}
        """By digest of the manifest, including those that no name means any more."""
        self._without_facts: dict[str, str] = {}
        """Names without facts (a cloud model's stub), each with the digest that was looked at."""
        self._unreadable = UnreadableFacts(clock)
        """Digests that servers have loaded, and whose facts could not be read."""
        self._last_rows: dict[str, str] = {}
        """The digest of each name when the list was last refreshed."""
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
        """Cached facts of a name in any form; None if they are not cached."""
        facts = self._by_written_name.get(name)
        if facts is not None:
            return facts
        key = key_of(name)
        facts = None if key is None else self._known.get(key)
        if facts is not None and len(self._by_written_name) < _WRITTEN_NAMES_MAX:
            self._by_written_name[name] = facts
        return facts

    async def facts(self, name: str) -> ModelFacts | None:
        """Facts of a name in any form. None: invalid name, no such model, a stub of a cloud model, or no ready server.

        Raises:
            OllamaError: the server could not be reached or answered with an error.
        """
        key = key_of(name)
        if key is None:
            return None
        if key in self._known:
            return self._known[key]
        if key in self._without_facts:
            return None
        running = self._fetches.get(key)
        if running is not None:
            facts = await asyncio.shield(running)
            if facts is not None:
                return facts
            # It may have read the list before the model was added; a lookup that starts now cannot.
        return await asyncio.shield(self._fetches.get(key) or self._start_fetch(key))

    async def facts_of(self, name: str, digest: str) -> ModelFacts | None:
        """Facts of a loaded model by name and digest, even if the name means another digest now; None if unknown.

        If they cannot be read, the servers are asked again only after a while, or when their models have changed.

        Raises:
            OllamaError: the server could not be reached or answered with an error.
        """
        cached = self.seen(digest)
        if cached is not None:
            return cached
        if self._unreadable.is_held(digest):
            return self._unreadable.outcome(digest)
        try:
            facts = await self.facts(name)
        except OllamaError as error:
            if error.status != UNREACHABLE:
                self._unreadable.failed(digest, error)
            raise
        if facts is not None and facts.digest == digest:
            return facts
        self._unreadable.failed(digest, None)
        return None

    def seen(self, digest: str) -> ModelFacts | None:
        """Cached facts of a digest; None if it was never read."""
        return self._seen.get(digest)

    async def names_of(self, blob: BlobDigest) -> tuple[str, ...]:
        """The names in the shared store that mean these weights. Reads the whole list live.

        Raises:
            OllamaError: the server could not be reached or answered with an error.
        """
        rows = await asyncio.shield(self._readings.begin())
        semaphore = asyncio.Semaphore(_CONCURRENT_READS_MAX)

        async def facts_of_row(listed: Listed) -> ModelFacts | None:
            async with semaphore:
                return await self.facts(listed.row.name)

        all_facts = await asyncio.gather(*(facts_of_row(each) for each in (rows or {}).values() if each.is_shared))
        return tuple(facts.name for facts in all_facts if facts is not None and facts.blob == blob)

    async def refresh(self) -> None:
        """Reads the list of models again and drops outdated facts.

        Raises:
            OllamaError: the server could not be reached; nothing is dropped.
        """
        rows = await asyncio.shield(self._readings.begin())
        if rows is None:
            return
        digests = {key: listed.row.digest for key, listed in rows.items()}
        if digests != self._last_rows:
            self._last_rows = digests
            self._unreadable.clear()
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
        """Drops the cached facts of a name in any form; a running lookup is answered but not cached."""
        self._unreadable.clear()
        key = key_of(name)
        if key is not None:
            self._forget(key)

    def forget_all(self) -> None:
        """Drops all cached facts, after changes of the store that may affect any name (copy, create)."""
        self._unreadable.clear()
        for key in {*self._known, *self._without_facts, *self._fetches}:
            self._forget(key)

    async def close(self) -> None:
        """Cancels running lookups, and with them the callers that wait for them."""
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
        task = asyncio.current_task()
        try:
            rows = await asyncio.shield(self._readings.begin())
            listed = None if rows is None else rows.get(key)
            facts = None if listed is None else await self._fetch_facts(listed)
            if facts is not None:
                self._warn_of_opaque(facts)
                self._remember_digest(facts)
                if self._fetches.get(key) is task:
                    self._known[key] = facts
                    self._by_written_name.clear()
            return facts
        finally:
            if self._fetches.get(key) is task:
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

    async def _fetch_facts(self, listed: Listed) -> ModelFacts | None:
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
            task.exception()  # already raised to the callers, if any are left: do not log it as never retrieved


_Rows = Mapping[str, Listed]


class _Readings:
    """Shares readings of the list, one at a time: each caller gets one that begins after its call."""

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
        self._running, self._next = self._next, None  # later callers need a new reading
        return await self._read()
