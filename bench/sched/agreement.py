"""One trace twice: over an emulated stock server (or the router) with real HTTP and processes, and in the simulator.

The emulated one goes first; the simulator is then asked for the same numbers of words, since an emulated model ends
its answers by itself. Prints both side by side.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from bench.sched.client import Answered, Player
from router.rig.fleet import prepare_rig
from router.rig.process import PACKAGE_ROOT
from router.scenarios import Wanted, contestant, scenario
from router.sim.metrics import FIRST_TOKEN_SECONDS, TOKENS_PER_SECOND, is_in_time
from router.sim.requests import Request
from router.sim.runner import Scenario, Simulation
from router.sim.workload import Session

TUNED = {
    "OLLAMA_FLASH_ATTENTION": "1",
    "OLLAMA_KV_CACHE_TYPE": "q8_0",
    "OLLAMA_NUM_PARALLEL": "2",
    "OLLAMA_CONTEXT_LENGTH": "8192",
    "OLLAMA_NOPRUNE": "1",
    "OLLAMA_NO_CLOUD": "1",
}
PRODUCT = "llamayard"
_LOADED = re.compile(r'msg="llama runner started" model=(\S+)')
VERSIONS = {"stock-0.24": "0.24.0", "stock-0.33": "0.33.0"}


@dataclass(frozen=True, slots=True)
class Compared:
    """The same requests by both, in the same order."""

    emulated: list[Answered]
    simulated: list[Request]
    loads: tuple[list[str], list[str]]
    """Names of the models in the order in which they were loaded: emulated, simulated."""

    def in_time(self) -> tuple[float, float]:
        """Shares of the requests: emulated, simulated."""
        return (
            statistics.fmean(answered_in_time(one) for one in self.emulated),
            statistics.fmean(is_in_time(one) for one in self.simulated),
        )

    def median_ttft(self) -> tuple[float, float]:
        return (
            statistics.median(one.ttft_seconds for one in self.emulated),
            statistics.median(one.ttft_seconds or 0.0 for one in self.simulated),
        )


def answered_in_time(one: Answered) -> bool:
    if one.error or one.ttft_seconds > FIRST_TOKEN_SECONDS:
        return False
    first = one.first_token_at or 0.0
    return one.words < 2 or (one.words - 1) / max(1e-9, one.ended_at - first) >= TOKENS_PER_SECOND


@contextlib.contextmanager
def stock_server(rig: str, policy: str, speed: float, folder: Path) -> Generator[str]:
    """An emulated stock server over all cards of the rig, tuned as a good admin does; its URL."""
    port = _free_port()
    variables = {"LLAMAYARD_RIG_SPEED": repr(speed), "LLAMAYARD_RIG_VERSION": VERSIONS[policy]}
    prepared = prepare_rig(rig, folder / "rig", variables)
    environment = {
        **TUNED,
        **prepared.environment,
        "OLLAMA_MODELS": str(prepared.models_directory),
        "OLLAMA_HOST": f"127.0.0.1:{port}",
        # The emulated server's idle timers run in real time whatever the speed.
        "OLLAMA_KEEP_ALIVE": f"{300 / speed}s",
    }
    with _running(prepared.command, environment, folder, port) as url:
        yield url


@contextlib.contextmanager
def product(rig: str, speed: float, folder: Path) -> Generator[str]:
    """The router itself over emulated servers, with the same two lines; its URL. It polls as fast as its clock runs."""
    port = _free_port()
    environment = {"LLAMAYARD_RIG_SPEED": repr(speed), "PYTHONPATH": str(PACKAGE_ROOT)}
    keys = {
        "ollama.flash_attention": "true",
        "ollama.kv_cache_type": "q8_0",
        "poll.gpu_seconds": f"{1 / speed:g}",
        "poll.residency_seconds": f"{1 / speed:g}",
    }
    command = [sys.executable, "-m", "router", "serve", "--rig", rig, "--port", str(port)]
    for key, value in keys.items():
        command += ["--set", f"{key}={value}"]
    with _running(command, environment, folder, port) as url:
        yield url


@contextlib.contextmanager
def _running(command: Sequence[str], environment: Mapping[str, str], folder: Path, port: int) -> Generator[str]:
    """The program until the block ends; what it says goes to `server.log`."""
    full = {"PATH": os.defpath, "HOME": str(folder), **environment}
    with (folder / "server.log").open("wb") as log:
        process = subprocess.Popen(command, env=full, stdout=log, stderr=log, start_new_session=True)
    try:
        _wait_for(f"http://127.0.0.1:{port}")
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        try:
            process.wait(timeout=20)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_for(url: str) -> None:
    limit = time.monotonic() + 30
    while True:
        try:
            with urllib.request.urlopen(url + "/api/version", timeout=1):
                return
        except OSError:
            if time.monotonic() > limit:
                raise
            time.sleep(0.05)


def compare(policy: str, wanted: Wanted, speed: float) -> Compared:
    """Plays it on both."""
    scene = replace(scenario(wanted), cold_start=True)
    embeds = frozenset(name for name, model in scene.models.items() if model.is_embedding)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        server = (
            product(wanted.rig, speed, folder) if policy == PRODUCT else stock_server(wanted.rig, policy, speed, folder)
        )
        with server as url:
            answers = asyncio.run(Player(url, speed, embeds).play(scene.sessions))
        loads = _LOADED.findall((folder / "server.log").read_text(encoding="utf-8"))
    played = replace(scene, sessions=_as_answered(scene, answers))
    outcome = Simulation(played, contestant(policy, played)).run()
    stays = [stay.model.removesuffix(":latest") for stay in outcome.tally.stays]
    loads = [name.removesuffix(":latest") for name in loads]
    return Compared(answers, sorted(outcome.requests, key=lambda one: one.arrived_at), (loads, stays))


def _as_answered(scene: Scenario, answers: Sequence[Answered]) -> tuple[Session, ...]:
    """The sessions with as many words and as much shared prompt as they really had."""
    by_turn = {(one.session, one.turn): one for one in answers}
    sessions: list[Session] = []
    for session in scene.sessions:
        turns = tuple(
            replace(turn, generated_tokens=by_turn[session.id, number].words,
                    shared_tokens=by_turn[session.id, number].shared_tokens)
            for number, turn in enumerate(session.turns)
        )  # fmt: skip
        sessions.append(replace(session, turns=turns))
    return tuple(sessions)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--policy", choices=[*VERSIONS, PRODUCT], default="stock-0.24")
    parser.add_argument("--rig", default="4x3090")
    parser.add_argument("--mix", default="team")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--rate", type=float, default=0.46)
    parser.add_argument("--speed", type=float, default=5.0)
    parser.add_argument("--each", action="store_true", help="every request")
    given = parser.parse_args()
    wanted = Wanted(given.rig, given.mix, given.seed, given.seconds, given.rate)
    found = compare(given.policy, wanted, given.speed)
    shares, medians = found.in_time(), found.median_ttft()
    out = sys.stdout
    out.write(f"{given.policy} on {given.rig}, {given.mix}, seed {given.seed}: {len(found.emulated)} requests\n")
    out.write(f"  in time      emulated {shares[0]:.1%}  simulated {shares[1]:.1%}\n")
    out.write(f"  loads        emulated {len(found.loads[0])}  simulated {len(found.loads[1])}\n")
    out.write(f"  median TTFT  emulated {medians[0]:.2f} s  simulated {medians[1]:.2f} s\n")
    if given.each:
        simulated = {(one.session, one.turn): one for one in found.simulated}
        for one in found.emulated:
            other = simulated[one.session, one.turn]
            ttft = other.ttft_seconds if other.ttft_seconds is not None else -1.0
            took, others = one.ended_at - one.arrived_at, (other.ended_at or 0.0) - other.arrived_at
            words = f"{one.arrived_at:7.1f} {one.model:<24}{one.prompt_tokens:>6}{one.words:>5}"
            words += f"  TTFT {one.ttft_seconds:7.2f} {ttft:7.2f}  whole {took:7.2f} {others:7.2f}  {one.error}"
            out.write(f"  {words}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
