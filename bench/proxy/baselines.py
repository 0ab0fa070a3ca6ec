"""The compared proxies: how each is started in front of the compiled server, and its CPU and memory use."""

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
"""One server on several ports, so that a router sees several instances, each with the maximal number of slots."""

_HERE = Path(__file__).parent
_ROOT = _HERE.parent.parent
_START_SECONDS = 90.0


@dataclass(frozen=True, slots=True)
class Workspace:
    """Paths of the binaries and the CPU cores of each side."""

    folder: Path
    upstream: Path
    load: Path
    proxy_cores: frozenset[int]
    other_cores: frozenset[int]


def build(folder: Path) -> Workspace:
    """Compiles the server and the load generator if they are older than their sources."""
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("upstream", "load"):
        source, target = _HERE / f"{name}.c", folder / name
        if not target.exists() or target.stat().st_mtime < source.stat().st_mtime:
            subprocess.run(["cc", "-O2", "-o", str(target), str(source)], check=True)
    cores = sorted(os.sched_getaffinity(0))
    others = frozenset(cores[1:]) or frozenset(cores)
    return Workspace(folder, folder / "upstream", folder / "load", frozenset(cores[:1]), others)


def _spawn(
    command: list[str], cores: frozenset[int], log: Path, environment: Mapping[str, str] | None = None
) -> subprocess.Popen[bytes]:
    with log.open("wb") as sink:
        return subprocess.Popen(
            command, stdout=sink, stderr=sink, stdin=subprocess.DEVNULL, start_new_session=True, cwd=_ROOT,
            env=None if environment is None else dict(environment),
            preexec_fn=lambda: os.sched_setaffinity(0, cores),  # noqa: PLW1509
        )  # fmt: skip


def start_upstream(workspace: Workspace) -> subprocess.Popen[bytes]:
    process = _spawn(
        [str(workspace.upstream), str(UPSTREAM_PORT), str(UPSTREAM_PORTS)],
        workspace.other_cores,
        workspace.folder / "upstream.log",
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

    workspace: Workspace
    name: str
    port: int
    is_slow: bool = False
    """Too slow for all phases but the small requests."""
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
            self.command(), self.workspace.proxy_cores, self.workspace.folder / f"{self.name}.log", self.environment()
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
    """The server itself, without a proxy."""

    def start(self) -> None:
        pass


class Nginx(Baseline):
    def is_ready(self) -> bool:
        """Whether its worker process, whose CPU time is measured, is running."""
        return self.process is not None and bool(psutil.Process(self.process.pid).children())

    def command(self) -> list[str]:
        folder = self.workspace.folder / "nginx"
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
        config = self.workspace.folder / "haproxy.cfg"
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
    """Copies bytes between sockets in Python: the minimum cost of any Python proxy."""

    def command(self) -> list[str]:
        return [sys.executable, "-m", "bench.proxy.floor", str(self.port), str(UPSTREAM_PORT)]


class Llamayard(Baseline):
    """llamayard with its default settings; its log goes to a file."""

    def command(self) -> list[str]:
        instances = "\n".join(
            f'  - {{name: u{n}, url: "http://127.0.0.1:{UPSTREAM_PORT + n}", num_parallel: 1024}}'
            for n in range(UPSTREAM_PORTS)
        )
        config = self.workspace.folder / "llamayard.yaml"
        config.write_text(
            f"server: {{host: 127.0.0.1, port: {self.port}}}\ndiscover: false\nollama: {{context_length: 32768}}\n"
            f"state_directory: {self.workspace.folder}/state\ninstances:\n{instances}\n",
            "utf-8",
        )
        return [sys.executable, "-m", "router", "serve", "--config", str(config)]

    def is_ready(self) -> bool:
        """Whether all instances are ready and their loaded models are known."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=5) as reply:
                text = reply.read().decode()
        except OSError:
            return False
        return text.count("llamayard_model_slots_used{") == UPSTREAM_PORTS


class Litellm(Baseline):
    """LiteLLM from PyPI in its own environment (`make bench-litellm`), without external requests."""

    def environment(self) -> Mapping[str, str]:
        variables = {
            "LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY": "true",
            "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        }
        return {**os.environ, **variables}

    def command(self) -> list[str]:
        config = self.workspace.folder / "litellm.yaml"
        config.write_text(
            "model_list:\n  - model_name: bench\n    litellm_params:\n      model: ollama_chat/bench\n"
            f"      api_base: http://127.0.0.1:{UPSTREAM_PORT}\nlitellm_settings:\n  telemetry: false\n",
            "utf-8",
        )
        binary = _litellm(self.workspace)
        return [str(binary), "--config", str(config), "--port", str(self.port), "--host", "127.0.0.1"]


def _nginx() -> str | None:
    return shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")


def _litellm(workspace: Workspace) -> Path:
    return workspace.folder.parent / "bench-litellm" / "bin" / "litellm"


def unavailable_reason(name: str, workspace: Workspace) -> str | None:
    """The reason why a baseline cannot run here; None if it can."""
    if name == "nginx" and _nginx() is None:
        return "not installed: make nginx"
    if name == "haproxy" and shutil.which("haproxy") is None:
        return "not installed"
    if name == "litellm" and not _litellm(workspace).exists():
        return "not installed: make bench-litellm"
    return None


BASELINES: Mapping[str, Callable[[Workspace], Baseline]] = {
    "direct": lambda workspace: Direct(workspace, "direct", UPSTREAM_PORT),
    "nginx": lambda workspace: Nginx(workspace, "nginx", UPSTREAM_PORT + 100),
    "haproxy": lambda workspace: Haproxy(workspace, "haproxy", UPSTREAM_PORT + 101),
    "litellm": lambda workspace: Litellm(workspace, "litellm", UPSTREAM_PORT + 102, True, "/v1/chat/completions"),
    "floor": lambda workspace: Floor(workspace, "floor", UPSTREAM_PORT + 104),
    "llamayard": lambda workspace: Llamayard(workspace, "llamayard", UPSTREAM_PORT + 103),
}
