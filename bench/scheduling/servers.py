"""Starts the benchmarked systems as real processes over EMULATED GPUs: stock server, nginx over servers, the router.

Each runs in its own folder with a warm page cache and is stopped with all its child processes. The loads are read from
the emulator's record afterwards.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from router.domain.model import ModelFacts
from router.lab.emulator.loader import LOADS_FILE
from router.lab.emulator.prepare import PreparedEmulator, prepare_emulator
from router.lab.emulator.runner_process import PACKAGE_ROOT
from router.lab.emulator.spec import parse_spec
from router.lab.emulator.vram import write_json
from router.supervisor.ports import free_ports

TUNED = {
    "OLLAMA_FLASH_ATTENTION": "1",
    "OLLAMA_KV_CACHE_TYPE": "q8_0",
    "OLLAMA_NUM_PARALLEL": "2",
    "OLLAMA_CONTEXT_LENGTH": "8192",
    "OLLAMA_NOPRUNE": "1",
    "OLLAMA_NO_CLOUD": "1",
}
ROUTER = "llamayard"
STOCK_VERSIONS = {"stock-0.24": "0.24.0", "stock-0.33": "0.33.0"}
NGINX = {"nginx-round-robin": "", "nginx-least-conn": "least_conn;"}
_START_SECONDS = 60.0
_SETTLING_SECONDS = 1.0
"""Real seconds after a server's first answer until it has discovered its GPUs."""


