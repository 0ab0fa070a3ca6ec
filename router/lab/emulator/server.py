"""The EMULATED `ollama serve`: an executable that behaves as a real one, without GPUs and weights.

`python -m router.lab.emulator.server serve` reads the environment variables of real Ollama and three of its own:
`LLAMAYARD_RIG_DIR` (directory of the emulated GPUs; none if unset), `LLAMAYARD_RIG_VERSION` (see `spec.VERSIONS`)
and `LLAMAYARD_RIG_SPEED` (emulated seconds per real second). Every log line says that it is emulated. Faults can be
injected (`router.lab.emulator.faults`).

Limitations, apart from those listed in its modules: keep-alive timers run in real time whatever the speed; a client
that stops reading slows down only itself; templates are rendered approximately; images and adapters are ignored; the
cloud is never contacted.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sys
from collections.abc import Coroutine, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from router.lab.emulator.config import Config, log, log_devices, read_config
from router.lab.emulator.context import Service
from router.lab.emulator.faults import FILE, Behaviour, Fault, behaviour, read_faults, server_fault
from router.lab.emulator.http_server import Request, Response, listen
from router.lab.emulator.loader import Loader, LoaderContext
from router.lab.emulator.memory import Memory
from router.lab.emulator.routes import Router
from router.lab.emulator.scheduler import Scheduler
from router.lab.emulator.store import Store
from router.lab.simulator.world import WORLD

INSTANCE_VARIABLE = "LLAMAYARD_INSTANCE"
"""Set by the router to `RUN:NAME` for its children. Repeated here to avoid the imports of
router/supervisor/process.py."""
_FAULTS_POLL_SECONDS = 0.2
_SPARES_RECENT_BLOBS_FROM = (0, 21)


class Server:
    """The server process."""

    def __init__(self, config: Config, environment: Mapping[str, str]) -> None:
        self.config = config
        self._instance = environment.get(INSTANCE_VARIABLE, "").rpartition(":")[2]
        self._faults: tuple[Fault, ...] = ()
        self._faults_text = b""
        self._tasks: set[asyncio.Task[None]] = set()
        self._shutdown = asyncio.Event()
        self._is_responding = asyncio.Event()
        self._is_responding.set()
        self._exit_code = 0
        store, memory = Store(config.models), Memory(config)
        world = replace(WORLD, cold_bytes_per_second=config.cold_bytes_per_second)
        loader = Loader(LoaderContext(config, world, store, memory, environment, self._behaviour))
        self._memory = memory
        self._scheduler = Scheduler(config, loader, self._spawn_task)
        self._service = Service(config, store, loader, self._scheduler, self._behaviour, random.Random())
        self._router = Router(self._service)

    def _spawn_task(self, coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._on_task_done)
        return task

    def _on_task_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log("ERROR", "internal emulator error", error=repr(error))
            self._exit_code = 70
            self._shutdown.set()

    def _behaviour(self, model: str) -> Behaviour:
        self._read_faults()
        return behaviour(self._faults, self._instance, (gpu.uuid for gpu in self.config.gpus), model)

    async def run(self) -> int:
        """Runs until a signal or a fault ends it; returns the exit status."""
        self._read_faults()
        if self._server_fault() == "refuse_start":
            sys.stderr.write("Error: emulated fault: this server does not start\n")
            return 1
        loop = asyncio.get_running_loop()
        for signal_number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(signal_number, self._shutdown.set)
        self._log_start()
        try:
            await listen(self._handle, self.config.host, self.config.port, self._tasks)
        except OSError as error:
            address = f"{self.config.host}:{self.config.port}"
            sys.stderr.write(f"Error: listen tcp {address}: bind: {os.strerror(error.errno or 0).lower()}\n")
            return 1
        address = f"{self.config.host}:{self.config.port}"
        log("INFO", f"Listening on {address} (version {self.config.version_text})")
        self._spawn_task(self._discover())
        if self.config.emulator_dir is not None:
            self._spawn_task(self._watch_faults())
        await self._shutdown.wait()
        self._scheduler.kill_all()
        return self._exit_code

    async def _handle(self, request: Request, response: Response) -> None:
        await self._is_responding.wait()
        await self._router(request, response)

    def _log_start(self) -> None:
        config, store = self.config, self._service.store
        log("INFO", "server config", env=f"map[OLLAMA_HOST:http://{config.host}:{config.port} "
            f"OLLAMA_MODELS:{config.models} OLLAMA_NUM_PARALLEL:{config.num_parallel}]")  # fmt: skip
        log("INFO", f"total blobs: {sum(1 for _ in (store.folder / 'blobs').iterdir())}")
        if not config.noprune:
            spares_recent = config.version >= _SPARES_RECENT_BLOBS_FROM
            removed_count = store.prune(datetime.now(UTC).timestamp(), spares_recent)
            log("INFO", f"total unused blobs removed: {removed_count}")

    async def _discover(self) -> None:
        """Discovers the devices; the port is open already, as in real Ollama."""
        log("INFO", "discovering available GPUs...")
        seconds = WORLD.discovery_seconds if self.config.gpus else WORLD.discovery_cpu_seconds
        await asyncio.sleep(seconds / self.config.speed)
        log_devices(self.config, self._memory.host_free_bytes(()), self._memory.host_total_bytes())
        total = sum(gpu.memory_total_bytes for gpu in self.config.gpus)
        context = self._service.loader.default_context()
        log("INFO", "vram-based default context", total_vram=total, default_num_ctx=context)
        await self._scheduler.run()

    # --- faults ---

    def _server_fault(self) -> str | None:
        return server_fault(self._faults, self._instance, (gpu.uuid for gpu in self.config.gpus))

    def _read_faults(self) -> None:
        """Rereads the faults, so that the next load obeys them; an invalid file keeps the previous ones."""
        text = _faults_file_content(self.config.emulator_dir)
        if text == self._faults_text:
            return
        self._faults_text = text
        try:
            self._faults = read_faults(self.config.emulator_dir)
        except ValueError as error:
            log("ERROR", "invalid faults file", error=error)

    async def _watch_faults(self) -> None:
        applied: tuple[Fault, ...] = ()
        while True:
            self._read_faults()
            if self._faults != applied:
                applied = self._faults
                self._apply_faults()
            await asyncio.sleep(_FAULTS_POLL_SECONDS)

    def _apply_faults(self) -> None:
        fault = self._server_fault()
        (self._is_responding.clear if fault == "hang" else self._is_responding.set)()
        if fault == "die":
            log("ERROR", "emulated fault: this server dies")
            self._exit_code = 1
            self._shutdown.set()
        for loaded in self._scheduler.loaded.values():
            faults = self._behaviour(loaded.stored.name.shortest)
            loaded.process.behave(faults.slow, faults.hang, faults.die)


def _faults_file_content(directory: Path | None) -> bytes:
    """Content of the faults file. Its mtime is not enough: two quick writes may have the same."""
    try:
        return b"" if directory is None else (directory / FILE).read_bytes()
    except OSError:
        return b""


def main(arguments: list[str], environment: Mapping[str, str]) -> int:
    """Entry point of the process. Does not return after serving: open connections are cut, as in real Ollama."""
    if arguments[:1] in (["--version"], ["-v"]):
        config = read_config(environment)
        sys.stdout.write(f"ollama version is {config.version_text} (emulated)\n")
        return 0
    if arguments != ["serve"]:
        sys.stderr.write("usage: python -m router.lab.emulator.server serve\nThis is an emulated Ollama server.\n")
        return 2
    try:
        config = read_config(environment)
    except ValueError as error:
        sys.stderr.write(f"Error: {error}\n")
        return 1
    with asyncio.Runner() as runner:
        code = runner.run(Server(config, environment).run())
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], dict(os.environ)))  # noqa: TID251 (a separate program with its own entry point)
