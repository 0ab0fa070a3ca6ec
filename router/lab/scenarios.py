"""Rigs, mixes and contestants by name: puts the catalogue's models and the rig's GPUs into what the simulator plays.

It is the one place where the emulated rig and the simulator meet. It runs nothing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from router.domain.model import ModelFacts
from router.domain.policy import Policy
from router.engines.ollama.client import ShowReply, TagRow
from router.engines.ollama.model_metadata import read_facts
from router.lab.emulator.catalogue import CatalogueModel, catalogue, weights_text
from router.lab.emulator.model_facts import active_share
from router.lab.emulator.spec import EmulatorSpec, parse_spec
from router.lab.emulator.store import Header
from router.lab.simulator.baselines.floor import Floor
from router.lab.simulator.baselines.llamayard import DecisionObserver, Llamayard
from router.lab.simulator.baselines.planned import Planned
from router.lab.simulator.baselines.stock import NginxOverServers, StockServer
from router.lab.simulator.clairvoyant import search
from router.lab.simulator.gpus import SimGpu
from router.lab.simulator.loaded_model import ServerConfig, shape_of
from router.lab.simulator.runner import BaselineFactory, Scenario
from router.lab.simulator.workload import (
    TRACE,
    Demand,
    Mix,
    Session,
    TraceRow,
    Turn,
    make_sessions,
    read_trace,
)
from router.lab.simulator.world import WORLD, true_bytes

_CACHED_SHARE = 0.8
"""So much of the host's memory holds files that were read, as in the emulated rig."""
BASE_REQUESTS_PER_SECOND = 0.46
RATES: Mapping[tuple[str, str], float] = {
    ("2x3090", "small"): 0.92,
    ("2x3090", "team"): 0.08,
    ("2x3090", "wide"): 0.05,
    ("2x3090", "large"): 0.03,
    ("4090+3090", "small"): 0.92,
    ("4090+3090", "team"): 0.08,
    ("4090+3090", "wide"): 0.05,
    ("4090+3090", "large"): 0.03,
    ("4x3090", "small"): 0.92,
    ("4x3090", "team"): 0.92,
    ("4x3090", "wide"): 0.46,
    ("4x3090", "large"): 0.10,
    ("2xa6000", "small"): 0.92,
    ("2xa6000", "team"): 0.32,
    ("2xa6000", "wide"): 0.46,
    ("2xa6000", "large"): 0.22,
}
"""Requests a second at which the better stock server gets 60 to 85 % in time, measured over seeds 1 to 3, where any
rate does: small models are no trouble at any, and six models fit two A6000 whatever the rate."""
_LEAST_REQUESTS = 120
_LEAST_SECONDS = 480.0

_TEAM = ("llama3.3:70b", "qwen2.5-coder:32b", "qwen2.5:14b", "llama3.1:8b", "llama3.2:3b", "nomic-embed-text:latest")
_WIDE_96 = (
    "llama3.3:70b",
    "qwen2.5-coder:32b",
    "deepseek-r1:32b",
    "gemma2:27b",
    "qwen2.5:14b",
    "llama3.1:8b",
    "qwen2.5:7b",
    "mistral:7b",
)
_WIDE_48 = ("llama3.3:70b", "qwen2.5:14b", "llama3.1:8b", "mistral:7b")
_SMALL = ("llama3.1:8b", "qwen2.5:7b", "llama3.2:3b")
_LARGE = ("llama3.3:70b", "qwen2.5-coder:32b", "deepseek-r1:32b", "gemma2:27b")
MIXES = ("small", "team", "wide", "large")
_LARGE_RIG_BYTES = 80 * 1000**3

BASELINES = (
    "stock-0.24",
    "stock-0.33",
    "spread-0.24",
    "spread-0.33",
    "nginx-round-robin",
    "nginx-least-conn",
    "llamayard",
    "llamayard-0.33",
    "llamayard-pairs",
    "floor",
    "best-plan",
)


class ScenarioError(ValueError):
    """A name that nothing has, or a number that means nothing; says what there is."""


