"""Real and emulated Ollama servers for tests: separate folders, a free loopback port, full cleanup.

Each server runs in its own session and is stopped by killing its process group, because a killed Ollama leaves its
runners behind. Nothing is downloaded; models are written by `tests.support.tiny_model` and created through the
server's API.
"""

from __future__ import annotations

import contextlib
import http.client
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.support.rawhttp import DEADLINE_SECONDS, Address
from tests.support.tiny_model import ModelSpec, write_model
from tests.support.waiting import eventually_sync

ROOT = Path(__file__).parents[2]
REAL_VERSION = "0.34.0"
OLD_REAL_VERSION = "0.11.4"
_BINARIES = {
    REAL_VERSION: ROOT / ".cache" / f"ollama-{REAL_VERSION}" / "bin" / "ollama",
    OLD_REAL_VERSION: ROOT / ".cache" / f"ollama-{OLD_REAL_VERSION}" / "ollama",
}
_MAKE = {REAL_VERSION: "`make ollama` (needs Go and a C compiler)",
         OLD_REAL_VERSION: "`make old-ollama` (needs Go and a C++ compiler)"}  # fmt: skip
_START_SECONDS = 60.0
_port_candidates = itertools.count(os.getpid() * 64)
"""Port candidates; each process starts at a different number and never reuses one."""


def free_port() -> int:
    """A free loopback port that stays free while its server restarts.

    Outside the ranges used for outgoing connections and for the router's own servers.
    """
    for number in itertools.islice(_port_candidates, 10_000):
        port = 10_000 + number % 10_000
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise OSError("no port is free between 10000 and 19999 on 127.0.0.1")


def real_binary(version: str = REAL_VERSION) -> Path:
    """The executable of real Ollama; without it the test is skipped, or fails if CI=true.

    `LLAMAYARD_TEST_OLLAMA` names another executable to test instead of the current version.
    """
    configured = os.environ.get("LLAMAYARD_TEST_OLLAMA") if version == REAL_VERSION else None
    binary = Path(configured) if configured else _BINARIES[version]
    if not binary.is_file():
        location = configured or binary.relative_to(ROOT)
        message = f"no real Ollama {version} at {location}: run {_MAKE[version]}"
        if os.environ.get("CI", "").lower() == "true":
            pytest.fail(message)
        pytest.skip(message)
    return binary.absolute()


