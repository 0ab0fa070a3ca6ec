"""Soak: a router under load for half an hour, with faults; its memory and file descriptors must stay as they are.

`python -m bench.reliability.soak --minutes 30 --clients 40 --seed 1` runs the router of `bench.reliability.chaos` over
four EMULATED GPUs with its faults, and reports the share of busy slots (52 % with 40 clients on two shared cores).
Resident memory and descriptors of the router's process are read every second. Exit status 1 if memory grows by more
than `GROWTH_MAX` between the first and the last quarter after the warm-up, if descriptors grow, or if anything is
left over.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import psutil

from bench.reliability.chaos import CUT, LOST, OUTCOMES, Box, Tally, client, faults, is_ready, leftovers, start, until

GROWTH_MAX = 0.02
_WARM_UP = 0.2
"""Share of the time in which caches fill: it is not judged."""
_SAMPLE_SECONDS = 1.0
_STATUS_EVERY = 5
"""Samples between two looks at the load."""
_REST_SECONDS = 20.0
"""In which kept connections are closed, at the end."""


@dataclass(slots=True)
class Samples:
    rss_bytes: list[int] = field(default_factory=list[int])
    descriptors: list[int] = field(default_factory=list[int])
    load: list[float] = field(default_factory=list[float])
    """Busy slots as a share of those of all loaded models."""
    at_start: int = 0
    """Descriptors before the first request."""
    at_end: int = 0


def growth(values: Sequence[int]) -> float:
    """Of the median from the first to the last quarter after the warm-up."""
    judged = values[int(len(values) * _WARM_UP) :]
    quarter = max(1, len(judged) // 4)
    return statistics.median(judged[-quarter:]) / statistics.median(judged[:quarter]) - 1.0


async def run(clients: int, seconds: float, seed: int, folder: Path) -> tuple[Samples, Tally, list[str]]:
    samples, tally, done = Samples(), Tally(), asyncio.Event()
    timeout = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as session:
        box = start(folder, session)
        try:
            await until(box, is_ready, "ready")
            process = psutil.Process(box.process.pid)
            samples.at_start = process.num_fds()
            tasks = [asyncio.create_task(client(box, number, seed, tally, done)) for number in range(clients)]
            tasks.append(asyncio.create_task(faults(box, seed, tally, done)))
            await sample(box, process, samples, seconds)
            done.set()
            await asyncio.gather(*tasks)
            left = await leftovers(box)
            await asyncio.sleep(_REST_SECONDS)
            samples.at_end = process.num_fds()
        finally:
            box.process.send_signal(signal.SIGTERM)
            try:
                box.process.wait(timeout=120)
            except subprocess.TimeoutExpired:
                box.process.kill()
                box.process.wait()
            orphans = box.children()
            for orphan in orphans:
                orphan.kill()
    return samples, tally, [*left, *(f"orphan {orphan.pid}" for orphan in orphans)]


async def sample(box: Box, process: psutil.Process, samples: Samples, seconds: float) -> None:
    loop = asyncio.get_running_loop()
    end, count = loop.time() + seconds, 0
    while loop.time() < end:
        samples.rss_bytes.append(process.memory_info().rss)
        samples.descriptors.append(process.num_fds())
        if count % _STATUS_EVERY == 0:
            models = (await box.get("/llamayard/status"))["models"]
            slots = sum(model["slots"] for model in models if model["state"] == "ready")
            samples.load.append(sum(model["in_flight"] for model in models) / slots if slots else 1.0)
        count += 1
        await asyncio.sleep(_SAMPLE_SECONDS)


def problems(samples: Samples, tally: Tally, left: Sequence[str]) -> list[str]:
    found = [f"{tally.outcomes[outcome]} {outcome}" for outcome in (CUT, LOST) if tally.outcomes[outcome]]
    if growth(samples.rss_bytes) > GROWTH_MAX:
        found.append(f"memory grew by {growth(samples.rss_bytes):.1%}")
    if samples.at_end > samples.at_start + 2:
        found.append(f"{samples.at_end - samples.at_start} more descriptors at the end than at the start")
    return [*found, *(f"left over: {text}" for text in left)]


def report(samples: Samples, tally: Tally, found: Sequence[str]) -> str:
    mebibytes = [value / 2**20 for value in samples.rss_bytes]
    outcomes = ", ".join(f"{tally.outcomes[outcome]} {outcome}" for outcome in OUTCOMES)
    step = max(1, len(mebibytes) // 10)
    lines = (
        f"{len(mebibytes)} s, load {statistics.mean(samples.load):.0%}, {sum(tally.faults.values())} faults",
        f"{sum(tally.outcomes.values())} requests: {outcomes}",
        f"memory: growth {growth(samples.rss_bytes):+.1%} after the warm-up; MiB: "
        + " ".join(f"{value:.1f}" for value in mebibytes[::step]),
        f"descriptors: {samples.at_start} before, {samples.at_end} after, {growth(samples.descriptors):+.1%} meanwhile",
        "problems: " + ("; ".join(found) or "none"),
    )
    return "\n".join((*lines, *tally.examples[:10]))


def main() -> int:
    """Returns 1 if there is a problem."""
    parser = argparse.ArgumentParser(prog="python -m bench.reliability.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--clients", type=int, default=40)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="keeps the router's log and state there")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        samples, tally, left = asyncio.run(run(given.clients, given.minutes * 60, given.seed, folder))
    found = problems(samples, tally, left)
    print(report(samples, tally, found))
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
