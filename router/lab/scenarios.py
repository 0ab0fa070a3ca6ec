"""Builds simulator scenarios and baselines by name, from the emulator's rigs and model catalogue.

This is the only module that connects the emulator and the simulator.
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
from router.lab.simulator.baselines.llamayard import DecisionObserver, Llamayard
from router.lab.simulator.baselines.planned import Planned
from router.lab.simulator.baselines.stock import NginxOverServers, StockServer
from router.lab.simulator.clairvoyant import search
from router.lab.simulator.gpus import SimGpu
from router.lab.simulator.loaded_model import ServerConfig, shape_of
from router.lab.simulator.runner import BaselineFactory, Scenario
from router.lab.simulator.true_footprint import true_gpu_bytes
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
from router.lab.simulator.world import WORLD, with_instant_swaps

_CACHED_SHARE = 0.8
"""Share of host memory used as page cache, as in the emulator."""
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
"""(rig, mix) -> requests per second at which the better stock server serves 60 to 85 % within 10 s, measured over seeds
1 to 3. Where no rate does (the small mix; six models that fit two A6000s), any rate."""
_MINIMUM_REQUESTS = 120
_MINIMUM_SECONDS = 480.0

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
_MODERN = (
    "llama3.3:70b",
    "qwen3-coder:30b",
    "gemma4:26b",
    "gpt-oss:20b",
    "qwen3:8b",
    "qwen2.5vl:7b",
    "qwen3-embedding:0.6b",
)
_LARGE = ("llama3.3:70b", "qwen2.5-coder:32b", "deepseek-r1:32b", "gemma2:27b")
MIXES = ("small", "team", "wide", "large", "modern")
_LARGE_RIG_BYTES = 80 * 1000**3

INSTANT_SWAPS = "instant-swaps"
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
    INSTANT_SWAPS,
    "best-plan",
)


class ScenarioError(ValueError):
    """An unknown name or an invalid number; the message lists the valid names."""


@dataclass(frozen=True, slots=True)
class ScenarioSpec:
    """A scenario by name: rig, mix, seed and load."""

    rig: str = "4x3090"
    mix: str = "team"
    seed: int = 1
    seconds: float | None = None
    """Duration of arrivals; None: 480 s, or longer if 120 requests take longer."""
    requests_per_second: float | None = None
    """None: the default rate of this rig and mix."""
    users: int = 12
    trace: Path = TRACE
    cold_start: bool = False
    deviates: bool = True
    """Whether loads take some percent more or less than usual (`Scenario.deviation_seed`)."""


def make_scenario(spec: ScenarioSpec, rows: tuple[TraceRow, ...] | None = None) -> Scenario:
    """Builds the scenario. `rows`: the parsed trace; None: read it from `spec.trace`.

    Raises:
        ScenarioError, SpecError, TraceError: a name, number or file is invalid.
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
        world=replace(WORLD, cold_bytes_per_second=rig.cold_bytes_per_second),
        deviation_seed=spec.seed if spec.deviates else None,
    )


def demand_of(spec: ScenarioSpec) -> Demand:
    """The load that the spec describes. Raises ScenarioError."""
    rate = spec.requests_per_second
    rate = default_rate(spec.rig, spec.mix) if rate is None else _require_positive("rate", rate)
    default_seconds = max(_MINIMUM_SECONDS, _MINIMUM_REQUESTS / rate)
    seconds = default_seconds if spec.seconds is None else _require_positive("seconds", spec.seconds)
    _require_positive("users", spec.users)
    return Demand(seconds, rate, spec.users)


def _require_positive(name: str, number: float) -> float:
    if not 0.0 < number < float("inf"):
        raise ScenarioError(f"{name}: {number:g} must be more than 0")
    return number


def flood(seconds: float = 300.0) -> Scenario:
    """Four users who are always backlogged on one model and one GPU; the first has ten times as many sessions.

    The others have ten each, enough to stay backlogged even when the router fills the GPU with replicas.
    """
    rig = parse_spec("3090")
    model = model_facts("llama3.1:8b")
    turns = tuple(Turn(0.0, 500, 0 if turn == 0 else 400, 200) for turn in range(200))
    last_allocation_id = ["greedy"] * 100 + [f"modest{number}" for number in range(3) for _ in range(10)]
    sessions = tuple(Session(index, user, model.name, turns) for index, user in enumerate(last_allocation_id))
    return Scenario(gpus=sim_gpus(rig), models={model.name: model}, sessions=sessions, seconds=seconds)


def default_rate(rig: str, mix: str) -> float:
    """Default requests per second for this rig and mix."""
    return RATES.get((rig, mix), BASE_REQUESTS_PER_SECOND)


