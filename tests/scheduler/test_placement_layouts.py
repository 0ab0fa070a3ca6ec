"""Models that only some servers have, and requests with a layout."""

from __future__ import annotations

from dataclasses import replace

import pytest

from router.domain.instance import InstanceName, InstanceView
from router.domain.model import ModelFacts
from router.domain.request import Layout, LayoutKind
from router.domain.snapshot import Snapshot
from router.scheduler.placement.placement import NoFit, Placed, PlacementRequest, place
from tests.scheduler.builders import by_weight, gpu, gpu_id, model, snapshot, view

SMALL, LARGE, HUGE = model("small", 10_000), model("large", 30_000), model("huge", 60_000)
PAIR = (view("gpu0", 0), view("gpu1", 1), view("spread", 0, 1))


def _placed(facts: Snapshot, of: ModelFacts) -> str:
    decision = place(facts, by_weight, PlacementRequest(of))
    assert isinstance(decision, Placed), decision
    return decision.instance


def _attached(name: str, *gpus: int) -> InstanceView:
    there = view(name, *gpus)
    return replace(there, spec=replace(there.spec, attached=True))


def test_a_model_goes_only_where_its_store_is() -> None:
    views = (view("gpu0", 0), _attached("near", 1))
    facts = snapshot([gpu(0, 11_000), gpu(1, 23_000)], views)
    for is_shared, attached_on, there in (
        (True, frozenset[InstanceName](), "gpu0"),
        (True, None, "near"),
        (False, frozenset({InstanceName("near")}), "near"),
        (True, frozenset({InstanceName("near")}), "near"),
    ):
        wanted = replace(SMALL, is_shared=is_shared, attached_on=attached_on)
        assert _placed(facts, wanted) == there
    far = replace(SMALL, is_shared=False, attached_on=frozenset({InstanceName("far")}))
    nowhere = place(facts, by_weight, PlacementRequest(far))
    assert isinstance(nowhere, NoFit)
    assert nowhere.code == "no_instance"
    assert "no instance that has model 'small' is running: gpu0 is ready; near is ready" in nowhere.message


SINGLE, SPREAD, GPU_0 = Layout(LayoutKind.SINGLE), Layout(LayoutKind.SPREAD), Layout(LayoutKind.GPU, gpu_id(0))


@pytest.mark.parametrize(("layout", "there"), [(None, "gpu1"), (SINGLE, "gpu1"), (GPU_0, "gpu0"), (SPREAD, "spread")])
def test_a_layout_is_respected_even_if_other_gpus_are_better(layout: Layout | None, there: str) -> None:
    facts = snapshot([gpu(0, 11_000), gpu(1, 23_000)], PAIR)
    decision = place(facts, by_weight, PlacementRequest(SMALL, layout=layout))
    assert isinstance(decision, Placed)
    assert decision.instance == there


@pytest.mark.parametrize(
    ("of", "views", "layout", "words"),
    [
        (SMALL, PAIR[:2], SPREAD, "no running instance is laid out as asked (spread)"),
        (SMALL, PAIR[1:], GPU_0, "no running instance is laid out as asked (gpu:GPU-0)"),
        (SMALL, (view("cpu"),), SINGLE, "no running instance is laid out as asked (single)"),
        (LARGE, PAIR, SINGLE, "model 'large' does not fit as asked (single): gpu0: GPU 0 needs"),
        (HUGE, PAIR, SPREAD, "model 'huge' does not fit as asked (spread): spread: GPU 0 needs"),
    ],
)
def test_an_impossible_layout_is_refused_with_the_reason(
    of: ModelFacts, views: tuple[InstanceView, ...], layout: Layout, words: str
) -> None:
    decision = place(snapshot([gpu(0, 23_000), gpu(1, 23_000)], views), by_weight, PlacementRequest(of, layout=layout))
    assert isinstance(decision, NoFit)
    assert decision.code == "layout_unavailable"
    assert words in decision.message
