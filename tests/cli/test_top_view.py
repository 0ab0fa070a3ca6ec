"""The screen of `llamayard top`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from router.cli.top_view import SORTS, View, frame, models_of, moved, names_of, next_sort

STATUS = json.loads((Path(__file__).parent / "status-4x3090.json").read_text(encoding="utf-8"))
EMPTY: dict[str, Any] = {"gpus": [], "instances": [], "models": [], "queue": {"waiting": 0}, "waiting": []}


@pytest.mark.parametrize("status", [STATUS, EMPTY])
@pytest.mark.parametrize(("columns", "lines"), [(80, 24), (100, 40), (60, 10), (200, 60), (20, 2), (80, 1)])
def test_a_frame_fits_the_terminal(status: dict[str, Any], columns: int, lines: int) -> None:
    shown = frame(status, View(), columns, lines)
    assert len(shown) <= lines
    assert max(map(len, shown)) <= columns
    assert lines < 2 or shown[-1].startswith("q quit")


def test_at_80x24_gpus_models_and_queue_are_there() -> None:
    shown = "\n".join(frame(STATUS, View(), 80, 24))
    assert "waiting" in shown.splitlines()[0]
    for gpu in STATUS["gpus"]:
        assert f"\n{gpu['index']} " in shown
    assert "\n> " in shown
    assert "QUEUE" in shown


def test_sorting_goes_round_and_changes_the_order() -> None:
    view = View()
    orders = []
    for _ in SORTS:
        orders.append([(row["model"], row["instance"]) for row in models_of(STATUS, view)])
        view = next_sort(view)
    assert view == View()
    assert len({tuple(order) for order in orders}) > 1
    sizes = [row["size_bytes"] for row in models_of(STATUS, View(sort="size"))]
    assert sizes == sorted(sizes, reverse=True)


def test_the_selection_moves_and_stays_within() -> None:
    names = names_of(models_of(STATUS, View()))
    view = moved(View(), names, -1)
    assert view.selected == names[0]
    assert moved(view, names, 1).selected == names[1]
    assert moved(view, names, 99).selected == names[-1]
    assert moved(view, [], 1) == view


def test_the_selected_model_is_on_a_small_screen_too() -> None:
    names = names_of(models_of(STATUS, View()))
    for name in names:
        shown = frame(STATUS, View(selected=name), 100, 16)
        assert any(line.startswith("> ") for line in shown), name


def test_models_that_only_wait_are_listed_and_a_lost_gpu_is_named() -> None:
    waiting = {"model": "m:1b", "waited_seconds": 3.0, "expected_wait_seconds": None, "reason": "no\x1b[2Jroom"}
    gpu = {"uuid": "GPU-1", "index": 1, "lost": True, "error": "fell off the bus", "memory_total_bytes": 1 << 34}
    shown = "\n".join(
        frame({**EMPTY, "gpus": [gpu], "waiting": [waiting] * 7, "queue": {"waiting": 7}}, View(), 80, 24)
    )
    assert "> m:1b" in shown
    assert "lost: fell off the bus" in shown
    assert "waited 3 s, expects ?: no [2Jroom" in shown
    assert "… 2 more" in shown
