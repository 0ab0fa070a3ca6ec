"""The Grafana dashboard: its queries parse, and name what the router exports."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from router.tools.grafana_dashboard import dashboard_document, queries
from tests.support.exported import exported_names
from tests.support.promtool import promtool

_NAME = re.compile(r"\b(?:llamayard|process)_\w+")
_VARIABLE = re.compile(r"\$\w+")


def _panels() -> list[dict[str, Any]]:
    return json.loads(dashboard_document())["panels"]


def test_every_query_parses(tmp_path: Path) -> None:
    values = {"$router": ".*", "$model": ".*", "$__rate_interval": "1m"}
    rules = [
        {"record": f"panel:{at}", "expr": _VARIABLE.sub(lambda found: values[found[0]], query)}
        for at, query in enumerate(queries())
    ]
    path = tmp_path / "rules.yaml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}), encoding="utf-8")
    checked = subprocess.run([promtool(), "check", "rules", path], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert f"{len(rules)} rules found" in checked.stdout


def test_every_metric_of_the_dashboard_is_exported() -> None:
    named = set(_NAME.findall(dashboard_document()))
    assert len(named) > 30
    assert named <= exported_names()


def test_no_panel_covers_another() -> None:
    cells = set[tuple[int, int]]()
    for panel in _panels():
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24
        own = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not own & cells, panel["title"]
        cells |= own
    numbers = [panel["id"] for panel in _panels()]
    assert len(set(numbers)) == len(numbers)


@pytest.mark.parametrize("panel", _panels(), ids=lambda panel: panel["title"])
def test_every_panel_says_what_it_shows(panel: dict[str, Any]) -> None:
    assert panel["type"] == "row" or (panel["description"].endswith(".") and panel["targets"])
