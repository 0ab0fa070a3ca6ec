"""A supervisor over real small processes, a manual clock, and a check that no process is left behind."""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import itertools
import os
import sys
import uuid
from collections.abc import AsyncGenerator, Callable, Generator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

from router.domain.events import InstanceChanged
from router.domain.gpu import GpuUuid
from router.domain.instance import InstanceName, InstanceSpec, InstanceState, InstanceView
from router.engines.ollama.rules import KIND
from router.engines.ollama.server import OllamaServer
from router.supervisor.orphan_reaper import run_id
from router.supervisor.ports import free_ports
from router.supervisor.process import inheritable_environment
from router.supervisor.supervisor import Supervisor, SupervisorConfig
from tests.support.waiting import eventually, eventually_sync

FAKE_SERVER = (sys.executable, str(Path(__file__).parent / "fake_server.py"))
_MARK = "FLEET_TEST_MARK"
DEADLINE_SECONDS = 60.0


def is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@dataclass
class Marked:
    """The processes of one test, found by an environment variable that they inherit."""

    value: str = field(default_factory=lambda: uuid.uuid4().hex)

    @property
    def environment(self) -> dict[str, str]:
        return {**inheritable_environment(os.environ), _MARK: self.value}

    def alive(self) -> list[psutil.Process]:
        found: list[psutil.Process] = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                if process.environ().get(_MARK) == self.value and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found


@pytest.fixture
def marked() -> Generator[Marked]:
    """The environment for a test's children. The test fails if one of them outlives it; leftovers are killed."""
    mark = Marked()
    yield mark
    left = mark.alive()
    for process in left:
        with contextlib.suppress(psutil.Error):
            process.kill()
    assert not left, "processes were left behind"


class ManualClock:
    """A clock that only `advance` moves; `waits` shows who sleeps."""

    def __init__(self) -> None:
        self._now = 1000.0
        self._order = itertools.count()
        self._sleepers: list[tuple[float, int, asyncio.Future[None]]] = []

    def now(self) -> float:
        return self._now

    async def sleep(self, seconds: float) -> None:
        future = asyncio.get_running_loop().create_future()
        heapq.heappush(self._sleepers, (self._now + seconds, next(self._order), future))
        await future

    @property
    def waits(self) -> list[float]:
        """Remaining seconds of all sleepers, shortest first."""
        return sorted(until - self._now for until, _, future in self._sleepers if not future.done())

    def advance(self, seconds: float) -> None:
        self._now += seconds
        while self._sleepers and self._sleepers[0][0] <= self._now:
            _, _, future = heapq.heappop(self._sleepers)
            if not future.done():
                future.set_result(None)


@dataclass
class Fleet:
    """A running supervisor over fake servers, and the changes it reported."""

    supervisor: Supervisor
    folder: Path
    changes: list[InstanceChanged]
    clock: ManualClock

    def states(self, name: str = "a") -> list[InstanceState]:
        return [change.state for change in self.changes if change.spec.name == name]

    async def reaches(self, state: InstanceState, name: str = "a") -> InstanceChanged:
        """Waits for the state and returns the change that led to it."""
        async with asyncio.timeout(DEADLINE_SECONDS):
            await self.supervisor.wait_for(InstanceName(name), state)
        return next(change for change in reversed(self.changes) if change.spec.name == name and change.state is state)

    def view(self, name: str = "a") -> InstanceView:
        return next(view for view in self.supervisor.views if view.spec.name == name)

    async def end_backoff(self) -> None:
        """Moves the clock to the end of the wait before the next start. Only the restarting instance may be waiting."""
        await eventually(lambda: self.clock.waits)
        (wait,) = self.clock.waits
        self.clock.advance(wait)

    def pid(self, name: str = "a") -> int:
        pid = self.supervisor.pid(InstanceName(name))
        assert pid is not None
        return pid

    def runner(self, name: str = "a") -> int:
        path = self.folder / name / "runner"
        eventually_sync(path.exists, what="the runner")
        return int(path.read_text())

    def starts(self, name: str = "a") -> int:
        path = self.folder / name / "starts"
        return len(path.read_text().splitlines()) if path.exists() else 0

    def spec(self, name: str = "a", play: str = "", gpus: tuple[str, ...] = (), **environment: str) -> InstanceSpec:
        folder = self.folder / name
        folder.mkdir(exist_ok=True)
        (port,) = free_ports(1, seed=next(_seeds))
        server_environment = {
            "OLLAMA_HOST": f"127.0.0.1:{port}",
            "CUDA_VISIBLE_DEVICES": ",".join(gpus) or "-1",
            "FAKE_DIR": str(folder),
            "FAKE_PLAY": play,
        }
        uuids = tuple(GpuUuid(gpu) for gpu in gpus)
        return InstanceSpec(
            InstanceName(name), uuids, f"http://127.0.0.1:{port}", environment={**server_environment, **environment}
        )

    def add(self, name: str = "a", play: str = "", gpus: tuple[str, ...] = (), **environment: str) -> InstanceSpec:
        spec = self.spec(name, play, gpus, **environment)
        self.supervisor.add(spec)
        return spec

    def attach(self, name: str, url: str) -> InstanceSpec:
        """Adds an attached instance: a server that something else runs."""
        spec = InstanceSpec(InstanceName(name), (), url, attached=True)
        self.supervisor.add(spec)
        return spec

    async def advance_until(self, seconds: float, condition: Callable[[], bool]) -> None:
        """Advances the clock by `seconds` whenever a task sleeps on it, until the condition is true."""

        def step() -> bool:
            if not condition() and self.clock.waits:
                self.clock.advance(seconds)
            return condition()

        await eventually(step)


_seeds = itertools.count(os.getpid(), 7)

MakeFleet = Callable[..., "contextlib.AbstractAsyncContextManager[Fleet]"]


@pytest.fixture
def make_fleet(marked: Marked, tmp_path: Path) -> MakeFleet:
    """`async with make_fleet() as fleet`: a supervisor runs inside the block and is stopped at its end. `also` is
    called with every change, like the controller."""

    @contextlib.asynccontextmanager
    async def running(
        environment: Mapping[str, str] | None = None,
        also: Callable[[InstanceChanged], None] | None = None,
        **fields: Any,
    ) -> AsyncGenerator[Fleet]:
        defaults: dict[str, Any] = {"command": FAKE_SERVER, "stop_timeout_seconds": 5.0, "start_timeout_seconds": 60.0}
        options = {**defaults, **fields}
        server = OllamaServer(options.pop("command"))
        is_loading = options.pop("is_loading", lambda _: False)
        config = SupervisorConfig(
            state_directory=str(tmp_path / "state"),
            run_id=run_id(),
            environment={**marked.environment, **(environment or {})},
            **options,
        )
        changes: list[InstanceChanged] = []
        clock = ManualClock()

        def on_change(change: InstanceChanged) -> None:
            changes.append(change)
            if also is not None:
                also(change)

        supervisor = Supervisor(config, {KIND: server}, on_change, clock, is_loading=is_loading)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(supervisor.run())
            try:
                yield Fleet(supervisor, tmp_path, changes, clock)
            finally:
                async with asyncio.timeout(60):
                    await supervisor.stop_all()

    return running
