"""Chaos testing: small random scenarios with faults, in which every invariant is checked after every event.

`check(seed)` runs one scenario, deterministically. `python -m router.lab.simulator.chaos --first 1 --count 1000` runs
many and prints, for each violation, the command that replays it. Models and GPUs are synthetic.
"""

from __future__ import annotations

import argparse
import hashlib
import multiprocessing
import random
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from router.domain.actions import Action
from router.domain.events import Event
from router.domain.gpu import GpuUuid
from router.domain.model import BlobDigest, ModelFacts
from router.domain.policy import CpuOverflow, Policy, Rest
from router.lab.simulator.baselines.llamayard import Llamayard
from router.lab.simulator.faults import Fault, FaultKind
from router.lab.simulator.gpus import SimGpu
from router.lab.simulator.invariants import InvariantError, Invariants
from router.lab.simulator.loaded_model import ServerConfig
from router.lab.simulator.machine import Machine
from router.lab.simulator.runner import UNFINISHED, Baseline, Outcome, Scenario, Simulation
from router.lab.simulator.workload import Session, Turn

GIB = 1024**3
_SECONDS = 40.0
_FAILED_LOADS_PER_MODEL = 1
_FAULTS = (
    FaultKind.DIES,
    FaultKind.LOST,
    FaultKind.HOT,
    FaultKind.EXTERNAL,
    FaultKind.STUCK,
    FaultKind.SLOW_DISK,
)


@dataclass(frozen=True, slots=True)
class RandomScenario:
    """One scenario with the settings of the router and its servers."""

    scenario: Scenario
    config: ServerConfig
    policy: Policy


def random_scenario(seed: int) -> RandomScenario:
    """Generates the scenario for a seed."""
    rng = random.Random(seed)
    gpus = _gpus(rng)
    models = _models(rng, gpus)
    scenario = Scenario(
        gpus=gpus,
        models=models,
        sessions=_sessions(rng, models),
        seconds=_SECONDS,
        cold_start=rng.random() < 0.5,
        page_cache_bytes=rng.choice((16, 64)) * GIB,
        faults=(*_faults(rng, len(gpus)), *_commands(seed, len(gpus))),
        deviation_seed=seed,
    )
    config = ServerConfig(version=rng.choice(((0, 24, 0), (0, 33, 0))), slots=rng.choice((1, 2, 2, 4)))
    policy = Policy(queue_timeout_seconds=60.0, queue_limit=rng.choice((4, 64, 512)),
                    keep_alive_seconds=rng.choice((-1.0, -1.0, 5.0)))  # fmt: skip
    starving = rng.choice((5.0, 15.0, 75.0))
    constants = replace(policy.constants, drain_after_seconds=starving)
    rest = rng.choice((None, Rest(bytes_per_hour=1e18, weight=0.5)))
    target = rng.choice((2.0, 10.0))  # with a target of 2 s every load of some size is slow
    policy = replace(
        policy, starving_after_seconds=starving, ttft_target_seconds=target, rest=rest, constants=constants
    )
    return _with_cpu(seed, RandomScenario(scenario, config, policy))


def _with_cpu(seed: int, generated: RandomScenario) -> RandomScenario:
    """Half of the worlds serve on the CPU what would be late on the GPUs; with some host memory, and a fast CPU."""
    rng = random.Random(f"cpu {seed}")
    if rng.random() < 0.5:
        return generated
    world = replace(generated.scenario.world, cpu_thread_prefill_flops=rng.choice((4e9, 4e10, 4e11)),
                    cpu_thread_bytes_per_second=20e9, cpu_bytes_per_second=rng.choice((40e9, 300e9)))  # fmt: skip
    margin = rng.choice((0, 4)) * GIB
    return RandomScenario(
        replace(generated.scenario, world=world),
        replace(generated.config, host_memory_bytes=rng.choice((8, 32, 120)) * GIB),
        replace(generated.policy, cpu=CpuOverflow(memory_margin_bytes=margin)),
    )


def check(seed: int) -> str:
    """Runs the scenario of a seed. Returns a digest of all events and actions of the router.

    Raises:
        InvariantError: an invariant is violated.
    """
    generated = random_scenario(seed)
    invariants = Invariants()
    digest = hashlib.sha256()

    def observe(event: Event, actions: list[Action], now: float) -> None:
        digest.update(f"{now!r} {event!r} {actions!r}".encode())
        invariants.check_actions(event, actions, now)

    def make(machine: Machine, models: Mapping[str, ModelFacts]) -> Baseline:
        del models
        router = Llamayard(machine, generated.config, generated.policy, observe)
        invariants.watch(router, machine)
        return router

    outcome = Simulation(generated.scenario, make).run(invariants.check_state)
    unfinished = [request.id for request in outcome.requests if request.outcome == UNFINISHED]
    if unfinished:
        raise InvariantError(f"requests {unfinished} never ended")
    _check_memory(generated.scenario, outcome)
    return digest.hexdigest()


def _check_memory(scenario: Scenario, outcome: Outcome) -> None:
    """Loads may fail for memory, since they take more than anybody can know. Without external memory use they do so
    once for a model until one of its loads is measured, and no client sees it."""
    if any(fault.kind is FaultKind.EXTERNAL for fault in scenario.faults):
        return
    failed = [request.id for request in outcome.requests if "out of memory" in request.outcome]
    if failed:
        raise InvariantError(f"requests {failed} ended because a load ran out of memory")
    failed_loads, models = outcome.ledger.out_of_memory, len(scenario.models)
    if failed_loads > _FAILED_LOADS_PER_MODEL * models:
        raise InvariantError(f"{failed_loads} loads of {models} models ran out of memory without external memory use")


