"""The proxies that are compared: how each is started before the compiled server, and what it costs while it works."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import psutil

UPSTREAM_PORT = 28500
UPSTREAM_PORTS = 6
"""One server on several ports: a router sees as many instances, each with the most slots that its settings allow."""

_HERE = Path(__file__).parent
_ROOT = _HERE.parent.parent
_START_SECONDS = 90.0


@dataclass(frozen=True, slots=True)
class Place:
    """Where things are, and which cores whoever runs on."""

    folder: Path
    upstream: Path
    load: Path
    proxy_cores: frozenset[int]
    other_cores: frozenset[int]


def build(folder: Path) -> Place:
    """Compiles the server and the client where they are older than their sources."""
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("upstream", "load"):
        source, target = _HERE / f"{name}.c", folder / name
        if not target.exists() or target.stat().st_mtime < source.stat().st_mtime:
            subprocess.run(["cc", "-O2", "-o", str(target), str(source)], check=True)
    cores = sorted(os.sched_getaffinity(0))
    others = frozenset(cores[1:]) or frozenset(cores)
    return Place(folder, folder / "upstream", folder / "load", frozenset(cores[:1]), others)


def _spawn(
    command: list[str], cores: frozenset[int], log: Path, environment: Mapping[str, str] | None = None
) -> subprocess.Popen[bytes]:
    with log.open("wb") as sink:
        return subprocess.Popen(
            command, stdout=sink, stderr=sink, stdin=subprocess.DEVNULL, start_new_session=True, cwd=_ROOT,
            env=None if environment is None else dict(environment),
            preexec_fn=lambda: os.sched_setaffinity(0, cores),  # noqa: PLW1509
        )  # fmt: skip


def start_upstream(place: Place) -> subprocess.Popen[bytes]:
    process = _spawn(
        [str(place.upstream), str(UPSTREAM_PORT), str(UPSTREAM_PORTS)], place.other_cores, place.folder / "upstream.log"
    )
    _await_port(UPSTREAM_PORT)
    return process


def _await_port(port: int) -> None:
    end = time.monotonic() + _START_SECONDS
    while time.monotonic() < end:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise RuntimeError(f"nothing listens on port {port}")


@dataclass(slots=True)
class Baseline:
    """One proxy on its port."""

    place: Place
    name: str
    port: int
    is_slow: bool = False
    """So much slower that only small requests are compared."""
    target: str = "/api/chat"
    process: subprocess.Popen[bytes] | None = None
    children: list[psutil.Process] = field(default_factory=list[psutil.Process])

    def command(self) -> list[str]:
        raise NotImplementedError

    def environment(self) -> Mapping[str, str] | None:
        return None

    def is_ready(self) -> bool:
        return True

    def start(self) -> None:
        self.process = _spawn(
            self.command(), self.place.proxy_cores, self.place.folder / f"{self.name}.log", self.environment()
        )
        _await_port(self.port)
        end = time.monotonic() + _START_SECONDS
        while not self.is_ready():
            if time.monotonic() > end:
                raise RuntimeError(f"{self.name} does not become ready")
            time.sleep(0.1)
        root = psutil.Process(self.process.pid)
        self.children = [root, *root.children(recursive=True)]

    def stop(self) -> None:
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGTERM)
            try:
                self.process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)

    def cpu_seconds(self) -> float:
        times = [process.cpu_times() for process in self.children]
        return sum(t.user + t.system for t in times)

    def rss_bytes(self) -> int:
        return sum(process.memory_info().rss for process in self.children)


class Direct(Baseline):
    """The server itself: what the machine gives without a proxy."""

    def start(self) -> None:
        pass


class Nginx(Baseline):
    def is_ready(self) -> bool:
        """Its worker is there, whose time is what counts."""
        return self.process is not None and bool(psutil.Process(self.process.pid).children())

    def command(self) -> list[str]:
        folder = self.place.folder / "nginx"
        folder.mkdir(exist_ok=True)
        servers = " ".join(f"server 127.0.0.1:{UPSTREAM_PORT + n};" for n in range(UPSTREAM_PORTS))
        config = folder / "nginx.conf"
        config.write_text(
            f"""daemon off; pid {folder}/pid; error_log {folder}/error.log; worker_processes 1;