@dataclass(frozen=True, slots=True)
class ScenarioSpec:
    """A scenario by its names."""

    rig: str = "4x3090"
    mix: str = "team"
    seed: int = 1
    seconds: float | None = None
    """How long requests arrive; None: 480 s, or as long as 120 requests take."""
    requests_per_second: float | None = None
    """None: as set for this rig and mix."""
    users: int = 12
    trace: Path = TRACE
    cold_start: bool = False


def make_scenario(spec: ScenarioSpec, rows: tuple[TraceRow, ...] | None = None) -> Scenario:
    """The machine and the sessions. `rows`: the trace where it was read already.

    Raises:
        ScenarioError, SpecError, TraceError: what is wrong with a name or a file.
    """
    rig = parse_spec(spec.rig)
    mix = parse_mix(spec.mix, rig)
    models = {name: model_facts(name) for name in mix.names}
    demand = demand_of(spec)
    sessions = make_sessions(rows or read_trace(spec.trace), mix, models, demand, spec.seed)
    return Scenario(
        gpus=sim_gpus(rig),
        models=models,
        sessions=sessions,
        seconds=demand.seconds,
        active_shares={name: _active_share(catalogue()[name]) for name in mix.names},
        cold_start=spec.cold_start,
        page_cache_bytes=int(_CACHED_SHARE * rig.ram_bytes),
    )


def demand_of(spec: ScenarioSpec) -> Demand:
    """How much is asked for. Raises ScenarioError."""
    given = spec.requests_per_second
    rate = default_rate(spec.rig, spec.mix) if given is None else _require_positive("rate", given)
    least = max(_LEAST_SECONDS, _LEAST_REQUESTS / rate)
    seconds = least if spec.seconds is None else _require_positive("seconds", spec.seconds)
    _require_positive("users", spec.users)
    return Demand(seconds, rate, spec.users)


def _require_positive(what: str, number: float) -> float:
    if not 0.0 < number < float("inf"):
        raise ScenarioError(f"{what}: {number:g} must be more than 0")
    return number


def flood(seconds: float = 300.0) -> Scenario:
    """Four users who never stop asking one model on one GPU, the first with ten times the sessions of each other.

    The others have ten each, so that all of them always wait, though the router fills the GPU with copies.
    """
    rig = parse_spec("3090")
    model = model_facts("llama3.1:8b")
    turns = tuple(Turn(0.0, 500, 0 if turn == 0 else 400, 200) for turn in range(200))
    last_allocation_id = ["greedy"] * 100 + [f"modest{number}" for number in range(3) for _ in range(10)]
    sessions = tuple(Session(index, user, model.name, turns) for index, user in enumerate(last_allocation_id))
    return Scenario(gpus=sim_gpus(rig), models={model.name: model}, sessions=sessions, seconds=seconds)


def default_rate(rig: str, mix: str) -> float:
    """Requests a second that are asked of this rig with this mix."""
    return RATES.get((rig, mix), BASE_REQUESTS_PER_SECOND)


def parse_mix(name: str, rig: EmulatorSpec) -> Mix:
    """A mix by name for the size of the rig, or models by name, separated by commas, each perhaps with `=WEIGHT`."""
    total = sum(gpu.memory_total_bytes for gpu in rig.gpus)
    named = {"small": _SMALL, "team": _TEAM, "wide": _WIDE_96 if total > _LARGE_RIG_BYTES else _WIDE_48,
             "large": _LARGE}  # fmt: skip
    if name in named:
        return Mix(name, tuple((model, 1.0) for model in named[name]))
    models: list[tuple[str, float]] = []
    for part in name.split(","):
        model, equals, weight = part.partition("=")
        if model not in catalogue():
            raise ScenarioError(
                f"mix: no mix or model {model!r}; mixes: {', '.join(MIXES)}; models: {', '.join(catalogue())}"
            )
        models.append((model, _weight(part, weight) if equals else 1.0))
    return Mix(name, tuple(models))


