"""The contestants as real processes over EMULATED GPUs: a stock server, one a GPU behind nginx, the router itself.

Each is started in a folder of its own, with the machine's page cache as warm as it gets, and is ended with all that it
started. Whatever was loaded is read from the emulated rig's record afterwards. It plays nothing and judges nothing.
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
PRODUCT = "llamayard"
VERSIONS = {"stock-0.24": "0.24.0", "stock-0.33": "0.33.0"}
NGINX = {"nginx-round-robin": "", "nginx-least-conn": "least_conn;"}
_START_SECONDS = 60.0
_SETTLING_SECONDS = 1.0
"""Real seconds until a server that answers has found its GPUs as well."""


@dataclass(frozen=True, slots=True)
class Place:
    """One run."""

    rig: str
    speed: float
    folder: Path
    warm: tuple[ModelFacts, ...] = ()
    """Models whose files lie in the page cache at the start."""

    @property
    def rig_directory(self) -> Path:
        return self.folder / "state" / "rig"

    @property
    def log(self) -> Path:
        return self.folder / "server.log"

    def loads(self) -> list[dict[str, object]]:
        """What was loaded, or could not be, in order: see `router.lab.emulator.loader`."""
        path = self.rig_directory / LOADS_FILE
        return [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.exists() else []


def run_baseline(policy: str, place: Place) -> contextlib.AbstractContextManager[str]:
    """Runs it as long as the block; its URL."""
    makers: Mapping[str, Callable[[Place], contextlib.AbstractContextManager[str]]] = {
        **{name: lambda where, n=name: stock_server(where, VERSIONS[n]) for name in VERSIONS},
        **{name: lambda where, n=name: behind_nginx(where, NGINX[n]) for name in NGINX},
        PRODUCT: product,
    }
    return makers[policy](place)


@contextlib.contextmanager
def stock_server(place: Place, version: str) -> Generator[str]:
    """One over all GPUs of the rig, tuned as a good admin does."""
    prepared = _prepared(place, version)
    with _server(place, prepared, {}) as url:
        time.sleep(_SETTLING_SECONDS)
        yield url


@contextlib.contextmanager
def behind_nginx(place: Place, method: str) -> Generator[str]:
    """A server of 0.24 a GPU, and a real nginx before them."""
    prepared = _prepared(place, VERSIONS["stock-0.24"])
    with contextlib.ExitStack() as running:
        uuids = parse_spec(place.rig).uuids
        urls = [running.enter_context(_server(place, prepared, {"CUDA_VISIBLE_DEVICES": uuid})) for uuid in uuids]
        port = free_port()
        config = place.folder / "nginx.conf"
        config.write_text(_nginx_conf(place.folder, port, urls, method), encoding="utf-8")
        command = [nginx() or "nginx", "-c", str(config), "-p", str(place.folder)]
        url = running.enter_context(_running(command, {}, place, port))
        time.sleep(_SETTLING_SECONDS)
        yield url


@contextlib.contextmanager
def product(place: Place) -> Generator[str]:
    """The router itself over emulated servers, with the same two lines, in a clock as fast as theirs."""
    _warm(place)
    port = free_port()
    environment = {"LLAMAYARD_RIG_SPEED": repr(place.speed), "PYTHONPATH": str(PACKAGE_ROOT)}
    keys = {
        "rig": place.rig,
        "server.port": str(port),
        "state_directory": str(place.folder / "state"),
        "ollama.flash_attention": "true",
        "ollama.kv_cache_type": "q8_0",
    }
    command = [sys.executable, "-m", "bench.scheduling.fast_clock", f"{place.speed:g}"]
    with _running([*command, *(f"{key}={value}" for key, value in keys.items())], environment, place, port) as url:
        _wait_until(lambda: _is_ready(url))
        yield url


def nginx() -> str | None:
    """The executable, where it is installed."""
    return shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")


def free_port() -> int:
    """Below those that clients' connections take, so that none of them takes it before a server does."""
    return free_ports(1)[0]


# --- parts ---


def _prepared(place: Place, version: str) -> PreparedEmulator:
    _warm(place)
    variables = {"LLAMAYARD_RIG_SPEED": repr(place.speed), "LLAMAYARD_RIG_VERSION": version}
    return prepare_emulator(place.rig, place.rig_directory, variables)


def _warm(place: Place) -> None:
    if place.warm:
        cached = {str(model.blob): model.weights_bytes for model in place.warm}
        write_json(place.rig_directory / "pagecache.json", cached)


@contextlib.contextmanager
def _server(place: Place, prepared: PreparedEmulator, more: Mapping[str, str]) -> Generator[str]:
    port = free_port()
    environment = {
        **TUNED,
        **prepared.environment,
        **more,
        "OLLAMA_MODELS": str(prepared.models_directory),
        "OLLAMA_HOST": f"127.0.0.1:{port}",
        # The emulated server's idle timers run in real time whatever the speed.
        "OLLAMA_KEEP_ALIVE": f"{300 / place.speed}s",
    }
    with _running(prepared.command, environment, place, port) as url:
        yield url


@contextlib.contextmanager
def _running(command: Sequence[str], environment: Mapping[str, str], place: Place, port: int) -> Generator[str]:
    """The program until the block ends; what it says goes to the place's log."""
    full = {"PATH": os.defpath, "HOME": str(place.folder), **environment}
    url = f"http://127.0.0.1:{port}"
    with place.log.open("ab") as log:
        process = subprocess.Popen(command, env=full, stdout=log, stderr=log, cwd=PACKAGE_ROOT, start_new_session=True)
    try:
        _wait_until(lambda: process.poll() is not None or _asked(url + "/api/version") is not None)
        if process.returncode is not None:
            raise RuntimeError(f"{command[0]} ended: {place.log.read_text('utf-8')[-2000:]}")
        yield url
    finally:
        process.terminate()
        try:
            process.wait(timeout=20)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def _asked(url: str) -> Any:
    """The JSON that is there; None where nothing answers."""
    try:
        with urllib.request.urlopen(url, timeout=2) as reply:
            return json.loads(reply.read())
    except (OSError, ValueError):
        return None


def _is_ready(url: str) -> bool:
    """Whether the router has all its instances up."""
    status: dict[str, Any] = _asked(url + "/llamayard/status") or {}
    states: list[str] = [one["state"] for one in status.get("instances", ())]
    return bool(states) and all(state == "ready" for state in states)


def _wait_until(is_so: Callable[[], bool]) -> None:
    limit = time.monotonic() + _START_SECONDS
    while not is_so():
        if time.monotonic() > limit:
            raise TimeoutError(f"a contestant is not ready within {_START_SECONDS:g} s")
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