events {{ worker_connections 16384; }}
http {{
  access_log {folder}/access.log combined buffer=64k flush=1s;
  client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/f;
  uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s;
  client_max_body_size 256m; keepalive_requests 100000000;
  upstream servers {{ {servers} keepalive 8192; keepalive_requests 100000000; }}
  server {{
    listen 127.0.0.1:{self.port} backlog=8192;
    location / {{
      proxy_pass http://servers; proxy_http_version 1.1; proxy_set_header Connection "";
      proxy_buffering off; proxy_request_buffering off; proxy_read_timeout 600s;
    }}
  }}
}}
""",
            "utf-8",
        )
        return [_nginx() or "nginx", "-c", str(config), "-p", str(folder)]


class Haproxy(Baseline):
    def command(self) -> list[str]:
        servers = "\n".join(f"  server s{n} 127.0.0.1:{UPSTREAM_PORT + n}" for n in range(UPSTREAM_PORTS))
        config = self.place.folder / "haproxy.cfg"
        config.write_text(
            f"""global
  nbthread 1
  maxconn 9000
defaults
  mode http
  option http-keep-alive
  http-reuse always
  timeout connect 5s
  timeout client 600s
  timeout server 600s
frontend front
  bind 127.0.0.1:{self.port} backlog 8192
  default_backend servers
backend servers
{servers}
""",
            "utf-8",
        )
        return ["haproxy", "-db", "-f", str(config)]


class Floor(Baseline):
    """Python passing bytes from socket to socket: what no relay in Python can be below."""

    def command(self) -> list[str]:
        return [sys.executable, "-m", "bench.proxy.floor", str(self.port), str(UPSTREAM_PORT)]


class Llamayard(Baseline):
    """As it ships; its log goes to a file."""

    def command(self) -> list[str]:
        instances = "\n".join(
            f'  - {{name: u{n}, url: "http://127.0.0.1:{UPSTREAM_PORT + n}", num_parallel: 1024}}'
            for n in range(UPSTREAM_PORTS)
        )
        config = self.place.folder / "llamayard.yaml"
        config.write_text(
            f"server: {{host: 127.0.0.1, port: {self.port}}}\ndiscover: false\n"
            f"state_directory: {self.place.folder}/state\ninstances:\n{instances}\n",
            "utf-8",
        )
        return [sys.executable, "-m", "router", "serve", "--config", str(config)]

    def is_ready(self) -> bool:
        """All instances are there, and what they have loaded is known."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=5) as reply:
                text = reply.read().decode()
        except OSError:
            return False
        return text.count("llamayard_model_slots_used{") == UPSTREAM_PORTS


class Litellm(Baseline):
    """From PyPI, in an environment of its own: `make bench-litellm` makes it. It asks nobody but the server."""

    def environment(self) -> Mapping[str, str]:
        own = {"LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY": "true", "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
        return {**os.environ, **own}

    def command(self) -> list[str]:
        config = self.place.folder / "litellm.yaml"
        config.write_text(
            "model_list:\n  - model_name: bench\n    litellm_params:\n      model: ollama_chat/bench\n"
            f"      api_base: http://127.0.0.1:{UPSTREAM_PORT}\nlitellm_settings:\n  telemetry: false\n",
            "utf-8",
        )
        binary = _litellm(self.place)
        return [str(binary), "--config", str(config), "--port", str(self.port), "--host", "127.0.0.1"]


def _nginx() -> str | None:
    return shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")


def _litellm(place: Place) -> Path:
    return place.folder.parent / "bench-litellm" / "bin" / "litellm"


def available(name: str, place: Place) -> str | None:
    """Why a contestant cannot take part, None where it can."""
    if name == "nginx" and _nginx() is None:
        return "install it: make nginx"
    if name == "haproxy" and shutil.which("haproxy") is None:
        return "not installed"
    if name == "litellm" and not _litellm(place).exists():
        return "make bench-litellm"
    return None


BASELINES: Mapping[str, Callable[[Place], Baseline]] = {
    "direct": lambda place: Direct(place, "direct", UPSTREAM_PORT),
    "nginx": lambda place: Nginx(place, "nginx", UPSTREAM_PORT + 100),
    "haproxy": lambda place: Haproxy(place, "haproxy", UPSTREAM_PORT + 101),
    "litellm": lambda place: Litellm(place, "litellm", UPSTREAM_PORT + 102, True, "/v1/chat/completions"),
    "floor": lambda place: Floor(place, "floor", UPSTREAM_PORT + 104),
    "llamayard": lambda place: Llamayard(place, "llamayard", UPSTREAM_PORT + 103),
}
