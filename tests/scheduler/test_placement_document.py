"""The worked examples in docs/placement.md agree with the code."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

from router.config.policy import UNSEEN_MARGIN_RATIO
from router.domain.model import ModelFacts
from router.domain.residency import Residency
from router.domain.snapshot import Demand, Snapshot
from router.engines.ollama.architectures import Backend
from router.engines.ollama.kv_cache import layer_cache_bytes
from router.engines.ollama.memory_estimate import CUDA_CONTEXT_BYTES, LoadParameters, even_split, footprint
from router.engines.ollama.offload_rules import predict_offload
from router.lab.scenarios import model_facts
from router.lab.simulator.server_placement import graph_bytes
from router.lab.simulator.true_footprint import LoadShape
from router.scheduler.placement import cost
from tests.scheduler.builders import instance, residency, snapshot, ticket, view

TEXT = (Path(__file__).parents[2] / "docs/placement.md").read_text(encoding="utf-8")
LARGE = model_facts("llama3.3:70b")
SMALL = model_facts("qwen2.5:14b")
ROWS = {"llama3.1:8b": (0.0442, "7.71"), "qwen2.5:14b": (0.0162, "3.04"), "mistral:7b": (0.00928, "1.60"),
        "llama3.2:3b": (0.00912, "1.50")}  # fmt: skip
"""Requests per second and prices of evictions in the table of the document."""


def test_the_footprint_of_the_document_is_the_code_s() -> None:
    split = even_split(LARGE.layers, 2)
    load = LoadParameters(8192, 2, "q8_0", flash_attention=True)
    whole = footprint(LARGE, split, load)
    plain = replace(load, kv_cache_type="f16", flash_attention=None)
    parts = [
        LARGE.weights_bytes,
        whole.weights_bytes,
        layer_cache_bytes(LARGE, 8192, 2, "q8_0", 512, Backend.LLAMA_CPP, (0, 24, 0))[0],
        whole.gpus[0].compute_buffer_bytes,
        CUDA_CONTEXT_BYTES,
        *whole.per_gpu_bytes,
        int(whole.per_gpu_bytes[0] * (1 + UNSEEN_MARGIN_RATIO)),
        footprint(LARGE, split, plain).per_gpu_bytes[0],
        footprint(LARGE, split, replace(load, slots=3)).per_gpu_bytes[0],
    ]
    assert [part for part in parts if f"{part:,}" not in TEXT] == []


def test_what_a_server_would_do_by_itself_is_what_the_document_says() -> None:
    spec = replace(instance("gpu0+gpu1", 0, 1), kv_cache_type="q8_0", flash_attention=True)
    free = [25_769_803_776 - 339_738_624] * 2
    assert "25,769,803,776 − 339,738,624" in TEXT
    assert predict_offload(LARGE, spec, "0.24.0", 8192, 2, free) == (80, 81)
    assert predict_offload(LARGE, replace(spec, kv_cache_type="f16"), "0.24.0", 8192, 2, free) == (76, 81)
    assert "room for 80 of the 81 units, and one would go to the CPU; with the default f16 cache five would" in TEXT
    assert f"{graph_bytes(LARGE, LoadShape(8192, 2)):,}" in TEXT


@pytest.mark.parametrize("name", ROWS)
def test_the_prices_of_the_document_are_the_code_s(name: str) -> None:
    rate, price = ROWS[name]
    assert f"`{name}`" in TEXT
    model = model_facts(name)
    found = cost.eviction_price(*_with_demand(model, rate))
    assert found == pytest.approx(float(price), rel=0.005)
    assert f"| {rate} |" in TEXT
    assert f"| {price} |" in TEXT


def test_the_swap_of_the_document_comes_at_once_or_when_it_starves() -> None:
    cheapest = sum(
        cost.eviction_price(*_with_demand(model_facts(n), ROWS[n][0])) for n in ("mistral:7b", "llama3.2:3b")
    )
    calm = snapshot(now=1000.0)
    policy = calm.policy
    pressed = replace(calm, loaded_bytes_per_second=policy.constants.swap_budget_bytes_per_second)

    served = replace(pressed, residencies={("gpu1", SMALL.blob): residency("gpu1", SMALL, 1, in_flight=1)})

    def worth(facts: Snapshot, waited_seconds: float, tickets: int = 1) -> float:
        waiting = [ticket(number, LARGE, arrived_at=1000.0 - waited_seconds) for number in range(tickets)]
        return cost.worth_of_load(facts, LARGE, waiting)

    assert worth(calm, 0.0) == 30.0
    assert worth(pressed, 0.0) == pytest.approx(7.0)
    assert worth(served, 0.0) == 0.0
    assert round(cheapest, 2) == 3.10
    assert worth(served, 56.0) == pytest.approx(2.80)
    assert worth(served, 30.9, 2) < cheapest < worth(served, 31.1, 2)
    assert policy.starving_after_seconds * policy.constants.large_wait_share == 56.25
    assert "after 56 s, since 0.05 × 56 = 2.80 < 3.10" in TEXT
    assert "two requests go ahead after 31 s" in TEXT


def _with_demand(model: ModelFacts, rate: float) -> tuple[Snapshot, Residency]:
    """A snapshot with the model loaded and idle, and its recent request rate."""
    loaded = residency("gpu0", model, 6000)
    facts = snapshot(views=[view("gpu0", 0)], residencies=[loaded])
    weight = rate * facts.policy.constants.demand_half_life_seconds / math.log(2.0)
    return replace(facts, demand={model.blob: Demand(weight, facts.now)}), loaded
