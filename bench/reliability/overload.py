"""Overload: 2,000 connections ask far more than four EMULATED GPUs can serve.

`python -m bench.reliability.overload --connections 2000 --seconds 60` runs the router of `bench.reliability.chaos` with
clients of three priorities that ask again as soon as they are answered, and after the router's `Retry-After`, bounded
by `PAUSE_SECONDS_MAX`, where they are refused. A process of its own asks for status and metrics meanwhile. Exit status
1 if a request is lost or cut, a refusal has no `Retry-After`, or anything is left over.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import psutil

from bench.reliability.chaos import Box, is_ready, leftovers, start, until

PRIORITIES = ("high", "normal", "low")
PAUSE_SECONDS_MAX = 2.0
_MODELS = ("llama3.1:8b", "qwen3:8b", "gemma3:4b")
_ADMIN = """
import http.client, json, sys, time
port, seconds, waits = int(sys.argv[1]), float(sys.argv[2]), []
end = time.monotonic() + seconds
while time.monotonic() < end:
    for path in ("/llamayard/status", "/metrics"):
        began = time.monotonic()
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        connection.request("GET", path)
        connection.getresponse().read()
        connection.close()
        waits.append(time.monotonic() - began)
    time.sleep(0.1)
print(json.dumps(waits))
"""


@dataclass(slots=True)
class Tally:
    by_priority: dict[str, Counter[str]] = field(default_factory=lambda: {name: Counter() for name in PRIORITIES})
    problems: Counter[str] = field(default_factory=Counter[str])
    rss_bytes: list[int] = field(default_factory=list[int])
    admin_seconds: list[float] = field(default_factory=list[float])


async def client(box: Box, number: int, tally: Tally, done: asyncio.Event) -> None:
    rng, priority = random.Random(f"overload {number}"), PRIORITIES[number % len(PRIORITIES)]
    counts, headers = tally.by_priority[priority], {"X-Llamayard-Priority": priority}
    while not done.is_set():
        options = {"num_predict": rng.randint(100, 300)}
        body = {"model": rng.choice(_MODELS), "prompt": "hello", "options": options, "stream": False}
        try:
            async with box.session.post(f"{box.url}/api/generate", json=body, headers=headers) as reply:
                answer = await reply.read()
        except aiohttp.ClientError as error:
            tally.problems[type(error).__name__] += 1
            continue
        if reply.status == 200:
            counts["answered"] += 1
            tally.problems["cut"] += not json.loads(answer).get("done")
            continue
        counts[f"{reply.status} {reply.headers.get('X-Llamayard-Error', '')}"] += 1
        wait = reply.headers.get("Retry-After")
        tally.problems["no Retry-After"] += wait is None
        await asyncio.sleep(min(float(wait or 1), PAUSE_SECONDS_MAX) * rng.uniform(0.5, 1.0))


async def run(connections: int, seconds: float, folder: Path) -> tuple[Tally, list[str]]:
    tally, done = Tally(), asyncio.Event()
    timeout = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as session:
        box = start(folder, session)
        try:
            await until(box, is_ready, "ready")
            tasks = [asyncio.create_task(client(box, number, tally, done)) for number in range(connections)]
            command = (sys.executable, "-c", _ADMIN, str(box.port), str(seconds))
            asking = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE)
            process, end = psutil.Process(box.process.pid), time.monotonic() + seconds
            while time.monotonic() < end:
                tally.rss_bytes.append(process.memory_info().rss)
                await asyncio.sleep(1.0)
            done.set()
            out, _ = await asking.communicate()
            tally.admin_seconds = json.loads(out)
            await asyncio.gather(*tasks)
            left = await leftovers(box)
        finally:
            box.process.send_signal(signal.SIGTERM)
            box.process.wait(timeout=120)
            for orphan in box.children():
                orphan.kill()
    return tally, left


def report(tally: Tally, left: list[str], connections: int, seconds: float) -> str:
    lines = [f"{connections} connections, {seconds:g} s"]
    lines += [f"  {name:7} {dict(tally.by_priority[name].most_common())}" for name in PRIORITIES]
    quarter = max(1, len(tally.rss_bytes) // 4)
    rss = [value / 2**20 for value in tally.rss_bytes]
    third = len(tally.admin_seconds) // 3
    waits, later = sorted(tally.admin_seconds), sorted(tally.admin_seconds[third:])
    lines += [
        "memory, MiB, by quarter: "
        + " ".join(f"{statistics.median(rss[at : at + quarter]):.1f}" for at in range(0, 4 * quarter, quarter)),
        f"status and metrics, ms: median {statistics.median(waits) * 1e3:.0f}, "
        f"p95 {waits[len(waits) * 95 // 100] * 1e3:.0f}, longest {waits[-1] * 1e3:.0f}, of {len(waits)}; "
        f"without the first third: p95 {later[len(later) * 95 // 100] * 1e3:.0f}, longest {later[-1] * 1e3:.0f}",
        f"problems: {dict(+tally.problems) or 'none'}",
        "left over: " + ("; ".join(left) or "nothing"),
    ]
    return "\n".join(lines)


def main() -> int:
    """Returns 1 if there is a problem."""
    parser = argparse.ArgumentParser(prog="python -m bench.reliability.overload", description=__doc__)
    parser.add_argument("--connections", type=int, default=2000)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--folder", type=Path, help="keeps the router's log and state there")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        tally, left = asyncio.run(run(given.connections, given.seconds, folder))
    print(report(tally, left, given.connections, given.seconds))
    return bool(+tally.problems or left)


if __name__ == "__main__":
    sys.exit(main())
