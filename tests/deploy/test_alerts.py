"""The Prometheus alert rules: played by promtool, and compared with what the router exports."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.exported import exported_names

RULES = "deploy/prometheus-alerts.yaml"
PLAYED = "tests/deploy/alerts.test.yaml"


def _rules(root: Path) -> list[dict[str, Any]]:
    (group,) = yaml.safe_load((root / RULES).read_text(encoding="utf-8"))["groups"]
    return group["rules"]


def test_the_rules_fire_when_they_should(root: Path) -> None:
    binary = shutil.which("promtool")
    if binary is None:
        hint = "promtool is not installed (make prometheus)"
        pytest.fail(hint) if os.environ.get("CI") else pytest.skip(hint)
    played = subprocess.run([binary, "test", "rules", PLAYED], cwd=root, capture_output=True, text=True, check=False)
    assert played.returncode == 0, played.stdout + played.stderr


def test_every_rule_is_played_until_it_fires(root: Path) -> None:
    tests = yaml.safe_load((root / PLAYED).read_text(encoding="utf-8"))["tests"]
    fired = {case["alertname"] for test in tests for case in test["alert_rule_test"] if case["exp_alerts"]}
    assert fired == {rule["alert"] for rule in _rules(root)}


def test_every_rule_has_a_severity_and_a_summary(root: Path) -> None:
    rules = _rules(root)
    assert {rule["labels"]["severity"] for rule in rules} == {"critical", "warning"}
    assert all(rule["annotations"]["summary"] for rule in rules)


def test_every_alert_is_documented(root: Path) -> None:
    documented = (root / "docs/operations.md").read_text(encoding="utf-8")
    assert [rule["alert"] for rule in _rules(root) if f"`{rule['alert']}`" not in documented] == []


def test_every_metric_of_the_rules_is_exported(root: Path) -> None:
    named = {name for rule in _rules(root) for name in re.findall(r"\bllamayard_\w+", rule["expr"])}
    assert named <= exported_names()