@dataclass(frozen=True, slots=True)
class RunSetup:
    """Settings and folder of one run."""

    rig: str
    speed: float
    folder: Path
    warm: tuple[ModelFacts, ...] = ()
    """Models whose files are in the page cache at the start."""

    @property
    def rig_directory(self) -> Path:
        return self.folder / "state" / "rig"

    @property
    def log(self) -> Path:
        return self.folder / "server.log"

    def loads(self) -> list[dict[str, object]]:
        """Successful and failed loads in order; see `router.lab.emulator.loader`."""
        path = self.rig_directory / LOADS_FILE
        return [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.exists() else []


def run_baseline(policy: str, setup: RunSetup) -> contextlib.AbstractContextManager[str]:
    """Context manager: runs the policy's servers and yields the URL."""
    makers: Mapping[str, Callable[[RunSetup], contextlib.AbstractContextManager[str]]] = {
        **{name: lambda target, n=name: stock_server(target, STOCK_VERSIONS[n]) for name in STOCK_VERSIONS},
        **{name: lambda target, n=name: behind_nginx(target, NGINX[n]) for name in NGINX},
        ROUTER: llamayard_router,
    }
    return makers[policy](setup)


@contextlib.contextmanager
def stock_server(setup: RunSetup, version: str) -> Generator[str]:
    """One well-tuned stock server over all GPUs."""
    prepared = prepared_emulator(setup, version)
    with emulated_server(setup, prepared, {}) as url:
        time.sleep(_SETTLING_SECONDS)
        yield url


@contextlib.contextmanager
def behind_nginx(setup: RunSetup, method: str) -> Generator[str]:
    """One 0.24 server per GPU behind a real nginx."""
    prepared = prepared_emulator(setup, STOCK_VERSIONS["stock-0.24"])
    with contextlib.ExitStack() as running:
        uuids = parse_spec(setup.rig).uuids
        urls = [
            running.enter_context(emulated_server(setup, prepared, {"CUDA_VISIBLE_DEVICES": uuid})) for uuid in uuids
        ]
        port = free_port()
        config = setup.folder / "nginx.conf"
        config.write_text(_nginx_conf(setup.folder, port, urls, method), encoding="utf-8")
        command = [nginx() or "nginx", "-c", str(config), "-p", str(setup.folder)]
        url = running.enter_context(_running(command, {}, setup, port))
        time.sleep(_SETTLING_SECONDS)
        yield url


@contextlib.contextmanager
def llamayard_router(setup: RunSetup) -> Generator[str]:
    """The router over emulated servers, with the same tuning and a clock scaled like theirs."""
    _warm(setup)
    port = free_port()
    environment = {"LLAMAYARD_RIG_SPEED": repr(setup.speed), "PYTHONPATH": str(PACKAGE_ROOT)}
    keys = {
        "rig": setup.rig,
        "server.port": str(port),
        "state_directory": str(setup.folder / "state"),
        "ollama.flash_attention": "true",
        "ollama.kv_cache_type": "q8_0",
    }
    command = [sys.executable, "-m", "bench.scheduling.fast_clock", f"{setup.speed:g}"]
    with _running([*command, *(f"{key}={value}" for key, value in keys.items())], environment, setup, port) as url:
        _wait_until(lambda: _is_ready(url))
        yield url


def nginx() -> str | None:
    """Path of the nginx executable; None if it is not installed."""
    return shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")


def free_port() -> int:
    """A free port below the ephemeral range, so that no client connection takes it first."""
    return free_ports(1)[0]


# --- helpers ---


def prepared_emulator(setup: RunSetup, version: str) -> PreparedEmulator:
    _warm(setup)
    variables = {"LLAMAYARD_RIG_SPEED": repr(setup.speed), "LLAMAYARD_RIG_VERSION": version}
    return prepare_emulator(setup.rig, setup.rig_directory, variables)


def _warm(setup: RunSetup) -> None:
    if setup.warm:
        cached = {str(model.blob): model.weights_bytes for model in setup.warm}
        write_json(setup.rig_directory / "pagecache.json", cached)


@contextlib.contextmanager
def emulated_server(
    setup: RunSetup, prepared: PreparedEmulator, extra_environment: Mapping[str, str]
) -> Generator[str]:
    port = free_port()
    environment = {
        **TUNED,
        **prepared.environment,
        **extra_environment,
        "OLLAMA_MODELS": str(prepared.models_directory),
        "OLLAMA_HOST": f"127.0.0.1:{port}",
        # The emulated server's idle timers run in real time at any speed.
        "OLLAMA_KEEP_ALIVE": f"{300 / setup.speed}s",
    }
    with _running(prepared.command, environment, setup, port) as url:
        yield url


@contextlib.contextmanager
def _running(command: Sequence[str], environment: Mapping[str, str], setup: RunSetup, port: int) -> Generator[str]:
    """Runs a program during the block; its output goes to the run's log."""
    full = {"PATH": os.defpath, "HOME": str(setup.folder), **environment}
    url = f"http://127.0.0.1:{port}"
    with setup.log.open("ab") as log:
        process = subprocess.Popen(command, env=full, stdout=log, stderr=log, cwd=PACKAGE_ROOT, start_new_session=True)
    try:
        _wait_until(lambda: process.poll() is not None or _get_json(url + "/api/version") is not None)
        if process.returncode is not None:
            raise RuntimeError(f"{command[0]} ended: {setup.log.read_text('utf-8')[-2000:]}")
        yield url
    finally:
        process.terminate()
        try:
            process.wait(timeout=20)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def _get_json(url: str) -> Any:
    """The JSON at `url`; None if nothing answers."""
    try:
        with urllib.request.urlopen(url, timeout=2) as reply:
            return json.loads(reply.read())
    except (OSError, ValueError):
        return None


def _is_ready(url: str) -> bool:
    """Whether all instances of the router are ready."""
    status: dict[str, Any] = _get_json(url + "/llamayard/status") or {}
    states: list[str] = [one["state"] for one in status.get("instances", ())]
    return bool(states) and all(state == "ready" for state in states)


def _wait_until(condition: Callable[[], bool]) -> None:
    limit = time.monotonic() + _START_SECONDS
    while not condition():
        if time.monotonic() > limit:
            raise TimeoutError(f"not ready within {_START_SECONDS:g} s")
        time.sleep(0.05)


def _nginx_conf(folder: Path, port: int, urls: Iterable[str], method: str) -> str:
    servers = " ".join(f"server {url.removeprefix('http://')};" for url in urls)
    return f"""daemon off; pid {folder}/nginx.pid; error_log {folder}/nginx.log; worker_processes 1;
events {{ worker_connections 4096; }}
http {{
  access_log off;
  client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/fastcgi;
  uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
  client_max_body_size 256m; client_body_buffer_size 8m;
  upstream servers {{ {method} {servers} }}
  server {{
    listen 127.0.0.1:{port};
    location / {{
      proxy_pass http://servers; proxy_http_version 1.1; proxy_set_header Connection "";
      proxy_set_header Host localhost:11434;
      proxy_buffering off; proxy_read_timeout 3600s; proxy_send_timeout 3600s;
    }}
  }}
}}
"""