def _gpus(rng: random.Random) -> tuple[SimGpu, ...]:
    sizes = rng.choice(((24,), (24, 24), (24, 24, 24, 24), (8, 24), (12, 12), (24, 12, 8)))
    return tuple(
        SimGpu(
            uuid=GpuUuid(f"GPU-{index}"),
            index=index,
            name=f"synthetic {size} GiB GPU",
            memory_total_bytes=size * GIB,
            memory_reserved_bytes=GIB // 4,
            memory_bus_width_bits=384,
            memory_clock_hertz=9_751_000_000,
            fp32_teraflops=35.6,
        )
        for index, size in enumerate(sizes)
    )


def _models(rng: random.Random, gpus: Sequence[SimGpu]) -> dict[str, ModelFacts]:
    largest = max(gpu.memory_total_bytes for gpu in gpus)
    total = sum(gpu.memory_total_bytes for gpu in gpus)
    shares = [rng.uniform(0.03, 0.9) * largest for _ in range(rng.randint(2, 4))]
    shares.append(rng.uniform(0.5, 0.85) * total)
    if rng.random() < 0.2:
        shares.append(1.5 * total)
    return {f"model{index}": _model(rng, index, int(size)) for index, size in enumerate(shares)}


def _model(rng: random.Random, index: int, weights_bytes: int) -> ModelFacts:
    layers = rng.choice((16, 32, 64))
    return ModelFacts(
        name=f"model{index}",
        digest=f"{index:064x}",
        blob=BlobDigest(f"sha256:{rng.getrandbits(64):064x}"),
        weights_bytes=weights_bytes,
        architecture=rng.choice(("llama", "llama", "qwen2", "qwen3")),
        layers=layers,
        embedding_length=2048,
        head_count=16,
        head_count_kv=(rng.choice((2, 4, 8)),) * layers,
        key_length=128,
        value_length=128,
        vocabulary_size=64_000,
        context_length=32_768,
        is_embedding=rng.random() < 0.1,
    )


def _sessions(rng: random.Random, models: Mapping[str, ModelFacts]) -> tuple[Session, ...]:
    names = list(models)
    sessions: list[Session] = []
    for number in range(rng.randint(4, 16)):
        at = rng.uniform(0.0, _SECONDS)
        turns = tuple(_turn(rng, at + step) for step in range(rng.randint(1, 3)))
        model = rng.choice(names)
        if models[model].is_embedding:
            turns = tuple(replace(turn, generated_tokens=0, shared_tokens=0) for turn in turns)
        sessions.append(Session(number, f"user{rng.randrange(4)}", model, turns))
    return tuple(sessions)


def _turn(rng: random.Random, at: float) -> Turn:
    prompt = rng.randint(1, 4000)
    hang_up_after_seconds = rng.uniform(0.0, 20.0) if rng.random() < 0.2 else None
    return Turn(at, prompt, rng.randint(0, prompt - 1), rng.randint(1, 400), hang_up_after_seconds)


def _faults(rng: random.Random, gpus: int) -> tuple[Fault, ...]:
    faults: list[Fault] = []
    for _ in range(rng.choice((0, 0, 1, 2, 3))):
        kind = rng.choice(_FAULTS)
        amount = {FaultKind.HOT: 3.0, FaultKind.EXTERNAL: rng.uniform(0.1, 0.9), FaultKind.SLOW_DISK: 0.2}
        at, seconds = rng.uniform(0.0, _SECONDS), rng.uniform(1.0, 30.0)
        faults.append(Fault(at, kind, rng.randrange(gpus + 1), amount.get(kind, 1.0), seconds))
    return tuple(faults)


def _commands(seed: int, gpus: int) -> tuple[Fault, ...]:
    """What an operator does meanwhile: drains with their resumes, and restarts of all instances."""
    rng = random.Random(f"commands {seed}")
    commands: list[Fault] = []
    for _ in range(rng.choice((0, 0, 1, 2))):
        kind = rng.choice((FaultKind.DRAINED, FaultKind.DRAINED, FaultKind.RESTART))
        at, seconds = rng.uniform(0.0, _SECONDS), rng.uniform(1.0, 20.0)
        commands.append(Fault(at, kind, rng.randrange(gpus), seconds=seconds))
    return tuple(commands)


def replay_command(seed: int) -> str:
    return f"python -m router.lab.simulator.chaos --first {seed} --count 1"


def failure(seed: int) -> str | None:
    """The violation in the scenario of this seed, with the command that replays it; None if all invariants hold."""
    try:
        check(seed)
    except AssertionError as error:
        return f"seed {seed}: {type(error).__name__}: {error}\n  replay: {replay_command(seed)}"
    return None


def main() -> int:
    """Returns 1 if any seed violates an invariant."""
    parser = argparse.ArgumentParser(prog="python -m router.lab.simulator.chaos", description=__doc__)
    parser.add_argument("--first", type=int, default=1)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--jobs", type=int, default=1)
    given = parser.parse_args()
    seeds = range(given.first, given.first + given.count)
    with multiprocessing.Pool(given.jobs) as pool:
        failures = [message for message in pool.imap(failure, seeds, chunksize=20) if message is not None]
    for message in failures:
        sys.stdout.write(message + "\n")
    sys.stdout.write(f"{len(failures)} of {given.count} random scenarios violated an invariant\n")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
