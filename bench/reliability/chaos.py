"""Chaos over real processes: a router on four EMULATED GPUs, many streams, and a seeded script of faults.

`python -m bench.reliability.chaos --streams 200 --seconds 60 --seed 1` starts the router and lets clients stream all
the time, while servers and runners are killed, GPUs are lost, fail or get hot, other programs take VRAM, loads run out
of memory, and an operator drains, resumes, restarts and reloads. Each request ends as one of OUTCOMES. At the end the
faults are undone, and everything has to be as at the start. Exit status 1 if a stream was cut silently, a request was
lost, or anything is left over.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import yaml

from router.lab.emulator.faults import write_faults
from router.lab.emulator.vram import set_external, set_lost
from router.llm_api.stream_end import StreamEnd, end_of_stream

ANSWERED, ERROR, LEFT, CUT, LOST = "answered", "clear error", "client left", "silently cut", "lost"
OUTCOMES = (ANSWERED, ERROR, LEFT, CUT, LOST)
RIG, SPEED = "4x3090", 20.0
MODELS = ("llama3.1:8b", "qwen3:8b", "gemma3:4b", "llama3.3:70b")
WEIGHTS = (6, 4, 4, 1)
PATHS = ("/api/generate", "/api/chat", "/v1/chat/completions")
_MARK = "CHAOS_RUN"
_REQUEST_SECONDS_MAX = 120.0
_SETTLE_SECONDS = 90.0
_FAULT_SECONDS = (0.5, 4.0)
"""How long a fault lasts, and how long until the next one, at least and at most."""


@dataclass(slots=True)
class Tally:
    outcomes: Counter[str] = field(default_factory=Counter[str])
    errors: Counter[str] = field(default_factory=Counter[str])
    faults: Counter[str] = field(default_factory=Counter[str])
    reroutes: list[float] = field(default_factory=list[float])
    """Seconds from a fault that took a server or GPU away until a request sent then got its first byte."""
    examples: list[str] = field(default_factory=list[str])
    """Of what must not happen."""


@dataclass(slots=True)
class Box:
    """The router and what runs under it."""

    folder: Path
    port: int
    process: subprocess.Popen[bytes]
    mark: str
    session: aiohttp.ClientSession

    @property
    def rig(self) -> Path:
        return self.folder / "state" / "rig"

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def get(self, path: str) -> Any:
        async with self.session.get(self.url + path) as reply:
            return await reply.json()

    async def post(self, path: str, body: object) -> None:
        async with self.session.post(self.url + path, json=body) as reply:
            await reply.read()

    def children(self) -> list[psutil.Process]:
        """Living processes that this run has started, without the router."""
        found: list[psutil.Process] = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                is_ours = process.pid != self.process.pid and process.environ().get(_MARK) == self.mark
                if is_ours and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def processes_with(self, word: str) -> list[psutil.Process]:
        found: list[psutil.Process] = []
        for process in self.children():
            with contextlib.suppress(psutil.Error):
                if word in process.cmdline():
                    found.append(process)
        return found


@dataclass(frozen=True, slots=True)
class Scene:
    """What a fault may use."""

    box: Box
    rng: random.Random
    gpu: str
    tally: Tally


Fault = Callable[[Scene], Coroutine[Any, Any, None]]


# --- clients -------------------------------------------------------------------------------------------------------


async def client(box: Box, number: int, seed: int, tally: Tally, done: asyncio.Event) -> None:
    rng = random.Random(f"client {seed} {number}")
    while not done.is_set():
        await one_request(box, rng, tally)
        await asyncio.sleep(rng.uniform(0.0, 0.3))


async def one_request(box: Box, rng: random.Random, tally: Tally) -> None:
    path, model = rng.choice(PATHS), rng.choices(MODELS, WEIGHTS)[0]
    leaves_after = rng.uniform(0.05, 2.0) if rng.random() < 0.1 else None
    try:
        async with asyncio.timeout(_REQUEST_SECONDS_MAX if leaves_after is None else leaves_after):
            outcome, detail = await ask(box, path, body_for(path, model, rng.randint(4, 200)))
    except TimeoutError:
        outcome, detail = (LOST, f"no end within {_REQUEST_SECONDS_MAX:.0f} s") if leaves_after is None else (LEFT, "")
    tally.outcomes[outcome] += 1
    if outcome == ERROR:
        tally.errors[detail] += 1
    elif outcome in (CUT, LOST):
        tally.examples.append(f"{outcome}: {path} {model}: {detail}")


def body_for(path: str, model: str, tokens: int) -> dict[str, Any]:
    if path == "/api/generate":
        return {"model": model, "prompt": "hello", "options": {"num_predict": tokens}}
    message = [{"role": "user", "content": "hello"}]
    if path == "/api/chat":
        return {"model": model, "messages": message, "options": {"num_predict": tokens}}
    return {"model": model, "messages": message, "max_tokens": tokens, "stream": True}


async def ask(box: Box, path: str, body: object, first_byte: Callable[[], None] = lambda: None) -> tuple[str, str]:
    """One of OUTCOMES, and what the error was."""
    answer = b""
    try:
        async with box.session.post(box.url + path, json=body) as reply:
            async for piece in reply.content.iter_any():
                if not answer:
                    first_byte()
                answer += piece
    except aiohttp.ClientError as error:
        # A connection that is cut within a chunk is visible to every client; before any byte it has no reason.
        return (ERROR, f"connection cut visibly ({type(error).__name__})") if answer else (LOST, repr(error))
    if reply.status != 200:
        code = reply.headers.get("X-Llamayard-Error", "")
        return (
            (ERROR, f"{reply.status} {code or 'of the server'}") if answer else (LOST, f"{reply.status} without a body")
        )
    match end_of_stream(path, answer[-4096:]):
        case StreamEnd.COMPLETE:
            return ANSWERED, ""
        case StreamEnd.ERROR:
            return ERROR, "in the stream"
        case _:
            return CUT, repr(answer[-200:])


# --- faults --------------------------------------------------------------------------------------------------------


async def faults(box: Box, seed: int, tally: Tally, done: asyncio.Event) -> None:
    """One fault after the other, in an order that the seed decides; each is undone before the next."""
    rng = random.Random(f"faults {seed}")
    gpus = [gpu["uuid"] for gpu in (await box.get("/llamayard/status"))["gpus"]]
    kinds = [kind for kind in FAULTS for _ in range(2)]
    while not done.is_set():
        rng.shuffle(kinds)
        for kind in kinds:
            if done.is_set():
                break
            tally.faults[kind] += 1
            await FAULTS[kind](Scene(box, rng, rng.choice(gpus), tally))
            await asyncio.sleep(rng.uniform(0.1, 1.0))
    await undo(box, gpus)


async def undo(box: Box, gpus: list[str]) -> None:
    write_faults(box.rig, [])
    for gpu in gpus:
        set_lost(box.rig, gpu, lost=False)
        set_external(box.rig, gpu, 0)
    await box.post("/llamayard/resume", {"all": True})


async def measured(scene: Scene) -> None:
    """How long a request that is sent now waits for its first byte."""
    began = time.monotonic()
    body = body_for("/api/generate", scene.rng.choice(MODELS[:3]), 4)
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_REQUEST_SECONDS_MAX):
            await ask(scene.box, "/api/generate", body, lambda: scene.tally.reroutes.append(time.monotonic() - began))


async def kill_server(scene: Scene) -> None:
    _kill_one(scene.box.processes_with("serve"), scene.rng)
    await measured(scene)


async def kill_runner(scene: Scene) -> None:
    _kill_one(scene.box.processes_with("--model"), scene.rng)
    await measured(scene)


def _kill_one(processes: list[psutil.Process], rng: random.Random) -> None:
    if processes:
        with contextlib.suppress(psutil.Error):
            rng.choice(sorted(processes, key=lambda process: process.pid)).kill()


async def lose_gpu(scene: Scene) -> None:
    set_lost(scene.box.rig, scene.gpu)
    await measured(scene)
    await asyncio.sleep(scene.rng.uniform(*_FAULT_SECONDS))
    set_lost(scene.box.rig, scene.gpu, lost=False)


async def take_vram(scene: Scene) -> None:
    set_external(scene.box.rig, scene.gpu, int(scene.rng.uniform(2e9, 20e9)))
    await asyncio.sleep(scene.rng.uniform(*_FAULT_SECONDS))
    set_external(scene.box.rig, scene.gpu, 0)


def by_rule(**rule: object) -> Fault:
    async def fault(scene: Scene) -> None:
        write_faults(scene.box.rig, [{"gpu": scene.gpu, **rule}])
        await asyncio.sleep(scene.rng.uniform(*_FAULT_SECONDS))
        write_faults(scene.box.rig, [])

    return fault


async def report_xid(scene: Scene) -> None:
    write_faults(scene.box.rig, [{"gpu": scene.gpu, "xid": scene.rng.choice((48, 95, 119))}])
    await asyncio.sleep(0.5)
    await measured(scene)
    write_faults(scene.box.rig, [])
    await scene.box.post("/llamayard/resume", {"gpu": scene.gpu})


async def drain_gpu(scene: Scene) -> None:
    await scene.box.post("/llamayard/drain", {"gpu": scene.gpu})
    await measured(scene)
    await asyncio.sleep(scene.rng.uniform(*_FAULT_SECONDS))
    await scene.box.post("/llamayard/resume", {"gpu": scene.gpu})


async def restart_all(scene: Scene) -> None:
    await scene.box.post("/llamayard/restart", {"timeout_seconds": 20})
    await measured(scene)


async def reload(scene: Scene) -> None:
    await scene.box.post("/llamayard/reload", {})


FAULTS: dict[str, Fault] = {
    "server killed": kill_server,
    "runner killed": kill_runner,
    "GPU lost": lose_gpu,
    "XID of the GPU": report_xid,
    "GPU hot": by_rule(temperature_celsius=88),
    "power brake": by_rule(throttle="hw_power_brake_slowdown"),
    "VRAM taken": take_vram,
    "loads out of memory": by_rule(oom=True),
    "runners die in answers": by_rule(die=True),
    "unloads refused": by_rule(unload="refuse"),
    "GPU slow": by_rule(slow=5),
    "GPU drained": drain_gpu,
    "rolling restart": restart_all,
    "reload": reload,
}


# --- the run -------------------------------------------------------------------------------------------------------


async def run(streams: int, seconds: float, seed: int, folder: Path) -> tuple[Tally, list[str]]:
    """What happened, and what is left over that was not there at the start."""
    tally, done = Tally(), asyncio.Event()
    timeout = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as session:
        box = start(folder, session)
        try:
            await until(box, is_ready, "ready")
            tasks = [asyncio.create_task(client(box, number, seed, tally, done)) for number in range(streams)]
            tasks.append(asyncio.create_task(faults(box, seed, tally, done)))
            await asyncio.sleep(seconds)
            done.set()
            await asyncio.gather(*tasks)
            left = await leftovers(box)
        finally:
            box.process.send_signal(signal.SIGTERM)
            try:
                code = box.process.wait(timeout=120)
            except subprocess.TimeoutExpired:
                box.process.kill()
                code = box.process.wait()
            orphans = box.children()
            for orphan in orphans:
                with contextlib.suppress(psutil.Error):
                    orphan.kill()
    left += [f"exit status {code}"] if code else []
    left += [f"orphan {orphan.pid}" for orphan in orphans]
    return tally, left


def start(folder: Path, session: aiohttp.ClientSession) -> Box:
    port, mark = free_port(), uuid.uuid4().hex
    poll = {"gpu_seconds": 0.2, "residency_seconds": 0.5, "catalog_seconds": 5.0}
    config = {"server": {"port": port}, "state_directory": str(folder / "state"), "poll": poll}
    (folder / "llamayard.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    environment = {**os.environ, "HOME": str(folder), _MARK: mark, "LLAMAYARD_RIG_SPEED": str(SPEED)}
    command = [sys.executable, "-m", "router", "serve", "--config", str(folder / "llamayard.yaml"), "--rig", RIG]
    with (folder / "router.log").open("wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    return Box(folder, port, process, mark, session)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


async def until(box: Box, is_so: Callable[[Box], Any], what: str) -> None:
    deadline = time.monotonic() + _SETTLE_SECONDS
    while time.monotonic() < deadline:
        with contextlib.suppress(aiohttp.ClientError, OSError):
            if await is_so(box):
                return
        await asyncio.sleep(0.1)
    raise SystemExit(f"the router is not {what} after {_SETTLE_SECONDS:.0f} s; see {box.folder / 'router.log'}")


async def is_ready(box: Box) -> bool:
    async with box.session.get(box.url + "/ready") as reply:
        return reply.status == 200


async def leftovers(box: Box) -> list[str]:
    """Slots, VRAM, connections and GPUs that are not as at the start."""
    left: list[str] = ["not looked at"]
    deadline = time.monotonic() + _SETTLE_SECONDS
    while left and time.monotonic() < deadline:
        await asyncio.sleep(0.5)
        status = await box.get("/llamayard/status")
        left = [f"{model['in_flight']} slots of {model['name']}" for model in status["models"] if model["in_flight"]]
        left += [f"{len(status['reservations'])} reservations"] if status["reservations"] else []
        left += [f"{status['queue']['waiting']} waiting"] if status["queue"]["waiting"] else []
        left += [f"{row['name']} is {row['state']}" for row in status["instances"] if row["state"] != "ready"]
        for gpu in status["gpus"]:
            ours = sum(process["used_bytes"] or 0 for process in gpu["processes"] or ())
            left += (
                [f"GPU {gpu['index']}: {gpu['memory_used_bytes'] - ours} bytes"]
                if gpu["memory_used_bytes"] != ours
                else []
            )
            left += [f"GPU {gpu['index']} is out"] if gpu["lost"] or gpu["drained"] else []
        async with box.session.get(box.url + "/metrics") as reply:
            metrics = (await reply.text()).splitlines()
        running = next(float(line.split()[-1]) for line in metrics if line.startswith("llamayard_requests_running "))
        left += [f"{running - 1:.0f} requests running"] if running > 1 else []  # this one
    return left


def report(tally: Tally, left: list[str], streams: int, seconds: float, seed: int) -> str:
    total = sum(tally.outcomes.values())
    lines = [f"{streams} streams, {seconds:g} s, seed {seed}, {RIG} EMULATED at speed {SPEED:g}: {total} requests"]
    lines += [f"  {outcome:14} {tally.outcomes[outcome]:6}" for outcome in OUTCOMES]
    lines += [f"    {count:5} {text}" for text, count in tally.errors.most_common()]
    lines += ["faults: " + ", ".join(f"{count} {kind}" for kind, count in sorted(tally.faults.items()))]
    if tally.reroutes:
        lines.append(
            f"first byte of a request sent at a fault: median {statistics.median(tally.reroutes):.2f} s, "
            f"longest {max(tally.reroutes):.2f} s, of {len(tally.reroutes)}"
        )
    lines.append("left over: " + ("; ".join(left) or "nothing"))
    return "\n".join([*lines, *tally.examples[:20]])


def failed(tally: Tally, left: list[str]) -> bool:
    return bool(tally.outcomes[CUT] or tally.outcomes[LOST] or left)


def main() -> int:
    """Returns 1 if a stream was cut silently, a request was lost, or anything is left over."""
    parser = argparse.ArgumentParser(prog="python -m bench.reliability.chaos", description=__doc__)
    parser.add_argument("--streams", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="keeps the router's log and state there")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        tally, left = asyncio.run(run(given.streams, given.seconds, given.seed, folder))
    if given.json:
        print(
            json.dumps({"outcomes": tally.outcomes, "faults": tally.faults, "left": left, "reroutes": tally.reroutes})
        )
    else:
        print(report(tally, left, given.streams, given.seconds, given.seed))
    return failed(tally, left)


if __name__ == "__main__":
    sys.exit(main())
