"""A model with a server of its own, started to load it and stopped to unload it: llama-server, vLLM, SGLang.

One engine a model, since such a server holds one model. Its instances are places where it may run, each over fixed
GPUs; they need no process, so that they are always ready. A load starts the server and ends when it has answered a real
request; an unload ends with its last process. So its memory is booked from the decision to the exit, like that of every
other model, and it makes room and is evicted by the same rules.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import structlog

from router.domain.actions import Load, Unload
from router.domain.events import LoadedModel, LoadFailed, LoadFinished, UnloadFinished
from router.domain.footprint import Footprint, FootprintKey, GpuFootprint
from router.domain.instance import InstanceName, InstanceSpec
from router.domain.model import ModelFacts
from router.domain.snapshot import Estimate, Snapshot
from router.engines.base import ProbeFailed
from router.engines.openai.client import answers, is_healthy
from router.engines.openai.engine import AttachedEndpoints, OpenAiEngine

_POLL_SECONDS = 0.1
_HEALTH_MISSES_MAX = 6
"""Failed health checks in a row, five seconds apart, after which a server counts as hung."""
_STOP_SECONDS = 15.0
"""Between SIGTERM and SIGKILL."""
_LINES_MAX = 10
_MEMORY_SHORT = ("out of memory", "failed to allocate", "unable to allocate", "no available memory for the cache")

HEALTH_PATHS: Mapping[str, str] = {"llama-server": "/health", "vllm": "/health", "sglang": "/health_generate"}


class Process(Protocol):
    """A running server with all its processes."""

    exited: asyncio.Event
    returncode: int | None

    async def stop(self, grace_seconds: float) -> bool:
        """Returns False if a process is left."""
        ...


Spawn = Callable[[Sequence[str], Mapping[str, str], InstanceName, Callable[[str], None]], Process]
"""(command, added environment, instance, receiver of lines) -> the server. Raises OSError."""
EstimateBytes = Callable[[InstanceSpec, Snapshot], tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class ServedModel:
    """One model of the configuration."""

    name: str
    kind: str
    """Of its server; a key of `HEALTH_PATHS`."""
    engine: str
    """Kind of the engine: of this model alone."""
    start_timeout_seconds: float
    start_seconds: float
    """Expected of its start until one was measured."""
    estimate: EstimateBytes
    """Bytes on each GPU."""
    commands: Mapping[InstanceName, tuple[str, ...]]
    environments: Mapping[InstanceName, Mapping[str, str]]
    signature: str
    """Changes with whatever in the configuration changes what it takes: sizes measured before then do not count."""
    is_embedding: bool = False


@dataclass(slots=True)
class _Server:
    process: Process
    lines: deque[str] = field(default_factory=lambda: deque[str](maxlen=_LINES_MAX))
    is_ready: bool = False
    misses: int = 0


class SupervisedEngine(OpenAiEngine):
    """Satisfies `Engine`. `close` ends all servers."""

    def __init__(
        self, served: ServedModel, facts: ModelFacts, instances: Sequence[InstanceSpec], spawn: Spawn,
        now: Callable[[], float],
    ) -> None:  # fmt: skip
        super().__init__(AttachedEndpoints({}))
        self.kind = served.engine
        self.title = served.engine
        self._served = served
        self._facts = facts
        self._by_url = {spec.url: spec.name for spec in instances}
        self._spawn = spawn
        self._now = now
        self._start_seconds = served.start_seconds
        self._servers: dict[InstanceName, _Server] = {}
        self._log = structlog.get_logger("router.supervisor")

    # --- what the scheduler asks -----------------------------------------------------------------------------

    def runs_elsewhere(self, model: ModelFacts) -> bool:
        return False

    def estimate_bytes(
        self, model: ModelFacts, spec: InstanceSpec, context_length: int, snapshot: Snapshot
    ) -> tuple[int, ...]:
        return self._served.estimate(spec, snapshot)

    def estimate_footprint(
        self, model: ModelFacts, spec: InstanceSpec, context_length: int, snapshot: Snapshot
    ) -> Footprint:
        sizes = self._served.estimate(spec, snapshot)
        return Footprint.of(tuple(GpuFootprint(weights_bytes=size) for size in sizes))

    def worst_case_bytes(
        self, estimate: Estimate, model: ModelFacts, spec: InstanceSpec, context_length: int, snapshot: Snapshot
    ) -> tuple[int, ...]:
        return estimate(model, spec, context_length, snapshot)

    def footprint_key(
        self, model: ModelFacts, spec: InstanceSpec, context_length: int, snapshot: Snapshot
    ) -> FootprintKey:
        return FootprintKey(
            model.blob, len(spec.gpus), context_length, spec.num_parallel, "", version=self._served.signature
        )

    def reload_seconds(self, model: ModelFacts, fixed_seconds: float, bytes_per_second: float) -> float:
        """As its last start took: minutes for vLLM, which is what its eviction costs."""
        return self._start_seconds

    # --- places ----------------------------------------------------------------------------------------------

    def command(self, spec: InstanceSpec) -> tuple[str, ...]:
        """Never run by the supervisor: a load runs it."""
        return self._served.commands[spec.name]

    async def probe(self, url: str, timeout_seconds: float) -> str:
        """A place is always well. A server there that hangs is ended, so that its model counts as lost."""
        name = self._by_url[url]
        server = self._servers.get(name)
        if server is not None and server.is_ready and not server.process.exited.is_set():
            path = url + HEALTH_PATHS[self._served.kind]
            server.misses = 0 if await is_healthy(path, timeout_seconds) else server.misses + 1
            if server.misses >= _HEALTH_MISSES_MAX:
                self._log.error("engine_hangs", instance=name, model=self._served.name, misses=server.misses)
                await self._end(name)
        return ""

    # --- loads -----------------------------------------------------------------------------------------------

    async def load(self, load: Load) -> LoadFinished | LoadFailed:
        name, served = load.instance, self._served
        await self._end(name)  # one that died and was not noticed
        lines = deque[str](maxlen=_LINES_MAX)
        try:
            process = self._spawn(served.commands[name], served.environments[name], name, lines.append)
        except OSError as error:
            return LoadFailed(load.load_id, 502, f"cannot start {served.commands[name][0]}: {error}")
        server = self._servers[name] = _Server(process, lines)
        began_at = self._now()
        self._log.info("engine_starts", instance=name, model=served.name, kind=served.kind)
        problem = "was ended before it was ready"
        try:
            async with asyncio.timeout(served.start_timeout_seconds):
                problem = await self._ready_or_gone(server, load.url)
        except TimeoutError:
            problem = f"was not ready within {served.start_timeout_seconds:g} s"
        finally:
            if problem:
                await asyncio.shield(self._end(name))
        if problem:
            message = f"{served.kind} {problem}; last lines: {' | '.join(lines)}"
            is_short = any(words in message.lower() for words in _MEMORY_SHORT)
            return LoadFailed(load.load_id, 502, message, is_memory_short=is_short)
        server.is_ready = True
        self._start_seconds = self._now() - began_at
        self._log.info("engine_ready", instance=name, model=served.name, seconds=round(self._start_seconds, 1))
        return LoadFinished(load.load_id, 0, 0)

    async def _ready_or_gone(self, server: _Server, url: str) -> str:
        """Returns "" once the server answers, or why it never will."""
        async with asyncio.TaskGroup() as tasks:
            ready = tasks.create_task(self._until_ready(url))
            gone = tasks.create_task(server.process.exited.wait())
            await asyncio.wait({ready, gone}, return_when=asyncio.FIRST_COMPLETED)
            is_gone = server.process.exited.is_set()
            ready.cancel()
            gone.cancel()
        return f"exited with code {server.process.returncode}" if is_gone else ""

    async def _until_ready(self, url: str) -> None:
        """Until it is healthy and has answered a real request for one token: some are healthy and die on the first."""
        while not await is_healthy(url + HEALTH_PATHS[self._served.kind], 5.0):  # noqa: ASYNC110 - another program
            await asyncio.sleep(_POLL_SECONDS)
        while True:
            with contextlib.suppress(ProbeFailed):
                await answers(url, self._served.name, is_embedding=self._served.is_embedding)
                return
            await asyncio.sleep(_POLL_SECONDS)

    async def unload(self, unload: Unload) -> UnloadFinished:
        is_gone = await self._end(unload.instance)
        problem = None if is_gone else f"a process of {self._served.kind} does not end"
        return UnloadFinished(unload.instance, unload.blob, problem)

    async def _end(self, name: InstanceName) -> bool:
        server = self._servers.get(name)
        if server is None:
            return True
        server.is_ready = False
        is_gone = await server.process.stop(_STOP_SECONDS)
        if is_gone and self._servers.get(name) is server:
            del self._servers[name]
        return is_gone

    async def close(self) -> None:
        """Ends all servers."""
        await asyncio.gather(*(self._end(name) for name in list(self._servers)))

    # --- models ----------------------------------------------------------------------------------------------

    async def loaded(self, spec: InstanceSpec) -> tuple[LoadedModel, ...]:
        server = self._servers.get(spec.name)
        if server is None or not server.is_ready:
            return ()
        if server.process.exited.is_set():
            self._log.error(
                "engine_died", instance=spec.name, model=self._served.name, code=server.process.returncode,
                last_lines=" | ".join(server.lines),
            )  # fmt: skip
            await self._end(spec.name)
            return ()
        return (LoadedModel(self._facts.name, self._facts.digest, 0, 0, None, self._facts),)

    async def facts(self, name: str) -> ModelFacts | None:
        return self._facts if name == self._facts.name else None
