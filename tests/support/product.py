"""The router as users run it: `python -m router serve` as a separate process, with all its child processes.

Every child process inherits an environment variable with a unique value, which identifies leftovers.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import yaml

from tests.support.ollama_server import ROOT, blocking_call, free_port
from tests.support.rawhttp import Address
from tests.support.waiting import eventually_sync

_MARK = "TEST_OF_ROUTER"
_READY_SECONDS = 120.0


@dataclass(slots=True)
class Product:
    """A router that can be started, killed and restarted with the same configuration."""

    config: Path
    address: Address
    environment: Mapping[str, str] = field(repr=False)
    arguments: tuple[str, ...] = ()
    program: tuple[str, ...] = (sys.executable, "-m", "router")
    pass_fds: tuple[int, ...] = ()
    process: subprocess.Popen[bytes] | None = None
    log: Path = Path()

    def start(self, ready: bool = True) -> None:
        """Starts the router and, if `ready`, waits for `/ready`."""
        folder = self.config.parent
        self.log = Path(tempfile.mkstemp(dir=folder, prefix="router-", suffix=".log")[1])
        command = [*self.program, "serve", "--config", str(self.config), *self.arguments]
        with self.log.open("wb") as log_file:
            self.process = subprocess.Popen(
                command, env=dict(self.environment), stdin=subprocess.DEVNULL, stdout=log_file, stderr=log_file,
                cwd=ROOT, start_new_session=True, pass_fds=self.pass_fds,
            )  # fmt: skip
        if ready:
            try:
                eventually_sync(self.is_ready, _READY_SECONDS, "/ready of the router")
            except AssertionError as error:
                raise AssertionError(f"{error}\nend of its log:\n{self.log_text()[-6000:]}") from error

    def is_ready(self) -> bool:
        assert self.process is not None
        if self.process.poll() is not None:
            raise AssertionError(f"the router ended with {self.process.returncode}")
        try:
            return self.call("GET", "/ready")[0] == 200
        except OSError:
            return False

    def call(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        return blocking_call(self.address, method, path, body)

    def log_text(self) -> str:
        return self.log.read_text(errors="replace")

    def signal(self, signal_number: signal.Signals) -> None:
        assert self.process is not None
        self.process.send_signal(signal_number)

    def wait(self, deadline_seconds: float = 120.0) -> int:
        """Waits for the router to exit and returns its exit code."""
        assert self.process is not None
        return self.process.wait(timeout=deadline_seconds)

    def processes(self) -> list[psutil.Process]:
        """All living processes started by this router, including before a restart, but not the router itself."""
        mark, router_pid = self.environment[_MARK], self.process.pid if self.process else 0
        return [process for process in psutil.process_iter() if process.pid != router_pid and _is_marked(process, mark)]

    def servers(self) -> dict[int, psutil.Process]:
        """Its `ollama serve` processes by port."""
        servers: dict[int, psutil.Process] = {}
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                if "serve" in process.cmdline():
                    servers[int(process.environ()["OLLAMA_HOST"].rpartition(":")[2])] = process
        return servers

    def runners(self) -> list[psutil.Process]:
        """Runner processes of its servers."""
        return [process for process in self.processes() if "--model" in _command(process)]

    def resident(self) -> dict[int, list[str]]:
        """Loaded models by server port, as each server reports them."""
        models: dict[int, list[str]] = {}
        for port in self.servers():
            with contextlib.suppress(OSError):
                status, answer = blocking_call(Address("127.0.0.1", port), "GET", "/api/ps")
                models[port] = sorted(model["name"] for model in answer["models"]) if status == 200 else []
        return models

    def destroy(self) -> None:
        """Kills the router and all remaining processes."""
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait(timeout=60)
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                process.kill()


def _is_marked(process: psutil.Process, mark: str) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE and process.environ().get(_MARK) == mark
    except (psutil.Error, OSError):
        return False


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def prepare(
    folder: Path,
    config: Mapping[str, Any],
    environment: Mapping[str, str] | None = None,
    arguments: Sequence[str] = (),
    port: int | None = None,
) -> Product:
    """Writes the configuration and returns a router that is not started yet."""
    port = port or free_port()
    config_tree = {**config, "server": {"host": "127.0.0.1", "port": port, **config.get("server", {})}}
    config_tree.setdefault("state_directory", str(folder / "state"))
    config_tree.setdefault("management", {"pull": ["*"], "push": True, "disk_free_min_bytes": 0})
    path = folder / "llamayard.yaml"
    path.write_text(yaml.safe_dump(config_tree), encoding="utf-8")
    inherited = {name: os.environ[name] for name in ("PATH", "LANG", "TMPDIR") if name in os.environ}
    router_environment = {**inherited, "HOME": str(folder), _MARK: uuid.uuid4().hex, **(environment or {})}
    return Product(path, Address("127.0.0.1", port), router_environment, tuple(arguments))


@contextlib.contextmanager
def running(product: Product) -> Generator[Product]:
    """Runs the router for the length of the block and cleans up afterwards."""
    try:
        product.start()
        yield product
    finally:
        product.destroy()