def parse_mix(name: str, rig: EmulatorSpec) -> Mix:
    """Parses a mix name, or comma-separated model names with optional `=WEIGHT`. Raises ScenarioError."""
    total_bytes = sum(gpu.memory_total_bytes for gpu in rig.gpus)
    named = {"small": _SMALL, "team": _TEAM, "wide": _WIDE_96 if total_bytes > _LARGE_RIG_BYTES else _WIDE_48,
             "large": _LARGE, "modern": _MODERN}  # fmt: skip
    if name in named:
        return Mix(name, tuple((model, 1.0) for model in named[name]))
    models: list[tuple[str, float]] = []
    for part in name.split(","):
        model, equals, weight = part.partition("=")
        if model not in catalogue():
            raise ScenarioError(
                f"mix: unknown mix or model {model!r}; mixes: {', '.join(MIXES)}; models: {', '.join(catalogue())}"
            )
        models.append((model, _weight(part, weight) if equals else 1.0))
    return Mix(name, tuple(models))


def _weight(part: str, text: str) -> float:
    try:
        number = float(text)
    except ValueError as error:
        raise ScenarioError(f"mix: {part!r}: expected a number after =") from error
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
    """The facts that the router reads about a catalogue model from an emulated server."""
    entry = catalogue()[name]
    digest = hashlib.sha256(weights_text(entry).encode()).hexdigest()
    tensors = [{"name": n, "type": kind, "shape": shape} for n, kind, shape in entry.tensors]
    reply_json = {"modelfile": f"FROM /blobs/sha256-{digest}", "model_info": entry.metadata, "tensors": tensors,
            "capabilities": entry.capabilities}  # fmt: skip
    reply = msgspec.json.decode(json.dumps(reply_json).encode(), type=ShowReply)
    facts = read_facts(TagRow(name, digest, entry.size_bytes), reply)
    if facts is None:
        raise ScenarioError(f"the catalogue's {name} has no weights")
    return facts


def _active_share(entry: CatalogueModel) -> float:
    return active_share(Header(entry.metadata, entry.tensors, is_noise=False))


def large_models(scenario: Scenario) -> frozenset[str]:
    """Names of the models that fit on no single GPU of the scenario."""
    largest_gpu_bytes = max(gpu.usable_bytes for gpu in scenario.gpus)
    config = ServerConfig()
    return frozenset(
        name
        for name, model in scenario.models.items()
        if true_gpu_bytes(model, shape_of(model, config), (model.layers + 1,))[0] > largest_gpu_bytes
    )


def in_world_of(name: str, scenario: Scenario) -> Scenario:
    """The scenario that the named baseline plays: for `instant-swaps` one in which a swap takes 0.1 s."""
    return replace(scenario, world=with_instant_swaps(scenario.world)) if name == INSTANT_SWAPS else scenario


def make_baseline(
    name: str,
    scenario: Scenario,
    policy: Policy | None = None,
    observer: DecisionObserver | None = None,
    config: ServerConfig | None = None,
) -> BaselineFactory:
    """Returns a factory for the named baseline, to be played in its world (`in_world_of`).

    `policy` and `observer` apply to llamayard only.

    `config`: options of the servers; None: those of a well-tuned stock server.

    For `best-plan` this first searches for a plan for `scenario`.

    Raises:
        ScenarioError: the name is unknown.
    """
    config = config or ServerConfig()
    if name == "best-plan":
        plan = search(scenario, config)
        return lambda machine, models: Planned(machine, models, config, plan)
    config_0_33 = replace(config, version=(0, 33, 0))
    makers: Mapping[str, BaselineFactory] = {
        "stock-0.24": lambda machine, _: StockServer(machine, config),
        "stock-0.33": lambda machine, _: StockServer(machine, config_0_33),
        "spread-0.24": lambda machine, _: StockServer(machine, replace(config, spread=True)),
        "spread-0.33": lambda machine, _: StockServer(machine, replace(config_0_33, spread=True)),
        "nginx-round-robin": lambda machine, _: NginxOverServers(machine, config, least_conn=False),
        "nginx-least-conn": lambda machine, _: NginxOverServers(machine, config, least_conn=True),
        "llamayard": lambda machine, _: Llamayard(machine, config, policy, observer),
        "llamayard-pairs": lambda machine, _: Llamayard(machine, config, policy, observer, pairs=True),
        "llamayard-0.33": lambda machine, _: Llamayard(machine, config_0_33, policy, observer),
        INSTANT_SWAPS: lambda machine, _: Llamayard(machine, config, policy, observer),
    }
    if name not in makers:
        raise ScenarioError(f"policy: unknown {name!r}; policies: {', '.join(BASELINES)}")
    return makers[name]
