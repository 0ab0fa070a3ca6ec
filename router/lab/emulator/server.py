"""The EMULATED `ollama serve`: an executable that behaves as a real one does, without a GPU and without weights.

`python -m router.lab.emulator.server serve` reads the variables that a real server reads, and three of its own:
`LLAMAYARD_RIG_DIR` (the emulated GPUs; without it there are none), `LLAMAYARD_RIG_VERSION` (0.11.4, 0.24.0 or
0.33.0) and `LLAMAYARD_RIG_SPEED` (so many emulated seconds pass in a real one). Every line of its log says that it is
emulated. Errors and death come on request (`router.lab.emulator.faults`).

Where it is kinder than the truth, beside what its parts say of themselves: its timers for idle models run in real
time whatever the speed; a client that stops reading slows nobody but itself; templates are rendered roughly, pictures
and adapters are ignored; the cloud is never reached.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sys
from collections.abc import Coroutine, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from router.lab.emulator.config import Config, log, log_devices, read_config
from router.lab.emulator.context import Service
from router.lab.emulator.faults import FILE, Behaviour, Fault, behaviour, read_faults, server_fault
from router.lab.emulator.http_server import Request, Response, listen
from router.lab.emulator.loader import Loader, Surroundings
from router.lab.emulator.memory import Memory
from router.lab.emulator.routes import Router
from router.lab.emulator.scheduler import Scheduler
from router.lab.emulator.store import Store
from router.lab.simulator.world import WORLD

INSTANCE_VARIABLE = "LLAMAYARD_INSTANCE"
"""`RUN:NAME`, by which the router marks its children (router/supervisor/process.py, whose imports are too many
here)."""
_FAULTS_POLL_SECONDS = 0.2
_YOUNG_ARE_SPARED_FROM = (0, 21)


class Server:
    """One process's life."""

    def __init__(self, config: Config, environment: Mapping[str, str]) -> None:
        self.config = config
        self._instance = environment.get(INSTANCE_VARIABLE, "").rpartition(":")[2]
        self._faults: tuple[Fault, ...] = ()
        self._faults_text = b""
        self._tasks: set[asyncio.Task[None]] = set()
        self._ended = asyncio.Event()
        self._answers = asyncio.Event()
        self._answers.set()
        self._exit_code = 0
        store, memory = Store(config.models), Memory(config)
        around = Surroundings(config, WORLD, store, memory, environment, self._behaviour)
        loader = Loader(around)
        self._memory = memory
        self._scheduler = Scheduler(config, loader, self._spawn)
        self._service = Service(config, store, loader, self._scheduler, self._behaviour, random.Random())
        self._router = Router(self._service)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._finished)
        return task

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log("ERROR", "the emulation has a fault of its own", error=repr(error))
            self._exit_code = 70
            self._ended.set()

    def _behaviour(self, model: str) -> Behaviour:
        self._read_faults()
        return behaviour(self._faults, self._instance, (gpu.uuid for gpu in self.config.gpus), model)

    async def run(self) -> int:
        """Until a signal, or a fault, ends it; the exit status."""
        self._read_faults()
        if self._server_fault() == "refuse_start":
            sys.stderr.write("Error: emulated fault: this server does not start\n")
            return 1
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._ended.set)
        self._log_start()
        try:
            await listen(self._handle, self.config.host, self.config.port, self._tasks)
        except OSError as error:
            address = f"{self.config.host}:{self.config.port}"
            sys.stderr.write(f"Error: listen tcp {address}: bind: {os.strerror(error.errno or 0).lower()}\n")
            return 1
        address = f"{self.config.host}:{self.config.port}"
        log("INFO", f"Listening on {address} (version {self.config.version_text})")
        self._spawn(self._discover())
        if self.config.rig_dir is not None:
            self._spawn(self._watch_faults())
        await self._ended.wait()
        self._scheduler.drop_all()
        return self._exit_code

    async def _handle(self, request: Request, response: Response) -> None:
        await self._answers.wait()
        await self._router(request, response)

    def _log_start(self) -> None:
        config, store = self.config, self._service.store
        log("INFO", "server config", env=f"map[OLLAMA_HOST:http://{config.host}:{config.port} "
            f"OLLAMA_MODELS:{config.models} OLLAMA_NUM_PARALLEL:{config.num_parallel}]")  # fmt: skip
        log("INFO", f"total blobs: {sum(1 for _ in (store.folder / 'blobs').iterdir())}")
        if not config.noprune:
            spares = config.version >= _YOUNG_ARE_SPARED_FROM
            gone = store.prune(datetime.now(UTC).timestamp(), spares)
            log("INFO", f"total unused blobs removed: {gone}")

    async def _discover(self) -> None:
        """The port is open before the devices are known."""
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
        """Whoever writes them finds them obeyed by the next load; a broken file leaves the old ones."""
        text = _text_of(self.config.rig_dir)
        if text == self._faults_text:
            return
        self._faults_text = text
        try:
            self._faults = read_faults(self.config.rig_dir)
        except ValueError as error:
            log("ERROR", "faults are not understood", error=error)

    async def _watch_faults(self) -> None:
        applied: tuple[Fault, ...] = ()
        while True:
            self._read_faults()
            if self._faults != applied:
                applied = self._faults
                self._apply()
            await asyncio.sleep(_FAULTS_POLL_SECONDS)

    def _apply(self) -> None:
        fault = self._server_fault()
        (self._answers.clear if fault == "hang" else self._answers.set)()
        if fault == "die":
            log("ERROR", "emulated fault: this server dies")
            self._exit_code = 1
            self._ended.set()
        for loaded in self._scheduler.loaded.values():
            faulty = self._behaviour(loaded.stored.name.shortest)
            loaded.process.behave(faulty.slow, faulty.hang, faulty.die)


def _text_of(directory: Path | None) -> bytes:
    """What the file of faults says. Its time would not do: two that are written at once may have the same."""
    try:
        return b"" if directory is None else (directory / FILE).read_bytes()
    except OSError:
        return b""


def main(arguments: list[str], environment: Mapping[str, str]) -> int:
    """Entry of the process. Does not return where a server has run: open connections are cut, as there."""
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
    sys.exit(main(sys.argv[1:], dict(os.environ)))  # noqa: TID251 (a program of its own, with an edge of its own)
