"""The table of `llamayard ps`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from router.cli.loaded_models import loaded_models, rows_of
from router.cli.ps import render_ps

STATUS = json.loads((Path(__file__).parent / "status-4x3090.json").read_text(encoding="utf-8"))


def _row(**changes: Any) -> dict[str, Any]:
    row = {
        "model": "m", "instance": "gpu0", "gpus": ["0"], "state": "ready", "size_bytes": 1 << 30, "in_flight": 0,
        "slots": 2, "context_length": 8192, "expires_in_seconds": None, "pin": None, "reason": "",
    }  # fmt: skip
    return {**row, **changes}


def _cells(row: dict[str, Any]) -> list[str]:
    return render_ps([row]).splitlines()[2].split("  ")


def test_every_replica_of_a_status_has_a_row_that_fits() -> None:
    rows = loaded_models(STATUS)
    shown = render_ps(rows).splitlines()
    assert len(shown) == 2 + len(STATUS["models"])
    assert max(map(len, shown)) <= 100
    indexes = {gpu["uuid"]: str(gpu["index"]) for gpu in STATUS["gpus"]}
    views = {view["name"]: [indexes[uuid] for uuid in view["gpus"]] for view in STATUS["instances"]}
    assert all(row["gpus"] == views[row["instance"]] for row in rows)


@pytest.mark.parametrize(
    ("seconds", "shown"), [(None, "forever"), (7200.0, "2 h"), (290.0, "5 min"), (12.4, "12 s"), (-1.0, "0 s")]
)
def test_the_expiry_is_shown_in_the_fitting_unit(seconds: float | None, shown: str) -> None:
    assert shown in render_ps([_row(expires_in_seconds=seconds)])


def test_pins_and_the_cpu_are_shown() -> None:
    pin = {"gpus": ["0", "1"], "layout": "spread", "keep_warm": True}
    assert "GPU 0, 1, spread, warm" in render_ps([_row(pin=pin)])
    assert "CPU" in _cells(_row(gpus=[]))


def test_names_are_compared_in_any_form() -> None:
    rows = [_row(model="llama3.1:8b"), _row(model="nomic-embed-text:latest")]
    assert rows_of(rows, "Nomic-Embed-Text") == [rows[1]]
    assert rows_of(rows, "not a name/") == []


def test_without_models_it_says_none() -> None:
    assert render_ps([]) == "MODELS\n  none"