def _weight(part: str, text: str) -> float:
    try:
        number = float(text)
    except ValueError as error:
        raise ScenarioError(f"mix: {part!r} wants a number after =") from error
    return _require_positive(f"mix: the weight of {part.partition('=')[0]}", number)


def sim_gpus(rig: EmulatorSpec) -> tuple[SimGpu, ...]:
    return tuple(
        SimGpu(
            uuid=uuid,
            index=index,
            name=gpu.name,
            memory_total_bytes=gpu.memory_total_bytes,
            memory_reserved_bytes=gpu.memory_reserved_bytes,
            memory_bus_width_bits=gpu.memory_bus_width_bits,
            memory_clock_hertz=gpu.memory_clock_hertz,
            fp32_teraflops=gpu.fp32_teraflops,
            compute_capability=gpu.compute_capability,
            pcie_generation=gpu.pcie_generation,
            pcie_width=gpu.pcie_width,
        )
        for index, (uuid, gpu) in enumerate(zip(rig.uuids, rig.gpus, strict=True))
    )


def model_facts(name: str) -> ModelFacts:
    """What the router reads of a catalogue model from an emulated server."""
    entry = catalogue()[name]
    digest = hashlib.sha256(weights_text(entry).encode()).hexdigest()
    tensors = [{"name": n, "type": kind, "shape": shape} for n, kind, shape in entry.tensors]
    told = {"modelfile": f"FROM /blobs/sha256-{digest}", "model_info": entry.metadata, "tensors": tensors,
            "capabilities": entry.capabilities}  # fmt: skip
    reply = msgspec.json.decode(json.dumps(told).encode(), type=ShowReply)
    facts = read_facts(TagRow(name, digest, entry.size_bytes), reply)
    if facts is None:
        raise ScenarioError(f"the catalogue's {name} has no weights")
    return facts


def _active_share(entry: CatalogueModel) -> float:
    return active_share(Header(entry.metadata, entry.tensors, is_noise=False))


def large_models(scenario: Scenario) -> frozenset[str]:
    """Names of the models that no single GPU of the rig holds whole."""
    room = max(gpu.usable_bytes for gpu in scenario.gpus)
    config = ServerConfig()
    return frozenset(
        name
        for name, model in scenario.models.items()
        if true_bytes(WORLD, model, shape_of(model, config), (model.layers + 1,))[0] > room
    )


def make_baseline(
    name: str, scenario: Scenario, policy: Policy | None = None, seen: DecisionObserver | None = None
) -> BaselineFactory:
    """Makes one by name. `policy` and `seen` are llamayard's; the best plan is searched for in `scene` first.

    Raises:
        ScenarioError: there is none of that name.
    """
    config = ServerConfig()
    if name == "best-plan":
        plan = search(scenario, config)
        return lambda machine, models: Planned(machine, models, config, plan)
    newer = replace(config, version=(0, 33, 0))
    makers: Mapping[str, BaselineFactory] = {
        "stock-0.24": lambda machine, _: StockServer(machine, config),
        "stock-0.33": lambda machine, _: StockServer(machine, newer),
        "spread-0.24": lambda machine, _: StockServer(machine, replace(config, spread=True)),
        "spread-0.33": lambda machine, _: StockServer(machine, replace(newer, spread=True)),
        "nginx-round-robin": lambda machine, _: NginxOverServers(machine, config, least_conn=False),
        "nginx-least-conn": lambda machine, _: NginxOverServers(machine, config, least_conn=True),
        "llamayard": lambda machine, _: Llamayard(machine, config, policy, seen),
        "llamayard-pairs": lambda machine, _: Llamayard(machine, config, policy, seen, pairs=True),
        "llamayard-0.33": lambda machine, _: Llamayard(machine, newer, policy, seen),
        "floor": lambda machine, models: Floor(machine, models, config),
    }
    if name not in makers:
        raise ScenarioError(f"policy: no {name!r}; there are: {', '.join(BASELINES)}")
    return makers[name]