@dataclass(slots=True)
class OllamaServer:
    """One running server."""

    kind: str
    """`real` or `emulated`."""
    version: str
    address: Address
    process: subprocess.Popen[bytes]
    log: Path
    environment: Mapping[str, str] = field(repr=False)

    @property
    def is_0_30(self) -> bool:
        """Whether it runs models in a separate `llama-server`, as Ollama does from 0.30."""
        return tuple(int(part) for part in self.version.split(".")) >= (0, 30)

    @property
    def url(self) -> str:
        return self.address.url

    @property
    def models_dir(self) -> Path:
        return Path(self.environment["OLLAMA_MODELS"])

    def runners(self) -> dict[int, str]:
        """Living runner processes: pid and command line."""
        processes: dict[int, str] = {}
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in psutil.Process(self.process.pid).children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    line = " ".join(child.cmdline())
                    if _is_runner(line) and child.status() != psutil.STATUS_ZOMBIE:
                        processes[child.pid] = line
        return processes

    def call(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        """Blocking request, for fixtures; returns the status and the JSON (or bytes) of the response."""
        return blocking_call(self.address, method, path, body)

    def stop(self) -> None:
        """Kills the whole process group and waits for its leader; safe to call twice."""
        kill_group(self.process)


def _is_runner(command: str) -> bool:
    """Whether this is `ollama runner --model …`, or `llama-server --model …` of 0.30 and later."""
    return " --model " in command


def kill_group(process: subprocess.Popen[bytes]) -> None:
    """Kills the process group that the process leads, and reaps the process."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(timeout=60)


def blocking_call(
    address: Address, method: str, path: str, body: Any = None, timeout_seconds: float = DEADLINE_SECONDS
) -> tuple[int, Any]:
    """Sends one request, with a JSON body unless it is bytes; returns the status and the parsed JSON or the bytes."""
    payload = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    connection = http.client.HTTPConnection(address.host, address.port, timeout=timeout_seconds)
    with contextlib.closing(connection):
        connection.request(method, path, payload)
        reply = connection.getresponse()
        data = reply.read()
        is_json = (reply.getheader("Content-Type") or "").startswith("application/json")
        return reply.status, json.loads(data) if is_json and data else data


def start_server(
    kind: str, version: str, command: Sequence[str], environment: Mapping[str, str], folder: Path
) -> OllamaServer:
    """Starts `command` on a free port and waits until `/api/version` answers."""
    port = free_port()
    inherited = {name: os.environ[name] for name in ("PATH", "LANG", "TMPDIR") if name in os.environ}
    server_environment = {**inherited, "HOME": str(folder), **environment, "OLLAMA_HOST": f"127.0.0.1:{port}"}
    log = Path(tempfile.mkstemp(dir=folder, prefix=f"{kind}-{port}-", suffix=".log")[1])
    with log.open("wb") as log_file:
        process = subprocess.Popen(
            list(command),
            env=server_environment,
            stdin=subprocess.DEVNULL,
            stdout=log_file,
            stderr=log_file,
            start_new_session=True,
            cwd=ROOT,
        )
    server = OllamaServer(kind, version, Address("127.0.0.1", port), process, log, server_environment)
    try:
        eventually_sync(lambda: _is_up(server), _START_SECONDS, f"/api/version of the {kind} server")
    except AssertionError as error:
        server.stop()
        raise AssertionError(f"{error}\nend of its log:\n{log.read_text(errors='replace')[-3000:]}") from error
    return server


def _is_up(server: OllamaServer) -> bool:
    if server.process.poll() is not None:
        raise AssertionError(f"the {server.kind} server ended with {server.process.returncode}")
    try:
        return server.call("GET", "/api/version")[0] == 200
    except OSError:
        return False


@contextlib.contextmanager
def real_server(folder: Path, version: str = REAL_VERSION, **environment: str) -> Generator[OllamaServer]:
    """A real Ollama with its home and store in `folder`; servers with the same folder share the store."""
    binary = real_binary(version)
    base = {"OLLAMA_MODELS": str(folder / "models"), "OLLAMA_NOPRUNE": "1", "OLLAMA_NO_CLOUD": "1"}
    server = start_server("real", _version_of(binary), [str(binary), "serve"], {**base, **environment}, folder)
    try:
        yield server
    finally:
        server.stop()


def _version_of(binary: Path) -> str:
    completed = subprocess.run(
        [str(binary), "--version"],
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
        env={"HOME": "/nonexistent"},
    )
    return (completed.stdout + completed.stderr).strip().rpartition(" ")[2]


def create_from_file(server: OllamaServer, name: str, path: Path, digest: str, **fields: Any) -> None:
    """Uploads weights and creates a model that uses one thread, to save CPU on small machines."""
    status, answer = server.call("POST", f"/api/blobs/{digest}", path.read_bytes())
    assert status in (200, 201), answer
    body = {"model": name, "files": {path.name: digest}, "parameters": {"num_thread": 1}, "stream": False, **fields}
    status, answer = server.call("POST", "/api/create", body)
    assert (status, answer) == (200, {"status": "success"}), (status, answer)


@dataclass(frozen=True, slots=True)
class ModelFile:
    """A written model: its name, path and digest."""

    name: str
    path: Path
    digest: str


def write_model_files(folder: Path, specs: Mapping[str, ModelSpec]) -> dict[str, ModelFile]:
    """Writes each spec to `folder/NAME.gguf`."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = {name: folder / f"{name}.gguf" for name in specs}
    return {name: ModelFile(name, paths[name], write_model(paths[name], spec)) for name, spec in specs.items()}


@contextlib.contextmanager
def emulated_server(folder: Path, **environment: str) -> Generator[OllamaServer]:
    """An emulated server: version 0.34.0 without GPUs, unless overridden by environment variables."""
    base = {"OLLAMA_MODELS": str(folder / "models"), "OLLAMA_NOPRUNE": "1", "OLLAMA_NO_CLOUD": "1"}
    (folder / "rig").mkdir(exist_ok=True)
    emulator = {
        "LLAMAYARD_RIG_DIR": str(folder / "rig"),
        "LLAMAYARD_RIG_VERSION": REAL_VERSION,
        "CUDA_VISIBLE_DEVICES": "-1",
    }
    command = [sys.executable, "-m", "router.lab.emulator.server", "serve"]
    server_environment = {**base, **emulator, **environment}
    server = start_server("emulated", server_environment["LLAMAYARD_RIG_VERSION"], command, server_environment, folder)
    try:
        yield server
    finally:
        server.stop()
