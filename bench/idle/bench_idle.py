"""Benchmarks what the router costs when nobody asks: `make bench-idle`.

The router runs as its own process over EMULATED servers in processes of theirs, with nothing loaded, with a model
loaded on each, and with models loaded whose facts cannot be read. Each round starts all of them anew, waits until the
router has settled, and takes the CPU time that the router's process uses from then on. It also reports the CPU time of
the start, until the router listens, and the memory at the end. Medians over the rounds.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from bench.scheduling.servers import RunSetup, emulated_server, prepared_emulator
from router.lab.emulator.runner_process import PACKAGE_ROOT
from router.lab.emulator.spec import parse_spec
from router.supervisor.ports import free_ports

MODEL = "llama3.2:3b"
_START_SECONDS = 60.0
_IMPORTS = "import time, router.cli.serve; print(time.process_time())"


@dataclass(frozen=True, slots=True)
class Scenario:
    """What the router has to watch."""

    title: str
    supervised: bool = False
    """The router starts the servers, with EMULATED GPUs that it reads; otherwise it attaches to running ones."""
    loaded: bool = False
    """Each server has a model loaded."""
    deleted: bool = False
    """That model was deleted before the router started: nothing says what it is."""
    damaged: bool = False
    """Each server has a model loaded whose facts it cannot tell (`damaged_servers.py`)."""


SCENARIOS = {
    "empty": Scenario("attached, nothing loaded"),
    "loaded": Scenario("attached, a model loaded on each", loaded=True),
    "deleted": Scenario("attached, loaded models were deleted", loaded=True, deleted=True),
    "damaged": Scenario("attached, files of loaded models damaged", damaged=True),
    "supervised": Scenario("supervised, with GPUs, nothing loaded", supervised=True),
}


@dataclass(frozen=True, slots=True)
class Sample:
    """One round of one scenario."""

    start_cpu_seconds: float
    """Until the router listens, imports included."""
    core_ratio: float
    """CPU seconds a second at rest."""
    wakes_per_second: float
    """Voluntary context switches of the main thread."""
    rss_bytes: int


def cpu_seconds(pid: int) -> float:
    """CPU time of a process since its start, all threads, in nanosecond steps; its children not included."""
    return time.clock_gettime((~pid << 3) | 2)  # the clock that clock_getcpuclockid(3) returns


def imports_cpu_seconds() -> float:
    """CPU time of an interpreter until all that `serve` imports is imported."""
    return float(
        subprocess.run([sys.executable, "-c", _IMPORTS], capture_output=True, check=True, cwd=PACKAGE_ROOT).stdout
    )


def measure(scenario: Scenario, servers: int, settle_seconds: float, seconds: float) -> Sample:
    """Starts servers and router, waits `settle_seconds`, and measures for `seconds`."""
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as running:
        setup = RunSetup(f"{servers}x3090", 1.0, Path(name))
        urls: list[str] = []
        if not scenario.supervised:
            urls = running.enter_context(_damaged_servers(servers) if scenario.damaged else _servers(setup))
        for url in urls if scenario.loaded else ():
            _post(f"{url}/api/generate", {"model": MODEL, "keep_alive": -1, "stream": False})
        if scenario.deleted:
            _post(f"{urls[0]}/api/delete", {"model": MODEL}, "DELETE")
        process, port, start = running.enter_context(_router(setup, urls))
        _wait_until(lambda: _is_ready(port, servers))
        time.sleep(settle_seconds)
        watched = psutil.Process(process.pid)
        cpu, switches, began = cpu_seconds(process.pid), watched.num_ctx_switches().voluntary, time.monotonic()
        time.sleep(seconds)
        elapsed = time.monotonic() - began
        return Sample(
            start,
            (cpu_seconds(process.pid) - cpu) / elapsed,
            (watched.num_ctx_switches().voluntary - switches) / elapsed,
            watched.memory_info().rss,
        )


@contextlib.contextmanager
def _servers(setup: RunSetup) -> Generator[list[str]]:
    """One server for each GPU, with one store."""
    emulator = prepared_emulator(setup, "0.34.0")
    with contextlib.ExitStack() as running:
        yield [
            running.enter_context(emulated_server(setup, emulator, {"CUDA_VISIBLE_DEVICES": uuid}))
            for uuid in parse_spec(setup.rig).uuids
        ]


@contextlib.contextmanager
def _damaged_servers(count: int) -> Generator[list[str]]:
    ports = [str(port) for port in free_ports(count)]
    command = [sys.executable, "-m", "bench.idle.damaged_servers", *ports]
    process = subprocess.Popen(command, cwd=PACKAGE_ROOT)
    try:
        yield [f"http://127.0.0.1:{port}" for port in ports]
    finally:
        process.terminate()
        process.wait()


@contextlib.contextmanager
def _router(setup: RunSetup, urls: Sequence[str]) -> Generator[tuple[subprocess.Popen[bytes], int, float]]:
    """Runs the router; yields its process, its port and the CPU seconds until it listened."""
    (port,) = free_ports(1, avoid=[int(url.rpartition(":")[2]) for url in urls])
    config: dict[str, Any] = {"server": {"port": port}, "state_directory": str(setup.folder / "state")}
    config |= {"instances": [{"url": url} for url in urls]} if urls else {"rig": setup.rig}
    path = setup.folder / "llamayard.yaml"
    path.write_text(json.dumps(config), encoding="utf-8")
    command = [sys.executable, "-m", "router", "serve", "--config", str(path)]
    environment = {"PATH": os.defpath, "HOME": str(setup.folder)}
    with setup.log.open("ab") as log:
        process = subprocess.Popen(
            command, env=environment, stdout=log, stderr=log, cwd=PACKAGE_ROOT, start_new_session=True
        )
    try:
        _wait_until(lambda: process.poll() is not None or _listens(setup.log))
        if process.returncode is not None:
            raise RuntimeError(f"the router ended: {setup.log.read_text('utf-8')[-2000:]}")
        yield process, port, cpu_seconds(process.pid)
    finally:
        process.terminate()
        try:
            process.wait(timeout=30)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def _listens(log: Path) -> bool:
    return b'"listening"' in log.read_bytes()


def _is_ready(port: int, servers: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/llamayard/status", timeout=5) as reply:
            status: dict[str, Any] = json.loads(reply.read())
    except (OSError, ValueError):
        return False
    return sum(instance["state"] == "ready" for instance in status["instances"]) >= servers


def _post(url: str, body: dict[str, Any], method: str = "POST") -> None:
    request = urllib.request.Request(
        url, json.dumps(body).encode(), {"Content-Type": "application/json"}, method=method
    )
    with urllib.request.urlopen(request, timeout=_START_SECONDS) as reply:
        reply.read()


def _wait_until(condition: Callable[[], bool]) -> None:
    limit = time.monotonic() + _START_SECONDS
    while not condition():
        if time.monotonic() > limit:
            raise TimeoutError(f"not ready within {_START_SECONDS:g} s")
        time.sleep(0.02)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--servers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--settle-seconds", type=float, default=10.0)
    parser.add_argument("--only", default=",".join(SCENARIOS), help=f"of {', '.join(SCENARIOS)}")
    args = parser.parse_args()
    names: list[str] = args.only.split(",")
    imports: list[float] = []
    samples: dict[str, list[Sample]] = {name: [] for name in names}
    for _ in range(args.rounds):
        imports.append(imports_cpu_seconds())
        for name in names:
            samples[name].append(measure(SCENARIOS[name], args.servers, args.settle_seconds, args.seconds))
    print(f"{args.servers} servers, {args.rounds} rounds of {args.seconds:g} s; imports of serve: "
          f"{statistics.median(imports):.2f} s of CPU; {sys.version.split()[0]} on {socket.gethostname()}")  # fmt: skip
    print(f"\n{'scenario':<40}{'core':>9}{'wakes/s':>9}{'RSS':>10}{'until it listens':>19}")
    for name in names:
        found = samples[name]
        print(
            f"{SCENARIOS[name].title:<40}{statistics.median(each.core_ratio for each in found):>8.2%} "
            f"{statistics.median(each.wakes_per_second for each in found):>8.1f}"
            f"{statistics.median(each.rss_bytes for each in found) / 1e6:>7.1f} MB"
            f"{statistics.median(each.start_cpu_seconds for each in found):>13.2f} s CPU"
        )


if __name__ == "__main__":
    main()
